//! `sluicectl`: what this node does and whether it is well.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use serde::de::DeserializeOwned;
use sluice_cni::names::IPAM_DIRECTORY;
use sluice_daemon::admin::{self, client, report};
use sluice_daemon::config::{self, Config};
use sluice_daemon::doctor;

mod allocations;
mod examination;
mod object_tables;
mod objects;
mod paint;
mod status;
mod tables;

/// Shows what Sluice does on this node, and whether it is well.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_help = "Without a command: status.")]
struct Arguments {
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,

    /// The daemon's admin socket
    #[arg(long, global = true, value_name = "PATH", default_value = admin::SOCKET)]
    socket: PathBuf,

    /// The daemon's configuration, for commands that ask its datastore
    #[arg(long, global = true, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Text,
    /// One JSON value
    Json,
    /// YAML
    Yaml,
}

#[derive(Subcommand)]
enum Command {
    /// One screen: healthy, or what is wrong and what to do (exit status 1)
    Status,
    /// The cluster's nodes, and how their pods are reached from here
    Nodes,
    /// The way to the pods of every node, as the kernel has it
    Routes,
    /// Service addresses, and how many endpoints the kernel has behind each
    Services,
    /// Every endpoint the kernel has behind every Service port
    Endpoints,
    /// Connections through Services that are translated packet by packet: from outside, mostly
    Conntrack,
    /// Whether this host can run Sluice, and what others left on it; works without sluiced (exit status 1: something is in the way)
    Doctor,
    /// Who holds which pod address since when; works while sluiced is down
    Ipam,
    /// Write Kubernetes YAML into etcd, where that is the datastore
    Apply(objects::Files),
    /// Read objects from etcd, where that is the datastore
    Get(objects::Which),
    /// Remove objects from etcd, where that is the datastore; with a Node goes its claim to its pod CIDRs
    Delete(objects::Doomed),
    /// What the daemon goes by: its configuration, with all defaults
    Config,
    /// Print a completion script for a shell
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match act(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sluicectl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let output = arguments.output;
    match arguments.command.as_ref().unwrap_or(&Command::Status) {
        Command::Status => {
            let status: report::Status = ask(&arguments.socket, "status")?;
            let healthy = status.problems.is_empty() && status.awaiting.is_empty();
            print(output, &status, || status::screen(&status))?;
            return Ok(exit_code(healthy));
        }
        Command::Nodes => {
            let nodes: Vec<report::Node> = ask(&arguments.socket, "nodes")?;
            print(output, &nodes, || tables::nodes(&nodes))?;
        }
        Command::Routes => {
            let routes: Vec<report::Route> = ask(&arguments.socket, "routes")?;
            print(output, &routes, || tables::routes(&routes))?;
        }
        Command::Services => {
            let services: Vec<report::Service> = ask(&arguments.socket, "services")?;
            print(output, &services, || tables::services(&services))?;
        }
        Command::Endpoints => {
            let services: Vec<report::Service> = ask(&arguments.socket, "services")?;
            print(output, &services, || tables::endpoints(&services))?;
        }
        Command::Conntrack => {
            let connections: Vec<report::Connection> = ask(&arguments.socket, "connections")?;
            print(output, &connections, || tables::connections(&connections))?;
        }
        Command::Doctor => {
            let config = Config::load(&arguments.config, |name| std::env::var(name).ok());
            let daemon = ask(&arguments.socket, "status").ok();
            let report = doctor::examine(config.map_err(|error| error.to_string()), daemon);
            print(output, &report, || examination::screen(&report))?;
            return Ok(exit_code(report.is_well()));
        }
        Command::Ipam => {
            let held = allocations::read(Path::new(IPAM_DIRECTORY))?;
            print(output, &held, || tables::allocations(&held))?;
        }
        Command::Apply(files) => return objects::apply(&arguments.config, files),
        Command::Get(which) => {
            let (kind, found) = objects::get(&arguments.config, which)?;
            print(output, &found, || object_tables::objects(kind, &found))?;
        }
        Command::Delete(doomed) => return objects::delete(&arguments.config, doomed),
        Command::Config => {
            let config: Config = ask(&arguments.socket, "config")?;
            let text = serde_saphyr::to_string(&config).context("writing YAML")?;
            print(output, &config, || text)?;
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "sluicectl", &mut script);
            say(&String::from_utf8(script)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn exit_code(well: bool) -> ExitCode {
    if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Asks the daemon for what it calls `what`.
fn ask<T: DeserializeOwned>(socket: &Path, what: &str) -> anyhow::Result<T> {
    runtime()?.block_on(client::get(socket, what))
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}

fn print<T: serde::Serialize>(
    output: Output,
    value: &T,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    match output {
        Output::Text => say(&text()),
        Output::Json => say(&serde_json::to_string_pretty(value)?),
        Output::Yaml => say(&serde_saphyr::to_string(value).context("writing YAML")?),
    }
}

/// Prints lines. A reader who has seen enough, as `head` has, ends the printing and nothing else.
fn say(lines: &str) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    let said = writeln!(output, "{}", lines.trim_end()).and_then(|()| output.flush());
    match said {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        said => said.context("printing"),
    }
}
