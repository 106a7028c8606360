//! For nft(8), as `nft list ruleset` shows it beside kube-proxy 1.34: verdict maps lead to the Services' chains, and those to their
//! endpoints'; what has no endpoint or is closed to a client is looked for in filter chains.

use std::fmt::Write as _;

use super::ServicePort;

/// The network of pods: who connects from elsewhere is masqueraded.
const PODS: &str = "10.128.0.0/9";

/// What stands in the table whatever the Services, under kube-proxy's names.
const FIXED: &str = "
  set cluster-ips { type ipv4_addr; }
  set nodeport-ips { type ipv4_addr; }
  map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
  map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
  map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
  map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
  map service-nodeports { type inet_proto . inet_service : verdict; }
  chain nodeport-endpoints-check { ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }
  chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
  chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
  chain cluster-ips-check { ip daddr @cluster-ips reject; }
  chain services {
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }
  chain masquerading {
    meta mark & 0x4000 == 0 return
    meta mark set meta mark ^ 0x4000
    masquerade fully-random
  }
  chain mark-for-masquerade { meta mark set meta mark | 0x4000; }
  chain filter-prerouting-pre-dnat {
    type filter hook prerouting priority dstnat - 10; policy accept;
    ct state new jump firewall-check
  }
  chain filter-output-pre-dnat {
    type filter hook output priority -110; policy accept;
    ct state new jump firewall-check
  }
  chain filter-input {
    type filter hook input priority filter; policy accept;
    ct state new jump nodeport-endpoints-check
    ct state new jump service-endpoints-check
  }
  chain filter-forward {
    type filter hook forward priority filter; policy accept;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }
  chain filter-output {
    type filter hook output priority filter; policy accept;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }
  chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
  chain nat-output { type nat hook output priority -100; policy accept; jump services; }
  chain nat-postrouting { type nat hook postrouting priority srcnat; policy accept; jump masquerading; }
";

/// The whole table.
pub fn all(ports: &[ServicePort]) -> String {
    let mut text = format!("table ip chains {{{FIXED}");
    for port in ports {
        let name = &port.name;
        for (endpoint, _) in &port.endpoints {
            let _ = writeln!(text, "chain e{name}-{endpoint} {{ }}");
        }
        let _ = writeln!(text, "chain s{name} {{ }}");
        if port.node_port.is_some() {
            let _ = writeln!(
                text,
                "chain x{name} {{ jump mark-for-masquerade; goto s{name}; }}"
            );
        }
    }
    text += "}\n";
    for port in ports {
        let ServicePort {
            name,
            protocol,
            frontend,
            ..
        } = port;
        for (endpoint, _) in &port.endpoints {
            put_endpoint(&mut text, port, endpoint);
        }
        put_service(&mut text, port);
        let (address, number) = (frontend.ip(), frontend.port());
        let _ = writeln!(
            text,
            "add element ip chains service-ips {{ {address} . {protocol} . {number} : goto s{name} }}\n\
             add element ip chains cluster-ips {{ {address} }}"
        );
        if let Some(node_port) = port.node_port {
            let (address, number) = (node_port.ip(), node_port.port());
            let _ = writeln!(
                text,
                "add element ip chains service-nodeports {{ {protocol} . {number} : goto x{name} }}\n\
                 add element ip chains nodeport-ips {{ {address} }}"
            );
        }
    }
    text
}

/// The Service's own chain anew, and its first endpoint's, which is new.
pub fn one(port: &ServicePort) -> String {
    let name = &port.name;
    let mut text = String::new();
    if let Some((endpoint, _)) = port.endpoints.first() {
        let _ = writeln!(text, "add chain ip chains e{name}-{endpoint}");
        put_endpoint(&mut text, port, endpoint);
    }
    let _ = writeln!(text, "flush chain ip chains s{name}");
    put_service(&mut text, port);
    text
}

fn put_endpoint(text: &mut String, port: &ServicePort, endpoint: &str) {
    let Some((_, at)) = port.endpoints.iter().find(|(name, _)| name == endpoint) else {
        return;
    };
    let chain = format!("ip chains e{}-{endpoint}", port.name);
    let _ = writeln!(
        text,
        "add rule {chain} ip saddr {} jump mark-for-masquerade\n\
         add rule {chain} meta l4proto {} dnat to {at}",
        at.ip(),
        port.protocol,
    );
}

fn put_service(text: &mut String, port: &ServicePort) {
    let name = &port.name;
    let picks: Vec<String> = port
        .endpoints
        .iter()
        .enumerate()
        .map(|(place, (endpoint, _))| format!("{place} : goto e{name}-{endpoint}"))
        .collect();
    let _ = writeln!(
        text,
        "add rule ip chains s{name} ip daddr {} {} dport {} ip saddr != {PODS} jump mark-for-masquerade\n\
         add rule ip chains s{name} numgen random mod {} vmap {{ {} }}",
        port.frontend.ip(),
        port.protocol,
        port.frontend.port(),
        picks.len(),
        picks.join(", ")
    );
}
