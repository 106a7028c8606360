//! `sluice-lab`: the lab's command line. Only parses and prints; the work is the library's.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use sluice_lab::enter::Place;
use sluice_lab::options::{Datastore, Options};
use sluice_lab::plan::CONTROL;
use sluice_lab::pods::{self, Wanted};
use sluice_lab::progress::Progress;
use sluice_lab::state::Record;
use sluice_lab::{
    api, cni, demo, down, enter, images, init, kubelets, objects, supervise, talk, udp_name, up,
};

/// A Sluice cluster of namespaces on this machine: nodes, an outside client, real packets
#[derive(Parser)]
#[command(name = "sluice-lab", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make a lab and wait until its nodes take pods
    Up(Options),
    /// Run a command on a node, or on `client`
    Exec {
        #[command(flatten)]
        lab: Name,
        /// In this pod of the node
        #[arg(long, hide = true)]
        pod: Option<String>,
        /// Leave it running with its output in this file of the node
        #[arg(long, hide = true)]
        detach_to: Option<PathBuf>,
        /// `node1`, … or `client`
        node: String,
        /// What to run (a shell if nothing is given)
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Pods: add, exec, rm, list
    #[command(subcommand)]
    Pod(PodVerb),
    /// Apply Kubernetes YAML to the lab's datastore
    Apply(Files),
    /// Delete the objects that Kubernetes YAML names
    Delete(Files),
    /// Run sluicectl on a node
    Ctl {
        #[command(flatten)]
        lab: Name,
        /// `node1`, …
        node: String,
        /// What sluicectl is to do
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Show a real cluster: the tutorial's Deployment exposed, scaled and replaced, and Sluice replaced; then remove it all
    KubeDemo(Options),
    /// Run kubectl as administrator of a lab's cluster
    Kubectl {
        #[command(flatten)]
        lab: Name,
        /// What kubectl is to do
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Write Sluice's container image, an OCI archive
    Image {
        /// Where to, as an OCI archive
        #[arg(long)]
        output: PathBuf,
        /// Write what is in it into this folder instead, for a container engine to take from there
        #[arg(long, value_name = "FOLDER")]
        root: Option<PathBuf>,
    },
    /// Remove a lab, whatever state it is in
    Down {
        #[command(flatten)]
        lab: Name,
        /// All labs there are
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Show what works: three nodes, pods, Services, a killed daemon; then remove it all
    // Two subnets, so that pods reach each other both by plain routes and through the tunnel.
    #[command(mut_arg("name", |name| name.default_value("demo")), mut_arg("subnets", |subnets| subnets.default_value("2")))]
    Demo {
        /// Leave the lab up at the end
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        options: Options,
    },
    /// List what labs have left on this machine; ends 1 if there is something
    Leftovers,
    #[command(hide = true)]
    NodeInit { spec: String },
    #[command(hide = true, name = "node-pid1")]
    NodePid1 { spec: String },
    #[command(hide = true)]
    Supervise {
        #[arg(last = true)]
        command: Vec<String>,
    },
    #[command(hide = true)]
    UdpName { port: u16, name: String },
    #[command(hide = true)]
    UdpKeep { host: std::net::IpAddr, port: u16 },
    #[command(hide = true)]
    UdpAsk {
        #[arg(long)]
        connected: bool,
        host: std::net::IpAddr,
        port: u16,
    },
    #[command(hide = true)]
    TalkServe { name: String, ports: Vec<u16> },
    #[command(hide = true)]
    TalkAsk {
        protocol: talk::Protocol,
        asked: std::net::SocketAddr,
        times: usize,
        size: usize,
        /// Seconds that an answer is waited for.
        #[arg(long, default_value_t = 1)]
        patience: u64,
    },
    #[command(hide = true)]
    TalkKeep {
        protocol: talk::Protocol,
        asked: std::net::SocketAddr,
    },
    #[command(hide = true)]
    AskApi,
    #[command(hide = true)]
    CniAdd {
        pod: String,
        container_id: String,
        runtime_config: String,
    },
    #[command(hide = true)]
    CniDel { pod: String },
    #[command(hide = true)]
    CniCheck { pod: String },
}

#[derive(Subcommand)]
enum PodVerb {
    /// Add a pod by a real CNI ADD and print the plugin's result
    Add {
        #[command(flatten)]
        lab: Name,
        /// A label
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
        labels: Vec<(String, String)>,
        /// What the runtime tells the CNI plugins (capabilities), as JSON
        #[arg(long, default_value = "{}", value_name = "JSON")]
        runtime_config: String,
        /// `node1`, …
        node: String,
        /// The pod's name
        pod: String,
        /// What runs in it (web servers that answer with the pod's name if nothing is given)
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Run a command in a pod
    Exec {
        #[command(flatten)]
        lab: Name,
        /// The pod's name
        pod: String,
        /// What to run
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Remove a pod by a real CNI DEL
    Rm {
        #[command(flatten)]
        lab: Name,
        /// The pod's name
        pod: String,
    },
    /// Have the CNI plugin check a pod
    Check {
        #[command(flatten)]
        lab: Name,
        /// The pod's name
        pod: String,
    },
    /// List the pods: name, node, addresses
    List {
        #[command(flatten)]
        lab: Name,
    },
}

#[derive(clap::Args)]
struct Name {
    /// The lab
    #[arg(long, default_value = "lab")]
    name: String,
}

#[derive(clap::Args)]
struct Files {
    #[command(flatten)]
    lab: Name,
    /// A file of Kubernetes YAML; `-` is standard input
    #[arg(short = 'f', value_name = "FILE", required = true, num_args = 1..)]
    files: Vec<PathBuf>,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is no label; app=kubia would be one"))?;
    Ok((key.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("sluice-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<i32> {
    match verb {
        Verb::Up(options) => {
            let progress = Progress::new();
            let record = up::up(&options, &progress)?;
            drop(progress);
            for member in &record.members {
                let shown: Vec<String> = member.host.addresses.iter().map(ToString::to_string).collect();
                if !shown.is_empty() {
                    println!(
                        "{:8} {}  {}",
                        member.host.name,
                        shown.join(" "),
                        member.host.pod_cidrs.join(" ")
                    );
                }
            }
        }
        Verb::Exec {
            lab,
            pod,
            detach_to,
            node,
            command,
        } => {
            let place = Place {
                lab: lab.name,
                member: node,
                pod,
                detach_to,
            };
            let command = if command.is_empty() {
                vec!["sh".to_owned()]
            } else {
                command
            };
            return enter::run(&place, &command);
        }
        Verb::Pod(verb) => return pod(verb),
        Verb::Apply(Files { lab, files }) => {
            Record::load(&lab.name)?;
            for file in files {
                print_lines(&objects::apply_file(&lab.name, &file)?);
            }
        }
        Verb::Delete(Files { lab, files }) => {
            Record::load(&lab.name)?;
            for file in files {
                print_lines(&objects::delete_file(&lab.name, &file)?);
            }
        }
        Verb::Ctl { lab, node, arguments } => {
            let command = [vec!["sluicectl".to_owned()], arguments].concat();
            return enter::run(&on_node(lab, node), &command);
        }
        Verb::KubeDemo(options) => {
            let options = Options {
                datastore: Datastore::Kubernetes,
                kubelets: true,
                ..options
            };
            return demo::cluster::run(&options);
        }
        Verb::Kubectl { lab, arguments } => {
            Record::load(&lab.name)?;
            return enter::run(
                &on_node(lab, CONTROL.to_owned()),
                &kubelets::kubectl_command(&arguments)?,
            );
        }
        Verb::Image { output, root } => {
            let image = images::sluice::image(&up::binaries(false)?)?;
            if let Some(root) = root {
                image.unpack(&root)?;
                println!("{}, for an engine's image", root.display());
            } else {
                std::fs::write(&output, image.archive())
                    .with_context(|| format!("writing {}", output.display()))?;
                println!("{}, as {}", output.display(), images::sluice::NAME);
            }
        }
        Verb::Down { all: true, .. } => down::down_all()?,
        Verb::Down { lab, .. } => {
            if !down::down(&lab.name)? {
                println!("there is no lab called {:?}", lab.name);
            }
        }
        Verb::Demo { keep, options } => return demo::run(&options, keep),
        Verb::Leftovers => down::check_leftovers()?,
        Verb::NodeInit { spec } => init::first_stage(&spec)?,
        Verb::NodePid1 { spec } => init::second_stage(&spec)?,
        Verb::Supervise { command } => supervise::supervise(&command)?,
        Verb::UdpName { port, name } => udp_name::serve(port, &name)?,
        Verb::UdpKeep { host, port } => udp_name::keep(host, port)?,
        Verb::UdpAsk {
            connected,
            host,
            port,
        } => println!("{}", udp_name::ask(host, port, connected)?),
        Verb::AskApi => api::answer()?,
        Verb::TalkServe { name, ports } => talk::serve(&name, &ports)?,
        Verb::TalkAsk {
            protocol,
            asked,
            times,
            size,
            patience,
        } => talk::ask(protocol, asked, times, size, Duration::from_secs(patience))?,
        Verb::TalkKeep { protocol, asked } => talk::keep(protocol, asked)?,
        Verb::CniAdd {
            pod,
            container_id,
            runtime_config,
        } => {
            let config =
                serde_json::from_str(&runtime_config).context("reading the runtime configuration")?;
            let attachment = cni::add(&pod, &container_id, config)?;
            println!("{}", serde_json::to_string(&attachment)?);
        }
        Verb::CniDel { pod } => cni::del(&pod)?,
        Verb::CniCheck { pod } => cni::check(&pod)?,
    }
    Ok(0)
}

fn pod(verb: PodVerb) -> Result<i32> {
    match verb {
        PodVerb::Add {
            lab,
            labels,
            runtime_config,
            node,
            pod,
            command,
        } => {
            let record = Record::load(&lab.name)?;
            let runtime_config = serde_json::from_str(&runtime_config)
                .map_err(|error| anyhow!("--runtime-config {runtime_config:?} is no JSON object: {error}"))?;
            let wanted = Wanted {
                name: pod,
                node,
                labels: labels.into_iter().collect::<BTreeMap<_, _>>(),
                command,
                runtime_config,
            };
            let pod = pods::add(&record, &wanted)?;
            println!("{}", serde_json::to_string_pretty(&pod.result)?);
        }
        PodVerb::Exec { lab, pod, command } => {
            let pod = pods::find(&lab.name, &pod)?;
            let place = Place {
                pod: Some(pod.name),
                ..on_node(lab, pod.node)
            };
            return enter::run(&place, &command);
        }
        PodVerb::Rm { lab, pod } => pods::rm(&Record::load(&lab.name)?, &pod)?,
        PodVerb::Check { lab, pod } => {
            let found = pods::find(&lab.name, &pod)?;
            let command = ["sluice-lab", "cni-check", &found.name].map(str::to_owned);
            return enter::run(&on_node(lab, found.node), &command);
        }
        PodVerb::List { lab } => {
            Record::load(&lab.name)?;
            for pod in pods::list(&lab.name)? {
                let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
                println!("{:20} {:8} {}", pod.name, pod.node, addresses.join(" "));
            }
        }
    }
    Ok(0)
}

fn on_node(lab: Name, node: String) -> Place {
    Place {
        lab: lab.name,
        member: node,
        pod: None,
        detach_to: None,
    }
}

fn print_lines(lines: &[String]) {
    for line in lines {
        println!("{line}");
    }
}
