//! The table of connections translated at the device. See [`Connection`] for its four kinds of entries.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use sluice_ebpf_types::{
    Address, Backend, Connection, ConnectionKey, Counter, FrontendKey, UDP, direction, place, role, seen,
};

use crate::balance::{admits, below, member, now};
use crate::maps::{CONNECTIONS, FRONTENDS, NODE};
use crate::packet::{FIN, Packet, RST, SYN};

/// Ports a client's stand-in may have: below what the host's own sockets are given (net.ipv4.ip_local_port_range),
/// so neither takes the other's.
const FIRST_PORT: u32 = 1024;
const PORTS: u32 = 32768 - FIRST_PORT;
/// How often a free port is looked for, and how often then one of a connection that can spare it.
const TRIES: u32 = 16;
const TRIES_TAKEN: u32 = 16;
const SECOND: u64 = 1_000_000_000;
/// After so long without a word a connection gives way to one that finds no port, where nobody answered or it is one of datagrams,
/// nanoseconds.
const SILENCE: u64 = 10 * SECOND;

/// Where packets come in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Another host, by the uplink or a tunnel: what is for outside is served.
    Network,
    /// A pod of this node, by its own device: whatever the node's sockets are served is.
    Pod,
}

/// The entry for `key`. Valid while the program runs; written to by several CPUs, each field at once.
#[inline(always)]
pub fn find(key: &ConnectionKey) -> Option<&'static mut Connection> {
    // SAFETY: the pointer is a value of the map; programs never keep it beyond their run.
    CONNECTIONS.get_ptr_mut(key).map(|entry| unsafe { &mut *entry })
}

/// Notes a packet; true if the entry had not been noted for a second.
#[inline(always)]
pub fn touch(entry: &mut Connection) -> bool {
    let now = now();
    // Every packet writing here would make the cache line travel between CPUs.
    if now.wrapping_sub(entry.last_seen) < SECOND {
        return false;
    }
    entry.last_seen = now;
    true
}

/// Notes a packet of a connection that goes on as before, by an entry that keeps what was seen; `fin` is the bit of [`seen`] for its FIN.
#[inline(always)]
pub fn note(entry: &mut Connection, packet: &Packet, fin: u32) {
    touch(entry);
    if packet.flags & (FIN | RST) != 0 {
        entry.last_seen = now();
        entry.seen |= if packet.flags & RST != 0 { seen::RESET } else { fin };
    }
}

/// Notes a reply, whose `UNDEST` entry is `entry`, in the entry that holds the connection's state.
#[inline(always)]
pub fn note_reply(entry: &mut Connection, packet: &Packet) {
    let news = packet.flags & (FIN | RST | SYN) != 0;
    if !touch(entry) && !news {
        return;
    }
    let key = ConnectionKey {
        source: packet.destination,
        destination: entry.address,
        source_port: packet.destination_port,
        destination_port: entry.port,
        protocol: packet.protocol,
        direction: direction::IN,
        zero: 0,
    };
    if let Some(forward) = find(&key) {
        forward.last_seen = now();
        let bits = if packet.flags & RST != 0 {
            seen::RESET
        } else if packet.flags & FIN != 0 {
            seen::BACKEND_FIN | seen::REPLY
        } else {
            seen::REPLY
        };
        forward.seen |= bits;
    }
}

/// Whether the packet is no longer to go where its `FORWARD` entry says.
///
/// A TCP connection stays whatever becomes of the Service; only a new one from the same client's port is chosen for
/// anew, when the old one is over or its endpoint is gone. A datagram has no beginning, so each is checked: neither a
/// removed endpoint nor a removed Service keeps a client.
#[inline(always)]
pub fn stale(entry: &Connection, packet: &Packet) -> bool {
    if packet.protocol == UDP {
        // SAFETY: the map's elements are replaced, never rewritten in place.
        let serves = match unsafe { FRONTENDS.get(&frontend_key(packet)) } {
            // A pod's own packets go by the other of the two.
            Some(frontend) => {
                (frontend.service == entry.service || frontend.socket_service == entry.service)
                    && admits(frontend, &packet.source)
            }
            None => false,
        };
        return !serves || member(entry.service, &entry.address, entry.port).is_none();
    }
    packet.opens()
        && (seen::closed(entry.seen) || member(entry.service, &entry.address, entry.port).is_none())
}

