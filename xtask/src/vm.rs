//! `cargo xtask vm`: the live tests on other kernels, which is where half of the traps show. This file chooses the kernels,
//! keeps the machine busy, and says what came out; `kernel` gets one, `guest` boots it, `ways` and `table` read what it said,
//! `page` keeps that for users.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use self::table::Table;
use self::ways::Ways;
use crate::libtest::{Count, Report};
use crate::test::{LIVE, LIVE_ARGUMENTS};
use crate::{build, host, setup};

mod guest;
mod kernel;
mod page;
mod table;
mod ways;

/// From boot to the harness' result line, on an emulated machine that has half of two processors.
const TIME_LIMIT: Duration = Duration::from_secs(1800);
const TIME_LIMIT_WHOLE: Duration = Duration::from_secs(3 * 3600);
/// What an emulated machine takes too long for, in part; `--whole` has it done whole.
const PART: [&str; 3] = [
    "TCPSTATE_SEEDS=3",
    "TCPSTATE_CONNECTIONS=2000",
    "TCPSTATE_STORM_SECONDS=2",
];
/// Names of the tests that do without what the kernel has begin so.
const FALLBACKS: &str = "without::";

/// A Debian release stands for the kernel series it had when this was written: what is booted is the newest it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Series {
    #[value(name = "5.10")]
    V5_10,
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
    #[value(name = "7.2")]
    V7_2,
}

impl Series {
    fn release(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::V7_2 => "sid",
        }
    }

    /// The newest that most hosts come to run: it has all that the others lack.
    const fn tries_fallbacks(self) -> bool {
        matches!(self, Self::V6_12)
    }

    fn name(self) -> String {
        let value = self.to_possible_value().expect("no series is skipped");
        value.get_name().to_owned()
    }
}

/// What the guest carries beside the kernel: two static programs of ours, and what the second is to do, a variable or an
/// argument a line.
struct Payload<'a> {
    product: &'a Path,
    live: &'a Path,
    settings: String,
}

/// One kernel's run.
#[derive(Default)]
struct Run {
    series: String,
    /// `uname -r` as the guest said it, or the series if it never got that far.
    kernel: String,
    ways: Ways,
    report: Report,
    tries_fallbacks: bool,
    /// Why there is no result of the harness, or why it can't be trusted.
    trouble: Option<String>,
    /// What the guest printed. Empty if it never ran.
    console: String,
}

impl Run {
    fn count(&self) -> Count {
        self.report.count(self.trouble.is_none())
    }
}

/// What is asked for.
pub struct Wanted {
    /// Empty: all.
    pub series: Vec<Series>,
    /// In the tests' names. Empty: all.
    pub filter: String,
    pub whole: bool,
    pub record: bool,
}

impl Wanted {
    fn tries_fallbacks(&self, series: Series) -> bool {
        self.whole || series.tries_fallbacks() || self.filter.starts_with(FALLBACKS)
    }

    fn settings(&self, series: Series) -> String {
        let mut lines: Vec<&str> = LIVE_ARGUMENTS.to_vec();
        if !self.whole {
            lines.extend(PART);
        }
        if self.record {
            lines.push("TCPSTATE_RECORD=/tmp/events");
        }
        if !self.tries_fallbacks(series) {
            lines.extend(["--skip", FALLBACKS]);
        }
        if !self.filter.is_empty() {
            lines.push(&self.filter);
        }
        lines.join("\n") + "\n"
    }

    const fn limit(&self) -> Duration {
        if self.whole {
            TIME_LIMIT_WHOLE
        } else {
            TIME_LIMIT
        }
    }
}

pub fn lab(wanted: &Wanted) -> Result<()> {
    setup::for_vm()?;
    let series: Vec<Series> = Series::value_variants()
        .iter()
        .copied()
        .filter(|series| wanted.series.is_empty() || wanted.series.contains(series))
        .collect();
    let (product, live) = (build::static_release()?, live_tests()?);
    let accelerator = guest::accelerator()?;
    host::say(&format!(
        "booting {} kernels in QEMU with {accelerator}",
        series.len()
    ));

    let todo = Mutex::new(series.iter().copied().enumerate());
    let done = Mutex::new(Vec::new());
    let workers = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(series.len());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let Some((place, series)) = todo.lock().expect("no worker panics").next()
                    else {
                        return;
                    };
                    let payload = Payload {
                        product: &product,
                        live: &live,
                        settings: wanted.settings(series),
                    };
                    let mut run = one(series, &payload, accelerator, wanted.limit());
                    run.series = series.name();
                    run.tries_fallbacks = wanted.tries_fallbacks(series);
                    done.lock().expect("no worker panics").push((place, run));
                }
            });
        }
    });
    let mut runs = done.into_inner().expect("no worker panics");
    runs.sort_by_key(|(place, _)| *place);
    let runs: Vec<Run> = runs.into_iter().map(|(_, run)| run).collect();
    if wanted.record {
        for run in &runs {
            keep_events(run)?;
        }
    }
    conclude(&runs)?;
    if wanted.series.is_empty() && wanted.filter.is_empty() {
        page::keep(&runs)?;
    }
    Ok(())
}

