//! The programs at the devices by which other hosts' packets come and go: the uplink and the tunnels.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

use crate::connections::Origin;
use crate::forward;
use crate::packet::ETHERNET;
use crate::translate::{incoming, outgoing};

/// Devices without link-layer header.
const RAW: u32 = 0;

#[classifier]
fn device_in(ctx: TcContext) -> i32 {
    match forward::from_network(&ctx) {
        Some(verdict) => verdict,
        None => incoming(&ctx, ETHERNET, Origin::Network),
    }
}

#[classifier]
fn device_out(ctx: TcContext) -> i32 {
    outgoing(&ctx, ETHERNET)
}

// What comes without an Ethernet header cannot be handed to a pod as it is: it takes the way through the host's stack.

#[classifier]
fn raw_device_in(ctx: TcContext) -> i32 {
    incoming(&ctx, RAW, Origin::Network)
}

#[classifier]
fn raw_device_out(ctx: TcContext) -> i32 {
    outgoing(&ctx, RAW)
}
