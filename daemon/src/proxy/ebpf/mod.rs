//! Services in eBPF: translated at the socket, and at the device for other hosts.
//!
//! Owns the pins below its directory: maps, and links that hold the programs in place. All of it keeps working when the
//! daemon is gone; the next one adopts it. It never decides which Services exist or where their endpoints are.
//!
//! ```text
//! maps/NAME_vN          tables; the version is that of their layout
//! sockets/PROGRAM       links to the cgroup
//! devices/in-DEVICE     links to devices (`.` in a name stands as `:`)
//! devices/out-DEVICE
//! ```

mod addresses;
mod audit;
mod backend_set;
mod batch;
mod connection_entries;
mod connections;
mod devices;
mod endpoints;
mod expiry;
mod link;
mod maglev;
mod namespaces;
mod object;
mod pod_devices;
mod services;
mod sock_diag;
mod sources;
mod stale_sockets;
mod tables;
mod take;
mod wanted;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use sluice_ebpf_types::{Address, Network, Node, POD_NETWORKS, node_flag};

use self::devices::Devices;
use self::endpoints::Endpoints;
use self::expiry::Expiry;
pub use self::namespaces::PodNamespaces;
use self::pod_devices::PodDevices;
use self::services::{Services, Upheaval};
use self::stale_sockets::StaleSockets;
pub use self::tables::Fill;
use self::tables::Tables;
use super::{Connection, Dirty, Programmed, Proxy, Surroundings, SyncReport};
use crate::state::service_port::{ServicePort, ServicePortKey};

/// Where the backend lives.
#[derive(Clone)]
pub struct Options {
    /// The cgroup v2 directory whose sockets are served, those of all cgroups below included; none are if there is none.
    pub cgroup: Option<PathBuf>,
    /// The directory, on a bpf file system, that holds its pins and nothing else.
    pub pins: PathBuf,
    /// The pods whose sockets are served beside the host's own.
    pub pods: PodNamespaces,
}

impl Options {
    /// Where the pins are unless said otherwise.
    pub const PINS: &'static str = "/sys/fs/bpf/sluice";
}

/// The backend. Dropping it leaves the dataplane in place; see [`EbpfProxy::remove`].
pub struct EbpfProxy {
    tables: Tables,
    services: Services,
    devices: Devices,
    pod_devices: PodDevices,
    endpoints: Endpoints,
    expiry: Expiry,
    stale_sockets: StaleSockets,
}

/// How things stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// How full each table is.
    pub tables: Vec<Fill>,
    /// Counters with their names, since the maps were made.
    pub counters: Vec<(&'static str, u64)>,
    /// Connections given up before their time since the daemon started, so that others had room.
    pub given_up: u64,
}

impl EbpfProxy {
    /// Loads the programs and puts them to work at the sockets, in place of those of a former daemon. Services it left
    /// are served on; the first sync takes them up.
    ///
    /// # Errors
    /// No bpf file system or cgroup v2 where `options` says, or a kernel that refuses a program: then with the verifier's
    /// log.
    pub fn open(options: &Options) -> Result<Self> {
        let maps = options.pins.join("maps");
        let loaded = object::load(&maps)?;
        let mut tables = loaded.tables;
        let services = Services::read(&mut tables)?;
        if let Some(cgroup) = &options.cgroup {
            attach_sockets(cgroup, &options.pins, &loaded.sockets)?;
        }
        Ok(Self {
            tables,
            services,
            devices: Devices::new(options.pins.join("devices"), loaded.ethernet, loaded.raw),
            pod_devices: PodDevices::new(loaded.pod),
            endpoints: Endpoints::default(),
            expiry: Expiry::default(),
            stale_sockets: StaleSockets::start(&maps, options.pods.clone())?,
        })
    }

