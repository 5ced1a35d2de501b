//! `cargo xtask check`: everything that can be said about the sources without testing them. All steps run, whatever one of
//! them finds.

use std::env;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{host, imports, instructions, setup};

enum Outcome {
    Passed,
    /// What it looks at could not be had. Never silent, and never called a pass.
    NotChecked(String),
}

type Step = fn() -> Result<Outcome>;

const STEPS: [(&str, Step); 10] = [
    ("format", format),
    ("clippy", clippy),
    ("clippy, eBPF", clippy_ebpf),
    ("bans, licenses, sources", deny),
    ("advisories", advisories),
    ("import rule", import_rule),
    ("documentation", documentation),
    ("local paths", local_paths),
    ("shell", shell),
    ("instructions", || {
        instructions::check().map(|()| Outcome::Passed)
    }),
];

pub fn all() -> Result<()> {
    setup::for_check()?;
    let mut rows = Vec::new();
    for (name, step) in STEPS {
        host::say(&format!("checking {name}"));
        let start = Instant::now();
        let outcome = step();
        if let Err(error) = &outcome {
            eprintln!("{error:#}");
        }
        rows.push((name, outcome, start.elapsed()));
    }

    println!();
    for (name, outcome, time) in &rows {
        println!("{}", row(name, outcome, *time));
    }
    let failed = rows
        .iter()
        .filter(|(_, outcome, _)| outcome.is_err())
        .count();
    if failed > 0 {
        bail!("{failed} of {} checks failed", rows.len());
    }
    Ok(())
}

fn row(name: &str, outcome: &Result<Outcome>, time: Duration) -> String {
    let said = match outcome {
        Ok(Outcome::Passed) => "passed".to_owned(),
        Ok(Outcome::NotChecked(why)) => format!("NOT CHECKED: {why}"),
        Err(_) => "FAILED".to_owned(),
    };
    format!("{name:24} {:6.1} s  {said}", time.as_secs_f64())
}

fn passes(command: &mut Command) -> Result<Outcome> {
    let status = command
        .status()
        .with_context(|| host::cannot_start(command))?;
    if !status.success() {
        bail!("{} ended with {status}", host::shown(command));
    }
    Ok(Outcome::Passed)
}

fn format() -> Result<Outcome> {
    passes(host::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<Outcome> {
    passes(host::cargo().args([
        "clippy",
        "--locked",
        "--all-targets",
        "--all-features",
        "--",
        "--deny=warnings",
    ]))
}

/// The eBPF crate is not checked with the others: it needs its own target, and the flags that aya-build gives it.
fn clippy_ebpf() -> Result<Outcome> {
    passes(
        host::cargo()
            .args([
                "clippy",
                "--locked",
                "--package=tcpstate-ebpf",
                "--all-features",
                "--target=bpfel-unknown-none",
                "-Zbuild-std=core",
                "--",
                "--deny=warnings",
            ])
            .env("RUSTC_BOOTSTRAP", "1")
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
            ),
    )
}

fn cargo_deny() -> Command {
    let mut command = Command::new(host::tools().join("bin/cargo-deny"));
    command
        .current_dir(host::root())
        .args(["--locked", "--all-features"]);
    command
}

fn deny() -> Result<Outcome> {
    passes(cargo_deny().args([
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]))
}

/// The advisory database is a git repository on a host of its own, which not every build machine can reach.
fn advisories() -> Result<Outcome> {
    if !cargo_deny().args(["fetch", "db"]).status()?.success() {
        return Ok(Outcome::NotChecked(
            "the RustSec advisory database can't be fetched from here".to_owned(),
        ));
    }
    passes(cargo_deny().args(["check", "advisories"]))
}

fn import_rule() -> Result<Outcome> {
    let broken = imports::broken_in(&host::root().join("tcpstate-user/src"))?;
    for rule in &broken {
        eprintln!("tcpstate-user/src/{rule}");
    }
    if !broken.is_empty() {
        bail!(
            "{} imports break the rule in docs/architecture.md",
            broken.len()
        );
    }
    Ok(Outcome::Passed)
}

fn documentation() -> Result<Outcome> {
    passes(
        host::cargo()
            .args(["doc", "--locked", "--no-deps", "--document-private-items"])
            .env("RUSTDOCFLAGS", "--deny=warnings"),
    )
}

/// No tracked file may name a home folder: it is a path of the machine it was written on.
fn local_paths() -> Result<Outcome> {
    let mut command = Command::new("git");
    command.current_dir(host::root()).args([
        "grep",
        "--line-number",
        "-I",
        "--extended-regexp",
        "(^|[^[:alnum:]_.-])/(root|home/[[:alnum:]_-]+)/",
    ]);
    let status = command
        .status()
        .with_context(|| host::cannot_start(&command))?;
    match status.code() {
        Some(1) => Ok(Outcome::Passed),
        Some(0) => bail!("these files name a home folder"),
        _ => bail!("{} ended with {status}", host::shown(&command)),
    }
}

fn shell() -> Result<Outcome> {
    passes(
        Command::new("bash")
            .args(["-n", ".ci/run"])
            .current_dir(host::root()),
    )
}
