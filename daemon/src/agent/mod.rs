//! The daemon's owner task: all state is here, and all changes to the node start here.
//!
//! Events are folded in and only mark what is dirty; then one pass applies what is, in a written order: network first
//! (Services lead nowhere without it), then egress, then Services, and last what tells the plugin that pods can be
//! wired. Nothing is applied before the datastore's first full list and this node's host ports are in. There is no shutdown: whatever is in the
//! kernel keeps working, and the next start adopts it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use jiff::Timestamp;
use sluice_cni::host_ports::Record;
use sluice_ipam::Attachment;
use tokio::sync::{mpsc, watch};

use crate::admin::socket::Question;
use crate::config::Config;
use crate::datastore::{Event, Source};
use crate::egress;
use crate::health_checks;
use crate::host::watch::Report;
use crate::host_ports::Snapshot;
use crate::last_known::{Saver, Turn};
use crate::memory;
use crate::network::{self, Network};
use crate::probe::Target;
use crate::proxy::figures::Figures;
use crate::proxy::{Proxy, Surroundings};
use crate::removals;
use crate::state::balance::NodeView;
use crate::state::cluster::{Cluster, Touched};
use crate::state::node_health::NodeHealth;
use crate::state::node_routes::NodeRoutes;
use crate::state::objects::{Object, ObjectName};
use crate::state::service_port::ServicePortKey;
use crate::state::services::Services;

mod findings;
mod host_port_pass;
mod node_file;
mod node_passes;
mod reporting;
mod route_reports;
mod service_pass;
mod settling;

/// How long the kernel's notifications are gathered before the kernel is read back.
const GATHER: Duration = Duration::from_millis(50);

/// How long changes that keep coming are gathered for one sync, where syncs are dear.
const LONGEST_BURST: Duration = Duration::from_millis(200);

/// How often the kernel is read back though nothing was heard from it.
const AUDIT: Duration = Duration::from_secs(30);

/// How soon a pass that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How often the dataplane drops what has expired.
const UPKEEP: Duration = Duration::from_secs(15);

/// How long a dataplane that is not in use any more stays at least; as long as connections of its go on it stays in any case.
const LEAVE: Duration = Duration::from_secs(10);

/// What another `proxy.mode` left in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Others {
    /// It has not been looked for.
    Unknown,
    /// It begins no connection any more, and stays until then at least.
    Leaving(tokio::time::Instant),
    /// It is not there.
    Gone,
}

impl Others {
    /// When it is to be looked whether it can go.
    fn due(self) -> Option<tokio::time::Instant> {
        match self {
            Self::Leaving(until) => Some(until),
            Self::Unknown | Self::Gone => None,
        }
    }
}

/// Where the owner task hears from.
pub struct Inputs {
    /// The datastore.
    pub events: mpsc::Receiver<Event>,
    /// The plugin: the host ports of this node's pods, or why they cannot be read.
    pub host_ports: mpsc::Receiver<Result<Snapshot, String>>,
    /// The kernel: something of the network changed.
    pub kernel: mpsc::Receiver<()>,
    /// The host: what gets in the way on it.
    pub host: mpsc::Receiver<Report>,
    /// The probes: which ways to other nodes do not carry.
    pub probes: mpsc::Receiver<Vec<String>>,
    /// The health checks: which ports cannot be listened on.
    pub health_checks: mpsc::Receiver<Vec<String>>,
    /// The kernel: the rules of egress are not what they were, whoever changed them.
    pub egress: mpsc::Receiver<()>,
    /// The kernel: the dataplane's rules are not what they were, whoever changed them.
    pub dataplane: mpsc::Receiver<()>,
    /// Operators.
    pub questions: mpsc::Receiver<Question>,
}

/// The owner task's state.
pub struct Agent {
    config: Config,
    started: Instant,
    network: Network,
    proxy: Option<Box<dyn Proxy>>,
    /// Why it is this one.
    proxy_reason: String,
    /// What became of what another dataplane left.
    others: Others,
    /// Whether connections between pods are translated by connection tracking, which must see all of their packets.
    tracked: Option<bool>,
    source: Source,
    cluster: Cluster,
    /// Keeps what a remote datastore said for a start without it.
    saver: Option<Saver>,
    loaded: bool,
    /// What the datastore has this node's pods wait for.
    datastore_awaits: Option<String>,
    dirty: Marks,
    /// Who holds which pod CIDR; kept so that a newcomer cannot take one.
    held: BTreeMap<IpNetwork, String>,
    routes: NodeRoutes,
    view: NodeView,
    outcome: Option<network::Outcome>,
    /// The ways that are to be probed.
    probed: watch::Sender<Vec<Target>>,
    egress: Option<egress::InForce>,
    surroundings: Option<Surroundings>,
    settling: settling::Settling,
    /// When the next pod will have settled.
    settles: Option<tokio::time::Instant>,
    services: Services,
    figures: Arc<Figures>,
    /// When what is not yet in the kernel was changed in the cluster.
    triggers: Vec<Timestamp>,
    /// The pods with host ports; nothing until they were read.
    host_ports: Option<BTreeMap<Attachment, Record>>,
    service_failures: BTreeMap<ServicePortKey, String>,
    /// What is answered where.
    health_listeners: watch::Sender<health_checks::Wanted>,
    /// How this node does, for whoever tells the cluster.
    health: watch::Sender<NodeHealth>,
    synced: bool,
    syncs: u64,
    drift_repaired: u64,
    removals: Arc<removals::Counts>,
    /// What is wrong, by who found it; each finder replaces its own.
    problems: BTreeMap<&'static str, Vec<String>>,
    node_file: node_file::Writer,
}

