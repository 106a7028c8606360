//! Translation of packets, where sockets are out of reach: those of other hosts, and those of pods that no program saw at
//! their socket.
//!
//! Destinations are rewritten where packets come in and sources where they go out, nowhere else: the host's own stack
//! routes, filters and tracks one plain connection between client and endpoint, with no source its reverse-path filter
//! would object to. A connection's first packet chooses; the rest follow the connection table.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{Backend, Counter, Frontend, UDP, direction, frontend_flag, role, seen};

use crate::balance::{By, admits, choose};
use crate::connections::{
    Origin, Refused, create, find, find_off_stack, former_port, free_port, frontend_key, note, note_reply,
    refuser, remove, stale, touch,
};
use crate::counters::count;
use crate::forward::note_translated;
use crate::fragment;
use crate::icmp::IcmpError;
use crate::maps::{ADDRESSES, FRONTENDS};
use crate::packet::{ETHERNET, Packet};
use crate::ping;
use crate::unreachable::{self, Sender, turn_back};

/// Not our business, or done: whoever comes next at this device decides (`TCX_NEXT`).
pub const NEXT: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT as i32;
/// No verdict on the packet: its connection has been entered. `TC_ACT_OK`, which nothing here ever answers.
const BEGUN: i32 = 0;
/// No verdict either: no port was free for who stands in for the client. `TC_ACT_STOLEN`, as little an answer.
const CROWDED: i32 = 4;
/// Nor this: it is known where the connection goes. `TC_ACT_QUEUED`.
const DECIDED: i32 = 5;

/// What becomes of a connection's first packet.
enum Verdict {
    /// It goes to the backend, and counts as this.
    To(Backend, Counter),
    /// The host's stack has it.
    Pass,
    /// It goes nowhere.
    Drop(Counter),
}

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

/// A packet whose IP header begins at `l3` bytes comes in.
#[inline(always)]
pub fn incoming(ctx: &TcContext, l3: u32, origin: Origin) -> i32 {
    let Some(packet) = Packet::read(ctx, l3) else {
        if origin == Origin::Pod
            && let Some(verdict) = ping::answer(ctx, Sender::Beyond)
        {
            return verdict;
        }
        return other(ctx, l3, direction::IN);
    };
    let key = packet.key(direction::IN);
    let mut entry = find(&key);
    if let Some(known) = &mut entry {
        if known.role == role::UNSOURCE {
            note(known, packet, seen::BACKEND_FIN);
        } else if stale(known, packet) {
            entry = None;
        } else {
            note(known, packet, seen::CLIENT_FIN);
        }
    }
    if entry.is_none() {
        let verdict = begin_connection(origin as u32);
        if verdict != BEGUN {
            return verdict;
        }
        // What was entered may be another CPU's choice.
        entry = find(&key);
    }
    match entry {
        Some(entry) => done(packet.set_destination(ctx, &entry.address, entry.port)),
        None => drop_as(Counter::DroppedRewrite),
    }
}

/// Enters the connection that a packet begins: [`BEGUN`], or what becomes of the packet.
///
/// Under a name of its own it is a global function to the verifier, which looks at it once and not again on each way that
/// leads here. Such a function takes numbers alone; the packet is the one read last.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn begin_connection(origin: u32) -> i32 {
    // In mid-connection without an entry there is no telling where it belongs: the host answers with a reset. Nearly all that has
    // nothing to do with Services is such a packet.
    if !Packet::last().is_some_and(Packet::opens) {
        return NEXT;
    }
    let verdict = decide(origin);
    if verdict != DECIDED {
        return verdict;
    }
    let mut verdict = enter(origin, 0);
    if verdict == CROWDED {
        let port = free_port();
        if port != 0 {
            verdict = enter(origin, port);
        }
    }
    if verdict == CROWDED {
        verdict = drop_as(Counter::DroppedNoPort);
    }
    verdict
}

/// Where a connection goes, from when that is decided until it is entered.
#[repr(C)]
struct Destination {
    backend: Backend,
    service: u32,
    counter: Counter,
    /// The port that who stands in for the client should have, in network order; 0 for any.
    port: u16,
}

#[map]
static DESTINATION: PerCpuArray<Destination> = PerCpuArray::with_max_entries(1, 0);

fn origin_of(number: u32) -> Origin {
    if number == Origin::Pod as u32 {
        Origin::Pod
    } else {
        Origin::Network
    }
}

