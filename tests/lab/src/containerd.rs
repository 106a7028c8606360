//! containerd on a lab node, as a cluster's nodes have it.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::state::Record;
use crate::{servers, up};

/// Where it is configured.
pub const CONFIG: &str = "/run/containerd.toml";

/// Where it answers.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Its configuration, but for the places as on any host, and for cgroup limits: a lab node's cgroup has no controllers. Sandboxes are kept
/// by the image called `sandbox`.
#[must_use]
pub fn config(sandbox: &str) -> String {
    format!(
        r#"version = 2
root = "/run/containerd-root"
state = "/run/containerd-state"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox}"
  disable_cgroup = true
  # A score below the caller's takes a right that containers, in which tests may run, are not given.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"#
    )
}

/// Starts it on a node, and waits until it answers.
///
/// # Errors
/// It does not; with the end of its log.
pub(crate) fn start(record: &Record, node: &str, sandbox: &str) -> Result<()> {
    fs::write(record.member(node)?.init.root(CONFIG), config(sandbox))?;
    servers::launch(
        record,
        node,
        "containerd",
        "containerd",
        &["--config".to_owned(), CONFIG.to_owned()],
    )?;
    let deadline = Instant::now() + PATIENCE;
    while !up::exec_command(record, node, &[], &["ctr", "version"])
        .output()?
        .status
        .success()
    {
        if Instant::now() > deadline {
            bail!(
                "containerd on {node} does not answer; the end of its log:\n{}",
                servers::log_end(record, node, "containerd", 15)
            );
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}
