//! `sluicectl doctor`: whether this host can run Sluice, what others left on it, and how Sluice does where it runs. Needs no daemon.
//!
//! [`trial`](crate::trial) tries the kernel, [`traces`] looks at the host, [`leftovers`] judges that; here the answers are gathered.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sluice_cni::names::{CONFLIST, NODE_FILE, PLUGIN, PLUGIN_FOLDER};
use sluice_cni::node_file::NodeFile;

use self::leftovers::Leftover;
use crate::address::OptionalAddress;
use crate::admin::report::Status;
use crate::config::{Config, NetworkBackend, ProxyMode};
use crate::host;
use crate::host::products::{KUBE_PROXY, PRODUCTS};
use crate::network::sysctl;
use crate::trial::{self, Trial};

pub mod leftovers;
pub mod traces;

/// What was found. Field names are the API of `sluicectl doctor -o json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// What was looked at, in the order in which it matters.
    pub findings: Vec<Finding>,
    /// What other products left here.
    pub leftovers: Vec<Leftover>,
    /// What could not be looked at, and why.
    pub unseen: Vec<String>,
}

impl Report {
    /// Whether nothing is in Sluice's way.
    pub fn is_well(&self) -> bool {
        let problem = |finding: &Finding| finding.verdict == Verdict::Problem;
        !self.findings.iter().any(problem) && !self.leftovers.iter().any(|leftover| leftover.harms)
    }

    fn note(&mut self, area: Area, verdict: Verdict, what: impl Into<String>) {
        self.findings.push(Finding {
            area,
            verdict,
            what: what.into(),
        });
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Where.
    pub area: Area,
    /// How it is.
    pub verdict: Verdict,
    /// What it is, and what to do.
    pub what: String,
}

/// Where something was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Area {
    /// The kernel and its features.
    Kernel,
    /// The host's settings and other programs.
    Host,
    /// Sluice itself.
    Sluice,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// In the way.
    Problem,
}

/// Examines this host for Sluice as `config` has it, or tells why that cannot be read; `daemon` is what the daemon said, if there is
/// one. Blocks, and must be root.
pub fn examine(config: Result<Config, String>, daemon: Option<Status>) -> Report {
    let mut report = Report::default();
    let read = config.as_ref().map_or_else(|_| Config::default(), Clone::clone);
    let mode = read.proxy.mode;
    kernel(&mut report, &read);
    host_itself(&mut report, &read, daemon.is_some());
    sluice(&mut report, config.err(), daemon);
    let (traces, unseen) = traces::look();
    report.unseen.extend(unseen);
    // With proxy.mode off kube-proxy is wanted.
    let others = PRODUCTS
        .iter()
        .filter(|product| mode != ProxyMode::Off || product.name != KUBE_PROXY);
    report.leftovers = others
        .flat_map(|product| leftovers::find(product, &traces))
        .collect();
    report
}

fn kernel(report: &mut Report, config: &Config) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    report.note(Area::Kernel, Verdict::Ok, format!("Linux {}", release.trim()));
    match trial::run() {
        Ok(trial) => judge(report, &trial, config),
        Err(error) => report.unseen.push(format!("the kernel's features: {error:#}")),
    }
}

fn judge(report: &mut Report, trial: &Trial, config: &Config) {
    let works = [trial.ebpf.is_ok(), trial.nftables.is_ok(), trial.iptables.is_ok()];
    // Which has to work.
    let wanted = match config.proxy.mode {
        ProxyMode::Off => [false; 3],
        ProxyMode::Ebpf => [true, false, false],
        ProxyMode::Nftables => [false, true, false],
        ProxyMode::Iptables => [false, false, true],
        ProxyMode::Auto => [works == [false; 3]; 3],
    };
    let mut tried = |what: &str, result: Result<&str, &anyhow::Error>, needed: bool| {
        let (verdict, what) = match result {
            Ok("") => (Verdict::Ok, what.to_owned()),
            Ok(how) => (Verdict::Ok, format!("{what}, by {how}")),
            Err(error) if needed => (Verdict::Problem, format!("{what} cannot work: {error:#}")),
            Err(error) => (Verdict::Note, format!("{what} cannot work: {error:#}")),
        };
        report.note(Area::Kernel, verdict, what);
    };
    fn plainly(result: &anyhow::Result<()>) -> Result<&'static str, &anyhow::Error> {
        result.as_ref().map(|()| "")
    }
    tried("pods' devices (veth, clsact)", plainly(&trial.pods), true);
    tried(
        "limits of pods (tbf, ifb, u32, mirred)",
        plainly(&trial.limits),
        false,
    );
    // With `auto` nodes on one link do without.
    let overlay = config.network.backend == NetworkBackend::Vxlan;
    tried("the overlay (vxlan)", plainly(&trial.vxlan), overlay);
    tried("Services in eBPF", plainly(&trial.ebpf), wanted[0]);
    tried("Services in nftables", plainly(&trial.nftables), wanted[1]);
    let iptables = trial.iptables.as_ref().map(String::as_str);
    tried("Services in iptables", iptables, wanted[2]);
}

