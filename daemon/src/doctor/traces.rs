//! Asks the host for what others are known by.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use netlink_packet_route::RouteNetlinkMessage;
use sluice_cni::netlink::Netlink;
use sluice_cni::requests;

use super::leftovers::Traces;
use crate::host::products::PRODUCTS;
use crate::host::{self, nft};
use crate::network::sysctl;
use crate::xtables;

/// What is there, and what could not be looked at, each with why and what to do.
pub fn look() -> (Traces, Vec<String>) {
    let mut unseen = Vec::new();
    let traces = Traces {
        processes: processes(),
        devices: host::devices(),
        addressed: or_note(addressed(), "addresses of devices", &mut unseen),
        rules: rules(&mut unseen),
        tables: nft::look().tables,
        sets: sets(&mut unseen),
        files: files(),
        routes: or_note(routes(), "routes", &mut unseen),
    };
    if sysctl::in_container() {
        unseen.push(
            "processes and most files of the host: this is a container; run sluicectl on the host itself"
                .to_owned(),
        );
    }
    (traces, unseen)
}

fn or_note<T: Default>(result: anyhow::Result<T>, what: &str, unseen: &mut Vec<String>) -> T {
    result.unwrap_or_else(|error| {
        unseen.push(format!("{what}: {error:#}"));
        T::default()
    })
}

/// From `/proc/PID/comm` (proc_pid_comm(5)).
fn processes() -> BTreeSet<(String, u32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let named = |entry: fs::DirEntry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        Some((name.trim().to_owned(), id))
    };
    entries.filter_map(named).collect()
}

fn addressed() -> anyhow::Result<BTreeSet<String>> {
    let all = nix::ifaddrs::getifaddrs()?;
    let has_address = |interface: &nix::ifaddrs::InterfaceAddress| {
        let address = interface.address.as_ref();
        address
            .is_some_and(|address| address.as_sockaddr_in().is_some() || address.as_sockaddr_in6().is_some())
    };
    Ok(all
        .filter(has_address)
        .map(|interface| interface.interface_name)
        .collect())
}

fn rules(unseen: &mut Vec<String>) -> BTreeMap<&'static str, String> {
    xtables::with_tables()
        .map(|tool| (tool.name(), or_note(tool.save_all(), "rules of iptables", unseen)))
        .collect()
}

fn sets(unseen: &mut Vec<String>) -> BTreeSet<String> {
    match Command::new("ipset").args(["list", "-name"]).output() {
        // It fails where the kernel has no ipsets: then there are none.
        Ok(answer) => String::from_utf8_lossy(&answer.stdout)
            .lines()
            .map(str::to_owned)
            .collect(),
        Err(error) => {
            unseen.push(format!(
                "ipsets: starting ipset: {error}; install it to look at them"
            ));
            BTreeSet::new()
        }
    }
}

fn files() -> BTreeSet<PathBuf> {
    let all = PRODUCTS.iter().flat_map(|product| product.files).map(Path::new);
    all.filter(|file| file.exists()).map(Path::to_owned).collect()
}

fn routes() -> anyhow::Result<BTreeMap<u8, usize>> {
    let mut counts = BTreeMap::new();
    let mut netlink = Netlink::open()?;
    for sample in [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ] {
        for answer in netlink.batch(&[requests::list_routes(sample)])? {
            if let RouteNetlinkMessage::NewRoute(route) = answer {
                *counts.entry(route.header.protocol.into()).or_default() += 1;
            }
        }
    }
    Ok(counts)
}
