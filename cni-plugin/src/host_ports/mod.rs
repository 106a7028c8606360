//! Host ports: addresses and ports of the node that lead to a pod (`portMappings`).
//!
//! The plugin translates nothing itself. It writes down which host ports a pod has ([`HostPorts`]), and the daemon
//! serves them with the dataplane that serves Services. So the plugin works while the daemon is down: the ports open
//! when it is back, and those that are open stay so.

mod mapping;
mod records;

pub use mapping::{Mapping, Protocol, mappings};
pub use records::{HostPorts, Record};
