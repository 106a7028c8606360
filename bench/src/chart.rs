//! What was measured as a picture: horizontal bars, one below the other, as an SVG file.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::ranged1d::SegmentValue;
use plotters::prelude::*;

/// Pixels.
const WIDTH: u32 = 960;
const BAR: u32 = 24;
const FRAME: u32 = 90;
const LABELS: u32 = 340;

const OURS: RGBColor = RGBColor(20, 90, 160);
const OTHERS: RGBColor = RGBColor(170, 175, 180);

/// One of them.
pub struct Bar {
    /// What it is of.
    pub label: String,
    /// How long it is, on the axis.
    pub value: f64,
    /// Whether it is Sluice's.
    pub ours: bool,
}

/// Draws them in their order into the file `path`, below `title`; `axis` says what their length means.
///
/// # Errors
/// The file cannot be written.
pub fn bars(path: &Path, title: &str, axis: &str, bars: &[Bar]) -> Result<()> {
    draw(path, title, axis, bars).with_context(|| format!("drawing {}", path.display()))
}

fn draw(path: &Path, title: &str, axis: &str, bars: &[Bar]) -> Result<()> {
    let count = bars.len();
    let longest = bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max);
    let area = SVGBackend::new(path, (WIDTH, FRAME + BAR * u32::try_from(count)?)).into_drawing_area();
    area.fill(&WHITE)?;
    // Room for the figures at their ends.
    let lengths = 0.0..longest * 1.1;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 17))
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(LABELS)
        .build_cartesian_2d(lengths, (0..count).into_segmented())?;
    // The first at the top: places are counted from below.
    let at = |place: usize| {
        bars.len()
            .checked_sub(place + 1)
            .and_then(|number| bars.get(number))
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc(axis)
        .y_labels(count)
        .y_label_formatter(&|place| match place {
            SegmentValue::CenterOf(place) => at(*place).map(|bar| bar.label.clone()).unwrap_or_default(),
            _ => String::new(),
        })
        .draw()?;
    for (place, bar) in bars.iter().rev().enumerate() {
        let color = if bar.ours { OURS } else { OTHERS };
        let corners = [
            (0.0, SegmentValue::Exact(place)),
            (bar.value, SegmentValue::Exact(place + 1)),
        ];
        let mut rectangle = Rectangle::new(corners, color.filled());
        rectangle.set_margin(3, 3, 0, 0);
        chart.draw_series([rectangle])?;
        let end = (bar.value, SegmentValue::CenterOf(place));
        let figure =
            EmptyElement::at(end) + Text::new(format!("{:.2}", bar.value), (5, -6), ("sans-serif", 12));
        chart.draw_series([figure])?;
    }
    area.present()?;
    Ok(())
}
