//! `sluiced`: the daemon of one node.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use sluice_cni::host_ports::HostPorts;
use sluice_cni::names::{HOST_PORTS_DIRECTORY, IPAM_DIRECTORY, PLUGIN_FOLDER, REMOVALS_SOCKET};
use sluice_daemon::admin::{self, http, kube_proxy, socket};
use sluice_daemon::agent::{Agent, Inputs};
use sluice_daemon::config::{self, Config, DatastoreKind, LogFormat, LogLevel, ProxyMode};
use sluice_daemon::datastore::Source;
use sluice_daemon::datastore::kubernetes::node_status;
use sluice_daemon::netfilter::watch::{self, Watched};
use sluice_daemon::proxy::nftables;
use sluice_daemon::{dataplane, egress, health_checks, host, host_ports, install, network, probe, removals};
use sluice_ipam::{DEFAULT_REST, Store};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing_subscriber::filter::{EnvFilter, LevelFilter};

/// Programs this node's pod network and Services.
///
/// Everything it programs keeps working while it is down, killed or upgraded; the next start adopts it.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// The configuration; SLUICE_* variables override what it says
    #[arg(long, global = true, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,

    /// Only check the configuration, and say which line is wrong and what would be right
    #[arg(long)]
    check_config: bool,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run as this node's daemon (the default)
    Run,
    /// Copy the CNI plugin from beside this program to where runtimes look for it
    Install {
        /// Where runtimes look for plugins
        #[arg(long, value_name = "FOLDER", default_value = PLUGIN_FOLDER)]
        plugin_folder: PathBuf,
    },
    /// Remove everything Sluice made on this node, and nothing else; stop the daemon first
    Cleanup,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match act(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sluiced: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if arguments.check_config {
        let config = load(&arguments.config)?;
        println!(
            "{}: good, for node {}",
            arguments.config.display(),
            config.node_name
        );
        return Ok(ExitCode::SUCCESS);
    }
    // One thread does all the work: it keeps the daemon small, and the order of what it does in one place.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()
        .context("starting the runtime")?;
    match &arguments.command {
        None | Some(Command::Run) => {
            let config = load(&arguments.config)?;
            start_log(&config);
            runtime.block_on(run(config))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Install { plugin_folder }) => {
            let path = install::install(plugin_folder)?;
            println!("installed {}", path.display());
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Cleanup) => runtime.block_on(cleanup()),
    }
}

fn load(path: &Path) -> anyhow::Result<Config> {
    Ok(Config::load(path, |name| std::env::var(name).ok())?)
}

