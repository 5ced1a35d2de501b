//! `cargo xtask bench`: what the product and its peers cost on this machine (`tcpstate-bench`), or with `--snapshots` what
//! snapshots and sweeps of 100,000 sockets do, which are tests that nothing else runs (`tcpstate-user/tests/live/bench.rs`).
//!
//! Built as the user, measured as root. The page is written by the user too, who owns docs/.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{build, host, setup, test};

/// The page, its figures and its chart.
const FILES: [&str; 3] = ["performance.md", "performance.json", "performance.svg"];
const LONG: u32 = 60;
/// Of which a published figure is the median.
const ENOUGH_ROUNDS: u32 = 9;

pub struct Wanted {
    pub peers: bool,
    pub write: bool,
    pub long: bool,
    pub rounds: Option<u32>,
}

pub fn all(wanted: &Wanted) -> Result<()> {
    if let Some(rounds) = wanted
        .rounds
        .filter(|&it| wanted.write && it < ENOUGH_ROUNDS)
    {
        bail!("{rounds} rounds are too few for docs/performance.md: --write needs {ENOUGH_ROUNDS}");
    }
    if wanted.peers {
        setup::for_peers();
    }
    let product = build::release()?;
    let bench = build::bench()?;
    let replay = build::replay()?;
    let output = host::target().join("bench");
    // By the user, who else could not take it away again.
    fs::create_dir_all(&output).with_context(|| format!("can't make {}", output.display()))?;
    let mut command = host::as_root("measuring loads eBPF");
    command
        .arg(host::assignment("PATH", &host::path_with_tools()?))
        .arg(&bench)
        .arg("run")
        .arg("--product")
        .arg(&product)
        .arg("--output")
        .arg(&output)
        .arg("--replay")
        .arg(&replay);
    if let Some(rounds) = wanted.rounds {
        command.args(["--rounds", &rounds.to_string()]);
    }
    if wanted.long {
        command.args(["--stream", &LONG.to_string()]);
    }
    host::run("measuring: some ten minutes", &mut command)?;
    if wanted.write {
        let docs = host::root().join("docs");
        for file in FILES {
            copy(&output.join(file), &docs.join(file))?;
        }
        host::say("docs/performance.md is written: look at it, and commit it");
    }
    Ok(())
}

/// Page and chart anew, from the figures that are there.
pub fn page() -> Result<()> {
    let bench = build::bench()?;
    let docs = host::root().join("docs");
    host::run(
        "writing docs/performance.md anew",
        Command::new(bench).arg("page").arg(docs),
    )
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    // Not fs::copy: what root wrote stays root's.
    let bytes = fs::read(from).with_context(|| format!("can't read {}", from.display()))?;
    fs::write(to, bytes).with_context(|| format!("can't write {}", to.display()))
}

pub fn snapshots() -> Result<()> {
    setup::for_build()?;
    let product = build::release()?;
    let release = [
        "--release",
        "--package",
        "tcpstate-user",
        "--test",
        test::LIVE,
    ];
    let binaries = build::tests("building the measurements", &release)?;
    let live = binaries.first().context("cargo built no live tests")?;
    let mut command = test::program(live, &product, &[])?;
    command
        .args(["--ignored", "--nocapture", "bench::"])
        .current_dir(&live.package);
    host::run("measuring", &mut command)
}
