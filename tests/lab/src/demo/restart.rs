//! Requests that run while every daemon is killed: none may fail.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;

use super::checks::{KUBIA_WEB, NODE_PORT};
use super::{Outcome, Stage};
use crate::lab::{Lab, wait_until};
use crate::place::{Node, Running, url};

/// Requests that are made one after the other until told to stop.
#[derive(Debug)]
pub struct Load {
    what: String,
    running: Running,
}

/// The file on a node that stops the loops there.
const STOP: &str = "/run/stop-load";
/// Of how many failures a loop tells.
const TOLD: usize = 5;
/// How many requests a loop has made so far.
const COUNT: &str = "/run/load";

impl Load {
    /// Starts a loop of requests for `url`, each on a connection of its own.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(from: &Node<'_>, name: &str, url: &str) -> Result<Self> {
        // A failure is told with its time, to be found in the daemons' logs, and with how long it took: 3 s is silence, less a refusal.
        let script = format!(
            "n=0; f=0; while [ ! -e {STOP} ]; do read -r b _ < /proc/uptime; \
             e=$(timeout 3 busybox wget -q -O /dev/null {url} 2>&1) || {{ r=$?; read -r a _ < /proc/uptime; f=$((f+1)); \
             [ $f -gt {TOLD} ] || echo \"number $n ended at $(date -u +%T) with $r, uptime $b to $a: $e\"; }}; \
             n=$((n+1)); echo $n > {COUNT}-{name}; done; echo $n $f"
        );
        // What a former loop of that name counted is not this one's.
        from.run(&["rm", "-f", &format!("{COUNT}-{name}")])?;
        Ok(Self {
            what: format!("{name} to {url}"),
            running: from.spawn(&["busybox", "sh", "-c", &script])?,
        })
    }

    /// Waits for the loop's end and gives how many requests it made and what went wrong with them.
    ///
    /// # Errors
    /// It did not end as it should.
    pub fn finish(self) -> Result<Loaded> {
        let output = self.running.finish()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let mut lines: Vec<&str> = said.lines().collect();
        let (made, failed) = lines
            .pop()
            .and_then(|last| last.split_once(' '))
            .ok_or_else(|| anyhow!("{} said {said:?}", self.what))?;
        Ok(Loaded {
            what: self.what,
            made: made.parse().context("counting requests")?,
            failed: failed.parse().context("counting failed requests")?,
            how: lines.join(", "),
        })
    }
}

/// What a loop of requests has to say at its end. Shown, it is what was asked for and what failed of it.
#[derive(Debug)]
pub struct Loaded {
    what: String,
    /// Requests it made.
    pub made: usize,
    /// How many of them failed.
    pub failed: usize,
    /// Of the first requests that failed, when, after how long, and what the client said.
    how: String,
}

impl fmt::Display for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            made,
            failed,
            how,
        } = self;
        write!(f, "{what}: {failed} of {made} failed ({how})")
    }
}

/// Waits until the loop called `name` has made `more` further requests.
///
/// # Errors
/// It does not.
pub fn wait_for_requests(from: &Node<'_>, name: &str, more: usize) -> Result<()> {
    let file = format!("{COUNT}-{name}");
    let made = || -> usize {
        let said = from.run(&["cat", &file]).unwrap_or_default();
        said.trim().parse().unwrap_or(0)
    };
    let before = made();
    wait_until(
        &format!("the load of {name} goes on"),
        Duration::from_secs(30),
        || Ok(made() >= before + more),
    )
}

/// Lets new loops run on these places.
///
/// # Errors
/// A place is gone.
pub fn allow(places: &[Node<'_>]) -> Result<()> {
    places
        .iter()
        .try_for_each(|place| place.run(&["rm", "-f", STOP]).map(drop))
}

/// Ends the loops on these places.
///
/// # Errors
/// A place is gone.
pub fn stop(places: &[Node<'_>]) -> Result<()> {
    places
        .iter()
        .try_for_each(|place| place.run(&["touch", STOP]).map(drop))
}

/// Kills a node's daemon with SIGKILL and waits until another one serves.
///
/// # Errors
/// None comes.
pub fn kill_and_wait(lab: &Lab, node: &str) -> Result<()> {
    let before = lab.daemon_number(node)?;
    lab.kill_sluiced(node, Signal::SIGKILL)?;
    wait_until(
        &format!("sluiced is healthy again on {node}"),
        Duration::from_secs(30),
        || {
            let is_new = lab.daemon_number(node)? != before;
            Ok(is_new && lab.node(node).exec(&["sluicectl", "status"])?.status.success())
        },
    )
}

pub(super) fn kill_under_load(stage: &mut Stage) -> Outcome {
    let lab = &stage.lab;
    let is_v4 = stage.families().contains(&true);
    let cluster_ip = KUBIA_WEB[usize::from(!is_v4)];
    let nodes = lab.nodes();
    let mut load = Vec::new();
    for node in &nodes {
        let pod = stage.pods.iter().find(|pod| pod.node == *node);
        if let Some(pod) = pod {
            load.push((lab.pod(&pod.name)?, pod.name.clone(), url(cluster_ip, 80, "")));
        }
        let address = stage.host_address(node, is_v4)?;
        load.push((
            lab.client(),
            format!("client-{node}"),
            url(&address, NODE_PORT, ""),
        ));
    }
    let requests = under_load(&load, || {
        nodes.iter().try_for_each(|node| kill_and_wait(lab, node))
    })?;
    Ok((
        requests,
        format!("{} daemons killed, no request failed", nodes.len()),
    ))
}

/// Does something while requests are made: from each place, in a loop of that name, for that URL. Gives how many were made.
///
/// # Errors
/// One of them failed, or what was done.
pub fn under_load(load: &[(Node<'_>, String, String)], act: impl FnOnce() -> Result<()>) -> Result<usize> {
    let places: Vec<Node<'_>> = load.iter().map(|(place, ..)| place.clone()).collect();
    allow(&places)?;
    let mut loads = Vec::new();
    for (place, name, url) in load {
        loads.push(Load::start(place, name, url)?);
    }
    let all_go_on = || {
        load.iter()
            .try_for_each(|(place, name, _)| wait_for_requests(place, name, 10))
    };
    let worked = all_go_on().and_then(|()| act()).and_then(|()| all_go_on());
    // Stopped in any case, or the loops are waited for without end.
    stop(&places)?;
    let mut requests = 0;
    let mut failures = Vec::new();
    for load in loads {
        let loaded = load.finish()?;
        requests += loaded.made;
        if loaded.failed > 0 {
            failures.push(loaded.to_string());
        }
    }
    let failures = failures.join("; ");
    match worked {
        Ok(()) if failures.is_empty() => Ok(requests),
        Ok(()) => bail!("{failures}"),
        Err(error) => Err(error.context(format!("of {requests} requests failed: [{failures}]"))),
    }
}
