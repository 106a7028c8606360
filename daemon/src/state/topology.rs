//! Which of a Service's endpoints are near enough to this node, by their topology hints.
//!
//! In Kubernetes the endpoint controller writes the hints (`trafficDistribution`, topology-aware routing). Elsewhere
//! nobody does, so [`Hints::of`] gives each endpoint those the controller would have given it.

use serde::{Deserialize, Serialize};

/// For whom an endpoint is meant (discovery/v1, EndpointHints). Either list may be empty, which is no hint of that sort.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// `forNodes[].name`.
    pub nodes: Vec<String>,
    /// `forZones[].name`.
    pub zones: Vec<String>,
}

/// `spec.trafficDistribution` of a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficDistribution {
    /// `PreferSameZone`, also written `PreferClose`.
    PreferSameZone,
    /// `PreferSameNode`.
    PreferSameNode,
}

impl Hints {
    /// What the endpoint controller says about an endpoint on `node` in `zone` (KEP-3015): its own zone, and its own
    /// node where the Service prefers that.
    pub fn of(distribution: TrafficDistribution, node: Option<&str>, zone: Option<&str>) -> Self {
        let owned = |name: Option<&str>| name.map(str::to_owned).into_iter().collect();
        Self {
            nodes: match distribution {
                TrafficDistribution::PreferSameNode => owned(node),
                TrafficDistribution::PreferSameZone => Vec::new(),
            },
            zones: owned(zone),
        }
    }
}

/// How near an endpoint has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nearness<'a> {
    /// Every endpoint will do.
    Anywhere,
    /// Meant for this node.
    Node(&'a str),
    /// Meant for this zone.
    Zone(&'a str),
}

impl<'a> Nearness<'a> {
    /// The nearest that can be asked for on `node` in `zone`, given the hints of all ready endpoints: hints of a sort
    /// count only when every endpoint has some and one is meant for here, as otherwise endpoints would be left without
    /// load or clients without endpoints (kube-proxy, pkg/proxy/topology.go).
    pub fn of<'h, I>(hints: I, node: &'a str, zone: Option<&'a str>) -> Self
    where
        I: Iterator<Item = Option<&'h Hints>> + Clone,
    {
        let counts = |nearness: &Nearness<'_>| {
            hints.clone().all(|hints| nearness.is_hinted(hints))
                && hints.clone().any(|hints| nearness.admits(hints))
        };
        [Some(Self::Node(node)), zone.map(Self::Zone)]
            .into_iter()
            .flatten()
            .find(counts)
            .unwrap_or(Self::Anywhere)
    }

    /// Whether an endpoint with these hints is near enough.
    pub fn admits(&self, hints: Option<&Hints>) -> bool {
        match (self, hints) {
            (Self::Anywhere, _) => true,
            (Self::Node(name), Some(hints)) => hints.nodes.iter().any(|node| node == name),
            (Self::Zone(name), Some(hints)) => hints.zones.iter().any(|zone| zone == name),
            (_, None) => false,
        }
    }

    fn is_hinted(&self, hints: Option<&Hints>) -> bool {
        hints.is_some_and(|hints| match self {
            Self::Anywhere => true,
            Self::Node(_) => !hints.nodes.is_empty(),
            Self::Zone(_) => !hints.zones.is_empty(),
        })
    }
}
