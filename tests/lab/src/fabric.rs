//! The lab's network: a switch for each subnet, a router that has a leg in each, a cable to every host.
//!
//! Addresses are given without duplicate address detection: nothing here waits for a link to settle.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::options::Options;
use crate::plan::{self, Host};
use crate::state::Process;

/// Builds switches and router in the fabric's namespace.
pub fn build(fabric: Process, options: &Options) -> Result<()> {
    // A router whose link-local address is still being checked for duplicates asks for no neighbour.
    let settings = [
        "net/ipv6/conf/default/accept_dad=0",
        "net/ipv4/ip_forward=1",
        "net/ipv6/conf/all/forwarding=1",
    ];
    set(fabric, &settings)?;
    let mut lines = String::new();
    for subnet in 0..options.subnets {
        let bridge = bridge(subnet);
        lines += &format!(
            "link add {bridge} mtu {} type bridge forward_delay 0 mcast_snooping 0\n",
            plan::MTU
        );
        lines += &format!("link set {bridge} up\n");
        for gateway in plan::gateways(options.families, subnet) {
            lines += &address_line(gateway, &bridge);
        }
    }
    ip_batch(fabric, &lines).context("building the switches")
}

/// Plugs a host in: its end is `eth0`, the fabric's has the host's name.
pub fn plug(fabric: Process, host: &Host, init: Process, options: &Options) -> Result<()> {
    let bridge = bridge(host.subnet);
    let name = &host.name;
    let cable = format!(
        "link add {name} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pid}\n\
         link set {name} master {bridge} up\n",
        mtu = plan::MTU,
        pid = init.pid
    );
    ip_batch(fabric, &cable).with_context(|| format!("plugging {name} into the switch"))?;
    // On this link alone: pods' links are to be as the node makes them.
    set(init, &["net/ipv6/conf/eth0/accept_dad=0"])?;
    let mut lines = "link set eth0 up\n".to_owned();
    for address in &host.addresses {
        lines += &address_line(*address, "eth0");
    }
    for gateway in plan::gateways(options.families, host.subnet) {
        lines += &format!("route add default via {gateway} dev eth0\n");
    }
    ip_batch(init, &lines).with_context(|| format!("giving {name} its addresses"))
}

fn bridge(subnet: u8) -> String {
    format!("br{subnet}")
}

fn address_line(address: std::net::IpAddr, device: &str) -> String {
    let nodad = if address.is_ipv6() { " nodad" } else { "" };
    format!(
        "addr add {address}/{} dev {device}{nodad}\n",
        plan::prefix(address)
    )
}

/// Writes kernel settings, each as `path=value`.
fn set(process: Process, settings: &[&str]) -> Result<()> {
    let script = "for s; do echo ${s#*=} > /proc/sys/${s%=*} || exit 1; done";
    let command = [&["sh", "-c", script, "set"], settings].concat();
    in_netns(process, &command, None, "writing kernel settings")
}

fn ip_batch(process: Process, lines: &str) -> Result<()> {
    in_netns(
        process,
        &["ip", "-batch", "-"],
        Some(lines),
        "ip (package iproute2)",
    )
}

/// Runs a command of the machine in the network namespace of a member. The file systems stay the machine's, and
/// process numbers too, so that `netns PID` can name another member.
fn in_netns(process: Process, command: &[&str], stdin: Option<&str>, what: &str) -> Result<()> {
    let mut child = Command::new("nsenter")
        .arg(format!("--net=/proc/{}/ns/net", process.pid))
        .arg("--")
        .args(command)
        .stdin(if stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("running nsenter (package util-linux)")?;
    if let (Some(mut pipe), Some(text)) = (child.stdin.take(), stdin) {
        // A command that ended early says why on stderr; a broken pipe here would only hide it.
        let _ = pipe.write_all(text.as_bytes());
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("waiting for {what}"))?;
    if !output.status.success() {
        bail!(
            "{what}: {}; it was to do:\n{}",
            String::from_utf8_lossy(&output.stderr).trim(),
            stdin.map_or_else(|| command.join(" "), str::to_owned)
        );
    }
    Ok(())
}
