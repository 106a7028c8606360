//! Fragments. Only a packet's first one has its ports, so none is ever translated. A first one that a whole packet in its
//! place would be translated is dropped and counted: without it nobody puts the rest together, and no piece of what was
//! meant for a Service ends up with the host itself.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{Address, ConnectionKey, Counter, FrontendKey, TCP, UDP, direction};

use crate::connections::find_off_stack;
use crate::counters::count;
use crate::maps::FRONTENDS;
use crate::packet::{ipv4_at, ipv6_at, network_protocol};

/// Of IPv6's extension headers (RFC 8200, section 4.5).
const IPV6_FRAGMENT: u8 = 44;
const IPV6_OFFSET: u16 = 0xfff8_u16.to_be();

/// struct frag_hdr (include/net/ipv6.h), network order.
#[repr(C)]
struct FragmentHeader {
    next: u8,
    _reserved: u8,
    offset: u16,
    _id: u32,
}

/// Drops the packet whose IP header begins at `l3` bytes if it is such a fragment on its way in or out; whether it did.
#[inline(always)]
pub fn drop_first(ctx: &TcContext, l3: u32, way: u32) -> bool {
    if drop_fragment(ctx.skb.skb, l3, way) == 0 {
        return false;
    }
    count(Counter::DroppedFragments);
    true
}

/// Under a name of its own it is a global function to the verifier, with a stack of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn drop_fragment(skb: *mut __sk_buff, l3: u32, way: u32) -> u32 {
    u32::from(would_be_translated(&TcContext::new(skb), l3, way as u8).unwrap_or(false))
}

#[inline(always)]
fn would_be_translated(ctx: &TcContext, l3: u32, way: u8) -> Option<bool> {
    let (source, destination, protocol, l4) = if network_protocol(ctx)? {
        let header = ipv4_at(ctx, l3)?;
        if !header.is_fragment() || header.is_later_fragment() {
            return None;
        }
        let (source, destination) = (Address::v4(header.source), Address::v4(header.destination));
        (source, destination, header.protocol, l3 + header.length())
    } else {
        let header = ipv6_at(ctx, l3)?;
        if header.next != IPV6_FRAGMENT {
            return None;
        }
        let fragment: FragmentHeader = ctx.load(l3 as usize + 40).ok()?;
        if fragment.offset & IPV6_OFFSET != 0 {
            return None;
        }
        (header.source(), header.destination(), fragment.next, l3 + 48)
    };
    // SCTP does not let itself be fragmented by IP (RFC 9260, section 6.9).
    if protocol != TCP && protocol != UDP {
        return None;
    }
    let [source_port, destination_port]: [u16; 2] = ctx.load(l4 as usize).ok()?;
    let known = find_off_stack(ConnectionKey {
        source,
        destination,
        source_port,
        destination_port,
        protocol,
        direction: way,
        zero: 0,
    });
    if known.is_some() || way == direction::OUT {
        return Some(known.is_some());
    }
    let key = FrontendKey {
        address: destination,
        port: destination_port,
        protocol,
        zero: 0,
    };
    Some(FRONTENDS.get_ptr(&key).is_some())
}
