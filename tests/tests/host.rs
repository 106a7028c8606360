//! What gets in the way, on a host and between hosts: found, said with what to do, and no longer said once gone.

use sluice_lab::{Backend, Lab, Options, wait_until};
use sluice_tests::{PATIENCE, problems};

const OBSTACLES: [(&str, &str, &str); 4] = [
    (
        "echo '{}' > /etc/cni/net.d/05-other.conflist",
        "rm /etc/cni/net.d/05-other.conflist",
        "05-other.conflist comes before 10-sluice.conflist",
    ),
    (
        "ip link add flannel.1 type bridge",
        "ip link del flannel.1",
        "the device flannel.1 is flannel's",
    ),
    (
        "iptables-nft -t nat -N KUBE-SERVICES",
        "iptables-nft -t nat -X KUBE-SERVICES",
        "kube-proxy's chain KUBE-SERVICES stands in the nat table (iptables-nft)",
    ),
    (
        "nft 'add table inet fw; add chain inet fw forward { type filter hook forward priority 0; policy drop; }'",
        "nft delete table inet fw",
        "the nftables chain inet fw forward drops what is forwarded",
    ),
];

/// N12 C2
#[test]
fn what_gets_in_the_way_is_said_until_it_is_gone() {
    let lab = Lab::up(Options {
        nodes: 1,
        ..Options::default()
    })
    .unwrap();
    let node = lab.node("node1");
    let status = || {
        let config = r#"{"cniVersion":"1.1.0","name":"sluice","type":"sluice"}"#;
        let output = node.sh(&format!(
            "echo '{config}' | CNI_COMMAND=STATUS CNI_PATH=/opt/cni/bin /opt/cni/bin/sluice || true"
        ));
        output.unwrap()
    };
    assert_eq!(
        (problems(&lab, "node1").unwrap().as_str(), status().as_str()),
        ("[]", "")
    );
    for (make, _, _) in OBSTACLES {
        node.sh(make).unwrap();
    }
    // The daemon looks when it starts, and now and then: waiting for the latter would take long.
    lab.stop_sluiced("node1").unwrap();
    lab.start_sluiced("node1").unwrap();
    for (_, _, wanted) in OBSTACLES {
        wait_until(wanted, PATIENCE, || Ok(problems(&lab, "node1")?.contains(wanted))).unwrap();
        wait_until("CNI STATUS says so too", PATIENCE, || {
            let said = status();
            Ok(said.replace(' ', "").contains("\"code\":51") && said.contains(wanted))
        })
        .unwrap();
    }
    for (_, unmake, _) in OBSTACLES {
        node.sh(unmake).unwrap();
    }
    lab.stop_sluiced("node1").unwrap();
    lab.start_sluiced("node1").unwrap();
    wait_until("nothing is in the way", PATIENCE, || {
        Ok(problems(&lab, "node1")? == "[]" && status().is_empty())
    })
    .unwrap();
}

/// N11
#[test]
fn a_way_between_nodes_that_does_not_carry_is_named() {
    let lab = Lab::up(Options {
        nodes: 2,
        backend: Backend::Vxlan,
        ..Options::default()
    })
    .unwrap();
    let node = lab.node("node2");
    let block = "nft 'add table inet block; add chain inet block in { type filter hook input priority 0; }'";
    node.sh(block).unwrap();
    for (rule, wanted) in [
        // VXLAN's port, and then only what is too long for a path narrower than the uplink.
        (
            "udp dport 8472 drop",
            "node node2 (10.244.2.0) does not answer through the tunnel",
        ),
        (
            "udp dport 8472 meta length > 1400 drop",
            "packets of 1430 bytes do not get through the tunnel to node node2",
        ),
    ] {
        node.sh(&format!("nft 'add rule inet block in {rule}'")).unwrap();
        // Ways are probed soon after a start, and then now and again.
        lab.stop_sluiced("node1").unwrap();
        lab.start_sluiced("node1").unwrap();
        wait_until(wanted, PATIENCE, || Ok(problems(&lab, "node1")?.contains(wanted))).unwrap();
        node.sh("nft flush chain inet block in").unwrap();
        wait_until("it carries again", PATIENCE, || {
            Ok(problems(&lab, "node1")? == "[]")
        })
        .unwrap();
    }
}
