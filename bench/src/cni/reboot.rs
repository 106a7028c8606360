//! A node that fills, is rebooted and fills again: all of its pods one after the other.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;

use super::contender::Contender;
use super::measure::at_once;
use super::stage::{self, Pod};
use crate::figures::Figure;

/// How long it took.
pub struct Filled {
    pods: usize,
    /// All ADDs.
    before: Duration,
    /// From the daemon's start after the reboot until it listens.
    starting: Duration,
    /// All ADDs after the reboot.
    after: Duration,
}

/// Fills the node, takes away what a reboot does, and fills it again; each time with a daemon of its own, from `program`.
///
/// # Errors
/// A call failed, or what the kernel refused.
pub fn measure(
    contender: &Contender,
    node_file: &Path,
    program: &Path,
    pods: &[Pod],
    bar: &ProgressBar,
) -> Result<Filled> {
    bar.set_message("a reboot");
    bar.set_position(0);
    bar.set_length(2 * pods.len() as u64);
    let fill = || {
        let start = Instant::now();
        for pod in pods {
            contender.call("ADD", pod)?;
            bar.inc(1);
        }
        anyhow::Ok(start.elapsed())
    };
    // Of what was measured before.
    stage::forget_pods(node_file)?;
    let daemon = stage::daemon(program)?;
    let before = fill()?;
    drop(daemon);
    stage::forget_pods(node_file)?;
    let start = Instant::now();
    let _daemon = stage::daemon(program)?;
    let starting = start.elapsed();
    let after = fill()?;
    at_once(contender, "DEL", pods)?;
    Ok(Filled {
        pods: pods.len(),
        before,
        starting,
        after,
    })
}

impl Filled {
    /// A line.
    pub fn line(&self) -> String {
        let [before, starting, after] =
            [self.before, self.starting, self.after].map(|took| took.as_secs_f64() * 1e3);
        format!(
            "{} pods one after the other {before:.0} ms; after a reboot {after:.0} ms, and {starting:.0} ms until the daemon takes removals",
            self.pods
        )
    }

    /// The second time beside the first.
    pub fn figures(&self) -> Vec<Figure> {
        let figure = |when: &str, took: Duration, baseline: Option<Duration>| {
            let value = took.as_secs_f64() * 1e3;
            let baseline = baseline.map(|baseline| baseline.as_secs_f64() * 1e3);
            Figure {
                name: format!("{} ADDs one after the other, in all: sluice, {when}", self.pods),
                value,
                unit: "ms",
                baseline,
                ratio: baseline.map(|baseline| value / baseline),
                runs: 1,
                min: value,
                max: value,
            }
        };
        vec![
            figure("before a reboot", self.before, None),
            figure("after a reboot", self.after, Some(self.before)),
        ]
    }
}
