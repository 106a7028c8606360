//! What on the host gets in Sluice's way and is not Sluice's to change: another CNI plugin, kube-proxy, a firewall that
//! drops, two flavours of iptables at once. Found, said, and left to the operator.
//!
//! [`look`] asks the host; [`Findings::obstacles`] is the pure judgement; [`watch`] does it again and again.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use sluice_cni::names::CONFLIST;

use self::products::{KUBE_PROXY, PRODUCTS, Product, fits_any};

pub mod nft;
pub mod products;
pub mod watch;

/// kube-proxy's entrance in the nat table, whichever flavour it uses.
const KUBE_PROXY_CHAIN: &str = "KUBE-SERVICES";

/// What was found on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// Names of the files beside Sluice's conflist that a runtime would read.
    pub conflists: BTreeSet<String>,
    /// Names of all network devices.
    pub devices: BTreeSet<String>,
    /// In which tools' nat tables kube-proxy's chain was found.
    pub kube_proxy: Vec<&'static str>,
    /// kube-proxy's tables of nftables, family first.
    pub kube_proxy_tables: Vec<String>,
    /// nftables chains that drop what is forwarded unless somebody lets it through, as `family table chain`.
    pub dropping_chains: Vec<String>,
    /// Whether rules stand in both flavours of iptables.
    pub two_flavours: bool,
}

impl Findings {
    /// What gets in the way, one sentence each with what to do. `proxies`: whether Sluice serves Services here.
    pub fn obstacles(&self, proxies: bool) -> Vec<String> {
        let mut list = Vec::new();
        for product in PRODUCTS
            .iter()
            .filter(|product| proxies || product.name != KUBE_PROXY)
        {
            let found = self.devices.iter().find(|name| fits_any(product.devices, name));
            if let Some(device) = found {
                let whose = product.name;
                list.push(format!(
                    "the device {device} is {whose}'s, which is or was at work here; remove {whose} from this node, \
                     or if it is gone already what it left: sluicectl doctor says how"
                ));
            }
        }
        if proxies && !self.kube_proxy.is_empty() {
            list.push(format!(
                "kube-proxy's chain {KUBE_PROXY_CHAIN} stands in the nat table ({}): two translate the same Services; \
                 stop kube-proxy and remove what it left, sluicectl doctor says how, or set proxy.mode to off",
                self.kube_proxy.join(", ")
            ));
        }
        if proxies && !self.kube_proxy_tables.is_empty() {
            list.push(format!(
                "kube-proxy's nftables table stands ({}): two translate the same Services; stop kube-proxy and remove what it \
                 left, sluicectl doctor says how, or set proxy.mode to off",
                self.kube_proxy_tables.join(", ")
            ));
        }
        list.extend(self.conflist_before());
        list.extend(self.firewalls());
        list
    }

    /// The conflist that runtimes take instead of Sluice's.
    pub fn conflist_before(&self) -> Option<String> {
        let own = Path::new(CONFLIST);
        let (folder, own) = (
            own.parent(),
            own.file_name().unwrap_or_default().to_string_lossy(),
        );
        // Runtimes take the first file by name.
        let first = self.conflists.iter().find(|name| ***name < *own)?;
        let folder = folder.unwrap_or(Path::new("/")).display();
        Some(format!(
            "{folder}/{first} comes before {own}, and runtimes take the first: pods are wired by it; remove it"
        ))
    }

    /// The host's own firewalls, where they are in the way.
    pub fn firewalls(&self) -> Vec<String> {
        let mut list = Vec::new();
        list.extend(self.dropping_chains.iter().map(|chain| {
            format!(
                "the nftables chain {chain} drops what is forwarded, and no other chain can overrule it; accept \
                 traffic from and to clusterCIDRs in it"
            )
        }));
        if self.two_flavours {
            list.push(
                "rules stand in both flavours of iptables, legacy and nft, and the kernel goes through both; see \
                 iptables-legacy-save and iptables-nft-save, and clear the one that nobody means"
                    .to_owned(),
            );
        }
        list
    }
}

