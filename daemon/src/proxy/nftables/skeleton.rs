//! The table's fixed part, as nft(8) text: a handful of chains whose number does not grow with that of Services. Pure.
//!
//! Translation happens once for each connection, in `nat` chains; connection tracking does the rest. No packet mark is
//! used: marks are the operator's.

use std::fmt::Write;
use std::net::IpAddr;

use super::elements::digit;
use crate::proxy::Surroundings;
use crate::proxy::netfilter::loopback;
use crate::state::service_port::Family;

/// The table.
pub const TABLE: &str = "sluice-services";

/// An empty chain whose name says which layout the table has; another layout is replaced.
pub const LAYOUT: &str = "layout-1";

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
    text += "  set uplinks { type ifname; }\n";
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
  chain source {}
";
    for family in FAMILIES {
        text += &lookups(&words(family));
    }
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
  chain inside {
    meta l4proto { tcp, udp, sctp } meta nfproto vmap { ipv4 : goto inside4, ipv6 : goto inside6 }
    jump ping
  }
  chain prerouting {
    type nat hook prerouting priority dstnat; policy accept;
    iifname != @uplinks goto inside
    meta l4proto { tcp, udp, sctp } meta nfproto vmap { ipv4 : goto outside4, ipv6 : goto outside6 }
  }
  chain output {
    type nat hook output priority -100; policy accept;
    jump loopback
    goto inside
  }
  # Which endpoint a client of a Service with session affinity was given.
  chain learn { type filter hook postrouting priority mangle; policy accept; }
  chain learn-here { type filter hook input priority mangle; policy accept; }
  # Before the masquerading of what leaves the cluster.
  chain postrouting {
    type nat hook postrouting priority srcnat - 5; policy accept;
    # A pod that connects to itself would answer itself past this host.
    ct status dnat ip saddr . ip daddr @hairpin4 masquerade fully-random
    ct status dnat ip6 saddr . ip6 daddr @hairpin6 masquerade fully-random
    jump source
";
    for family in FAMILIES {
        let Words { digit, ip, .. } = words(family);
        // Replies to what came from elsewhere and goes elsewhere would not come back by this node.
        for protocol in PROTOCOLS {
            let _ = writeln!(
                text,
                "    meta l4proto {protocol} ct status dnat ct original {ip} daddr . meta l4proto . ct original proto-dst \
                 @external{digit} {ip} saddr != @own{digit} fib saddr type != local {ip} daddr != @own{digit} \
                 masquerade fully-random"
            );
        }
    }
    text + "  }\n}\n"
}

fn sets(words: &Words) -> String {
    let Words {
        digit, ip, address, ..
    } = words;
    let frontend = format!("{address} . inet_proto . inet_service");
    // A number has no type by name, so the parts are named by examples.
    format!(
        "
  set own{digit} {{ type {address}; flags interval; }}
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
    // The same for both; which map decides is what differs.
    let common = format!(
        "    {frontend} @restricted{digit} {frontend} . {ip} saddr != @sources{digit} drop
    dnat {ip} to {ip} saddr . {frontend} map @affinity{digit}
"
    );
    format!(
        "
  chain inside{digit} {{
{common}    {frontend} vmap @inside{digit}
    {ip} daddr @clusterips{digit} goto refuse
  }}
  chain outside{digit} {{
{common}    {frontend} vmap @outside{digit}
  }}
"
    )
}

fn frontend(ip: &str) -> String {
    format!("{ip} daddr . meta l4proto . th dport")
}

/// What of the table depends on the node.
pub fn surroundings(node: &Surroundings) -> String {
    let mut text = format!(
        "flush set inet {TABLE} uplinks\nflush chain inet {TABLE} ping\nflush chain inet {TABLE} source\n"
    );
    for device in &node.devices {
        let _ = writeln!(text, "add element inet {TABLE} uplinks {{ \"{}\" }}", device.name);
    }
    for family in FAMILIES {
        let Words { digit, ip, icmp, .. } = words(family);
        let _ = writeln!(text, "flush set inet {TABLE} own{digit}");
        for network in node
            .own_networks
            .iter()
            .filter(|network| Family::of(network.ip()) == family)
        {
            let _ = writeln!(text, "add element inet {TABLE} own{digit} {{ {network} }}");
        }
        let address: Option<&IpAddr> = node
            .node_addresses
            .iter()
            .find(|address| Family::of(**address) == family);
        let client = loopback::client(family);
        let _ = writeln!(
            text,
            "add rule inet {TABLE} source oifname \"{}\" snat {ip} to {client}",
            loopback::NEAR
        );
        if let Some(address) = address {
            let _ = writeln!(
                text,
                "add rule inet {TABLE} source {ip} saddr {client} snat {ip} to {address}"
            );
        }
        if let (true, Some(address)) = (node.ping, address) {
            let _ = writeln!(
                text,
                "add rule inet {TABLE} ping {icmp} type echo-request {ip} daddr @ready{digit} dnat {ip} to {address}\n\
                 add rule inet {TABLE} ping {icmp} type echo-request {ip} daddr @clusterips{digit} goto unreachable"
            );
        }
    }
    text
}
