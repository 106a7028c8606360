//! Where it is measured: network and mount namespaces of the bench's own, pods' namespaces, and a daemon.
//!
//! Everything here ends with the process, however that ends.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use sluice_cni::names::{GATEWAY_V4, GATEWAY_V6, REMOVALS_SOCKET};
use sluice_cni::netlink::Netlink;
use sluice_cni::node_file::{NodeFile, VERSION};
use sluice_cni::requests;
use sluice_cni::wiring::only_link;

use crate::namespaces;

/// Folder of all files, on a tmpfs of the stage's.
pub const FILES: &str = "/run/bench";

/// Folder of what the daemon and the plugin tell each other.
const RUN: &str = "/run/sluice";

/// How long the daemon may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// A pod to be: a namespace that waits for an interface.
pub struct Pod {
    /// Its container id.
    pub id: String,
    /// Its namespace.
    pub netns: PathBuf,
    /// Which it is, from 0.
    pub number: u16,
}

/// The daemon; ended when dropped.
pub struct Daemon(Child);

impl Daemon {
    /// Its resident memory in KiB.
    ///
    /// # Errors
    /// It ended.
    pub fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).context("sluiced ended")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(number.context("no VmRSS of sluiced")?.parse()?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Moves this process into namespaces of its own. Must come before any thread is started.
///
/// # Errors
/// Not root, or what the kernel refused.
pub fn enter() -> Result<()> {
    namespaces::enter()?;
    for folder in [FILES, "/run/netns", "/run/bench/manifests"] {
        fs::create_dir_all(folder).with_context(|| format!("making {folder}"))?;
    }
    Ok(())
}

/// Makes `count` pods.
///
/// # Errors
/// What the kernel refused.
pub fn pods(count: u16) -> Result<Vec<Pod>> {
    (0..count).map(pod).collect()
}

fn pod(number: u16) -> Result<Pod> {
    let id = format!("bench-{number}");
    let netns = Path::new("/run/netns").join(&id);
    fs::write(&netns, "").with_context(|| format!("making {}", netns.display()))?;
    let made = thread::scope(|scope| {
        let making = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let nothing = None::<&str>;
            mount(
                Some("/proc/thread-self/ns/net"),
                &netns,
                nothing,
                MsFlags::MS_BIND,
                nothing,
            )
        });
        making.join()
    });
    made.map_err(|_| anyhow!("the thread that makes {id} panicked"))?
        .with_context(|| format!("making the network namespace {id}"))?;
    Ok(Pod { id, netns, number })
}

/// Writes a node file with one IPv4 pool and says where it is.
///
/// # Errors
/// It cannot be written.
pub fn node_file(name: &str, cidr: &str) -> Result<PathBuf> {
    let path = Path::new(FILES).join(format!("{name}.json"));
    let file = NodeFile {
        version: VERSION,
        node_name: "bench".to_owned(),
        pod_cidrs: vec![cidr.parse().with_context(|| format!("understanding {cidr}"))?],
        gateway_v4: GATEWAY_V4,
        gateway_v6: GATEWAY_V6,
        mtu: 1450,
        reserved: Vec::new(),
        not_ready: String::new(),
        impaired: String::new(),
    };
    file.write(&path)
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// Takes away what a reboot takes of pods: their devices, and all that is known of them where `node_file` says how they are wired.
///
/// # Errors
/// What the kernel refused.
pub fn forget_pods(node_file: &Path) -> Result<()> {
    // Any group that nobody else uses here.
    const GONE: u32 = 1;
    let mut host = Netlink::open()?;
    let links = host.batch(&[requests::list_all_links()])?;
    let links = links.into_iter().filter_map(|answer| only_link(&[answer]));
    let marks = links.filter(|link| link.serves().is_some());
    let mut requests: Vec<_> = marks
        .map(|link| requests::set_group(&link.name, link.index, GONE))
        .collect();
    requests.push(requests::remove_group(GONE));
    host.batch(&requests)?;
    for folder in [&node_file.with_extension("ipam"), Path::new(RUN)] {
        fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    Ok(())
}

/// Starts the real daemon, which gathers removals, and waits until it listens.
///
/// # Errors
/// It cannot be started, or ends, with the end of what it said.
pub fn daemon(program: &Path) -> Result<Daemon> {
    let config = Path::new(FILES).join("config.yaml");
    let log = Path::new(FILES).join("sluiced.log");
    let text = "nodeName: bench\n\
                datastore: { kind: manifests, manifests: { directory: /run/bench/manifests } }\n\
                proxy: { mode: off }\n";
    fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
    let output = fs::File::create(&log).with_context(|| format!("making {}", log.display()))?;
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output);
    // SAFETY: between fork and exec only a system call is made, which is safe there.
    unsafe {
        command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
    }
    let child = command
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let mut daemon = Daemon(child);
    let start = Instant::now();
    while !Path::new(REMOVALS_SOCKET).exists() {
        let ended = daemon.0.try_wait().context("looking after sluiced")?;
        if ended.is_some() || start.elapsed() > PATIENCE {
            let said = fs::read_to_string(&log).unwrap_or_default();
            bail!("sluiced does not take removals; it said:\n{said}");
        }
        sleep(Duration::from_millis(10));
    }
    Ok(daemon)
}