/// Keeps what `record::every_event_arrives` recorded.
fn keep_events(run: &Run) -> Result<()> {
    let events: Vec<&str> = run
        .console
        .lines()
        .filter_map(|line| line.strip_prefix("vm: event "))
        .collect();
    if events.is_empty() {
        bail!("kernel {}: no events were recorded", run.kernel);
    }
    let file = host::root().join(format!(
        "tcpstate-user/tests/fixtures/{}.events",
        run.series
    ));
    host::say(&format!("writing {}", file.display()));
    std::fs::write(&file, events.join("\n") + "\n")
        .with_context(|| format!("can't write {}", file.display()))
}

/// The static build of the live tests: they run in a guest that has no libc.
fn live_tests() -> Result<PathBuf> {
    let binaries = build::tests(
        "building static live tests",
        &[
            "--release",
            "--package",
            "tcpstate-user",
            "--test",
            LIVE,
            "--target",
            setup::MUSL,
        ],
    )?;
    let live = binaries
        .into_iter()
        .next()
        .context("cargo built no live tests")?;
    Ok(live.path)
}

fn one(series: Series, payload: &Payload<'_>, accelerator: &str, limit: Duration) -> Run {
    let start = Instant::now();
    let run = kernel::of_release(series.release())
        .and_then(|kernel| guest::run(&kernel, payload, accelerator, limit))
        .unwrap_or_else(|error| Run {
            kernel: series.name(),
            trouble: Some(format!("{error:#}")),
            ..Run::default()
        });
    if run.trouble.is_none() && !run.kernel.starts_with(&format!("{}.", series.name())) {
        host::say(&format!(
            "Debian {} no longer has a kernel {}: what ran is its newest, {}",
            series.release(),
            series.name(),
            run.kernel
        ));
    }
    let seconds = start.elapsed().as_secs();
    host::say(&format!(
        "kernel {}: {} in {seconds} s",
        run.kernel,
        run.count()
    ));
    run
}

fn conclude(runs: &[Run]) -> Result<()> {
    for run in runs.iter().filter(|run| run.count().failed > 0) {
        println!("\nconsole of kernel {}:\n{}", run.kernel, run.console);
    }
    let kernels: Vec<String> = runs.iter().map(|run| run.kernel.clone()).collect();
    println!("\n{}", Table::of_ways(runs, kernels.clone()).text());
    for run in runs {
        for lack in run.ways.missing() {
            println!("{} lacks {}: {}", run.kernel, lack.feature, lack.reason);
        }
    }
    let mut tests = Table::of_tests(runs, kernels);
    tests.row(
        "result",
        runs.iter().map(|run| {
            let sound = run.trouble.is_none() && run.count().failed == 0;
            if sound { "pass" } else { "FAIL" }
        }),
    );
    println!("\n{}", tests.text());
    let mut total = Count::default();
    for run in runs {
        total += run.count();
        if let Some(trouble) = &run.trouble {
            println!("kernel {}: {trouble}", run.kernel);
        }
    }
    println!("{total}");
    if total.failed > 0 {
        bail!("{} failures in the kernel lab", total.failed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_done_unless_all_is_asked_for() {
        let mut wanted = Wanted {
            series: Vec::new(),
            filter: String::new(),
            whole: false,
            record: false,
        };
        let arguments = LIVE_ARGUMENTS.join("\n");
        let part = PART.join("\n");
        assert_eq!(
            wanted.settings(Series::V5_10),
            format!("{arguments}\n{part}\n--skip\n{FALLBACKS}\n")
        );
        assert_eq!(
            wanted.settings(Series::V6_12),
            format!("{arguments}\n{part}\n")
        );
        wanted.whole = true;
        wanted.filter = "daemon::".to_owned();
        assert_eq!(
            wanted.settings(Series::V5_10),
            format!("{arguments}\ndaemon::\n")
        );
    }
}
