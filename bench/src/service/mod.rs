//! `service`: through a ClusterIP and a NodePort, with one Service and with many, beside the kernel's own path to the pod's address
//! and beside rules of kube-proxy's shape.
//!
//! Client, server and all in between share one CPU, as in `path`. The Service that is measured comes last of all.

mod stage;
mod translator;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use indicatif::ProgressBar;

use self::stage::{Stage, Way};
use self::translator::Translator;
use crate::How;
use crate::chains::Tool;
use crate::chart::{self, Bar};
use crate::figures::{self, Figure, Samples};
use crate::load::Load;

const LEGACY: Tool = Tool::Iptables("legacy");

const FULL: &[Translator] = &[
    Translator::Nobody,
    Translator::Chains(LEGACY, 1),
    Translator::Chains(LEGACY, 1_000),
    Translator::Chains(LEGACY, 10_000),
    Translator::Chains(Tool::Nft, 1),
    Translator::Chains(Tool::Nft, 1_000),
    Translator::Chains(Tool::Nft, 5_000),
    Translator::Iptables(1),
    Translator::Iptables(1_000),
    Translator::Iptables(10_000),
    Translator::Nftables(1),
    Translator::Nftables(1_000),
    Translator::Nftables(10_000),
    Translator::Nftables(50_000),
    Translator::Ebpf(1),
    Translator::Ebpf(1_000),
    Translator::Ebpf(10_000),
    Translator::Ebpf(50_000),
];

const QUICK: &[Translator] = &[
    Translator::Nobody,
    Translator::Chains(LEGACY, 1_000),
    Translator::Chains(Tool::Nft, 1_000),
    Translator::Iptables(1_000),
    Translator::Nftables(1_000),
    Translator::Ebpf(1_000),
];

/// What was measured of one load on one way.
#[derive(Debug, Default)]
struct Measured {
    /// Of each round.
    rates: Vec<f64>,
    took: Samples,
}

impl Measured {
    fn median(&self) -> f64 {
        let mut rates = self.rates.clone();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or_default()
    }
}

type All = BTreeMap<(Way, Translator, Load), Measured>;

/// Measures, prints tables, writes the figures and draws what connections take.
///
/// # Errors
/// Not root, a tool that is missing, or a kernel that cannot do what a dataplane needs.
pub fn run(how: &How) -> Result<()> {
    let (translators, rounds, length) = if how.quick {
        (QUICK, 3, Duration::from_millis(100))
    } else {
        (FULL, 7, Duration::from_millis(400))
    };
    let mut stages = Vec::new();
    for translator in translators {
        eprintln!("making ready: {translator}");
        stages.push(Stage::make(*translator)?);
    }
    let mut all = All::new();
    let progress = ProgressBar::new((rounds * stages.len() * Way::ALL.len() * Load::ALL.len()) as u64);
    // Interleaved, so that what else goes on on the machine meets all alike.
    for _ in 0..rounds {
        for load in Load::ALL {
            for way in Way::ALL {
                for stage in &stages {
                    let (client, server, listens, to) = stage.ends(way);
                    let rate = load.measure(client, server, listens, to, length)?;
                    let measured = all.entry((way, stage.translator(), load)).or_default();
                    measured.rates.push(rate.value);
                    measured.took.extend(rate.took);
                    progress.inc(1);
                }
            }
        }
    }
    progress.finish_and_clear();
    for way in Way::ALL {
        println!("{}\n", table(way, translators, &all));
    }
    let figures = figures(&all);
    let path = figures::write(&how.results, "service", &figures)?;
    println!("{} figures in {}", figures.len(), path.display());
    draw(translators, &all, &how.chart("service"))
}

/// Connections to a ClusterIP whose endpoint is on another node, each beside the way straight to the pod.
fn draw(translators: &[Translator], all: &All, file: &Path) -> Result<()> {
    let of = |translator| {
        all.get(&(Way::PodToFar, translator, Load::Connections))
            .map(Measured::median)
    };
    let straight = of(Translator::Nobody).unwrap_or(f64::NAN);
    let bars: Vec<Bar> = translators
        .iter()
        .filter_map(|translator| {
            Some(Bar {
                label: translator.to_string(),
                value: of(*translator)? / straight,
                ours: translator.is_ours(),
            })
        })
        .collect();
    let title =
        "TCP connections per second through a ClusterIP to a pod on another node, by the number of Services";
    chart::bars(
        file,
        title,
        "times those straight to the pod over plain routes",
        &bars,
    )
}

/// A line for each translator; in brackets, how many times the rate of the way straight to the pod.
fn table(way: Way, translators: &[Translator], all: &All) -> String {
    let mut header = vec![way.name().to_owned()];
    for load in Load::ALL {
        header.push(format!("{}, {}", load.name(), load.unit()));
        if load == Load::Connections {
            header.extend(["µs p50".to_owned(), "p99".to_owned()]);
        }
    }
    let rows = translators.iter().map(|translator| {
        let mut row = vec![translator.to_string()];
        for load in Load::ALL {
            let median = |translator| all.get(&(way, translator, load)).map(Measured::median);
            let value = median(*translator).unwrap_or_default();
            row.push(load.shown(value, value / median(Translator::Nobody).unwrap_or(value)));
            if load == Load::Connections {
                let took = all.get(&(way, *translator, load)).map(|measured| &measured.took);
                row.extend([0.5, 0.99].map(|part| {
                    let milliseconds = took.and_then(|took| took.quantile(part));
                    format!("{:.1}", milliseconds.unwrap_or_default() * 1e3)
                }));
            }
        }
        row
    });
    figures::table(header, rows)
}

fn figures(all: &All) -> Vec<Figure> {
    let mut figures = Vec::new();
    for ((way, translator, load), measured) in all {
        let name = format!("{}, {}: {translator}", way.name(), load.name());
        let straight = all
            .get(&(*way, Translator::Nobody, *load))
            .filter(|_| *translator != Translator::Nobody);
        let (value, baseline) = (measured.median(), straight.map(Measured::median));
        figures.push(Figure {
            name: name.clone(),
            value,
            unit: load.unit(),
            baseline,
            ratio: baseline.map(|baseline| value / baseline),
            runs: measured.rates.len(),
            min: measured.rates.iter().copied().fold(f64::INFINITY, f64::min),
            max: measured.rates.iter().copied().fold(0.0, f64::max),
        });
        for (quantile, part) in [("median", 0.5), ("p99", 0.99)] {
            let baseline = straight.and_then(|measured| measured.took.quantile(part));
            figures.extend(
                measured
                    .took
                    .figure(format!("{name}, {quantile}"), part, baseline),
            );
        }
    }
    figures
}
