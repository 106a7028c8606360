//! Services in kube-proxy's shape (pkg/proxy/iptables and pkg/proxy/nftables): a chain for each and for each of its
//! endpoints, which nft(8) or iptables(8) loads.

mod iptables;
mod nft;

use std::io::Write as _;
use std::net::SocketAddrV4;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cluster::Shape;

/// The tool, and the firewall behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tool {
    /// nft(8).
    Nft,
    /// iptables(8) in a flavour, `legacy` or `nft`.
    Iptables(&'static str),
}

/// A port of a Service.
#[derive(Debug, Clone)]
pub struct ServicePort {
    /// Its chains are called by it: at most 10 characters.
    pub name: String,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Its ClusterIP and port.
    pub frontend: SocketAddrV4,
    /// The node's address and its NodePort there, if it has one.
    pub node_port: Option<SocketAddrV4>,
    /// Its endpoints, each with a name of its own within the Service.
    pub endpoints: Vec<(String, SocketAddrV4)>,
}

impl ServicePort {
    /// Those of a cluster.
    pub fn all(shape: Shape) -> Vec<Self> {
        (0..shape.services)
            .map(|service| Self::of(shape, service, None))
            .collect()
    }

    /// One of a cluster's, in which the first endpoint is replaced if that is given.
    pub fn of(shape: Shape, service: u32, replaced: Option<(String, SocketAddrV4)>) -> Self {
        let mut endpoints: Vec<_> = (0..shape.endpoints)
            .map(|number| {
                let address = shape.endpoint(service, number);
                (number.to_string(), SocketAddrV4::new(address, 8080))
            })
            .collect();
        if let (Some(first), Some(newcomer)) = (endpoints.first_mut(), replaced) {
            *first = newcomer;
        }
        Self {
            name: service.to_string(),
            protocol: "tcp",
            frontend: shape.frontend(service),
            node_port: None,
            endpoints,
        }
    }
}

impl Tool {
    /// Loads all of them, and what leads to them.
    ///
    /// # Errors
    /// The tool's.
    pub fn load(self, ports: &[ServicePort]) -> Result<()> {
        match self {
            Self::Nft => self.feed(&nft::all(ports)),
            Self::Iptables(_) => self.feed(&iptables::all(ports)),
        }
    }

    /// Loads one of them anew, as kube-proxy does when its endpoints change.
    ///
    /// # Errors
    /// The tool's.
    pub fn reload(self, port: &ServicePort) -> Result<()> {
        match self {
            Self::Nft => self.feed(&nft::one(port)),
            Self::Iptables(_) => self.feed(&iptables::one(port)),
        }
    }

    /// Takes all out again.
    ///
    /// # Errors
    /// The tool's.
    pub fn remove(self) -> Result<()> {
        match self {
            Self::Nft => self.feed("delete table ip chains\n"),
            // Without --noflush the table is replaced.
            Self::Iptables(flavour) => run(
                &format!("iptables-{flavour}-restore"),
                &[],
                "*filter\nCOMMIT\n*nat\nCOMMIT\n",
            ),
        }
    }

    fn feed(self, text: &str) -> Result<()> {
        match self {
            Self::Nft => run("nft", &["-f", "-"], text),
            Self::Iptables(flavour) => {
                let tool = format!("iptables-{flavour}-restore");
                run(&tool, &["--noflush", "--wait", "5"], text)
            }
        }
    }
}

fn run(tool: &str, arguments: &[&str], text: &str) -> Result<()> {
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {tool} (packages nftables and iptables)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    let answer = child.wait_with_output()?;
    ensure!(
        answer.status.success(),
        "{tool}: {}",
        String::from_utf8_lossy(&answer.stderr)
            .lines()
            .take(3)
            .collect::<Vec<_>>()
            .join("; ")
    );
    Ok(())
}
