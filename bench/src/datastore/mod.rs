//! `datastore`: a whole node that takes its state from a real API server. Until all of it is in the kernel, what memory that
//! takes, how long one change takes from the server to the kernel, and what many of them cost.
//!
//! The limit of a change is a client of the same server that does nothing but hear of it.

use std::net::SocketAddrV4;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use sluice_lab::load::{self, Change, Size};
use sluice_lab::{Datastore, Families, Lab, Options, ProxyMode, api};

use crate::figures::{self, Figure, Samples};
use crate::kernel::Kernel;
use crate::process::Process;

const NODE: &str = "node1";

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long after all is in the kernel memory has settled: the daemon gives back what it used for a moment when it tends.
const SETTLED: Duration = Duration::from_secs(20);

/// Milliseconds between changes that are measured one by one.
const PAUSE: u64 = 20;

/// Milliseconds between changes whose cost is measured: a hundred a second.
const RATE: u64 = 10;

struct Counts {
    sizes: &'static [Size],
    changes: u32,
    load: u32,
}

const fn size(services: u32, endpoints: u32) -> Size {
    Size { services, endpoints }
}

const FULL: Counts = Counts {
    sizes: &[size(1_000, 5), size(10_000, 5), size(1_000, 100)],
    changes: 1_000,
    load: 1_000,
};

const QUICK: Counts = Counts {
    sizes: &[size(300, 5)],
    changes: 100,
    load: 200,
};

/// What was measured of one size.
struct Measured {
    size: Size,
    in_sync: Samples,
    /// Kilobytes.
    peak: u64,
    settled: u64,
    change: Samples,
    heard: Samples,
    /// Share of one processor at a hundred changes a second.
    cpu: f64,
}

/// Measures, prints a table and writes `datastore.json` into `results`.
///
/// # Errors
/// Not root, or no control plane (`./dev setup` builds it).
pub fn run(quick: bool, results: &Path) -> Result<()> {
    let counts = if quick { QUICK } else { FULL };
    let mut measured = Vec::new();
    for size in counts.sizes {
        eprintln!("{} Services × {}", size.services, size.endpoints);
        measured.push(measure(*size, counts.changes, counts.load)?);
    }
    println!("{}\n", table(&measured));
    let figures: Vec<_> = measured.iter().flat_map(figures).collect();
    let path = figures::write(results, "datastore", &figures)?;
    println!("{} figures in {}", figures.len(), path.display());
    Ok(())
}

fn measure(size: Size, changes: u32, load: u32) -> Result<Measured> {
    let lab = Lab::up(Options {
        nodes: 1,
        families: Families::V4,
        proxy: ProxyMode::Ebpf,
        datastore: Datastore::Kubernetes,
        ..Options::default()
    })?;
    lab.stop_sluiced(NODE)?;
    api::fill(lab.record(), size)?;

    let maps = lab.record().member(NODE)?.init.root("/sys/fs/bpf/sluice/maps");
    let kernel = Kernel::open(&maps)?;
    let frontend = |service| SocketAddrV4::new(Size::cluster_ip(service), 80);
    let all_there = || {
        for service in [0, size.services / 2, size.services - 1] {
            if kernel.backends(frontend(service))?.len() != size.endpoints as usize {
                return Ok(false);
            }
        }
        Ok(true)
    };
    let began = Instant::now();
    lab.start_sluiced(NODE)?;
    wait("all Services", all_there)?;
    let mut in_sync = Samples::default();
    in_sync.add(began.elapsed());
    thread::sleep(SETTLED);
    let daemon = Process::find(&lab, NODE, "sluiced")?;
    let (peak, settled) = (daemon.memory("VmHWM:")?, daemon.memory("VmRSS:")?);

    let seen = |changes: u32, pause: u64| -> Result<(Vec<Change>, Vec<u64>)> {
        thread::scope(|scope| {
            let asking = scope.spawn(|| api::change(lab.record(), size, 0..changes, pause));
            let mut seen = Vec::new();
            for change in 0..changes {
                let backend = SocketAddrV4::new(Size::newcomer(change), 8080);
                let frontend = frontend(size.changed(change));
                wait("a change", || kernel.has_backend(frontend, backend))?;
                seen.push(load::now()?);
            }
            let asked = asking.join().map_err(|_| anyhow!("asking panicked"))??;
            Ok((asked, seen))
        })
    };
    let (asked, seen) = seen(changes, PAUSE)?;
    let (mut change, mut heard) = (Samples::default(), Samples::default());
    for (asked, seen) in asked.iter().zip(seen) {
        change.add(Duration::from_nanos(seen.saturating_sub(asked.asked)));
        heard.add(Duration::from_nanos(asked.heard.saturating_sub(asked.asked)));
    }
    let (before, began) = (daemon.ticks()?, Instant::now());
    api::change(lab.record(), size, changes..changes + load, RATE)?;
    let used = (daemon.ticks()? - before) as f64 / 100.0;
    Ok(Measured {
        size,
        in_sync,
        peak,
        settled,
        change,
        heard,
        cpu: used / began.elapsed().as_secs_f64(),
    })
}

