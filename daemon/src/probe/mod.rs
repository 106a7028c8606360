//! Whether the ways to other nodes carry: small packets and full-size ones, asked by ICMP echo through the tunnel.
//!
//! The other node's kernel answers, whether its daemon runs or not. [`echo`] sends and hears; the judgement here is
//! pure. Nothing is changed: what does not carry is named, with the likely cause.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use tokio::sync::{mpsc, watch};

use crate::network::Outcome;
use crate::network::desired::node_pod_address;
use crate::network::paths::Path;
use crate::state::service_port::Family;

mod echo;

/// How often all paths are probed.
const PERIOD: Duration = Duration::from_secs(30);

/// How soon after a change of the paths, and after a probe without an answer.
const SOON: Duration = Duration::from_secs(2);

/// In how many rounds on end a probe must stay without an answer before that is said.
const PATIENCE: u32 = 2;

/// A way through the tunnel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// The other node.
    pub node: String,
    /// This node's address in the pod network.
    pub from: IpAddr,
    /// The other's.
    pub to: IpAddr,
    /// Where its tunnel ends.
    pub underlay: IpAddr,
    /// Size of a full-size packet in bytes, IP header included.
    pub mtu: u32,
}

/// Which probes were answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answers {
    /// The small packet.
    pub small: bool,
    /// The full-size one.
    pub full: bool,
}

impl Answers {
    const ALL: Self = Self {
        small: true,
        full: true,
    };
}

/// The ways through the tunnel that `outcome` has, for a node with the pod CIDRs `own`.
pub fn targets(outcome: &Outcome, own: &[IpNetwork]) -> Vec<Target> {
    let from = |family| {
        own.iter()
            .find(|cidr| Family::of(cidr.ip()) == family)
            .map(node_pod_address)
    };
    let through_tunnel = outcome.paths.iter().filter_map(|(cidr, path)| match path {
        Path::Vxlan { node, remote, .. } => Some(Target {
            node: node.clone(),
            from: from(Family::of(cidr.ip()))?,
            to: node_pod_address(cidr),
            underlay: *remote,
            mtu: outcome.pod_mtu,
        }),
        Path::Direct { .. } => None,
    });
    through_tunnel.collect()
}

/// Probes what `targets` holds, until it or the receiver of `problems` is gone; `port` is the tunnel's UDP port. Sends
/// the whole list of what does not carry, one sentence each, whenever it changes.
pub async fn run(port: u16, mut targets: watch::Receiver<Vec<Target>>, problems: mpsc::Sender<Vec<String>>) {
    let mut failing: BTreeMap<Target, (Answers, u32)> = BTreeMap::new();
    let mut told = Vec::new();
    loop {
        let patience = if failing.is_empty() { PERIOD } else { SOON };
        tokio::select! {
            changed = targets.changed() => {
                if changed.is_err() {
                    return;
                }
                // The others must have programmed the change too.
                tokio::time::sleep(SOON).await;
            }
            () = tokio::time::sleep(patience) => {}
        }
        let now = targets.borrow_and_update().clone();
        let Ok(round) = tokio::task::spawn_blocking(move || echo::round(&now)).await else {
            return;
        };
        match round {
            Ok(answers) => failing = judge(&failing, answers),
            Err(error) => tracing::warn!("probing the ways to other nodes: {error:#}"),
        }
        let list: Vec<String> = failing
            .iter()
            .filter(|(_, (_, rounds))| *rounds >= PATIENCE)
            .map(|(target, (answers, _))| sentence(target, *answers, port))
            .collect();
        if list != told {
            told.clone_from(&list);
            if problems.send(list).await.is_err() {
                return;
            }
        }
    }
}

/// Those of `answers` that lack something, with the number of rounds that has been so.
fn judge(
    before: &BTreeMap<Target, (Answers, u32)>,
    answers: Vec<(Target, Answers)>,
) -> BTreeMap<Target, (Answers, u32)> {
    let lacking = answers
        .into_iter()
        .filter(|(_, answers)| *answers != Answers::ALL);
    lacking
        .map(|(target, answers)| {
            let rounds = before.get(&target).map_or(0, |(_, rounds)| *rounds);
            (target, (answers, rounds.saturating_add(1)))
        })
        .collect()
}

fn sentence(target: &Target, answers: Answers, port: u16) -> String {
    let Target {
        node,
        to,
        underlay,
        mtu,
        ..
    } = target;
    if answers.small {
        return format!(
            "packets of {mtu} bytes do not get through the tunnel to node {node} ({to}), smaller ones do: the path to \
             {underlay} carries less than this node's uplink; set network.mtu to what it carries"
        );
    }
    format!(
        "node {node} ({to}) does not answer through the tunnel: a firewall between here and {underlay} may block UDP \
         port {port}, or the node is down; from here: ping {underlay}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(node: &str) -> Target {
        Target {
            node: node.to_owned(),
            from: "10.244.1.0".parse().unwrap(),
            to: "10.244.2.0".parse().unwrap(),
            underlay: "172.30.0.12".parse().unwrap(),
            mtu: 1430,
        }
    }

    /// N11
    #[test]
    fn one_lost_answer_is_chance_and_an_answer_ends_it() {
        let none = Answers {
            small: false,
            full: false,
        };
        let once = judge(
            &BTreeMap::new(),
            vec![(target("a"), none), (target("b"), Answers::ALL)],
        );
        assert_eq!(once.into_iter().collect::<Vec<_>>(), [(target("a"), (none, 1))]);
        let before = BTreeMap::from([(target("a"), (none, 1))]);
        assert_eq!(
            judge(&before, vec![(target("a"), none)])[&target("a")].1,
            PATIENCE
        );
        assert!(judge(&before, vec![(target("a"), Answers::ALL)]).is_empty());
    }

    /// N11
    #[test]
    fn a_blocked_port_and_a_narrow_path_are_told_apart() {
        let blocked = sentence(
            &target("a"),
            Answers {
                small: false,
                full: false,
            },
            8472,
        );
        assert!(
            blocked.contains("node a") && blocked.contains("block UDP port 8472"),
            "{blocked}"
        );
        let narrow = sentence(
            &target("a"),
            Answers {
                small: true,
                full: false,
            },
            8472,
        );
        assert!(
            narrow.contains("packets of 1430 bytes") && narrow.contains("network.mtu"),
            "{narrow}"
        );
    }
}
