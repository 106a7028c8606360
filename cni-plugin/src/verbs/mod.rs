//! The verbs of the specification, one module each. Each takes what it needs from the call and returns what goes to
//! stdout, if anything does. VERSION needs nothing and is [`crate::version`]'s.

pub mod add;
pub mod check;
pub mod del;
pub mod gc;
pub mod status;
