//! Runs iptables: the thin side.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, bail};
use ipnetwork::IpNetwork;

use crate::address::Family;

/// How long iptables waits for another of its kind to be done, in seconds.
const WAIT: &str = "5";

/// One flavour of iptables for one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    name: &'static str,
    family: Family,
    /// For the legacy flavour: where the kernel lists the tables that exist.
    tables: Option<&'static str>,
}

const TOOLS: [Tool; 4] = [
    Tool {
        name: "iptables-nft",
        family: Family::V4,
        tables: None,
    },
    Tool {
        name: "ip6tables-nft",
        family: Family::V6,
        tables: None,
    },
    Tool {
        name: "iptables-legacy",
        family: Family::V4,
        tables: Some("/proc/net/ip_tables_names"),
    },
    Tool {
        name: "ip6tables-legacy",
        family: Family::V6,
        tables: Some("/proc/net/ip6_tables_names"),
    },
];

/// The tools that are installed and whose tables exist. Listing with the legacy flavour would make its tables, and a
/// host with both flavours at work is a puzzle for its operator; the other one makes nothing by listing.
pub fn in_use() -> impl Iterator<Item = Tool> {
    TOOLS.into_iter().filter(|tool| tool.is_in_use())
}

impl Tool {
    /// What it is called.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Whether it filters packets of this network.
    pub fn carries(self, cidr: &IpNetwork) -> bool {
        Family::of(cidr.ip()) == self.family
    }

    fn is_in_use(self) -> bool {
        match self.tables {
            Some(path) => {
                fs::read_to_string(path).is_ok_and(|tables| tables.lines().any(|table| table == "filter"))
            }
            None => Command::new(self.name)
                .arg("--version")
                .output()
                .is_ok_and(|answer| answer.status.success()),
        }
    }

    /// The rules of `chain`, as `iptables -S` writes them.
    pub fn list(self, chain: &str) -> anyhow::Result<String> {
        let arguments = ["--wait", WAIT, "-S", chain];
        let answer = Command::new(self.name).args(arguments).output();
        let answer = checked(
            answer.with_context(|| format!("starting {}", self.name))?,
            self.name,
            &arguments,
        )?;
        Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
    }

    /// Feeds `script` to the tool's `-restore`, which applies all of it or nothing.
    pub fn restore(self, script: &str) -> anyhow::Result<()> {
        let name = format!("{}-restore", self.name);
        let arguments = ["--noflush", "--wait", WAIT];
        let mut child = Command::new(&name)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin
                .write_all(script.as_bytes())
                .with_context(|| format!("writing to {name}"))?;
        }
        let answer = child
            .wait_with_output()
            .with_context(|| format!("waiting for {name}"))?;
        checked(answer, &name, &arguments).map(|_| ())
    }
}

fn checked(answer: Output, name: &str, arguments: &[&str]) -> anyhow::Result<Output> {
    if !answer.status.success() {
        let said = String::from_utf8_lossy(&answer.stderr);
        bail!(
            "letting pods through the host's FORWARD chain: {name} {}: {}; accept traffic from and to clusterCIDRs there",
            arguments.join(" "),
            said.trim()
        );
    }
    Ok(answer)
}
