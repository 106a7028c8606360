//! The node lab: a cluster of namespaces on one machine.
//!
//! A node is a network, mount, cgroup, PID, IPC and UTS namespace held by a process of its own; a fabric (one switch, or
//! two subnets and a router) joins the nodes and one outside host, `client`. Everything real runs inside. The lab never
//! touches the machine's own interfaces, routes, firewall or cgroup root: what it makes lies in namespaces it made, in
//! `/run/sluice-lab/<lab>` and in one cgroup subtree, and [`down::down`] removes all of it from whatever state it is in.

pub mod api;
pub mod cgroup;
pub mod cni;
pub mod containerd;
pub mod control_plane;
pub mod demo;
pub mod down;
pub mod enter;
pub mod etcd;
mod fabric;
pub mod images;
pub mod init;
pub mod kubelets;
pub mod lab;
pub mod load;
mod manifests;
mod mounts;
pub mod objects;
pub mod options;
mod pki;
pub mod place;
pub mod plan;
pub mod pods;
pub mod progress;
mod servers;
pub mod state;
pub mod supervise;
pub mod talk;
mod token;
pub mod udp_name;
pub mod up;

pub use lab::{Lab, wait_until};
pub use options::{Backend, Datastore, Families, Options, ProxyMode};
pub use place::{Node, Running, url};
