//! Sluice's kernel-side programs: Services translated at the socket and at the device, and the fast path between pods.
//!
//! Owns what is decided per connection and per packet, and the tables of live connections. It never decides which
//! Services exist: the daemon writes those tables (`daemon/src/proxy/ebpf/`). Touches contexts of the kernel's user API
//! alone (include/uapi/linux/bpf.h), so it needs no relocation and runs on any kernel that has the helpers.
#![no_std]
#![no_main]

mod balance;
mod connections;
mod counters;
mod device;
mod forward;
mod fragment;
mod icmp;
mod maps;
mod packet;
mod ping;
mod pod;
mod sctp;
mod sockets;
mod translate;
mod unreachable;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing here panics: the verifier would refuse a program that could end up in this loop.
    loop {}
}

// The helpers used are open to GPL-compatible programs alone.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
