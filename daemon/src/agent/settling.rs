//! Pods are shown to the dataplane once they have settled. Pure.
//!
//! The runtime runs the plugins of a chain one after the other, and one behind Sluice's may want the very place where the
//! dataplane hangs its programs at a pod's device: the reference `bandwidth` plugin cannot make its `ingress` qdisc beside a
//! `clsact`. So it comes first. Until then the pod's packets take the way through the host's stack.
//!
//! Where a `clsact` is there already nothing is waited for: the conflist told Sluice's plugin to make it, or the daemon
//! made it earlier.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::network::pods::PodDevice;

/// How long the rest of a chain may take.
const SETTLE: Duration = Duration::from_secs(1);

/// Since when each pod's device is known, by its index.
#[derive(Debug, Default)]
pub(super) struct Settling(Option<BTreeMap<u32, Instant>>);

impl Settling {
    /// Those of `pods` that have settled, and when the next of the others will have. What the first look finds was there
    /// before the daemon.
    pub fn settled(&mut self, pods: &[PodDevice], now: Instant) -> (Vec<PodDevice>, Option<Instant>) {
        let settled_at = match &self.0 {
            None => now,
            Some(_) => now + SETTLE,
        };
        let mut known = self.0.take().unwrap_or_default();
        known.retain(|index, _| pods.iter().any(|pod| pod.device.index == *index));
        let mut settled = Vec::new();
        let mut next: Option<Instant> = None;
        for pod in pods {
            let at = *known.entry(pod.device.index).or_insert(settled_at);
            if pod.queues.open || at <= now {
                settled.push(pod.clone());
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        self.0 = Some(known);
        (settled, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Device;
    use crate::network::pods::Queues;
    use crate::network::vtep::Mac;

    fn pod(index: u32) -> PodDevice {
        PodDevice {
            device: Device {
                index,
                name: format!("sluice{index}"),
            },
            mac: Mac([0; 6]),
            mtu: 1500,
            endpoints: BTreeMap::new(),
            queues: Queues::default(),
        }
    }

    /// C11
    #[test]
    fn new_pods_settle_and_those_found_at_the_start_have() {
        let mut settling = Settling::default();
        let start = Instant::now();
        assert_eq!(settling.settled(&[pod(1)], start), (vec![pod(1)], None));
        let (settled, next) = settling.settled(&[pod(1), pod(2)], start);
        assert_eq!((settled, next), (vec![pod(1)], Some(start + SETTLE)));
        let later = start + SETTLE;
        assert_eq!(
            settling.settled(&[pod(1), pod(2)], later),
            (vec![pod(1), pod(2)], None)
        );
        // Another pod with the number of one that went.
        settling.settled(&[pod(1)], later);
        let (settled, _) = settling.settled(&[pod(1), pod(2)], later);
        assert_eq!(settled, [pod(1)]);
        // One that the plugin opened.
        let mut open = pod(3);
        open.queues.open = true;
        let (settled, _) = settling.settled(&[pod(1), open.clone()], later);
        assert_eq!(settled, [pod(1), open]);
    }
}
