//! The `tcpstate` command: parses, runs, and ends with the status.

use std::process::ExitCode;

use clap::Parser as _;
use tcpstate_user::cli::Cli;

fn main() -> ExitCode {
    tcpstate_user::run::run(Cli::parse())
}
