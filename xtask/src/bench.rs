//! `cargo xtask bench`: what the product costs with 100,000 sockets, as its release build measures it on this machine.
//! The measurements are tests that nothing else runs (`tcpstate-user/tests/live/bench.rs`).

use anyhow::{Context, Result};

use crate::{build, host, setup, test};

pub fn all() -> Result<()> {
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
