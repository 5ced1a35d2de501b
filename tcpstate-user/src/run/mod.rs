//! Runs the commands: ties the kernel, the table and the exports together.
//!
//! Decides what is started, in which order, and with which status it ends; what each part does is its own.

mod check;
mod daemon;
mod proof;
mod streams;
mod tracer;
mod watch;

use std::io::Write as _;
use std::process::ExitCode;
use std::{fmt, fs};

use anyhow::Context as _;

use crate::cli::{Attach, Cli, Command};
use crate::filter::Netns;
use crate::kernel::{self, Session, netns};
use crate::model::{NetnsSelection, Source, Start};

/// Runs the command. An error is one line on stderr, with its causes, and status 1.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    let result = match cli.command {
        Command::Watch(watch) => watch::run(&watch),
        Command::Check(check) => {
            return check::run(&check).unwrap_or_else(|error| fail(&error, ExitCode::FAILURE));
        }
        Command::Daemon(daemon) => match daemon.config() {
            Ok(config) => daemon::run(&config, daemon.attach),
            // As wrong as a wrong flag.
            Err(error) => return fail(&error, ExitCode::from(2)),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, ExitCode::FAILURE),
    }
}

fn fail(error: &anyhow::Error, status: ExitCode) -> ExitCode {
    say(format_args!("error: {error:#}"));
    status
}

/// A line on stderr. Where that is full or closed there is nobody to be told, and what we do goes on.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// What the flag means here.
fn resolve(netns: Netns) -> anyhow::Result<NetnsSelection> {
    Ok(match netns {
        Netns::All => NetnsSelection::All,
        Netns::Own => {
            NetnsSelection::One(netns::own().context("can't tell the own network namespace")?)
        }
        Netns::Inode(inode) => NetnsSelection::One(inode),
    })
}

/// As [`resolve`], and it can be had: a namespace that is not there, or rights that are missing, are errors now rather
/// than gaps later.
fn select(netns: Netns) -> anyhow::Result<NetnsSelection> {
    let selection = resolve(netns)?;
    match netns {
        Netns::All => drop(netns::all()?),
        Netns::Inode(inode) => drop(netns::find(inode)?),
        Netns::Own => {}
    }
    Ok(selection)
}

/// Loads and attaches.
fn attach(netns: NetnsSelection, ring_size: u64, path: Option<Attach>) -> anyhow::Result<Session> {
    let ring_size = kernel::check_ring_size(ring_size)?;
    let netns = match netns {
        NetnsSelection::All => kernel::Netns::All,
        NetnsSelection::One(inode) => kernel::Netns::Inode(inode),
    };
    Ok(Session::start(&kernel::Options {
        netns,
        ring_size,
        path: path.map(|path| match path {
            Attach::TpBtf => kernel::Path::TpBtf,
            Attach::TpBtfNoCookie => kernel::Path::TpBtfNoCookie,
            Attach::Tracepoint => kernel::Path::Tracepoint,
        }),
    })?)
}

/// The first line of a stream that this process makes.
fn start(source: Source, netns: NetnsSelection) -> anyhow::Result<Start> {
    let boot_id = "/proc/sys/kernel/random/boot_id";
    Ok(Start {
        time_ns: tracer::unix_now_ns(),
        host: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        boot_id: fs::read_to_string(boot_id)
            .with_context(|| format!("can't read {boot_id}"))?
            .trim()
            .to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        source,
        netns,
    })
}
