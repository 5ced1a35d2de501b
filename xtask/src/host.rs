//! The machine around us: the tree's folders, programs in PATH, how a command is announced and run, and root.
//! What has to be installed is setup's business.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The workspace's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
}

pub fn target() -> PathBuf {
    root().join("target")
}

/// Where `setup` puts programs of its own: nothing lands in the user's home.
pub fn tools() -> PathBuf {
    target().join("tools")
}

/// PATH with our own tools before the machine's.
pub fn path_with_tools() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = [tools().join("bin")];
    env::join_paths(folders.into_iter().chain(env::split_paths(&path)))
        .context("the workspace's path can't stand in PATH")
}

/// Cargo of the pinned tool chain, in the workspace, with its results where the documentation says they are.
pub fn cargo() -> Command {
    let mut command = Command::new("cargo");
    command
        .current_dir(root())
        .env("CARGO_TARGET_DIR", target());
    command
}

pub fn say(what: &str) {
    eprintln!("xtask: {what}");
}

/// Says what comes, runs the command on this terminal, and fails if it does.
pub fn run(what: &str, command: &mut Command) -> Result<()> {
    say(what);
    let status = command.status().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("{what}: {} ended with {status}", shown(command));
    }
    Ok(())
}

/// What the command writes to its standard output; its errors go to this terminal.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| cannot_start(command))?;
    if !output.status.success() {
        bail!("{} ended with {}", shown(command), output.status);
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} wrote something else than text", shown(command)))
}

pub fn cannot_start(command: &Command) -> String {
    format!("can't start {}", command.get_program().display())
}

/// The command as one would type it, near enough to try it again by hand.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

pub fn has(program: &str) -> bool {
    which::which(program).is_ok()
}

/// The beginning of a command that is to run as root, through sudo where it must: assignments follow, then the program.
/// Without root and sudo the program fails, and says what it needs.
pub fn as_root(why: &str) -> Command {
    if is_root() || !has("sudo") {
        return Command::new("env");
    }
    say(&format!("{why}: sudo runs it"));
    let mut command = Command::new("sudo");
    command.args(["--", "env"]);
    command
}

/// For env, because sudo sets an environment of its own.
pub fn assignment(name: &str, value: &OsStr) -> OsString {
    let mut assignment = OsString::from(name);
    assignment.push("=");
    assignment.push(value);
    assignment
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
