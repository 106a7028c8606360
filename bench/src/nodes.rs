//! `nodes`: from what the datastore says of other nodes to where the kernel sends packets for their pods. All from nothing, and one
//! node that moves to another address.
//!
//! The daemon's owner task runs as it does in `sluiced`, over VXLAN; the bench sends what a datastore would and listens to the kernel
//! with bridge(8) as the forwarding entries come, each of them behind its neighbour and before its route. Beside it: the same
//! entries written by ip(8) and bridge(8), which are given all of them at once.

use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use sluice_daemon::datastore::Event;

use crate::How;
use crate::cluster::{NODE, NODE_ADDRESS, objects};
use crate::figures::{self, Samples};
use crate::node::{self, Events};

/// How many other nodes there are, and how many moves are measured.
const FULL: &[(u32, u32)] = &[(10, 200), (100, 200), (1_000, 200)];
const QUICK: &[(u32, u32)] = &[(100, 20)];

/// Measures, prints a table and writes the figures.
///
/// # Errors
/// Not root, or a kernel or tools that lack what is needed.
pub fn run(how: &How) -> Result<()> {
    let mut rows = Vec::new();
    let mut all = Vec::new();
    for (count, moves) in if how.quick { QUICK } else { FULL } {
        eprintln!("{count} nodes");
        let by_tools = by_tools(*count)?;
        let measured = node::on_node(false, |events, _| measure(*count, *moves, events))?;
        let bare = by_tools.quantile(0.5);
        let figure = |samples: &Samples, what: &str, part: f64, baseline: Option<f64>| {
            samples.figure(format!("{count} nodes, {what}"), part, baseline)
        };
        let (from_nothing, moved) = measured;
        all.extend(figure(&by_tools, "from nothing: ip and bridge", 0.5, None));
        all.extend(figure(&from_nothing, "from nothing: sluice", 0.5, bare));
        all.extend(figure(&moved, "one moves, median: sluice", 0.5, None));
        all.extend(figure(&moved, "one moves, p99: sluice", 0.99, None));
        let shown = |value: Option<f64>| value.map(|value| format!("{value:.2}")).unwrap_or_default();
        rows.push(vec![
            count.to_string(),
            shown(bare),
            shown(from_nothing.quantile(0.5)),
            shown(moved.quantile(0.5)),
            shown(moved.quantile(0.99)),
        ]);
    }
    let header = [
        "nodes, ms",
        "from nothing: ip and bridge",
        "sluice",
        "one moves, median",
        "p99",
    ];
    println!("{}", figures::table(header, rows));
    let path = figures::write(&how.results, "nodes", &all)?;
    println!("{} figures in {}", all.len(), path.display());
    Ok(())
}

/// Where a node is at first; the pods of 1,000 are in /26 networks of 10.244.0.0/16.
fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 31, 0, 1)) + number)
}

fn pod_cidr(number: u32) -> String {
    format!("10.244.{}.{}/26", 2 + number / 4, number % 4 * 64)
}

fn node_object(number: u32, address: Ipv4Addr) -> Result<Event> {
    let text = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: far-{number}}}\nspec: {{podCIDRs: [{}]}}\n\
         status: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n",
        pod_cidr(number)
    );
    let event = objects(&text)?.into_iter().next();
    event.ok_or_else(|| anyhow!("no object in {text}"))
}

fn measure(count: u32, moves: u32, events: &Events) -> Result<(Samples, Samples)> {
    let own = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {NODE}}}\nspec: {{podCIDRs: [10.244.1.0/24]}}\n\
         status: {{addresses: [{{type: InternalIP, address: {NODE_ADDRESS}}}]}}\n"
    );
    let mut everything = objects(&own)?;
    for number in 0..count {
        everything.push(node_object(number, address(number))?);
    }
    let mut kernel = Listener::start()?;
    let began = Instant::now();
    for event in everything {
        events.send(event)?;
    }
    events.send(Event::Loaded)?;
    for _ in 0..count {
        kernel.next_destination()?;
    }
    let mut from_nothing = Samples::default();
    from_nothing.add(began.elapsed());

    let mut moved = Samples::default();
    for round in 0..moves {
        // What the kernel said of the last one has been looked at by then: changes that meet are another matter.
        std::thread::sleep(Duration::from_millis(120));
        let to = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 1)) + round);
        let event = node_object(round * 7_919 % count, to)?;
        let began = Instant::now();
        events.send(event)?;
        while kernel.next_destination()? != to {}
        moved.add(began.elapsed());
    }
    Ok((from_nothing, moved))
}

/// bridge(8), which says what it hears of forwarding entries.
struct Listener {
    process: Child,
    lines: BufReader<ChildStdout>,
}

impl Listener {
    fn start() -> Result<Self> {
        let mut process = Command::new("bridge")
            .args(["monitor", "fdb"])
            .stdout(Stdio::piped())
            .spawn()
            .context("starting bridge (package iproute2)")?;
        let lines = process.stdout.take().context("bridge writes nothing")?;
        // It says nothing when it has begun to listen.
        std::thread::sleep(Duration::from_millis(200));
        Ok(Self {
            process,
            lines: BufReader::new(lines),
        })
    }

    /// Where the next entry leads that came.
    fn next_destination(&mut self) -> Result<Ipv4Addr> {
        loop {
            let mut line = String::new();
            ensure!(self.lines.read_line(&mut line)? > 0, "bridge monitor ended");
            let mut words = line.split_whitespace().skip_while(|word| *word != "dst");
            if let (false, Some(address)) = (line.starts_with("Deleted"), words.nth(1)) {
                return address.parse().with_context(|| format!("bridge says {line:?}"));
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The same entries by the tools, each given all of them.
fn by_tools(count: u32) -> Result<Samples> {
    let measured = std::thread::spawn(move || {
        crate::namespaces::enter()?;
        node::ip(&format!(
            "link add vx type vxlan id 7 local {NODE_ADDRESS} dstport 4789 nolearning"
        ))?;
        node::ip("link set vx up")?;
        let (mut neighbours, mut entries, mut routes) = (String::new(), String::new(), String::new());
        for number in 0..count {
            let mac = format!("02:00:00:00:{:02x}:{:02x}", number >> 8, number & 0xff);
            let gateway = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 245, 0, 1)) + number);
            neighbours += &format!("neighbour replace {gateway} lladdr {mac} dev vx nud permanent\n");
            entries += &format!("fdb replace {mac} dev vx dst {}\n", address(number));
            routes += &format!("route replace {} via {gateway} dev vx onlink\n", pod_cidr(number));
        }
        let mut samples = Samples::default();
        let began = Instant::now();
        feed("ip", &neighbours)?;
        feed("bridge", &entries)?;
        feed("ip", &routes)?;
        samples.add(began.elapsed());
        Ok(samples)
    });
    measured
        .join()
        .map_err(|_| anyhow!("the thread of ip panicked"))?
}

fn feed(tool: &str, text: &str) -> Result<()> {
    let mut child = Command::new(tool)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {tool} (package iproute2)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    ensure!(child.wait()?.success(), "{tool} -batch failed");
    Ok(())
}
