//! Programs that people run, talking to each other through Services: nginx and curl, dnsmasq, unbound and dig, iperf3. What they
//! expect of a network is not what a test of ours would think of.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use sluice_lab::{Lab, Node, Options, ProxyMode, url, wait_until};
use sluice_tests::{PATIENCE, addresses};

const WEB: [&str; 2] = ["10.96.1.1", "fd00:96::1:1"];
const NAMES: [&str; 2] = ["10.96.1.2", "fd00:96::1:2"];
const RESOLVER: [&str; 2] = ["10.96.1.3", "fd00:96::1:3"];
const METER: [&str; 2] = ["10.96.1.4", "fd00:96::1:4"];

/// Bytes of the file that nginx serves.
const LARGE: usize = 20_000_000;

fn services() -> String {
    let service = |name: &str, [v4, v6]: [&str; 2], kind: &str, ports: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  type: {kind}\n  clusterIPs: [{v4}, '{v6}']\n  \
             selector: {{app: {name}}}\n  ports: [{ports}]\n---\n"
        )
    };
    let both =
        |port: &str| format!("{{name: tcp, protocol: TCP, {port}}}, {{name: udp, protocol: UDP, {port}}}");
    service(
        "web",
        WEB,
        "NodePort",
        "{port: 80, targetPort: 8080, nodePort: 30080}",
    ) + &service("names", NAMES, "ClusterIP", &both("port: 53"))
        + &service(
            "resolver",
            RESOLVER,
            "ClusterIP",
            &both("port: 53, targetPort: 5353"),
        )
        + &service("meter", METER, "NodePort", &both("port: 5201, nodePort: 30521"))
}

/// `$dir` is the pod's own folder.
fn pod(lab: &Lab, node: &str, name: &str, app: &str, script: &str) {
    let script = format!("dir=/run/pods/{name}; mkdir -p $dir; cd $dir\n{script}");
    let command = ["busybox", "sh", "-ec", &script];
    lab.pod_add(node, name, &[("app", app)], &command).unwrap();
}

