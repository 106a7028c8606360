//! Talking to netfilter: messages, the values in its sets, and the connection table. What rules there are is others' matter.

pub mod conntrack;
pub mod parts;
pub mod wire;
