//! docs/performance.svg: connections a second against untraced, and time in the kernel, by tool. It has a background of its
//! own, so that it can be read on any page.

use std::fmt::Write as _;

use crate::figures::{Measured, Results};
use crate::load::Made;
use crate::tools::Tool;

const WIDTH: f64 = 820.0;
const LABEL: f64 = 250.0;
/// Of the longest bar; the number stands behind it.
const LONGEST: f64 = 420.0;
const ROW: f64 = 26.0;
const BAR: f64 = 16.0;
const HEAD: f64 = 44.0;
/// Where the axis of nanoseconds, which is logarithmic, begins.
const LEAST_NS: f64 = 10.0;

const STYLE: &str = "\
.page{fill:#ffffff;stroke:#d1d9e0}.head{fill:#1f2328;font-weight:600}.text{fill:#1f2328}\
.ours{fill:#0969da}.floor{fill:#59636e}.peer{fill:#a8b1bb}\
@media(prefers-color-scheme:dark){.page{fill:#0d1117;stroke:#3d444d}.head,.text{fill:#f0f6fc}\
.ours{fill:#4493f8}.floor{fill:#9198a1}.peer{fill:#5a636e}}";

struct Row {
    tool: Tool,
    /// Share of the longest bar.
    length: f64,
    value: String,
}

pub fn chart(results: &Results) -> String {
    let against = results.tool(Tool::Untraced);
    let rates = rows(results, |measured| {
        let ratio = match measured.tool {
            Tool::Untraced => 1.0,
            _ => measured.rate_against(against?, 0, Made::rate)?.median,
        };
        Some((ratio, format!("{ratio:.3}")))
    });
    let most = results
        .tools
        .iter()
        .filter_map(|measured| Some(measured.kernel_ns()?.median))
        .fold(10.0 * LEAST_NS, f64::max);
    let times = rows(results, |measured| {
        let ns = measured.kernel_ns()?.median;
        let length = (ns / LEAST_NS).ln() / (most / LEAST_NS).ln();
        Some((length, format!("{ns:.0} ns")))
    });
    let panels = [
        (
            "Connections a second, against untraced (more is better)",
            rates,
        ),
        (
            "Time in the kernel for each transition, logarithmic (less is better)",
            times,
        ),
    ];
    let mut body = String::new();
    let mut top = 12.0;
    for (head, rows) in panels {
        top = panel(&mut body, top, head, &rows);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" font-family=\"system-ui, sans-serif\" \
         font-size=\"13\">\n<style>{STYLE}</style>\n<rect class=\"page\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"6\"/>\n{body}</svg>\n",
        WIDTH - 1.0,
        top - 1.0
    )
}

fn rows(results: &Results, of: impl Fn(&Measured) -> Option<(f64, String)>) -> Vec<Row> {
    let shown = results
        .tools
        .iter()
        .filter(|measured| measured.tool != Tool::UntracedAgain);
    let row = |measured: &Measured| {
        let (length, value) = of(measured)?;
        Some(Row {
            tool: measured.tool,
            length: length.clamp(0.0, 1.1),
            value,
        })
    };
    shown.filter_map(row).collect()
}

/// Gives where the next one begins.
fn panel(body: &mut String, top: f64, head: &str, rows: &[Row]) -> f64 {
    let mut y = top + HEAD / 2.0;
    writeln!(
        body,
        "<text class=\"head\" x=\"16\" y=\"{y}\">{head}</text>"
    )
    .expect("memory");
    y = top + HEAD;
    for row in rows {
        let class = match row.tool {
            Tool::Daemon | Tool::Watch => "ours",
            Tool::Untraced | Tool::Floor => "floor",
            _ => "peer",
        };
        let (name, value) = (row.tool.name().replace('`', ""), &row.value);
        let length = (row.length * LONGEST).max(1.0);
        let (text, middle) = (LABEL - 12.0, y - BAR / 2.0 - 1.0);
        writeln!(
            body,
            "<text class=\"text\" x=\"{text}\" y=\"{y}\" text-anchor=\"end\">{name}</text>\
             <rect class=\"{class}\" x=\"{LABEL}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\"/>\
             <text class=\"text\" x=\"{:.1}\" y=\"{y}\">{value}</text>",
            middle - BAR / 2.0 + 4.0,
            LABEL + length + 8.0,
        )
        .expect("memory");
        y += ROW;
    }
    y + 4.0
}
