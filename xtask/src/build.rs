//! `cargo xtask build`, and what cargo builds for the tests. The eBPF object is made by tcpstate-user's build script.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use cargo_metadata::{Artifact, Message, TargetKind};

use crate::{host, setup};

pub const PRODUCT: &str = "tcpstate";

/// Builds target/release/tcpstate and gives its path.
pub fn release() -> Result<PathBuf> {
    setup::for_build()?;
    host::run(
        "building target/release/tcpstate",
        host::cargo().args(["build", "--release", "--package", "tcpstate-user"]),
    )?;
    Ok(host::target().join("release").join(PRODUCT))
}

/// Builds what measures the product and its peers, and gives its path. By itself, so that the product is built with no
/// features but its own.
pub fn bench() -> Result<PathBuf> {
    let package = "tcpstate-bench";
    host::run(
        "building the measurements",
        host::cargo().args(["build", "--release", "--package", package]),
    )?;
    Ok(host::target().join("release").join(package))
}

/// Builds the product as one static file that also runs where there is no libc, and gives its path.
pub fn static_release() -> Result<PathBuf> {
    host::run(
        "building a static tcpstate",
        host::cargo().args([
            "build",
            "--release",
            "--package",
            "tcpstate-user",
            "--target",
            setup::MUSL,
        ]),
    )?;
    Ok(host::target()
        .join(setup::MUSL)
        .join("release")
        .join(PRODUCT))
}

/// A test program as cargo built it.
pub struct TestBinary {
    pub name: String,
    pub integration: bool,
    pub path: PathBuf,
    /// Cargo runs a package's tests in its folder.
    pub package: PathBuf,
}

/// Builds the tests that `cargo test` with these arguments would run.
pub fn tests(what: &str, arguments: &[&str]) -> Result<Vec<TestBinary>> {
    let command = [&["test", "--no-run"], arguments].concat();
    let mut binaries = Vec::new();
    for artifact in artifacts(what, &command)? {
        let Some(path) = artifact.executable.filter(|_| artifact.profile.test) else {
            continue;
        };
        let package = artifact
            .manifest_path
            .parent()
            .context("a manifest without a folder")?;
        binaries.push(TestBinary {
            name: artifact.target.name,
            integration: artifact.target.kind.contains(&TargetKind::Test),
            path: path.into_std_path_buf(),
            package: package.as_std_path().to_owned(),
        });
    }
    Ok(binaries)
}

/// Builds the replay of a fixed stream as one static file, and gives its path: this machine's libc is no part of it.
pub fn static_replay() -> Result<PathBuf> {
    replay_for(
        "building a static replay",
        &["--release", "--target", setup::MUSL],
    )
}

/// Builds the replay as the product that is measured is built.
pub fn replay() -> Result<PathBuf> {
    replay_for("building the replay", &["--release"])
}

fn replay_for(what: &str, how: &[&str]) -> Result<PathBuf> {
    let bench = ["build", "--package=tcpstate-user", "--bench=replay"];
    let built = artifacts(what, &[&bench, how].concat())?;
    let replay = built
        .into_iter()
        .find(|artifact| artifact.target.kind.contains(&TargetKind::Bench));
    let path = replay.and_then(|artifact| artifact.executable);
    Ok(path.context("cargo built no replay")?.into_std_path_buf())
}

/// What cargo made by this command.
fn artifacts(what: &str, arguments: &[&str]) -> Result<Vec<Artifact>> {
    host::say(what);
    let mut command = host::cargo();
    command
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped());
    let mut cargo = command
        .spawn()
        .with_context(|| host::cannot_start(&command))?;
    let messages = cargo.stdout.take().expect("stdout is piped");
    let mut artifacts = Vec::new();
    for message in Message::parse_stream(std::io::BufReader::new(messages)) {
        if let Message::CompilerArtifact(artifact) =
            message.context("can't read cargo's messages")?
        {
            artifacts.push(artifact);
        }
    }
    let status = cargo.wait()?;
    if !status.success() {
        bail!("{what}: {} ended with {status}", host::shown(&command));
    }
    Ok(artifacts)
}
