//! What was measured: samples, their figures, and the file they go to.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// One figure, as it goes to the file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// What was measured, of whom, and what it is compared with if not with the limit.
    pub name: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// The figure it is compared with, in the same unit; none for the limit itself.
    pub baseline: Option<f64>,
    /// Value divided by baseline.
    pub ratio: Option<f64>,
    /// How many runs.
    pub runs: usize,
    /// Least of the runs.
    pub min: f64,
    /// Greatest of the runs.
    pub max: f64,
}

/// Durations of the same thing, done again and again.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Takes one more.
    pub fn add(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    /// Takes more.
    pub fn extend(&mut self, samples: impl IntoIterator<Item = Duration>) {
        self.0.extend(samples);
    }

    /// The sample below which `part` of all are, in milliseconds; `None` without samples.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort();
        // Nearest rank.
        let rank = (part * sorted.len() as f64).ceil() as usize;
        let sample = sorted.get(rank.saturating_sub(1).min(sorted.len().checked_sub(1)?))?;
        Some(milliseconds(*sample))
    }

    /// A figure of these samples at a quantile; `None` without samples.
    pub fn figure(&self, name: String, part: f64, baseline: Option<f64>) -> Option<Figure> {
        let value = self.quantile(part)?;
        Some(Figure {
            name,
            value,
            unit: "ms",
            baseline,
            ratio: baseline
                .filter(|baseline| *baseline > 0.0)
                .map(|baseline| value / baseline),
            runs: self.0.len(),
            min: self.quantile(0.0)?,
            max: self.quantile(1.0)?,
        })
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Writes `figures` as `NAME.json` into `folder` and says where.
///
/// # Errors
/// The file cannot be written.
pub fn write(folder: &Path, name: &str, figures: &[Figure]) -> Result<PathBuf> {
    let path = folder.join(format!("{name}.json"));
    let text = serde_json::to_string_pretty(figures).context("putting the figures into JSON")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&path, text + "\n"))
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// Lines of text in columns; numbers, which are in all but the first, stand to the right.
pub fn table<C: Into<String>>(
    header: impl IntoIterator<Item = C>,
    rows: impl IntoIterator<Item = Vec<String>>,
) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header.into_iter().map(Into::into).collect::<Vec<String>>());
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let mut samples = Samples::default();
        assert_eq!(samples.quantile(0.5), None);
        samples.extend((1..=100).rev().map(Duration::from_millis));
        assert_eq!(samples.quantile(0.5), Some(50.0));
        assert_eq!(samples.quantile(0.99), Some(99.0));
        assert_eq!(samples.quantile(0.0), Some(1.0));
        let figure = samples.figure("x".to_owned(), 1.0, Some(50.0)).unwrap();
        assert_eq!((figure.value, figure.ratio, figure.runs), (100.0, Some(2.0), 100));
    }
}
