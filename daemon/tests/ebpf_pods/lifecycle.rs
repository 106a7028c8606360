//! Programs come to a pod's device, come back where somebody took them off, and go.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use sluice_daemon::proxy::Proxy;
use sluice_daemon::proxy::ebpf::EbpfProxy;

use crate::cluster::{A, cluster};
use crate::ebpf_support::on_node;

/// N6 S20
#[test]
fn programs_at_pods_come_back_and_go() {
    on_node(|node| {
        let cluster = cluster(node);
        let mut proxy = cluster.open(node);
        let tc = |arguments: &str| {
            let output = std::process::Command::new("tc")
                .args(arguments.split(' '))
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "tc {arguments}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let shown = |way: &str| tc(&format!("filter show dev sluicea {way}"));
        assert!(shown("ingress").contains("sluice/pod_in") && shown("egress").contains("sluice/pod_out"));
        assert_eq!(proxy.audit().unwrap(), 0);
        tc("filter del dev sluicea ingress");
        tc("qdisc del dev sluiceb clsact");
        assert_eq!(proxy.audit().unwrap(), 2);
        assert!(shown("ingress").contains("sluice/pod_in"));
        // Adopted, and replaced in place.
        drop(proxy);
        let proxy = cluster.open(node);
        assert_eq!(shown("ingress").matches("sluice/pod_in").count(), 1);
        drop(proxy);
        EbpfProxy::remove(&node.options.pins).unwrap();
        for (device, way) in [
            ("sluicea", "ingress"),
            ("sluicea", "egress"),
            ("sluiceb", "ingress"),
        ] {
            assert_eq!(
                tc(&format!("filter show dev {device} {way}")),
                "",
                "{device} {way}"
            );
        }
    });
}

/// N6 S20
#[test]
fn nothing_is_lost_while_programs_come_to_a_pod_and_go() {
    on_node(|node| {
        let cluster = cluster(node);
        // As the plugin does it before the pod's device is up.
        for device in ["sluicea", "sluiceb"] {
            let arguments = ["qdisc", "add", "dev", device, "clsact"];
            let output = std::process::Command::new("tc").args(arguments).output().unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let socket = cluster.a.host.run(|| UdpSocket::bind((A[0], 9)).unwrap());
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let received = Arc::new(AtomicU64::new(0));
        let receiver = {
            let received = received.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 8];
                while socket.recv(&mut buffer).is_ok() {
                    received.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let done = Arc::new(AtomicBool::new(false));
        let sender = {
            let (done, received) = (done.clone(), received.clone());
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect((A[0], 9)).unwrap();
            std::thread::spawn(move || {
                let mut sent = 0_u64;
                while !done.load(Ordering::Relaxed) {
                    socket.send(&sent.to_ne_bytes()).unwrap();
                    sent += 1;
                    // Shorter than the moment for which the kernel stops a device, and never more than the socket has room for.
                    let next = Instant::now() + Duration::from_micros(8);
                    let full =
                        || sent > received.load(Ordering::Relaxed) + 10_000 && !done.load(Ordering::Relaxed);
                    while Instant::now() < next || full() {
                        std::hint::spin_loop();
                    }
                }
                sent
            })
        };
        for _ in 0..10 {
            drop(cluster.open(node));
            EbpfProxy::remove(&node.options.pins).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        let sent = sender.join().unwrap();
        receiver.join().unwrap();
        assert_eq!(received.load(Ordering::Relaxed), sent, "received and sent");
    });
}
