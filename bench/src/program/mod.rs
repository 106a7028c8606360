//! `program`: from what the datastore says to what the kernel holds. Everything from nothing, and one endpoint that changes.
//!
//! The daemon's owner task runs as it does in `sluiced`; the bench sends what a datastore would, and watches the pinned
//! maps for what comes of it. The limit is the same entries written one after the other by a program that has nothing
//! else to do.

mod netfilter;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sluice_daemon::datastore::Event;

use self::netfilter::Way;
use crate::How;
use crate::chart::{self, Bar};
use crate::cluster::{self, Shape};
use crate::figures::{self, Figure, Samples};
use crate::kernel::Kernel;
use crate::node;

/// How long the kernel may take to hold what was sent.
const PATIENCE: Duration = Duration::from_secs(120);

struct Counts {
    shapes: &'static [Shape],
    netfilter: &'static [Netfilter],
    changes: usize,
}

/// What is measured of a dataplane by netfilter.
struct Netfilter {
    way: Way,
    shape: Shape,
    changes: usize,
    /// Whether the way's tool loads kube-proxy's shape of this within a minute or two, to stand beside it.
    beside: bool,
}

impl Netfilter {
    const fn of(way: Way, shape: Shape, changes: usize) -> Self {
        Self {
            way,
            shape,
            changes,
            beside: true,
        }
    }

    const fn alone(way: Way, shape: Shape, changes: usize) -> Self {
        Self {
            beside: false,
            ..Self::of(way, shape, changes)
        }
    }
}

const FULL: Counts = Counts {
    shapes: &[
        Shape::of(1_000, 5),
        Shape::of(10_000, 5),
        Shape::of(50_000, 5),
        Shape::of(1, 5_000),
    ],
    netfilter: &[
        Netfilter::of(Way::Nftables, Shape::of(1_000, 5), 1_000),
        Netfilter::of(Way::Nftables, Shape::of(10_000, 5), 1_000),
        Netfilter::alone(Way::Nftables, Shape::of(50_000, 5), 1_000),
        Netfilter::of(Way::Iptables("legacy"), Shape::of(1_000, 5), 100),
        Netfilter::of(Way::Iptables("legacy"), Shape::of(10_000, 5), 30),
        Netfilter::of(Way::Iptables("nft"), Shape::of(1_000, 5), 100),
        Netfilter::of(Way::Iptables("nft"), Shape::of(10_000, 5), 30),
    ],
    changes: 1_000,
};

const QUICK: Counts = Counts {
    shapes: &[Shape::of(1_000, 5), Shape::of(1, 1_000)],
    netfilter: &[
        Netfilter::of(Way::Nftables, Shape::of(1_000, 5), 100),
        Netfilter::of(Way::Iptables("legacy"), Shape::of(1_000, 5), 30),
    ],
    changes: 100,
};

/// What was measured of one shape.
struct Measured {
    shape: Shape,
    all: Samples,
    bare: Samples,
    change: Samples,
}

/// Measures, prints tables, writes the figures and draws what one change takes.
///
/// # Errors
/// Not root, or a kernel that cannot do what the dataplane needs.
pub fn run(how: &How) -> Result<()> {
    let counts = if how.quick { QUICK } else { FULL };
    let mut measured = Vec::new();
    for shape in counts.shapes {
        eprintln!("{shape}");
        measured.push(node::on_node(true, |events, pins| {
            measure(*shape, counts.changes, events, &pins.join("maps"))
        })?);
    }
    println!("{}\n", table(&measured));
    let mut by_netfilter = Vec::new();
    for Netfilter {
        way,
        shape,
        changes,
        beside,
    } in counts.netfilter
    {
        eprintln!("{shape}, {way}");
        by_netfilter.push(netfilter::measure(*way, *shape, *changes, *beside)?);
    }
    println!("{}", netfilter_table(&by_netfilter));
    let mut figures: Vec<_> = measured.iter().flat_map(figures).collect();
    figures.extend(by_netfilter.iter().flat_map(netfilter_figures));
    let path = figures::write(&how.results, "program", &figures)?;
    println!("{} figures in {}", figures.len(), path.display());
    draw(&measured, &by_netfilter, &how.chart("program"))
}

/// One change alone.
fn draw(by_ebpf: &[Measured], by_netfilter: &[netfilter::Measured], file: &Path) -> Result<()> {
    let mut bars = Vec::new();
    let mut add = |label: String, samples: &Samples, ours: bool| {
        bars.extend(samples.quantile(0.5).map(|value| Bar { label, value, ours }));
    };
    for measured in by_netfilter {
        let (shape, way) = (measured.shape, measured.way);
        add(
            format!("{shape}: {way}, a chain for each"),
            &measured.chains_change,
            false,
        );
        add(format!("{shape}: sluice, {way}"), &measured.change, true);
    }
    for measured in by_ebpf {
        add(
            format!("{}: sluice, ebpf", measured.shape),
            &measured.change,
            true,
        );
    }
    chart::bars(
        file,
        "One endpoint changed: until the kernel has it",
        "ms, median",
        &bars,
    )
}

