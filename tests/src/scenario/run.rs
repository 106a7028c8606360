//! Runs scenarios in a lab, one after the other, and takes away what each of them brought.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use sluice_lab::pods::Wanted;
use sluice_lab::{Datastore, Lab, Node, Running, wait_until};

use super::{Ask, Fetch, Keep, Kept, Ping, PodSpec, Scenario, Step, ask};
use crate::PATIENCE;

/// The pods that ask, one on each node, behind no Service.
const ASKERS: [(&str, &str); 3] = [("pod1", "node1"), ("pod2", "node2"), ("pod3", "node3")];

/// The port a scenario's pods answer on if they do not say another.
const PORT: u16 = 8080;

/// A lab of three nodes with a pod on each that asks.
pub struct Stage {
    lab: Lab,
}

/// What one scenario brought.
#[derive(Default)]
struct Brought {
    pods: Vec<String>,
    texts: Vec<String>,
    servers: Vec<Running>,
    conversations: BTreeMap<String, Conversation>,
}

/// A conversation that is kept up.
struct Conversation {
    /// Where it is written down, on `node`.
    file: String,
    node: String,
    first: String,
    /// Lines there when it was last looked at.
    seen: usize,
    _running: Running,
}

impl Stage {
    /// Sets it.
    ///
    /// # Errors
    /// A pod cannot be added.
    pub fn new(lab: Lab) -> Result<Self> {
        for (pod, node) in ASKERS {
            lab.pod_add(node, pod, &[], &[])?;
        }
        Ok(Self { lab })
    }

    /// Plays one scenario.
    ///
    /// # Errors
    /// The step that did not come to what it wants, and what it came to.
    pub fn play(&self, scenario: &Scenario) -> Result<()> {
        let mut brought = Brought::default();
        let mut played = self.play_steps(scenario, &mut brought);
        if let (Some(words), Datastore::Kubernetes) = (
            &scenario.refused_by_kubernetes,
            self.lab.record().options.datastore,
        ) {
            played = match played {
                Ok(()) => Err(anyhow!("the API server took what it should refuse ({words})")),
                Err(error) if format!("{error:#}").contains(words) => Ok(()),
                Err(error) => Err(error.context(format!("the API server should refuse it ({words})"))),
            };
        }
        let cleared = self.clear(brought);
        played.and(cleared)
    }

    fn play_steps(&self, scenario: &Scenario, brought: &mut Brought) -> Result<()> {
        for (name, spec) in &scenario.pods {
            self.add_pod(name, spec, brought)
                .with_context(|| format!("pod {name}"))?;
        }
        for (number, step) in scenario.steps.iter().enumerate() {
            self.step(step, brought)
                .with_context(|| format!("step {} ({})", number + 1, headline(step)))?;
        }
        Ok(())
    }

    fn step(&self, step: &Step, brought: &mut Brought) -> Result<()> {
        match step {
            Step::Apply(text) => {
                let text = self.filled(text)?;
                brought.texts.push(text.clone());
                self.lab.apply_text(&text)
            }
            Step::Delete(text) => self.lab.delete_text(&self.filled(text)?),
            Step::Pod { name, spec } => self.add_pod(name, spec, brought),
            Step::RemovePod(name) => {
                brought.pods.retain(|pod| pod != name);
                self.lab.pod_rm(name)
            }
            Step::Serve { name, on, port } => {
                let port = port.to_string();
                let server = self
                    .lab
                    .node(on)
                    .spawn(&["sluice-lab", "talk-serve", name, &port])?;
                brought.servers.push(server);
                Ok(())
            }
            Step::Ask(ask) => self.ask(ask),
            Step::Keep(keep) => self.keep(keep, brought),
            Step::Kept(kept) => self.kept(kept, brought),
            Step::Ping(ping) => self.ping(ping),
            Step::Fetch(fetch) => self.fetch(fetch),
            Step::Told { node, says } => wait_until("status says it", PATIENCE, || {
                let told = crate::problems(&self.lab, node)?;
                if !told.contains(says) {
                    bail!("{node} says {told}");
                }
                Ok(true)
            }),
            Step::KillDaemon(node) => {
                let before = self.lab.daemon_number(node)?;
                self.lab.kill_sluiced(node, Signal::SIGKILL)?;
                wait_until("the daemon is up again", PATIENCE, || {
                    Ok(self.lab.daemon_number(node)? != before
                        && self.lab.ctl_json(node, &["status"]).is_ok())
                })
            }
        }
    }

