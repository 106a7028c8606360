//! Services at the device: the attached programs run on crafted packets. Every packet that comes out has its checksums
//! recomputed and compared.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod cases;
#[path = "../ebpf_support/mod.rs"]
mod ebpf_support;
mod frames;
mod translation;