/// What the next pass must look at.
#[derive(Debug, Default)]
struct Marks {
    nodes: bool,
    audit: bool,
    egress: bool,
    /// The slow audit's turn: what Services hold in the kernel is read back too.
    proxy_audit: bool,
    services: BTreeSet<ObjectName>,
    all_services: bool,
    host_ports: bool,
    /// Keys whose sync failed, or which changed and are not yet synced.
    keys: BTreeSet<ServicePortKey>,
}

impl Marks {
    fn any(&self) -> bool {
        self.nodes
            || self.audit
            || self.egress
            || self.proxy_audit
            || self.all_services
            || self.host_ports
            || !self.services.is_empty()
            || !self.keys.is_empty()
    }
}

impl Agent {
    /// An agent that knows nothing yet. `proxy` is the dataplane to use and why, or none where the mode is off; `source` and
    /// `removals` are for its reports only.
    ///
    /// # Errors
    /// The netlink socket cannot be opened.
    pub fn new(
        config: Config,
        source: Source,
        proxy: Option<(Box<dyn Proxy>, String)>,
        removals: Arc<removals::Counts>,
    ) -> anyhow::Result<Self> {
        let (proxy, proxy_reason) = proxy.unzip();
        Ok(Self {
            network: Network::open(config.network.clone())?,
            node_file: node_file::Writer::new(&config),
            config,
            started: Instant::now(),
            proxy,
            proxy_reason: proxy_reason.unwrap_or_default(),
            others: Others::Unknown,
            tracked: None,
            saver: source.is_remote().then(Saver::default),
            source,
            cluster: Cluster::default(),
            loaded: false,
            datastore_awaits: None,
            dirty: Marks {
                nodes: true,
                all_services: true,
                ..Marks::default()
            },
            held: BTreeMap::new(),
            routes: NodeRoutes::default(),
            view: NodeView::default(),
            outcome: None,
            probed: watch::Sender::new(Vec::new()),
            egress: None,
            surroundings: None,
            settling: settling::Settling::default(),
            settles: None,
            services: Services::default(),
            figures: Arc::default(),
            triggers: Vec::new(),
            host_ports: None,
            service_failures: BTreeMap::new(),
            health_listeners: watch::Sender::default(),
            health: watch::Sender::default(),
            synced: false,
            syncs: 0,
            drift_repaired: 0,
            removals,
            problems: BTreeMap::new(),
        })
    }

    /// The ways to other nodes that are to be probed, as they change.
    pub fn probed(&self) -> watch::Receiver<Vec<Target>> {
        self.probed.subscribe()
    }

    /// How Services get into the kernel, in figures.
    pub fn figures(&self) -> Arc<Figures> {
        self.figures.clone()
    }

    /// The health checks that are to be answered, as they change.
    pub fn health_listeners(&self) -> watch::Receiver<health_checks::Wanted> {
        self.health_listeners.subscribe()
    }

    /// How this node does, as it changes.
    pub fn health(&self) -> watch::Receiver<NodeHealth> {
        self.health.subscribe()
    }

