//! ICMP errors made of the very packet they are about, which goes back the way it came.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::Address;

use crate::packet::ETHERNET;

pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
/// `BPF_F_INGRESS` of `bpf_redirect`.
const INGRESS: u64 = 1;
const L3: usize = ETHERNET as usize;
/// Bytes of the packet that an error quotes behind its IP header.
const QUOTED: u32 = 8;

/// What cannot be reached: type, then code, as they stand in memory (RFC 792 and RFC 4443).
#[derive(Clone, Copy)]
pub struct What {
    v4: u32,
    v6: u32,
}

/// Host unreachable, and address unreachable.
pub const HOST: What = What {
    v4: u32::from_ne_bytes([3, 1, 0, 0]),
    v6: u32::from_ne_bytes([1, 3, 0, 0]),
};
/// Port unreachable.
pub const PORT: What = What {
    v4: u32::from_ne_bytes([3, 3, 0, 0]),
    v6: u32::from_ne_bytes([1, 4, 0, 0]),
};

/// Where the sender of a packet is, seen from the device it is met at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// On the other side of it, where it came in.
    Beyond,
    /// On this side, where it goes out.
    Here,
}

/// Makes the packet an error from `from` to `to`, its sender, about itself.
#[inline(always)]
pub fn make(ctx: &TcContext, v4: bool, what: What, from: &Address, to: &Address) -> Result<(), i64> {
    if v4 {
        make_v4(ctx, what.v4, from, to)
    } else {
        make_v6(ctx, what.v6, from, to)
    }
}

/// Sends the packet back the way it came; the verdict on it.
#[inline(always)]
pub fn turn_back(ctx: &TcContext, sender: u32) -> Result<i32, i64> {
    let [a, b]: [[u16; 3]; 2] = ctx.load(0)?;
    ctx.store(0, &[b, a], 0)?;
    // SAFETY: the kernel hands the program a valid context.
    let device = unsafe { (&raw const (*ctx.skb.skb).ifindex).read_volatile() };
    let flags = if sender == Sender::Here as u32 { INGRESS } else { 0 };
    // SAFETY: takes numbers; this is the device the packet is at.
    Ok(unsafe { bpf_redirect(device, flags) } as i32)
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

#[inline(always)]
fn make_v4(ctx: &TcContext, what: u32, from: &Address, to: &Address) -> Result<(), i64> {
    const LENGTH: u16 = 20 + 8 + 20 + QUOTED as u16;
    make_room(ctx, 20 + QUOTED, 20 + 8)?;
    let quote: [u32; 7] = ctx.load(L3 + 28)?;
    let icmp = [what | fold(sum(&quote, sum(&[what, 0], 0))) << 16, 0];
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

#[inline(always)]
fn make_v6(ctx: &TcContext, what: u32, from: &Address, to: &Address) -> Result<(), i64> {
    const LENGTH: u16 = 8 + 40 + QUOTED as u16;
    make_room(ctx, 40 + QUOTED, 40 + 8)?;
    let quote: [u32; 12] = ctx.load(L3 + 48)?;
    let pseudo = [u32::from(LENGTH).to_be(), u32::from(ICMPV6).to_be(), what, 0];
    let addresses = sum(&to.words, sum(&from.words, 0));
    let icmp = [what | fold(sum(&quote, sum(&pseudo, addresses))) << 16, 0];
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
