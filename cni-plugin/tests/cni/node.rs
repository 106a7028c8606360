//! A node and its pods: namespaces held open by file descriptors alone, so that they vanish with the test however it
//! ends, and the plugin called in them as a runtime would.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Map, Value, json};
use sluice_cni::host_ports::HostPorts;
use sluice_cni::mac::host_device;
use sluice_cni::node_file::{NodeFile, VERSION};
use sluice_ipam::{Attachment, DEFAULT_REST, Store};

pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need the right to make network namespaces");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap())
    }

    /// Runs `work` in a thread inside, and with it the processes it starts.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A path that exists as long as the namespace is held.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    pub fn ip(&self, arguments: &str) -> String {
        self.tool("ip", arguments)
    }

    /// Runs a tool of iproute2, which must succeed.
    pub fn tool(&self, tool: &str, arguments: &str) -> String {
        self.run(|| {
            let output = Command::new(tool).args(arguments.split(' ')).output();
            let output = output.expect("these tests need iproute2");
            assert!(
                output.status.success(),
                "{tool} {arguments}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        })
    }
}

pub struct Node {
    pub namespace: Namespace,
    pub directory: tempfile::TempDir,
}

pub struct Answer {
    pub success: bool,
    pub json: Value,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    pub fn code(&self) -> u64 {
        assert!(!self.success, "succeeded: {}", self.stdout);
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        assert!(!self.json["cniVersion"].as_str().unwrap().is_empty());
        self.json["code"].as_u64().unwrap()
    }

    pub fn text(&self) -> String {
        format!(
            "{}: {}",
            self.json["msg"].as_str().unwrap(),
            self.json["details"].as_str().unwrap()
        )
    }

    #[track_caller]
    pub fn succeeded(self) -> Value {
        assert!(self.success, "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stderr, "");
        self.json
    }
}

impl Node {
    pub fn new(cidrs: &[&str]) -> Self {
        let node = Self {
            namespace: Namespace::new(),
            directory: tempfile::tempdir().unwrap(),
        };
        node.write(&node.file(cidrs));
        node.namespace.run(|| {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        });
        node
    }

    pub fn file(&self, cidrs: &[&str]) -> NodeFile {
        NodeFile {
            version: VERSION,
            node_name: "test".to_owned(),
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            gateway_v4: sluice_cni::names::GATEWAY_V4,
            gateway_v6: sluice_cni::names::GATEWAY_V6,
            mtu: 1450,
            reserved: Vec::new(),
            not_ready: String::new(),
            impaired: String::new(),
        }
    }

    pub fn write(&self, file: &NodeFile) {
        file.write(&self.node_file()).unwrap();
    }

    pub fn node_file(&self) -> PathBuf {
        self.directory.path().join("node.json")
    }

    pub fn ipam(&self) -> PathBuf {
        self.directory.path().join("ipam")
    }

    pub fn removals_socket(&self) -> PathBuf {
        self.directory.path().join("removals.sock")
    }

    pub fn store(&self) -> Store {
        Store::open(self.ipam(), DEFAULT_REST).unwrap()
    }

    pub fn host_ports(&self) -> HostPorts {
        HostPorts::beside(&self.ipam())
    }

    /// ADD with a `runtimeConfig`.
    pub fn add_with(&self, id: &str, pod: &Namespace, runtime: &Value) -> Answer {
        self.call(
            "ADD",
            id,
            &pod.path(),
            &self.with(json!({ "runtimeConfig": runtime })),
        )
    }

    /// CHECK with a `runtimeConfig`.
    pub fn check_with(&self, id: &str, pod: &Namespace, runtime: &Value, result: &Value) -> Answer {
        let config = self.with(json!({ "runtimeConfig": runtime, "prevResult": result }));
        self.call("CHECK", id, &pod.path(), &config)
    }

    pub fn config(&self) -> Map<String, Value> {
        let config = json!({
            "cniVersion": "1.1.0",
            "name": "sluice",
            "type": "sluice",
            "capabilities": { "portMappings": true, "ips": true },
            "nodeFile": self.node_file(),
            "ipamDirectory": self.ipam(),
            "removalsSocket": self.removals_socket(),
        });
        config.as_object().unwrap().clone()
    }

    pub fn with(&self, extra: Value) -> String {
        let mut config = self.config();
        config.extend(extra.as_object().unwrap().clone());
        Value::Object(config).to_string()
    }

    /// Starts the plugin with all six variables set, as libcni does.
    pub fn start(&self, verb: &str, id: &str, netns: &Path, stdin: &str) -> Child {
        let ifname = if id.is_empty() { "" } else { "eth0" };
        let variables = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", netns.to_str().unwrap()),
            ("CNI_IFNAME", ifname),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=web;NOBODY_KNOWS=1"),
            ("CNI_PATH", ""),
        ];
        self.start_with(&variables, stdin.as_bytes())
    }

    pub fn start_with<V: AsRef<OsStr>>(&self, variables: &[(&str, V)], stdin: &[u8]) -> Child {
        let mut child = self.spawn(variables);
        // The plugin may end before it has read all.
        let _ = child.stdin.take().unwrap().write_all(stdin);
        child
    }

    /// The process, which waits for its config.
    pub fn spawn<V: AsRef<OsStr>>(&self, variables: &[(&str, V)]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command
            .env_clear()
            .envs(variables.iter().map(|(name, value)| (name, value)));
        // Whatever a call writes by mistake is found there.
        command.current_dir(self.directory.path());
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.namespace.run(|| command.spawn().unwrap())
    }

    pub fn call(&self, verb: &str, id: &str, netns: &Path, stdin: &str) -> Answer {
        finish(self.start(verb, id, netns, stdin))
    }

    pub fn add(&self, id: &str, pod: &Namespace) -> Answer {
        self.call("ADD", id, &pod.path(), &self.with(json!({})))
    }

    pub fn del(&self, id: &str) -> Answer {
        self.call("DEL", id, Path::new(""), &self.with(json!({})))
    }

    pub fn check(&self, id: &str, pod: &Namespace, result: &Value) -> Answer {
        self.call(
            "CHECK",
            id,
            &pod.path(),
            &self.with(json!({ "prevResult": result })),
        )
    }

    /// The config of a GC for which these live.
    pub fn gc_config(&self, valid: &[&str]) -> String {
        let entries: Vec<_> = valid
            .iter()
            .map(|id| json!({ "containerID": id, "ifname": "eth0" }))
            .collect();
        self.with(json!({ "cni.dev/valid-attachments": entries }))
    }

    pub fn gc(&self, valid: &[&str]) -> Answer {
        self.call("GC", "", Path::new(""), &self.gc_config(valid))
    }

    pub fn devices(&self) -> Vec<String> {
        let listed = self.namespace.ip("-o link show type veth");
        let names = listed
            .lines()
            .map(|line| line.split([':', '@']).nth(1).unwrap().trim().to_owned());
        names.filter(|name| name.starts_with("sluice")).collect()
    }

    /// Nothing is held, no device is there, no route of ours.
    #[track_caller]
    pub fn assert_empty(&self) {
        assert_eq!(self.devices(), Vec::<String>::new());
        assert_eq!(self.namespace.ip("-o link show type ifb"), "");
        assert_eq!(self.host_ports().list().unwrap(), Vec::new());
        assert_eq!(self.namespace.ip("route show proto 83"), "");
        assert_eq!(self.namespace.ip("-6 route show proto 83"), "");
        assert_eq!(self.store().list().unwrap(), Vec::new());
        assert_eq!(fs::read_dir(self.ipam().join("held")).unwrap().count(), 0);
    }
}

pub fn finish(child: Child) -> Answer {
    let output = child.wait_with_output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let json = if stdout.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&stdout).unwrap()
    };
    Answer {
        success: output.status.success(),
        json,
        stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub fn device_of(id: &str) -> String {
    host_device(&Attachment::new(id, "eth0").unwrap())
}

/// The addresses of a result, without their prefix length.
pub fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().unwrap().iter();
    ips.map(|ip| {
        ip["address"]
            .as_str()
            .unwrap()
            .split('/')
            .next()
            .unwrap()
            .to_owned()
    })
    .collect()
}
