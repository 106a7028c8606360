//! Who is measured, and how each is called.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::stage::{FILES, Pod};
use crate::bare;

/// What does the work of an ADD and a DEL.
pub struct Contender {
    /// What the table calls it.
    pub name: &'static str,
    program: PathBuf,
    /// Its network config; none for the bare work.
    config: Option<String>,
    peers: PathBuf,
}

/// Ranges that host-local gives out; each contender has its own.
fn host_local(name: &str, subnet: &str) -> Value {
    json!({
        "type": "host-local",
        "dataDir": format!("{FILES}/host-local-{name}"),
        "ranges": [[{ "subnet": subnet }]],
        "routes": [{ "dst": "0.0.0.0/0" }],
    })
}

impl Contender {
    /// The bare kernel work, in a process of this program's.
    ///
    /// # Errors
    /// This program's own path cannot be found.
    pub fn bare() -> Result<Self> {
        Ok(Self {
            name: "bare netlink",
            program: std::env::current_exe().context("finding this program's own path")?,
            config: None,
            peers: PathBuf::new(),
        })
    }

    /// Sluice's plugin at `program`, with the pool that `node_file` names.
    pub fn sluice(name: &'static str, program: PathBuf, node_file: &std::path::Path) -> Self {
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "sluice",
            "type": "sluice",
            "nodeFile": node_file,
            "ipamDirectory": node_file.with_extension("ipam"),
        });
        Self {
            name,
            program,
            config: Some(config.to_string()),
            peers: PathBuf::new(),
        }
    }

    /// `ptp` and `host-local`.
    pub fn ptp(peers: PathBuf, masquerade: bool) -> Self {
        let (name, network, subnet) = if masquerade {
            ("ptp ipMasq", "masq", "10.203.0.0/16")
        } else {
            ("ptp", "ptp", "10.201.0.0/16")
        };
        let config = json!({
            "cniVersion": "1.0.0",
            "name": network,
            "type": "ptp",
            "mtu": 1450,
            "ipMasq": masquerade,
            "ipam": host_local(network, subnet),
        });
        Self {
            name,
            program: peers.join("ptp"),
            config: Some(config.to_string()),
            peers,
        }
    }

    /// `bridge` and `host-local`, as flannel has them called.
    pub fn bridge(peers: PathBuf) -> Self {
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "bridge",
            "type": "bridge",
            "bridge": "bench0",
            "isGateway": true,
            "mtu": 1450,
            "ipam": host_local("bridge", "10.202.0.0/16"),
        });
        Self {
            name: "bridge",
            program: peers.join("bridge"),
            config: Some(config.to_string()),
            peers,
        }
    }

    /// Carries out `verb` (ADD, DEL) for `pod` in a process, and says how long that took from its start to its end.
    ///
    /// # Errors
    /// It fails, with what it said.
    pub fn call(&self, verb: &str, pod: &Pod) -> Result<Duration> {
        let mut command = Command::new(&self.program);
        command.env_clear();
        if self.config.is_some() {
            let variables: [(&str, OsString); 6] = [
                ("CNI_COMMAND", verb.into()),
                ("CNI_CONTAINERID", pod.id.clone().into()),
                ("CNI_NETNS", pod.netns.clone().into()),
                ("CNI_IFNAME", "eth0".into()),
                ("CNI_PATH", self.peers.clone().into()),
                ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".into()),
            ];
            command.envs(variables);
        } else {
            let device = format!("bare{}", pod.number);
            command.args([bare::VERB, &verb.to_lowercase(), &device]);
            if verb == "ADD" {
                let [high, low] = (pod.number + 2).to_be_bytes();
                command.arg(&pod.netns).arg(format!("10.200.{high}.{low}"));
            }
        }
        let took = run(&mut command, self.config.as_deref());
        took.with_context(|| format!("{} {verb} for {}", self.name, pod.id))
    }

    /// Starts its process for as little as it can do.
    ///
    /// # Errors
    /// It fails, with what it said.
    pub fn start(&self) -> Result<Duration> {
        let mut command = Command::new(&self.program);
        command.env_clear();
        if self.config.is_some() {
            command.env("CNI_COMMAND", "VERSION");
        } else {
            command.args([bare::VERB, "nothing"]);
        }
        run(&mut command, self.config.as_deref()).with_context(|| format!("starting {}", self.name))
    }
}

fn run(command: &mut Command, stdin: Option<&str>) -> Result<Duration> {
    let input = if stdin.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    };
    command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().context("starting it")?;
    if let (Some(mut pipe), Some(text)) = (child.stdin.take(), stdin) {
        // One that does not read says why in its answer.
        let _ = pipe.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().context("waiting for it")?;
    let took = start.elapsed();
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{}: {}", output.status, String::from_utf8_lossy(&said).trim());
    }
    Ok(took)
}
