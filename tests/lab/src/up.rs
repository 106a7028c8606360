//! Making a lab: namespaces, cables, configuration, daemons, and waiting until nodes take pods.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;

use crate::down::down;
use crate::init::{self, Spec};
use crate::options::{Datastore, Options};
use crate::plan::{self, FABRIC, Host};
use crate::progress::Progress;
use crate::state::{self, Member, Record};
use crate::{cgroup, control_plane, etcd, fabric, kubelets, objects, supervise};

/// What says that a node takes pods: the daemon writes it last.
pub const CONFLIST: &str = "/etc/cni/net.d/10-sluice.conflist";
/// Where a node's daemon writes its log, as the node sees it.
pub const DAEMON_LOG: &str = "/var/log/sluiced.log";
/// How long the nodes may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// A daemon that ended more often than this while it was to start will not start.
const MANY_ENDINGS: usize = 5;

/// The folder with Sluice's binaries: `$SLUICE_BIN_DIR`, else that of the running program.
///
/// # Errors
/// What is missing, and how to get it.
pub fn binaries(bare: bool) -> Result<PathBuf> {
    let folder = match std::env::var_os("SLUICE_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let own = std::env::current_exe().context("finding this program's folder")?;
            let folder = own.parent().unwrap_or(Path::new("/"));
            // Test programs lie one deeper than what they test.
            let is_test = folder.file_name().is_some_and(|name| name == "deps");
            folder
                .parent()
                .filter(|_| is_test)
                .unwrap_or(folder)
                .to_path_buf()
        }
    };
    let wanted: &[&str] = if bare {
        &["sluice-lab"]
    } else {
        &crate::mounts::BINARIES
    };
    let missing: Vec<&str> = wanted
        .iter()
        .copied()
        .filter(|name| !folder.join(name).is_file())
        .collect();
    if !missing.is_empty() {
        bail!(
            "no {} in {}; build with ./dev build, or name the folder in SLUICE_BIN_DIR",
            missing.join(", "),
            folder.display()
        );
    }
    // Absolute, as it is used from other working directories.
    fs::canonicalize(&folder).with_context(|| format!("resolving {}", folder.display()))
}

/// Makes a lab and waits until its nodes take pods.
///
/// # Errors
/// What failed. Before daemons run nothing is left behind; after that the lab stays, to look around in.
pub fn up(options: &Options, progress: &Progress) -> Result<Record> {
    options.check()?;
    if !nix::unistd::geteuid().is_root() {
        bail!("the lab makes namespaces: it needs root; run it with sudo");
    }
    let binaries = binaries(options.bare)?;
    claim(&options.name)?;
    let mut record = Record {
        options: options.clone(),
        binaries,
        complete: false,
        members: Vec::new(),
    };
    if let Err(error) = assemble(&mut record, progress) {
        if let Err(second) = down(&options.name) {
            return Err(error.context(format!("(removing what was made failed too: {second:#})")));
        }
        return Err(error);
    }
    if !options.bare {
        let started = if options.kubelets {
            kubelets::start(&record, progress)
        } else {
            start_daemons(&record, progress)
        };
        started.with_context(|| {
            format!(
                "lab {name:?} stays as it is, to look around in: exec --name {name} node1 -- …; \
                 remove it with: down --name {name}",
                name = options.name
            )
        })?;
    }
    record.complete = true;
    record.save()?;
    Ok(record)
}

/// Makes the lab's folder its own; a dead lab of that name is cleared away.
fn claim(name: &str) -> Result<()> {
    let folder = state::directory(name);
    for _ in 0..cgroup::TRIES {
        fs::create_dir_all(state::ROOT).with_context(|| format!("creating {}", state::ROOT))?;
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            // The last lab that was up took the folder of all labs with it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("creating {}", folder.display())),
        }
        if cgroup::is_populated(&cgroup::of_lab(name)?) {
            bail!(
                "lab {name:?} is up; remove it first with: down --name {name}, or make another with --name"
            );
        }
        down(name).with_context(|| format!("clearing away the dead lab {name:?}"))?;
    }
    bail!("somebody else is making a lab called {name:?}; make another with --name");
}

