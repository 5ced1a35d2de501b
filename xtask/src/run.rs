//! `cargo xtask run`: builds as the user, then becomes tcpstate as root.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{build, host};

pub fn product(args: &[OsString]) -> Result<()> {
    let product = build::release()?;
    let mut command = if host::is_root() {
        Command::new(&product)
    } else if host::has("sudo") {
        host::say("loading eBPF needs root: sudo runs the last step");
        let mut command = Command::new("sudo");
        command.arg("--").arg(&product);
        command
    } else {
        bail!(
            "loading eBPF needs root, and there is no sudo; as root, run {}",
            product.display()
        );
    };
    if args.is_empty() {
        command.arg("watch");
    } else {
        command.args(args);
    }
    // Only comes back when it fails.
    Err(command.exec()).with_context(|| host::cannot_start(&command))
}
