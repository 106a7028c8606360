//! The programs at the host's end of a pod's veth pair: what the pod sends comes in here, what it gets goes out.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

use crate::connections::Origin;
use crate::forward;
use crate::packet::ETHERNET;
use crate::translate::{NEXT, incoming, outgoing};

#[classifier]
fn pod_in(ctx: TcContext) -> i32 {
    match forward::from_pod(&ctx) {
        Some(verdict) => verdict,
        None => incoming(&ctx, ETHERNET, Origin::Pod),
    }
}

#[classifier]
fn pod_out(ctx: TcContext) -> i32 {
    // Nearly no pod ever has packets of its own translated.
    if forward::is_for_translated_pod(&ctx) {
        outgoing(&ctx, ETHERNET)
    } else {
        NEXT
    }
}
