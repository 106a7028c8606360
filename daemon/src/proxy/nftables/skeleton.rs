//! The table's fixed part, as nft(8) text: a handful of chains whose number does not grow with that of Services. Pure.
//!
//! Translation happens once for each connection, in `nat` chains; connection tracking does the rest. No packet mark is
//! used: marks are the operator's.

use std::fmt::{Display, Write};

use super::elements::digit;
use crate::proxy::Surroundings;
use crate::proxy::netfilter::loopback;
use crate::state::service_port::Family;

/// The table.
pub const TABLE: &str = "sluice-services";

/// An empty chain whose name says which layout the table has; another layout is replaced.
pub const LAYOUT: &str = "layout-3";

/// How many clients of Services with session affinity are remembered.
const AFFINITY_ENTRIES: u32 = 262_144;

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];

/// The words that differ between the families.
struct Words {
    digit: u8,
    ip: &'static str,
    address: &'static str,
    icmp: &'static str,
}

fn words(family: Family) -> Words {
    let (ip, address, icmp) = match family {
        Family::V4 => ("ip", "ipv4_addr", "icmp"),
        Family::V6 => ("ip6", "ipv6_addr", "icmpv6"),
    };
    Words {
        digit: digit(family),
        ip,
        address,
        icmp,
    }
}

/// Makes the table anew, in place of whatever has its name.
pub fn table() -> String {
    let mut text = format!("table inet {TABLE} {{}}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    text += &format!("  chain {LAYOUT} {{}}\n");
    for family in FAMILIES {
        text += &sets(&words(family));
    }
    text += "
  # Nobody serves it.
  chain refuse {
    meta l4proto tcp reject with tcp reset
    reject with icmpx port-unreachable
  }
  # What has been pinged has no endpoint.
  chain unreachable { reject with icmpx host-unreachable; }
  # Filled in for the node it is on.
  chain ping {}
  chain leaving4 {}
  chain leaving6 {}
";
    for family in FAMILIES {
        text += &lookups(&words(family));
    }
    text += &format!("  chain inside {{\n{}    jump ping\n  }}\n", by_family("inside"));
    text += &format!("  chain outside {{\n{}  }}\n", by_family("outside"));
    text += "
  # What asks on loopback is led round, and comes back in as a stranger.
  chain loopback {
";
    for family in FAMILIES {
        let Words { digit, ip, .. } = words(family);
        let (frontend, service) = (frontend(ip), loopback::service(family));
        text += &format!("    {frontend} @loopback{digit} dnat {ip} to {service}\n");
    }
    text += "
  }
  # Filled in too: what comes in by an uplink is from outside.
  chain prerouting { type nat hook prerouting priority dstnat; policy accept; }
  chain output {
    type nat hook output priority -100; policy accept;
    jump loopback
    goto inside
  }
  # Before the masquerading of what leaves the cluster.
  chain postrouting {
    type nat hook postrouting priority srcnat - 5; policy accept;
    ct status & dnat == 0 accept
    meta nfproto ipv4 goto leaving4
    goto leaving6
  }
}
";
    text
}

/// Leads on by family what has ports. Comparing with a few is faster than looking up in a set, and most of it is the first.
fn by_family(side: &str) -> String {
    let mut text = String::new();
    for protocol in PROTOCOLS {
        let _ = writeln!(
            text,
            "    meta l4proto {protocol} meta nfproto ipv4 goto {side}4\n    meta l4proto {protocol} goto {side}6"
        );
    }
    text
}

fn sets(words: &Words) -> String {
    let Words {
        digit, ip, address, ..
    } = words;
    let frontend = format!("{address} . inet_proto . inet_service");
    // A number has no type by name, so the parts are named by examples.
    format!(
        "
  map inside{digit} {{ type {frontend} : verdict; }}
  map outside{digit} {{ type {frontend} : verdict; }}
  map endpoints{digit} {{ typeof {ip} daddr . meta l4proto . th dport . numgen inc mod 2 : {ip} daddr . th dport; }}
  set external{digit} {{ type {frontend}; }}
  set clusterips{digit} {{ type {address}; }}
  set ready{digit} {{ type {address}; }}
  set restricted{digit} {{ type {frontend}; }}
  set sources{digit} {{ type {frontend} . {address}; flags interval; }}
  set loopback{digit} {{ type {frontend}; }}
  set hairpin{digit} {{ type {address} . {address}; }}
  map affinity{digit} {{
    type {address} . {frontend} : {address} . inet_service
    flags dynamic, timeout
    size {AFFINITY_ENTRIES}
  }}
"
    )
}

