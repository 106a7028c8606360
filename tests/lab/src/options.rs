//! What a lab can be asked to be. Only the words; what follows from them is in [`crate::plan`].

use std::fmt;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// What a lab can be asked to be.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct Options {
    /// The lab's name; labs of different names live side by side
    #[arg(long, default_value = "lab")]
    pub name: String,
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=80))]
    pub nodes: u8,
    /// One switch, or two subnets with a router between them (nodes alternate)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub subnets: u8,
    /// Address families of nodes, pods and Services
    #[arg(long, value_enum, default_value_t)]
    pub families: Families,
    /// How pod traffic reaches another node
    #[arg(long, value_enum, default_value_t)]
    pub backend: Backend,
    /// Which dataplane translates Service addresses
    #[arg(long, value_enum, default_value_t)]
    pub proxy: ProxyMode,
    /// Where the nodes take their desired state from
    #[arg(long, value_enum, default_value_t)]
    pub datastore: Datastore,
    /// Real Kubernetes nodes: a kubelet and containerd on each, and Sluice as a DaemonSet
    #[arg(long)]
    pub kubelets: bool,
    /// The nodes alone: nothing of Sluice is installed or started
    #[arg(long)]
    pub bare: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "lab".to_owned(),
            nodes: 3,
            subnets: 1,
            families: Families::default(),
            backend: Backend::default(),
            proxy: ProxyMode::default(),
            datastore: Datastore::default(),
            kubelets: false,
            bare: false,
        }
    }
}

impl Options {
    /// Refuses what no lab can be.
    ///
    /// # Errors
    /// What is wrong and what would be right.
    pub fn check(&self) -> Result<()> {
        check_name("lab name", &self.name)?;
        if !(1..=80).contains(&self.nodes) {
            bail!("{} nodes; 1 to 80 are wanted", self.nodes);
        }
        if !(1..=2).contains(&self.subnets) {
            bail!("{} subnets; 1 or 2 are wanted", self.subnets);
        }
        if self.kubelets && self.datastore != Datastore::Kubernetes {
            bail!("kubelets want an API server; say --datastore kubernetes too");
        }
        Ok(())
    }
}

/// Names become folders, cgroups and interfaces: only what is safe as all of these passes.
///
/// # Errors
/// The name, and what would be right.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let fits = !name.is_empty()
        && name.len() <= 40
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if !fits {
        bail!("{what} {name:?}: 1 to 40 lower-case letters, digits and inner '-' are wanted");
    }
    Ok(())
}

/// Address families of nodes, pods and Services.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both.
    #[default]
    Dual,
}

impl Families {
    /// Whether IPv4 is among them.
    #[must_use]
    pub fn v4(self) -> bool {
        self != Self::V6
    }

    /// Whether IPv6 is among them.
    #[must_use]
    pub fn v6(self) -> bool {
        self != Self::V4
    }
}

/// How pod traffic reaches another node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Direct inside a subnet, vxlan across.
    #[default]
    Auto,
    /// An overlay between all nodes.
    Vxlan,
    /// Plain routes.
    Direct,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Vxlan => "vxlan",
            Self::Direct => "direct",
        })
    }
}

/// Which dataplane translates Service addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// The best one that works here.
    #[default]
    Auto,
    /// eBPF.
    Ebpf,
    /// nftables.
    Nftables,
    /// iptables.
    Iptables,
    /// None.
    Off,
}

impl fmt::Display for ProxyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Off => "off",
        })
    }
}

/// Where the nodes take their desired state from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Datastore {
    /// A folder of Kubernetes YAML that all nodes share.
    #[default]
    Manifests,
    /// A real kube-apiserver, with etcd behind it, on a host of its own.
    Kubernetes,
    /// A real etcd of three members, each on a host of its own; nodes register there.
    Etcd,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_become_paths_are_refused() {
        for bad in ["", "../x", "a/b", "A", "-a", "a-", "a b", &"a".repeat(41)] {
            assert!(check_name("lab name", bad).is_err(), "{bad:?}");
        }
        assert!(check_name("lab name", "t-restart-1").is_ok());
    }
}