/// The key under which the packet's destination is looked up among the frontends.
#[inline(always)]
pub fn frontend_key(packet: &Packet) -> FrontendKey {
    FrontendKey {
        address: packet.destination,
        port: packet.destination_port,
        protocol: packet.protocol,
        zero: 0,
    }
}

/// Why there can be no connection.
pub enum Refused {
    /// As this counter says.
    For(Counter),
    /// No free port was found for who stands in for the client; one may be freed by [`free_port`].
    Crowded,
}

/// A connection's key and entry.
#[repr(C)]
struct Work {
    key: ConnectionKey,
    value: Connection,
}

/// Whose room a [`Work`] is: a connection's that is entered, one's that goes, and that of the key that one who found no port would have.
const NEW: u32 = 0;
const FORMER: u32 = 1;
const CROWDED: u32 = 2;

/// Room for connections, for each CPU: on the stack there is too little for it.
#[map]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(3, 0);

#[inline(always)]
fn work(whose: u32) -> Option<&'static mut Work> {
    // SAFETY: the pointer is a value of this CPU's, and while a program for packets runs no other does there. Any bytes
    // are a value. Nobody asks for the same one twice before having done with it.
    WORK.get_ptr_mut(whose).map(|work| unsafe { &mut *work })
}

/// [`find`], for where the stack has no room for a key.
#[inline(always)]
pub fn find_off_stack(key: ConnectionKey) -> Option<&'static mut Connection> {
    let work = work(NEW)?;
    work.key = key;
    find(&work.key)
}

/// Removes the connection whose `FORWARD` entry is `entry`, the packet's own.
#[inline(always)]
pub fn remove(packet: &Packet, entry: &Connection) {
    if let Some(work) = work(FORMER) {
        work.key = packet.key(direction::IN);
        work.value = *entry;
        remove_all(work);
    }
}

/// Removes the connection whose `FORWARD` entry this is. That goes first: without it nothing of the client's comes as far as the others.
#[inline(always)]
fn remove_all(Work { key, value }: &mut Work) {
    let (client, client_port) = (key.source, key.source_port);
    // What is not there need not be removed: no result matters here.
    let _ = CONNECTIONS.remove(&*key);
    key.source = value.address;
    key.source_port = value.port;
    key.destination = client;
    key.destination_port = client_port;
    key.direction = direction::OUT;
    let _ = CONNECTIONS.remove(&*key);
    if !value.stand_in.is_unspecified() {
        key.direction = direction::IN;
        key.destination = value.stand_in;
        key.destination_port = value.stand_in_port;
        let _ = CONNECTIONS.remove(&*key);
        key.direction = direction::OUT;
        key.source = client;
        key.source_port = client_port;
        key.destination = value.address;
        key.destination_port = value.port;
        let _ = CONNECTIONS.remove(&*key);
    }
}

/// The port of who stood in for the client in the connection that was [removed](remove) last, if that went to `backend`: for the next one
/// by the same client's port. Its endpoint knows that the client's timestamps go on. Network order; 0 for none.
#[inline(always)]
pub fn former_port(backend: &Backend) -> u16 {
    match work(FORMER) {
        Some(Work { value, .. }) if value.address.is(&backend.address) && value.port == backend.port => {
            value.stand_in_port
        }
        _ => 0,
    }
}

/// Has a connection give up its stand-in's port for the packet for which none was free: one that is over, or that nobody has answered or,
/// of datagrams, spoken in for a while. The port, in network order; 0 if none was found.
///
/// A global function to the verifier, as those of `translate.rs`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn free_port() -> u32 {
    for _ in 0..TRIES_TAKEN {
        let port = free_one_port();
        if port != 0 {
            return port;
        }
    }
    0
}