/// Asks the host. Blocks while tools run; what cannot be asked (a tool that is not installed) is not there.
pub fn look() -> Findings {
    let conflists = Path::new(CONFLIST).parent().map(conflists_in).unwrap_or_default();
    let flavours = [("iptables-nft", true), ("iptables-legacy", legacy_in_use())];
    let used: Vec<_> = flavours
        .iter()
        .filter(|(_, used)| *used)
        .map(|(tool, _)| *tool)
        .collect();
    let nftables = nft::look();
    let of_kube_proxy = |product: &&Product| product.name == KUBE_PROXY;
    let kube_proxy_tables = PRODUCTS.iter().find(of_kube_proxy).map(|product| product.tables);
    Findings {
        conflists,
        devices: devices(),
        kube_proxy: used.iter().copied().filter(|tool| has_kube_proxy(tool)).collect(),
        kube_proxy_tables: nftables
            .tables
            .into_iter()
            .filter(|table| fits_any(kube_proxy_tables.unwrap_or_default(), table))
            .collect(),
        dropping_chains: nftables.dropping_chains,
        two_flavours: used.len() == 2 && used.iter().all(|tool| has_rules(tool)),
    }
}

fn conflists_in(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let read_by_runtimes = |name: &String| {
        [".conf", ".conflist", ".json"]
            .iter()
            .any(|end| name.ends_with(end))
    };
    names.filter(read_by_runtimes).collect()
}

/// The names of all network devices, from `/proc/net/dev`, which shows the namespace of whoever reads it (proc_pid_net(5)).
pub fn devices() -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let name = |line: &str| line.split_once(':').map(|(name, _)| name.trim().to_owned());
    table.lines().filter_map(name).collect()
}

/// Whether the legacy flavour has tables: asking the tool itself would make them.
fn legacy_in_use() -> bool {
    fs::read_to_string("/proc/net/ip_tables_names").is_ok_and(|tables| !tables.trim().is_empty())
}

fn has_kube_proxy(tool: &str) -> bool {
    let answer = Command::new(tool)
        .args(["--wait", "5", "-t", "nat", "-S", KUBE_PROXY_CHAIN])
        .output();
    answer.is_ok_and(|answer| answer.status.success())
}

fn has_rules(tool: &str) -> bool {
    let answer = Command::new(format!("{tool}-save")).output();
    // Sluice's own rules follow those that they answer, and are in both flavours only where others' are.
    answer.is_ok_and(|answer| {
        String::from_utf8_lossy(&answer.stdout)
            .lines()
            .any(|line| line.starts_with("-A ") && !line.contains("SLUICE-"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    /// N12
    #[test]
    fn a_host_with_nothing_in_the_way() {
        let findings = Findings {
            conflists: names(&["10-sluice.conflist", "87-podman-bridge.conflist"]),
            devices: names(&["lo", "eth0", "docker0", "sluice-vxlan"]),
            ..Findings::default()
        };
        assert_eq!(findings.obstacles(true), [""; 0]);
    }

    /// N12
    #[test]
    fn each_obstacle_is_named_with_what_to_do() {
        let findings = Findings {
            conflists: names(&["05-cilium.conflist", "10-sluice.conflist"]),
            devices: names(&["lo", "cali1234567890a", "kube-ipvs0"]),
            kube_proxy: vec!["iptables-nft"],
            kube_proxy_tables: vec!["ip kube-proxy".to_owned()],
            dropping_chains: vec!["inet firewalld filter_FORWARD".to_owned()],
            two_flavours: true,
        };
        let list = findings.obstacles(true);
        for wanted in [
            "/etc/cni/net.d/05-cilium.conflist comes before 10-sluice.conflist",
            "the device cali1234567890a is Calico's",
            "the device kube-ipvs0 is kube-proxy's",
            "(iptables-nft): two translate the same Services",
            "nftables table stands (ip kube-proxy): two translate",
            "the nftables chain inet firewalld filter_FORWARD drops",
            "both flavours of iptables",
        ] {
            assert!(
                list.iter().any(|sentence| sentence.contains(wanted)),
                "{wanted:?} is not in {list:#?}"
            );
        }
        let without = findings.obstacles(false);
        assert!(
            !without.iter().any(|sentence| sentence.contains("kube-proxy")),
            "it is wanted then: {without:#?}"
        );
    }
}
