//! Places in a lab where things are run: a node, the client, a pod. Everything goes through `sluice-lab exec`.

use std::process::{Child, Output, Stdio};

use anyhow::{Context, Result, anyhow};

use crate::lab::Lab;
use crate::{cgroup, up};

/// A place to run things: a node, the client, or a pod.
#[derive(Debug, Clone)]
pub struct Node<'lab> {
    lab: &'lab Lab,
    name: String,
    pod: Option<String>,
}

impl<'lab> Node<'lab> {
    pub(crate) fn new(lab: &'lab Lab, name: &str, pod: Option<String>) -> Self {
        Self {
            lab,
            name: name.to_owned(),
            pod,
        }
    }

    fn command(&self, command: &[&str]) -> std::process::Command {
        let flags: Vec<&str> = self.pod.iter().flat_map(|pod| ["--pod", pod]).collect();
        let mut exec = up::exec_command(self.lab.record(), &self.name, &flags, command);
        exec.stdin(Stdio::null());
        exec
    }

    /// What errors call this place.
    fn shown(&self) -> &str {
        self.pod.as_ref().unwrap_or(&self.name)
    }

    /// Runs a command and gives what it printed and how it ended.
    ///
    /// # Errors
    /// It could not be run. That it failed is no error.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        self.command(command)
            .output()
            .with_context(|| format!("running {} on {}", command.join(" "), self.shown()))
    }

    /// Runs a command that has to succeed and gives what it printed.
    ///
    /// # Errors
    /// It failed; with what it said.
    pub fn run(&self, command: &[&str]) -> Result<String> {
        let output = self.exec(command)?;
        if !output.status.success() {
            return Err(up::failure(self.shown(), command, &output));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a shell script that has to succeed and gives what it printed.
    ///
    /// # Errors
    /// It failed; with what it said.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(&["busybox", "sh", "-c", script])
    }

    /// Starts a command and leaves it running; it is killed when the value is dropped.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, command: &[&str]) -> Result<Running> {
        let child = self
            .command(command)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {} on {}", command.join(" "), self.shown()))?;
        Ok(Running { child: Some(child) })
    }

    /// Fetches `path` over HTTP from `host:port` (an address, or a name) and gives the body without its line end.
    ///
    /// # Errors
    /// No answer within two seconds, or an HTTP error.
    pub fn get(&self, host: &str, port: u16, path: &str) -> Result<String> {
        let url = url(host, port, path);
        let body = self.run(&["timeout", "2", "busybox", "wget", "-q", "-O", "-", &url])?;
        Ok(body.trim().to_owned())
    }

    /// Asks a UDP service who it is, over a connected socket or one that is not.
    ///
    /// # Errors
    /// No answer, or one from an address that was not asked.
    pub fn ask_udp(&self, address: &str, port: u16, connected: bool) -> Result<String> {
        let port = port.to_string();
        let mut command = vec!["sluice-lab", "udp-ask", address, &port];
        if connected {
            command.push("--connected");
        }
        Ok(self.run(&command)?.trim().to_owned())
    }

    /// The processes of this place as the machine numbers them.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        let Ok(mut group) = cgroup::of_lab(self.lab.name()).map(|group| group.join(&self.name)) else {
            return Vec::new();
        };
        if let Some(pod) = &self.pod {
            group = group.join("pods").join(pod);
        }
        cgroup::processes(&group)
    }
}

/// An HTTP address; IPv6 hosts get their brackets.
#[must_use]
pub fn url(host: &str, port: u16, path: &str) -> String {
    if host.contains(':') {
        return format!("http://[{host}]:{port}/{path}");
    }
    format!("http://{host}:{port}/{path}")
}

/// A command that runs in the lab.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
}

impl Running {
    /// Waits for the command's end and gives what it printed.
    ///
    /// # Errors
    /// The kernel's.
    pub fn finish(mut self) -> Result<Output> {
        let child = self
            .child
            .take()
            .ok_or_else(|| anyhow!("it was finished before"))?;
        child.wait_with_output().context("waiting for the command")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Gone already is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
