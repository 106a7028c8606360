//! Which addresses of a CIDR may be given to pods, and in which order.
//!
//! Pure arithmetic: knows nothing of what is held.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

/// The addresses of one pod CIDR that pods may hold.
///
/// Never given: the first address (it names the network, the node holds it as its own, and in IPv6 it is the
/// subnet-router anycast) and the IPv4 broadcast. A /31 or /127 so has one address for pods, a /32 or /128 none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    cidr: IpNetwork,
}

impl Pool {
    /// The pool of `cidr`; host bits set in it do not matter.
    pub fn new(cidr: IpNetwork) -> Self {
        Self { cidr }
    }

    /// How many addresses pods may hold.
    pub fn size(&self) -> u128 {
        match self.cidr {
            IpNetwork::V4(cidr) => match cidr.prefix() {
                32 => 0,
                31 => 1,
                prefix => (1u128 << (32 - prefix)) - 2,
            },
            // A /0 has one address more than fits: it counts as full to the brim.
            IpNetwork::V6(cidr) => match cidr.prefix() {
                0 => u128::MAX,
                prefix => (1u128 << (128 - prefix)) - 1,
            },
        }
    }

    /// The address at `index`, counted from 0 and below [`Self::size`].
    pub(crate) fn nth(&self, index: u128) -> IpAddr {
        match self.cidr {
            IpNetwork::V4(cidr) => {
                let offset = u32::try_from(index).unwrap_or(u32::MAX);
                let network = u32::from(cidr.network());
                IpAddr::V4(Ipv4Addr::from(network.wrapping_add(offset).wrapping_add(1)))
            }
            IpNetwork::V6(cidr) => {
                let network = u128::from(cidr.network());
                IpAddr::V6(Ipv6Addr::from(network.wrapping_add(index).wrapping_add(1)))
            }
        }
    }

    /// Where `address` stands in the pool; nothing when pods may not hold it.
    pub(crate) fn index_of(&self, address: IpAddr) -> Option<u128> {
        let offset = match (self.cidr, address) {
            (IpNetwork::V4(cidr), IpAddr::V4(address)) if cidr.contains(address) => {
                u128::from(u32::from(address) - u32::from(cidr.network()))
            }
            (IpNetwork::V6(cidr), IpAddr::V6(address)) if cidr.contains(address) => {
                u128::from(address) - u128::from(cidr.network())
            }
            _ => return None,
        };
        offset.checked_sub(1).filter(|index| *index < self.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(cidr: &str) -> Pool {
        Pool::new(cidr.parse().unwrap())
    }

    // I1
    #[test]
    fn network_node_and_broadcast_addresses_are_never_given() {
        for (cidr, size) in [
            ("10.0.0.0/8", (1 << 24) - 2),
            ("10.1.0.0/16", 65_534),
            ("10.1.2.0/24", 254),
            ("10.1.2.4/30", 2),
            ("10.1.2.4/31", 1),
            ("10.1.2.4/32", 0),
            ("fd00::/64", (1 << 64) - 1),
            ("fd00::/126", 3),
            ("fd00::/127", 1),
            ("fd00::/128", 0),
            ("::/0", u128::MAX),
        ] {
            assert_eq!(pool(cidr).size(), size, "{cidr}");
        }
        let small = pool("10.1.2.4/30");
        assert_eq!(small.nth(0), "10.1.2.5".parse::<IpAddr>().unwrap());
        assert_eq!(small.nth(1), "10.1.2.6".parse::<IpAddr>().unwrap());
        for never in ["10.1.2.4", "10.1.2.7", "10.1.2.8", "fd00::1"] {
            assert_eq!(small.index_of(never.parse().unwrap()), None, "{never}");
        }
        assert_eq!(pool("fd00::/64").index_of("fd00::".parse().unwrap()), None);
    }

    // I1
    #[test]
    fn place_and_address_are_each_others_reverse() {
        for cidr in [
            "10.1.2.0/24",
            "10.1.2.77/24",
            "fd00:1::/120",
            "255.255.255.0/24",
            "10.0.0.0/31",
        ] {
            let pool = pool(cidr);
            for index in 0..pool.size() {
                assert_eq!(pool.index_of(pool.nth(index)), Some(index), "{cidr} {index}");
            }
        }
    }
}
