//! `cargo xtask`: sets up, builds, runs, checks and tests tcpstate. This file only dispatches; each command has its own file.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

mod bench;
mod build;
mod check;
mod debian;
mod fuzz;
mod host;
mod imports;
mod instructions;
mod libtest;
mod run;
mod setup;
mod soak;
mod test;
mod vm;

/// Builds, runs, checks and tests tcpstate.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Install what the other commands need (they also call it themselves)
    Setup,
    /// Build the release binary, target/release/tcpstate, with the eBPF object inside
    Build,
    /// Build, then run `tcpstate watch`, or tcpstate with the arguments given
    #[command(disable_help_flag = true)]
    Run {
        /// Arguments for tcpstate
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Build, then run all tests, the live ones too; ends with `N passed, N failed`
    Test {
        /// Run only the tests whose name contains this
        filter: Option<String>,
    },
    /// Measure what tcpstate and its peers cost on this machine; takes some ten minutes
    Bench {
        /// Install the peers that Debian has: libbpf-tools, bpftrace, node_exporter
        #[arg(long)]
        peers: bool,
        /// Write docs/performance.md, its figures and its chart; of a whole run only
        #[arg(long, requires = "peers", requires = "long")]
        write: bool,
        /// Have the stream into a pipe last for the minute that its bar is about
        #[arg(long)]
        long: bool,
        /// Rounds that count, after one that does not [default: 9]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        rounds: Option<u32>,
        /// Measure nothing: write page and chart anew from the figures in docs/
        #[arg(long, exclusive = true)]
        page: bool,
        /// Measure instead what snapshots and sweeps of 100,000 sockets cost
        #[arg(long, exclusive = true)]
        snapshots: bool,
    },
    /// Try the readers of bytes from outside with malformed ones, one target after the other
    Fuzz {
        /// Only this one of fuzz/fuzz_targets
        target: Option<String>,
        /// Go on to the next target after so many inputs
        #[arg(long, value_name = "N")]
        runs: Option<u64>,
        /// Go on to the next target after so long [default: 60, without --runs]
        #[arg(long, value_name = "S")]
        seconds: Option<u64>,
    },
    /// Hold the daemon under random load, and measure whether it grows
    Soak {
        /// For so long
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(3..))]
        minutes: u64,
    },
    /// Check format, lints, dependencies, imports, documentation, and the instructions that events take
    Check,
    /// Run the live tests on Debian's kernels in QEMU; ends with `N passed, N failed`
    Vm {
        /// Kernel series to boot
        #[arg(long, value_name = "SERIES", value_delimiter = ',')]
        kernel: Vec<vm::Series>,
        /// Run only the live tests whose name contains this
        #[arg(long, value_name = "NAME", default_value = "")]
        test: String,
        /// Run random campaigns at their full length, and every fallback on each kernel: takes hours
        #[arg(long)]
        whole: bool,
        /// Keep the events of each kernel as the fixtures of the table's tests
        #[arg(long)]
        record: bool,
    },
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Setup => setup::everything(),
        Command::Build => build::release().map(drop),
        Command::Run { args } => run::product(&args),
        Command::Test { filter } => test::all(filter.as_deref()),
        Command::Bench { page: true, .. } => bench::page(),
        Command::Bench {
            snapshots: true, ..
        } => bench::snapshots(),
        Command::Bench {
            peers,
            write,
            long,
            rounds,
            ..
        } => bench::all(&bench::Wanted {
            peers,
            write,
            long,
            rounds,
        }),
        Command::Fuzz {
            target,
            runs,
            seconds,
        } => {
            let limits = fuzz::Limits {
                inputs: runs,
                seconds,
            };
            fuzz::campaign(target.as_deref(), &limits)
        }
        Command::Soak { minutes } => soak::run(minutes),
        Command::Check => check::all(),
        Command::Vm {
            kernel,
            test,
            whole,
            record,
        } => vm::lab(&vm::Wanted {
            series: kernel,
            filter: test,
            whole,
            record,
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
