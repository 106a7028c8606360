//! Container images, made from what is on this machine and asked of no registry.

pub mod oci;
pub mod sluice;
pub mod web;
