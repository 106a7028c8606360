//! Hosts of the bench's own: a network and a mount namespace each, with a thread that does there what it is told.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use sluice_daemon::network::Device;
use sluice_daemon::network::pods::{PodDevice, Queues};
use sluice_daemon::network::vtep::Mac;

use crate::namespaces;

type Task = Box<dyn FnOnce() + Send>;

/// A host. It ends with this, and with it its end of every veth pair.
pub struct Host {
    tasks: Sender<Task>,
    namespace: File,
}

impl Host {
    /// A host with nothing but loopback, all of whose threads share the first CPU with those of the others.
    pub fn new() -> Result<Self> {
        let (tasks, received) = channel::<Task>();
        let (ready, started) = channel();
        thread::spawn(move || {
            let made = enter();
            let good = made.is_ok();
            // Nobody waits only if the bench itself has ended.
            if ready.send(made).is_ok() && good {
                received.into_iter().for_each(|task| task());
            }
        });
        let namespace = started.recv().context("a host's thread ended")??;
        Ok(Self { tasks, namespace })
    }

    /// Begins `task` there.
    pub fn start<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> Result<Receiver<T>> {
        let (done, result) = channel();
        let task = Box::new(move || {
            // Whoever began it may not care for the end.
            let _ = done.send(task());
        });
        self.tasks
            .send(task)
            .map_err(|_| anyhow!("a host's thread ended"))?;
        Ok(result)
    }

    /// Runs `task` there and waits for its result.
    pub fn run<T: Send + 'static>(&self, task: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        self.start(task)?.recv().context("a host's thread ended")?
    }

    /// Runs ip(8) there, a line each.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        let lines = lines.to_vec();
        self.run(move || lines.iter().try_for_each(|line| tool("ip", line)))
    }

    /// Joins this host by the device `here` to `other`, where it is called `there`.
    pub fn join(&self, here: &str, other: &Self, there: &str) -> Result<()> {
        let (process, fd) = (std::process::id(), other.namespace.as_raw_fd());
        self.ip(&[
            format!("link add {here} type veth peer name {there} netns /proc/{process}/fd/{fd}"),
            format!("link set {here} up"),
        ])?;
        other.ip(&[format!("link set {there} up")])
    }

    /// A pod of this host with this address, wired as the plugin does it, at the device `name`.
    pub fn pod(&self, name: &str, address: IpAddr) -> Result<(Self, PodDevice)> {
        let pod = Self::new()?;
        self.join(name, &pod, "eth0")?;
        let (ours, theirs) = (self.mac(name)?, pod.mac("eth0")?);
        pod.ip(&[
            format!("addr add {address}/32 dev eth0"),
            format!("neigh replace 169.254.1.1 lladdr {ours} dev eth0 nud permanent"),
            "route add 169.254.1.1 dev eth0".to_owned(),
            "route add default via 169.254.1.1 dev eth0".to_owned(),
        ])?;
        self.ip(&[
            format!("route add {address} dev {name}"),
            format!("neigh replace {address} lladdr {theirs} dev {name} nud permanent"),
        ])?;
        let device = PodDevice {
            device: self.device(name)?,
            mac: ours,
            mtu: 1500,
            endpoints: BTreeMap::from([(address, theirs)]),
            queues: Queues::default(),
        };
        Ok((pod, device))
    }

    /// A device of this host.
    pub fn device(&self, name: &str) -> Result<Device> {
        let name = name.to_owned();
        self.run(move || {
            let index = nix::net::if_::if_nametoindex(name.as_str())
                .with_context(|| format!("looking for the device {name}"))?;
            Ok(Device { index, name })
        })
    }

    fn mac(&self, name: &str) -> Result<Mac> {
        let name = name.to_owned();
        self.run(move || {
            let addresses = nix::ifaddrs::getifaddrs().context("listing devices")?;
            addresses
                .filter(|device| device.interface_name == name)
                .find_map(|device| device.address?.as_link_addr()?.addr())
                .map(Mac)
                .with_context(|| format!("the device {name} has no hardware address"))
        })
    }
}

fn enter() -> Result<File> {
    namespaces::enter()?;
    let mut first = CpuSet::new();
    first.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &first).context("keeping a thread on one CPU")?;
    File::open("/proc/thread-self/ns/net").context("opening a namespace")
}

/// Runs a tool in the calling thread's namespaces.
pub fn tool(name: &str, arguments: &str) -> Result<()> {
    let output = Command::new(name)
        .args(arguments.split(' '))
        .output()
        .with_context(|| format!("starting {name}"))?;
    ensure!(
        output.status.success(),
        "{name} {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
