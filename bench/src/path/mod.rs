//! `path`: from pod to pod, on one node and between two, beside a bare veth and the kernel's own forwarding.
//!
//! Client, server and all in between share one CPU: what is measured is what the path costs, not how well it spreads.

mod stage;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use indicatif::ProgressBar;

use self::stage::{Carrier, Stage, Where};
use crate::How;
use crate::cgroup::Cgroup;
use crate::chart::{self, Bar};
use crate::figures::{self, Figure};
use crate::load::{Load, PORT};

/// Each with what it is compared with.
const PATHS: [(Where, &[Carrier], Carrier); 2] = [
    (
        Where::Same,
        &[
            Carrier::Veth,
            Carrier::Routes,
            Carrier::Conntrack,
            Carrier::Slow,
            Carrier::Fast,
        ],
        Carrier::Veth,
    ),
    (
        Where::Cross,
        &[Carrier::Routes, Carrier::Conntrack, Carrier::Slow, Carrier::Fast],
        Carrier::Conntrack,
    ),
];

type Key = (Where, Load, Carrier);

/// Measures, prints a table, writes the figures and draws what connections take.
///
/// # Errors
/// Not root, or a kernel that cannot do what the dataplane needs.
pub fn run(how: &How) -> Result<()> {
    let (rounds, length) = if how.quick {
        (3, Duration::from_millis(200))
    } else {
        (9, Duration::from_millis(700))
    };
    let cgroup = Cgroup::make()?;
    let mut stages = Vec::new();
    for (place, carriers, _) in PATHS {
        for carrier in carriers {
            stages.push((place, *carrier, Stage::make(place, *carrier, &cgroup)?));
        }
    }
    let mut measured: BTreeMap<Key, Vec<f64>> = BTreeMap::new();
    let progress = ProgressBar::new((rounds * stages.len() * Load::ALL.len()) as u64);
    // Interleaved, so that what else goes on on the machine meets all alike.
    for _ in 0..rounds {
        for load in Load::ALL {
            for (place, carrier, stage) in &stages {
                let rate = load.measure(
                    &stage.client,
                    &stage.server,
                    stage.to,
                    SocketAddr::new(stage.to, PORT),
                    length,
                )?;
                measured
                    .entry((*place, load, *carrier))
                    .or_default()
                    .push(rate.value);
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    for values in measured.values_mut() {
        values.sort_by(f64::total_cmp);
    }
    println!("{}", table(&measured));
    let figures = figures(&measured);
    let path = figures::write(&how.results, "path", &figures)?;
    println!("{} figures in {}", figures.len(), path.display());
    draw(&measured, &how.chart("path"))
}

/// Connections alone, each beside what it is compared with.
fn draw(measured: &BTreeMap<Key, Vec<f64>>, file: &Path) -> Result<()> {
    let mut bars = Vec::new();
    for (place, carriers, with) in PATHS {
        let of = |carrier| {
            measured
                .get(&(place, Load::Connections, carrier))
                .map(|values| median(values))
        };
        for carrier in carriers {
            let (Some(value), Some(baseline)) = (of(*carrier), of(with)) else {
                continue;
            };
            bars.push(Bar {
                label: format!("{}, {}", place_name(place), carrier.name()),
                value: value / baseline,
                ours: matches!(carrier, Carrier::Fast | Carrier::Slow),
            });
        }
    }
    let title = "TCP connections per second from pod to pod";
    let axis = "on one node: times a bare veth's; between nodes: times those of plain routes with conntrack";
    chart::bars(file, title, axis, &bars)
}

/// Of sorted values, at least one.
fn median(values: &[f64]) -> f64 {
    values[values.len() / 2]
}

fn place_name(place: Where) -> &'static str {
    match place {
        Where::Same => "same node",
        Where::Cross => "between nodes",
    }
}

fn figures(measured: &BTreeMap<Key, Vec<f64>>) -> Vec<Figure> {
    let mut figures = Vec::new();
    for ((place, load, carrier), values) in measured {
        let with = PATHS.iter().find(|(of, ..)| of == place).map(|(.., with)| *with);
        let baseline = with
            .filter(|with| with != carrier)
            .and_then(|with| measured.get(&(*place, *load, with)))
            .map(|values| median(values));
        figures.push(Figure {
            name: format!("{}, {}: {}", place_name(*place), load.name(), carrier.name()),
            value: median(values),
            unit: load.unit(),
            baseline,
            ratio: baseline.map(|baseline| median(values) / baseline),
            runs: values.len(),
            min: values[0],
            max: values[values.len() - 1],
        });
    }
    figures
}

fn table(measured: &BTreeMap<Key, Vec<f64>>) -> String {
    let mut header = vec!["median (ratio)".to_owned()];
    header.extend(Load::ALL.map(|load| format!("{}, {}", load.name(), load.unit())));
    let mut rows = Vec::new();
    for (place, carriers, with) in PATHS {
        for carrier in carriers {
            let mut row = vec![format!("{}, {}", place_name(place), carrier.name())];
            for load in Load::ALL {
                let of = |carrier| measured.get(&(place, load, carrier)).map(|values| median(values));
                let value = of(*carrier).unwrap_or_default();
                row.push(load.shown(value, value / of(with).unwrap_or(value)));
            }
            rows.push(row);
        }
    }
    figures::table(header, rows)
}
