//! What `sluicectl` prints, for whoever reads it.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

use std::process::{Command, Stdio};

/// O1: `sluicectl … | head` is no failure.
#[test]
fn a_reader_who_has_seen_enough_may_go() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sluicectl"))
        .args(["completion", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{output:?}");
}
