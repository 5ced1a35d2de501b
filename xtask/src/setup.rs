//! Installs what the other commands need, from rustup, crates.io and Debian; quick when everything is there. Cargo tools,
//! Prometheus and its node exporter go to target/tools; only what can't be had that way is installed by apt.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::debian::Index;
use crate::host;

/// Uses rustc's own LLVM; later versions want a system LLVM.
const BPF_LINKER: (&str, &str) = ("bpf-linker", "0.10.3");
const CARGO_DENY: (&str, &str) = ("cargo-deny", "0.20.2");
const CARGO_FUZZ: (&str, &str) = ("cargo-fuzz", "0.13.2");

pub const MUSL: &str = "x86_64-unknown-linux-musl";

pub fn everything() -> Result<()> {
    for_build()?;
    for_check()?;
    for_test()?;
    for_vm()?;
    for_fuzz()?;
    host::say("everything is set up");
    Ok(())
}

pub fn for_build() -> Result<()> {
    // The eBPF crate builds libcore for its own target.
    component("rust-src", "src/rust/library/Cargo.lock")?;
    cargo_tool(BPF_LINKER)
}

pub fn for_check() -> Result<()> {
    for_build()?;
    component("rustfmt", "../../bin/cargo-fmt")?;
    component("clippy", "../../bin/cargo-clippy")?;
    cargo_tool(CARGO_DENY)?;
    // For what is counted of the replay.
    rustup(&["target", "add"], MUSL, MUSL)?;
    programs(&[("valgrind", "valgrind")])
}

pub fn for_test() -> Result<()> {
    for_build()?;
    unpacked("prometheus", &["prometheus", "promtool"])
}

/// Whom the product is measured beside; without those that can't be had here.
pub fn for_peers() {
    for peer in [
        ("tcpstates", "libbpf-tools"),
        ("bpftrace", "bpftrace"),
        ("ss", "iproute2"),
    ] {
        or_without(peer.0, programs(&[peer]));
    }
    let exporter = "prometheus-node-exporter";
    // Other distributions call it so.
    if !installed(exporter) && !installed("node_exporter") {
        or_without(exporter, unpacked(exporter, &[exporter]));
    }
}

fn or_without(peer: &str, had: Result<()>) {
    if let Err(error) = had {
        host::say(&format!("without {peer}: {error:#}"));
    }
}

/// Also where a user's PATH lacks the folders of root's.
fn installed(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    which::which_in(program, Some(path), "/").is_ok()
}

pub fn for_vm() -> Result<()> {
    for_build()?;
    rustup(&["target", "add"], MUSL, MUSL)?;
    programs(&[
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("xz", "xz-utils"),
    ])
}

pub fn for_fuzz() -> Result<()> {
    for_build()?;
    // For libFuzzer itself.
    programs(&[("c++", "g++")])?;
    cargo_tool(CARGO_FUZZ)
}

fn component(name: &str, witness: &str) -> Result<()> {
    rustup(&["component", "add"], name, witness)
}

/// Has rustup add something to the tool chain in use, unless `witness`, a path below lib/rustlib, is there.
fn rustup(command: &[&str], name: &str, witness: &str) -> Result<()> {
    let sysroot = host::output(
        Command::new("rustc")
            .args(["--print", "sysroot"])
            .current_dir(host::root()),
    )?;
    let sysroot = Path::new(sysroot.trim_end());
    if sysroot.join("lib/rustlib").join(witness).exists() {
        return Ok(());
    }
    if !host::has("rustup") {
        bail!(
            "the Rust tool chain has no {name}, and there is no rustup to add it; install rustup, or {name} with this tool chain's own packages"
        );
    }
    host::run(
        &format!("adding {name} to the Rust tool chain"),
        Command::new("rustup")
            .args(command)
            .args([name, "--toolchain", channel()?])
            .current_dir(host::root()),
    )
}

/// The tool chain's name as rust-toolchain.toml pins it.
fn channel() -> Result<&'static str> {
    include_str!("../../rust-toolchain.toml")
        .lines()
        .find_map(|line| line.strip_prefix("channel = \"")?.strip_suffix('"'))
        .context("rust-toolchain.toml names no channel")
}

fn cargo_tool((name, version): (&str, &str)) -> Result<()> {
    let installed = Command::new(host::tools().join("bin").join(name))
        .arg("--version")
        .output()
        .is_ok_and(|output| {
            String::from_utf8_lossy(&output.stdout)
                .split_whitespace()
                .any(|word| word == version)
        });
    if installed {
        return Ok(());
    }
    host::run(
        &format!("installing {name} {version} into target/tools"),
        host::cargo()
            // A folder of its own, so that what it compiles is not mixed with ours, and is gone afterwards.
            .env_remove("CARGO_TARGET_DIR")
            .args(["install", "--quiet", "--locked", "--force", "--root"])
            .arg(host::tools())
            .args(["--version", version, name]),
    )
}

/// Programs of Debian's that are there as services, unpacked into target/tools rather than installed: that needs no root
/// and starts none.
fn unpacked(package: &str, programs: &[&str]) -> Result<()> {
    let bin = host::tools().join("bin");
    let there = |program: &&str| {
        Command::new(bin.join(program))
            .arg("--version")
            .output()
            .is_ok()
    };
    if programs.iter().all(there) {
        return Ok(());
    }
    host::say(&format!("unpacking Debian's {package} into target/tools"));
    let unpacked = host::tools().join(package);
    let index = Index::of_this_release()?;
    let file = index.download(package, &host::tools())?;
    host::output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&unpacked))?;
    fs::remove_file(&file)?;
    fs::create_dir_all(&bin).with_context(|| format!("can't make {}", bin.display()))?;
    for program in programs {
        let link = bin.join(program);
        // Left over from a run that was cut short.
        let _ = fs::remove_file(&link);
        let target = Path::new("..").join(package).join("usr/bin").join(program);
        symlink(target, &link).with_context(|| format!("can't link {}", link.display()))?;
    }
    Ok(())
}

/// Installs the packages of those programs that are not there.
fn programs(wanted: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = wanted
        .iter()
        .filter(|(program, _)| !installed(program))
        .map(|&(_, package)| package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !host::has("apt-get") || !(host::is_root() || host::has("sudo")) {
        bail!("this needs the packages {names}; install them as root: apt-get install {names}");
    }
    let install = || {
        host::run(
            &format!("installing {names}"),
            apt_get()
                .args(["install", "--yes", "--no-install-recommends"])
                .args(&missing),
        )
    };
    install().or_else(|_| {
        // A package list that is missing or old. One unreachable third-party source must not stop us: install decides.
        let _ = host::run("updating apt's package lists", apt_get().arg("update"));
        install()
    })
}

fn apt_get() -> Command {
    let mut command = if host::is_root() {
        Command::new("env")
    } else {
        let mut command = Command::new("sudo");
        command.arg("env");
        command
    };
    command.args([
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "--quiet=2",
        "--option=DPkg::Lock::Timeout=120",
    ]);
    command
}