/// Tries that with one port. A function of its own, so that the verifier looks at it once and not for each.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn free_one_port() -> u32 {
    let (Some(crowded), Some(former)) = (work(CROWDED), work(FORMER)) else {
        return 0;
    };
    crowded.key.destination_port = random_port();
    former.key = crowded.key;
    if !gives_way(former) {
        return 0;
    }
    // Gone with its connection, unless it had none any more.
    let _ = CONNECTIONS.remove(&crowded.key);
    u32::from(crowded.key.destination_port)
}

#[inline(always)]
fn random_port() -> u16 {
    ((FIRST_PORT + below(PORTS)) as u16).to_be()
}

/// Removes the connection whose `UNSOURCE` entry's key this is if it can be spared; true if then there is none, but for that entry perhaps.
#[inline(always)]
fn gives_way(work: &mut Work) -> bool {
    let Work { key, value } = &mut *work;
    let (stand_in, stand_in_port) = (key.destination, key.destination_port);
    let Some(unsource) = find(key) else {
        return true;
    };
    let alone = seen::lingers(unsource.seen);
    let (client, client_port) = (unsource.address, unsource.port);
    key.destination = client;
    key.destination_port = client_port;
    key.direction = direction::OUT;
    let Some(undest) = find(key) else {
        return alone;
    };
    key.source = client;
    key.source_port = client_port;
    key.destination = undest.address;
    key.destination_port = undest.port;
    key.direction = direction::IN;
    let Some(forward) = find(key) else {
        return alone;
    };
    // The client's port may have another connection by now, whose stand-in has another.
    if forward.stand_in_port != stand_in_port || !forward.stand_in.is(&stand_in) {
        return alone;
    }
    let silent = now().wrapping_sub(forward.last_seen) >= SILENCE;
    let over =
        seen::closed(forward.seen) || silent && (key.protocol == UDP || forward.seen & seen::REPLY == 0);
    if over {
        *value = *forward;
        remove_all(work);
    }
    over
}

/// Enters a new connection from the packet's sender to `backend`.
///
/// Who stands in for the client has the port `wanted`, if it is one and free.
///
/// # Errors
/// Why there can be none.
#[inline(always)]
pub fn create(
    packet: &Packet,
    service: u32,
    backend: &Backend,
    origin: Origin,
    wanted: u16,
) -> Result<(), Refused> {
    let stand_in = stand_in(packet, backend, origin).map_err(Refused::For)?;
    let Work { key, value } = work(NEW).ok_or(Refused::For(Counter::DroppedNoPort))?;
    *key = ConnectionKey {
        source: backend.address,
        destination: packet.source,
        source_port: backend.port,
        destination_port: packet.source_port,
        protocol: packet.protocol,
        direction: direction::OUT,
        zero: 0,
    };
    // last_seen 0: the first reply is noted whenever it comes.
    *value = Connection {
        last_seen: 0,
        address: packet.destination,
        stand_in: Address { words: [0; 4] },
        service: 0,
        port: packet.destination_port,
        stand_in_port: 0,
        seen: 0,
        role: role::UNDEST,
    };
    if CONNECTIONS
        .insert(&*key, &*value, u64::from(BPF_NOEXIST))
        .is_err()
    {
        // The same client's port already talks to this backend. By this very frontend: an orphan of ours. By another:
        // the two could not be told apart, unless the other is over.
        if taken(key, packet) {
            return Err(Refused::For(Counter::DroppedNoPort));
        }
        CONNECTIONS
            .insert(&*key, &*value, u64::from(BPF_ANY))
            .map_err(|_| Refused::For(Counter::DroppedNoPort))?;
    }
    let mut stand_in_port = 0;
    if !stand_in.is_unspecified() {
        key.direction = direction::IN;
        key.destination = stand_in;
        value.role = role::UNSOURCE;
        value.address = packet.source;
        value.port = packet.source_port;
        let mut port = if wanted == 0 { random_port() } else { wanted };
        for _ in 0..TRIES {
            key.destination_port = port;
            if CONNECTIONS.insert(&*key, &*value, u64::from(BPF_NOEXIST)).is_ok() {
                stand_in_port = port;
                break;
            }
            port = random_port();
        }
        if stand_in_port == 0 {
            if let Some(crowded) = work(CROWDED) {
                crowded.key = *key;
            }
            return Err(Refused::Crowded);
        }
        key.direction = direction::OUT;
        key.source = packet.source;
        key.source_port = packet.source_port;
        key.destination = backend.address;
        key.destination_port = backend.port;
        value.role = role::SOURCE;
        value.address = stand_in;
        value.port = stand_in_port;
        CONNECTIONS
            .insert(&*key, &*value, u64::from(BPF_ANY))
            .map_err(|_| Refused::For(Counter::DroppedNoPort))?;
    }
    *value = Connection {
        last_seen: now(),
        address: backend.address,
        stand_in,
        service,
        port: backend.port,
        stand_in_port,
        seen: 0,
        role: role::FORWARD,
    };
    *key = packet.key(direction::IN);
    // Another CPU may have entered the same client's first packet meanwhile: then its choice stands, and the daemon
    // sweeps up what was entered here for nothing.
    let _ = CONNECTIONS.insert(&*key, &*value, u64::from(BPF_NOEXIST));
    Ok(())
}

