//! The demo.

use anyhow::Result;

use crate::options::Options;

/// Not yet.
///
/// # Errors
/// Never.
pub fn run(_options: &Options, _keep: bool) -> Result<i32> {
    Ok(1)
}
