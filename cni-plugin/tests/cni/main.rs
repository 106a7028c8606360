//! The real plugin process against the real kernel, in network namespaces of the tests' own making.
//!
//! Nothing of the machine's own is touched: every call runs in a namespace that ends with the test.

mod crash;
mod node;
mod protocol;
mod wiring;
