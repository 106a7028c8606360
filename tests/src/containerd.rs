//! A real containerd with runc on a lab node, its state in the node's own memory.
//!
//! Nothing of the machine's containerd, if it runs one, is used or touched. What it starts lives in the node's cgroup and
//! PID namespace and dies with the lab.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use sluice_lab::containerd::{CONFIG, SOCKET, config};
use sluice_lab::images::web;
use sluice_lab::{Lab, Node, up, wait_until};

use crate::PATIENCE;
use crate::cri::Client;

const PID: &str = "/run/containerd.pid";
const LOG: &str = "/var/log/containerd.log";

/// How often a command is run whose output was lost.
const OUTPUT_TRIES: u32 = 20;

/// The containerd of a node.
pub struct Containerd<'lab> {
    lab: &'lab Lab,
    node: String,
}

impl<'lab> Containerd<'lab> {
    /// Starts containerd on `node` and gives it the image.
    ///
    /// # Errors
    /// It does not start (packages containerd and runc), or does not take the image.
    pub fn start(lab: &'lab Lab, node: &str) -> Result<Self> {
        let containerd = Self {
            lab,
            node: node.to_owned(),
        };
        // Its CRI service has the loopback device of every sandbox switched on by a plugin.
        sluice_lab::cni::install_reference_plugins(lab.record(), node, &["loopback"])?;
        containerd.write(CONFIG, config(web::NAME).as_bytes())?;
        containerd.run()?;
        containerd.write("/run/image.tar", &web::archive()?)?;
        for namespace in ["default", "k8s.io"] {
            containerd.ctr_in(namespace, &["image", "import", "/run/image.tar"])?;
        }
        Ok(containerd)
    }

    /// Starts containerd again after [`Containerd::kill`].
    ///
    /// # Errors
    /// It does not start.
    pub fn run(&self) -> Result<()> {
        let script = format!("echo $$ > {PID}; exec containerd --config {CONFIG}");
        let detach = ["--detach-to", LOG];
        let output = up::exec_command(
            self.lab.record(),
            &self.node,
            &detach,
            &["busybox", "sh", "-c", &script],
        )
        .output()
        .context("starting containerd")?;
        if !output.status.success() {
            bail!("containerd: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        wait_until("containerd answers", PATIENCE, || {
            self.cri()?.version().map(|_| true)
        })
    }

    /// Kills containerd itself, as the kernel would for want of memory; what it started lives on.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&self) -> Result<()> {
        let number = self.place().run(&["cat", PID])?;
        let number = number.trim();
        self.place().run(&["busybox", "kill", "-9", number])?;
        wait_until("containerd is dead", PATIENCE, || {
            Ok(!self
                .place()
                .exec(&["busybox", "kill", "-0", number])?
                .status
                .success())
        })
    }

    /// Kills what keeps a sandbox and takes its namespace away, behind containerd's back.
    ///
    /// # Errors
    /// There is no such sandbox.
    pub fn wreck(&self, sandbox: &str) -> Result<()> {
        let task = format!("/run/containerd-state/io.containerd.runtime.v2.task/k8s.io/{sandbox}");
        // The shim is its container's parent.
        let script = format!(
            "inside=$(cat {task}/init.pid) && netns=$(readlink /proc/$inside/ns/net) && \
             kill -9 $(cut -d ' ' -f 4 /proc/$inside/stat) $inside && \
             for f in /run/netns/cni-*; do \
               if [ \"net:[$(stat -c %i $f)]\" = \"$netns\" ]; then umount $f && rm $f && echo gone; fi; \
             done"
        );
        let said = self.place().sh(&script)?;
        if said.trim() != "gone" {
            bail!("the namespace of {sandbox} was not found: {said}");
        }
        Ok(())
    }

    /// The node.
    #[must_use]
    pub fn place(&self) -> Node<'lab> {
        self.lab.node(&self.node)
    }

    /// Runs `ctr` in containerd's default namespace.
    ///
    /// # Errors
    /// It failed.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        self.ctr_in("default", arguments)
    }

    /// Runs `ctr` in a namespace of containerd; `k8s.io` is that of CRI.
    ///
    /// # Errors
    /// It failed.
    pub fn ctr_in(&self, namespace: &str, arguments: &[&str]) -> Result<String> {
        self.place()
            .run(&[&["ctr", "--namespace", namespace], arguments].concat())
    }

    /// Starts a container with `ctr run --cni` and waits until it has its network. Detached, `ctr` never calls DEL; so
    /// it stays in front, and calls it when the container ends or the value is dropped.
    ///
    /// # Errors
    /// It does not start.
    pub fn run_cni(&self, name: &str) -> Result<sluice_lab::Running> {
        let named = format!("NAME={name}");
        // Without shares, as the node's cgroup has no CPU controller to take them.
        let command = [
            "ctr",
            "run",
            "--rm",
            "--cni",
            "--cpu-shares",
            "0",
            "--env",
            &named,
            web::NAME,
            name,
        ];
        let running = self.place().spawn(&command)?;
        wait_until("the container serves", PATIENCE, || {
            let get = format!("http://127.0.0.1:{}/", web::PORT);
            let said = self.inside("default", name, &["wget", "-q", "-O", "-", &get])?;
            let addresses = self.inside("default", name, &["ip", "-o", "address", "show", "eth0"])?;
            Ok(said.trim() == name && addresses.contains("inet"))
        })?;
        Ok(running)
    }

    /// Runs a busybox applet inside a container; one that only asks, as it may be run more than once.
    ///
    /// # Errors
    /// It failed.
    pub fn inside(&self, namespace: &str, container: &str, applet: &[&str]) -> Result<String> {
        let start = ["task", "exec", "--exec-id", "asked", container, "/bin/busybox"];
        // On a busy machine `ctr` now and then ends before it has passed on what was printed, and calls that success. So the end of
        // the output says that it is the end.
        let script = ["sh", "-c", "/bin/busybox \"$@\" && echo the-end", "sh"];
        let command = [&start, &script[..], applet].concat();
        for _ in 0..OUTPUT_TRIES {
            if let Some(said) = self
                .ctr_in(namespace, &command)?
                .trim_end()
                .strip_suffix("the-end")
            {
                return Ok(said.to_owned());
            }
        }
        bail!("what {applet:?} printed in {container} was lost {OUTPUT_TRIES} times")
    }

    /// A client of containerd's CRI service.
    ///
    /// # Errors
    /// Its socket does not answer.
    pub fn cri(&self) -> Result<Client> {
        Client::connect(&self.path(SOCKET)?)
    }

    /// The end of containerd's log.
    ///
    /// # Errors
    /// There is none.
    pub fn log_end(&self) -> Result<String> {
        self.place().run(&["tail", "-n", "20", LOG])
    }

    fn path(&self, path: &str) -> Result<PathBuf> {
        Ok(self.lab.record().member(&self.node)?.init.root(path))
    }

    fn write(&self, path: &str, content: &[u8]) -> Result<()> {
        let path = self.path(path)?;
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))
    }
}
