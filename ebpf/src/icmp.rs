//! ICMP errors about translated packets. Such an error quotes the packet it is about; the quote is translated back, as
//! the packet itself was, so that its sender knows it for its own (RFC 5508, section 4.2).
//!
//! Never answers anything itself: it passes on what hosts and routers have to say.

use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{Address, ConnectionKey, SCTP, TCP, UDP};

use crate::packet::{Ipv4, Ipv6, difference, ipv4_at, ipv6_at, network_protocol};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Length of the ICMP header of every error, bytes.
const ICMP_HEADER: u32 = 8;

/// An ICMP error that quotes a TCP, UDP or SCTP packet. Addresses and ports in network order.
pub struct IcmpError {
    source: Address,
    destination: Address,
    quoted_source: Address,
    quoted_destination: Address,
    ports: Ports,
    protocol: u8,
    v4: bool,
    /// Offset of the IP header, bytes.
    l3: u32,
    /// Offset of the ICMP header, bytes.
    icmp: u32,
    /// Offset of the quoted IP header, bytes.
    quote: u32,
    /// Offset of the quoted TCP, UDP or SCTP header, bytes.
    quoted_l4: u32,
}

/// The part of a TCP, UDP or SCTP header that every error quotes.
#[repr(C)]
struct Ports {
    source: u16,
    destination: u16,
    _more: u32,
}

impl IcmpError {
    /// Reads the error in the packet whose IP header begins at `l3` bytes; `None` if it is none, or quotes what is never
    /// translated.
    #[inline(always)]
    pub fn read(ctx: &TcContext, l3: u32) -> Option<Self> {
        let v4 = network_protocol(ctx)?;
        let (source, destination, icmp) = if v4 {
            let header: Ipv4 = ipv4_at(ctx, l3)?;
            if header.protocol != ICMP || header.is_fragment() {
                return None;
            }
            let addresses = (Address::v4(header.source), Address::v4(header.destination));
            (addresses.0, addresses.1, l3 + header.length())
        } else {
            let header: Ipv6 = ipv6_at(ctx, l3)?;
            if header.next != ICMPV6 {
                return None;
            }
            (header.source(), header.destination(), l3 + 40)
        };
        let kind: u8 = ctx.load(icmp as usize).ok()?;
        // Unreachable, time exceeded, bad parameter (RFC 792); unreachable, too big, time exceeded, bad parameter (RFC 4443).
        let is_error = if v4 {
            kind == 3 || kind == 11 || kind == 12
        } else {
            kind >= 1 && kind <= 4
        };
        if !is_error {
            return None;
        }
        let quote = icmp + ICMP_HEADER;
        let (quoted_source, quoted_destination, protocol, quoted_l4) = if v4 {
            let header: Ipv4 = ipv4_at(ctx, quote)?;
            if header.is_later_fragment() {
                return None;
            }
            let addresses = (Address::v4(header.source), Address::v4(header.destination));
            (addresses.0, addresses.1, header.protocol, quote + header.length())
        } else {
            let header: Ipv6 = ipv6_at(ctx, quote)?;
            (header.source(), header.destination(), header.next, quote + 40)
        };
        if protocol != TCP && protocol != UDP && protocol != SCTP {
            return None;
        }
        Some(Self {
            source,
            destination,
            quoted_source,
            quoted_destination,
            ports: ctx.load(quoted_l4 as usize).ok()?,
            protocol,
            v4,
            l3,
            icmp,
            quote,
            quoted_l4,
        })
    }

    /// The key in `connections_v1` of an answer to the quoted packet, in the direction of the error itself.
    #[inline(always)]
    pub fn key(&self, direction: u8) -> ConnectionKey {
        ConnectionKey {
            source: self.quoted_destination,
            destination: self.quoted_source,
            source_port: self.ports.destination,
            destination_port: self.ports.source,
            protocol: self.protocol,
            direction,
            zero: 0,
        }
    }

