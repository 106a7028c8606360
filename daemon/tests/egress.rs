//! Masquerading, through nf_tables and on a kernel without: one of which a seccomp filter hides it, from this process's own netlink and
//! from the tools that it starts. The packets are real.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use ebpf_support::neighbour::Neighbour;
use ebpf_support::{Node, empty_folder, ip, on_node};
use nix::libc;
use sluice_daemon::egress::{self, InForce, Masquerade, Outcome};

/// Pods' addresses, which this node has on its loopback for the test's sake, and those of the node and of a host outside.
const POD: [&str; 2] = ["10.244.1.9", "fd10:1::9"];
const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:f::1"];
const OUTSIDE: [&str; 2] = ["198.51.100.7", "2001:db8:f::7"];

/// From now on this thread, and what it starts, has no `NETLINK_NETFILTER`, as on a kernel without nfnetlink.
fn hide_nfnetlink() {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const UNLESS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    // Offsets in `struct seccomp_data`: the call's number at 0, its arguments from 16 on, of which the low half is looked at.
    let steps = [
        step(LOAD, 0, 0),
        step(UNLESS, libc::SYS_socket as u32, 5),
        step(LOAD, 16, 0),
        step(UNLESS, libc::AF_NETLINK as u32, 3),
        step(LOAD, 32, 0),
        step(UNLESS, libc::NETLINK_NETFILTER as u32, 1),
        step(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPROTONOSUPPORT as u32, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program, which outlives the calls.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    };
    assert!(done, "{}", std::io::Error::last_os_error());
}

/// A host outside, and what has this node send to it.
fn outside(node: &Node) -> Neighbour {
    let outside = Neighbour::new(node);
    outside.join("uplink", "eth0");
    for (pod, device) in POD.iter().zip(NODE) {
        ip(&format!("addr add {pod} dev lo"));
        let length = if device.contains(':') { "64 nodad" } else { "24" };
        let (address, flags) = length.split_once(' ').unwrap_or((length, ""));
        ip(format!("addr add {device}/{address} dev uplink {flags}").trim_end());
    }
    outside.run(|| {
        ip("addr add 198.51.100.7/24 dev eth0");
        ip("addr add 2001:db8:f::7/64 dev eth0 nodad");
        ip("route add 10.244.1.0/24 via 198.51.100.1");
        ip("route add fd10:1::/64 via 2001:db8:f::1");
    });
    outside
}

fn wanted() -> Masquerade {
    Masquerade {
        sources: vec!["10.244.1.0/24".parse().unwrap(), "fd10:1::/64".parse().unwrap()],
        exempt_networks: vec!["10.244.0.0/16".parse().unwrap()],
        exempt_addresses: BTreeSet::new(),
    }
}

/// A socket of the pod with this address.
fn of_pod(address: &str) -> UdpSocket {
    UdpSocket::bind(SocketAddr::new(address.parse().unwrap(), 0)).unwrap()
}

/// Whom a host outside sees when `pod` sends to it.
fn seen_by(outside: &Neighbour, pod: &UdpSocket, to: &str) -> IpAddr {
    let to: IpAddr = to.parse().unwrap();
    let listener = outside.run(move || UdpSocket::bind((to, 7000)).unwrap());
    listener.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    pod.send_to(b"?", (to, 7000)).unwrap();
    listener.recv_from(&mut [0]).unwrap().1.ip()
}

fn nat(tool: &str) -> String {
    let output = Command::new(tool).args(["-t", "nat"]).output().unwrap();
    assert!(output.status.success(), "{tool}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Makes a pass over the rules, after the one that left `in_force`.
fn apply(wanted: &Masquerade, in_force: &mut Option<InForce>) -> Outcome {
    let applied = egress::apply(wanted.clone(), in_force.take());
    let (left, outcome) = applied.unwrap_or_else(|error| panic!("{error:#}"));
    *in_force = Some(left);
    outcome
}

/// N8
#[test]
fn without_nf_tables_pods_leave_as_their_node_all_the_same() {
    on_node(|node| {
        empty_folder("/run");
        let outside = outside(node);
        hide_nfnetlink();

        let mut wanted = wanted();
        let mut in_force = None;
        assert_eq!(apply(&wanted, &mut in_force), Outcome::Changed);
        for ((pod, outside_address), as_node) in POD.iter().zip(OUTSIDE).zip(NODE) {
            let seen = seen_by(&outside, &of_pod(pod), outside_address);
            assert_eq!(seen, as_node.parse::<IpAddr>().unwrap(), "{pod}");
        }
        assert!(nat("iptables-legacy-save").contains("-j MASQUERADE --random-fully"));
        assert_eq!(apply(&wanted, &mut in_force), Outcome::Unchanged);

        // Nodes see pods' own addresses.
        wanted.exempt_addresses = OUTSIDE.iter().map(|address| address.parse().unwrap()).collect();
        assert_eq!(apply(&wanted, &mut in_force), Outcome::Changed);
        for (pod, outside_address) in POD.iter().zip(OUTSIDE) {
            let seen = seen_by(&outside, &of_pod(pod), outside_address);
            assert_eq!(seen, pod.parse::<IpAddr>().unwrap());
        }

        // What somebody takes away is put back.
        let flush = ["-t", "nat", "-F", "POSTROUTING"];
        assert!(
            Command::new("iptables-legacy")
                .args(flush)
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(apply(&wanted, &mut in_force), Outcome::PutBack);

        let nothing = Masquerade::default();
        assert_eq!(apply(&nothing, &mut in_force), Outcome::Changed);
        for tool in ["iptables-legacy-save", "ip6tables-legacy-save"] {
            assert!(!nat(tool).contains("SLUICE"), "{}", nat(tool));
        }
        assert!(!egress::iptables::remove().unwrap());
    });
}

fn nft(command: &str) {
    let output = Command::new("nft").arg(command).output().unwrap();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {wrong}");
}

/// N8
#[test]
fn what_others_change_is_put_back_and_who_left_meanwhile_leaves_as_the_node() {
    on_node(|node| {
        let outside = outside(node);
        let mut wanted = wanted();
        wanted.exempt_addresses = ["192.0.2.9".parse().unwrap(), "2001:db8::9".parse().unwrap()].into();
        let mut in_force = None;
        assert_eq!(apply(&wanted, &mut in_force), Outcome::Changed);
        // Connections are followed while anybody has rules that ask for it: the Services have, on a node.
        nft("add table inet services");
        nft("add chain inet services output { type filter hook output priority 0; }");
        nft("add rule inet services output ct state new");
        let parsed = |all: [&str; 2]| all.map(|address| address.parse::<IpAddr>().unwrap());
        let (pods, nodes, pods_own) = (POD.map(of_pod), parsed(NODE), parsed(POD));
        for ((pod, to), node) in pods.iter().zip(OUTSIDE).zip(nodes) {
            assert_eq!(seen_by(&outside, pod, to), node);
        }
        // The kernel lets nobody change the sets.
        for harm in [
            "delete table inet sluice-egress",
            "flush chain inet sluice-egress postrouting",
            "insert rule inet sluice-egress postrouting accept",
        ] {
            nft(harm);
            let pods = POD.map(of_pod);
            let before: Vec<_> = pods
                .iter()
                .zip(OUTSIDE)
                .map(|(pod, to)| seen_by(&outside, pod, to))
                .collect();
            assert_eq!(before, pods_own, "{harm}");
            assert_eq!(apply(&wanted, &mut in_force), Outcome::PutBack, "{harm}");
            for ((pod, to), node) in pods.iter().zip(OUTSIDE).zip(nodes) {
                assert_eq!(seen_by(&outside, pod, to), node, "{harm}");
            }
            assert_eq!(apply(&wanted, &mut in_force), Outcome::Unchanged, "{harm}");
        }
    });
}
