//! Services: from an address to a set of backends.

use bytemuck::{Pod, Zeroable};

use crate::Address;

/// Key of `frontends_v1`: where clients connect.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct FrontendKey {
    /// Address clients connect to.
    pub address: Address,
    /// Port, network order.
    pub port: u16,
    /// IANA protocol number.
    pub protocol: u8,
    /// Always 0.
    pub zero: u8,
}

/// Value of `frontends_v1`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Frontend {
    /// Set that serves packets from other hosts: key in `services_v1`.
    pub service: u32,
    /// Set that serves this node's own sockets. It differs where a Service keeps outside traffic local: the node and
    /// its pods reach the same address by the endpoints of the whole cluster.
    pub socket_service: u32,
    /// Bits of [`frontend_flag`].
    pub flags: u32,
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flag {
    /// Serves sockets of the host's network namespace alone: NodePorts on loopback.
    pub const HOST_NETNS_ONLY: u32 = 1;
    /// Serves packets that come in at a device as well: NodePorts, external and LoadBalancer addresses.
    pub const EXTERNAL: u32 = 2;
    /// What comes is dropped, not refused, while there is no backend: local ones alone are wanted and others exist, so that
    /// whoever balances in front of the node will try another.
    pub const DROP_WHEN_EMPTY: u32 = 4;
    /// The address need not be the host's own: packets for it, left to the host's stack, would be routed on.
    pub const FOREIGN: u32 = 8;
    /// The address is a ClusterIP, and so is in `addresses_v1`.
    pub const CLUSTER_IP: u32 = 16;
    /// Only those may connect whose address is in `sources_v1` under [`Frontend::service`](super::Frontend::service). A
    /// pod's socket may not have an address yet: it is left alone, and its packets are judged at the pod's device.
    pub const RESTRICTED: u32 = 32;
    /// Restricted, and this node's own sockets are among those who may connect.
    pub const HOST_ALLOWED: u32 = 64;
}

/// Value of `services_v1`, whose key is the set's id (`u32`, never 0).
///
/// The slots of a generation are all written before the generation is named here: one update of this entry changes all
/// backends at once.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Service {
    /// Which generation of slots in `backends_v1` is in force.
    pub generation: u32,
    /// How many slots it has, from 0 without gaps.
    pub count: u32,
    /// Session affinity's time-out in seconds; 0: none.
    pub affinity_seconds: u32,
    /// Always 0.
    pub zero: u32,
}

/// Key of `backends_v1`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct BackendKey {
    /// The set's id.
    pub service: u32,
    /// The generation.
    pub generation: u32,
    /// From 0 up to [`Service::count`].
    pub slot: u32,
}

/// Value of `backends_v1`: where a connection goes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Backend {
    /// The endpoint's address.
    pub address: Address,
    /// Its port, network order.
    pub port: u16,
    /// One of [`place`].
    pub place: u8,
    /// Always 0.
    pub zero: u8,
}

/// Values of [`Backend::place`]: where an endpoint runs, seen from this node.
pub mod place {
    /// On this node.
    pub const THIS_NODE: u8 = 0;
    /// In a pod elsewhere: replies come back to this node's address in the pod network.
    pub const POD_NETWORK: u8 = 1;
    /// On a node or a host outside: replies come back to this node's own address.
    pub const OUTSIDE: u8 = 2;
}

/// How many places of a set's table stand in one entry of `maglev_v1`.
pub const MAGLEV_PART: usize = 256;

/// How many places the table of a set with `count` backends has: a prime, and so many more than backends that each gets its
/// share to a few hundredths. 0: no table, where there is nothing to choose or too much.
///
/// Both sides go by it, so a table needs no entry that says its size.
#[inline(always)]
pub const fn maglev_places(count: u32) -> u32 {
    match count {
        0 | 1 => 0,
        2..=8 => 251,
        9..=64 => 4_093,
        65..=640 => 32_749,
        641..=32_768 => 65_521,
        _ => 0,
    }
}

/// Key of `maglev_v1`: a part of a set's table.
///
/// A packet from another host finds its backend by a hash of who sent it, in a table that is the same on all nodes but for the
/// numbers of the slots (Eisenbud et al., "Maglev", NSDI 2016, section 3.4): whichever node it comes to, it goes the same
/// way, and few go another way when backends come or go. Sets that no other host is served by have none.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct MaglevKey {
    /// The set's id.
    pub service: u32,
    /// Which [`MAGLEV_PART`] places, from 0.
    pub part: u32,
}

/// Value of `maglev_v1`: for each place a slot of the set. One that does not exist, as for a moment while the set changes, leads
/// nowhere, and the backend is picked at random.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct MaglevPart {
    /// Numbers of slots.
    pub slots: [u16; MAGLEV_PART],
}

/// Key of `members_v1`: says of an endpoint that it belongs to a set now. What remembers an endpoint (session affinity,
/// a socket's choice, a UDP flow) asks here before it goes on using it, so nothing has to be searched for and
/// deleted when an endpoint goes. The value is the endpoint's [`place`](Backend::place) as `u32`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct MemberKey {
    /// The endpoint's address.
    pub address: Address,
    /// The set's id.
    pub service: u32,
    /// The endpoint's port, network order.
    pub port: u16,
    /// Always 0.
    pub zero: u16,
}

/// Key of `sources_v1`, a trie of networks (`struct bpf_lpm_trie_key_u8`, include/uapi/linux/bpf.h): who may connect to a
/// set's restricted frontends. The value says nothing.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct SourceKey {
    /// How many bits count: 32 for the set, and those of the network's prefix.
    pub bits: u32,
    /// The rest.
    pub source: Source,
}

/// A client, or a network of clients, of one set.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Source {
    /// The set's id, in network order.
    pub service: u32,
    /// The client's address, or the network's.
    pub address: Address,
}

impl SourceKey {
    /// One client of the set `service`.
    #[inline(always)]
    pub const fn client(service: u32, address: Address) -> Self {
        Self {
            bits: u32::BITS + Address::BITS,
            source: Source {
                service: service.to_be(),
                address,
            },
        }
    }
}

/// Key of `affinity_v1`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct AffinityKey {
    /// The client's address; for a socket, which may have none yet, its namespace: [`Address::netns`].
    pub client: Address,
    /// The set's id.
    pub service: u32,
}

/// Value of `affinity_v1`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Affinity {
    /// The client's last connection, in nanoseconds of `CLOCK_MONOTONIC`.
    pub last_used: u64,
    /// The endpoint's address.
    pub address: Address,
    /// The endpoint's port, network order.
    pub port: u16,
    /// Always 0.
    pub zero: [u16; 3],
}

const _: () = {
    assert!(size_of::<FrontendKey>() == 20);
    assert!(core::mem::offset_of!(FrontendKey, port) == 16);
    assert!(size_of::<Frontend>() == 12);
    assert!(size_of::<Service>() == 16);
    assert!(size_of::<BackendKey>() == 12);
    assert!(size_of::<Backend>() == 20);
    assert!(core::mem::offset_of!(Backend, place) == 18);
    assert!(size_of::<MaglevPart>() == 2 * MAGLEV_PART);
    assert!(size_of::<MemberKey>() == 24);
    assert!(size_of::<SourceKey>() == 24);
    assert!(size_of::<AffinityKey>() == 20);
    assert!(size_of::<Affinity>() == 32);
    assert!(core::mem::offset_of!(Affinity, port) == 24);
};