    /// On its way in: to whom the quoted packet really came from, and quoting it as that one's.
    #[inline(always)]
    pub fn set_destination(&self, ctx: &TcContext, address: &Address, port: u16) -> Result<(), i64> {
        let at = if self.v4 { 12 } else { 8 };
        self.requote(
            ctx,
            (&self.quoted_source, self.ports.source),
            (address, port),
            at,
            0,
        )?;
        let at = if self.v4 { 16 } else { 24 };
        self.readdress(ctx, &self.destination, address, at)
    }

    /// On its way out: from where the quoted packet was sent to, as its sender knows it, and quoting it as it was sent.
    #[inline(always)]
    pub fn set_source(&self, ctx: &TcContext, address: &Address, port: u16) -> Result<(), i64> {
        let at = if self.v4 { 16 } else { 24 };
        let old = (&self.quoted_destination, self.ports.destination);
        self.requote(ctx, old, (address, port), at, 2)?;
        let at = if self.v4 { 12 } else { 8 };
        self.readdress(ctx, &self.source, address, at)
    }

    /// Rewrites one end of the quoted packet. What changes in it changes the ICMP checksum; only an IPv4 address and the
    /// quoted header's own checksum make up for each other.
    #[inline(always)]
    fn requote(
        &self,
        ctx: &TcContext,
        (old, old_port): (&Address, u16),
        (new, new_port): (&Address, u16),
        address_at: u32,
        port_at: u32,
    ) -> Result<(), i64> {
        let icmp_checksum = self.icmp as usize + 2;
        let quoted_checksum = self.quoted_l4 as usize + if self.protocol == UDP { 6 } else { 16 };
        let delta = difference(old, new)?;
        // The quote may end before it, and a UDP packet may go without. Nobody can check SCTP's, which is over the whole
        // packet.
        let before = if self.protocol == SCTP {
            None
        } else {
            ctx.load::<u16>(quoted_checksum).ok()
        };
        if let Some(before) = before.filter(|sum| *sum != 0 || self.protocol == TCP) {
            ctx.l4_csum_replace(quoted_checksum, 0, delta, 0)?;
            ctx.l4_csum_replace(quoted_checksum, u64::from(old_port), u64::from(new_port), 2)?;
            let after: u16 = ctx.load(quoted_checksum)?;
            ctx.l4_csum_replace(icmp_checksum, u64::from(before), u64::from(after), 2)?;
        }
        let address_at = (self.quote + address_at) as usize;
        if self.v4 {
            let (from, to) = (u64::from(old.words[3]), u64::from(new.words[3]));
            ctx.l3_csum_replace(self.quote as usize + 10, from, to, 4)?;
            ctx.store(address_at, &new.words[3], 0)?;
        } else {
            ctx.l4_csum_replace(icmp_checksum, 0, delta, 0)?;
            ctx.store(address_at, &new.words, 0)?;
        }
        ctx.l4_csum_replace(icmp_checksum, u64::from(old_port), u64::from(new_port), 2)?;
        ctx.store((self.quoted_l4 + port_at) as usize, &new_port, 0)
    }

    /// Rewrites one address of the error itself. ICMPv6's checksum covers it, ICMP's does not.
    #[inline(always)]
    fn readdress(&self, ctx: &TcContext, old: &Address, new: &Address, at: u32) -> Result<(), i64> {
        let at = (self.l3 + at) as usize;
        if self.v4 {
            let (from, to) = (u64::from(old.words[3]), u64::from(new.words[3]));
            ctx.l3_csum_replace(self.l3 as usize + 10, from, to, 4)?;
            ctx.store(at, &new.words[3], 0)
        } else {
            let pseudo = u64::from(aya_ebpf::bindings::BPF_F_PSEUDO_HDR);
            ctx.l4_csum_replace(self.icmp as usize + 2, 0, difference(old, new)?, pseudo)?;
            ctx.store(at, &new.words, 0)
        }
    }
}
