//! A real podman with its CNI backend on a lab node, its storage in the node's own memory.

use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::Value;
use sluice_lab::images::web;
use sluice_lab::{Lab, Node, wait_until};

use crate::PATIENCE;

/// Rootless podman aside, what a user would write, but for the storage's place.
const CONTAINERS: &str = "[network]\n\
    network_backend = \"cni\"\n\
    cni_plugin_dirs = [\"/opt/cni/bin\"]\n\
    network_config_dir = \"/etc/cni/net.d\"\n\
    [engine]\n\
    cgroup_manager = \"cgroupfs\"\n\
    events_logger = \"file\"\n\
    runtime = \"runc\"\n";
const STORAGE: &str = "[storage]\n\
    driver = \"overlay\"\n\
    runroot = \"/run/podman-run\"\n\
    graphroot = \"/run/podman-root\"\n";
const POLICY: &str = r#"{ "default": [{ "type": "insecureAcceptAnything" }] }"#;

/// The podman of a node.
pub struct Podman<'lab> {
    place: Node<'lab>,
}

impl<'lab> Podman<'lab> {
    /// Configures podman on `node` and gives it the image.
    ///
    /// # Errors
    /// It is not here (package podman), or does not take the image.
    pub fn set_up(lab: &'lab Lab, node: &str) -> Result<Self> {
        let init = lab.record().member(node)?.init;
        let write = |path: &str, content: &[u8]| {
            let path = init.root(path);
            let folder = path.parent().unwrap_or(&path);
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
            fs::write(&path, content).with_context(|| format!("writing {}", path.display()))
        };
        write("/etc/containers/containers.conf", CONTAINERS.as_bytes())?;
        write("/etc/containers/storage.conf", STORAGE.as_bytes())?;
        write("/etc/containers/policy.json", POLICY.as_bytes())?;
        write("/run/image.tar", &web::archive()?)?;
        let podman = Self {
            place: lab.node(node),
        };
        podman.run(&["load", "--input", "/run/image.tar"])?;
        Ok(podman)
    }

    /// Runs podman.
    ///
    /// # Errors
    /// It failed.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        // Images are unpacked in a folder of the node's own.
        let start = ["env", "TMPDIR=/run", "podman"];
        self.place.run(&[&start, arguments].concat())
    }

    /// Starts a container in `network` (a name, or with `:key=value` what it asks for), waits until it serves and gives its addresses.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&self, name: &str, network: &str) -> Result<Vec<IpAddr>> {
        let named = format!("NAME={name}");
        // The limit of processes would want a cgroup controller that a lab node has not.
        let flags = [
            "run",
            "--detach",
            "--pids-limit",
            "0",
            "--env",
            &named,
            "--name",
            name,
        ];
        self.run(&[&flags[..], &["--network", network, web::NAME]].concat())?;
        let get = format!("http://127.0.0.1:{}/", web::PORT);
        wait_until("the container serves", PATIENCE, || {
            Ok(self.inside(name, &["wget", "-q", "-O", "-", &get])?.trim() == name)
        })?;
        let inspected: Value = serde_json::from_str(&self.run(&["inspect", name])?)?;
        let bare = network.split(':').next().unwrap_or(network);
        let found = &inspected[0]["NetworkSettings"]["Networks"][bare];
        ["IPAddress", "GlobalIPv6Address"]
            .iter()
            .filter_map(|key| found[key].as_str().filter(|address| !address.is_empty()))
            .map(|address| {
                address
                    .parse()
                    .with_context(|| format!("{address:?} is no address"))
            })
            .collect()
    }

    /// Runs a busybox applet inside a container.
    ///
    /// # Errors
    /// It failed.
    pub fn inside(&self, container: &str, applet: &[&str]) -> Result<String> {
        self.run(&[&["exec", container, "/bin/busybox"], applet].concat())
    }

    /// Removes a container, running or not.
    ///
    /// # Errors
    /// It failed.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.run(&["rm", "--force", "--time", "0", name]).map(drop)
    }
}
