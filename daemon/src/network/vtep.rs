//! VTEP addresses: the MAC of a node's tunnel device, which every other node must know.

use std::fmt;

/// A hardware address, in transmission order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The VTEP MAC of the node called `node`: locally administered, unicast, and nothing but its name decides it, so
/// that a rebuilt node changes nothing for the others and nobody has to be told.
///
/// FNV-1a with the finaliser of MurmurHash3, 46 bits of it: among 1,000 nodes two alike are one in 10^8.
pub fn mac(node: &str) -> Mac {
    let mut hash = node.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^= hash >> 33;
    let [a, b, c, d, e, g, ..] = hash.to_be_bytes();
    Mac([(a & 0xfc) | 0x02, b, c, d, e, g])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// N6: pinned, because a build that computed another one would cut itself off from older nodes.
    #[test]
    fn the_mac_is_the_names_alone() {
        assert_eq!(mac("node1"), mac("node1"));
        assert_eq!(mac("node1").to_string(), PINNED);
    }

    const PINNED: &str = "5a:a3:2c:db:d8:ec";

    #[test]
    fn a_thousand_nodes_have_a_thousand_unicast_macs() {
        let macs: BTreeSet<_> = (0..1000).map(|i| mac(&format!("node-{i}"))).collect();
        assert_eq!(macs.len(), 1000);
        assert!(macs.iter().all(|mac| mac.0[0] & 3 == 2));
    }
}
