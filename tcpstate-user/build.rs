//! Builds the eBPF object that the library embeds, and notes the git revision for `--version`.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya_build::{Package, Toolchain, build_ebpf};

fn main() -> Result<()> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = manifest
        .parent()
        .context("tcpstate-user lies outside its workspace")?;

    println!(
        "cargo:rustc-env=TCPSTATE_REVISION={}",
        revision(root).as_deref().unwrap_or("unknown")
    );
    ebpf(root)
}

/// Builds `tcpstate-ebpf` into `$OUT_DIR/tcpstate-ebpf`, optimised whatever the profile is: the verifier would not
/// take the other.
fn ebpf(root: &Path) -> Result<()> {
    for file in [
        "tcpstate-common",
        "Cargo.lock",
        "Cargo.toml",
        "rust-toolchain.toml",
    ] {
        println!("cargo:rerun-if-changed={}", root.join(file).display());
    }
    println!("cargo:rerun-if-env-changed=PATH");

    let path = tools_first(root)?;
    if !env::split_paths(&path).any(|dir| dir.join("bpf-linker").is_file()) {
        bail!("bpf-linker is missing, which links the eBPF programs: run `cargo xtask setup`");
    }
    // SAFETY: a build script has one thread here, and nothing holds a pointer into the environment.
    unsafe {
        env::set_var("PATH", path);
        // The target is without a compiled core: building it asks for `-Z build-std`.
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // What the inner cargo says comes out as warnings of the outer one.
        env::set_var("CARGO_TERM_QUIET", "true");
    }

    let crate_dir = root.join("tcpstate-ebpf");
    let crate_dir = crate_dir
        .to_str()
        .with_context(|| format!("{} is not UTF-8", root.display()))?;
    let features: &[&str] = if env::var_os("CARGO_FEATURE_EBPF_LOG").is_some() {
        &["log"]
    } else {
        &[]
    };
    build_ebpf(
        [Package {
            name: "tcpstate-ebpf",
            root_dir: crate_dir,
            features,
            ..Package::default()
        }],
        Toolchain::Custom(&pinned_toolchain(root)?),
    )
}

/// `$PATH` with the project's own tools in front.
fn tools_first(root: &Path) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let tools = root.join("target/tools/bin");
    Ok(env::join_paths(
        std::iter::once(tools).chain(env::split_paths(&path)),
    )?)
}

/// The toolchain whose LLVM is the linker's, even where another one builds the user side.
fn pinned_toolchain(root: &Path) -> Result<String> {
    let file = root.join("rust-toolchain.toml");
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("channel = \"")?.strip_suffix('"'))
        .map(str::to_owned)
        .ok_or_else(|| anyhow!("{} names no channel", file.display()))
}

/// The commit that is built, where the sources are a git work tree of their own.
fn revision(root: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git")
            .arg("-C")
            .arg(root)
            .args(args)
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let top = git(&["rev-parse", "--show-toplevel"])?;
    if fs::canonicalize(top).ok()? != fs::canonicalize(root).ok()? {
        return None;
    }
    // The first changes with a checkout, the second with a commit.
    for name in ["HEAD", "logs/HEAD"] {
        let file = root.join(git(&["rev-parse", "--git-path", name])?);
        if file.exists() {
            println!("cargo:rerun-if-changed={}", file.display());
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}
