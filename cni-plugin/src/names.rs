//! Names and numbers by which Sluice knows its own objects in the kernel, and the node's paths.
//!
//! What carries one of these is Sluice's to change or remove; what does not is somebody else's and stays untouched.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Route protocol (`rtm_protocol`) of every route Sluice installs. Unassigned in `/etc/iproute2/rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 83;

/// Every network device Sluice makes on the host side begins with this.
pub const DEVICE_PREFIX: &str = "sluice";

/// Gateway of every pod's IPv4 default route. No interface holds it: the pod has a permanent neighbour entry for it.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Gateway of every pod's IPv6 default route; see [`GATEWAY_V4`].
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// What the daemon tells the plugin about this node; see [`crate::node_file::NodeFile`].
pub const NODE_FILE: &str = "/run/sluice/node.json";

/// Root of the address store, on tmpfs: an allocation cannot outlive the boot its namespace lived in.
pub const IPAM_DIRECTORY: &str = "/run/sluice/ipam";

/// Where the daemon takes requests to remove devices, mode 0600; see [`crate::removals`].
pub const REMOVALS_SOCKET: &str = "/run/sluice/removals.sock";

/// The host ports of this node's pods, beside the address store; see [`crate::host_ports`].
pub const HOST_PORTS_DIRECTORY: &str = "/run/sluice/hostports";

/// The CNI network config, by which a runtime finds the plugin; the daemon writes it once pods can be wired.
pub const CONFLIST: &str = "/etc/cni/net.d/10-sluice.conflist";

/// Where runtimes look for CNI plugins.
pub const PLUGIN_FOLDER: &str = "/opt/cni/bin";

/// What the plugin's file is called; a runtime finds it by `type` in the conflist.
pub const PLUGIN: &str = "sluice";
