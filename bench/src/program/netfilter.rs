//! The same for the dataplanes by netfilter, each beside rules of kube-proxy's shape that the same tool loads in the same run: a chain
//! for each Service and each endpoint.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use sluice_daemon::datastore::Event;
use sluice_daemon::proxy::iptables::IptablesProxy;
use sluice_daemon::proxy::nftables::NftablesProxy;
use sluice_daemon::proxy::{Dirty, Proxy, Surroundings};
use sluice_daemon::state::balance::NodeView;
use sluice_daemon::state::cluster::Cluster;
use sluice_daemon::state::services::Services;

use crate::chains::{ServicePort, Tool};
use crate::cluster::{self, Shape};
use crate::figures::Samples;
use crate::namespaces;

/// Where all endpoints are: who connects to them from elsewhere is masqueraded, as in kube-proxy's shape.
const POD_NETWORK: &str = "10.128.0.0/9";

/// Who programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// nf_tables, beside nft(8).
    Nftables,
    /// iptables in a flavour, `legacy` or `nft`.
    Iptables(&'static str),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nftables => f.write_str("nftables"),
            Self::Iptables(flavour) => write!(f, "iptables ({flavour})"),
        }
    }
}

impl Way {
    fn open(self) -> Result<Box<dyn Proxy>> {
        Ok(match self {
            Self::Nftables => Box::new(NftablesProxy::open()?),
            Self::Iptables(_) => Box::new(IptablesProxy::open()?),
        })
    }

    fn tool(self) -> Tool {
        match self {
            Self::Nftables => Tool::Nft,
            Self::Iptables(flavour) => Tool::Iptables(flavour),
        }
    }
}

/// What was measured of one shape.
pub struct Measured {
    pub way: Way,
    pub shape: Shape,
    pub all: Samples,
    pub change: Samples,
    /// In kube-proxy's shape.
    pub chains_all: Samples,
    pub chains_change: Samples,
    /// Rules in the kernel for each Service, where the way is one of rules.
    pub rules: Option<f64>,
    pub chains_rules: Option<f64>,
}

/// Measures on a node made for it; `beside` kube-proxy's shape if that is asked for.
///
/// # Errors
/// Not root, no nft(8) or iptables(8), or a kernel without what they need.
pub fn measure(way: Way, shape: Shape, changes: usize, beside: bool) -> Result<Measured> {
    thread::scope(|scope| {
        let node = scope.spawn(|| {
            namespaces::enter()?;
            on_node(way, shape, changes, beside)
        });
        node.join().map_err(|_| anyhow!("the node's thread panicked"))?
    })
}

fn on_node(way: Way, shape: Shape, changes: usize, beside: bool) -> Result<Measured> {
    let mut measured = Measured {
        way,
        shape,
        all: Samples::default(),
        change: Samples::default(),
        chains_all: Samples::default(),
        chains_change: Samples::default(),
        rules: None,
        chains_rules: None,
    };
    if beside {
        in_their_shape(&mut measured, changes.min(20))?;
    }

    let mut proxy = way.open()?;
    proxy.adjust(&Surroundings {
        pod_networks: vec![POD_NETWORK.parse()?],
        ..Surroundings::default()
    })?;
    let (view, mut cluster, mut services) = (NodeView::default(), Cluster::default(), Services::default());
    // As from an event on: what the daemon makes of it is in the figure.
    let everything = cluster::everything(shape)?;
    let began = Instant::now();
    for event in everything {
        fold(&mut cluster, event);
    }
    services.refold(&cluster, &view);
    sync(proxy.as_mut(), &services, &Dirty::All)?;
    measured.all.add(began.elapsed());
    for round in 0..changes {
        let service = u32::try_from(round)?.wrapping_mul(7_919) % shape.services;
        let (event, _) = cluster::changed(shape, service, round)?;
        let began = Instant::now();
        let touched = fold(&mut cluster, event);
        let changed = services.update(&cluster, &view, &touched);
        sync(proxy.as_mut(), &services, &Dirty::Only(changed.keys))?;
        measured.change.add(began.elapsed());
    }
    measured.rules = rules_each(way, shape)?;
    Ok(measured)
}

/// The same Services in kube-proxy's shape.
fn in_their_shape(measured: &mut Measured, changes: usize) -> Result<()> {
    let (tool, shape) = (measured.way.tool(), measured.shape);
    let ports = ServicePort::all(shape);
    let began = Instant::now();
    tool.load(&ports)?;
    measured.chains_all.add(began.elapsed());
    for round in 0..changes {
        let service = u32::try_from(round)? % shape.services;
        let address = Ipv4Addr::new(10, 200, 0, (round % 250 + 1) as u8);
        let newcomer = (format!("n{round}"), SocketAddrV4::new(address, 8080));
        let port = ServicePort::of(shape, service, Some(newcomer));
        let began = Instant::now();
        tool.reload(&port)?;
        measured.chains_change.add(began.elapsed());
    }
    measured.chains_rules = rules_each(measured.way, shape)?;
    tool.remove()
}

/// How many rules iptables has for each Service.
fn rules_each(way: Way, shape: Shape) -> Result<Option<f64>> {
    let Tool::Iptables(flavour) = way.tool() else {
        return Ok(None);
    };
    let tool = format!("iptables-{flavour}-save");
    let saved = Command::new(&tool)
        .output()
        .with_context(|| format!("starting {tool}"))?;
    let text = String::from_utf8_lossy(&saved.stdout);
    let rules = text.lines().filter(|line| line.starts_with("-A ")).count();
    Ok(Some(rules as f64 / f64::from(shape.services)))
}

fn fold(cluster: &mut Cluster, event: Event) -> BTreeSet<sluice_daemon::state::objects::ObjectName> {
    match event {
        Event::Upsert(object) => cluster.upsert(object).services,
        _ => BTreeSet::new(),
    }
}

fn sync(proxy: &mut dyn Proxy, services: &Services, dirty: &Dirty) -> Result<()> {
    let report = proxy.sync(services.sets(), dirty)?;
    ensure!(report.failed.is_empty(), "{report:?}");
    Ok(())
}
