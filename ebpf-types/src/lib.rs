//! Types shared by the kernel-side programs and the daemon: the layout of every pinned map.
//!
//! All are `#[repr(C)]` without padding, so that a value is the same bytes on both sides and a map key compares as
//! it should. A change of layout changes the version in the name of the map (`frontends_v1`): the daemon would
//! otherwise adopt a pinned map whose bytes mean something else. Owns layouts and names only, never behaviour.
#![no_std]

use bytemuck::{Pod, Zeroable};

mod connection;
mod endpoint;
mod service;

pub use connection::{Choice, ChoiceKey, Connection, ConnectionKey, Peer, PeerKey, direction, role, seen};
pub use endpoint::{Endpoint, EndpointSlot, Network, endpoint_flag};
pub use service::{
    Affinity, AffinityKey, Backend, BackendKey, Frontend, FrontendKey, MAGLEV_PART, MaglevKey, MaglevPart,
    MemberKey, Service, Source, SourceKey, frontend_flag, maglev_places, place,
};

/// Most entries of `frontends_v1`, of `services_v1`, and of `addresses_v1`, whose keys are the ClusterIPs ([`Address`]) and
/// whose values say whether there is an endpoint behind any of its ports (`u32`, 0 or 1).
pub const MAX_FRONTENDS: u32 = 65_536;
/// Most entries of `backends_v1`, and of `members_v1`.
pub const MAX_BACKENDS: u32 = 262_144;
/// Most entries of `maglev_v1`.
pub const MAX_MAGLEV: u32 = 65_536;
/// Most entries of each table that forgets its oldest: `affinity_v1`, `socket_peers_v1`, `socket_choices_v1`.
pub const MAX_REMEMBERED: u32 = 65_536;
/// Most entries of `connections_v1`; a connection takes two of them, or four when its source is translated as well.
pub const MAX_CONNECTIONS: u32 = 131_072;

/// Most entries of `endpoints_v1`: two addresses for each of 4,096 pods.
pub const MAX_ENDPOINTS: u32 = 8192;
/// Entries of `counters_v2`: room for more counters than there are, so that a new one needs no new map.
pub const MAX_COUNTERS: u32 = 64;
/// Most entries of `sources_v1`.
pub const MAX_SOURCES: u32 = 65_536;

/// IANA protocol number of TCP.
pub const TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const UDP: u8 = 17;
/// IANA protocol number of SCTP.
pub const SCTP: u8 = 132;

/// An IPv6 address, or an IPv4 address mapped into IPv6 (`::ffff:a.b.c.d`).
///
/// Four words in network order as they stand in memory, like `in6_addr.s6_addr32` (include/uapi/linux/in6.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Address {
    /// The 16 bytes, in network order.
    pub words: [u32; 4],
}

impl Address {
    /// Its length in bits.
    pub const BITS: u32 = 128;
    /// What stands before an IPv4 address: `::ffff`.
    pub const V4_PREFIX: u32 = 0xffff_u32.to_be();

    /// The IPv4 address whose four bytes, in network order, are `word`.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self {
            words: [0, 0, Self::V4_PREFIX, word],
        }
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == Self::V4_PREFIX
    }

    /// Whether the two are the same; word by word, which the eBPF compiler understands everywhere.
    #[inline(always)]
    pub const fn is(&self, other: &Self) -> bool {
        self.words[3] == other.words[3]
            && self.words[2] == other.words[2]
            && self.words[1] == other.words[1]
            && self.words[0] == other.words[0]
    }

    /// Whether this is `::`, which stands for "none".
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == 0
    }

    /// Stands for a network namespace where a client's address is asked for and a socket has none yet: its cookie
    /// behind a prefix no unicast address has (ff00::/8 is multicast).
    #[inline(always)]
    pub const fn netns(cookie: u64) -> Self {
        Self {
            words: [u32::MAX, u32::MAX, (cookie >> 32) as u32, cookie as u32],
        }
    }

    /// The same address for `core::net`; IPv4 addresses come out as such.
    pub fn to_ip(self) -> core::net::IpAddr {
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(self.words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        core::net::Ipv6Addr::from(bytes).to_canonical()
    }
}

