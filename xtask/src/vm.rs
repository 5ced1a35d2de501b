//! `cargo xtask vm`: the live tests on other kernels, which is where half of the traps show. This file chooses the kernels,
//! keeps the machine busy, and says what came out; `kernel` gets one, `guest` boots it.

use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::libtest::{Count, Report, Verdict};
use crate::test::LIVE;
use crate::{build, host, setup};

mod guest;
mod kernel;

/// From boot to the harness' result line. Booting takes seconds even without KVM.
const TIME_LIMIT: Duration = Duration::from_secs(480);

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

    fn name(self) -> String {
        let value = self.to_possible_value().expect("no series is skipped");
        value.get_name().to_owned()
    }
}

/// What the guest carries beside the kernel: two static programs of ours, and which tests to run.
struct Payload<'a> {
    product: PathBuf,
    live: PathBuf,
    filter: &'a str,
}

/// One kernel's run.
struct Run {
    /// `uname -r` as the guest said it, or the series if it never got that far.
    kernel: String,
    report: Report,
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

pub fn lab(wanted: &[Series], filter: &str, record: bool) -> Result<()> {
    setup::for_vm()?;
    let series: Vec<Series> = Series::value_variants()
        .iter()
        .copied()
        .filter(|series| wanted.is_empty() || wanted.contains(series))
        .collect();
    let payload = Payload {
        product: build::static_release()?,
        live: live_tests()?,
        filter,
    };
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
                    let run = one(series, &payload, accelerator);
                    done.lock().expect("no worker panics").push((place, run));
                }
            });
        }
    });
    let mut runs = done.into_inner().expect("no worker panics");
    runs.sort_by_key(|(place, _)| *place);
    if record {
        for (place, run) in &runs {
            keep_events(series[*place], run)?;
        }
    }
    let runs: Vec<Run> = runs.into_iter().map(|(_, run)| run).collect();
    conclude(&runs)
}

/// Keeps what `vm::every_event_arrives` recorded.
fn keep_events(series: Series, run: &Run) -> Result<()> {
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
        series.name()
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

fn one(series: Series, payload: &Payload<'_>, accelerator: &str) -> Run {
    let start = Instant::now();
    let run = kernel::of_release(series.release())
        .and_then(|kernel| guest::run(&kernel, payload, accelerator, TIME_LIMIT))
        .unwrap_or_else(|error| Run {
            kernel: series.name(),
            report: Report::default(),
            trouble: Some(format!("{error:#}")),
            console: String::new(),
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
    println!("\n{}", table(runs));
    let mut total = Count::default();
    for run in runs {
        total += run.count();
        for (name, verdict) in &run.report.tests {
            if let Verdict::Ignored(reason) = verdict {
                println!("ignored on {}: {name} {reason}", run.kernel);
            }
        }
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

/// Kernels across, tests down.
fn table(runs: &[Run]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in runs.iter().flat_map(|run| &run.report.tests) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let first = names
        .iter()
        .map(|name| name.len())
        .max()
        .unwrap_or(0)
        .max("result".len());
    let mut table = String::new();
    let mut line = |name: &str, cells: &mut dyn Iterator<Item = String>| {
        table += &format!("{name:first$}");
        for (run, cell) in runs.iter().zip(cells) {
            table += &format!(
                "  {cell:width$}",
                width = run.kernel.len().max("ignored".len())
            );
        }
        table.truncate(table.trim_end().len());
        table.push('\n');
    };
    line("", &mut runs.iter().map(|run| run.kernel.clone()));
    for name in names {
        line(
            name,
            &mut runs.iter().map(|run| cell(&run.report, name).to_owned()),
        );
    }
    line(
        "result",
        &mut runs.iter().map(|run| {
            let sound = run.trouble.is_none() && run.count().failed == 0;
            (if sound { "pass" } else { "FAIL" }).to_owned()
        }),
    );
    table
}

fn cell(report: &Report, name: &str) -> &'static str {
    match report.tests.iter().find(|(test, _)| test == name) {
        Some((_, Verdict::Passed)) => "pass",
        Some((_, Verdict::Failed)) => "FAIL",
        Some((_, Verdict::Ignored(_))) => "ignored",
        None => "no run",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_what_did_not_run() {
        let runs = [
            Run {
                kernel: "5.10.0-36-amd64".to_owned(),
                report: Report::read(
                    "test vm::loads ... ok\ntest vm::closes ... FAILED\n\
                     test result: FAILED. 1 passed; 1 failed; 0 ignored\n",
                ),
                trouble: None,
                console: String::new(),
            },
            Run {
                kernel: "7.2".to_owned(),
                report: Report::read("test vm::loads ... ok\n"),
                trouble: Some("it did not end within 300 s".to_owned()),
                console: String::new(),
            },
        ];
        let expected = [
            "            5.10.0-36-amd64  7.2",
            "vm::loads   pass             pass",
            "vm::closes  FAIL             no run",
            "result      FAIL             FAIL",
        ];
        assert_eq!(table(&runs).lines().collect::<Vec<_>>(), expected);
        assert_eq!(
            runs[1].count(),
            Count {
                passed: 1,
                failed: 1
            }
        );
    }
}
