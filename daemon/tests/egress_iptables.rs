//! Masquerading on a kernel without nf_tables: one of which a seccomp filter hides it, from this process's own netlink and from the
//! tools that it starts. The packets are real.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use ebpf_support::neighbour::Neighbour;
use ebpf_support::{ip, on_node};
use nix::libc;
use nix::mount::{MsFlags, mount};
use sluice_daemon::egress::{self, Masquerade};

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

/// Whom a host outside sees when the pod's address sends to it.
fn seen_by(outside: &Neighbour, from: &str, to: &str) -> IpAddr {
    let to: IpAddr = to.parse().unwrap();
    let listener = outside.run(move || UdpSocket::bind((to, 7000)).unwrap());
    listener.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let from: IpAddr = from.parse().unwrap();
    let pod = UdpSocket::bind(SocketAddr::new(from, 0)).unwrap();
    pod.send_to(b"?", (to, 7000)).unwrap();
    listener.recv_from(&mut [0]).unwrap().1.ip()
}

fn nat(tool: &str) -> String {
    let output = Command::new(tool).args(["-t", "nat"]).output().unwrap();
    assert!(output.status.success(), "{tool}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn apply(wanted: &Masquerade, known: bool) -> bool {
    egress::apply(wanted, known).unwrap_or_else(|error| panic!("{error:#}"))
}

/// N8
#[test]
fn without_nf_tables_pods_leave_as_their_node_all_the_same() {
    on_node(|node| {
        mount(
            Some("tmpfs"),
            "/run",
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
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
        hide_nfnetlink();

        let mut wanted = Masquerade {
            sources: vec!["10.244.1.0/24".parse().unwrap(), "fd10:1::/64".parse().unwrap()],
            exempt_networks: vec!["10.244.0.0/16".parse().unwrap()],
            exempt_addresses: BTreeSet::new(),
        };
        assert!(apply(&wanted, false));
        for ((pod, outside_address), as_node) in POD.iter().zip(OUTSIDE).zip(NODE) {
            let seen = seen_by(&outside, pod, outside_address);
            assert_eq!(seen, as_node.parse::<IpAddr>().unwrap(), "{pod}");
        }
        assert!(nat("iptables-legacy-save").contains("-j MASQUERADE --random-fully"));
        assert!(!apply(&wanted, true), "nothing is to be done twice");

        // Nodes see pods' own addresses.
        wanted.exempt_addresses = OUTSIDE.iter().map(|address| address.parse().unwrap()).collect();
        assert!(apply(&wanted, false));
        for (pod, outside_address) in POD.iter().zip(OUTSIDE) {
            let seen = seen_by(&outside, pod, outside_address);
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
        assert!(apply(&wanted, true));

        assert!(apply(&Masquerade::default(), false));
        for tool in ["iptables-legacy-save", "ip6tables-legacy-save"] {
            assert!(!nat(tool).contains("SLUICE"), "{}", nat(tool));
        }
        assert!(!egress::iptables::remove().unwrap());
    });
}
