//! `cargo xtask run`: builds as the user, then becomes tcpstate as root.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{build, host};

pub fn product(args: &[OsString]) -> Result<()> {
    let mut product = Command::new(build::release()?);
    if args.is_empty() {
        product.arg("watch");
    } else {
        product.args(args);
    }
    let mut command = if host::is_root() {
        product
    } else if host::has("sudo") {
        host::say("loading eBPF needs root: sudo runs the last step");
        let mut sudo = Command::new("sudo");
        sudo.arg("--")
            .arg(product.get_program())
            .args(product.get_args());
        sudo
    } else {
        bail!(
            "loading eBPF needs root, and there is no sudo; as root, run: {}",
            host::shown(&product)
        );
    };
    // Only comes back when it fails.
    Err(command.exec()).with_context(|| host::cannot_start(&command))
}
