//! The cluster as plain data. Pure: no I/O, no clock, no kernel.
//!
//! [`objects`] are what a datastore tells; [`cluster`] folds them and says which Services a change touches;
//! [`balance`] turns one Service into the [`service_port`]s the proxy programs, by [`topology`] the near endpoints
//! before the far, [`host_ports`] the host ports of this node's pods, and [`health_checks`] what a balancer in front
//! asks; [`services`] holds all of these, each address in one of them as [`claims`] decide; [`node_routes`] says which
//! pod CIDRs lie behind which node.

pub mod balance;
pub mod claims;
pub mod cluster;
pub mod health_checks;
pub mod host_ports;
pub mod node_health;
pub mod node_routes;
pub mod objects;
pub mod service_port;
pub mod services;
pub mod topology;

#[cfg(test)]
mod scenarios;
