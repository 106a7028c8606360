//! What the dataplanes by netfilter have in common: nftables and iptables translate a connection's first packet, and the
//! kernel's connection tracking the others.

pub mod connections;
pub mod loopback;
pub mod plan;
