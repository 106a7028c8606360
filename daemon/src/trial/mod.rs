//! Tries on this kernel what Sluice needs of it, in namespaces of its own that vanish with the thread: nothing of the host's changes
//! but that its kernel may load a module.

mod ebpf;

use std::fs::File;
use std::os::fd::AsFd;
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
    /// Services in eBPF, with a packet to one and its answer.
    pub ebpf: Result<()>,
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
    in_own_namespaces(|| Trial {
        pods: pods(),
        limits: limits(),
        vxlan: vxlan(),
        ebpf: ebpf::run().flatten(),
        nftables: NftablesProxy::open().map(drop),
        iptables: IptablesProxy::open().map(|proxy| proxy.flavour().to_owned()),
    })
}

/// Tries Services in eBPF alone; says what came of it.
///
/// # Errors
/// What keeps it from being tried, which need not keep it from working.
pub fn ebpf() -> Result<Result<()>> {
    in_own_namespaces(ebpf::run)?
}

fn in_own_namespaces<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let trial = thread::Builder::new()
        .name("trial".to_owned())
        .spawn(|| {
            enter_own_namespaces().context("making namespaces to try the kernel in; are you root?")?;
            Ok(what())
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
    Ok(Attachment::new("sluice-trial", "eth0")?)
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
