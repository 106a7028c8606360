//! What `sluicectl` prints, for whoever reads it.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

use std::process::Command;

/// O1: `sluicectl … | head` is no failure.
#[test]
fn a_reader_who_has_seen_enough_may_go() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_sluicectl"))
        .args(["completion", "bash"])
        .stdout(writer)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{output:?}");
}
