//! The same for the dataplanes by netfilter, each beside rules of kube-proxy's shape that the same tool loads in the same run: a chain
//! for each Service and each endpoint.

use std::collections::BTreeSet;
use std::fmt;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
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

use super::cluster::{self, Shape};
use crate::figures::Samples;
use crate::namespaces;

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

    /// Feeds text to the tool.
    fn load(self, text: &str) -> Result<()> {
        match self {
            Self::Nftables => feed("nft", &["-f", "-"], text),
            Self::Iptables(flavour) => {
                let tool = format!("iptables-{flavour}-restore");
                feed(&tool, &["--noflush", "--wait", "5"], text)
            }
        }
    }

    /// All Services in kube-proxy's shape.
    fn chains(self, shape: Shape) -> String {
        match self {
            Self::Nftables => nft_chains(shape),
            Self::Iptables(_) => iptables_chains(shape),
        }
    }

    /// One endpoint of a Service gives way to another, in the same shape.
    fn chains_changed(self, shape: Shape, service: u32, round: usize) -> String {
        match self {
            Self::Nftables => nft_chains_changed(shape, service, round),
            Self::Iptables(_) => iptables_chains_changed(shape, service, round),
        }
    }

    fn remove_chains(self) -> Result<()> {
        match self {
            Self::Nftables => self.load("delete table ip chains\n"),
            // Without --noflush the table is replaced.
            Self::Iptables(flavour) => feed(&format!("iptables-{flavour}-restore"), &[], "*nat\nCOMMIT\n"),
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
}

/// Measures on a node made for it.
///
/// # Errors
/// Not root, no nft(8) or iptables(8), or a kernel without what they need.
pub fn measure(way: Way, shape: Shape, changes: usize) -> Result<Measured> {
    thread::scope(|scope| {
        let node = scope.spawn(|| {
            namespaces::enter()?;
            on_node(way, shape, changes)
        });
        node.join().map_err(|_| anyhow!("the node's thread panicked"))?
    })
}

fn on_node(way: Way, shape: Shape, changes: usize) -> Result<Measured> {
    let mut measured = Measured {
        way,
        shape,
        all: Samples::default(),
        change: Samples::default(),
        chains_all: Samples::default(),
        chains_change: Samples::default(),
    };
    let began = Instant::now();
    way.load(&way.chains(shape))?;
    measured.chains_all.add(began.elapsed());
    for round in 0..changes.min(20) {
        let began = Instant::now();
        let service = u32::try_from(round)? % shape.services;
        way.load(&way.chains_changed(shape, service, round))?;
        measured.chains_change.add(began.elapsed());
    }
    way.remove_chains()?;

    let mut proxy = way.open()?;
    proxy.adjust(&Surroundings::default())?;
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
    Ok(measured)
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

fn nft_chains(shape: Shape) -> String {
    let mut text =
        "table ip chains {\n  map services { type ipv4_addr . inet_proto . inet_service : verdict; }\n"
            .to_owned();
    for service in 0..shape.services {
        for number in 0..shape.endpoints {
            let endpoint = shape.endpoint(service, number);
            let _ = writeln!(
                text,
                "  chain e{service}-{number} {{ meta l4proto tcp dnat to {endpoint}:8080; }}"
            );
        }
        let picks: Vec<String> = (0..shape.endpoints)
            .map(|number| format!("{number} : goto e{service}-{number}"))
            .collect();
        let _ = writeln!(
            text,
            "  chain s{service} {{ numgen random mod {} vmap {{ {} }}; }}",
            shape.endpoints,
            picks.join(", ")
        );
    }
    text += "  chain output { type nat hook output priority -100; ip daddr . meta l4proto . th dport vmap @services; }\n}\n";
    for service in 0..shape.services {
        let address = *shape.frontend(service).ip();
        let _ = writeln!(
            text,
            "add element ip chains services {{ {address} . tcp . 80 : goto s{service} }}"
        );
    }
    text
}

fn nft_chains_changed(shape: Shape, service: u32, round: usize) -> String {
    let new = format!("n{service}-{round}");
    let picks: Vec<String> = (1..shape.endpoints)
        .map(|number| format!("{number} : goto e{service}-{number}"))
        .chain([format!("0 : goto {new}")])
        .collect();
    format!(
        "add chain ip chains {new}\nadd rule ip chains {new} meta l4proto tcp dnat to 10.200.0.{}:8080\n\
         flush chain ip chains s{service}\n\
         add rule ip chains s{service} numgen random mod {} vmap {{ {} }}\n",
        round % 250 + 1,
        shape.endpoints,
        picks.join(", ")
    )
}

fn iptables_chains(shape: Shape) -> String {
    let mut text = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n".to_owned();
    let mut rules = "-A OUTPUT -j KUBE-SERVICES\n".to_owned();
    for service in 0..shape.services {
        let address = *shape.frontend(service).ip();
        let _ = writeln!(text, ":KUBE-SVC-{service} - [0:0]");
        let _ = writeln!(
            rules,
            "-A KUBE-SERVICES -d {address}/32 -p tcp -m comment --comment \"default/s{service} cluster IP\" -m tcp --dport 80 -j KUBE-SVC-{service}"
        );
        let endpoints: Vec<_> = (0..shape.endpoints)
            .map(|number| {
                (
                    number.to_string(),
                    format!("{}:8080", shape.endpoint(service, number)),
                )
            })
            .collect();
        put_service(&mut text, &mut rules, service, address, &endpoints);
    }
    text + &rules + "COMMIT\n"
}

/// As in kube-proxy's partial sync: the chains of the one Service.
fn iptables_chains_changed(shape: Shape, service: u32, round: usize) -> String {
    let (mut text, mut rules) = (format!("*nat\n:KUBE-SVC-{service} - [0:0]\n"), String::new());
    let mut endpoints: Vec<_> = (1..shape.endpoints)
        .map(|number| {
            (
                number.to_string(),
                format!("{}:8080", shape.endpoint(service, number)),
            )
        })
        .collect();
    endpoints.push((format!("n{round}"), format!("10.200.0.{}:8080", round % 250 + 1)));
    let address = *shape.frontend(service).ip();
    put_service(&mut text, &mut rules, service, address, &endpoints);
    text + &rules + "COMMIT\n"
}

fn put_service(
    chains: &mut String,
    rules: &mut String,
    service: u32,
    address: Ipv4Addr,
    endpoints: &[(String, String)],
) {
    let comment = format!("-m comment --comment \"default/s{service}\"");
    let _ = writeln!(
        rules,
        "-A KUBE-SVC-{service} ! -s 10.128.0.0/9 -d {address}/32 -p tcp {comment} -m tcp --dport 80 -j KUBE-MARK-MASQ"
    );
    for (place, (name, endpoint)) in endpoints.iter().enumerate() {
        let left = endpoints.len() - place;
        let pick = match left {
            1 => String::new(),
            left => format!(
                "-m statistic --mode random --probability {:.11} ",
                1.0 / left as f64
            ),
        };
        let ip = endpoint.split(':').next().unwrap_or_default();
        let _ = writeln!(chains, ":KUBE-SEP-{service}-{name} - [0:0]");
        let _ = writeln!(
            rules,
            "-A KUBE-SVC-{service} {comment} {pick}-j KUBE-SEP-{service}-{name}\n\
             -A KUBE-SEP-{service}-{name} -s {ip}/32 {comment} -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{service}-{name} -p tcp {comment} -m tcp -j DNAT --to-destination {endpoint}"
        );
    }
}

fn feed(tool: &str, arguments: &[&str], text: &str) -> Result<()> {
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {tool} (packages nftables and iptables)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    let answer = child.wait_with_output()?;
    ensure!(
        answer.status.success(),
        "{tool}: {}",
        String::from_utf8_lossy(&answer.stderr)
            .lines()
            .take(3)
            .collect::<Vec<_>>()
            .join("; ")
    );
    Ok(())
}