fn lookups(words: &Words) -> String {
    let Words { digit, ip, .. } = words;
    let frontend = frontend(ip);
    format!(
        "
  chain inside{digit} {{
    {frontend} vmap @inside{digit}
    {ip} daddr @clusterips{digit} goto refuse
  }}
  chain outside{digit} {{
    {frontend} vmap @outside{digit}
  }}
  # A pod that connects to itself would answer itself past this host.
  chain hairpin{digit} {{ {ip} saddr . {ip} daddr @hairpin{digit} masquerade; }}
  # Where a Service asks who the client is, on the way to its endpoints.
  chain check{digit} {{
    {frontend} @restricted{digit} {frontend} . {ip} saddr != @sources{digit} drop
    dnat {ip} to {ip} saddr . {frontend} map @affinity{digit}
  }}
"
    )
}

fn frontend(ip: &str) -> String {
    format!("{ip} daddr . meta l4proto . th dport")
}

/// What of the table depends on the node.
pub fn surroundings(node: &Surroundings) -> String {
    let mut rules = Rules::default();
    for device in &node.devices {
        rules.add("prerouting", format!("iifname \"{}\" goto outside", device.name));
    }
    rules.add("prerouting", "goto inside");
    for family in FAMILIES {
        leaving(&mut rules, node, family);
        ping(&mut rules, node, family);
    }
    let flushed = ["prerouting", "leaving4", "leaving6", "ping"];
    let mut text = String::new();
    for chain in flushed {
        let _ = writeln!(text, "flush chain inet {TABLE} {chain}");
    }
    text + &rules.0
}

/// Rules for chains, as text.
#[derive(Default)]
struct Rules(String);

impl Rules {
    fn add(&mut self, chain: &str, rule: impl Display) {
        let _ = writeln!(self.0, "add rule inet {TABLE} {chain} {rule}");
    }
}

/// Which source address it has, what leaves for an endpoint.
fn leaving(rules: &mut Rules, node: &Surroundings, family: Family) {
    let Words { digit, ip, .. } = words(family);
    let chain = format!("leaving{digit}");
    let mut add = |rule: String| rules.add(&chain, rule);
    let own: Vec<_> = node
        .own_networks
        .iter()
        .filter(|network| Family::of(network.ip()) == family)
        .collect();
    // Most come from pods here, and see their replies come back here.
    for network in &own {
        add(format!("{ip} saddr {network} goto hairpin{digit}"));
    }
    add(format!("jump hairpin{digit}"));
    let (client, service) = (loopback::client(family), loopback::service(family));
    add(format!("{ip} daddr {service} snat {ip} to {client}"));
    if let Some(address) = node.node_address(family) {
        add(format!("{ip} saddr {client} snat {ip} to {address}"));
    }
    // Replies to what came from elsewhere and goes elsewhere would not come back by this node. The client's port is kept where it is
    // free: see decision 17.
    for network in &own {
        add(format!("{ip} daddr {network} accept"));
    }
    for protocol in PROTOCOLS {
        add(format!(
            "meta l4proto {protocol} ct original {ip} daddr . meta l4proto . ct original proto-dst @external{digit} \
             fib saddr type != local masquerade"
        ));
    }
}

/// A ClusterIP answers for its endpoints.
fn ping(rules: &mut Rules, node: &Surroundings, family: Family) {
    let Words { digit, ip, icmp, .. } = words(family);
    if let Some(address) = node.node_address(family).filter(|_| node.ping) {
        let asked = format!("{icmp} type echo-request {ip} daddr");
        rules.add("ping", format!("{asked} @ready{digit} dnat {ip} to {address}"));
        rules.add("ping", format!("{asked} @clusterips{digit} goto unreachable"));
    }
}
