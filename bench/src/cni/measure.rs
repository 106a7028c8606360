//! The measuring itself.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use indicatif::ProgressBar;

use super::contender::Contender;
use super::stage::Pod;
use super::{Counts, HEAP};
use crate::figures::Samples;

/// What was measured of one contender.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// What the table calls it.
    pub name: &'static str,
    /// Process start.
    pub start: Samples,
    /// ADD, one at a time, each after another contender's DEL.
    pub add: Samples,
    /// ADD, one after the other, as when a node fills.
    pub add_in_a_row: Samples,
    /// DEL, one at a time.
    pub del: Samples,
    /// Each of [`HEAP`] ADDs at once, after another contender's DELs.
    pub add_at_once: Samples,
    /// Each of [`HEAP`] ADDs at once, one such heap after the other.
    pub heaps_in_a_row: Samples,
    /// Each of [`HEAP`] DELs at once.
    pub del_at_once: Samples,
    /// All DELs of a node's pods at once, from the first's start to the last's end.
    pub flood: Samples,
}

/// All that was measured.
pub struct All {
    /// Of each contender, the limit first.
    pub contenders: Vec<Measured>,
    /// ADDs, one at a time and none removed between them, onto a small and onto a large pool.
    pub pools: Vec<(&'static str, Samples)>,
    /// Pods in a flood.
    pub pods: usize,
}

/// Measures everything.
///
/// # Errors
/// A call failed.
pub fn all(
    contenders: &[Contender],
    pools: &[Contender],
    pods: &[Pod],
    counts: &Counts,
    bar: &ProgressBar,
) -> Result<All> {
    let named = |contender: &Contender| Measured {
        name: contender.name,
        ..Measured::default()
    };
    let mut measured: Vec<Measured> = contenders.iter().map(named).collect();
    let first = pods.first().context("the bench has no pods")?;
    let heap = pods.get(..HEAP).context("the bench has too few pods")?;
    let flood = &pods[..pods.len() / 2];

    step(bar, "process start", counts.starts);
    for _ in 0..counts.starts {
        for (contender, measured) in contenders.iter().zip(&mut measured) {
            measured.start.add(contender.start()?);
        }
        bar.inc(1);
    }
    step(bar, "ADD and DEL, one at a time", counts.alone);
    for round in 0..counts.alone {
        for (contender, measured) in contenders.iter().zip(&mut measured) {
            let add = contender.call("ADD", first)?;
            live(round);
            let del = contender.call("DEL", first)?;
            // The first of each makes what later ones find: bridges, chains, folders.
            if round > 0 {
                measured.add.add(add);
                measured.del.add(del);
            }
        }
        bar.inc(1);
    }
    step(bar, &format!("ADD and DEL, {HEAP} at once"), counts.heaps);
    for round in 0..counts.heaps {
        for (contender, measured) in contenders.iter().zip(&mut measured) {
            measured.add_at_once.extend(at_once(contender, "ADD", heap)?.0);
            live(round);
            measured.del_at_once.extend(at_once(contender, "DEL", heap)?.0);
        }
        bar.inc(1);
    }
    step(
        bar,
        &format!("DEL, {} at once", flood.len()),
        counts.floods * contenders.len(),
    );
    for number in 0..counts.floods {
        for (contender, measured) in contenders.iter().zip(&mut measured) {
            if number % 2 == 0 {
                for pod in flood {
                    measured.add_in_a_row.add(contender.call("ADD", pod)?);
                }
            } else {
                for heap in flood.chunks(HEAP) {
                    measured.heaps_in_a_row.extend(at_once(contender, "ADD", heap)?.0);
                }
            }
            live(number);
            measured.flood.add(at_once(contender, "DEL", flood)?.1);
            bar.inc(1);
        }
    }
    step(bar, "ADD onto a small and a large pool", flood.len());
    let mut full: Vec<_> = pools.iter().map(|pool| (pool.name, Samples::default())).collect();
    for (one, other) in flood.iter().zip(&pods[flood.len()..]) {
        for ((pool, pod), (_, samples)) in pools.iter().zip([one, other]).zip(&mut full) {
            samples.add(pool.call("ADD", pod)?);
        }
        bar.inc(1);
    }
    Ok(All {
        contenders: measured,
        pools: full,
        pods: flood.len(),
    })
}

/// Lets pods live for longer than the kernel is busy with their ADD. What it waits for in a DEL goes by the ticks of its clock, every 4 ms here: pods end at
/// all times between two.
fn live(round: usize) {
    const LIFE: Duration = Duration::from_millis(20);
    const TICK: usize = 4000;
    thread::sleep(LIFE + Duration::from_micros((round * 370 % TICK) as u64));
}

fn step(bar: &ProgressBar, what: &str, length: usize) {
    bar.set_message(what.to_owned());
    bar.set_position(0);
    bar.set_length(length as u64);
}

/// One call for each of `pods` at the same time: how long each took, and all together, from the first's start to the last's end.
///
/// # Errors
/// A call failed.
pub fn at_once(contender: &Contender, verb: &str, pods: &[Pod]) -> Result<(Vec<Duration>, Duration)> {
    let barrier = Barrier::new(pods.len());
    thread::scope(|scope| {
        let call = |pod| {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                let start = Instant::now();
                contender
                    .call(verb, pod)
                    .map(|took| (start, took, Instant::now()))
            })
        };
        let calls: Vec<_> = pods.iter().map(call).collect();
        let joined = calls.into_iter().map(|call| {
            let took = call.join();
            took.map_err(|_| anyhow!("a thread that calls {} panicked", contender.name))?
        });
        let each = joined.collect::<Result<Vec<_>>>()?;
        let (first, last) = (
            each.iter().map(|(start, ..)| *start).min(),
            each.iter().map(|(.., end)| *end).max(),
        );
        let all = last
            .zip(first)
            .map_or(Duration::ZERO, |(last, first)| last - first);
        Ok((each.into_iter().map(|(_, took, _)| took).collect(), all))
    })
}
