//! Reading a packet's addresses and ports, and writing others with all checksums put right.
//!
//! Packets that cannot be told apart by ports (fragments, other protocols) are never touched here;
//! ICMP errors are [`crate::icmp`]'s.
//! Everything goes through helpers, so headers need not lie in the linear part of the buffer.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::bpf_csum_diff;
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{Address, ConnectionKey, SCTP, TCP, UDP};

use crate::sctp;

/// Length of an Ethernet header, bytes.
pub const ETHERNET: u32 = 14;

/// TCP flags, as in the header's 14th byte.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;
const FRAGMENT: u16 = 0x3fff_u16.to_be();
const FRAGMENT_OFFSET: u16 = 0x1fff_u16.to_be();

/// Of IPv6's extension headers (RFC 8200, sections 4.3 and 4.6).
const HOP_BY_HOP: u8 = 0;
const DESTINATION_OPTIONS: u8 = 60;

#[map]
static PACKET: PerCpuArray<Packet> = PerCpuArray::with_max_entries(1, 0);

/// A TCP, UDP or SCTP packet, not a fragment. Addresses and ports in network order.
#[repr(C)]
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    pub source_port: u16,
    pub destination_port: u16,
    pub protocol: u8,
    /// TCP's; for SCTP those that say the same; 0 for UDP.
    pub flags: u8,
    /// 0 for IPv6.
    v4: u8,
    /// Offset of the IP header, bytes.
    l3: u32,
    /// Offset of the TCP, UDP or SCTP header, bytes.
    l4: u32,
    /// Length of what the IP header says is behind it, bytes.
    length: u32,
}

/// struct iphdr (include/uapi/linux/ip.h), network order.
#[repr(C)]
pub struct Ipv4 {
    version_length: u8,
    pub tos: u8,
    total: u16,
    _id: u16,
    fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    _checksum: u16,
    pub source: u32,
    pub destination: u32,
}

impl Ipv4 {
    /// Options included, bytes.
    #[inline(always)]
    pub fn length(&self) -> u32 {
        u32::from(self.version_length & 15) * 4
    }

    /// Whether there are none.
    #[inline(always)]
    pub fn is_plain(&self) -> bool {
        self.version_length == 0x45
    }

    /// Whether this is part of a packet, the first included.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        self.fragment & FRAGMENT != 0
    }

    /// Whether this is part of a packet and not its beginning, so that ports do not follow.
    #[inline(always)]
    pub fn is_later_fragment(&self) -> bool {
        self.fragment & FRAGMENT_OFFSET != 0
    }
}

/// struct ipv6hdr (include/uapi/linux/ipv6.h), network order.
#[repr(C)]
pub struct Ipv6 {
    pub flow: u32,
    length: u16,
    pub next: u8,
    pub hops: u8,
    source: [u32; 4],
    destination: [u32; 4],
}

impl Ipv6 {
    #[inline(always)]
    pub fn source(&self) -> Address {
        Address { words: self.source }
    }

    #[inline(always)]
    pub fn destination(&self) -> Address {
        Address {
            words: self.destination,
        }
    }
}

/// Whether the packet is IPv4; `None` if it is not IPv6 either.
#[inline(always)]
pub fn network_protocol(ctx: &TcContext) -> Option<bool> {
    // SAFETY: the kernel hands the program a valid context.
    let kind = unsafe { (&raw const (*ctx.skb.skb).protocol).read_volatile() };
    match kind {
        ETH_P_IP => Some(true),
        ETH_P_IPV6 => Some(false),
        _ => None,
    }
}

/// The IPv4 header at `at` bytes.
#[inline(always)]
pub fn ipv4_at(ctx: &TcContext, at: u32) -> Option<Ipv4> {
    let header: Ipv4 = ctx.load(at as usize).ok()?;
    (header.version_length >> 4 == 4 && header.version_length & 15 >= 5).then_some(header)
}

