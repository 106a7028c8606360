//! What was measured, as a table and as figures.

use super::HEAP;
use super::measure::{All, Measured};
use crate::figures::{self, Figure, Samples};

/// Which of a contender's samples.
type Choice = fn(&Measured) -> &Samples;

/// A kind of figure: what it is called, which samples, and which quantile of them.
struct Kind {
    name: String,
    samples: Choice,
    part: f64,
}

fn kinds(all: &All) -> Vec<Kind> {
    let calls: [(String, Choice); 6] = [
        ("ADD in a row".to_owned(), |measured| &measured.add_in_a_row),
        (format!("ADD, {HEAP} at once, in a row"), |measured| {
            &measured.heaps_in_a_row
        }),
        ("ADD after a DEL".to_owned(), |measured| &measured.add),
        (format!("ADD, {HEAP} at once, after DELs"), |measured| {
            &measured.add_at_once
        }),
        ("DEL".to_owned(), |measured| &measured.del),
        (format!("DEL, {HEAP} at once"), |measured| &measured.del_at_once),
    ];
    let mut kinds = vec![Kind {
        name: "process start, median".to_owned(),
        samples: |measured| &measured.start,
        part: 0.5,
    }];
    for (name, samples) in calls {
        for (quantile, part) in [("median", 0.5), ("p99", 0.99)] {
            kinds.push(Kind {
                name: format!("{name}, {quantile}"),
                samples,
                part,
            });
        }
    }
    kinds.push(Kind {
        name: format!("{} DELs at once, in all", all.pods),
        samples: |measured| &measured.flood,
        part: 0.5,
    });
    kinds
}

/// Every figure: of each contender beside the limit (the first), and of Sluice beside each peer.
pub fn figures(all: &All) -> Vec<Figure> {
    let mut figures = Vec::new();
    let Some((limit, others)) = all.contenders.split_first() else {
        return figures;
    };
    for kind in kinds(all) {
        let value = |measured: &Measured| (kind.samples)(measured).quantile(kind.part);
        let figure = |measured: &Measured, name: String, baseline| {
            (kind.samples)(measured).figure(format!("{}: {name}", kind.name), kind.part, baseline)
        };
        figures.extend(figure(limit, limit.name.to_owned(), None));
        for other in others {
            figures.extend(figure(other, other.name.to_owned(), value(limit)));
        }
        if let Some((sluice, peers)) = others.split_first() {
            for peer in peers {
                let name = format!("{} beside {}", sluice.name, peer.name);
                figures.extend(figure(sluice, name, value(peer)));
            }
        }
    }
    let small = all.pools.first().and_then(|(_, samples)| samples.quantile(0.5));
    for (at, (name, samples)) in all.pools.iter().enumerate() {
        let baseline = small.filter(|_| at > 0);
        figures.extend(samples.figure(format!("ADD, median: sluice, {name}"), 0.5, baseline));
    }
    figures
}

/// A column per contender; in brackets, how many times the limit.
pub fn table(all: &All) -> String {
    let names = all.contenders.iter().map(|measured| measured.name.to_owned());
    let header = std::iter::once("ms (× bare)".to_owned()).chain(names);
    let rows = kinds(all).into_iter().map(|kind| {
        let value = |measured: &Measured| (kind.samples)(measured).quantile(kind.part);
        let limit = all.contenders.first().and_then(value);
        let cells = all
            .contenders
            .iter()
            .enumerate()
            .map(|(at, measured)| match (value(measured), limit) {
                (Some(value), Some(limit)) if at > 0 => format!("{value:.2} ({:.1})", value / limit),
                (Some(value), _) => format!("{value:.2}"),
                (None, _) => String::new(),
            });
        std::iter::once(kind.name.clone()).chain(cells).collect()
    });
    let mut text = figures::table(header, rows);
    for (name, samples) in &all.pools {
        if let (Some(median), Some(p99)) = (samples.quantile(0.5), samples.quantile(0.99)) {
            text += &format!(
                "\n {} ADDs of sluice, {name}: median {median:.2} ms, p99 {p99:.2} ms",
                all.pods
            );
        }
    }
    text
}
