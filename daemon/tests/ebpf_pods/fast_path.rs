//! From pod to pod, past the host's stack.

use std::net::UdpSocket;

use sluice_daemon::proxy::Proxy;
use sluice_daemon::proxy::ebpf::EbpfProxy;

use crate::cluster::{B, FAR, at, bulk, cluster, counter, ping, serve};
use crate::ebpf_support::{ip, on_node};

/// N1
#[test]
fn a_megabyte_from_pod_to_pod_goes_past_the_stack_and_without_the_fast_path_through_it() {
    on_node(|node| {
        let mut cluster = cluster(node);
        let mut proxy = cluster.open(node);
        let fast = |proxy: &EbpfProxy| (counter(proxy, "fast_local"), counter(proxy, "fast_remote"));
        for family in 0..2 {
            // On this node: every packet into a pod is handed over.
            let before = fast(&proxy);
            let seen = serve(&cluster.b.host, at(B[family], 8080));
            let (own, _) = bulk(&cluster.a.host, at(B[family], 8080));
            assert_eq!(seen.recv().unwrap(), own);
            assert_eq!(own.ip(), cluster.a.addresses[family]);
            let after = fast(&proxy);
            assert!(after.0 > before.0 + 10, "{before:?} {after:?}");
            assert_eq!(after.1, before.1);

            // To another node and back.
            let seen = serve(&cluster.far, at(FAR[family], 8080));
            let (own, _) = bulk(&cluster.a.host, at(FAR[family], 8080));
            assert_eq!(seen.recv().unwrap(), own);
            let then = fast(&proxy);
            assert!(
                then.0 > after.0 + 10 && then.1 > after.1 + 10,
                "{after:?} {then:?}"
            );
        }
        cluster.surroundings.fast_path = false;
        proxy.adjust(&cluster.surroundings).unwrap();
        let before = fast(&proxy);
        for family in 0..2 {
            let seen = serve(&cluster.b.host, at(B[family], 8081));
            bulk(&cluster.a.host, at(B[family], 8081));
            seen.recv().unwrap();
            let seen = serve(&cluster.far, at(FAR[family], 8081));
            bulk(&cluster.a.host, at(FAR[family], 8081));
            seen.recv().unwrap();
        }
        assert_eq!(fast(&proxy), before);
    });
}

/// C10
#[test]
fn a_limited_pods_packets_pass_what_limits_them() {
    on_node(|node| {
        let mut cluster = cluster(node);
        cluster.surroundings.pods[1].queues.outgoing = true;
        let proxy = cluster.open(node);
        let seen = serve(&cluster.b.host, at(B[0], 8080));
        bulk(&cluster.a.host, at(B[0], 8080));
        seen.recv().unwrap();
        assert_eq!(counter(&proxy, "fast_local"), 0);
    });
}

/// N5 S21
#[test]
fn each_node_is_a_hop_and_a_packet_too_large_is_answered() {
    on_node(|node| {
        let cluster = cluster(node);
        let proxy = cluster.open(node);
        let (a, far) = (&cluster.a.host, FAR[0]);
        assert!(ping(a, &format!("-c 1 -W 5 {}", B[0])).contains("ttl=63"));
        assert!(ping(a, &format!("-c 1 -W 5 {far}")).contains("ttl=63"));
        assert!(counter(&proxy, "fast_local") >= 3 && counter(&proxy, "fast_remote") >= 1);
        assert!(ping(a, &format!("-c 1 -W 5 -t 1 {}", B[0])).contains("Time to live exceeded"));
        assert!(ping(a, &format!("-c 1 -W 5 -t 1 {}", B[1])).contains("Hop limit"));
        ip("link set uplink mtu 1400");
        assert!(ping(a, &format!("-c 1 -W 5 -M do -s 1400 {far}")).contains("mtu = 1400"));
        assert!(ping(a, &format!("-c 1 -W 5 -M do -s 1400 {}", FAR[1])).contains("mtu=1400"));
    });
}

/// A packet with another's address is none of the fast path's.
#[test]
fn what_a_pod_sends_in_anothers_name_is_left_to_the_stack() {
    on_node(|node| {
        let cluster = cluster(node);
        let proxy = cluster.open(node);
        let stranger = "10.244.1.77";
        cluster.a.host.run(move || {
            ip(&format!("addr add {stranger}/32 dev eth0"));
            let socket = UdpSocket::bind((stranger, 0)).unwrap();
            socket.send_to(b"not me", (B[0], 9)).unwrap();
        });
        assert_eq!(counter(&proxy, "fast_local"), 0);
    });
}
