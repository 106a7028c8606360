//! Which addresses of a CIDR may be given to pods, and in which order.
//!
//! Pure arithmetic: knows nothing of what is held.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnetwork::IpNetwork;

/// The addresses of one pod CIDR that pods may hold.
///
/// Never given: the first address (it names the network, the node holds it as its own, and in IPv6 it is the
/// subnet-router anycast), the IPv4 broadcast, and what the operator reserved. A /31 or /127 so has one address for
/// pods, a /32 or /128 none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    cidr: IpNetwork,
    /// Reserved stretches, by place: sorted, apart from each other, each inside the pool.
    reserved: Vec<RangeInclusive<u128>>,
}

impl Pool {
    /// The pool of `cidr`, less the networks in `reserved`; host bits set in any of them do not matter.
    pub fn new(cidr: IpNetwork, reserved: &[IpNetwork]) -> Self {
        let mut pool = Self {
            cidr,
            reserved: Vec::new(),
        };
        let mut stretches: Vec<_> = reserved
            .iter()
            .filter_map(|network| pool.stretch(*network))
            .collect();
        stretches.sort_unstable_by_key(|stretch| *stretch.start());
        for stretch in stretches {
            match pool.reserved.last_mut() {
                // Touching or overlapping ones become one: each is then stepped over once.
                Some(last) if *stretch.start() <= last.end().saturating_add(1) => {
                    let end = (*last.end()).max(*stretch.end());
                    *last = *last.start()..=end;
                }
                _ => pool.reserved.push(stretch),
            }
        }
        pool
    }

    /// How many addresses pods may hold.
    pub fn size(&self) -> u128 {
        let reserved = self
            .reserved
            .iter()
            .map(|stretch| stretch.end() - stretch.start() + 1);
        self.whole_size() - reserved.sum::<u128>()
    }

    /// Whether `address` may be given.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.index_of(address).is_some()
    }

    /// The size if nothing were reserved.
    fn whole_size(&self) -> u128 {
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

    /// The places that `network` covers; nothing when it lies elsewhere.
    fn stretch(&self, network: IpNetwork) -> Option<RangeInclusive<u128>> {
        let (own_first, own_last) = ends(self.cidr);
        let (first, last) = ends(network);
        if network.is_ipv4() != self.cidr.is_ipv4() || last < own_first || first > own_last {
            return None;
        }
        // Offsets in the CIDR; places are one less, for its first address has none.
        let first = first.saturating_sub(own_first).max(1) - 1;
        let last = (last.min(own_last) - own_first).checked_sub(1)?;
        let last = last.min(self.whole_size().checked_sub(1)?);
        (first <= last).then_some(first..=last)
    }

    /// The address at `index`, counted from 0 and below [`Self::size`].
    pub(crate) fn nth(&self, index: u128) -> IpAddr {
        let mut place = index;
        for stretch in &self.reserved {
            if place < *stretch.start() {
                break;
            }
            place += stretch.end() - stretch.start() + 1;
        }
        match self.cidr {
            IpNetwork::V4(cidr) => {
                let offset = u32::try_from(place).unwrap_or(u32::MAX);
                let network = u32::from(cidr.network());
                IpAddr::V4(Ipv4Addr::from(network.wrapping_add(offset).wrapping_add(1)))
            }
            IpNetwork::V6(cidr) => {
                let network = u128::from(cidr.network());
                IpAddr::V6(Ipv6Addr::from(network.wrapping_add(place).wrapping_add(1)))
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
        let place = offset.checked_sub(1).filter(|place| *place < self.whole_size())?;
        let mut before = 0;
        for stretch in &self.reserved {
            if stretch.contains(&place) {
                return None;
            }
            if *stretch.start() < place {
                before += stretch.end() - stretch.start() + 1;
            }
        }
        Some(place - before)
    }
}

/// The first and the last address of `network` as numbers.
fn ends(network: IpNetwork) -> (u128, u128) {
    let number = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    };
    (number(network.network()), number(network.broadcast()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(cidr: &str) -> Pool {
        Pool::new(cidr.parse().unwrap(), &[])
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

    // I5
    #[test]
    fn reserved_addresses_have_no_place_and_the_others_close_ranks() {
        let reserved: Vec<IpNetwork> = [
            "10.1.2.0/29",
            "10.1.2.8/30",
            "10.1.2.20/32",
            "10.1.2.248/29",
            "10.9.0.0/16",
        ]
        .iter()
        .chain(&["fd00::/64"])
        .map(|network| network.parse().unwrap())
        .collect();
        let pool = Pool::new("10.1.2.0/24".parse().unwrap(), &reserved);
        // Of 254, without .1 to .7, .8 to .11, .20 and .248 to .254.
        assert_eq!(pool.size(), 254 - 7 - 4 - 1 - 7);
        assert_eq!(pool.nth(0), "10.1.2.12".parse::<IpAddr>().unwrap());
        assert_eq!(pool.nth(8), "10.1.2.21".parse::<IpAddr>().unwrap());
        assert_eq!(pool.nth(pool.size() - 1), "10.1.2.247".parse::<IpAddr>().unwrap());
        for index in 0..pool.size() {
            assert_eq!(pool.index_of(pool.nth(index)), Some(index));
        }
        for never in ["10.1.2.1", "10.1.2.11", "10.1.2.20", "10.1.2.250"] {
            assert!(!pool.contains(never.parse().unwrap()), "{never}");
        }
        for (cidr, reserved, size) in [
            ("fd00::/64", "fd00::/65", (1u128 << 64) - (1 << 63)),
            ("fd00::/64", "fd00::/64", 0),
            ("fd00::/64", "::/0", 0),
            ("fd00::/64", "fd00::/128", (1 << 64) - 1),
            ("10.1.2.0/24", "10.1.2.255/32", 254),
            ("10.1.2.0/31", "10.1.2.1/32", 0),
            ("10.1.2.0/32", "10.1.2.0/32", 0),
            ("::/0", "::/0", 0),
        ] {
            let pool = Pool::new(cidr.parse().unwrap(), &[reserved.parse().unwrap()]);
            assert_eq!(pool.size(), size, "{cidr} less {reserved}");
        }
    }
}