fn web(lab: &Lab) {
    let script = format!(
        "busybox head -c {LARGE} /dev/urandom > large
         cat > nginx.conf <<END
         user root; daemon off; pid $dir/pid; error_log stderr;
         events {{ }}
         http {{
           access_log off; client_body_temp_path $dir/body; proxy_temp_path $dir/proxy; fastcgi_temp_path $dir/fastcgi;
           uwsgi_temp_path $dir/uwsgi; scgi_temp_path $dir/scgi;
           server {{
             listen 8080; listen [::]:8080;
             location / {{ return 200 \"\\$remote_addr\\\\n\"; }}
             location /large {{ alias $dir/large; }}
           }}
         }}
END
         exec nginx -p $dir -c $dir/nginx.conf"
    );
    pod(lab, "node2", "web", "web", &script);
}

/// A server whose answer for `who.example` is its own; what it has to say of `much.example` fits into no datagram.
fn names(lab: &Lab, node: &str, name: &str, answer: &str) {
    let much: Vec<String> = (0..20)
        .map(|part| format!("{part}-{}", "x".repeat(200)))
        .collect();
    let script = format!(
        "exec dnsmasq -k -C /dev/null -u root -x '' --no-resolv --no-hosts --log-facility=- --address=/who.example/{answer} \
         --txt-record=much.example,{}",
        much.join(",")
    );
    pod(lab, node, name, "names", &script);
}

/// One that asks the others through their Service, by sockets that are connected, and remembers nothing.
fn resolver(lab: &Lab) {
    let script = format!(
        "cat > unbound.conf <<END
server:
  interface: 0.0.0.0@5353
  interface: ::0@5353
  access-control: 0.0.0.0/0 allow
  access-control: ::0/0 allow
  do-daemonize: no
  username: \"\"
  chroot: \"\"
  directory: $dir
  pidfile: \"\"
  use-syslog: no
  module-config: iterator
  cache-max-ttl: 0
forward-zone:
  name: .
  forward-addr: {}
  forward-addr: {}
remote-control:
  control-enable: no
END
         exec unbound -c $dir/unbound.conf",
        NAMES[0], NAMES[1]
    );
    pod(lab, "node1", "resolver", "resolver", &script);
}

/// The answer for `who.example` of whoever is asked.
fn who(from: &Node<'_>, server: &str, over: &str) -> Result<String> {
    let server = format!("@{server}");
    let asked = [
        "dig",
        &server,
        over,
        "+tries=1",
        "+timeout=2",
        "+short",
        "who.example",
    ];
    Ok(from.run(&asked)?.trim().to_owned())
}

/// Waits until just these answer.
fn wait_for_names(from: &Node<'_>, server: &str, wanted: &[&str]) {
    let wanted: BTreeSet<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
    let come = wait_until(&format!("{server} answers {wanted:?}"), PATIENCE, || {
        let found = (0..20)
            .map(|_| who(from, server, "+notcp"))
            .collect::<Result<BTreeSet<_>>>()?;
        if found != wanted {
            bail!("{found:?} came");
        }
        Ok(true)
    });
    if let Err(error) = come {
        panic!("{error:#}");
    }
}

fn fetched(from: &Node<'_>, host: &str, port: u16, wanted: &str) {
    // Two requests on one connection, and the file on another.
    let page = url(host, port, "");
    let seen = from.run(&["curl", "-sS", "-m", "5", &page, &page]).unwrap();
    assert_eq!(seen.lines().count(), 2, "{seen}");
    let large = url(host, port, "large");
    let sum = from
        .sh(&format!("curl -sS -m 20 '{large}' | busybox sha256sum"))
        .unwrap();
    assert_eq!(sum, wanted, "{large}");
}

/// Bytes a second that one run of iperf3 got through.
fn measured(from: &Node<'_>, host: &str, port: u16, how: &[&str]) -> Result<f64> {
    let port = port.to_string();
    let mut command = vec![
        "timeout", "10", "iperf3", "-J", "-t", "1", "-c", host, "-p", &port,
    ];
    command.extend(how);
    let said = from.exec(&command)?.stdout;
    let said: Value = serde_json::from_slice(&said).context("what iperf3 says")?;
    // Of datagrams it has one sum, of a stream one for each end.
    let sums = ["sum_received", "sum"].map(|sum| said["end"][sum]["bits_per_second"].as_f64());
    match sums.into_iter().flatten().find(|bits| *bits > 0.0) {
        Some(bits) => Ok(bits / 8.0),
        None => bail!("iperf3 {how:?} to {host}: {}", said["error"]),
    }
}

fn measures(from: &Node<'_>, host: &str, port: u16) {
    for how in [&[][..], &["-R"], &["-u", "-b", "20M"], &["-u", "-b", "20M", "-R"]] {
        let went = wait_until(&format!("iperf3 {how:?} to {host}"), PATIENCE, || {
            // The server takes one at a time, and a moment to be done with the last.
            Ok(measured(from, host, port, how)? > 0.0)
        });
        if let Err(error) = went {
            panic!("{error:#}");
        }
    }
}

fn programs_talk(proxy: ProxyMode) {
    let lab = Lab::up(Options {
        proxy,
        ..Options::default()
    })
    .unwrap();
    lab.apply_text(&services()).unwrap();
    web(&lab);
    names(&lab, "node1", "names-1", "192.0.2.101");
    names(&lab, "node2", "names-2", "192.0.2.102");
    resolver(&lab);
    pod(&lab, "node2", "meter", "meter", "exec iperf3 -s");
    lab.pod_add("node1", "near", &[], &[]).unwrap();
    lab.pod_add("node3", "apart", &[], &[]).unwrap();
    let inside = [
        lab.pod("near").unwrap(),
        lab.pod("apart").unwrap(),
        lab.node("node3"),
    ];
    let sum = lab
        .node("node2")
        .sh("busybox sha256sum < /run/pods/web/large")
        .unwrap();

    for from in &inside {
        for family in 0..2 {
            wait_for_names(from, NAMES[family], &["192.0.2.101", "192.0.2.102"]);
            wait_for_names(from, RESOLVER[family], &["192.0.2.101", "192.0.2.102"]);
            assert!(
                who(from, NAMES[family], "+tcp")
                    .unwrap()
                    .starts_with("192.0.2.10")
            );
            let server = format!("@{}", NAMES[family]);
            // Comes as a datagram that says it is not all, and is asked for once more by TCP.
            let much = from
                .run(&["dig", &server, "+short", "much.example", "TXT"])
                .unwrap();
            assert!(much.contains(&format!("19-{}", "x".repeat(200))), "{much}");
            fetched(from, WEB[family], 80, &sum);
        }
    }
    measures(&inside[1], METER[0], 5201);
    measures(&inside[2], METER[1], 5201);
    // From outside by the node that has the endpoint, and by one that has not.
    for node in ["node1", "node2"] {
        for address in addresses(&lab, node).unwrap() {
            fetched(&lab.client(), &address, 30080, &sum);
        }
    }
    measures(&lab.client(), &addresses(&lab, "node1").unwrap()[0], 30521);

    // Whoever asked the one that goes asks the other, the resolver by the sockets it has.
    lab.pod_rm("names-1").unwrap();
    for from in &inside {
        for family in 0..2 {
            wait_for_names(from, RESOLVER[family], &["192.0.2.102"]);
            wait_for_names(from, NAMES[family], &["192.0.2.102"]);
        }
    }
}

/// S1 S2 S13 S16
#[test]
fn programs_talk_through_ebpf() {
    programs_talk(ProxyMode::Ebpf);
}

/// S1 S2 S13 S16
#[test]
fn programs_talk_through_nftables() {
    programs_talk(ProxyMode::Nftables);
}

/// S1 S2 S13 S16
#[test]
fn programs_talk_through_iptables() {
    programs_talk(ProxyMode::Iptables);
}
