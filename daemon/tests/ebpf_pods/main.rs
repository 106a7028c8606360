//! Packets of pods at the pods' own devices: the fast path from pod to pod, and Services for sockets that no program sees.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod cluster;
#[path = "../ebpf_support/mod.rs"]
mod ebpf_support;
mod fast_path;
mod lifecycle;
mod services;