/// Whether the `UNDEST` entry under `key` belongs to a live connection by another frontend.
#[inline(always)]
fn taken(key: &ConnectionKey, packet: &Packet) -> bool {
    let Some(other) = find(key) else {
        return false;
    };
    if other.address == packet.destination && other.port == packet.destination_port {
        return false;
    }
    let forward = ConnectionKey {
        source: packet.source,
        destination: other.address,
        source_port: packet.source_port,
        destination_port: other.port,
        protocol: packet.protocol,
        direction: direction::IN,
        zero: 0,
    };
    match find(&forward) {
        Some(forward) => {
            forward.address == key.source && forward.port == key.source_port && !seen::closed(forward.seen)
        }
        None => false,
    }
}

/// What refuses a packet to an address that is not the host's: the node itself, at port 0, where nobody can listen. Its
/// reset, or its ICMP error, goes back as the frontend's like any reply.
#[inline(always)]
pub fn refuser(packet: &Packet) -> Option<Backend> {
    let node = NODE.get(0)?;
    let address = if packet.source.is_v4() {
        node.node_v4
    } else {
        node.node_v6
    };
    (!address.is_unspecified()).then_some(Backend {
        address,
        port: 0,
        place: place::THIS_NODE,
        zero: 0,
    })
}

/// The address that stands in for the client: `::` where its own is kept.
#[inline(always)]
fn stand_in(packet: &Packet, backend: &Backend, origin: Origin) -> Result<Address, Counter> {
    let keeps_its_own = match origin {
        Origin::Network => backend.place == place::THIS_NODE,
        // Whoever answers a pod answers by this node. Only a pod that is its own backend would not take a packet from
        // itself.
        Origin::Pod => !backend.address.is(&packet.source),
    };
    if keeps_its_own {
        return Ok(Address { words: [0; 4] });
    }
    let Some(node) = NODE.get(0) else {
        return Err(Counter::DroppedNoAddress);
    };
    let in_pod_network = origin == Origin::Pod || backend.place == place::POD_NETWORK;
    let address = match (packet.source.is_v4(), in_pod_network) {
        (true, true) => node.pod_network_v4,
        (true, false) => node.node_v4,
        (false, true) => node.pod_network_v6,
        (false, false) => node.node_v6,
    };
    if address.is_unspecified() {
        return Err(Counter::DroppedNoAddress);
    }
    Ok(address)
}