/// Asks again and again.
fn wait(what: &str, mut held: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !held()? {
        ensure!(
            began.elapsed() < PATIENCE,
            "{what} did not come within {PATIENCE:?}"
        );
        // Two processors have to do for all of a cluster: what is measured is not to wait for who measures.
        thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

fn shown(size: Size) -> String {
    format!("{} Services × {}", size.services, size.endpoints)
}

fn figures(measured: &Measured) -> Vec<Figure> {
    let size = shown(measured.size);
    let plain = |name: &str, value: f64, unit| Figure {
        name: format!("{size}, {name}"),
        value,
        unit,
        baseline: None,
        ratio: None,
        runs: 1,
        min: value,
        max: value,
    };
    let mut all: Vec<Figure> = [
        measured
            .in_sync
            .figure(format!("{size}, from start to kernel"), 0.5, None),
        measured
            .heard
            .figure(format!("{size}, one change heard, median"), 0.5, None),
        measured.change.figure(
            format!("{size}, one change in the kernel, median"),
            0.5,
            measured.heard.quantile(0.5),
        ),
        measured.change.figure(
            format!("{size}, one change in the kernel, p99"),
            0.99,
            measured.heard.quantile(0.99),
        ),
    ]
    .into_iter()
    .flatten()
    .collect();
    all.push(plain("memory, peak", measured.peak as f64 / 1024.0, "MiB"));
    all.push(plain("memory, settled", measured.settled as f64 / 1024.0, "MiB"));
    all.push(plain(
        "processor at 100 changes a second",
        100.0 * measured.cpu,
        "%",
    ));
    all
}

fn table(all: &[Measured]) -> String {
    let header = [
        "from a kube-apiserver",
        "start to kernel, ms",
        "memory peak, MiB",
        "settled",
        "change heard, ms p50",
        "p99",
        "in the kernel, ms p50",
        "p99",
        "CPU at 100/s, %",
    ];
    let rows = all.iter().map(|measured| {
        let shown_ms = |value: Option<f64>| value.map(|value| format!("{value:.2}")).unwrap_or_default();
        let mebibytes = |kilobytes: u64| format!("{:.1}", kilobytes as f64 / 1024.0);
        vec![
            shown(measured.size),
            shown_ms(measured.in_sync.quantile(0.5)),
            mebibytes(measured.peak),
            mebibytes(measured.settled),
            shown_ms(measured.heard.quantile(0.5)),
            shown_ms(measured.heard.quantile(0.99)),
            shown_ms(measured.change.quantile(0.5)),
            shown_ms(measured.change.quantile(0.99)),
            format!("{:.1}", 100.0 * measured.cpu),
        ]
    });
    figures::table(header, rows)
}