/// Decides where the connection goes that a packet begins: [`DECIDED`], [`BEGUN`], or what becomes of the packet.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decide(origin: u32) -> i32 {
    let (Some(packet), Some(decided)) = (Packet::last(), DESTINATION.get_ptr_mut(0)) else {
        return NEXT;
    };
    let former = find_off_stack(packet.key(direction::IN));
    let again = former.is_some();
    if let Some(former) = former {
        if !stale(former, packet) {
            // Entered by another CPU meanwhile.
            return BEGUN;
        }
        remove(packet, former);
    }
    let origin = origin_of(origin);
    // SAFETY: the map's elements are replaced, never rewritten in place.
    let (service, verdict) = match unsafe { FRONTENDS.get(&frontend_key(packet)) } {
        None => (0, unserved(packet, origin)),
        Some(frontend) => match origin {
            Origin::Network => (frontend.service, from_network(packet, frontend)),
            Origin::Pod => (frontend.socket_service, from_pod(packet, frontend)),
        },
    };
    let (backend, counter) = match verdict {
        Verdict::To(backend, counter) => (backend, counter),
        Verdict::Pass => return NEXT,
        Verdict::Drop(counter) => return drop_as(counter),
    };
    let destination = Destination {
        backend,
        service,
        counter,
        port: if again { former_port(&backend) } else { 0 },
    };
    // SAFETY: the pointer is a value of this CPU's, and while a program for packets runs no other does there.
    unsafe { decided.write(destination) };
    DECIDED
}

/// Enters the connection that goes where [`decide`] says: [`BEGUN`], [`CROWDED`], or what becomes of the packet. `freed` is a port that
/// was made free for it, in network order, or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn enter(origin: u32, freed: u32) -> i32 {
    let (Some(packet), Some(decided)) = (Packet::last(), DESTINATION.get_ptr(0)) else {
        return NEXT;
    };
    // SAFETY: as in `decide`, which has written it.
    let decided = unsafe { &*decided };
    let origin = origin_of(origin);
    if origin == Origin::Pod {
        note_translated(&packet.source);
    }
    let port = if freed == 0 { decided.port } else { freed as u16 };
    match create(packet, decided.service, &decided.backend, origin, port) {
        Ok(()) => {
            count(decided.counter);
            BEGUN
        }
        Err(Refused::For(counter)) => drop_as(counter),
        Err(Refused::Crowded) => CROWDED,
    }
}

/// Another host's first packet for a frontend.
#[inline(always)]
fn from_network(packet: &Packet, frontend: &Frontend) -> Verdict {
    let flags = frontend.flags;
    if flags & frontend_flag::EXTERNAL == 0 {
        return Verdict::Pass;
    }
    if !admits(frontend, &packet.source) {
        return Verdict::Drop(Counter::DroppedSource);
    }
    let hash = By::hash(
        &packet.source,
        packet.source_port,
        packet.destination_port,
        packet.protocol,
    );
    if let Some(backend) = choose(frontend.service, || packet.source, hash) {
        return Verdict::To(backend, Counter::DeviceConnections);
    }
    if flags & frontend_flag::DROP_WHEN_EMPTY != 0 {
        return Verdict::Drop(Counter::DroppedNoLocal);
    }
    if flags & frontend_flag::FOREIGN == 0 {
        // Nothing listens on that port of the node: its own stack answers with a reset, or port unreachable, at once.
        count(Counter::DeviceRefused);
        return Verdict::Pass;
    }
    match refuser(packet) {
        Some(backend) => Verdict::To(backend, Counter::DeviceRefused),
        None => Verdict::Drop(Counter::DroppedNoBackend),
    }
}

/// A pod's first packet for a frontend.
#[inline(always)]
fn from_pod(packet: &Packet, frontend: &Frontend) -> Verdict {
    let flags = frontend.flags;
    if flags & frontend_flag::HOST_NETNS_ONLY != 0 {
        return Verdict::Pass;
    }
    if !admits(frontend, &packet.source) {
        return Verdict::Drop(Counter::DroppedSource);
    }
    if let Some(backend) = choose(frontend.socket_service, || packet.source, By::Chance) {
        return Verdict::To(backend, Counter::PodConnections);
    }
    if flags & frontend_flag::DROP_WHEN_EMPTY != 0 {
        return Verdict::Drop(Counter::DroppedNoLocal);
    }
    if flags & (frontend_flag::CLUSTER_IP | frontend_flag::FOREIGN) == 0 {
        count(Counter::PodRefused);
        return Verdict::Pass;
    }
    match refuser(packet) {
        Some(backend) => Verdict::To(backend, Counter::PodRefused),
        None => Verdict::Drop(Counter::DroppedNoBackend),
    }
}

