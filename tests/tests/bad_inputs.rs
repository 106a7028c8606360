//! What goes wrong on clusters: an image, a configuration, another plugin's conflist, two nodes with one pod CIDR. Kubernetes' own tools say
//! what it is and what to do, and Services go on meanwhile.

use std::time::Duration;

use anyhow::{Result, bail};
use sluice_lab::demo::cluster;
use sluice_lab::{Datastore, Lab, Options, wait_until};
use sluice_tests::{manifest, reconfigure, write_config};

/// A kubelet or a controller has to do something first, and the daemon looks at the host now and then only.
const PATIENCE: Duration = Duration::from_secs(90);

/// Asked of the Service `talk` on node2's port, from outside: whether a pod answers.
fn serves(lab: &Lab) -> Result<bool> {
    let at = format!("{}:30077", lab.host("node2")?.addresses[0]);
    let said = lab
        .client()
        .run(&["sluice-lab", "talk-ask", "TCP", &at, "20", "1"])?;
    Ok(said.lines().all(|line| line.contains(' ')))
}

/// Waits until what `kubectl` prints has all of these in it.
fn is_told(lab: &Lab, command: &str, wanted: &[&str]) {
    let told = wait_until(command, PATIENCE, || {
        let said = lab.kubectl(command)?;
        match wanted.iter().find(|text| !said.contains(**text)) {
            Some(missing) => bail!("{missing:?} is not in {said}"),
            None => Ok(true),
        }
    });
    if let Err(error) = told {
        panic!("{error:#}");
    }
}

/// K4 N4 N12
#[test]
fn what_is_wrong_is_told_by_kubernetes_own_tools_and_services_go_on() {
    let lab = Lab::up(Options {
        nodes: 2,
        datastore: Datastore::Kubernetes,
        kubelets: true,
        ..Options::default()
    })
    .unwrap();
    lab.apply(manifest("workloads.yaml")).unwrap();
    lab.kubectl("rollout status --timeout=120s deployment/talk")
        .unwrap();
    wait_until("the Service is served", PATIENCE, || serves(&lab)).unwrap();

    // Another plugin's conflist, before Sluice's.
    let node1 = lab.node("node1");
    node1.sh("echo '{}' > /etc/cni/net.d/05-other.conflist").unwrap();
    is_told(
        &lab,
        "describe node node1",
        &[
            "SluiceDegraded       True",
            "/etc/cni/net.d/05-other.conflist comes before 10-sluice.conflist",
            "remove it",
        ],
    );
    node1.sh("rm /etc/cni/net.d/05-other.conflist").unwrap();
    is_told(&lab, "describe node node1", &["SluiceDegraded       False"]);

    // A Node that claims what node2 has, and whose name comes first: node2 is older and keeps it, also when the daemons forget who had it.
    let claimed = lab.kubectl("get node node2 -o jsonpath={.spec.podCIDR}").unwrap();
    lab.apply_text(&format!(
        "{{apiVersion: v1, kind: Node, metadata: {{name: intruder}}, spec: {{podCIDRs: ['{claimed}']}}, \
         status: {{addresses: [{{type: InternalIP, address: 172.30.0.99}}]}}}}"
    ))
    .unwrap();
    let logs = "-n kube-system logs -l app.kubernetes.io/name=sluice -c sluiced --tail=100";
    let refused = format!(
        "node intruder claims the pod CIDR {claimed}, which overlaps {claimed} of node node2; node2 keeps it"
    );
    is_told(&lab, logs, &[&refused, "delete its Node object"]);
    cluster::roll_sluice(&lab).unwrap();
    is_told(&lab, logs, &[&refused]);
    assert!(serves(&lab).unwrap());
    lab.kubectl("delete node intruder").unwrap();
    is_told(&lab, logs, &["no longer: node intruder claims"]);

    // A configuration with a slip: the daemon that is replaced first does not come up, and says which line; the other is left alone.
    write_config(&lab, "mode: auto", "mode: nftabels").unwrap();
    lab.kubectl("-n kube-system rollout restart daemonset sluice")
        .unwrap();
    is_told(
        &lab,
        "-n kube-system describe pods -l app.kubernetes.io/name=sluice",
        &["unknown value \"nftabels\"; did you mean \"nftables\"?"],
    );
    assert!(serves(&lab).unwrap());
    reconfigure(&lab, "mode: nftabels", "mode: auto").unwrap();

    // An image that there is not.
    lab.kubectl("-n kube-system set image daemonset/sluice sluiced=localhost/sluice:missing")
        .unwrap();
    is_told(
        &lab,
        "-n kube-system get events",
        &["Failed to pull image \"localhost/sluice:missing\""],
    );
    assert!(serves(&lab).unwrap());
    lab.kubectl("-n kube-system rollout undo daemonset sluice")
        .unwrap();
    lab.kubectl("-n kube-system rollout status daemonset sluice --timeout=120s")
        .unwrap();
    wait_until("all is well again", PATIENCE, || {
        let said = lab.kubectl("-n kube-system exec daemonset/sluice -- sluicectl status")?;
        Ok(said.contains(": healthy"))
    })
    .unwrap();
    assert!(serves(&lab).unwrap());
}
