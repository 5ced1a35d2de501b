//! The `tcpstate` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    tcpstate_user::run::run()
}