    fn add_pod(&self, name: &str, spec: &PodSpec, brought: &mut Brought) -> Result<()> {
        let ports = if spec.ports.is_empty() {
            vec![PORT]
        } else {
            spec.ports.clone()
        };
        let web = || BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let mut runtime_config = serde_json::Map::new();
        if !spec.host_ports.is_empty() {
            let mut mappings = Vec::new();
            for mapping in &spec.host_ports {
                let mut mapping = mapping.clone();
                if let Some(serde_json::Value::String(address)) = mapping.get_mut("hostIP") {
                    *address = self.filled(address)?;
                }
                mappings.push(serde_json::to_value(mapping)?);
            }
            runtime_config.insert("portMappings".to_owned(), mappings.into());
        }
        let words = ["sluice-lab", "talk-serve", name].map(str::to_owned);
        brought.pods.push(name.to_owned());
        let added = self.lab.pod_add_as(&Wanted {
            name: name.to_owned(),
            node: spec.node.clone(),
            labels: spec.labels.clone().unwrap_or_else(web),
            command: words
                .into_iter()
                .chain(ports.iter().map(u16::to_string))
                .collect(),
            runtime_config,
        });
        if added.is_err() {
            brought.pods.pop();
        }
        added.map(drop)
    }

    fn ask(&self, ask: &Ask) -> Result<()> {
        let tcp = ["TCP".to_owned()];
        let over = if ask.over.is_empty() { &tcp[..] } else { &ask.over };
        for from in &ask.from {
            let place = self.place(from)?;
            let seen_as = match ask.seen_as.as_deref() {
                None => None,
                Some("itself") => Some(self.addresses(from)?),
                Some(other) => Some(self.addresses(other)?),
            };
            for at in &ask.at {
                let at = self.filled(at)?;
                for protocol in over {
                    wait_until("the answers are as wanted", PATIENCE, || {
                        ask::once(ask, &place, &at, protocol, seen_as.as_deref()).map(|()| true)
                    })
                    .with_context(|| format!("{from} asks {at} over {protocol}"))?;
                }
            }
        }
        Ok(())
    }

    fn keep(&self, keep: &Keep, brought: &mut Brought) -> Result<()> {
        let place = self.place(&keep.from)?;
        let at = self.filled(&keep.at)?;
        let protocol = keep.over.as_deref().unwrap_or("TCP");
        let file = format!("/run/kept-{}", keep.name);
        let script = format!("exec sluice-lab talk-keep {protocol} '{at}' > {file}");
        let node = self.node_of(&keep.from)?;
        // Another scenario's conversation may have had this name: its lines are not to be taken for this one's.
        self.lab.node(&node).run(&["rm", "-f", &file])?;
        let mut conversation = Conversation {
            node,
            file,
            first: String::new(),
            seen: 0,
            _running: place.spawn(&["busybox", "sh", "-c", &script])?,
        };
        let mut lines = Vec::new();
        wait_until("the conversation has begun", PATIENCE, || {
            lines = self.lines(&conversation)?;
            Ok(lines.len() > 2)
        })?;
        conversation.first = name_of(&lines[0]);
        conversation.seen = lines.len();
        brought.conversations.insert(keep.name.clone(), conversation);
        Ok(())
    }

    fn kept(&self, kept: &Kept, brought: &mut Brought) -> Result<()> {
        let conversation = brought
            .conversations
            .get_mut(&kept.name)
            .ok_or_else(|| anyhow!("no conversation is called {:?}", kept.name))?;
        let by = kept.by.clone().unwrap_or_else(|| conversation.first.clone());
        let seen = conversation.seen;
        wait_until("the conversation is as wanted", PATIENCE, || {
            let lines = self.lines(conversation)?;
            let new = &lines[seen..];
            let aborted = lines.iter().any(|line| line == "aborted");
            if lines.iter().any(|line| line == "ended") {
                bail!("it ended: {:?}", &lines[lines.len().saturating_sub(3)..]);
            }
            if aborted != kept.aborted {
                bail!("aborted: {aborted}");
            }
            // Answers that were on their way at the change may be the first of them.
            let last = new.get(new.len().saturating_sub(3)..).unwrap_or_default();
            if new.len() < 3 || last.iter().any(|line| name_of(line) != by) {
                bail!("{last:?}; {by} is wanted");
            }
            Ok(true)
        })?;
        conversation.seen = self.lines(conversation)?.len();
        Ok(())
    }

