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
mod path;
#[cfg(feature = "dataplane")]
mod process;
#[cfg(feature = "dataplane")]
mod program;
#[cfg(feature = "dataplane")]
mod service;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
        /// A tenth of the runs, to see that it works
        #[arg(long)]
        quick: bool,
        /// Where the figures go, as cni.json
        #[arg(long, value_name = "FOLDER", default_value = "bench/results")]
        results: PathBuf,
        /// Where sluice and sluiced are; beside this program unless told
        #[arg(long, value_name = "FOLDER", env = "SLUICE_BIN_DIR")]
        binaries: Option<PathBuf>,
        /// Where the reference plugins are (package containernetworking-plugins)
        #[arg(long, value_name = "FOLDER", default_value = "/usr/lib/cni")]
        peers: PathBuf,
    },
    /// From pod to pod, beside a bare veth and the kernel's own forwarding
    #[cfg(feature = "dataplane")]
    Path {
        /// Short runs, to see that it works
        #[arg(long)]
        quick: bool,
        /// Where the figures go, as path.json
        #[arg(long, value_name = "FOLDER", default_value = "bench/results")]
        results: PathBuf,
    },
    /// A node that takes its state from a real API server: time, memory, and what a change takes
    #[cfg(feature = "dataplane")]
    Datastore {
        /// A small cluster only, to see that it works
        #[arg(long)]
        quick: bool,
        /// Where the figures go, as datastore.json
        #[arg(long, value_name = "FOLDER", default_value = "bench/results")]
        results: PathBuf,
    },
    /// What a node takes for Services, beside kube-proxy
    #[cfg(feature = "dataplane")]
    Memory {
        /// Few Services only, to see that it works
        #[arg(long)]
        quick: bool,
        /// Where the figures go, as memory.json
        #[arg(long, value_name = "FOLDER", default_value = "bench/results")]
        results: PathBuf,
    },
    /// Services into the kernel: all from nothing, and one endpoint that changes
    #[cfg(feature = "dataplane")]
    Program {
        /// Small clusters only, to see that it works
        #[arg(long)]
        quick: bool,
        /// Where the figures go, as program.json
        #[arg(long, value_name = "FOLDER", default_value = "bench/results")]
        results: PathBuf,
    },
    /// Through Services, of which there are few and many, beside rules of kube-proxy's shape
    #[cfg(feature = "dataplane")]
    Service {
        /// Short runs and few Services, to see that it works
        #[arg(long)]
        quick: bool,
        /// Where the figures go, as service.json
        #[arg(long, value_name = "FOLDER", default_value = "bench/results")]
        results: PathBuf,
    },
}

fn main() -> ExitCode {
    // Before all else: this is a contender, and its start is measured.
    if let Some(ended) = bare::process() {
        return ended;
    }
    let done = match Arguments::parse().bench {
        Bench::Cni {
            quick,
            results,
            binaries,
            peers,
        } => cni::run(quick, &results, binaries, peers),
        #[cfg(feature = "dataplane")]
        Bench::Path { quick, results } => path::run(quick, &results),
        #[cfg(feature = "dataplane")]
        Bench::Datastore { quick, results } => datastore::run(quick, &results),
        #[cfg(feature = "dataplane")]
        Bench::Memory { quick, results } => memory::run(quick, &results),
        #[cfg(feature = "dataplane")]
        Bench::Program { quick, results } => program::run(quick, &results),
        #[cfg(feature = "dataplane")]
        Bench::Service { quick, results } => service::run(quick, &results),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluice-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
