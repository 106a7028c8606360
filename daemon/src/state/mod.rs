//! The cluster as plain data. Pure: no I/O, no clock, no kernel.

pub mod service_port;
