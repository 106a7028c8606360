//! `cni`: a pod's ADD and DEL.
//!
//! Contenders take turns call by call, so that whatever else the machine does falls on all of them alike; but an ADD that follows on another
//! contender's DEL meets cold caches and what the kernel still has to do of that, so ADDs are measured in a row too. All do IPv4
//! alone: the reference plugins wait a second and more for IPv6 duplicate detection, which would say nothing else.

mod contender;
mod measure;
mod reboot;
mod report;
mod stage;
mod wear;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::figures;
use contender::Contender;

/// How often each thing is done.
pub struct Counts {
    /// ADD and DEL one at a time.
    pub alone: usize,
    /// Heaps of [`HEAP`] at once.
    pub heaps: usize,
    /// ADDs of all pods, in turn one by one and in heaps, and DELs of all at once.
    pub floods: usize,
    /// Pods in a flood, and ADDs per pool.
    pub pods: u16,
    /// Process starts.
    pub starts: usize,
    /// Pods that come and go in all, to see what they leave.
    pub wear: usize,
}

/// How many calls are "at once" in the figures of that name.
pub const HEAP: usize = 8;

const FULL: Counts = Counts {
    alone: 200,
    heaps: 25,
    floods: 3,
    pods: 250,
    starts: 100,
    wear: 20_000,
};

const QUICK: Counts = Counts {
    alone: 20,
    heaps: 3,
    floods: 2,
    pods: 50,
    starts: 10,
    wear: 800,
};

/// Measures, prints a table and writes `cni.json` into `results`.
///
/// # Errors
/// A program is missing, or a call failed.
pub fn run(quick: bool, results: &Path, binaries: Option<PathBuf>, peers: PathBuf) -> Result<()> {
    let counts = if quick { QUICK } else { FULL };
    let own = std::env::current_exe().context("finding this program's own path")?;
    let binaries = binaries
        .or_else(|| own.parent().map(Path::to_path_buf))
        .unwrap_or_default();
    // What is relative now may be hidden once the stage has mounts of its own.
    let binaries = std::path::absolute(binaries).context("finding the binaries")?;
    let (plugin, program) = (binaries.join("sluice"), binaries.join("sluiced"));
    for (needed, remedy) in [
        (&plugin, "build it with: ./dev build"),
        (&program, "build it with: ./dev build"),
        (
            &peers.join("ptp"),
            "install the package containernetworking-plugins",
        ),
    ] {
        if !needed.exists() {
            bail!("{} is missing; {remedy}", needed.display());
        }
    }

    stage::enter()?;
    let bar = progress();
    bar.set_message("making pods");
    let pods = stage::pods(counts.pods * 2)?;
    let daemon = stage::daemon(&program)?;
    let node_file = stage::node_file("node", "10.204.0.0/16")?;
    let contenders = [
        Contender::bare()?,
        Contender::sluice("sluice", plugin.clone(), &node_file),
        Contender::ptp(peers.clone(), false),
        Contender::bridge(peers.clone()),
        Contender::ptp(peers, true),
    ];
    let pools = [
        Contender::sluice(
            "pool /24",
            plugin.clone(),
            &stage::node_file("small", "10.205.0.0/24")?,
        ),
        Contender::sluice("pool /16", plugin, &stage::node_file("large", "10.206.0.0/16")?),
    ];
    let measured = measure::all(&contenders, &pools, &pods, &counts, &bar)?;
    let state = node_file.with_extension("ipam");
    let looks = wear::measure(&contenders[1], &state, &daemon, &pods, counts.wear, &bar)?;
    let node = &pods[..usize::from(counts.pods)];
    drop(daemon);
    let filled = reboot::measure(&contenders[1], &node_file, &program, node, &bar)?;
    bar.finish_and_clear();
    let mut figures = report::figures(&measured);
    figures.extend(wear::figures(&looks));
    figures.extend(filled.figures());
    println!(
        "{}\n {}\n\n{}",
        report::table(&measured),
        filled.line(),
        wear::table(&looks)
    );
    let path = figures::write(results, "cni", &figures)?;
    println!("{} figures in {}", figures.len(), path.display());
    Ok(())
}

/// Shown on a terminal only.
fn progress() -> ProgressBar {
    let bar = ProgressBar::new(1);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {pos}/{len} ({elapsed})") {
        bar.set_style(style);
    }
    bar
}
