//! Pings of a ClusterIP: answered while the Service has an endpoint, unreachable when it has none. No host has such an
//! address, but everybody tries this first.
//!
//! The packet is turned round where it is met: at the device of the pod that sends it, or where the node sends its own.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{Address, Counter, node_flag};

use crate::counters::count;
use crate::maps::{ADDRESSES, NODE};
use crate::packet::{ETHERNET, ipv4_at, ipv6_at, network_protocol};
use crate::unreachable::{self, ICMP, ICMPV6, Sender, turn_back};

/// Types of RFC 792 and RFC 4443.
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u16 = 129;
const L3: usize = ETHERNET as usize;

/// No verdict. `TC_ACT_OK`, which nothing here ever answers.
const NO_PING: i32 = 0;

/// Turns a ping of a ClusterIP round; `None` if the packet is none.
#[inline(always)]
pub fn answer(ctx: &TcContext, sender: Sender) -> Option<i32> {
    match answer_ping(ctx.skb.skb, sender as u32) {
        NO_PING => None,
        verdict => Some(verdict),
    }
}

/// Under a name of its own it is a global function to the verifier, with a stack of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn answer_ping(skb: *mut __sk_buff, sender: u32) -> i32 {
    turn(&TcContext::new(skb), sender).unwrap_or(NO_PING)
}

#[inline(always)]
fn turn(ctx: &TcContext, sender: u32) -> Option<i32> {
    let v4 = network_protocol(ctx)?;
    let (source, destination) = if v4 {
        let header = ipv4_at(ctx, ETHERNET)?;
        if header.protocol != ICMP || !header.is_plain() || header.is_fragment() {
            return None;
        }
        (Address::v4(header.source), Address::v4(header.destination))
    } else {
        let header = ipv6_at(ctx, ETHERNET)?;
        if header.next != ICMPV6 {
            return None;
        }
        (header.source(), header.destination())
    };
    let icmp = L3 + if v4 { 20 } else { 40 };
    let kind: u8 = ctx.load(icmp).ok()?;
    if kind != (if v4 { ECHO_REQUEST } else { ECHO_REQUEST_V6 }) {
        return None;
    }
    let node = NODE.get(0).filter(|node| node.flags & node_flag::PING != 0)?;
    // SAFETY: a value of this map is one word, read at once.
    let serves = *unsafe { ADDRESSES.get(&destination) }? != 0;
    let turned = if serves {
        reply(ctx, v4, &source, &destination, icmp)
    } else {
        // The node would not believe an error from its own address that comes in at a device.
        let from = match (sender == Sender::Here as u32, v4) {
            (true, _) => destination,
            (false, true) => node.node_v4,
            (false, false) => node.node_v6,
        };
        unreachable::make(ctx, v4, unreachable::HOST, &from, &source)
    };
    let Ok(verdict) = turned.and_then(|()| turn_back(ctx, sender)) else {
        count(Counter::DroppedRewrite);
        return Some(TC_ACT_SHOT as i32);
    };
    count(if serves {
        Counter::Pings
    } else {
        Counter::PingsRefused
    });
    Some(verdict)
}

/// Sums do not mind that addresses change places.
#[inline(always)]
fn reply(ctx: &TcContext, v4: bool, source: &Address, destination: &Address, icmp: usize) -> Result<(), i64> {
    let word = |kind: u16| u64::from(kind);
    if v4 {
        ctx.l4_csum_replace(icmp + 2, word(u16::from(ECHO_REQUEST)), 0, 2)?;
        ctx.store(icmp, &0_u8, 0)?;
        ctx.store(L3 + 12, &destination.words[3], 0)?;
        ctx.store(L3 + 16, &source.words[3], 0)
    } else {
        let (old, new) = (word(u16::from(ECHO_REQUEST_V6)), word(ECHO_REPLY_V6));
        ctx.l4_csum_replace(icmp + 2, old, new, 2)?;
        ctx.store(icmp, &(ECHO_REPLY_V6 as u8), 0)?;
        ctx.store(L3 + 8, &destination.words, 0)?;
        ctx.store(L3 + 24, &source.words, 0)
    }
}
