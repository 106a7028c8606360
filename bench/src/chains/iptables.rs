//! For iptables-restore(8), as iptables-save(8) shows it beside kube-proxy 1.34, but without what counts in nfacct: a rule for each Service
//! in one chain, walked until one fits.

use std::fmt::Write as _;

use super::ServicePort;

/// Table `filter`, whatever the Services.
const FILTER: &str = "*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

/// The tables `filter` and `nat`.
pub fn all(ports: &[ServicePort]) -> String {
    let mut chains = "*nat\n\
         :KUBE-SERVICES - [0:0]\n\
         :KUBE-NODEPORTS - [0:0]\n\
         :KUBE-MARK-MASQ - [0:0]\n\
         :KUBE-POSTROUTING - [0:0]\n"
        .to_owned();
    let mut rules = "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n"
        .to_owned();
    for port in ports {
        let ServicePort {
            name,
            protocol,
            frontend,
            ..
        } = port;
        let (address, number) = (frontend.ip(), frontend.port());
        let _ = writeln!(chains, ":KUBE-SVC-{name} - [0:0]");
        let _ = writeln!(
            rules,
            "-A KUBE-SERVICES -d {address}/32 -p {protocol} -m comment --comment \"default/s{name} cluster IP\" -m {protocol} --dport {number} -j KUBE-SVC-{name}"
        );
        if let Some(node_port) = port.node_port.map(|address| address.port()) {
            let _ = writeln!(chains, ":KUBE-EXT-{name} - [0:0]");
            let _ = writeln!(
                rules,
                "-A KUBE-NODEPORTS -p {protocol} -m comment --comment \"default/s{name}\" -m {protocol} --dport {node_port} -j KUBE-EXT-{name}\n\
                 -A KUBE-EXT-{name} -m comment --comment \"masquerade traffic for default/s{name} external destinations\" -j KUBE-MARK-MASQ\n\
                 -A KUBE-EXT-{name} -j KUBE-SVC-{name}"
            );
        }
        put_service(&mut chains, &mut rules, port);
    }
    // As in kube-proxy the last, so that a node port is looked for when no Service has taken the packet.
    rules += "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n";
    FILTER.to_owned() + &chains + &rules + "COMMIT\n"
}

/// As in kube-proxy's partial sync: the chains of the one Service.
pub fn one(port: &ServicePort) -> String {
    let (mut chains, mut rules) = (format!("*nat\n:KUBE-SVC-{} - [0:0]\n", port.name), String::new());
    put_service(&mut chains, &mut rules, port);
    chains + &rules + "COMMIT\n"
}

fn put_service(chains: &mut String, rules: &mut String, port: &ServicePort) {
    let ServicePort {
        name,
        protocol,
        frontend,
        endpoints,
        ..
    } = port;
    let comment = format!("-m comment --comment \"default/s{name}\"");
    let _ = writeln!(
        rules,
        "-A KUBE-SVC-{name} ! -s 10.128.0.0/9 -d {}/32 -p {protocol} {comment} -m {protocol} --dport {} -j KUBE-MARK-MASQ",
        frontend.ip(),
        frontend.port(),
    );
    for (place, (endpoint, at)) in endpoints.iter().enumerate() {
        let pick = match endpoints.len() - place {
            1 => String::new(),
            left => format!(
                "-m statistic --mode random --probability {:.11} ",
                1.0 / left as f64
            ),
        };
        let _ = writeln!(chains, ":KUBE-SEP-{name}-{endpoint} - [0:0]");
        let _ = writeln!(
            rules,
            "-A KUBE-SVC-{name} {comment} {pick}-j KUBE-SEP-{name}-{endpoint}\n\
             -A KUBE-SEP-{name}-{endpoint} -s {}/32 {comment} -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{name}-{endpoint} -p {protocol} {comment} -m {protocol} -j DNAT --to-destination {at}",
            at.ip()
        );
    }
}