    /// Runs until the datastore ends.
    pub async fn run(mut self, mut inputs: Inputs) {
        let mut audit = tokio::time::interval(AUDIT);
        let mut upkeep = tokio::time::interval(UPKEEP);
        let mut retry: Option<tokio::time::Instant> = None;
        let mut gathered: Option<tokio::time::Instant> = None;
        let mut folded = false;
        loop {
            let wake = [retry, gathered, self.settles, self.others.due()];
            let wake = wake.into_iter().flatten().min();
            tokio::select! {
                event = inputs.events.recv() => {
                    let Some(event) = event else { return };
                    folded = true;
                    self.fold(event);
                    let began = tokio::time::Instant::now();
                    loop {
                        let window = self.gathers();
                        if let Some(window) = window {
                            tokio::time::sleep(window).await;
                        }
                        let mut any = false;
                        while let Ok(event) = inputs.events.try_recv() {
                            self.fold(event);
                            any = true;
                        }
                        // A burst may take longer than one window; it is over when nothing came in one.
                        if window.is_none() || !any || began.elapsed() >= LONGEST_BURST {
                            break;
                        }
                    }
                }
                Some(snapshot) = inputs.host_ports.recv() => self.take_host_ports(snapshot),
                Some(()) = inputs.kernel.recv() => {
                    gathered.get_or_insert_with(|| tokio::time::Instant::now() + GATHER);
                    continue;
                }
                Some(report) = inputs.host.recv() => {
                    self.fold_host(report);
                    continue;
                }
                Some(problems) = inputs.probes.recv() => {
                    self.found("probes", problems);
                    self.tell_plugin();
                    continue;
                }
                Some(()) = inputs.egress.recv() => self.dirty.egress = true,
                Some(()) = inputs.dataplane.recv() => self.dirty.proxy_audit = true,
                Some(problems) = inputs.health_checks.recv() => {
                    self.found("health check listeners", problems);
                    continue;
                }
                Some(question) = inputs.questions.recv() => {
                    self.answer(question).await;
                    continue;
                }
                _ = audit.tick() => {
                    self.dirty.audit = true;
                    self.dirty.proxy_audit = true;
                }
                _ = upkeep.tick() => {
                    self.tend();
                    if std::mem::take(&mut folded) {
                        memory::give_back();
                    }
                    continue;
                }
                turn = turn_of(&mut self.saver) => {
                    self.save(turn);
                    continue;
                }
                () = sleep_until(wake) => {
                    if gathered.take().is_some() || self.settles.take().is_some() {
                        self.dirty.audit = true;
                    }
                    self.part_with_others();
                }
            }
            retry = None;
            // The first sync removes what is not known: nothing may be missing from it.
            if self.loaded && self.host_ports.is_some() && self.dirty.any() && !self.pass().await {
                retry = Some(tokio::time::Instant::now() + RETRY);
            }
        }
    }

    fn fold(&mut self, event: Event) {
        let touched = match event {
            Event::Upsert(mut object) => {
                self.count(&mut object);
                self.cluster.upsert(object)
            }
            Event::Remove(kind, name) => self.cluster.remove(kind, &name),
            Event::Loaded => {
                tracing::info!(
                    nodes = self.cluster.nodes().count(),
                    services = self.cluster.services().count(),
                    pods = self.cluster.pod_count(),
                    "the datastore's first full list is in"
                );
                self.loaded = true;
                // What the list took beyond what it came to; the first sync needs room of its own.
                memory::give_back();
                Touched::default()
            }
            Event::Problems(problems) => {
                let list = problems
                    .into_iter()
                    .map(|(place, reason)| format!("{place}: {reason}"))
                    .collect();
                self.found("datastore", list);
                Touched::default()
            }
            Event::Await(what) => {
                self.datastore_awaits = what;
                // The plugin is to be told.
                self.dirty.nodes = true;
                Touched::default()
            }
        };
        if let Some(saver) = &mut self.saver
            && (touched.nodes || !touched.services.is_empty())
        {
            saver.changed();
        }
        self.dirty.nodes |= touched.nodes;
        self.dirty.services.extend(touched.services);
    }

    /// Counts what changed, and notes when it was changed in the cluster once that tells how long it takes.
    fn count(&mut self, object: &mut Object) {
        match object {
            Object::Service(_) => self.figures.service_changed(),
            Object::EndpointSlice(slice) => {
                self.figures.endpoints_changed();
                let triggered = slice.triggered.take();
                // What was there before the first sync waited for the daemon to start; without a dataplane nothing is programmed.
                let tells = self.synced && self.proxy.is_some();
                self.triggers.extend(triggered.filter(|_| tells));
            }
            _ => {}
        }
    }

    fn save(&mut self, turn: Turn) {
        match turn {
            // A list that is not whole is no state, and what was saved before is not to be taken for newer than it is.
            Turn::Due if !self.loaded || !self.source.is_in_reach() => {
                if let Some(saver) = &mut self.saver {
                    saver.put_off();
                }
            }
            Turn::Due => {
                if let Some(saver) = &mut self.saver {
                    saver.save(&self.cluster);
                }
            }
            Turn::Done(result) => self.found("state last known", result.err().into_iter().collect()),
        }
    }

    /// Applies what is dirty; `false` if something must be tried again.
    async fn pass(&mut self) -> bool {
        let marks = std::mem::take(&mut self.dirty);
        let mut done = true;
        let network = marks.nodes || marks.audit;
        if network {
            done &= self.apply_network(marks.nodes, marks.audit).await;
        }
        let egress = (network || marks.egress).then(|| self.begin_egress());
        if network {
            done &= self.apply_pod_mtu().await;
        }
        done &= self.apply_services(&marks);
        if let Some(egress) = egress {
            done &= self.finish_egress(egress).await;
        }
        if marks.proxy_audit {
            done &= self.audit_services();
        }
        done &= self.tell_plugin();
        if !done {
            // What of it failed is told apart by reading the kernel back, not by remembering.
            self.dirty.nodes = true;
        }
        done
    }
}

async fn turn_of(saver: &mut Option<Saver>) -> Turn {
    match saver {
        Some(saver) => saver.turn().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
