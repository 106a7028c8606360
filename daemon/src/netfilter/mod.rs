//! Talking to netfilter: messages, the values in its sets, and the connection table. What rules there are is others' matter.

pub(crate) mod conntrack;
pub(crate) mod parts;
pub mod watch;
pub(crate) mod wire;
