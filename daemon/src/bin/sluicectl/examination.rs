//! What `sluicectl doctor` found, for people.

use std::fmt::Write;

use sluice_daemon::doctor::{Area, Report, Verdict};

use crate::paint::Paint;

/// The report as text; what to do for each leftover is a line to paste.
pub fn screen(report: &Report) -> String {
    let paint = Paint::for_stdout();
    let mut text = String::new();
    // Writing to a string cannot fail.
    for (area, title) in [
        (Area::Kernel, "kernel"),
        (Area::Host, "host"),
        (Area::Sluice, "sluice"),
    ] {
        let _ = writeln!(text, "{title}");
        for finding in report.findings.iter().filter(|finding| finding.area == area) {
            let verdict = match finding.verdict {
                Verdict::Ok => paint.green("ok     "),
                Verdict::Note => paint.yellow("note   "),
                Verdict::Problem => paint.red("problem"),
            };
            let _ = writeln!(text, "  {verdict}  {}", finding.what);
        }
        text.push('\n');
    }
    if report.leftovers.is_empty() {
        let _ = writeln!(text, "leftovers of other networks and proxies: none");
    } else {
        let _ = writeln!(
            text,
            "leftovers of other networks and proxies; from top to bottom, each with the command that removes it:"
        );
    }
    for leftover in &report.leftovers {
        let verdict = if leftover.harms {
            paint.red("problem")
        } else {
            paint.yellow("litter ")
        };
        let _ = writeln!(text, "  {verdict}  {}: {}", leftover.whose, leftover.what);
        let _ = writeln!(text, "           {}", leftover.remove);
    }
    for unseen in &report.unseen {
        let _ = writeln!(text, "  {}  {unseen}", paint.yellow("unseen "));
    }
    let conclusion = if report.is_well() {
        paint.green("nothing is in the way")
    } else {
        paint.red("something is in the way")
    };
    let _ = writeln!(text, "\n{conclusion}");
    text
}