/// As `core::net` orders them within a family: what is sorted there is sorted here.
impl Ord for Address {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        let numbers = |address: &Self| address.words.map(u32::from_be);
        numbers(self).cmp(&numbers(other))
    }
}

impl PartialOrd for Address {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl From<core::net::IpAddr> for Address {
    fn from(address: core::net::IpAddr) -> Self {
        let bytes = match address {
            core::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            core::net::IpAddr::V6(v6) => v6.octets(),
        };
        Self {
            words: bytemuck::cast(bytes),
        }
    }
}

/// What the programs must know of the node: the one entry of `node_v2`. Written by the daemon alone.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Node {
    /// Cookie of the network namespace the daemon runs in (`SO_NETNS_COOKIE`); 0 while unknown.
    pub host_netns_cookie: u64,
    /// This node's address in the pod network, IPv4; `::` if it has none.
    pub pod_network_v4: Address,
    /// This node's address in the pod network, IPv6; `::` if it has none.
    pub pod_network_v6: Address,
    /// This node's own IPv4 address; `::` if it has none.
    pub node_v4: Address,
    /// This node's own IPv6 address; `::` if it has none.
    pub node_v6: Address,
    /// The networks all pods are in; [`Network::NONE`] where there are fewer.
    pub pod_networks: [Network; POD_NETWORKS],
    /// Bits of [`node_flag`].
    pub flags: u32,
    /// Always 0.
    pub zero: u32,
}

/// How many networks of pods the programs know; pods in further ones have no short cuts.
pub const POD_NETWORKS: usize = 4;

/// Bits of [`Node::flags`].
pub mod node_flag {
    /// Packets from pod to pod go past the host's stack.
    pub const FAST_PATH: u32 = 1;
    /// Pings of a ClusterIP are answered.
    pub const PING: u32 = 2;
}

/// Index of a counter in the per-CPU array `counters_v2` of `u64`.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counter {
    /// Connections (or unconnected datagrams' first) sent on to a backend at the socket.
    SocketConnections,
    /// Connections refused at the socket because their Service has no backend.
    SocketRefused,
    /// Connections from outside sent on to a backend at the device.
    DeviceConnections,
    /// First packets from outside left to the host's own stack, which refuses them: their Service has no backend.
    DeviceRefused,
    /// First packets from outside dropped: their Service has no backend, and the host would not refuse them.
    DroppedNoBackend,
    /// First packets from outside dropped: their Service wants local backends alone and has none.
    DroppedNoLocal,
    /// First packets from outside dropped: no way to tell their connection from another one was left.
    DroppedNoPort,
    /// First packets from outside dropped: the node has no address to stand in for the client.
    DroppedNoAddress,
    /// Packets dropped because they could not be rewritten.
    DroppedRewrite,
    /// First fragments dropped, as a whole packet in their place would have been translated.
    DroppedFragments,
    /// Service lookups given up because the backends changed twice meanwhile.
    Raced,
    /// First packets of pods sent on to a backend at the pod's device, because their sockets were out of reach.
    PodConnections,
    /// First packets of pods refused at the pod's device: their Service has no backend, or the port nobody serves.
    PodRefused,
    /// First packets dropped: they come from outside a Service's source ranges.
    DroppedSource,
    /// Packets handed straight to a pod of this node.
    FastLocal,
    /// Packets sent straight on to another node.
    FastRemote,
    /// Pings of a ClusterIP answered.
    Pings,
    /// Pings of a ClusterIP without endpoints, told that it is unreachable.
    PingsRefused,
}

