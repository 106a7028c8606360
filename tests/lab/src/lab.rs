//! A lab as a value, for tests and the demo: made by [`Lab::up`], gone when dropped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::control_plane::Release;
use crate::down::{down, remove_member};
use crate::options::Options;
use crate::place::Node;
use crate::plan::{self, CLIENT, CONTROL, Host};
use crate::pods::{self, Pod, Wanted};
use crate::progress::Progress;
use crate::state::{self, Record};
use crate::{control_plane, etcd, kubelets, objects, supervise, up};

/// Keeps the names of several labs in one process apart.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// A lab that is up.
#[derive(Debug)]
pub struct Lab {
    record: Record,
    keep: bool,
}

impl Lab {
    /// Makes a lab. A name of `lab` (the default) is replaced by one that no other test has.
    ///
    /// # Errors
    /// What failed; nothing is left behind.
    pub fn up(options: Options) -> Result<Self> {
        let mut options = options;
        if options.name == Options::default().name {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            options.name = format!("test-{}-{number}", std::process::id());
        }
        Self::up_named(&options, &Progress::silent())
    }

    /// Makes a lab of just this name.
    ///
    /// # Errors
    /// What failed; nothing is left behind, unless a lab of that name was up before.
    pub fn up_named(options: &Options, progress: &Progress) -> Result<Self> {
        match up::up(options, progress) {
            Ok(record) => Ok(Self { record, keep: false }),
            Err(error) => {
                // Ours, and only half up: `up` leaves it to look around in, which nobody here will.
                let half_made = Record::load(&options.name).is_ok_and(|record| !record.complete);
                if half_made {
                    down(&options.name)?;
                }
                Err(error)
            }
        }
    }

