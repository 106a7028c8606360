//! A node for tests of the eBPF backend: a thread with a network and a mount namespace, a bpf file system and a cgroup
//! of its own.
//!
//! All but the cgroup ends with the thread, whatever becomes of the test: the file system goes with the namespace, the
//! pins with it, and with them the programs. The cgroup is a threaded one, below the test's own, so threads alone enter.

#![allow(dead_code, missing_docs, reason = "each test file uses what it needs of this")]

pub mod bulk;
pub mod device;
pub mod hosts;
pub mod icmp;
pub mod neighbour;
pub mod packet;
pub mod pods;
pub mod server;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use sluice_daemon::proxy::ebpf::{EbpfProxy, Options, PodNamespaces};
use sluice_daemon::proxy::{Dirty, Proxy, Surroundings, SyncReport};
use sluice_daemon::state::service_port::{
    Backend, Family, Frontend, FrontendKind, Place, Protocol, Scope, ServicePort, ServicePortKey, WhenEmpty,
};

/// What is desired of a proxy.
pub type Desired = BTreeMap<ServicePortKey, ServicePort>;

/// A cgroup directory, removed with this.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields[2] == "cgroup2")
            .map(|fields| PathBuf::from(fields[1]))
            .expect("a cgroup v2 file system must be mounted");
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .expect("a cgroup v2 of our own");
        let name = format!(
            "sluice-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = mount.join(own).join(name);
        fs::create_dir(&path).unwrap();
        let cgroup = Self(path);
        fs::write(cgroup.0.join("cgroup.type"), "threaded").unwrap();
        cgroup
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What a failed test leaves waiting goes on to do so, until the process ends, but not in here. The kernel takes a
        // moment to see off a thread that has ended.
        for _ in 0..1000 {
            for thread in fs::read_to_string(self.0.join("cgroup.threads"))
                .unwrap_or_default()
                .lines()
            {
                let _ = fs::write(self.0.join("../cgroup.threads"), thread);
            }
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        eprintln!("{} is still in use", self.0.display());
    }
}

/// The node, seen from inside.
pub struct Node {
    /// Where the backend is attached.
    pub options: Options,
}

/// Hides what is in a folder, in the calling thread's mount namespace.
pub fn empty_folder(path: &str) {
    let none: Option<&str> = None;
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
}

/// Runs `test` on a node of its own.
pub fn on_node(test: impl FnOnce(&Node) + Send) {
    let cgroup = Cgroup::new();
    let directory = tempfile::tempdir().unwrap();
    let node = Node {
        options: Options {
            cgroup: Some(cgroup.0.clone()),
            pins: directory.path().join("bpf/sluice"),
            pods: PodNamespaces::none(),
        },
    };
    std::thread::scope(|scope| {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let bpf = directory.path().join("bpf");
            fs::create_dir(&bpf).unwrap();
            mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), none).unwrap();
            enter(&cgroup.0);
            ip("link set lo up");
            test(&node);
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
    drop(node);
}

/// Takes the calling thread, and those it starts, into the cgroup.
fn enter(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.threads"), nix::unistd::gettid().to_string()).unwrap();
}

/// Runs ip(8) with these arguments in the calling thread's network namespace.
pub fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip must be installed");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Node {
    /// The backend, attached here.
    pub fn open(&self) -> EbpfProxy {
        let mut proxy = EbpfProxy::open(&self.options).unwrap_or_else(|error| panic!("{error:#}"));
        proxy.adjust(&Surroundings::default()).unwrap();
        proxy
    }
}

/// The key of the Service port called `name`; its scope is Cluster.
pub fn key(name: &str, protocol: Protocol, family: Family) -> ServicePortKey {
    ServicePortKey {
        namespace: "default".into(),
        name: name.into(),
        port: "".into(),
        protocol,
        family,
        scope: Scope::Cluster,
    }
}

/// A Service port with these frontends and backends, all of them on this node.
pub fn port(frontends: &[(&str, FrontendKind)], backends: &[SocketAddr]) -> ServicePort {
    let mut frontends: Vec<_> = frontends
        .iter()
        .map(|(address, kind)| Frontend {
            address: address.parse().unwrap(),
            kind: *kind,
        })
        .collect();
    frontends.sort_unstable();
    let mut backends: Vec<_> = backends
        .iter()
        .map(|address| Backend {
            address: *address,
            place: Place::ThisNode,
        })
        .collect();
    backends.sort_unstable();
    ServicePort {
        frontends,
        backends,
        affinity: None,
        when_empty: WhenEmpty::Refuse,
        source_ranges: None,
    }
}

/// A sync that must not fail.
pub fn sync(proxy: &mut EbpfProxy, desired: &Desired) -> SyncReport {
    let report = proxy.sync(desired, &Dirty::All).unwrap();
    assert!(report.failed.is_empty(), "{report:?}");
    report
}
