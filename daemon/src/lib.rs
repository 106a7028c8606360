//! `sluiced`, the node daemon, and what `sluicectl` shares with it.
//!
//! Data flows one way: datastore → state → plan → apply → read back. A module's first lines say what it owns.

pub mod address;
pub mod admin;
pub mod agent;
pub mod config;
pub mod dataplane;
pub mod datastore;
pub mod doctor;
pub mod egress;
pub mod forward;
pub mod health_checks;
pub mod host;
pub mod host_ports;
pub mod install;
pub mod last_known;
mod memory;
pub mod mounts;
pub mod netfilter;
pub mod network;
pub mod private_socket;
pub mod probe;
pub mod proxy;
pub mod reconcile;
pub mod removals;
pub mod state;
pub mod trial;
pub mod watch;
pub mod xtables;
pub mod yaml;
