//! What twenty thousand pods leave: files, the daemon's memory, and time. All of it is to stay as it was, but for the addresses that
//! rest: each is remembered for two minutes, and in a pool of 65,536 until it is given again or long forgotten.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::ProgressBar;

use super::HEAP;
use super::contender::Contender;
use super::measure::at_once;
use super::stage::{Daemon, Pod};
use crate::figures::{self, Figure, Samples};

/// How often it is looked.
const LOOKS: usize = 10;

/// What there was after so many pods.
pub struct Look {
    pods: usize,
    files: usize,
    bytes: u64,
    resting: usize,
    resident: u64,
    add: Samples,
    del: Samples,
}

/// Adds and removes `count` pods, [`HEAP`] at once.
///
/// # Errors
/// A call failed.
pub fn measure(
    contender: &Contender,
    state: &Path,
    daemon: &Daemon,
    pods: &[Pod],
    count: usize,
    bar: &ProgressBar,
) -> Result<Vec<Look>> {
    let heap = pods.get(..HEAP).context("the bench has too few pods")?;
    let rounds = count / HEAP / LOOKS;
    bar.set_message(format!("{count} pods come and go"));
    bar.set_position(0);
    bar.set_length((rounds * LOOKS) as u64);
    let mut looks = Vec::new();
    for number in 1..=LOOKS {
        let (mut add, mut del) = (Samples::default(), Samples::default());
        for _ in 0..rounds {
            add.extend(at_once(contender, "ADD", heap)?.0);
            del.extend(at_once(contender, "DEL", heap)?.0);
            bar.inc(1);
        }
        let (files, bytes) = size(state)?;
        let (resting, of_these) = size(&state.join("resting"))?;
        looks.push(Look {
            pods: number * rounds * HEAP,
            files: files - resting,
            bytes: bytes - of_these,
            resting,
            resident: daemon.resident()?,
            add,
            del,
        });
    }
    Ok(looks)
}

/// Files below a folder, and what they hold.
fn size(folder: &Path) -> Result<(usize, u64)> {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let data = entry.metadata()?;
        if data.is_dir() {
            let (inside, held) = size(&entry.path())?;
            files += inside;
            bytes += held;
        } else {
            files += 1;
            bytes += data.len();
        }
    }
    Ok((files, bytes))
}

/// A line for each look.
pub fn table(looks: &[Look]) -> String {
    let header = [
        "pods come and gone",
        "files of state",
        "bytes",
        "addresses that rest",
        "sluiced, KiB resident",
        "ADD, median ms",
        "DEL, median ms",
    ];
    let shown = |samples: &Samples| {
        samples
            .quantile(0.5)
            .map_or_else(String::new, |ms| format!("{ms:.2}"))
    };
    let rows = looks.iter().map(|look| {
        vec![
            look.pods.to_string(),
            look.files.to_string(),
            look.bytes.to_string(),
            look.resting.to_string(),
            look.resident.to_string(),
            shown(&look.add),
            shown(&look.del),
        ]
    });
    figures::table(header, rows)
}

/// The last look beside the first.
pub fn figures(looks: &[Look]) -> Vec<Figure> {
    let (Some(first), Some(last)) = (looks.first(), looks.last()) else {
        return Vec::new();
    };
    let one = |what: &str, value: u64, before: u64, unit: &'static str| Figure {
        name: format!("after {} pods: {what}", last.pods),
        value: value as f64,
        unit,
        baseline: Some(before as f64),
        ratio: (before > 0).then(|| value as f64 / before as f64),
        runs: 1,
        min: value as f64,
        max: value as f64,
    };
    let mut figures = vec![
        one("files of state", last.files as u64, first.files as u64, "files"),
        one("bytes of state", last.bytes, first.bytes, "bytes"),
        one("sluiced, resident", last.resident, first.resident, "KiB"),
    ];
    let add = format!("after {} pods: ADD, {HEAP} at once, median", last.pods);
    figures.extend(last.add.figure(add, 0.5, first.add.quantile(0.5)));
    figures
}
