//! Which dataplane translates Services on this node, and the end of the one that did before.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;

use crate::config::ProxyMode;
use crate::netfilter::{conntrack, wire::Netfilter};
use crate::proxy::Proxy;
use crate::proxy::ebpf::{EbpfProxy, Options, PodNamespaces};
use crate::proxy::iptables::IptablesProxy;
use crate::proxy::netfilter::loopback;
use crate::proxy::nftables::NftablesProxy;
use crate::trial;
use crate::{memory, mounts};

/// The dataplane that `mode` asks for, and why it is this one; `pods` lists the network namespaces of this node's pods.
///
/// # Errors
/// What keeps the one that is asked for, or with `auto` all of them, from working here.
pub fn open(
    mode: ProxyMode,
    pods: impl Fn() -> Vec<PathBuf> + Send + Sync + 'static,
) -> Result<Option<(Box<dyn Proxy>, String)>> {
    let asked = |mode: &str| format!("proxy.mode is {mode}");
    let (proxy, reason): (Box<dyn Proxy>, _) = match mode {
        ProxyMode::Off => return Ok(None),
        ProxyMode::Ebpf => {
            let proxy = ebpf(pods).context(
                "the eBPF dataplane cannot work here; proxy.mode auto takes nftables then, \
                 and off runs the network without Services",
            )?;
            (Box::new(proxy), asked("ebpf"))
        }
        ProxyMode::Nftables => {
            let proxy = NftablesProxy::open().context(
                "the nftables dataplane cannot work here; proxy.mode iptables may, \
                 and off runs the network without Services",
            )?;
            (Box::new(proxy), asked("nftables"))
        }
        ProxyMode::Iptables => {
            let proxy = IptablesProxy::open().context(
                "the iptables dataplane cannot work here; set proxy.mode to off to run the network without Services",
            )?;
            let reason = format!("{}, by {}", asked("iptables"), proxy.flavour());
            (Box::new(proxy), reason)
        }
        ProxyMode::Auto => first_that_works(pods)?,
    };
    Ok(Some((proxy, reason)))
}

/// eBPF, else nftables, else iptables.
fn first_that_works(
    pods: impl Fn() -> Vec<PathBuf> + Send + Sync + 'static,
) -> Result<(Box<dyn Proxy>, String)> {
    let ebpf = match tried().and_then(|()| ebpf(pods)) {
        Ok(proxy) => return Ok((Box::new(proxy), "the first that works here".to_owned())),
        Err(error) => format!("eBPF does not work here: {error:#}"),
    };
    let nftables = match NftablesProxy::open() {
        Ok(proxy) => return Ok((Box::new(proxy), ebpf)),
        Err(error) => format!("{ebpf}; nftables does not: {error:#}"),
    };
    let proxy = IptablesProxy::open()
        .with_context(|| format!("no dataplane works here: {nftables}; nor iptables"))?;
    Ok((Box::new(proxy), nftables))
}

/// Whether eBPF carries a packet here. Where a former daemon left its pins it has shown that it does: they do not outlive the kernel.
fn tried() -> Result<()> {
    if Path::new(Options::PINS).exists() {
        return Ok(());
    }
    let tried = trial::ebpf();
    memory::give_back();
    match tried {
        Ok(result) => result.context("in a trial"),
        // What is wrong then will turn out when it is put to work.
        Err(error) => {
            tracing::debug!("eBPF cannot be tried before it is put to work: {error:#}");
            Ok(())
        }
    }
}

fn ebpf(pods: impl Fn() -> Vec<PathBuf> + Send + Sync + 'static) -> Result<EbpfProxy> {
    mounts::ensure_bpffs()?;
    EbpfProxy::open(&Options {
        cgroup: Some(mounts::cgroup2()?),
        pins: Options::PINS.into(),
        pods: PodNamespaces::new(pods),
    })
}

/// Whether connection tracking translates connections between pods in `networks`.
pub fn tracks_within(networks: &[IpNetwork]) -> bool {
    let found = Netfilter::open().and_then(|netfilter| conntrack::any_within(&netfilter, networks));
    found.unwrap_or_else(|error| {
        tracing::debug!("connection tracking cannot be asked: {error:#}");
        false
    })
}

/// Has new connections taken by `kept` alone; says whether another dataplane is to stay for a while before it is removed, for the sake of
/// what was begun by it.
pub fn retire_others(kept: &str) -> bool {
    if kept == "ebpf" {
        // It translates before netfilter does, so that begins nothing more. But a connection whose socket was not translated may
        // yet have to send its first packet, or send it again.
        return true;
    }
    if !Path::new(Options::PINS).exists() {
        return false;
    }
    match EbpfProxy::retire(Path::new(Options::PINS)) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!("the eBPF dataplane that another proxy.mode left cannot be phased out: {error:#}");
            false
        }
    }
}

/// Whether connections go on that a dataplane other than `kept`, which was phased out, translates; datagrams do not any more. Those of
/// netfilter go on without it, by connection tracking.
pub fn others_serve_on(kept: &str) -> bool {
    kept != "ebpf" && ebpf_serves_on()
}

fn ebpf_serves_on() -> bool {
    EbpfProxy::let_go(Path::new(Options::PINS)).unwrap_or_else(|error| {
        tracing::warn!("whether eBPF still has connections cannot be seen: {error:#}");
        false
    })
}

/// Takes out of the kernel what dataplanes other than `kept` left there.
pub fn remove_others(kept: &str) {
    for (name, what, remove) in MODES {
        let shared = name == LOOPBACK && ["nftables", "iptables"].contains(&kept);
        if name == kept || shared {
            continue;
        }
        match remove() {
            Ok(true) => tracing::info!("removed {what}, which another proxy.mode left"),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!("removing {what}, which another proxy.mode may have left: {error:#}")
            }
        }
    }
}

/// The name in `proxy.mode`, what of it is in the kernel, and how that is taken out.
type Mode = (&'static str, &'static str, fn() -> Result<bool>);

/// What nftables and iptables share.
const LOOPBACK: &str = "loopback";

/// What dataplanes have in the kernel, and how it is taken out.
const MODES: [Mode; 4] = [
    ("ebpf", "the eBPF programs and maps", remove_ebpf),
    (
        "nftables",
        "the nftables table of Services",
        NftablesProxy::remove,
    ),
    (
        "iptables",
        "the iptables chains of Services",
        IptablesProxy::remove,
    ),
    (
        LOOPBACK,
        "the devices for node ports on loopback",
        loopback::remove,
    ),
];

/// Takes all dataplanes out of the kernel: what was there, or why it cannot be removed.
pub fn remove_all() -> impl Iterator<Item = (&'static str, Result<bool>)> {
    MODES.into_iter().map(|(_, what, remove)| (what, remove()))
}

fn remove_ebpf() -> Result<bool> {
    let pins = Path::new(Options::PINS);
    let there = pins.exists();
    EbpfProxy::remove(pins).map(|()| there)
}
