//! The real plugin process against the real kernel, in network namespaces of the tests' own making.
//!
//! Nothing of the machine's own is touched: every call runs in a namespace that ends with the test.

#![allow(clippy::unwrap_used, reason = "a test that panics says what failed")]

mod anything;
mod bandwidth;
mod check;
mod crash;
mod faults;
mod host_ports;
mod node;
mod protocol;
mod removals;
mod wiring;
mod wishes;