    /// The lab's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.options.name
    }

    /// What was made.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Leaves the lab up when this value is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// A node by name, or `client`; that there is none shows when it is used.
    #[must_use]
    pub fn node<'lab>(&'lab self, name: &str) -> Node<'lab> {
        Node::new(self, name, None)
    }

    /// The outside host.
    #[must_use]
    pub fn client(&self) -> Node<'_> {
        self.node(CLIENT)
    }

    /// A pod as a place to run things in.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn pod(&self, name: &str) -> Result<Node<'_>> {
        let pod = pods::find(self.name(), name)?;
        Ok(Node::new(self, &pod.node, Some(pod.name)))
    }

    /// The nodes' names.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        self.record.nodes().map(|node| node.host.name.clone()).collect()
    }

    /// A member's addresses on the fabric.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn host(&self, name: &str) -> Result<&Host> {
        Ok(&self.record.member(name)?.host)
    }

    /// Adds a pod with the default process if `command` is empty.
    ///
    /// # Errors
    /// What the CNI plugin answered, or what did not start.
    pub fn pod_add(&self, node: &str, name: &str, labels: &[(&str, &str)], command: &[&str]) -> Result<Pod> {
        let labels: BTreeMap<_, _> = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        self.pod_add_as(&Wanted {
            name: name.to_owned(),
            node: node.to_owned(),
            labels,
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            ..Wanted::default()
        })
    }

    /// Adds a pod with everything that can be said about it.
    ///
    /// # Errors
    /// As [`Lab::pod_add`].
    pub fn pod_add_as(&self, wanted: &Wanted) -> Result<Pod> {
        pods::add(&self.record, wanted)
    }

    /// Runs a command in a pod.
    ///
    /// # Errors
    /// There is no such pod. That the command failed is no error.
    pub fn pod_exec(&self, pod: &str, command: &[&str]) -> Result<Output> {
        self.pod(pod)?.exec(command)
    }

    /// Removes a pod.
    ///
    /// # Errors
    /// What the CNI plugin answered.
    pub fn pod_rm(&self, pod: &str) -> Result<()> {
        pods::rm(&self.record, pod)
    }

    /// Applies a file of Kubernetes YAML.
    ///
    /// # Errors
    /// It is not YAML.
    pub fn apply(&self, file: impl AsRef<Path>) -> Result<()> {
        objects::apply_file(self.name(), file.as_ref()).map(drop)
    }

    /// Applies Kubernetes YAML.
    ///
    /// # Errors
    /// It is not YAML.
    pub fn apply_text(&self, text: &str) -> Result<()> {
        objects::apply_text(self.name(), text, "the test's YAML").map(drop)
    }

    /// Removes the objects a file names.
    ///
    /// # Errors
    /// It is not YAML.
    pub fn delete(&self, file: impl AsRef<Path>) -> Result<()> {
        objects::delete_file(self.name(), file.as_ref()).map(drop)
    }

    /// Removes the objects that Kubernetes YAML names.
    ///
    /// # Errors
    /// It is not YAML.
    pub fn delete_text(&self, text: &str) -> Result<()> {
        objects::delete_text(self.name(), text, "the test's YAML").map(drop)
    }

    /// Removes one object of the namespace `default`, or a Node.
    ///
    /// # Errors
    /// The file system's.
    pub fn delete_object(&self, kind: &str, name: &str) -> Result<bool> {
        objects::delete(self.name(), kind, "default", name)
    }

    /// The folder all nodes take their desired state from.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        state::manifests(self.name())
    }

    /// Sends a signal to a node's daemon; its supervisor starts it again if it dies.
    ///
    /// # Errors
    /// It is not running.
    pub fn kill_sluiced(&self, node: &str, signal: Signal) -> Result<()> {
        let number = self.daemon_number(node)?;
        let signal = format!("-{}", signal as i32);
        self.node(node)
            .run(&["busybox", "kill", &signal, &number])
            .map(drop)
    }

    /// Stops a node's daemon and its supervisor.
    ///
    /// # Errors
    /// It is not running.
    pub fn stop_sluiced(&self, node: &str) -> Result<()> {
        let place = self.node(node);
        let supervisor = place.run(&["cat", supervise::SUPERVISOR_PID_FILE])?;
        place.run(&["busybox", "kill", "-9", supervisor.trim()])?;
        let number = self.daemon_number(node)?;
        place.run(&["busybox", "kill", "-15", &number])?;
        wait_until("sluiced has ended", Duration::from_secs(10), || {
            Ok(!place.exec(&["busybox", "kill", "-0", &number])?.status.success())
        })?;
        place
            .run(&["rm", "-f", supervise::PID_FILE, supervise::SUPERVISOR_PID_FILE])
            .map(drop)
    }

    /// Starts a node's daemon again after [`Lab::stop_sluiced`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_sluiced(&self, node: &str) -> Result<()> {
        up::supervise_daemon(&self.record, node)
    }

    /// Starts API server number `number` (from 1, which `up` starts) with further arguments, and waits until it is ready.
    ///
    /// # Errors
    /// It is not.
    pub fn start_api_server(&self, number: u16, release: Release, arguments: &[&str]) -> Result<()> {
        control_plane::start_api_server(&self.record, number, release, arguments)
    }

    /// Sends a signal to API server number `number`; after SIGKILL it is gone.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal_api_server(&self, number: u16, signal: Signal) -> Result<()> {
        control_plane::signal_api_server(&self.record, number, signal)
    }

    /// Gives a node's daemon another token for the API, good for a day, or for `lasts` if that is said.
    ///
    /// # Errors
    /// The server's.
    pub fn renew_token(&self, node: &str, lasts: Option<Duration>) -> Result<()> {
        control_plane::renew_token(&self.record, node, lasts)
    }

    /// Has the etcd behind the API servers forget all history.
    ///
    /// # Errors
    /// It does not answer.
    pub fn compact_behind_api(&self) -> Result<()> {
        let read: Value = serde_json::from_str(&control_plane::etcdctl(&self.record, "get / -w json")?)?;
        let revision = &read["header"]["revision"];
        control_plane::etcdctl(&self.record, &format!("compact {revision}")).map(drop)
    }

    /// Where nodes reach API server number `number`.
    ///
    /// # Errors
    /// The lab has no control plane.
    pub fn api_server(&self, number: u16) -> Result<String> {
        Ok(control_plane::server(self.host(CONTROL)?, number))
    }

    /// Sends a signal to member number `number` of etcd, from 1; after SIGKILL it is gone.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal_etcd(&self, number: u8, signal: Signal) -> Result<()> {
        etcd::signal_member(&self.record, number, signal)
    }

    /// Starts a member of etcd again after its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_etcd(&self, number: u8) -> Result<()> {
        etcd::start_member(&self.record, number)
    }

    /// The number of the member of etcd that leads, from 1.
    ///
    /// # Errors
    /// None does.
    pub fn etcd_leader(&self) -> Result<u8> {
        etcd::leader(&self.record)
    }

    /// Runs `etcdctl` as etcd's root, the words of its command with one space between them, and gives what it printed.
    ///
    /// # Errors
    /// What it said.
    pub fn etcdctl(&self, command: &str) -> Result<String> {
        etcd::must(etcd::ctl(&self.record, command, true)?, command)
    }

    /// Starts kube-proxy on a node of a Kubernetes cluster, in this mode of its own.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_kube_proxy(&self, node: &str, mode: &str) -> Result<()> {
        control_plane::start_kube_proxy(&self.record, node, mode)
    }

    /// Kills a node's kube-proxy, which leaves all it made.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill_kube_proxy(&self, node: &str) -> Result<()> {
        control_plane::kill_kube_proxy(&self.record, node)
    }

    /// Kills a node's kubelet and starts it again.
    ///
    /// # Errors
    /// It does not run, or cannot be started.
    pub fn restart_kubelet(&self, node: &str) -> Result<()> {
        kubelets::restart(&self.record, node)
    }

    /// Kills a node's containerd and starts it again; its containers live on.
    ///
    /// # Errors
    /// It does not run, or does not answer again.
    pub fn restart_containerd(&self, node: &str) -> Result<()> {
        kubelets::restart_containerd(&self.record, node)
    }

    /// Runs `kubectl` as administrator, the words of its command with one space between them, and gives what it printed.
    ///
    /// # Errors
    /// What it said.
    pub fn kubectl(&self, command: &str) -> Result<String> {
        self.kubectl_words(&command.split(' ').collect::<Vec<_>>())
    }

    /// Runs `kubectl` with words that may have spaces in them.
    ///
    /// # Errors
    /// As [`Lab::kubectl`].
    pub fn kubectl_words(&self, words: &[&str]) -> Result<String> {
        let output = kubelets::kubectl(&self.record, words)?;
        if !output.status.success() {
            return Err(up::failure(CONTROL, &[&["kubectl"], words].concat(), &output));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The number of a node's daemon, inside the node.
    ///
    /// # Errors
    /// It is not running.
    pub fn daemon_number(&self, node: &str) -> Result<String> {
        let number = self.node(node).run(&["cat", supervise::PID_FILE])?;
        Ok(number.trim().to_owned())
    }

    /// Runs `sluicectl` on a node with `-o json` and gives what it printed.
    ///
    /// # Errors
    /// It failed, or printed something else.
    pub fn ctl_json(&self, node: &str, arguments: &[&str]) -> Result<Value> {
        let command = [&["sluicectl"], arguments, &["-o", "json"]].concat();
        let output = self.node(node).exec(&command)?;
        serde_json::from_slice(&output.stdout)
            .map_err(|error| up::failure(node, &command, &output).context(error.to_string()))
    }

    /// Adds one more node and waits until it takes pods.
    ///
    /// # Errors
    /// What failed.
    pub fn join(&mut self, number: u8) -> Result<()> {
        let host = plan::node(&self.record.options, number);
        let name = host.name.clone();
        up::add_host(&mut self.record, host, &Progress::silent())?;
        let node = self.record.member(&name)?;
        up::start_daemon(&self.record, node)?;
        up::wait_for_conflist(&self.record, node, Instant::now() + Duration::from_secs(30))
    }

    /// Takes a node away, as if its power was cut and it was deleted from the cluster.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn leave(&mut self, node: &str) -> Result<()> {
        self.delete_object("Node", node)?;
        self.cut_power(node)
    }

    /// Takes a node's power away; the cluster is told nothing.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn cut_power(&mut self, node: &str) -> Result<()> {
        remove_member(self.name(), node)?;
        self.record.members.retain(|member| member.host.name != node);
        self.record.save()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() && self.record.options.kubelets {
            let logs =
                self.kubectl("-n kube-system logs -l app.kubernetes.io/name=sluice --tail=40 --prefix");
            eprintln!(
                "--- the end of sluiced's logs\n{}",
                logs.unwrap_or_else(|error| format!("{error:#}"))
            );
        } else if std::thread::panicking() && !self.record.options.bare {
            for node in self.nodes() {
                let end = up::log_end(self.name(), &node, 40);
                eprintln!("--- the end of sluiced's log on {node}\n{end}");
            }
        }
        if self.keep {
            return;
        }
        if let Err(error) = down(self.name()) {
            eprintln!("lab {} could not be removed: {error:#}", self.name());
        }
    }
}

/// Asks `condition` until it says yes; an error counts as a no, and is told when time is up.
///
/// # Errors
/// It never said yes.
pub fn wait_until(what: &str, patience: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let answer = condition();
        if matches!(answer, Ok(true)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            match answer {
                Err(error) => return Err(error.context(format!("never came true in {patience:?}: {what}"))),
                Ok(_) => bail!("never came true in {patience:?}: {what}"),
            }
        }
        sleep(Duration::from_millis(20));
    }
}
