//! Container images, made from what is on this machine and asked of no registry.

pub mod coredns;
pub mod oci;
pub mod root;
pub mod sluice;
pub mod talk;
pub mod web;
