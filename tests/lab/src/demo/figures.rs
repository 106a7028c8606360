//! Figures the demo prints: how fast, how big. They are shown, never judged: machines are noisy.

use std::fs;

use anyhow::{Context, Result};

use super::Stage;
use crate::progress::Progress;

/// How many pods are added for the median.
const ADDS: usize = 20;

pub(super) fn take(stage: &Stage, progress: &Progress) -> Result<String> {
    let mut lines = vec![format!("CNI ADD      {}", additions(stage, progress)?)];
    let mut memory = Vec::new();
    for node in stage.lab.nodes() {
        memory.push(format!("{:.1} MiB", resident_mib(stage, &node)?));
    }
    lines.push(format!("sluiced      {} resident", memory.join(", ")));
    let folder = &stage.lab.record().binaries;
    let mut sizes = Vec::new();
    for name in ["sluice", "sluiced", "sluicectl"] {
        let path = folder.join(name);
        let size = fs::metadata(&path).with_context(|| format!("reading {}", path.display()))?;
        #[expect(clippy::cast_precision_loss, reason = "for show, one decimal")]
        let mib = size.len() as f64 / f64::from(1 << 20);
        sizes.push(format!("{name} {mib:.1} MiB"));
    }
    lines.push(format!("binaries     {}", sizes.join(", ")));
    Ok(lines.join("\n"))
}

/// Adds pods one after the other on one node, the plugin's process start included in what is measured.
fn additions(stage: &Stage, progress: &Progress) -> Result<String> {
    let mut took = Vec::new();
    let mut names = Vec::new();
    for number in 0..ADDS {
        progress.step(format!("measuring CNI ADD ({}/{ADDS})", number + 1));
        let name = format!("timed-{number}");
        let pod = stage
            .lab
            .pod_add("node1", &name, &[], &["busybox", "sleep", "3600"])?;
        took.push(pod.add_microseconds);
        names.push(name);
    }
    progress.step("removing the measured pods");
    for name in names {
        stage.lab.pod_rm(&name)?;
    }
    took.sort_unstable();
    #[expect(clippy::cast_precision_loss, reason = "for show, two decimals")]
    let shown = |microseconds: u64| format!("{:.2} ms", microseconds as f64 / 1000.0);
    Ok(format!(
        "median {} of {ADDS}, {} to {}",
        shown(took[ADDS / 2]),
        shown(took[0]),
        shown(took[ADDS - 1])
    ))
}

fn resident_mib(stage: &Stage, node: &str) -> Result<f64> {
    let number = stage.lab.daemon_number(node)?;
    let status = stage
        .lab
        .node(node)
        .run(&["cat", &format!("/proc/{number}/status")])?;
    let kib: f64 = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .with_context(|| format!("no VmRSS in {status:?}"))?;
    Ok(kib / 1024.0)
}
