//! `sluice-bench`: measures Sluice beside what does the same today and beside the bare kernel work, in one run.
//!
//! Machines are noisy and differ: what counts is the ratio to a baseline taken at the same moments. Nothing is asserted
//! here, nothing of the machine's own is touched, and all that a bench makes ends with its process.

mod bare;
#[cfg(feature = "dataplane")]
mod cgroup;
#[cfg(feature = "dataplane")]
mod chains;
#[cfg(feature = "dataplane")]
mod chart;
#[cfg(feature = "dataplane")]
mod cluster;
mod cni;
#[cfg(feature = "dataplane")]
mod datastore;
mod figures;
#[cfg(feature = "dataplane")]
mod hosts;
#[cfg(feature = "dataplane")]
mod kernel;
#[cfg(feature = "dataplane")]
mod load;
#[cfg(feature = "dataplane")]
mod memory;
mod namespaces;
#[cfg(feature = "dataplane")]
mod node;
#[cfg(feature = "dataplane")]
mod nodes;
#[cfg(feature = "dataplane")]
mod path;
#[cfg(feature = "dataplane")]
mod process;
#[cfg(feature = "dataplane")]
mod program;
#[cfg(feature = "dataplane")]
mod service;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Measures Sluice beside its peers and the bare kernel work
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// A pod's ADD and DEL, beside the reference plugins and the bare netlink work
    Cni {
        #[command(flatten)]
        how: How,
        /// Where sluice and sluiced are; beside this program unless told
        #[arg(long, value_name = "FOLDER", env = "SLUICE_BIN_DIR")]
        binaries: Option<PathBuf>,
        /// Where the reference plugins are (package containernetworking-plugins)
        #[arg(long, value_name = "FOLDER", default_value = "/usr/lib/cni")]
        peers: PathBuf,
    },
    /// From pod to pod, beside a bare veth and the kernel's own forwarding
    #[cfg(feature = "dataplane")]
    Path(How),
    /// Through Services, of which there are few and many, beside rules of kube-proxy's shape
    #[cfg(feature = "dataplane")]
    Service(How),
    /// Services into the kernel: all from nothing, and one endpoint that changes
    #[cfg(feature = "dataplane")]
    Program(How),
    /// Other nodes into the kernel: all from nothing, and one that moves
    #[cfg(feature = "dataplane")]
    Nodes(How),
    /// A node that takes its state from a real API server: time, memory, and what a change takes
    #[cfg(feature = "dataplane")]
    Datastore(How),
    /// What a node takes for Services, beside kube-proxy
    #[cfg(feature = "dataplane")]
    Memory(How),
}

/// What all benches have in common.
#[derive(Args)]
pub struct How {
    /// Less of it, to see that it works
    #[arg(long)]
    pub quick: bool,
    /// Where the figures go, as NAME.json
    #[arg(long, value_name = "FOLDER", default_value = "bench/results")]
    pub results: PathBuf,
    /// Where pictures go, as bench-NAME.svg; those of a quick run stay with its figures
    #[arg(long, value_name = "FOLDER", default_value = "docs")]
    pub charts: PathBuf,
}

#[cfg(feature = "dataplane")]
impl How {
    /// The file for the picture of the bench `name`.
    pub fn chart(&self, name: &str) -> PathBuf {
        let folder = if self.quick { &self.results } else { &self.charts };
        folder.join(format!("bench-{name}.svg"))
    }
}

fn main() -> ExitCode {
    // Before all else: this is a contender, and its start is measured.
    if let Some(ended) = bare::process() {
        return ended;
    }
    let done = match Arguments::parse().bench {
        Bench::Cni { how, binaries, peers } => cni::run(how.quick, &how.results, binaries, peers),
        #[cfg(feature = "dataplane")]
        Bench::Path(how) => path::run(&how),
        #[cfg(feature = "dataplane")]
        Bench::Service(how) => service::run(&how),
        #[cfg(feature = "dataplane")]
        Bench::Program(how) => program::run(&how),
        #[cfg(feature = "dataplane")]
        Bench::Nodes(how) => nodes::run(&how),
        #[cfg(feature = "dataplane")]
        Bench::Datastore(how) => datastore::run(how.quick, &how.results),
        #[cfg(feature = "dataplane")]
        Bench::Memory(how) => memory::run(&how),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluice-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