fn assemble(record: &mut Record, progress: &Progress) -> Result<()> {
    let options = record.options.clone();
    let manifests = state::manifests(&options.name);
    fs::create_dir_all(&manifests).with_context(|| format!("creating {}", manifests.display()))?;
    // Without addresses: the switch is nobody's destination.
    let fabric = Host {
        name: FABRIC.to_owned(),
        subnet: 0,
        addresses: Vec::new(),
        pod_cidrs: Vec::new(),
    };
    progress.step("building the fabric");
    let fabric = hold(record, fabric)?;
    fabric::build(fabric, &options)?;
    add_host(record, plan::client(&options), progress)?;
    match options.datastore {
        Datastore::Manifests => {}
        Datastore::Kubernetes => {
            add_host(record, plan::control(&options), progress)?;
            control_plane::start(record, progress)?;
        }
        Datastore::Etcd => {
            for number in 1..=etcd::MEMBERS {
                add_host(record, plan::etcd(&options, number), progress)?;
            }
            etcd::start(record, progress)?;
        }
    }
    for number in 1..=options.nodes {
        add_host(record, plan::node(&options, number), progress)?;
    }
    Ok(())
}

/// Makes a host, plugs it in and, if it is a node, configures it. Starts nothing.
pub(crate) fn add_host(record: &mut Record, host: Host, progress: &Progress) -> Result<()> {
    progress.step(format!("making {}", host.name));
    let options = record.options.clone();
    let fabric = record.member(FABRIC)?.init;
    let init = hold(record, host.clone())?;
    fabric::plug(fabric, &host, init, &options)?;
    // A kubelet registers its node, and Sluice's configuration is in the cluster.
    if !host.pod_cidrs.is_empty() && !options.kubelets {
        let config = daemon_config(&options, &host);
        let path = init.root("/etc/sluice/config.yaml");
        fs::write(&path, config).with_context(|| format!("writing {}", path.display()))?;
        objects::apply_text(&options.name, &node_object(&host), "the lab's Node object")?;
        match options.datastore {
            Datastore::Manifests => {}
            Datastore::Kubernetes => control_plane::introduce(record, &host.name)?,
            Datastore::Etcd => etcd::introduce(record, &host.name)?,
        }
    }
    Ok(())
}

/// Starts the namespaces of `host` and notes them down.
fn hold(record: &mut Record, host: Host) -> Result<state::Process> {
    let lab = &record.options.name;
    let logs = state::logs(lab, &host.name);
    fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    let spec = Spec {
        lab: lab.clone(),
        member: host.name.clone(),
        directory: state::directory(lab).join("hosts").join(&host.name),
        binaries: record.binaries.clone(),
        hosts: hosts_file(&record.options),
        is_node: !host.pod_cidrs.is_empty(),
    };
    let init = init::start(&spec)?;
    record.members.push(Member { host, init });
    record.save()?;
    Ok(init)
}

fn hosts_file(options: &Options) -> String {
    let mut lines = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    let nodes = (1..=options.nodes).map(|number| plan::node(options, number));
    let members = (1..=etcd::MEMBERS).map(|number| plan::etcd(options, number));
    for host in nodes
        .chain(members)
        .chain([plan::client(options), plan::control(options)])
    {
        for address in host.addresses {
            lines += &format!("{address} {}\n", host.name);
        }
    }
    lines
}

fn daemon_config(options: &Options, host: &Host) -> String {
    let list = |cidrs: Vec<&str>| cidrs.join(", ");
    let datastore = match options.datastore {
        Datastore::Manifests => {
            "kind: manifests\n  manifests: { directory: /etc/sluice/manifests }".to_owned()
        }
        Datastore::Kubernetes => {
            format!(
                "kind: kubernetes\n  kubernetes: {{ kubeconfig: {} }}",
                control_plane::NODE_KUBECONFIG
            )
        }
        Datastore::Etcd => etcd::node_config(options),
    };
    format!(
        "# Written by the lab.\n\
         nodeName: {name}\n\
         datastore:\n  {datastore}\n\
         clusterCIDRs: [{cluster}]\n\
         serviceCIDRs: [{service}]\n\
         network:\n  backend: {backend}\n\
         proxy:\n  mode: {proxy}\n\
         log: {{ level: info }}\n",
        name = host.name,
        cluster = quoted(&list(plan::cluster_cidrs(options.families))),
        service = quoted(&list(plan::service_cidrs(options.families))),
        backend = options.backend,
        proxy = options.proxy,
    )
}

