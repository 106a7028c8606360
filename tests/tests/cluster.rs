//! A real cluster: kubelets, containerd, the control plane, and Sluice as a DaemonSet in place of a network plugin and kube-proxy.

use std::time::Duration;

use anyhow::{Context, Result, bail};
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
    kube_proxys_metrics_count(&lab).unwrap();
    // What doctor tries it tries in the container too; the host it does not see.
    let doctor = lab
        .kubectl("-n kube-system exec daemonset/sluice -c sluiced -- sluicectl doctor")
        .unwrap();
    assert!(doctor.contains("ok       Services in eBPF"), "{doctor}");

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

/// Of a slice that says when its change began. Written by hand, since Kubernetes' own controller leaves that out now and then.
fn kube_proxys_metrics_count(lab: &Lab) -> Result<()> {
    let node = lab.node("node2");
    let figure = |name: &str| -> Result<u64> {
        let figures = node.get("127.0.0.1", 10249, "metrics")?;
        let value = figures.lines().find_map(|line| line.strip_prefix(name));
        let value = value.with_context(|| format!("there is no {name}"))?;
        Ok(value.trim().parse()?)
    };
    let counts = [
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        "kubeproxy_network_programming_duration_seconds_count",
    ];
    lab.apply_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: by-hand}\nspec: {ports: [{port: 80}]}\n",
    )?;
    let before: Vec<u64> = counts.iter().map(|name| figure(name)).collect::<Result<_>>()?;
    let now = node.run(&["date", "-u", "+%Y-%m-%dT%H:%M:%SZ"])?;
    let slice = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata:\n  name: by-hand\n  labels: {{kubernetes.io/service-name: by-hand}}\n\
         \x20 annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '{}'}}\n\
         ports: [{{port: 80}}]\nendpoints: [{{addresses: [198.51.100.7]}}]\n",
        now.trim()
    );
    lab.apply_text(&slice)?;
    for (name, before) in counts.into_iter().zip(before) {
        wait_until(name, PATIENCE, || Ok(figure(name)? > before))?;
    }
    Ok(())
}
