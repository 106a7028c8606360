//! What nodes make of their datastore: what they have of it in the kernel, and what they say is wrong with it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use anyhow::bail;
use sluice_lab::{Lab, Node, wait_until};

use crate::problems;

/// A ClusterIP Service of the pods labelled `app: web`.
#[must_use]
pub fn service(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
         spec: {{clusterIPs: [{address}], selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
    )
}

/// The names of the Services that a node has in its kernel.
///
/// # Errors
/// The daemon does not tell.
pub fn known(lab: &Lab, node: &str) -> anyhow::Result<Vec<String>> {
    let services = lab.ctl_json(node, &["services"])?;
    let mut names: Vec<String> = services
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|service| Some(service["name"].as_str()?.to_owned()))
        .filter(|name| name != "kubernetes")
        .collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// Waits until a node has just these Services in its kernel.
///
/// # Panics
/// It has others in the end.
pub fn wait_for_services(lab: &Lab, node: &str, wanted: &[&str], patience: Duration) {
    wait_until("the node has the Services", patience, || {
        let known = known(lab, node)?;
        if known != wanted {
            bail!("it has {known:?}; wanted are {wanted:?}");
        }
        Ok(true)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", problems(lab, node).unwrap()));
}

/// Waits until a node tells a problem.
///
/// # Panics
/// It tells others in the end.
pub fn wait_for_problem(lab: &Lab, node: &str, wanted: &str, patience: Duration) {
    wait_until("the node tells the problem", patience, || {
        let told = problems(lab, node)?;
        if !told.contains(wanted) {
            bail!("it tells {told:?}; wanted is {wanted:?}");
        }
        Ok(true)
    })
    .unwrap_or_else(|error| panic!("{error:#}"));
}

/// Waits until no problem that a node tells is about `subject`.
///
/// # Panics
/// It still tells one in the end.
pub fn wait_for_no_problem_with(lab: &Lab, node: &str, subject: &str, patience: Duration) {
    wait_until("nothing is wrong any more", patience, || {
        let told = problems(lab, node)?;
        if told.contains(subject) {
            bail!("it tells {told:?}");
        }
        Ok(true)
    })
    .unwrap_or_else(|error| panic!("{error:#}"));
}

/// What a reboot takes from a node whose daemon is stopped: all that a clean-up takes, but for what is on the disk.
///
/// # Panics
/// The clean-up failed.
pub fn reboot(node: &Node<'_>) {
    let keep = "mkdir /var/kept && cp -a /opt/cni/bin /var/kept/plugins && \
                if [ -e /var/lib/sluice ]; then cp -a /var/lib/sluice /var/kept/state; fi";
    let put_back = "cp -a /var/kept/plugins/. /opt/cni/bin && \
                    if [ -e /var/kept/state ]; then mv /var/kept/state /var/lib/sluice; fi && rm -r /var/kept";
    node.sh(&format!("{keep} && sluiced cleanup")).unwrap();
    node.sh(&format!("test ! -e /var/lib/sluice && {put_back}"))
        .unwrap();
}
