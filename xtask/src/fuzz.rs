//! `cargo xtask fuzz`: has libFuzzer make inputs for the readers of bytes that are not ours. What must hold of them stands
//! in `tcpstate-user/src/fuzz`; the tests see to it for the inputs that are kept in `fuzz/corpus`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{host, setup};

/// For each target, where nothing else is said.
const SECONDS: u64 = 60;

/// When to go on to the next target.
pub struct Limits {
    pub inputs: Option<u64>,
    pub seconds: Option<u64>,
}

/// One target, or one after the other, on one processor. Goes on where one fails.
pub fn campaign(only: Option<&str>, limits: &Limits) -> Result<()> {
    setup::for_fuzz()?;
    let known = targets()?;
    let targets: Vec<&String> = known
        .iter()
        .filter(|name| only.is_none_or(|only| only == *name))
        .collect();
    if targets.is_empty() {
        let asked = only.unwrap_or_default();
        bail!("no target {asked:?}; known: {}", known.join(", "));
    }
    let mut rows = Vec::new();
    for target in targets {
        // Apart from running it, whose time is told.
        let built = host::run(
            &format!("building target {target}"),
            cargo_fuzz("build").arg(target),
        );
        let tried = built.and_then(|()| {
            host::say(&format!("trying {target}"));
            run(target, limits)
        });
        rows.push((target, tried));
    }

    println!();
    let mut failed = 0;
    for (target, result) in &rows {
        match result {
            Ok((inputs, time)) => {
                println!("{target:12} {inputs:>12} inputs {:8} s", time.as_secs())
            }
            Err(error) => {
                failed += 1;
                println!("{target:12} FAILED: {error:#}");
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {} targets failed", rows.len());
    }
    Ok(())
}

fn targets() -> Result<Vec<String>> {
    let folder = host::root().join("fuzz/fuzz_targets");
    let entries =
        fs::read_dir(&folder).with_context(|| format!("can't list {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let file = PathBuf::from(entry?.file_name());
        names.push(file.with_extension("").display().to_string());
    }
    names.sort();
    Ok(names)
}

/// Without a sanitizer: the readers have no unsafe code of their own, and without one they take more inputs. In many units,
/// since what the default of one gains is less than it takes to build.
fn cargo_fuzz(command: &str) -> Command {
    let mut cargo_fuzz = Command::new(host::tools().join("bin/cargo-fuzz"));
    cargo_fuzz
        .current_dir(host::root())
        .args(["fuzz", command, "--sanitizer=none", "--codegen-units=16"])
        .arg("--target-dir")
        .arg(host::target().join("fuzz"));
    cargo_fuzz
}

/// Gives how many inputs there were, and how long it took.
fn run(target: &str, limits: &Limits) -> Result<(u64, Duration)> {
    // What is found goes here, and does not come among the inputs that are kept.
    let found = host::target().join("fuzz/corpus").join(target);
    fs::create_dir_all(&found).with_context(|| format!("can't make {}", found.display()))?;
    let mut command = cargo_fuzz("run");
    command.arg(target).arg(&found);
    command.arg(format!("fuzz/corpus/{target}"));
    command.args(["--", "-print_final_stats=1", "-verbosity=0"]);
    if let Some(inputs) = limits.inputs {
        command.arg(format!("-runs={inputs}"));
    }
    let seconds = limits
        .seconds
        .or(limits.inputs.is_none().then_some(SECONDS));
    if let Some(seconds) = seconds {
        command.arg(format!("-max_total_time={seconds}"));
    }

    let start = Instant::now();
    let mut child = command
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| host::cannot_start(&command))?;
    let mut inputs = None;
    for line in BufReader::new(child.stderr.take().expect("stderr is piped")).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        eprintln!("{line}");
        if let Some(count) = line.strip_prefix("stat::number_of_executed_units:") {
            inputs = Some(count.trim().parse()?);
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{target} ended with {status}; the input is in fuzz/artifacts/{target}");
    }
    let inputs = inputs.with_context(|| format!("{target} did not say how many inputs it had"))?;
    Ok((inputs, start.elapsed()))
}
