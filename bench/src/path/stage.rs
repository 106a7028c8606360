//! The paths: two pods each, on one node or on two, and what is in between.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use sluice_daemon::mounts;
use sluice_daemon::network::pods::PodDevice;
use sluice_daemon::proxy::ebpf::{EbpfProxy, Options, PodNamespaces};
use sluice_daemon::proxy::{Proxy, Surroundings};

use crate::cgroup::Cgroup;
use crate::hosts::{Host, tool};

const A: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const B: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 2);

/// Where the two pods are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Where {
    /// On one node.
    Same,
    /// On two, joined by a cable and plain routes.
    Cross,
}

/// Who carries the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Carrier {
    /// A veth pair and nothing else: the limit. Between nodes there is no such thing.
    Veth,
    /// The kernel's own forwarding.
    Routes,
    /// The same with connection tracking, as hosts with kube-proxy have it.
    Conntrack,
    /// Sluice with `network.fastPath: false`.
    Slow,
    /// Sluice.
    Fast,
}

impl Carrier {
    /// What it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Veth => "bare veth",
            Self::Routes => "plain routes",
            Self::Conntrack => "plain routes, conntrack",
            Self::Slow => "sluice, fastPath: false",
            Self::Fast => "sluice",
        }
    }
}

/// Two pods that can reach each other.
pub struct Stage {
    /// Who asks.
    pub client: Host,
    /// Who answers.
    pub server: Host,
    /// Where.
    pub to: IpAddr,
    _nodes: Vec<Host>,
}

impl Stage {
    /// Makes the pods and what is between them.
    pub fn make(place: Where, carrier: Carrier, cgroup: &Cgroup) -> Result<Self> {
        if carrier == Carrier::Veth {
            return Self::veth();
        }
        let node = Host::new()?;
        let (client, a) = node.pod("sluicea", A.into())?;
        let (server, nodes, to) = match place {
            Where::Same => {
                let (server, b) = node.pod("sluiceb", B.into())?;
                dress(&node, carrier, Vec::new(), vec![a, b], cgroup)?;
                (server, vec![node], B)
            }
            Where::Cross => {
                let far = Host::new()?;
                node.join("uplink", &far, "uplink")?;
                let (server, b) = far.pod("sluiceb", FAR.into())?;
                for (host, own, other, pods) in [(&node, 1, 2, 2), (&far, 2, 1, 1)] {
                    host.ip(&[
                        format!("addr add 192.0.2.{own}/24 dev uplink"),
                        format!("route add 10.244.{pods}.0/24 via 192.0.2.{other}"),
                    ])?;
                }
                dress(&node, carrier, vec!["uplink"], vec![a], cgroup)?;
                dress(&far, carrier, vec!["uplink"], vec![b], cgroup)?;
                (server, vec![node, far], FAR)
            }
        };
        Ok(Self {
            client,
            server,
            to: to.into(),
            _nodes: nodes,
        })
    }

    fn veth() -> Result<Self> {
        let (client, server) = (Host::new()?, Host::new()?);
        client.join("eth0", &server, "eth0")?;
        client.ip(&[format!("addr add {A}/24 dev eth0")])?;
        server.ip(&[format!("addr add {B}/24 dev eth0")])?;
        Ok(Self {
            client,
            server,
            to: B.into(),
            _nodes: Vec::new(),
        })
    }
}

/// Gives a node what the carrier has on it.
fn dress(
    node: &Host,
    carrier: Carrier,
    uplinks: Vec<&'static str>,
    pods: Vec<PodDevice>,
    cgroup: &Cgroup,
) -> Result<()> {
    let devices = uplinks
        .into_iter()
        .map(|name| node.device(name))
        .collect::<Result<_>>()?;
    let cgroup = cgroup.path().to_owned();
    node.run(move || match carrier {
        Carrier::Veth | Carrier::Routes => Ok(()),
        Carrier::Conntrack => [
            "add table ip filter",
            "add chain ip filter forward { type filter hook forward priority 0 ; }",
            "add rule ip filter forward ct state established accept",
        ]
        .into_iter()
        .try_for_each(|line| tool("nft", line)),
        Carrier::Slow | Carrier::Fast => {
            mounts::ensure_bpffs()?;
            let mut proxy = EbpfProxy::open(&Options {
                cgroup: Some(cgroup),
                pins: Options::PINS.into(),
                pods: PodNamespaces::none(),
            })?;
            // What it programs stays when it is dropped, as when the daemon ends.
            proxy.adjust(&Surroundings {
                devices,
                pods,
                pod_networks: vec!["10.244.0.0/16".parse().context("the pods' network")?],
                fast_path: carrier == Carrier::Fast,
                ..Surroundings::default()
            })
        }
    })
}
