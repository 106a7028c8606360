//! Who translates Services on a node, and how many there are beside those that are measured.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use ipnetwork::IpNetwork;
use sluice_daemon::datastore::Event;
use sluice_daemon::mounts;
use sluice_daemon::proxy::ebpf::{EbpfProxy, Options, PodNamespaces};
use sluice_daemon::proxy::iptables::IptablesProxy;
use sluice_daemon::proxy::nftables::NftablesProxy;
use sluice_daemon::proxy::{Dirty, Proxy, Surroundings};
use sluice_daemon::state::balance::NodeView;
use sluice_daemon::state::cluster::Cluster;
use sluice_daemon::state::services::Services;

use super::stage::{Endpoint, Node};
use crate::chains::{ServicePort, Tool};
use crate::cluster::{self, Shape};
use crate::load::PORT;

/// Endpoints of each Service that is not measured. Those that are measured have one: what a translator walks through to choose
/// one of several is not in the figures.
const ENDPOINTS: u32 = 5;

/// Who, with how many Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Translator {
    /// Nobody: clients go straight to the pod, as the kernel routes. The baseline.
    Nobody,
    /// Rules of kube-proxy's shape.
    Chains(Tool, u32),
    /// Sluice's eBPF.
    Ebpf(u32),
    /// Sluice's nftables.
    Nftables(u32),
    /// Sluice's iptables.
    Iptables(u32),
}

impl Translator {
    /// Whether it is Sluice.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Ebpf(_) | Self::Nftables(_) | Self::Iptables(_))
    }
}

impl fmt::Display for Translator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => f.write_str("straight to the pod, plain routes"),
            Self::Chains(Tool::Nft, services) => write!(f, "a chain for each, nftables, {services}"),
            Self::Chains(Tool::Iptables(flavour), services) => {
                write!(f, "a chain for each, iptables ({flavour}), {services}")
            }
            Self::Ebpf(services) => write!(f, "sluice, ebpf, {services}"),
            Self::Nftables(services) => write!(f, "sluice, nftables, {services}"),
            Self::Iptables(services) => write!(f, "sluice, iptables, {services}"),
        }
    }
}

/// Has the node's Services translated; its pods are in `cgroup`.
///
/// # Errors
/// A tool is missing, or what the kernel refused.
pub fn dress(translator: Translator, node: &Node, cgroup: &Path) -> Result<()> {
    match translator {
        Translator::Nobody => Ok(()),
        Translator::Chains(tool, services) => {
            let tested = Endpoint::ALL
                .into_iter()
                .flat_map(|endpoint| chains(endpoint, node.address));
            let mut ports = ServicePort::all(Shape::of(services - 1, ENDPOINTS));
            ports.extend(tested);
            node.host.run(move || tool.load(&ports))
        }
        Translator::Ebpf(services) => {
            let cgroup = cgroup.to_owned();
            program(node, services, move || {
                mounts::ensure_bpffs()?;
                let options = Options {
                    cgroup: Some(cgroup),
                    pins: Options::PINS.into(),
                    pods: PodNamespaces::none(),
                };
                Ok(Box::new(EbpfProxy::open(&options)?))
            })
        }
        Translator::Nftables(services) => program(node, services, || Ok(Box::new(NftablesProxy::open()?))),
        Translator::Iptables(services) => program(node, services, || Ok(Box::new(IptablesProxy::open()?))),
    }
}

/// An endpoint's Service in kube-proxy's shape, on the node with this address.
fn chains(endpoint: Endpoint, node: Ipv4Addr) -> [ServicePort; 2] {
    ["tcp", "udp"].map(|protocol| ServicePort {
        name: format!("{}-{protocol}", endpoint.name()),
        protocol,
        frontend: SocketAddrV4::new(endpoint.cluster_ip(), 80),
        node_port: Some(SocketAddrV4::new(node, endpoint.node_port())),
        endpoints: vec![("0".to_owned(), SocketAddrV4::new(endpoint.address(), PORT))],
    })
}

/// What Sluice programs stays when its proxy is dropped, as when the daemon ends.
fn program(
    node: &Node,
    services: u32,
    open: impl FnOnce() -> Result<Box<dyn Proxy>> + Send + 'static,
) -> Result<()> {
    let own: IpNetwork = format!("10.244.{}.0/24", node.number).parse()?;
    let pods: IpNetwork = "10.244.0.0/16".parse()?;
    let view = NodeView {
        name: node.name.to_owned(),
        addresses: vec![node.address.into()],
        node_port_addresses: vec![node.address.into()],
        pod_cidrs: vec![own],
        cluster_cidrs: vec![pods],
        ..NodeView::default()
    };
    let surroundings = Surroundings {
        devices: node.uplinks.clone(),
        pod_network_addresses: vec![own.network()],
        node_addresses: vec![node.address.into()],
        pods: node.pods.clone(),
        own_networks: vec![own],
        pod_networks: vec![pods],
        fast_path: true,
        ping: true,
    };
    node.host.run(move || {
        let mut cluster = Cluster::default();
        let mut events = cluster::everything(Shape::of(services - 1, ENDPOINTS))?;
        for endpoint in Endpoint::ALL {
            for document in yaml(endpoint) {
                events.extend(cluster::objects(&document)?);
            }
        }
        for event in events {
            match event {
                Event::Upsert(object) => _ = cluster.upsert(object),
                _ => bail!("a cluster is objects alone"),
            }
        }
        let mut sets = Services::default();
        sets.refold(&cluster, &view);
        let mut proxy = open()?;
        proxy.adjust(&surroundings)?;
        let report = proxy
            .sync(sets.sets(), &Dirty::All)
            .context("programming Services")?;
        ensure!(report.failed.is_empty(), "{report:?}");
        Ok(())
    })
}

/// An endpoint's Service as Kubernetes writes it. Its name comes behind those of the others.
fn yaml(endpoint: Endpoint) -> [String; 2] {
    let (name, node_port) = (format!("tested-{}", endpoint.name()), endpoint.node_port());
    let node = match endpoint {
        Endpoint::Near => "near-node",
        Endpoint::Far => "far-node",
    };
    let service = format!(
        "apiVersion: v1\n\
         kind: Service\n\
         metadata: {{name: {name}, namespace: bench}}\n\
         spec:\n\
         \x20 type: NodePort\n\
         \x20 clusterIP: {}\n\
         \x20 selector: {{app: {name}}}\n\
         \x20 ports:\n\
         \x20 - {{name: tcp, port: 80, targetPort: {PORT}, nodePort: {node_port}, protocol: TCP}}\n\
         \x20 - {{name: udp, port: 80, targetPort: {PORT}, nodePort: {node_port}, protocol: UDP}}\n",
        endpoint.cluster_ip(),
    );
    let slice = format!(
        "apiVersion: discovery.k8s.io/v1\n\
         kind: EndpointSlice\n\
         metadata: {{name: {name}, namespace: bench, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         addressType: IPv4\n\
         ports:\n\
         - {{name: tcp, port: {PORT}, protocol: TCP}}\n\
         - {{name: udp, port: {PORT}, protocol: UDP}}\n\
         endpoints:\n\
         - {{addresses: [{}], nodeName: {node}}}\n",
        endpoint.address(),
    );
    [service, slice]
}
