//! Rules in the very words of `iptables-save`. Pure.

use std::net::{IpAddr, SocketAddr};

use ipnetwork::IpNetwork;

use crate::state::service_port::Protocol;

/// Whose source becomes the address of the device they leave by; their port is kept where it is free, see decision 17.
pub const MASQUERADE: &str = "-j MASQUERADE";

/// The packets that a rule is about.
pub struct Packet {
    destination: SocketAddr,
    protocol: Protocol,
    source: Option<IpNetwork>,
    /// The device by which they come; none: any.
    pub device: Option<String>,
}

impl Packet {
    /// Those for a frontend.
    pub fn to(destination: SocketAddr, protocol: Protocol) -> Self {
        Self {
            destination,
            protocol,
            source: None,
            device: None,
        }
    }

    /// The rule that sends them to `target`.
    pub fn rule(&self, target: &str) -> String {
        let mut rule = String::new();
        // iptables leaves out what matches everything.
        if let Some(source) = self.source.filter(|source| source.prefix() > 0) {
            rule += &format!("-s {}/{} ", source.network(), source.prefix());
        }
        rule += &format!("-d {} ", host(self.destination.ip()));
        if let Some(device) = &self.device {
            rule += &format!("-i {device} ");
        }
        let (protocol, port) = (words(self.protocol), self.destination.port());
        rule + &format!("-p {protocol} -m {protocol} --dport {port} {target}")
    }

    /// The rules that send those from any of `sources` to each of `targets`.
    pub fn each_source(&mut self, sources: &[IpNetwork], targets: &[String]) -> Vec<String> {
        let mut rules = Vec::new();
        for source in sources {
            self.source = Some(*source);
            rules.extend(targets.iter().map(|target| self.rule(target)));
        }
        self.source = None;
        rules
    }
}

/// How a rule says that it is about packets for `address`: those to its port, and those to any.
pub fn packets_for(address: SocketAddr, protocol: Protocol) -> [String; 2] {
    let rule = Packet::to(address, protocol).rule("");
    [rule.trim_end().to_owned(), format!("-d {}", host(address.ip()))]
}

/// Rules of which each connection takes one, each with the chance its weight gives it.
pub fn picks(targets: impl Iterator<Item = (usize, String)>, protocol: &str) -> Vec<String> {
    /// xt_statistic counts in parts of this.
    const WHOLE: f64 = 2_147_483_648.0;
    let targets: Vec<_> = targets.collect();
    let mut left: usize = targets.iter().map(|(weight, _)| weight).sum();
    let mut rules = Vec::new();
    for (weight, target) in targets {
        if weight == left {
            rules.push(format!("-p {protocol} {target}"));
        } else {
            let chance = (weight as f64 / left as f64 * WHOLE).round() / WHOLE;
            rules.push(format!(
                "-p {protocol} -m statistic --mode random --probability {chance:.11} {target}"
            ));
        }
        left -= weight;
    }
    rules
}

/// A protocol's name.
pub fn words(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// The network of one address.
pub fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(_) => format!("{address}/32"),
        IpAddr::V6(_) => format!("{address}/128"),
    }
}
