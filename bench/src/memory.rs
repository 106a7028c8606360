//! `memory`: what a node takes for Services, none, some and many, from a real API server: `sluiced` and its maps, beside the real
//! kube-proxy on another node of the same cluster.

use std::net::SocketAddrV4;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sluice_lab::load::Size;
use sluice_lab::{Datastore, Families, Lab, Options, ProxyMode, api};

use crate::How;
use crate::chart::{self, Bar};
use crate::figures::{self, Figure};
use crate::kernel::Kernel;
use crate::process::Process;

const NODE: &str = "node1";
/// Where kube-proxy is, and no Sluice.
const OTHER: &str = "node2";

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// How long a process must have done next to nothing to count as settled.
const QUIET: Duration = Duration::from_secs(10);

/// How long after that memory has settled: the daemon gives back what it used for a moment when it tends.
const SETTLED: Duration = Duration::from_secs(15);

/// Endpoints of each Service.
const ENDPOINTS: u32 = 5;

/// What a process took, in kilobytes.
#[derive(Debug, Clone, Copy)]
struct Taken {
    peak: u64,
    settled: u64,
}

/// What was measured with one number of Services.
struct Measured {
    services: u32,
    sluiced: Taken,
    /// In kilobytes, the kernel's.
    maps: u64,
    kube_proxy: Taken,
}

/// Measures, prints a table, writes the figures and draws what is held once all is settled.
///
/// # Errors
/// Not root, or no control plane (`./dev setup` builds it).
pub fn run(how: &How) -> Result<()> {
    let numbers: &[u32] = if how.quick { &[0, 300] } else { &[0, 1_000, 10_000] };
    let mut all = Vec::new();
    for services in numbers {
        eprintln!("{services} Services × {ENDPOINTS}");
        all.push(measure(*services)?);
    }
    println!("{}\n", table(&all));
    let figures: Vec<_> = all.iter().flat_map(figures).collect();
    let path = figures::write(&how.results, "memory", &figures)?;
    println!("{} figures in {}", figures.len(), path.display());
    draw(&all, &how.chart("memory"))
}

fn draw(all: &[Measured], file: &Path) -> Result<()> {
    let bars: Vec<Bar> = all
        .iter()
        .flat_map(|measured| {
            let (sluiced, kube_proxy) = (measured.sluiced.settled, measured.kube_proxy.settled);
            [
                ("kube-proxy, nftables", kube_proxy),
                ("sluiced, ebpf", sluiced),
                ("sluiced's maps in the kernel", measured.maps),
            ]
            .map(|(what, kilobytes)| Bar {
                label: format!("{} Services × {ENDPOINTS}: {what}", measured.services),
                value: mebibytes(kilobytes),
                ours: what.starts_with("sluiced"),
            })
        })
        .collect();
    chart::bars(
        file,
        "Memory on a node once all Services are in the kernel",
        "MiB",
        &bars,
    )
}

fn measure(services: u32) -> Result<Measured> {
    let lab = Lab::up(Options {
        nodes: 2,
        families: Families::V4,
        proxy: ProxyMode::Ebpf,
        datastore: Datastore::Kubernetes,
        ..Options::default()
    })?;
    lab.stop_sluiced(NODE)?;
    lab.stop_sluiced(OTHER)?;
    let size = Size {
        services,
        endpoints: ENDPOINTS,
    };
    if services > 0 {
        api::fill(lab.record(), size)?;
    }
    // One after the other: two processors are for each of them.
    lab.start_sluiced(NODE)?;
    let daemon = Process::find(&lab, NODE, "sluiced")?;
    let sluiced = taken(daemon)?;
    let maps = lab.record().member(NODE)?.init.root("/sys/fs/bpf/sluice/maps");
    if let Some(last) = services.checked_sub(1) {
        let there = Kernel::open(&maps)?.backends(SocketAddrV4::new(Size::cluster_ip(last), 80))?;
        ensure!(
            there.len() == ENDPOINTS as usize,
            "the last Service is not in the kernel"
        );
    }
    let maps = daemon.maps()?;
    lab.start_kube_proxy(OTHER, "nftables")?;
    let kube_proxy = taken(Process::find(&lab, OTHER, "kube-proxy")?)?;
    Ok(Measured {
        services,
        sluiced,
        maps,
        kube_proxy,
    })
}

/// Waits until the process has done its work, and what it used for that for a moment is given back.
fn taken(process: Process) -> Result<Taken> {
    let began = Instant::now();
    loop {
        let before = process.ticks()?;
        thread::sleep(QUIET);
        // A twentieth of a processor.
        if process.ticks()? - before <= 5 * QUIET.as_secs() {
            break;
        }
        ensure!(
            began.elapsed() < PATIENCE,
            "it was at work for more than {PATIENCE:?}"
        );
    }
    thread::sleep(SETTLED);
    Ok(Taken {
        peak: process.memory("VmHWM:")?,
        settled: process.memory("VmRSS:")?,
    })
}

fn mebibytes(kilobytes: u64) -> f64 {
    kilobytes as f64 / 1024.0
}

fn figures(measured: &Measured) -> Vec<Figure> {
    let figure = |name: &str, kilobytes: u64, beside: Option<u64>| {
        let value = mebibytes(kilobytes);
        let baseline = beside.map(mebibytes);
        Figure {
            name: format!("{} Services × {ENDPOINTS}, {name}", measured.services),
            value,
            unit: "MiB",
            baseline,
            ratio: baseline.map(|baseline| value / baseline),
            runs: 1,
            min: value,
            max: value,
        }
    };
    let (sluiced, kube_proxy) = (measured.sluiced, measured.kube_proxy);
    vec![
        figure("peak: kube-proxy, nftables", kube_proxy.peak, None),
        figure("peak: sluiced", sluiced.peak, Some(kube_proxy.peak)),
        figure("settled: kube-proxy, nftables", kube_proxy.settled, None),
        figure("settled: sluiced", sluiced.settled, Some(kube_proxy.settled)),
        figure("maps: sluiced", measured.maps, None),
    ]
}

/// In brackets, how many times kube-proxy's.
fn table(all: &[Measured]) -> String {
    let header = [
        "MiB (× kube-proxy)",
        "kube-proxy, nftables: peak",
        "settled",
        "sluiced, ebpf: peak",
        "settled",
        "maps in the kernel",
    ];
    let rows = all.iter().map(|measured| {
        let (sluiced, kube_proxy) = (measured.sluiced, measured.kube_proxy);
        let shown = |kilobytes| format!("{:.1}", mebibytes(kilobytes));
        let beside = |kilobytes, other| {
            let ratio = mebibytes(kilobytes) / mebibytes(other);
            format!("{} ({ratio:.2})", shown(kilobytes))
        };
        vec![
            format!("{} Services × {ENDPOINTS}", measured.services),
            shown(kube_proxy.peak),
            shown(kube_proxy.settled),
            beside(sluiced.peak, kube_proxy.peak),
            beside(sluiced.settled, kube_proxy.settled),
            shown(measured.maps),
        ]
    });
    figures::table(header, rows)
}