/// The IPv6 header at `at` bytes. Mapped addresses do not belong on a wire, and would pass for IPv4 in the tables.
#[inline(always)]
pub fn ipv6_at(ctx: &TcContext, at: u32) -> Option<Ipv6> {
    let header: Ipv6 = ctx.load(at as usize).ok()?;
    (!header.source().is_v4() && !header.destination().is_v4()).then_some(header)
}

/// What follows the options of an IPv6 packet, the first of whose headers is of the type `next` and begins at `at` bytes: its type, and how long
/// they are, bytes.
///
/// There is one header for every hop and one for the destination, in this order (RFC 8200, section 4.1). Another order, and
/// routing headers, which make checksums those of another destination, are let alone.
#[inline(always)]
fn skip_options(ctx: &TcContext, mut next: u8, at: u32) -> Option<(u8, u32)> {
    let mut skipped = 0;
    for kind in [HOP_BY_HOP, DESTINATION_OPTIONS] {
        if next == kind {
            let [following, more]: [u8; 2] = ctx.load((at + skipped) as usize).ok()?;
            next = following;
            // In eights of bytes, beyond the first.
            skipped += (u32::from(more) + 1) * 8;
        }
    }
    Some((next, skipped))
}

/// What a checksum changes by when `old` gives way to `new`, for `bpf_l4_csum_replace`.
#[inline(always)]
pub fn difference(old: &Address, new: &Address) -> Result<u64, i64> {
    let (mut from, mut to) = (*old, *new);
    // SAFETY: both are 16 bytes on this program's stack. IPv4 addresses differ in their last word alone.
    let difference = unsafe { bpf_csum_diff(from.words.as_mut_ptr(), 16, to.words.as_mut_ptr(), 16, 0) };
    if difference < 0 {
        Err(difference)
    } else {
        Ok(difference as u64)
    }
}

/// struct tcphdr (include/uapi/linux/tcp.h), network order.
#[repr(C)]
struct Tcp {
    source: u16,
    destination: u16,
    _sequence: [u32; 2],
    _offset: u8,
    flags: u8,
    _window: u16,
    _checksum: u16,
    _urgent: u16,
}

/// struct udphdr (include/uapi/linux/udp.h), network order.
#[repr(C)]
struct Udp {
    source: u16,
    destination: u16,
    _length: u16,
    _checksum: u16,
}

