//! The command line: what can be asked for, and how it is explained. Filters and the daemon's settings are declared
//! where they belong, in `filter` and `config`.
//!
//! Whatever is wrong with the arguments ends here, with status 2.

use std::fs::{self, File};
use std::io::Read as _;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use clap::{Args, Parser, Subcommand};

use crate::config::{DaemonConfig, Interval, Settings};
use crate::export::Format;
use crate::export::check::ReportFormat;
use crate::filter::{Filter, ListFilter, Netns, ValueError};
use crate::kernel::RingSize;
use crate::model::view::Feature;

/// Far more than all settings take, in bytes.
const LONGEST_CONFIG: u64 = 1 << 20;

/// With the revision that the build saw.
const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("TCPSTATE_REVISION"),
    ")"
);

/// Follows the TCP state transitions of this host, straight from the kernel
#[derive(Parser, Debug)]
#[command(
    name = "tcpstate",
    version = VERSION,
    propagate_version = true,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = false,
    max_term_width = 100,
    after_help = "\
Where `ss` shows the states of one moment, tcpstate shows each change as it happens: how long the \
socket had been in the state that it left, which process holds it, and why the connection ended.

Examples:
  sudo tcpstate watch                        every transition of the host
  sudo tcpstate watch -s close-wait -L 443   what enters and leaves CLOSE_WAIT on port 443
  sudo tcpstate list -s close-wait           who holds sockets in CLOSE_WAIT, and for how long
  sudo tcpstate daemon                       metrics at http://127.0.0.1:10975/metrics
  sudo tcpstate check                        what of it this host allows

`tcpstate COMMAND --help` says more."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    Watch(Box<Watch>),
    List(Box<List>),
    Daemon(Box<Daemon>),
    Check(Check),
}

/// Follow transitions as they happen
#[derive(Args, Debug)]
#[command(
    display_name = "tcpstate",
    after_help = "\
Reads from the daemon's socket where a daemon runs. Else it traces by itself: that takes root, or the \
capabilities CAP_BPF and CAP_PERFMON, and CAP_SYS_ADMIN for network namespaces other than its own.

Examples:
  tcpstate watch --to established --role passive   connections that arrive
  tcpstate watch -s syn-sent -D 5432               connects to PostgreSQL
  tcpstate watch --from close-wait --min-dwell 1m  sockets that were closed late
  tcpstate watch --comm 'php-fpm*' -o wide         all about the sockets of php-fpm
  tcpstate watch -o json -d 10s | jq .end          why connections ended, for ten seconds
  tcpstate watch -a 10.0.0.0/8 -c 100 -o csv       the next hundred, for a spreadsheet"
)]
pub struct Watch {
    /// How to show each transition: text, wide, json or csv
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,

    /// End after N transitions
    #[arg(short, long, value_name = "N", value_parser = count, allow_negative_numbers = true)]
    pub count: Option<NonZeroU64>,

    /// End after this time, such as 10s
    #[arg(short, long, value_name = "DURATION")]
    duration: Option<Interval>,

    /// The kernel's own transitions, nothing inferred
    #[arg(long)]
    pub raw: bool,

    /// Show UTC, not local time (json and csv always do)
    #[arg(long)]
    pub utc: bool,

    /// Don't say when tracing begins; losses are always told
    #[arg(short, long)]
    pub quiet: bool,

    /// Accepted as by other tools: addresses and ports are always numeric
    #[arg(short = 'n')]
    _numeric: bool,

    /// Network namespaces to watch: all of the host, this one, or one by its inode
    #[arg(long, value_name = "all|self|INODE", default_value = "all")]
    pub netns: Netns,

    /// Trace by itself, also where a daemon runs
    #[arg(long, conflicts_with = "socket")]
    pub direct: bool,

    /// Read from the daemon that serves this socket, and nothing else
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    #[arg(long, hide = true, default_value = "4MiB")]
    pub ring_size: RingSize,

    #[command(flatten)]
    pub without: Without,

    #[command(
        flatten,
        next_help_heading = "Filters (values of one are alternatives, different ones must all hold)"
    )]
    pub filter: Filter,
}

fn count(text: &str) -> Result<NonZeroU64, ValueError> {
    let refused = |_| {
        ValueError(format!(
            "`{}` is no count; expected 1 or more",
            text.escape_debug()
        ))
    };
    text.parse().map_err(refused)
}

impl Watch {
    #[must_use]
    pub fn duration(&self) -> Option<Duration> {
        self.duration.map(|Interval(duration)| duration)
    }
}

/// List the sockets that exist now, with state, age and owner
#[derive(Args, Debug)]
#[command(
    display_name = "tcpstate",
    after_help = "\
Listeners come first, then all others, by local port and address, then by the remote ones. AGE is how long \
the socket has been in its state; with `>`, at least so long: its beginning was not seen. A daemon that has \
run for a while knows ages; without one, only those of TIME_WAIT are known.

Asks the daemon where one runs. Else it traces by itself, for a moment: that takes root, or the capabilities \
CAP_BPF and CAP_PERFMON, and CAP_SYS_ADMIN for network namespaces other than its own.

