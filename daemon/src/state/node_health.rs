//! How this node does, for whoever tells it on. Pure data.

/// What keeps the node from its work, and what makes it do it badly; a sentence each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeHealth {
    /// What is waited for before pods can be wired; nothing is known before the first pass.
    pub awaiting: Option<Vec<String>>,
    /// What pods that run already may suffer from.
    pub impairments: Vec<String>,
}