    /// Leaves new connections to another dataplane; those whose packets are translated under way go on until [`Self::remove`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn retire(pins: &Path) -> Result<()> {
        for pin in entries(&pins.join("sockets"))? {
            link::remove(&pin)?;
        }
        tables::Entrance::open(&pins.join("maps"))?.close()
    }

    /// Whether connections go on whose packets what was [retired](Self::retire) under `pins` translates: established ones that have
    /// spoken within five minutes. Datagrams are another dataplane's from now on, whoever translated them before.
    ///
    /// # Errors
    /// The kernel's.
    pub fn let_go(pins: &Path) -> Result<bool> {
        connections::let_go(&pins.join("maps"))
    }

    /// Takes everything out of the kernel that was pinned under `pins`. What is gone already is fine.
    ///
    /// # Errors
    /// What cannot be detached or removed.
    pub fn remove(pins: &Path) -> Result<()> {
        // The ways in first, then what they use.
        pod_devices::detach_all()?;
        for directory in ["devices", "sockets"] {
            for pin in entries(&pins.join(directory))? {
                link::remove(&pin)?;
            }
        }
        for pin in entries(&pins.join("maps"))? {
            fs::remove_file(&pin).with_context(|| format!("removing {}", pin.display()))?;
        }
        for directory in [
            pins.join("devices"),
            pins.join("sockets"),
            pins.join("maps"),
            pins.to_owned(),
        ] {
            match fs::remove_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", directory.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// How things stand. Walks all tables: for a person who asks, not for every second.
    ///
    /// # Errors
    /// The kernel's.
    pub fn summary(&self) -> Result<Summary> {
        Ok(Summary {
            tables: self.tables.fill()?,
            counters: self.tables.counters()?,
            given_up: self.expiry.given_up(),
        })
    }
}

/// What [`Proxy::adjust`] is made of, and what follows a sync.
impl EbpfProxy {
    /// Tells the programs of the node.
    fn describe(&mut self, surroundings: &Surroundings) -> Result<()> {
        let first = |addresses: &[IpAddr], v4: bool| {
            addresses
                .iter()
                .find(|a| a.is_ipv4() == v4)
                .map_or(Address::default(), |a| Address::from(*a))
        };
        let node = Node {
            host_netns_cookie: namespaces::cookie()?,
            pod_network_v4: first(&surroundings.pod_network_addresses, true),
            pod_network_v6: first(&surroundings.pod_network_addresses, false),
            node_v4: first(&surroundings.node_addresses, true),
            node_v6: first(&surroundings.node_addresses, false),
            pod_networks: pod_networks(&surroundings.pod_networks),
            flags: if surroundings.fast_path {
                node_flag::FAST_PATH
            } else {
                0
            } | if surroundings.ping { node_flag::PING } else { 0 },
            zero: 0,
        };
        if self.tables.node()? != node {
            self.tables.set_node(&node)?;
        }
        self.services.set_node_addresses(&surroundings.node_addresses);
        Ok(())
    }

    /// Lets the programs at pods' devices run, and other pods' packets take the short way there. In this order: nobody is sent to a pod
    /// that cannot answer.
    fn lead_to_pods(&mut self, surroundings: &Surroundings) -> Result<()> {
        let free: Vec<_> = surroundings.pods.iter().filter(|pod| !pod.queues.taken).collect();
        self.pod_devices.attach(&free)?;
        self.endpoints.follow(&mut self.tables, &surroundings.pods)
    }

    fn see_to_sockets(&mut self, upheaval: Upheaval) {
        if upheaval.is_any() {
            self.stale_sockets.look(upheaval);
        }
    }
}

/// Has the programs run at the node's devices, and at those of pods whose place for filters somebody else has taken.
fn attach(devices: &Devices, pod_devices: &PodDevices, surroundings: &Surroundings) -> Result<()> {
    let taken = surroundings.pods.iter().filter(|pod| pod.queues.taken);
    let taken: Vec<_> = taken.map(|pod| &pod.device).collect();
    devices.attach(&surroundings.devices, &taken, pod_devices.programs())
}

/// The first of them in each place; further ones have no short cuts.
fn pod_networks(networks: &[IpNetwork]) -> [Network; POD_NETWORKS] {
    let mut known = [Network::NONE; POD_NETWORKS];
    for (place, network) in known.iter_mut().zip(networks) {
        *place = Network::new(network.ip(), network.prefix());
    }
    known
}

fn attach_sockets(path: &Path, pins: &Path, programs: &[OwnedFd]) -> Result<()> {
    let cgroup = fs::File::open(path).with_context(|| format!("opening the cgroup {}", path.display()))?;
    // A cgroup's id is its directory's inode number (kernel/cgroup/cgroup.c: cgroup_id is kernfs_node.id).
    let id = cgroup
        .metadata()
        .with_context(|| format!("asking about {}", path.display()))?
        .ino();
    let directory = pins.join("sockets");
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    for ((name, hook), program) in object::SOCKET_PROGRAMS.iter().zip(programs) {
        let target = link::Target::Cgroup(cgroup.as_fd(), id);
        link::ensure(&directory.join(name), program.as_fd(), target, *hook)
            .with_context(|| format!("is {} a cgroup v2 directory?", path.display()))?;
    }
    Ok(())
}

/// The files in `directory`, by name, so that of a device's links the one of the way in comes first; none if it is not there.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let listing = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.with_context(|| format!("listing {}", directory.display()))?,
    };
    let paths: Result<Vec<PathBuf>> = listing
        .map(|entry| {
            Ok(entry
                .with_context(|| format!("listing {}", directory.display()))?
                .path())
        })
        .collect();
    paths.map(|mut paths| {
        paths.sort();
        paths
    })
}

impl Proxy for EbpfProxy {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn adjust(&mut self, surroundings: &Surroundings) -> Result<()> {
        self.describe(surroundings)?;
        attach(&self.devices, &self.pod_devices, surroundings)?;
        self.lead_to_pods(surroundings)
    }

    fn establish(
        &mut self,
        surroundings: &Surroundings,
        desired: &BTreeMap<ServicePortKey, ServicePort>,
    ) -> Result<SyncReport> {
        self.describe(surroundings)?;
        let Self {
            tables,
            services,
            devices,
            pod_devices,
            ..
        } = self;
        // Each device takes the kernel some ten milliseconds, in which it waits for its CPUs.
        let ((report, upheaval), attached) = thread::scope(|scope| {
            let attaching = scope.spawn(|| attach(devices, pod_devices, surroundings));
            let synced = services.sync(tables, desired, &Dirty::All);
            let attached = attaching.join();
            (synced, attached.unwrap_or_else(|panic| resume_unwind(panic)))
        });
        self.see_to_sockets(upheaval);
        attached?;
        self.lead_to_pods(surroundings)?;
        Ok(report)
    }

    fn tend(&mut self) -> Result<()> {
        self.expiry.run(&mut self.tables, &self.services.affinity_by_id())
    }

    fn sync(&mut self, desired: &BTreeMap<ServicePortKey, ServicePort>, dirty: &Dirty) -> Result<SyncReport> {
        let (report, upheaval) = self.services.sync(&mut self.tables, desired, dirty);
        self.see_to_sockets(upheaval);
        Ok(report)
    }

    fn audit(&mut self) -> Result<usize> {
        let mended = audit::audit(&self.services, &mut self.tables)?
            + self.endpoints.audit(&mut self.tables)?
            + self.pod_devices.audit()?;
        Ok(mended)
    }

    fn programmed(&self) -> Result<HashMap<ServicePortKey, Programmed>> {
        self.services.programmed(&self.tables)
    }

    fn connections(&self) -> Result<Vec<Connection>> {
        connections::list(&self.tables)
    }
}
