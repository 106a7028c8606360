//! Tries on this kernel what Sluice needs of it, in namespaces of its own that vanish with the thread: nothing of the host's changes
//! but that its kernel may load a module.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use sluice_cni::bandwidth::{Bandwidth, Limit};
use sluice_cni::mac::{self, Mac};
use sluice_cni::netlink::{Kind, Netlink, Request};
use sluice_cni::requests::{self, End};
use sluice_cni::shaping;
use sluice_ipam::Attachment;

use crate::mounts;
use crate::proxy::ebpf::{EbpfProxy, Options, PodNamespaces};
use crate::proxy::iptables::IptablesProxy;
use crate::proxy::nftables::NftablesProxy;

/// What became of each.
#[derive(Debug)]
pub struct Trial {
    /// A pod's veth pair with a place for programs.
    pub pods: Result<()>,
    /// Limits on what a pod sends and gets.
    pub limits: Result<()>,
    /// The overlay's device.
    pub vxlan: Result<()>,
    /// Services in eBPF: all programs pass the verifier and are attached. Nothing where no cgroup can be made to try them in, as in
    /// a container.
    pub ebpf: Option<Result<()>>,
    /// Services in nftables.
    pub nftables: Result<()>,
    /// Services in iptables; with the flavour.
    pub iptables: Result<String>,
}

/// Tries all of it.
///
/// # Errors
/// Namespaces of its own are refused.
pub fn run() -> Result<Trial> {
    let trial = thread::Builder::new()
        .name("trial".to_owned())
        .spawn(|| {
            enter_own_namespaces().context("making namespaces to try the kernel in; are you root?")?;
            Ok(Trial {
                pods: pods(),
                limits: limits(),
                vxlan: vxlan(),
                ebpf: ebpf(),
                nftables: NftablesProxy::open().map(drop),
                iptables: IptablesProxy::open().map(|proxy| proxy.flavour().to_owned()),
            })
        })
        .context("starting a thread")?;
    trial
        .join()
        .unwrap_or_else(|_| Err(anyhow!("the thread that tried the kernel ended early")))
}

fn enter_own_namespaces() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    // Mounts made here are seen nowhere else.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    Ok(())
}

/// The pod of these trials.
fn attachment() -> Result<Attachment> {
    Ok(Attachment::new("sluice-doctor", "eth0")?)
}

fn pods() -> Result<()> {
    let attachment = attachment()?;
    let netns = File::open("/proc/thread-self/ns/net")?;
    let name = mac::host_device(&attachment);
    let ends = [name.as_str(), "eth0"].map(|name| End {
        name,
        mac: Mac::of_host_end(&attachment),
    });
    let mut netlink = Netlink::open()?;
    netlink.batch(&[requests::make_pair(&ends[0], &ends[1], netns.as_fd(), 1500)])?;
    let index = nix::net::if_::if_nametoindex(name.as_str())?;
    netlink.batch(&[requests::make_clsact(&name, index), requests::set_up(&name)])?;
    Ok(())
}

/// At the device that [`pods`] made.
fn limits() -> Result<()> {
    let limit = Some(Limit {
        rate: 1_000_000,
        burst: 100_000,
    });
    let bandwidth = Bandwidth {
        ingress: limit,
        egress: limit,
    };
    shaping::make(&attachment()?, &bandwidth, 1500)?;
    Ok(())
}

fn vxlan() -> Result<()> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName("vxlan".to_owned()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![InfoVxlan::Id(1), InfoVxlan::Port(4789)])),
        ]),
    ];
    Netlink::open()?.batch(&[Request {
        doing: "making a vxlan device".to_owned(),
        message: RouteNetlinkMessage::NewLink(message),
        kind: Kind::Create,
        tolerated: &[],
    }])?;
    Ok(())
}

/// With a cgroup that nobody is in, and a bpf file system that nobody else sees.
fn ebpf() -> Option<Result<()>> {
    match mounts::cgroup2().and_then(|root| Cgroup::make(&root)) {
        Ok(None) => None,
        Ok(Some(cgroup)) => Some(ebpf_at(&cgroup)),
        Err(error) => Some(Err(error)),
    }
}

fn ebpf_at(cgroup: &Cgroup) -> Result<()> {
    mount(
        Some("bpf"),
        mounts::BPFFS,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("mounting a bpf file system on {}", mounts::BPFFS))?;
    let options = Options {
        cgroup: cgroup.0.clone(),
        pins: Path::new(mounts::BPFFS).join("trial"),
        pods: PodNamespaces::none(),
    };
    EbpfProxy::open(&options)?;
    // The programs at sockets let go of the cgroup.
    EbpfProxy::remove(&options.pins)
}

/// An empty cgroup, removed with this.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Nothing where the tree is read-only.
    fn make(root: &Path) -> Result<Option<Self>> {
        let path = root.join(format!("sluice-doctor.{}", std::process::id()));
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
