//! A node of the bench's own with the daemon's owner task at work on it.

use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use sluice_daemon::agent::{Agent, Inputs};
use sluice_daemon::config::Config;
use sluice_daemon::datastore::{Event, Source};
use sluice_daemon::host_ports::Snapshot;
use sluice_daemon::netfilter::watch::{self, Watched};
use sluice_daemon::proxy::Proxy;
use sluice_daemon::proxy::ebpf::{EbpfProxy, Options, PodNamespaces};
use sluice_daemon::{egress, mounts, network};
use tokio::sync::mpsc;

use crate::cgroup::Cgroup;
use crate::cluster::{NODE, NODE_ADDRESS};
use crate::namespaces;

/// What the datastore says.
pub struct Events(mpsc::Sender<Event>);

impl Events {
    /// Sends one more; waits while the owner task has enough to do.
    pub fn send(&self, event: Event) -> Result<()> {
        self.0
            .blocking_send(event)
            .map_err(|_| anyhow!("the owner task ended"))
    }
}

/// Runs `drive` in a thread beside the owner task, both on a node made for them, which serves Services by eBPF if it `serves` any. It
/// is given where to send events, and the folder of the pins.
pub fn on_node<T: Send>(serves: bool, drive: impl FnOnce(&Events, &Path) -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let node = scope.spawn(|| {
            namespaces::enter()?;
            let cgroup = Cgroup::make()?;
            mounts::ensure_bpffs()?;
            ip("link add uplink type veth peer name switch")?;
            ip(&format!("address add {NODE_ADDRESS}/24 dev uplink"))?;
            ip("link set uplink up")?;
            ip("link set switch up")?;
            run(serves.then_some(&cgroup), drive)
        });
        node.join().map_err(|_| anyhow!("the node's thread panicked"))?
    })
}

fn run<T: Send>(
    cgroup: Option<&Cgroup>,
    drive: impl FnOnce(&Events, &Path) -> Result<T> + Send,
) -> Result<T> {
    let config = Config {
        node_name: NODE.to_owned(),
        ..Config::default()
    };
    let proxy = cgroup
        .map(|cgroup| {
            EbpfProxy::open(&Options {
                cgroup: Some(cgroup.path().to_owned()),
                pins: Options::PINS.into(),
                pods: PodNamespaces::none(),
            })
        })
        .transpose()?;
    // As in sluiced: one thread does all the work.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()?;
    thread::scope(|scope| {
        // The owner task ends when the driver has dropped its end of the events.
        let (event_sender, events) = mpsc::channel(1024);
        let driver = scope.spawn(move || drive(&Events(event_sender), Path::new(Options::PINS)));
        runtime.block_on(async {
            // Named for reports alone: the driver tells what there is.
            let source = Source::Manifests(config.datastore.manifests.directory.clone());
            let proxy = proxy.map(|proxy| (Box::new(proxy) as Box<dyn Proxy>, String::new()));
            let agent = Agent::new(config, source, proxy, Default::default())?;
            let (wake, kernel) = mpsc::channel(1);
            network::monitor::start(wake)?;
            let (changed, egress) = mpsc::channel(1);
            watch::start(vec![Watched {
                table: egress::nftables::TABLE,
                changed,
            }])?;
            let (snapshots, host_ports) = mpsc::channel(1);
            snapshots.send(Ok(Snapshot::default())).await?;
            let inputs = Inputs {
                events,
                host_ports,
                kernel,
                egress,
                host: mpsc::channel(1).1,
                probes: mpsc::channel(1).1,
                health_checks: mpsc::channel(1).1,
                dataplane: mpsc::channel(1).1,
                questions: mpsc::channel(1).1,
            };
            agent.run(inputs).await;
            anyhow::Ok(())
        })?;
        driver.join().map_err(|_| anyhow!("the driver panicked"))?
    })
}

/// Runs ip(8) with these arguments.
pub fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("starting ip (package iproute2)")?;
    ensure!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
