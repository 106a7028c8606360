//! A real cluster: kubelets, containerd, the control plane, and Sluice as a DaemonSet in place of a network plugin and kube-proxy.

use std::time::Duration;

use anyhow::bail;
use nix::sys::signal::Signal;
use sluice_lab::control_plane::Release;
use sluice_lab::demo::cluster;
use sluice_lab::demo::restart::under_load;
use sluice_lab::{Datastore, Lab, Options, wait_until};
use sluice_tests::{PATIENCE, reconfigure};

/// A rollout of a DaemonSet, or a kubelet that is started again.
const PATIENCE_WITH_KUBELETS: Duration = Duration::from_secs(90);

/// K1 K3 K4 O5 S24: what `./dev kube demo` shows; then another dataplane, and everything that can be restarted, without a failed request.
#[test]
fn a_cluster_serves_while_everything_in_it_is_replaced() {
    let lab = Lab::up(Options {
        nodes: 2,
        datastore: Datastore::Kubernetes,
        kubelets: true,
        ..Options::default()
    })
    .unwrap();
    let failures = cluster::failures(&lab);
    assert!(failures.is_empty(), "{failures:#?}");

    // hostPort, as the kubelet passes it on.
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: porter}\nspec:\n  nodeName: node2\n  containers:\n  \
               - {name: c, image: 'localhost/busybox:lab', ports: [{containerPort: 8080, hostPort: 18080}]}\n";
    lab.apply_text(pod).unwrap();
    for address in &lab.host("node2").unwrap().addresses {
        wait_until("the host port answers", PATIENCE, || {
            Ok(lab.client().get(&address.to_string(), 18080, "")? == "porter")
        })
        .unwrap();
    }

    // Where load balancers and people look for kube-proxy.
    for address in &lab.host("node2").unwrap().addresses {
        let health = lab.client().get(&address.to_string(), 10256, "healthz").unwrap();
        assert!(health.contains("\"nodeEligible\":true"), "{health}");
    }
    assert_eq!(
        lab.node("node2").get("127.0.0.1", 10249, "proxyMode").unwrap(),
        "ebpf"
    );
    lab.kubectl("scale deployment kubia --replicas=5").unwrap();
    wait_until("kube-proxy's metrics count", PATIENCE_WITH_KUBELETS, || {
        let figures = lab.node("node2").get("127.0.0.1", 10249, "metrics")?;
        for name in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        ] {
            let value = figures.lines().find_map(|line| line.strip_prefix(name));
            if !value.is_some_and(|value| value.trim().parse::<u64>().is_ok_and(|count| count > 0)) {
                bail!("{name} is {value:?}");
            }
        }
        Ok(true)
    })
    .unwrap();

    let load = cluster::load(&lab).unwrap();
    let made = under_load(&load, || {
        for mode in ["nftables", "ebpf"] {
            let other = if mode == "ebpf" { "nftables" } else { "auto" };
            reconfigure(&lab, &format!("mode: {other}"), &format!("mode: {mode}"))?;
            let status = lab.node("node1").run(&["sluicectl", "status"])?;
            assert!(status.contains(&format!("services   {mode}")), "{status}");
        }
        Ok(())
    })
    .unwrap();
    assert!(made > 100, "{made}");

    under_load(&load, || {
        lab.restart_kubelet("node1")?;
        lab.signal_api_server(1, Signal::SIGKILL)?;
        lab.start_api_server(1, Release::Usual, &[])?;
        Ok(())
    })
    .unwrap();
    // And it is a cluster still.
    lab.kubectl("scale deployment kubia --replicas=6").unwrap();
    wait_until("six pods are ready", PATIENCE_WITH_KUBELETS, || {
        let ready = lab.kubectl("get deployment kubia -o jsonpath={.status.readyReplicas}")?;
        if ready != "6" {
            bail!("{ready} are ready");
        }
        Ok(true)
    })
    .unwrap();

    // Without its rights it says what it lacks, and what is in the kernel goes on.
    lab.kubectl("delete clusterrolebinding sluice").unwrap();
    lab.kubectl("-n kube-system rollout restart daemonset sluice")
        .unwrap();
    wait_until(
        "the log names the right that is missing",
        PATIENCE_WITH_KUBELETS,
        || {
            let logs =
                lab.kubectl("-n kube-system logs -l app.kubernetes.io/name=sluice -c sluiced --tail=100")?;
            Ok(logs.contains("is forbidden: User"))
        },
    )
    .unwrap();
    under_load(&load, || Ok(())).unwrap();
}
