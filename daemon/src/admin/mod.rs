//! What an operator and a monitoring system may ask the daemon.
//!
//! [`report`] is the data, plain and serialisable; [`socket`] serves it to `sluicectl` on a unix socket; [`http`]
//! serves metrics and health on TCP, [`kube_proxy`] what kube-proxy served there; [`client`] is `sluicectl`'s side. Nothing here changes the node.

pub mod client;
pub mod http;
pub mod kube_proxy;
pub mod report;
pub mod socket;

/// Where the admin API listens, mode 0600.
pub const SOCKET: &str = "/run/sluice/sluiced.sock";
