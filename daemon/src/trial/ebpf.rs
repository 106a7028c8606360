//! Services in eBPF, tried as a whole: the programs pass the verifier, go to where they belong, and carry a datagram from
//! another host to a Service's endpoint, and the answer back.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use sluice_cni::mac::Mac;
use sluice_cni::netlink::Netlink;
use sluice_cni::requests::{self, End};

use crate::mounts;
use crate::network::Device;
use crate::proxy::ebpf::{EbpfProxy, Options, PodNamespaces};
use crate::proxy::{Dirty, Proxy, Surroundings};
use crate::state::service_port::{
    Backend, Family, Frontend, FrontendKind, Place, Protocol, Scope, ServicePort, ServicePortKey,
};

/// This host, of the addresses that are for documentation (RFC 5737).
const HERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The other.
const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const NODE_PORT: u16 = 30_053;
const ENDPOINT_PORT: u16 = 5_353;

/// Nothing is between the two hosts but the kernel.
const PATIENCE: Duration = Duration::from_secs(1);

/// Tries it in the calling thread's namespaces, which must be its own; says what came of it. Where no cgroup can be made, as in a
/// container, the programs for sockets are loaded and attached nowhere.
///
/// # Errors
/// What keeps it from being tried.
pub(super) fn run() -> Result<Result<()>> {
    mount(
        Some("bpf"),
        mounts::BPFFS,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("mounting a bpf file system on {}", mounts::BPFFS))?;
    let cgroup = Cgroup::make(&mounts::cgroup2()?)?;
    let (device, client) = neighbour().context("making a neighbour to try it with")?;
    let options = Options {
        cgroup: cgroup.as_ref().map(|cgroup| cgroup.0.clone()),
        pins: Path::new(mounts::BPFFS).join("trial"),
        pods: PodNamespaces::none(),
    };
    let carried = EbpfProxy::open(&options).and_then(|mut proxy| carries(&mut proxy, device, &client));
    // The programs at sockets let go of the cgroup.
    Ok(carried.and(EbpfProxy::remove(&options.pins)))
}

fn carries(proxy: &mut EbpfProxy, device: Device, client: &UdpSocket) -> Result<()> {
    proxy.adjust(&Surroundings {
        devices: vec![device],
        node_addresses: vec![HERE.into()],
        ..Surroundings::default()
    })?;
    let report = proxy.sync(&service(), &Dirty::All)?;
    if let Some((_, why)) = report.failed.first() {
        bail!("a Service cannot be programmed: {why}");
    }
    let endpoint = UdpSocket::bind((HERE, ENDPOINT_PORT))?;
    endpoint.set_read_timeout(Some(PATIENCE))?;
    client.set_read_timeout(Some(PATIENCE))?;
    // Connected: an answer that is not from the Service's own address does not get through.
    client.connect((HERE, NODE_PORT))?;
    let mut byte = [7];
    client.send(&byte)?;
    let (_, from) = endpoint
        .recv_from(&mut byte)
        .context("a packet to a Service did not come to its endpoint")?;
    ensure!(
        from.ip() == IpAddr::V4(THERE),
        "a packet to a Service came to its endpoint from {from}, not from {THERE}"
    );
    endpoint.send_to(&byte, from)?;
    client
        .recv(&mut byte)
        .context("an endpoint's answer did not come back from the Service's address")?;
    Ok(())
}

/// Another host at the end of a cable: the device here, and a socket there.
fn neighbour() -> Result<(Device, UdpSocket)> {
    let here = File::open("/proc/thread-self/ns/net")?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    let there = (|| {
        let ends = [("there", 2), ("here", 1)].map(|(name, last)| End { name, mac: mac(last) });
        let mut netlink = Netlink::open()?;
        netlink.batch(&[requests::make_pair(&ends[0], &ends[1], here.as_fd(), 1500)])?;
        join(&mut netlink, "there", THERE, HERE, mac(1))?;
        anyhow::Ok(UdpSocket::bind((THERE, 0))?)
    })();
    // In any case: the thread goes on here.
    setns(here.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let client = there?;
    let index = join(&mut Netlink::open()?, "here", HERE, THERE, mac(2))?;
    let name = "here".to_owned();
    Ok((Device { index, name }, client))
}

fn mac(last: u8) -> Mac {
    Mac::from_bytes([2, 0, 0, 0, 0, last])
}

/// Gives a device its address and the way to the other's; its index.
fn join(
    netlink: &mut Netlink,
    device: &str,
    address: Ipv4Addr,
    other: Ipv4Addr,
    other_mac: Mac,
) -> Result<u32> {
    let index = nix::net::if_::if_nametoindex(device)?;
    netlink.batch(&[
        requests::set_up(device),
        requests::add_address(device, index, address.into()),
        requests::add_neighbour(device, index, other.into(), other_mac),
        requests::add_host_route(device, index, other.into()),
    ])?;
    Ok(index)
}

fn service() -> BTreeMap<ServicePortKey, ServicePort> {
    let key = ServicePortKey {
        namespace: "sluice".into(),
        name: "trial".into(),
        port: "".into(),
        protocol: Protocol::Udp,
        family: Family::V4,
        scope: Scope::Cluster,
    };
    let port = ServicePort {
        frontends: vec![Frontend {
            address: SocketAddr::new(HERE.into(), NODE_PORT),
            kind: FrontendKind::NodePort,
        }],
        backends: vec![Backend {
            address: SocketAddr::new(HERE.into(), ENDPOINT_PORT),
            place: Place::ThisNode,
        }],
        affinity: None,
        when_empty: Default::default(),
        source_ranges: None,
    };
    BTreeMap::from([(key, port)])
}

/// An empty cgroup, removed with this.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Nothing where the tree is read-only.
    fn make(root: &Path) -> Result<Option<Self>> {
        let path = root.join(format!("sluice-trial.{}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => Ok(Some(Self(path))),
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(None),
            Err(error) => Err(error).with_context(|| format!("making the cgroup {}", path.display())),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Best effort; an empty cgroup does nothing.
        let _ = fs::remove_dir(&self.0);
    }
}
