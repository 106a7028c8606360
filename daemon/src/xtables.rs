//! Runs iptables, in either flavour, for either family: the thin side of whoever has rules there.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, bail};
use ipnetwork::IpNetwork;

use crate::address::Family;

/// How long iptables waits for another of its kind to be done with the lock they share, in seconds.
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
        tables: Some("/proc/thread-self/net/ip_tables_names"),
    },
    Tool {
        name: "ip6tables-legacy",
        family: Family::V6,
        tables: Some("/proc/thread-self/net/ip6_tables_names"),
    },
];

/// The tools that are installed and whose tables exist. Listing with the legacy flavour would make its tables, and a
/// host with both flavours at work is a puzzle for its operator; the other one makes nothing by listing.
pub fn in_use() -> impl Iterator<Item = Tool> {
    with_table("filter")
}

/// Of those the ones whose `table` exists.
pub fn with_table(table: &str) -> impl Iterator<Item = Tool> {
    TOOLS.into_iter().filter(move |tool| match tool.tables {
        Some(_) => tool.has_table(table),
        None => tool.is_installed(),
    })
}

/// The tools that show rules which others may have left: of the legacy flavour those for whose family any table exists.
pub fn with_tables() -> impl Iterator<Item = Tool> {
    TOOLS.into_iter().filter(|tool| match tool.tables {
        Some(tables) => fs::read_to_string(tables).is_ok_and(|tables| !tables.trim().is_empty()),
        None => tool.is_installed(),
    })
}

/// The tool whose `nat` table rules are to be in: the flavour that has the chain `ours` already, or the legacy one where that table
/// is in use, so that no second flavour comes to the host; else that of nf_tables where the kernel has it; else the
/// legacy one.
///
/// # Errors
/// Neither is installed and works; with what the last one said.
pub fn of_host(family: Family, ours: &str) -> anyhow::Result<Tool> {
    let [nft, legacy] = match family {
        Family::V4 => [TOOLS[0], TOOLS[2]],
        Family::V6 => [TOOLS[1], TOOLS[3]],
    };
    let has = |tool: Tool, chain| tool.list("nat", chain).is_ok();
    // To ask the legacy tool would make its table.
    let legacy_in_use = legacy.has_table("nat") && legacy.is_installed();
    let prefers_legacy = legacy_in_use && (has(legacy, ours) || !has(nft, ours));
    if !prefers_legacy && has(nft, "PREROUTING") {
        return Ok(nft);
    }
    legacy.list("nat", "PREROUTING")?;
    Ok(legacy)
}

impl Tool {
    /// What it is called.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Whose packets it filters.
    pub fn family(self) -> Family {
        self.family
    }

    /// Whether it filters packets of this network.
    pub fn carries(self, cidr: &IpNetwork) -> bool {
        Family::of(cidr.ip()) == self.family
    }

    /// Whether this table of the legacy flavour exists.
    pub fn has_table(self, table: &str) -> bool {
        let tables = self.tables.map(fs::read_to_string);
        tables.is_some_and(|tables| tables.is_ok_and(|tables| tables.lines().any(|found| found == table)))
    }

    /// Whether it can be started.
    pub fn is_installed(self) -> bool {
        let answer = Command::new(self.name).arg("--version").output();
        answer.is_ok_and(|answer| answer.status.success())
    }

    /// The rules of a table's `chain`, as `iptables -S` writes them.
    pub fn list(self, table: &str, chain: &str) -> anyhow::Result<String> {
        run(self.name, &["--wait", WAIT, "-t", table, "-S", chain])
    }

    /// A whole table, as `iptables-save` writes it.
    pub fn save(self, table: &str) -> anyhow::Result<String> {
        run(&format!("{}-save", self.name), &["-t", table])
    }

    /// All tables that exist, as `iptables-save` writes them.
    pub fn save_all(self) -> anyhow::Result<String> {
        run(&format!("{}-save", self.name), &[])
    }

    /// Feeds `script` to the tool's `-restore`, which applies all of a table or nothing of it.
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
        let written = child
            .stdin
            .take()
            .map(|mut stdin| stdin.write_all(script.as_bytes()));
        let answer = child
            .wait_with_output()
            .with_context(|| format!("waiting for {name}"))?;
        // One that gives up before it has read all, as for want of the lock, says why itself.
        checked(answer, &name, &arguments)?;
        written
            .transpose()
            .with_context(|| format!("writing to {name}"))
            .map(|_| ())
    }
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let answer = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("starting {program}"))?;
    let answer = checked(answer, program, arguments)?;
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

fn checked(answer: Output, program: &str, arguments: &[&str]) -> anyhow::Result<Output> {
    if !answer.status.success() {
        let said = String::from_utf8_lossy(&answer.stderr);
        bail!("{program} {}: {}", arguments.join(" "), said.trim());
    }
    Ok(answer)
}