fn measure(shape: Shape, changes: usize, events: &node::Events, maps: &Path) -> Result<Measured> {
    let mut kernel = Kernel::open(maps)?;
    let everything = cluster::everything(shape)?;
    let (last, count) = (shape.frontend(shape.services - 1), shape.endpoints as usize);

    let began = Instant::now();
    for event in everything {
        events.send(event)?;
    }
    events.send(Event::Loaded)?;
    wait("the last Service's endpoints", || {
        Ok(kernel.backends(last)?.len() == count)
    })?;
    let mut all = Samples::default();
    all.add(began.elapsed());

    let mut change = Samples::default();
    for round in 0..changes {
        // A prime, so that all parts of the tables have their turn.
        let service = u32::try_from(round)?.wrapping_mul(7_919) % shape.services;
        let (event, newcomer) = cluster::changed(shape, service, round)?;
        let frontend = shape.frontend(service);
        let began = Instant::now();
        events.send(event)?;
        wait("a changed endpoint", || kernel.has_backend(frontend, newcomer))?;
        change.add(began.elapsed());
    }
    let mut bare = Samples::default();
    bare.add(kernel.write_all_again()?);
    Ok(Measured {
        shape,
        all,
        bare,
        change,
    })
}

/// Asks the kernel again and again, as a socket would that connects.
fn wait(what: &str, mut held: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !held()? {
        ensure!(
            began.elapsed() < PATIENCE,
            "{what} did not come within {PATIENCE:?}"
        );
    }
    Ok(())
}

fn figures(measured: &Measured) -> Vec<Figure> {
    let shape = measured.shape;
    let bare = measured.bare.quantile(0.5);
    [
        measured
            .bare
            .figure(format!("{shape}, from nothing: bare map writes"), 0.5, None),
        measured
            .all
            .figure(format!("{shape}, from nothing: sluice, ebpf"), 0.5, bare),
        measured.change.figure(
            format!("{shape}, one endpoint changed, median: sluice, ebpf"),
            0.5,
            None,
        ),
        measured.change.figure(
            format!("{shape}, one endpoint changed, p99: sluice, ebpf"),
            0.99,
            None,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn netfilter_figures(measured: &netfilter::Measured) -> Vec<Figure> {
    let (way, shape) = (measured.way, measured.shape);
    let (all, change) = (
        measured.chains_all.quantile(0.5),
        measured.chains_change.quantile(0.5),
    );
    let theirs = format!("{way}, a chain for each");
    let ours = format!("sluice, {way}");
    let change_of = |part: &str, whose: &str| format!("one endpoint changed, {part}: {whose}");
    [
        (&measured.chains_all, format!("from nothing: {theirs}"), 0.5, None),
        (&measured.all, format!("from nothing: {ours}"), 0.5, all),
        (&measured.chains_change, change_of("median", &theirs), 0.5, None),
        (&measured.change, change_of("median", &ours), 0.5, change),
        (&measured.change, change_of("p99", &ours), 0.99, change),
    ]
    .into_iter()
    .filter_map(|(samples, what, part, baseline)| samples.figure(format!("{shape}, {what}"), part, baseline))
    .collect()
}

fn shown(value: Option<f64>) -> String {
    value.map(|value| format!("{value:.3}")).unwrap_or_default()
}

fn netfilter_table(all: &[netfilter::Measured]) -> String {
    let header = [
        "ms",
        "a chain for each: from nothing",
        "one change, median",
        "sluice: from nothing",
        "one change, median",
        "p99",
        "rules a Service: a chain for each",
        "sluice",
    ];
    let rows = all.iter().map(|measured| {
        vec![
            format!("{}, {}", measured.shape, measured.way),
            shown(measured.chains_all.quantile(0.5)),
            shown(measured.chains_change.quantile(0.5)),
            shown(measured.all.quantile(0.5)),
            shown(measured.change.quantile(0.5)),
            shown(measured.change.quantile(0.99)),
            shown(measured.chains_rules),
            shown(measured.rules),
        ]
    });
    figures::table(header, rows)
}

fn table(all: &[Measured]) -> String {
    let header = [
        "ms",
        "bare map writes",
        "from nothing (× bare)",
        "one change, median",
        "p99",
    ];
    let rows = all.iter().map(|measured| {
        let (bare, from_nothing) = (measured.bare.quantile(0.5), measured.all.quantile(0.5));
        let beside = match (from_nothing, bare) {
            (Some(value), Some(bare)) => format!("{value:.1} ({:.1})", value / bare),
            _ => String::new(),
        };
        vec![
            measured.shape.to_string(),
            shown(bare),
            beside,
            shown(measured.change.quantile(0.5)),
            shown(measured.change.quantile(0.99)),
        ]
    });
    figures::table(header, rows)
}
