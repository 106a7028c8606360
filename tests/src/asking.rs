//! Requests to one Service from several places, all the while, and conversations that are kept up.

use anyhow::{Context, Result, ensure};
use sluice_lab::{Node, Running, wait_until};

use crate::PATIENCE;

/// Somebody who asks.
pub struct Asker<'a> {
    /// Where it runs.
    pub from: Node<'a>,
    /// Whose files it writes: a pod of the lab has its node's.
    pub files: Node<'a>,
    /// What it asks, as `address:port`.
    pub at: String,
}

impl Asker<'_> {
    /// The answers to this many connections, a line each.
    ///
    /// # Errors
    /// One failed in a way that `talk-ask` does not know.
    pub fn ask(&self, times: usize) -> Result<String> {
        let times = times.to_string();
        self.from
            .run(&["sluice-lab", "talk-ask", "TCP", &self.at, &times, "1"])
    }
}

/// All of them at it, until this goes.
pub struct Asking<'a> {
    askers: &'a [Asker<'a>],
    processes: Vec<Running>,
}

impl<'a> Asking<'a> {
    /// Has each begin.
    ///
    /// # Errors
    /// One cannot be started.
    pub fn start(askers: &'a [Asker<'a>]) -> Result<Self> {
        let started = (0..).zip(askers).map(|(number, asker)| {
            // Not as fast as can be: each connection is remembered for two minutes, and there is room for so many. Not so
            // patient that a lost SYN is sent again.
            let ask = format!("sluice-lab talk-ask --patience 1 TCP '{}' 5 1", asker.at);
            let script = format!("while {ask} >> {}; do busybox usleep 20000; done", file(number));
            asker.from.spawn(&["busybox", "sh", "-c", &script])
        });
        Ok(Self {
            askers,
            processes: started.collect::<Result<_>>()?,
        })
    }

    /// Stops them; each must have asked often, and every answer is one that `serves` says is good.
    ///
    /// # Errors
    /// Who was not answered, and how often.
    pub fn end(self, serves: impl Fn(&str) -> bool) -> Result<()> {
        drop(self.processes);
        for (number, asker) in (0..).zip(self.askers) {
            let said = asker.files.run(&["cat", &file(number)])?;
            let lines: Vec<&str> = said.lines().collect();
            // The last line may have been cut off with its process.
            let (_, whole) = lines.split_last().context("nothing was asked")?;
            let failed: Vec<_> = (1..).zip(whole).filter(|(_, line)| !serves(line)).collect();
            ensure!(whole.len() > 100, "{}: only {} were asked", asker.at, whole.len());
            ensure!(
                failed.is_empty(),
                "{number} {}: {} of {} failed: {failed:?}",
                asker.at,
                failed.len(),
                whole.len()
            );
        }
        Ok(())
    }
}

fn file(number: usize) -> String {
    format!("/run/asked-{number}")
}

/// A conversation over TCP that each of them keeps up, until this goes.
pub struct Kept<'a> {
    askers: &'a [Asker<'a>],
    _processes: Vec<Running>,
}

impl<'a> Kept<'a> {
    /// Has each begin one.
    ///
    /// # Errors
    /// One cannot be started.
    pub fn start(askers: &'a [Asker<'a>]) -> Result<Self> {
        let started = (0..).zip(askers).map(|(number, asker)| {
            let script = format!("exec sluice-lab talk-keep TCP '{}' > {}", asker.at, kept(number));
            asker.from.spawn(&["busybox", "sh", "-c", &script])
        });
        Ok(Self {
            askers,
            _processes: started.collect::<Result<_>>()?,
        })
    }

    /// Waits until each has been answered a few times more.
    ///
    /// # Errors
    /// One ended, or nobody answers.
    pub fn go_on(&self) -> Result<()> {
        for number in 0..self.askers.len() {
            let before = self.answers(number).unwrap_or_default();
            wait_until("the conversation goes on", PATIENCE, || {
                Ok(self.answers(number)? > before + 2)
            })?;
        }
        Ok(())
    }

    fn answers(&self, number: usize) -> Result<usize> {
        let asker = &self.askers[number];
        let said = asker.files.run(&["cat", &kept(number)])?;
        ensure!(!said.contains("ended"), "{}: {said}", asker.at);
        Ok(said.lines().count())
    }
}

fn kept(number: usize) -> String {
    format!("/run/kept-{number}")
}
