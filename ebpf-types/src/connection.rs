//! What is remembered of connections: by socket, and by packet.

use bytemuck::{Pod, Zeroable};

use crate::Address;

/// Key of `socket_peers_v1`: a socket and the endpoint it was sent to.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct PeerKey {
    /// Socket cookie (`SO_COOKIE`).
    pub cookie: u64,
    /// The endpoint's address.
    pub address: Address,
    /// The endpoint's port, network order.
    pub port: u16,
    /// Always 0.
    pub zero: [u16; 3],
}

/// Value of `socket_peers_v1`: the frontend the client named, shown to it in the endpoint's stead.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Peer {
    /// The frontend's address.
    pub address: Address,
    /// The frontend's port, network order.
    pub port: u16,
    /// IANA protocol number.
    pub protocol: u8,
    /// Always 0.
    pub zero: u8,
}

/// Key of `socket_choices_v1`: an unconnected UDP socket and a frontend it sends to.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ChoiceKey {
    /// Socket cookie (`SO_COOKIE`).
    pub cookie: u64,
    /// The frontend's address.
    pub address: Address,
    /// The frontend's port, network order.
    pub port: u16,
    /// Always 0.
    pub zero: [u16; 3],
}

/// Value of `socket_choices_v1`: the endpoint its datagrams stay on while it lives.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Choice {
    /// The endpoint's address.
    pub address: Address,
    /// The endpoint's port, network order.
    pub port: u16,
    /// Always 0.
    pub zero: u16,
}

/// Key of `connections_v1`: a packet as it is seen on its way in or out.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ConnectionKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port, network order.
    pub source_port: u16,
    /// Destination port, network order.
    pub destination_port: u16,
    /// IANA protocol number.
    pub protocol: u8,
    /// One of [`direction`].
    pub direction: u8,
    /// Always 0.
    pub zero: u16,
}

/// Values of [`ConnectionKey::direction`].
pub mod direction {
    /// Seen coming in at a device: the destination is rewritten.
    pub const IN: u8 = 0;
    /// Seen going out by a device: the source is rewritten.
    pub const OUT: u8 = 1;
}

/// Value of `connections_v1`: what becomes of the packet.
///
/// A connection from client C to frontend F, sent on to endpoint B, has up to four entries, told apart by
/// [`role`]. S, this node's own address with a port of its choosing, stands in for C where B's replies would not come
/// back here otherwise.
///
/// | role | key | rewrites |
/// |---|---|---|
/// | `FORWARD` | C → F, in | destination to B |
/// | `SOURCE` | C → B, out | source to S |
/// | `UNSOURCE` | B → S, in | destination to C |
/// | `UNDEST` | B → C, out | source to F |
///
/// `FORWARD` is the one that holds the connection's state. `UNSOURCE` is what takes the port of S, and outlives the others where the
/// endpoint may remember the connection ([`seen::lingers`]).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Connection {
    /// Last packet by this entry, in nanoseconds of `CLOCK_MONOTONIC`, exact to about a second.
    pub last_seen: u64,
    /// Address to write into the packet.
    pub address: Address,
    /// `FORWARD`: S, or `::` where the client's address is kept. Else `::`.
    pub stand_in: Address,
    /// `FORWARD`: the set's id in `services_v1`. Else 0.
    pub service: u32,
    /// Port to write into the packet, network order.
    pub port: u16,
    /// Port of `stand_in`, network order.
    pub stand_in_port: u16,
    /// Bits of [`seen`]; kept in `FORWARD`, and in `UNSOURCE` what the endpoint alone does.
    pub seen: u32,
    /// One of [`role`].
    pub role: u32,
}

/// Values of [`Connection::role`].
pub mod role {
    /// Client's packet coming in.
    pub const FORWARD: u32 = 1;
    /// Client's packet going on to an endpoint elsewhere.
    pub const SOURCE: u32 = 2;
    /// Reply coming in from an endpoint elsewhere.
    pub const UNSOURCE: u32 = 3;
    /// Reply going out to the client.
    pub const UNDEST: u32 = 4;
}

/// Bits of [`Connection::seen`].
pub mod seen {
    /// The endpoint answered.
    pub const REPLY: u32 = 1;
    /// The client sent a FIN.
    pub const CLIENT_FIN: u32 = 2;
    /// The endpoint sent a FIN.
    pub const BACKEND_FIN: u32 = 4;
    /// Either sent a RST.
    pub const RESET: u32 = 8;

    /// Whether a TCP connection of which all this was seen is over.
    #[inline(always)]
    pub const fn closed(bits: u32) -> bool {
        bits & RESET != 0 || bits & (CLIENT_FIN | BACKEND_FIN) == CLIENT_FIN | BACKEND_FIN
    }

    /// Whether the endpoint may be left in TIME-WAIT by a TCP connection of which all this was seen. It takes another connection with
    /// the same addresses and ports for an old packet of this one if the timestamps say so (RFC 7323, section 5.3), and those of
    /// two clients, or of two ports of one, have nothing to do with each other.
    #[inline(always)]
    pub const fn lingers(bits: u32) -> bool {
        bits & (RESET | BACKEND_FIN) == BACKEND_FIN
    }
}

const _: () = {
    assert!(size_of::<PeerKey>() == 32);
    assert!(size_of::<Peer>() == 20);
    assert!(size_of::<ChoiceKey>() == 32);
    assert!(size_of::<Choice>() == 20);
    assert!(size_of::<ConnectionKey>() == 40);
    assert!(core::mem::offset_of!(ConnectionKey, protocol) == 36);
    assert!(size_of::<Connection>() == 56);
    assert!(core::mem::offset_of!(Connection, service) == 40);
    assert!(core::mem::offset_of!(Connection, seen) == 48);
};