fn start_log(config: &Config) {
    let level = match config.log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // What libraries have to say we say ourselves, in the operator's terms.
    let filter = EnvFilter::new(format!("error,sluice={level}"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_writer(std::io::stderr);
    match config.log.format {
        LogFormat::Text => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    if config.node_name.is_empty() {
        bail!("this node has no name: set nodeName in the configuration, or NODE_NAME");
    }
    tracing::info!(
        node = config.node_name,
        version = env!("CARGO_PKG_VERSION"),
        "sluiced starts"
    );
    let (question_sender, questions) = mpsc::channel(16);
    let (event_sender, events) = mpsc::channel(1024);
    let (snapshot_sender, host_ports) = mpsc::channel(1);
    let (wake, kernel) = mpsc::channel(1);
    let (report_sender, reports) = mpsc::channel(1);

    socket::serve(Path::new(admin::SOCKET), question_sender.clone()).await?;
    http::serve(&config.admin, question_sender.clone()).await?;
    let removed = removals::serve(Path::new(REMOVALS_SOCKET))?;
    let proxy = dataplane::open(config.proxy.mode, pod_namespaces)?;
    let (egress_sender, egress_changes) = mpsc::channel(1);
    let (change_sender, dataplane_changes) = mpsc::channel(1);
    let mut tables = vec![Watched {
        table: egress::nftables::TABLE,
        changed: egress_sender,
    }];
    match &proxy {
        None => {
            tracing::info!("proxy.mode is off: Services are left to something else on this node");
            dataplane::remove_others("off");
        }
        Some((proxy, reason)) => {
            tracing::info!(dataplane = proxy.name(), reason, "Services are translated");
            if proxy.name() == "nftables" {
                tables.push(Watched {
                    table: nftables::TABLE,
                    changed: change_sender,
                });
            }
        }
    }
    let serves = tables.iter().any(|watched| watched.table == nftables::TABLE);
    if let Err(error) = watch::start(tables) {
        if serves {
            return Err(error);
        }
        // A kernel without nf_tables has none of them.
        tracing::info!(
            "others' changes to tables of nf_tables are looked for every half minute only: {error:#}"
        );
    }
    network::monitor::start(wake)?;
    tokio::spawn(collect_dead_pods());
    tokio::spawn(host::watch::run(
        config.cluster_cidrs.iter().copied().collect(),
        report_sender,
    ));
    let source = Source::of(&config);
    let agent = Agent::new(config.clone(), source.clone(), proxy, removed)?;
    if config.datastore.kind == DatastoreKind::Kubernetes && config.proxy.mode != ProxyMode::Off {
        kube_proxy::serve(&config.admin, question_sender, agent.figures()).await;
    }
    if let Source::Kubernetes(servers) = &source {
        tokio::spawn(node_status::run(
            servers.clone(),
            config.node_name,
            agent.health(),
        ));
    }
    let (problem_sender, probes) = mpsc::channel(1);
    tokio::spawn(probe::run(
        config.network.vxlan.port,
        agent.probed(),
        problem_sender,
    ));
    let (refusal_sender, health_checks) = mpsc::channel(1);
    tokio::spawn(health_checks::run(agent.health_listeners(), refusal_sender));
    let records = host_ports::run(HostPorts::at(HOST_PORTS_DIRECTORY), snapshot_sender);
    // The first process of a container is not ended by this signal unless it asks for it.
    let mut asked_to_end = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    tokio::select! {
        _ = asked_to_end.recv() => Ok(()),
        ended = records => ended.context("watching the host ports"),
        ended = source.run(event_sender) => ended,
        () = agent.run(Inputs { events, host_ports, kernel, host: reports, probes, health_checks, egress: egress_changes, dataplane: dataplane_changes, questions }) => Ok(()),
    }
}

/// Where the network namespaces of the pods are that hold an address now.
fn pod_namespaces() -> Vec<PathBuf> {
    // Not there before the first pod.
    let Some(store) = Store::open_existing(Path::new(IPAM_DIRECTORY), DEFAULT_REST) else {
        return Vec::new();
    };
    match store.list() {
        Ok(held) => held
            .into_iter()
            .map(|allocation| allocation.netns.into())
            .collect(),
        Err(error) => {
            tracing::warn!(%error, "which pods there are cannot be told; stale UDP sockets in them stay");
            Vec::new()
        }
    }
}

/// Collects, for as long as the daemon runs, what pods left whose sandboxes are gone: runtimes forget to call DEL
/// after a crash, and containerd never calls GC.
async fn collect_dead_pods() {
    let mut turn = tokio::time::interval(Duration::from_secs(60));
    loop {
        turn.tick().await;
        let collected = tokio::task::spawn_blocking(|| {
            sluice_cni::collect::collect_dead(Path::new(IPAM_DIRECTORY), DEFAULT_REST)
        });
        match collected.await {
            Ok(Ok(collected)) => {
                for what in collected {
                    tracing::warn!("collected what a dead pod left: {what}");
                }
            }
            Ok(Err(error)) => tracing::warn!("collecting what dead pods left: {error}"),
            Err(error) => tracing::error!("the collection of dead pods ended: {error}"),
        }
    }
}

async fn cleanup() -> anyhow::Result<ExitCode> {
    if tokio::net::UnixStream::connect(admin::SOCKET).await.is_ok() {
        bail!("sluiced runs on this node and would put everything back; stop it first");
    }
    let cleanup = install::cleanup().await;
    for what in &cleanup.removed {
        println!("removed {what}");
    }
    for what in &cleanup.failed {
        eprintln!("sluiced: could not remove {what}");
    }
    if cleanup.removed.is_empty() && cleanup.failed.is_empty() {
        println!("nothing of Sluice's was here");
    }
    Ok(if cleanup.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