    fn lines(&self, conversation: &Conversation) -> Result<Vec<String>> {
        let text = self
            .lab
            .node(&conversation.node)
            .run(&["cat", &conversation.file])?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    fn ping(&self, ping: &Ping) -> Result<()> {
        for from in &ping.from {
            let place = self.place(from)?;
            for at in &ping.at {
                let at = self.filled(at)?;
                wait_until("the ping is as wanted", PATIENCE, || {
                    let output = place.exec(&["ping", "-n", "-c", "1", "-W", "1", &at])?;
                    Ok(output.status.success() == ping.answers)
                })
                .with_context(|| format!("{from} pings {at}, answers: {}", ping.answers))?;
            }
        }
        Ok(())
    }

    fn fetch(&self, fetch: &Fetch) -> Result<()> {
        let place = self.place(&fetch.from)?;
        let url = self.filled(&fetch.url)?;
        let command = ["curl", "-s", "-m", "2", "-w", "\n%{http_code}", &url];
        wait_until("the answer is as wanted", PATIENCE, || {
            let said = place.run(&command)?;
            let status = said.lines().last().unwrap_or_default();
            if status != fetch.status.to_string() || !said.contains(&fetch.says) {
                bail!("{said:?}");
            }
            Ok(true)
        })
    }

    /// Takes away what a scenario brought; the first trouble is told, and the rest is taken away all the same.
    fn clear(&self, brought: Brought) -> Result<()> {
        drop(brought.conversations);
        drop(brought.servers);
        let mut cleared = Ok(());
        for text in &brought.texts {
            cleared = cleared.and(self.lab.delete_text(text));
        }
        for pod in &brought.pods {
            cleared = cleared.and(self.lab.pod_rm(pod));
        }
        cleared.context("clearing up")
    }

    fn place(&self, name: &str) -> Result<Node<'_>> {
        if self.lab.host(name).is_ok() {
            return Ok(self.lab.node(name));
        }
        self.lab.pod(name)
    }

    /// The node, or the client, that a place is on.
    fn node_of(&self, place: &str) -> Result<String> {
        if self.lab.host(place).is_ok() {
            return Ok(place.to_owned());
        }
        Ok(sluice_lab::pods::find(self.lab.name(), place)?.node)
    }

    /// All addresses a place has; a node's in the pod network too.
    fn addresses(&self, place: &str) -> Result<Vec<IpAddr>> {
        let text = self.place(place)?.run(&["busybox", "ip", "-o", "address"])?;
        let words = text.lines().filter_map(|line| line.split_whitespace().nth(3));
        words
            .map(|word| {
                let address = word.split('/').next().unwrap_or(word);
                address.parse().with_context(|| format!("{word:?} is no address"))
            })
            .collect()
    }

    /// `text` with the addresses it names.
    fn filled(&self, text: &str) -> Result<String> {
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            let (name, after) = after
                .split_once('}')
                .ok_or_else(|| anyhow!("a ${{ without a }} in {text:?}"))?;
            filled += before;
            filled += &self.named(name)?.to_string();
            rest = after;
        }
        Ok(filled + rest)
    }

    fn named(&self, name: &str) -> Result<IpAddr> {
        let (place, family) = name
            .split_once('.')
            .ok_or_else(|| anyhow!("${{{name}}} names no family; ${{{name}.v4}} would"))?;
        let addresses = match self.lab.host(place) {
            Ok(host) => host.addresses.clone(),
            Err(_) => sluice_lab::pods::find(self.lab.name(), place)?.addresses,
        };
        addresses
            .into_iter()
            .find(|address| address.is_ipv4() == (family == "v4"))
            .ok_or_else(|| anyhow!("{place} has no address of family {family}"))
    }
}

fn name_of(line: &str) -> String {
    line.split(' ').next().unwrap_or_default().to_owned()
}

/// A step in a few words.
fn headline(step: &Step) -> String {
    let said = format!("{step:?}");
    said.chars().take(160).collect()
}