/// In a YAML flow sequence a colon may start a mapping: addresses are quoted.
fn quoted(list: &str) -> String {
    list.split(", ")
        .map(|item| format!("{item:?}"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn node_object(host: &Host) -> String {
    let addresses: Vec<_> = host
        .addresses
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": host.name, "labels": {"kubernetes.io/hostname": host.name}},
        "spec": {"podCIDR": host.pod_cidrs.first(), "podCIDRs": host.pod_cidrs},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
    });
    // JSON is YAML.
    format!("{node:#}\n")
}

fn start_daemons(record: &Record, progress: &Progress) -> Result<()> {
    for node in record.nodes() {
        progress.step(format!("starting sluiced on {}", node.host.name));
        start_daemon(record, node)?;
    }
    let deadline = Instant::now() + PATIENCE;
    for node in record.nodes() {
        progress.step(format!("waiting until {} takes pods", node.host.name));
        wait_for_conflist(record, node, deadline)?;
    }
    Ok(())
}

/// Installs the plugin on a node and starts its daemon under a supervisor.
pub(crate) fn start_daemon(record: &Record, node: &Member) -> Result<()> {
    let name = &node.host.name;
    must(record, name, &[], &["sluiced", "install"])?;
    supervise_daemon(record, name)
}

pub(crate) fn supervise_daemon(record: &Record, node: &str) -> Result<()> {
    let command = ["sluice-lab", "supervise", "--", "sluiced", "run"];
    let config = ["--config", "/etc/sluice/config.yaml"];
    let detach = ["--detach-to", DAEMON_LOG];
    must(record, node, &detach, &[&command[..], &config[..]].concat()).map(drop)
}

/// Waits until a node takes pods.
pub(crate) fn wait_for_conflist(record: &Record, node: &Member, deadline: Instant) -> Result<()> {
    let conflist = node.init.root(CONFLIST);
    while !conflist.is_file() {
        if !node.init.is_alive() {
            bail!("{} died while its daemon started", node.host.name);
        }
        let endings = log_end(&record.options.name, &node.host.name, usize::MAX)
            .lines()
            .filter(|line| line.starts_with(supervise::ENDED))
            .count();
        if Instant::now() > deadline || endings > MANY_ENDINGS {
            bail!(
                "{} takes no pods (no {CONFLIST}; its daemon ended {endings} times); the end of the daemon's log:\n{}",
                node.host.name,
                log_end(&record.options.name, &node.host.name, 15)
            );
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The last lines of a node's daemon log.
#[must_use]
pub fn log_end(lab: &str, node: &str, lines: usize) -> String {
    let path = state::logs(lab, node).join("sluiced.log");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("({}: {error})", path.display()),
    }
}

/// The `exec` command line for a place in the lab.
#[must_use]
pub fn exec_command(record: &Record, member: &str, flags: &[&str], command: &[&str]) -> Command {
    let mut exec = Command::new(record.binaries.join("sluice-lab"));
    exec.args(["exec", "--name", &record.options.name])
        .args(flags)
        .args([member, "--"])
        .args(command);
    exec
}

/// Runs a command in the lab that has to succeed.
pub(crate) fn must(record: &Record, member: &str, flags: &[&str], command: &[&str]) -> Result<Output> {
    let output = exec_command(record, member, flags, command)
        .output()
        .with_context(|| format!("running sluice-lab exec {member}"))?;
    if !output.status.success() {
        return Err(failure(member, command, &output));
    }
    Ok(output)
}

/// What a failed command said, as an error.
pub(crate) fn failure(member: &str, command: &[&str], output: &Output) -> anyhow::Error {
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    anyhow!(
        "{} on {member}: {}; it said: {}",
        command.join(" "),
        output.status,
        [said(&output.stderr), said(&output.stdout)].join("\n").trim()
    )
}
