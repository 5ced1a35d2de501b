//! `cargo xtask soak`: the release build's daemon under random load, for as long as is asked; whether its memory or its
//! descriptors grow. The load is a test that nothing else runs (`tcpstate-user/tests/live/soak.rs`).

use std::ffi::OsString;

use anyhow::{Context, Result};

use crate::{build, setup, test};

/// The test.
const LOAD: &str = "soak::a_daemon_under_random_load_does_not_grow";

pub fn run(minutes: u64) -> Result<()> {
    setup::for_build()?;
    let product = build::release()?;
    let load = ["--package", "tcpstate-user", "--test", test::LIVE];
    let binaries = build::tests("building the load", &load)?;
    let live = binaries.first().context("cargo built no live tests")?;
    let time = OsString::from(minutes.to_string());
    let mut command = test::program(live, &product, &[("TCPSTATE_MINUTES", &time)])?;
    command
        .args(["--ignored", "--nocapture", "--exact", LOAD])
        .current_dir(&live.package);
    test::one(&format!("the load for {minutes} minutes"), &mut command)
}
