//! Pod wiring: what the CNI plugin does, as a library.
//!
//! The plugin binary (`sluice`) is a thin shell around this crate. The daemon uses it too, for what both must agree
//! on: the names and numbers of what Sluice makes on a host ([`names`]), the file through which the daemon tells the
//! plugin about the node ([`node_file`]), the collection of what dead sandboxes left ([`collect`]),
//! and the MTU of pods that run already ([`mtu`]).
//!
//! This crate never talks to an API server or to the network: all it needs lies on the node. The daemon is asked for one
//! thing only, and nothing depends on its answer ([`removals`]).

pub mod arena;
pub mod arguments;
pub mod bandwidth;
pub mod call;
pub mod collect;
pub mod config;
pub mod error;
pub mod host_ports;
pub mod invocation;
pub mod mac;
pub mod mtu;
pub mod names;
pub mod netlink;
pub mod netns;
pub mod node_file;
pub mod removals;
pub mod requests;
pub mod result;
pub mod shaping;
pub mod stable_hash;
pub mod turn;
pub mod verbs;
pub mod version;
pub mod wiring;
