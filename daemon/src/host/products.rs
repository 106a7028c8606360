//! Other networks for pods and other Service proxies: by what they are known on a host, and how that is removed. Pure.

/// One of them. In all names a trailing `*` stands for any end.
#[derive(Debug)]
pub struct Product {
    /// What people call it.
    pub name: &'static str,
    /// How a cluster is told to run it no more.
    pub stop: &'static str,
    /// Its programs, as the kernel names processes (15 characters at most).
    pub processes: &'static [&'static str],
    /// Its network devices.
    pub devices: &'static [&'static str],
    /// Its chains of iptables, whatever the table.
    pub chains: &'static [&'static str],
    /// What its rules have in their comments, in chains that are not its own.
    pub comments: &'static [&'static str],
    /// Its tables of nftables, family first.
    pub tables: &'static [&'static str],
    /// Its ipsets.
    pub sets: &'static [&'static str],
    /// Its files and folders.
    pub files: &'static [&'static str],
    /// The protocol number its routes carry, where that is its own.
    pub route_protocol: Option<u8>,
    /// What others use too, and is its only where something else of it is.
    pub shared: Shared,
}

/// What a host may have without the product as well.
#[derive(Debug)]
pub struct Shared {
    /// Devices that can be deleted.
    pub devices: &'static [&'static str],
    /// Devices of the kernel's that stay, and of whose addresses they are.
    pub addressed: &'static [&'static str],
    /// The protocol number of routes.
    pub route_protocol: Option<u8>,
}

const NOTHING_SHARED: Shared = Shared {
    devices: &[],
    addressed: &[],
    route_protocol: None,
};

const NOTHING: Product = Product {
    name: "",
    stop: "",
    processes: &[],
    devices: &[],
    chains: &[],
    comments: &[],
    tables: &[],
    sets: &[],
    files: &[],
    route_protocol: None,
    shared: NOTHING_SHARED,
};

/// What kube-proxy is called here and in [`PRODUCTS`].
pub const KUBE_PROXY: &str = "kube-proxy";

/// All that are known.
pub const PRODUCTS: [Product; 7] = [
    Product {
        name: KUBE_PROXY,
        stop: "kubectl -n kube-system delete daemonset kube-proxy",
        processes: &["kube-proxy"],
        devices: &["kube-ipvs0"],
        // The kubelet has KUBE-FIREWALL, KUBE-KUBELET-CANARY and KUBE-IPTABLES-HINT, which stay.
        chains: &[
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-NODE-PORT*",
            "KUBE-POSTROUTING",
            "KUBE-MARK-MASQ",
            "KUBE-FORWARD",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-PROXY-*",
            "KUBE-LOAD-BALANCER",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-*",
            "KUBE-SVC-*",
            "KUBE-SVL-*",
            "KUBE-SEP-*",
            "KUBE-EXT-*",
            "KUBE-FW-*",
            "KUBE-XLB-*",
        ],
        tables: &["ip kube-proxy", "ip6 kube-proxy"],
        sets: &["KUBE-*"],
        ..NOTHING
    },
    Product {
        name: "flannel",
        stop: "kubectl delete namespace kube-flannel",
        processes: &["flanneld"],
        devices: &["flannel.*", "flannel-v6.*", "flannel-wg*"],
        chains: &["FLANNEL-*"],
        comments: &["flanneld "],
        tables: &["ip flannel-ipv4", "ip6 flannel-ipv6"],
        files: &[
            "/etc/cni/net.d/10-flannel.conflist",
            "/run/flannel",
            "/var/lib/cni/flannel",
            "/var/lib/cni/networks/cbr0",
        ],
        // The reference plugin `bridge` makes it, also without flannel.
        shared: Shared {
            devices: &["cni0"],
            ..NOTHING_SHARED
        },
        ..NOTHING
    },
    Product {
        name: "Calico",
        stop: "kubectl -n kube-system delete daemonset calico-node (with its operator: kubectl delete installation default)",
        processes: &["calico-node", "calico-typha"],
        devices: &[
            "cali*",
            "vxlan.calico",
            "vxlan-v6.calico",
            "wireguard.cali",
            "wg-v6.cali",
            "bpfin.cali",
            "bpfout.cali",
        ],
        chains: &["cali-*"],
        comments: &["cali:"],
        tables: &["ip calico", "ip6 calico"],
        sets: &["cali*"],
        files: &[
            "/etc/cni/net.d/10-calico.conflist",
            "/etc/cni/net.d/calico-kubeconfig",
            "/run/calico",
            "/var/lib/calico",
            "/sys/fs/bpf/calico",
        ],
        route_protocol: Some(80),
        // IPIP's own device, and RTPROT_BIRD, linux/rtnetlink.h.
        shared: Shared {
            addressed: &["tunl0"],
            route_protocol: Some(12),
            ..NOTHING_SHARED
        },
    },
    Product {
        name: "Cilium",
        stop: "kubectl -n kube-system delete daemonset cilium",
        processes: &["cilium-agent", "cilium-envoy"],
        devices: &["cilium_host", "cilium_vxlan", "cilium_geneve", "lxc_health"],
        chains: &["CILIUM_*", "OLD_CILIUM_*"],
        files: &[
            "/etc/cni/net.d/05-cilium.conflist",
            "/run/cilium",
            "/sys/fs/bpf/cilium",
        ],
        ..NOTHING
    },
    Product {
        name: "Weave",
        stop: "kubectl -n kube-system delete daemonset weave-net",
        processes: &["weaver"],
        devices: &["weave", "vxlan-6784"],
        chains: &["WEAVE*"],
        sets: &["weave-*"],
        files: &["/etc/cni/net.d/10-weave.conflist"],
        ..NOTHING
    },
    Product {
        name: "Antrea",
        stop: "kubectl -n kube-system delete daemonset antrea-agent",
        processes: &["antrea-agent"],
        devices: &["antrea-gw0", "antrea-egress0"],
        chains: &["ANTREA-*"],
        sets: &["ANTREA-*"],
        files: &["/etc/cni/net.d/10-antrea.conflist", "/run/antrea"],
        ..NOTHING
    },
    Product {
        name: "kube-router",
        stop: "kubectl -n kube-system delete daemonset kube-router",
        processes: &["kube-router"],
        devices: &["kube-bridge", "kube-dummy-if"],
        chains: &["KUBE-ROUTER-*", "KUBE-POD-FW-*", "KUBE-NWPLCY-*"],
        sets: &["kube-router-*"],
        files: &["/etc/cni/net.d/10-kuberouter.conflist"],
        ..NOTHING
    },
];

/// Whether a name is one that the pattern stands for.
pub fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    }
}

/// Whether one of the patterns stands for the name.
pub fn fits_any(patterns: &[&str], name: &str) -> bool {
    patterns.iter().any(|pattern| fits(pattern, name))
}
