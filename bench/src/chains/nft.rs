//! For nft(8): verdict maps lead to the Services' chains, and those to their endpoints'.

use std::fmt::Write as _;

use super::ServicePort;

/// Marks what is masqueraded on its way out; kube-proxy's default.
const MARK: &str = "0x4000";
/// The network of pods: who connects from elsewhere is masqueraded.
const PODS: &str = "10.128.0.0/9";

/// The whole table.
pub fn all(ports: &[ServicePort]) -> String {
    let mut text = format!(
        "table ip chains {{\n\
         map services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}\n\
         map nodeports {{ type inet_proto . inet_service : verdict; }}\n\
         chain mark-masq {{ meta mark set meta mark or {MARK}; }}\n\
         chain postrouting {{\n\
         type nat hook postrouting priority 100;\n\
         meta mark & {MARK} == 0 return;\n\
         meta mark set meta mark xor {MARK};\n\
         masquerade fully-random;\n\
         }}\n\
         chain services {{\n\
         ip daddr . meta l4proto . th dport vmap @services;\n\
         ip daddr != 127.0.0.0/8 fib daddr type local meta l4proto . th dport vmap @nodeports;\n\
         }}\n\
         chain output {{ type nat hook output priority -100; jump services; }}\n\
         chain prerouting {{ type nat hook prerouting priority -100; jump services; }}\n"
    );
    for port in ports {
        let name = &port.name;
        for (endpoint, _) in &port.endpoints {
            let _ = writeln!(text, "chain e{name}-{endpoint} {{ }}");
        }
        let _ = writeln!(text, "chain s{name} {{ }}");
        if port.node_port.is_some() {
            let _ = writeln!(text, "chain x{name} {{ jump mark-masq; goto s{name}; }}");
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
            "add element ip chains services {{ {address} . {protocol} . {number} : goto s{name} }}"
        );
        if let Some(node_port) = port.node_port {
            let _ = writeln!(
                text,
                "add element ip chains nodeports {{ {protocol} . {node_port} : goto x{name} }}"
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
        "add rule {chain} ip saddr {} jump mark-masq\n\
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
        "add rule ip chains s{name} ip daddr {} {} dport {} ip saddr != {PODS} jump mark-masq\n\
         add rule ip chains s{name} numgen random mod {} vmap {{ {} }}",
        port.frontend.ip(),
        port.protocol,
        port.frontend.port(),
        picks.len(),
        picks.join(", ")
    );
}