impl Counter {
    /// All of them, in the order of their index, with the name each has in metrics.
    pub const ALL: [(Self, &'static str); 18] = [
        (Self::SocketConnections, "socket_connections"),
        (Self::SocketRefused, "socket_refused"),
        (Self::DeviceConnections, "device_connections"),
        (Self::DeviceRefused, "device_refused"),
        (Self::DroppedNoBackend, "dropped_no_backend"),
        (Self::DroppedNoLocal, "dropped_no_local"),
        (Self::DroppedNoPort, "dropped_no_port"),
        (Self::DroppedNoAddress, "dropped_no_address"),
        (Self::DroppedRewrite, "dropped_rewrite"),
        (Self::DroppedFragments, "dropped_fragments"),
        (Self::Raced, "raced"),
        (Self::PodConnections, "pod_connections"),
        (Self::PodRefused, "pod_refused"),
        (Self::DroppedSource, "dropped_source"),
        (Self::FastLocal, "fast_local"),
        (Self::FastRemote, "fast_remote"),
        (Self::Pings, "pings"),
        (Self::PingsRefused, "pings_refused"),
    ];
    /// How many there are.
    pub const COUNT: u32 = Self::ALL.len() as u32;
}

#[cfg(feature = "user")]
mod user {
    macro_rules! pod {
        ($($type:ty),* $(,)?) => { $(
            // SAFETY: the type is `bytemuck::Pod`: any bytes are a value of it, and it has no padding.
            unsafe impl aya::Pod for $type {}
        )* };
    }
    pod!(
        crate::Address,
        crate::Node,
        crate::Endpoint,
        crate::EndpointSlot,
        crate::SourceKey,
        crate::FrontendKey,
        crate::Frontend,
        crate::Service,
        crate::BackendKey,
        crate::Backend,
        crate::MemberKey,
        crate::MaglevKey,
        crate::MaglevPart,
        crate::AffinityKey,
        crate::Affinity,
        crate::PeerKey,
        crate::Peer,
        crate::ChoiceKey,
        crate::Choice,
        crate::ConnectionKey,
        crate::Connection,
    );
}

const _: () = {
    assert!(size_of::<Address>() == 16);
    assert!(align_of::<Address>() == 4);
    assert!(size_of::<Node>() == 72 + 32 * POD_NETWORKS + 8);
    assert!(core::mem::offset_of!(Node, pod_network_v4) == 8);
    assert!(core::mem::offset_of!(Node, node_v6) == 56);
    assert!(core::mem::offset_of!(Node, pod_networks) == 72);
    assert!(Counter::PingsRefused as u32 + 1 == Counter::COUNT);
    assert!(Counter::COUNT <= MAX_COUNTERS);
};

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    #[test]
    fn addresses_survive_both_ways() {
        for text in ["10.96.0.1", "0.0.0.0", "fd00::1", "::1", "2001:db8:1:2:3:4:5:6"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(Address::from(ip).to_ip(), ip, "{text}");
            assert_eq!(Address::from(ip).is_v4(), ip.is_ipv4(), "{text}");
        }
        assert_eq!(
            Address::v4(u32::from_ne_bytes([10, 96, 0, 1])).to_ip(),
            "10.96.0.1".parse::<IpAddr>().unwrap()
        );
    }

    #[test]
    fn addresses_are_ordered_as_core_net_does() {
        for (less, more) in [
            ("10.0.0.1", "10.0.0.2"),
            ("10.0.0.255", "10.0.1.0"),
            ("9.255.255.255", "10.0.0.0"),
            ("fd00::1:0", "fd00::2:0"),
            ("fd00::ffff", "fd01::"),
        ] {
            let [less, more] = [less, more].map(|text| text.parse::<IpAddr>().unwrap());
            assert!(
                less < more && Address::from(less) < Address::from(more),
                "{less} {more}"
            );
        }
    }

    #[test]
    fn counters_stand_at_their_index() {
        for (index, (counter, _)) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
        }
    }
}