impl Packet {
    /// Reads the packet whose IP header begins at `l3` bytes; `None` if it is not for us to touch.
    ///
    /// It lies in a map, one for each CPU, until the next one is read: there is more room than on the stack, and the
    /// verifier takes what it reads there for any value, so that it does not follow each kind of packet on every way.
    #[inline(always)]
    pub fn read(ctx: &TcContext, l3: u32) -> Option<&'static Self> {
        // SAFETY: the pointer is a value of this CPU's, and while a program for packets runs no other does there.
        let packet = unsafe { &mut *PACKET.get_ptr_mut(0)? };
        packet.l3 = l3;
        packet.flags = 0;
        let (protocol, l4) = if network_protocol(ctx)? {
            let header = ipv4_at(ctx, l3)?;
            if header.is_fragment() {
                return None;
            }
            packet.source = Address::v4(header.source);
            packet.destination = Address::v4(header.destination);
            packet.v4 = 1;
            packet.length = u32::from(u16::from_be(header.total)).wrapping_sub(header.length());
            (header.protocol, l3 + header.length())
        } else {
            let header = ipv6_at(ctx, l3)?;
            packet.source = header.source();
            packet.destination = header.destination();
            packet.v4 = 0;
            let (protocol, options) = skip_options(ctx, header.next, l3 + 40)?;
            packet.length = u32::from(u16::from_be(header.length)).wrapping_sub(options);
            (protocol, l3 + 40 + options)
        };
        packet.protocol = protocol;
        packet.l4 = l4;
        // The whole header is read, so that a packet cut short is let alone rather than half rewritten.
        let at = l4 as usize;
        (packet.source_port, packet.destination_port) = match protocol {
            TCP => {
                let header: Tcp = ctx.load(at).ok()?;
                packet.flags = header.flags;
                (header.source, header.destination)
            }
            UDP => {
                let header: Udp = ctx.load(at).ok()?;
                (header.source, header.destination)
            }
            SCTP => {
                let header: sctp::Header = ctx.load(at).ok()?;
                packet.flags = sctp::flags(header.chunk);
                (header.source, header.destination)
            }
            _ => return None,
        };
        Some(packet)
    }

    /// The one that was read last on this CPU.
    #[inline(always)]
    pub fn last() -> Option<&'static Self> {
        // SAFETY: as in `read`; any bytes are a packet.
        PACKET.get_ptr(0).map(|packet| unsafe { &*packet })
    }

    /// Its key in `connections_v1`; `direction` is one of [`sluice_ebpf_types::direction`].
    #[inline(always)]
    pub fn key(&self, direction: u8) -> ConnectionKey {
        ConnectionKey {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port,
            destination_port: self.destination_port,
            protocol: self.protocol,
            direction,
            zero: 0,
        }
    }

    /// Whether it opens a connection: a SYN or INIT alone, or any datagram.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.protocol == UDP || self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Writes another source address and port.
    #[inline(always)]
    pub fn set_source(&self, ctx: &TcContext, address: &Address, port: u16) -> Result<(), i64> {
        let at = if self.v4 != 0 { 12 } else { 8 };
        self.rewrite(ctx, (&self.source, self.source_port), (address, port), at, 0)
    }

    /// Writes another destination address and port.
    #[inline(always)]
    pub fn set_destination(&self, ctx: &TcContext, address: &Address, port: u16) -> Result<(), i64> {
        let at = if self.v4 != 0 { 16 } else { 24 };
        self.rewrite(
            ctx,
            (&self.destination, self.destination_port),
            (address, port),
            at,
            2,
        )
    }

    /// Checksums first, so that a failure leaves addresses and ports as they were.
    #[inline(always)]
    fn rewrite(
        &self,
        ctx: &TcContext,
        (old, old_port): (&Address, u16),
        (new, new_port): (&Address, u16),
        address_at: u32,
        port_at: u32,
    ) -> Result<(), i64> {
        let address_at = (self.l3 + address_at) as usize;
        let (from, to) = (u64::from(old.words[3]), u64::from(new.words[3]));
        if self.protocol == SCTP {
            // Its checksum has no part of the addresses, and each port its half of the first four bytes.
            let changed = u32::from(old_port ^ new_port) << (port_at * 8);
            sctp::replace_checksum(ctx, self.l4 as usize + 8, changed, self.length)?;
        } else {
            // A UDP checksum of 0 means none, and stays so; one that comes out as 0 is written as 0xffff.
            let (checksum, flags) = if self.protocol == UDP {
                (self.l4 as usize + 6, u64::from(BPF_F_MARK_MANGLED_0))
            } else {
                (self.l4 as usize + 16, 0)
            };
            let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR);
            if self.v4 != 0 {
                ctx.l4_csum_replace(checksum, from, to, pseudo | 4)?;
            } else {
                ctx.l4_csum_replace(checksum, 0, difference(old, new)?, pseudo)?;
            }
            ctx.l4_csum_replace(checksum, u64::from(old_port), u64::from(new_port), flags | 2)?;
        }
        if self.v4 != 0 {
            ctx.l3_csum_replace(self.l3 as usize + 10, from, to, 4)?;
            ctx.store(address_at, &new.words[3], 0)?;
        } else {
            ctx.store(address_at, &new.words, 0)?;
        }
        ctx.store((self.l4 + port_at) as usize, &new_port, 0)
    }
}
