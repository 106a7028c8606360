//! Translation at the device, for packets of other hosts: NodePorts, external and LoadBalancer addresses.
//!
//! Destinations are rewritten where packets come in and sources where they go out, nowhere else: the host's own stack
//! routes, filters and tracks one plain connection between client and endpoint, with no source its reverse-path filter
//! would object to. A connection's first packet chooses; the rest follow the connection table.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{Counter, direction, frontend_flag, role};

use crate::balance::choose;
use crate::connections::{
    create, find, frontend_key, note_client, note_reply, refuser, remove, stale, touch,
};
use crate::counters::count;
use crate::icmp::IcmpError;
use crate::maps::FRONTENDS;
use crate::packet::Packet;

/// Not our business, or done: whoever comes next at this device decides (`TCX_NEXT`).
const NEXT: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT as i32;

/// Length of an Ethernet header, bytes.
const ETHERNET: u32 = 14;
/// Devices without link-layer header.
const RAW: u32 = 0;

#[inline(always)]
fn done(result: Result<(), i64>) -> i32 {
    match result {
        Ok(()) => NEXT,
        Err(_) => drop_as(Counter::DroppedRewrite),
    }
}

#[inline(always)]
fn drop_as(counter: Counter) -> i32 {
    count(counter);
    DROP
}

#[inline(always)]
fn incoming<const L3: u32>(ctx: &TcContext) -> i32 {
    let Some(packet) = Packet::read::<L3>(ctx) else {
        return incoming_error::<L3>(ctx);
    };
    let key = packet.key(direction::IN);
    if let Some(entry) = find(&key) {
        if entry.role == role::UNSOURCE {
            touch(entry);
            return done(packet.set_destination(ctx, &entry.address, entry.port));
        }
        if !stale(entry, &packet) {
            note_client(entry, &packet);
            return done(packet.set_destination(ctx, &entry.address, entry.port));
        }
        remove(&key, &entry.clone());
    }
    // In mid-connection without an entry there is no telling where it belongs: the host answers with a reset.
    if !packet.opens() {
        return NEXT;
    }
    // SAFETY: the map's elements are replaced, never rewritten in place.
    let Some(frontend) = (unsafe { FRONTENDS.get(&frontend_key(&packet)) }) else {
        return NEXT;
    };
    let (service, flags) = (frontend.service, frontend.flags);
    if flags & frontend_flag::EXTERNAL == 0 {
        return NEXT;
    }
    let (backend, counter) = match choose(service, || packet.source) {
        Some(backend) => (backend, Counter::DeviceConnections),
        None if flags & frontend_flag::DROP_WHEN_EMPTY != 0 => return drop_as(Counter::DroppedNoLocal),
        None if flags & frontend_flag::FOREIGN != 0 => match refuser(&packet) {
            Some(backend) => (backend, Counter::DeviceRefused),
            None => return drop_as(Counter::DroppedNoBackend),
        },
        None => {
            // Nothing listens on that port of the node: its own stack answers with a reset, or port unreachable, at once.
            count(Counter::DeviceRefused);
            return NEXT;
        }
    };
    if let Err(reason) = create(&packet, service, &backend) {
        return drop_as(reason);
    }
    count(counter);
    // What was entered may be another CPU's choice.
    match find(&key) {
        Some(entry) => done(packet.set_destination(ctx, &entry.address, entry.port)),
        None => drop_as(Counter::DroppedRewrite),
    }
}

#[inline(always)]
fn outgoing<const L3: u32>(ctx: &TcContext) -> i32 {
    let Some(packet) = Packet::read::<L3>(ctx) else {
        return outgoing_error::<L3>(ctx);
    };
    let Some(entry) = find(&packet.key(direction::OUT)) else {
        return NEXT;
    };
    if entry.role == role::UNDEST {
        note_reply(entry, &packet);
    } else {
        touch(entry);
    }
    done(packet.set_source(ctx, &entry.address, entry.port))
}

/// An error about a packet that went out under another source than its own: it goes where such a packet's answers go.
#[inline(always)]
fn incoming_error<const L3: u32>(ctx: &TcContext) -> i32 {
    let Some(error) = IcmpError::read::<L3>(ctx) else {
        return NEXT;
    };
    match find(&error.key(direction::IN)) {
        Some(entry) => done(error.set_destination(ctx, &entry.address, entry.port)),
        None => NEXT,
    }
}

/// An error about a packet whose destination was rewritten: it comes from where such a packet's answers come from.
#[inline(always)]
fn outgoing_error<const L3: u32>(ctx: &TcContext) -> i32 {
    let Some(error) = IcmpError::read::<L3>(ctx) else {
        return NEXT;
    };
    match find(&error.key(direction::OUT)) {
        Some(entry) => done(error.set_source(ctx, &entry.address, entry.port)),
        None => NEXT,
    }
}

#[classifier]
fn device_in(ctx: TcContext) -> i32 {
    incoming::<ETHERNET>(&ctx)
}

#[classifier]
fn device_out(ctx: TcContext) -> i32 {
    outgoing::<ETHERNET>(&ctx)
}

#[classifier]
fn raw_device_in(ctx: TcContext) -> i32 {
    incoming::<RAW>(&ctx)
}

#[classifier]
fn raw_device_out(ctx: TcContext) -> i32 {
    outgoing::<RAW>(&ctx)
}