/// A first packet for what is no frontend: at a ClusterIP it is a port nobody serves.
#[inline(always)]
fn unserved(packet: &Packet, origin: Origin) -> Verdict {
    if origin == Origin::Network || ADDRESSES.get_ptr(&packet.destination).is_none() {
        return Verdict::Pass;
    }
    match refuser(packet) {
        Some(backend) => Verdict::To(backend, Counter::PodRefused),
        None => Verdict::Drop(Counter::DroppedNoBackend),
    }
}

/// A packet whose IP header begins at `l3` bytes goes out.
#[inline(always)]
pub fn outgoing(ctx: &TcContext, l3: u32) -> i32 {
    let Some(packet) = Packet::read(ctx, l3) else {
        // Without an Ethernet header there is nothing to turn round.
        if l3 == ETHERNET
            && let Some(verdict) = ping::answer(ctx, Sender::Here)
        {
            return verdict;
        }
        return other(ctx, l3, direction::OUT);
    };
    let Some(entry) = find(&packet.key(direction::OUT)) else {
        if l3 == ETHERNET && packet.protocol == UDP && has_socket(ctx) {
            return refuse_unserved(ctx.skb.skb);
        }
        return NEXT;
    };
    if entry.role == role::UNDEST {
        note_reply(entry, packet);
    } else {
        touch(entry);
    }
    done(packet.set_source(ctx, &entry.address, entry.port))
}

/// Whether a socket of this node sends the packet; what is passed on for others, or wrapped by a tunnel, has none.
#[inline(always)]
fn has_socket(ctx: &TcContext) -> bool {
    // SAFETY: the kernel hands the program a valid context.
    let socket = unsafe { (&raw const (*ctx.skb.skb).__bindgen_anon_2.sk).read_volatile() };
    !socket.is_null()
}

/// A datagram of the node's own to a ClusterIP's port that nobody serves: port unreachable. Its socket was let through, as
/// many connect one without a word to say, to learn their own address. TCP is refused at the socket.
///
/// A global function to the verifier, like [`begin_connection`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refuse_unserved(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(packet) = Packet::last() else {
        return NEXT;
    };
    if ADDRESSES.get_ptr(&packet.destination).is_none() || FRONTENDS.get_ptr(&frontend_key(packet)).is_some()
    {
        return NEXT;
    }
    let (from, to) = (packet.destination, packet.source);
    let made = unreachable::make(&ctx, to.is_v4(), unreachable::PORT, &from, &to);
    match made.and_then(|()| turn_back(&ctx, Sender::Here as u32)) {
        Ok(verdict) => {
            count(Counter::SocketRefused);
            verdict
        }
        Err(_) => drop_as(Counter::DroppedRewrite),
    }
}

/// What is no whole TCP, UDP or SCTP packet may be a piece of one, or an error about one.
#[inline(always)]
fn other(ctx: &TcContext, l3: u32, way: u8) -> i32 {
    if fragment::drop_first(ctx, l3, u32::from(way)) {
        return DROP;
    }
    pass_error(ctx.skb.skb, l3, u32::from(way))
}

/// What is no TCP, UDP or SCTP packet, on its way in or out, may be an error about one.
///
/// In: about a packet that went out under another source than its own; it goes where such a packet's answers go. Out: about
/// a packet whose destination was rewritten; it comes from where such a packet's answers come from.
///
/// A global function to the verifier, like [`begin_connection`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pass_error(skb: *mut __sk_buff, l3: u32, way: u32) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(error) = IcmpError::read(&ctx, l3) else {
        return NEXT;
    };
    let way = way as u8;
    match find_off_stack(error.key(way)) {
        Some(entry) if way == direction::IN => done(error.set_destination(&ctx, &entry.address, entry.port)),
        Some(entry) => done(error.set_source(&ctx, &entry.address, entry.port)),
        None => NEXT,
    }
}
