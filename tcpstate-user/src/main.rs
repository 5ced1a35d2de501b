//! Parses, runs, prints the error chain, ends with the status.

use std::process::ExitCode;

use clap::Parser as _;
use tcpstate_user::cli::{Cli, Command};

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Watch(_) => ExitCode::SUCCESS,
        Command::Daemon(daemon) => match daemon.config() {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::from(2)
            }
        },
    }
}
