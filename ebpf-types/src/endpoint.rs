//! Pods of this node, and the networks pods are in: what forwarding between pods goes by.

use bytemuck::{Pod, Zeroable};

use crate::Address;

/// How a packet gets to a pod of this node: in the slot of the pod's address ([`EndpointSlot`]) or, where that is another's, the value of
/// `endpoints_v1`, whose key is the address.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Endpoint {
    /// Interface index of the host's end of the pod's veth pair.
    pub device: u32,
    /// Bits of [`endpoint_flag`].
    pub flags: u32,
    /// Not 0 once a packet of this pod was translated on its way: from then on packets to it are looked up among the
    /// connections. Written by the programs alone.
    pub translated: u32,
    /// Ethernet addresses as they stand in a frame to the pod: the pod's own, then the host end's.
    pub ethernet: [u8; 12],
}

/// Element of `endpoint_slots_v1`, where an endpoint is looked for first: what stands in an array is read without a call and
/// without hashing, and that is a fiftieth of what a packet from pod to pod on a node costs.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct EndpointSlot {
    /// Whose it is; `::` where it is nobody's.
    pub address: Address,
    /// How a packet gets there.
    pub endpoint: Endpoint,
}

impl EndpointSlot {
    /// How many there are: 512 for each family.
    pub const COUNT: u32 = 1024;

    /// Which one `address` may have. A node's addresses are counted up from its pod CIDR, so those of one block of 512 share none.
    #[inline(always)]
    pub const fn number(address: &Address) -> u32 {
        let half = Self::COUNT / 2;
        let low = u32::from_be(address.words[3]) % half;
        if address.is_v4() { low } else { half + low }
    }
}

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flag {
    /// Packets to and from the pod must pass what queues them on the host's end of its veth pair: no short cuts.
    pub const QUEUED: u32 = 1;
}

/// A network, to hold addresses against: IPv4 networks are mapped like IPv4 addresses.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Network {
    /// Its address, host bits 0.
    pub address: Address,
    /// Its mask: network order, like the address.
    pub mask: Address,
}

impl Network {
    /// Holds no address.
    pub const NONE: Self = Self {
        address: Address { words: [u32::MAX; 4] },
        mask: Address { words: [0; 4] },
    };

    /// The network of this address and this many leading bits; 96 more of them are said of an IPv4 network.
    pub fn new(address: core::net::IpAddr, prefix: u8) -> Self {
        let bits = u32::from(prefix) + if address.is_ipv4() { 96 } else { 0 };
        let mask = u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
        let mask = Address::from(core::net::IpAddr::V6(core::net::Ipv6Addr::from_bits(mask)));
        let mut address = Address::from(address);
        for (word, mask) in address.words.iter_mut().zip(mask.words) {
            *word &= mask;
        }
        Self { address, mask }
    }

    /// Whether the address lies in it.
    #[inline(always)]
    pub fn contains(&self, address: &Address) -> bool {
        address.words[3] & self.mask.words[3] == self.address.words[3]
            && address.words[2] & self.mask.words[2] == self.address.words[2]
            && address.words[1] & self.mask.words[1] == self.address.words[1]
            && address.words[0] & self.mask.words[0] == self.address.words[0]
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::NONE
    }
}

const _: () = {
    assert!(size_of::<Endpoint>() == 24);
    assert!(core::mem::offset_of!(Endpoint, translated) == 8);
    assert!(size_of::<Network>() == 32);
};

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    #[test]
    fn networks_hold_their_own_family_alone() {
        let network = |text: &str, prefix| Network::new(text.parse().unwrap(), prefix);
        let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
        for (network, inside, outside) in [
            (network("10.244.0.0", 16), "10.244.255.1", "10.245.0.1"),
            (network("10.244.1.7", 24), "10.244.1.0", "10.244.2.0"),
            (network("0.0.0.0", 0), "192.0.2.1", "fd00::1"),
            (network("192.0.2.1", 32), "192.0.2.1", "192.0.2.2"),
            (network("fd00:244::", 48), "fd00:244::9", "fd00:245::9"),
            (network("::", 0), "fd00::1", "none"),
        ] {
            assert!(network.contains(&address(inside)), "{network:?} {inside}");
            if outside != "none" {
                assert!(!network.contains(&address(outside)), "{network:?} {outside}");
            }
            assert!(!Network::NONE.contains(&address(inside)));
        }
    }
}
