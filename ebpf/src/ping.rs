//! Pings of a ClusterIP: answered while the Service has an endpoint, unreachable when it has none. No host has such an
//! address, but everybody tries this first.
//!
//! The packet is turned round where it is met: at the device of the pod that sends it, or where the node sends its own.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{Address, Counter, node_flag};

use crate::counters::count;
use crate::maps::{ADDRESSES, NODE};
use crate::packet::{ETHERNET, ipv4_at, ipv6_at, network_protocol};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Types of RFC 792 and RFC 4443.
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u16 = 129;
/// Host unreachable, and address unreachable: type, then code, as they stand in memory.
const UNREACHABLE: u32 = u32::from_ne_bytes([3, 1, 0, 0]);
const UNREACHABLE_V6: u32 = u32::from_ne_bytes([1, 3, 0, 0]);
/// `BPF_F_INGRESS` of `bpf_redirect`.
const INGRESS: u64 = 1;
const L3: usize = ETHERNET as usize;
/// Bytes of the ping's own header that an error quotes behind its IP header.
const QUOTED: u32 = 8;

/// No verdict. `TC_ACT_OK`, which nothing here ever answers.
const NO_PING: i32 = 0;

/// Where the sender of a packet is, seen from the device it is met at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// On the other side of it, where it came in.
    Beyond,
    /// On this side, where it goes out.
    Here,
}

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
        if v4 {
            refuse_v4(ctx, &from, &source)
        } else {
            refuse_v6(ctx, &from, &source)
        }
    };
    if turned.and_then(|()| turn_ethernet(ctx)).is_err() {
        count(Counter::DroppedRewrite);
        return Some(aya_ebpf::bindings::TC_ACT_SHOT as i32);
    }
    count(if serves {
        Counter::Pings
    } else {
        Counter::PingsRefused
    });
    // SAFETY: the kernel hands the program a valid context.
    let device = unsafe { (&raw const (*ctx.skb.skb).ifindex).read_volatile() };
    let flags = if sender == Sender::Here as u32 { INGRESS } else { 0 };
    // SAFETY: takes numbers; this is the device the packet is at.
    Some(unsafe { bpf_redirect(device, flags) } as i32)
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

/// Back the way it came.
#[inline(always)]
fn turn_ethernet(ctx: &TcContext) -> Result<(), i64> {
    let [a, b]: [[u16; 3]; 2] = ctx.load(0)?;
    ctx.store(0, &[b, a], 0)
}

/// Cuts the packet to what an error quotes of it, and makes room before that for the error's `header` bytes.
#[inline(always)]
fn make_room(ctx: &TcContext, quoted: u32, header: i32) -> Result<(), i64> {
    // SAFETY: the context is valid.
    let cut = unsafe { bpf_skb_change_tail(ctx.skb.skb, ETHERNET + quoted, 0) };
    if cut != 0 {
        return Err(cut);
    }
    ctx.skb.adjust_room(header, BPF_ADJ_ROOM_MAC, 0)
}

/// Host unreachable, from `from` (RFC 792).
#[inline(always)]
fn refuse_v4(ctx: &TcContext, from: &Address, to: &Address) -> Result<(), i64> {
    const LENGTH: u16 = 20 + 8 + 20 + QUOTED as u16;
    make_room(ctx, 20 + QUOTED, 20 + 8)?;
    let quote: [u32; 7] = ctx.load(L3 + 28)?;
    let icmp = [
        UNREACHABLE | fold(sum(&quote, sum(&[UNREACHABLE, 0], 0))) << 16,
        0,
    ];
    let mut header = [
        u32::from_ne_bytes([0x45, 0, LENGTH.to_be_bytes()[0], LENGTH.to_be_bytes()[1]]),
        0,
        u32::from_ne_bytes([64, ICMP, 0, 0]),
        from.words[3],
        to.words[3],
    ];
    header[2] |= fold(sum(&header, 0)) << 16;
    ctx.store(L3, &header, 0)?;
    ctx.store(L3 + 20, &icmp, 0)
}

/// Address unreachable, from `from` (RFC 4443).
#[inline(always)]
fn refuse_v6(ctx: &TcContext, from: &Address, to: &Address) -> Result<(), i64> {
    const LENGTH: u16 = 8 + 40 + QUOTED as u16;
    make_room(ctx, 40 + QUOTED, 40 + 8)?;
    let quote: [u32; 12] = ctx.load(L3 + 48)?;
    let pseudo = [
        u32::from(LENGTH).to_be(),
        u32::from(ICMPV6).to_be(),
        UNREACHABLE_V6,
        0,
    ];
    let addresses = sum(&to.words, sum(&from.words, 0));
    let icmp = [
        UNREACHABLE_V6 | fold(sum(&quote, sum(&pseudo, addresses))) << 16,
        0,
    ];
    let header = [
        u32::from_ne_bytes([0x60, 0, 0, 0]),
        u32::from_ne_bytes([LENGTH.to_be_bytes()[0], LENGTH.to_be_bytes()[1], ICMPV6, 64]),
    ];
    ctx.store(L3, &header, 0)?;
    ctx.store(L3 + 8, &from.words, 0)?;
    ctx.store(L3 + 24, &to.words, 0)?;
    ctx.store(L3 + 40, &icmp, 0)
}

/// The sum of these words and what was summed before, not yet folded (RFC 1071).
#[inline(always)]
fn sum<const N: usize>(words: &[u32; N], before: i64) -> i64 {
    let words = words.as_ptr().cast_mut();
    // SAFETY: the words are on this program's stack, and only read.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, words, 4 * N as u32, before as u32) }
}

/// The checksum that a sum comes to.
#[inline(always)]
fn fold(sum: i64) -> u32 {
    let sum = sum as u64;
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff);
    let sum = (sum & 0xffff) + (sum >> 16);
    !sum as u32 & 0xffff
}
