//! Reading a packet's addresses and ports, and writing others with all checksums put right.
//!
//! Packets that cannot be told apart by ports (fragments, extension headers, other protocols) are never touched here;
//! ICMP errors are [`crate::icmp`]'s.
//! Everything goes through helpers, so headers need not lie in the linear part of the buffer.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{Address, ConnectionKey, Counter, TCP, UDP};

use crate::counters::count;

/// TCP flags, as in the header's 14th byte.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;
const FRAGMENT: u16 = 0x3fff_u16.to_be();
const FRAGMENT_OFFSET: u16 = 0x1fff_u16.to_be();
const IPV6_FRAGMENT: u8 = 44;

/// A TCP or UDP packet, not a fragment. Addresses and ports in network order.
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    pub source_port: u16,
    pub destination_port: u16,
    pub protocol: u8,
    /// 0 unless TCP.
    pub tcp_flags: u8,
    v4: bool,
    /// Offset of the IP header, bytes.
    l3: u32,
    /// Offset of the TCP or UDP header, bytes.
    l4: u32,
}

/// struct iphdr (include/uapi/linux/ip.h), network order.
#[repr(C)]
pub struct Ipv4 {
    version_length: u8,
    _tos: u8,
    _total: u16,
    _id: u16,
    fragment: u16,
    _ttl: u8,
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
    _flow: u32,
    _length: u16,
    pub next: u8,
    _hops: u8,
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
    /// Reads the packet whose IP header begins at `L3` bytes; `None` if it is not for us to touch.
    #[inline(always)]
    pub fn read<const L3: u32>(ctx: &TcContext) -> Option<Self> {
        let mut packet = if network_protocol(ctx)? {
            let header = ipv4_at(ctx, L3)?;
            if header.is_fragment() {
                count(Counter::Fragments);
                return None;
            }
            Self {
                source: Address::v4(header.source),
                destination: Address::v4(header.destination),
                source_port: 0,
                destination_port: 0,
                protocol: header.protocol,
                tcp_flags: 0,
                v4: true,
                l3: L3,
                l4: L3 + header.length(),
            }
        } else {
            let header = ipv6_at(ctx, L3)?;
            if header.next == IPV6_FRAGMENT {
                count(Counter::Fragments);
            }
            Self {
                source: header.source(),
                destination: header.destination(),
                source_port: 0,
                destination_port: 0,
                protocol: header.next,
                tcp_flags: 0,
                v4: false,
                l3: L3,
                l4: L3 + 40,
            }
        };
        // The whole header is read, so that a packet cut short is let alone rather than half rewritten.
        if packet.protocol == TCP {
            let header: Tcp = ctx.load(packet.l4 as usize).ok()?;
            packet.source_port = header.source;
            packet.destination_port = header.destination;
            packet.tcp_flags = header.flags;
        } else if packet.protocol == UDP {
            let header: Udp = ctx.load(packet.l4 as usize).ok()?;
            packet.source_port = header.source;
            packet.destination_port = header.destination;
        } else {
            return None;
        }
        Some(packet)
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

    /// Whether it opens a connection: a SYN alone, or any datagram.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.protocol == UDP || self.tcp_flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Writes another source address and port.
    #[inline(always)]
    pub fn set_source(&self, ctx: &TcContext, address: &Address, port: u16) -> Result<(), i64> {
        let at = if self.v4 { 12 } else { 8 };
        self.rewrite(ctx, (&self.source, self.source_port), (address, port), at, 0)
    }

    /// Writes another destination address and port.
    #[inline(always)]
    pub fn set_destination(&self, ctx: &TcContext, address: &Address, port: u16) -> Result<(), i64> {
        let at = if self.v4 { 16 } else { 24 };
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
        // A UDP checksum of 0 means none, and stays so; one that comes out as 0 is written as 0xffff.
        let (checksum, flags) = if self.protocol == UDP {
            (self.l4 + 6, u64::from(BPF_F_MARK_MANGLED_0))
        } else {
            (self.l4 + 16, 0)
        };
        let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR);
        let address_at = (self.l3 + address_at) as usize;
        if self.v4 {
            let (from, to) = (u64::from(old.words[3]), u64::from(new.words[3]));
            ctx.l4_csum_replace(checksum as usize, from, to, pseudo | 4)?;
            ctx.l3_csum_replace(self.l3 as usize + 10, from, to, 4)?;
            ctx.store(address_at, &new.words[3], 0)?;
        } else {
            ctx.l4_csum_replace(checksum as usize, 0, difference(old, new)?, pseudo)?;
            ctx.store(address_at, &new.words, 0)?;
        }
        ctx.l4_csum_replace(
            checksum as usize,
            u64::from(old_port),
            u64::from(new_port),
            flags | 2,
        )?;
        ctx.store((self.l4 + port_at) as usize, &new_port, 0)
    }
}