fn host_itself(report: &mut Report, config: &Config, runs: bool) {
    let found = host::look();
    let ways = found.conflist_before().into_iter().chain(found.firewalls());
    for what in ways {
        report.note(Area::Host, Verdict::Problem, what);
    }
    match sysctl::read_only() {
        Some(why) => report.note(Area::Host, Verdict::Problem, why),
        None => report.note(Area::Host, Verdict::Ok, "the kernel's switches can be set"),
    }
    if sysctl::read("net/core/bpf_jit_enable").as_deref() == Some("0") {
        report.note(
            Area::Host,
            Verdict::Note,
            "net.core.bpf_jit_enable is 0: programs are interpreted, many times slower; run: sysctl -w net.core.bpf_jit_enable=1",
        );
    }
    let key = "net/ipv4/conf/all/route_localnet";
    if config.proxy.mode != ProxyMode::Off && sysctl::read(key).as_deref() == Some("1") {
        report.note(
            Area::Host,
            Verdict::Note,
            "net.ipv4.conf.all.route_localnet is 1, as kube-proxy sets it and Sluice does not need it: neighbours may reach what listens on \
             loopback alone; run: sysctl -w net.ipv4.conf.all.route_localnet=0",
        );
    }
    if runs {
        return;
    }
    let admin = &config.admin;
    let kube_proxys = [&admin.kube_proxy_health, &admin.kube_proxy_metrics];
    let wanted = [admin.metrics, admin.health]
        .into_iter()
        .chain(kube_proxys.into_iter().filter_map(OptionalAddress::get));
    for address in wanted {
        if let Some(error) = taken(address) {
            report.note(
                Area::Host,
                Verdict::Problem,
                format!(
                    "sluiced is to listen at {address} and cannot: {error}; see: ss -ltnp 'sport = :{}'",
                    address.port()
                ),
            );
        }
    }
}

/// Why nobody can listen there.
fn taken(address: SocketAddr) -> Option<std::io::Error> {
    std::net::TcpListener::bind(address).err()
}

fn sluice(report: &mut Report, config: Option<String>, daemon: Option<Status>) {
    match config {
        Some(error) => report.note(Area::Sluice, Verdict::Problem, error),
        None => report.note(Area::Sluice, Verdict::Ok, "the configuration is understood"),
    }
    let plugin = Path::new(PLUGIN_FOLDER).join(PLUGIN);
    let runs = daemon.is_some();
    // What the container of the DaemonSet does not see.
    let hidden = sysctl::in_container() && !Path::new(PLUGIN_FOLDER).exists();
    if hidden {
        report.unseen.push(format!(
            "the CNI plugin: {PLUGIN_FOLDER} is not in this container"
        ));
    }
    for (file, what) in [
        (plugin.as_path(), "the CNI plugin"),
        (Path::new(CONFLIST), "the CNI network config"),
    ] {
        match (file.exists(), runs) {
            (false, _) if hidden && file == plugin => {}
            (true, _) => report.note(
                Area::Sluice,
                Verdict::Ok,
                format!("{what} is at {}", file.display()),
            ),
            (false, true) => report.note(
                Area::Sluice,
                Verdict::Problem,
                format!(
                    "{what} is not at {}, though sluiced runs: pods cannot be wired",
                    file.display()
                ),
            ),
            (false, false) => report.note(
                Area::Sluice,
                Verdict::Note,
                format!("{what} is not at {}: not installed yet", file.display()),
            ),
        }
    }
    match daemon {
        Some(status) => {
            let waits = status.awaiting.iter().map(|what| format!("sluiced waits for {what}"));
            let list: Vec<_> = waits.chain(status.problems).collect();
            if list.is_empty() {
                report.note(Area::Sluice, Verdict::Ok, "sluiced runs and is healthy");
            }
            for what in list {
                report.note(Area::Sluice, Verdict::Problem, what);
            }
        }
        // Its file stays when it goes, for the plugin.
        None => match NodeFile::read(Path::new(NODE_FILE)) {
            Ok(_) => report.note(
                Area::Sluice,
                Verdict::Problem,
                "sluiced ran and does not answer: what it programmed goes on, but nothing new is programmed; start it",
            ),
            Err(_) => report.note(Area::Sluice, Verdict::Note, "sluiced does not run here yet"),
        },
    }
}
