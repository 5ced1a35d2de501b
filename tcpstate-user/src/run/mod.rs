//! Runs the commands: ties the kernel, the table and the exports together.
//!
//! Decides what is started, in which order, and with which status it ends; what each part does is its own.

mod check;
mod clock;
mod daemon;
mod list;
mod memory;
mod pages;
mod proof;
mod streams;
mod tracer;
mod watch;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::{fmt, fs};

use anyhow::Context as _;
use clap::Parser as _;
use rustc_hash::FxHashSet;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use tokio::runtime::Runtime;

use crate::cli::{Cli, Command};
use crate::export::log::PROGRAM;
use crate::filter::Netns;
use crate::kernel::{self, RingSize, Session, netns};
use crate::model::view::Feature;
use crate::model::{NetnsSelection, Source, Start};
use crate::owner;

/// Runs the command that the arguments ask for. An error is one line on stderr, with its causes; status 2 is bad usage,
/// 1 all else.
#[must_use]
pub fn run() -> ExitCode {
    memory::share_one_heap();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            let text = error.render();
            let _ = write!(anstream::stderr(), "{PROGRAM}: {}", text.ansi());
            return BAD_USAGE.into();
        }
        Err(help) => help.exit(),
    };
    let result = match cli.command {
        Command::Watch(watch) => watch::run(&watch),
        Command::List(list) => list::run(&list),
        Command::Check(check) => {
            return check::run(&check).unwrap_or_else(|error| fail(&error, ExitCode::FAILURE));
        }
        Command::Daemon(daemon) => match daemon.config() {
            Ok(config) => daemon::run(&config, &daemon.without.features),
            // As wrong as a wrong flag.
            Err(error) => return fail(&error, BAD_USAGE.into()),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, ExitCode::FAILURE),
    }
}

const BAD_USAGE: u8 = 2;

fn fail(error: &anyhow::Error, status: ExitCode) -> ExitCode {
    let mut line = format!("{error:#}");
    // Wherever it happens, the same helps.
    let too_many = io::Error::from(Errno::MFILE).to_string();
    if let (true, Some(limit)) = (
        line.contains(&too_many),
        getrlimit(Resource::Nofile).current,
    ) {
        let help = format!(
            "the limit of {limit} open files is used up; raise it with `ulimit -n`, or LimitNOFILE= of a systemd unit"
        );
        line = line.replace(&too_many, &help);
    }
    say(format_args!("{PROGRAM}: error: {line}"));
    status
}

fn warn(line: impl fmt::Display) {
    say(format_args!("{PROGRAM}: warning: {line}"));
}

/// A line on stderr. Where that is full or closed there is nobody to be told, and what we do goes on.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Runs tasks on so many threads.
fn runtime(threads: usize) -> anyhow::Result<Runtime> {
    /// More than two workers take.
    const DESCRIPTORS: usize = 16;
    let begun = || {
        // Where the runtime finds none left for signals, it panics.
        let open = |_| eventfd(0, EventfdFlags::CLOEXEC);
        drop((0..DESCRIPTORS).map(open).collect::<Result<Vec<_>, _>>()?);
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .build()
    };
    begun().context("can't start the runtime")
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
        Netns::All => {
            netns::all(&FxHashSet::default())?;
            if !owner::in_initial_pid_namespace() {
                tracing::warn!(
                    "not in the initial pid namespace: network namespaces of processes outside can't be found, and \
                     what is in them is known from events only; `--pid=host`, or its like, lets them be found"
                );
            }
        }
        Netns::Inode(inode) => netns::check(inode)?,
        Netns::Own => {}
    }
    Ok(selection)
}

/// Loads and attaches.
fn attach(
    netns: NetnsSelection,
    ring_size: RingSize,
    without: &[Feature],
) -> anyhow::Result<Session> {
    let netns = match netns {
        NetnsSelection::All => kernel::Netns::All,
        NetnsSelection::One(inode) => kernel::Netns::Inode(inode),
    };
    let session = Session::start(&kernel::Options {
        netns,
        ring_size,
        without: without.to_vec(),
    })?;
    // What parsing BTF took.
    memory::give_back();
    Ok(session)
}

/// The first line of a stream that this process makes.
fn start(source: Source, netns: NetnsSelection) -> anyhow::Result<Start> {
    let boot_id = "/proc/sys/kernel/random/boot_id";
    Ok(Start {
        time_ns: clock::unix_now_ns(),
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