Examples:
  tcpstate list -s close-wait --min-age 10m        what was not closed for ten minutes, and by whom
  tcpstate list -s listen                          who listens where; the queues are of connections
  tcpstate list -L 443 -o wide                     all about the sockets of port 443
  tcpstate list --owner none                       sockets that no process holds
  tcpstate list -o json | jq -r .comm | sort | uniq -c"
)]
pub struct List {
    /// How to show the sockets: text, wide, json or csv
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,

    /// Don't say when tracing begins
    #[arg(short, long)]
    pub quiet: bool,

    /// Accepted as by other tools: addresses and ports are always numeric
    #[arg(short = 'n')]
    _numeric: bool,

    /// Network namespaces to list: all of the host, this one, or one by its inode
    #[arg(long, value_name = "all|self|INODE", default_value = "all")]
    pub netns: Netns,

    /// Look by itself, also where a daemon runs
    #[arg(long, conflicts_with = "socket")]
    pub direct: bool,

    /// Ask the daemon that serves this socket, and nothing else
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    #[command(flatten)]
    pub without: Without,

    #[command(
        flatten,
        next_help_heading = "Filters (values of one are alternatives, different ones must all hold)"
    )]
    pub filter: ListFilter,
}

/// Trace, count, and serve metrics for Prometheus
#[derive(Args, Debug)]
#[command(
    display_name = "tcpstate",
    after_help = "\
Serves the metrics over HTTP, and on its Unix socket also the stream that `tcpstate watch` reads. \
Takes root, or the capabilities CAP_BPF and CAP_PERFMON, and CAP_SYS_ADMIN for network namespaces other \
than its own.

Examples:
  tcpstate daemon                                  metrics at http://127.0.0.1:10975/metrics
  tcpstate daemon --web.listen-address :10975      … on every address
  tcpstate daemon --config /etc/tcpstate.toml      settings from a file

In the file, keys are named like the flags:
  web.listen-address = [\"127.0.0.1:10975\", \"[::1]:10975\"]
  ring-size = \"8MiB\""
)]
pub struct Daemon {
    /// TOML file with settings named like these flags, which win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    pub without: Without,

    #[command(flatten)]
    settings: Settings,
}

impl Daemon {
    /// The flags, then the file that they name, then the defaults.
    ///
    /// # Errors
    /// The file can't be read, or holds what is no setting: bad usage, like a bad flag.
    pub fn config(&self) -> anyhow::Result<DaemonConfig> {
        let settings = self.settings.clone();
        Ok(match &self.config {
            Some(path) => settings.or(read(path)?).with_defaults(),
            None => settings.with_defaults(),
        })
    }
}

/// Tell what this host lacks, and prove that tracing works
#[derive(Args, Debug)]
#[command(
    display_name = "tcpstate",
    after_help = "\
Tries each thing that tcpstate can use, and says what is lost without it. Then two loopback connections, \
in a network namespace of their own where that is allowed, show whether all that happens to them is told, \
in order and with its owner.

Ends with 0 if nothing is missing, 3 if tracing works but something is missing or undecided, 1 if it can't \
work."
)]
pub struct Check {
    /// How to show it: text or json
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: ReportFormat,

    /// Network namespaces to trace: all of the host, this one, or one by its inode
    #[arg(long, value_name = "all|self|INODE", default_value = "all")]
    pub netns: Netns,

    #[command(flatten)]
    pub without: Without,
}

fn read(path: &Path) -> anyhow::Result<Settings> {
    let shown = path.display();
    // A device or a pipe may have no end, or no beginning.
    let unreadable = || format!("config file {shown} can't be read");
    let file = fs::metadata(path).with_context(unreadable)?;
    ensure!(
        file.is_file(),
        "config file {shown} is no regular file; expected one with TOML"
    );
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST_CONFIG + 1).read_to_string(&mut text))
        .with_context(unreadable)?;
    ensure!(
        text.len() as u64 <= LONGEST_CONFIG,
        "config file {shown} is too long; expected {LONGEST_CONFIG} bytes at most"
    );
    Settings::from_toml(&text).map_err(|error| anyhow!("config file {shown}: {error}"))
}

/// For tests of what other kernels make necessary.
#[derive(Args, Debug)]
pub struct Without {
    /// What the kernel is taken to lack
    #[arg(
        id = "without",
        long = "without",
        hide = true,
        value_name = "FEATURE",
        value_delimiter = ','
    )]
    pub features: Vec<Feature>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_declaration_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_given_arrives() {
        let args = "tcpstate watch -o wide -c 3 -d 1.5s --raw -n --utc -q --netns self --direct -s estab \
                    --ring-size 64KiB --without tp_btf,tcp_iter";
        let Command::Watch(watch) = Cli::parse_from(args.split_whitespace()).command else {
            panic!("not watch");
        };
        assert_eq!(watch.output, Format::Wide);
        assert_eq!(watch.count.map(NonZeroU64::get), Some(3));
        assert_eq!(watch.duration(), Some(Duration::from_millis(1500)));
        assert!(watch.raw && watch.utc && watch.quiet && watch.direct);
        assert_eq!(watch.netns, Netns::Own);
        assert_eq!(watch.ring_size.bytes(), 65536);
        assert_eq!(watch.without.features, [Feature::TpBtf, Feature::TcpIter]);
    }
}
