//! What `tcpstate daemon` is told, by flags and by a file with the same names.
//!
//! Owns reading and merging them. What is possible on this host (a ring size, a port) shows when it is tried.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use toml::{Table, Value};

use crate::filter::{Netns, Span, ValueError};
use crate::model::named;

pub const DEFAULT_SOCKET: &str = "/run/tcpstate/tcpstate.sock";
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10975);
const DEFAULT_TELEMETRY_PATH: &str = "/metrics";
const DEFAULT_RECONCILE_INTERVAL: Duration = Duration::from_secs(30);
const DEFAULT_MAX_COMMS: NonZeroUsize = NonZeroUsize::new(100).unwrap();

/// What flags or a file gave; what they left out is `None` or empty.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// Network namespaces to trace: all of the host, this one, or one by its inode [default: all]
    #[arg(long, value_name = "all|self|INODE")]
    netns: Option<Netns>,

    /// Where to serve the metrics: ADDR:PORT, :PORT or [::1]:PORT; may be given more than once
    /// [default: 127.0.0.1:10975]
    #[arg(long = "web.listen-address", value_name = "ADDR:PORT")]
    listen: Vec<Listen>,

    /// Path of the metrics page [default: /metrics]
    #[arg(long = "web.telemetry-path", value_name = "PATH")]
    telemetry_path: Option<TelemetryPath>,

    /// Unix socket for `tcpstate watch` and local tools [default: /run/tcpstate/tcpstate.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<SocketPath>,

    /// Size of the ring buffer that the kernel fills: a power of two of pages [default: 4MiB]
    #[arg(long, value_name = "BYTES|KiB|MiB")]
    ring_size: Option<RingSize>,

    /// How often to compare the table with the kernel's sockets [default: 30s]
    #[arg(long, value_name = "DURATION")]
    reconcile_interval: Option<Interval>,

    /// Command names that get series of their own; the rest count as <other> [default: 100]
    #[arg(long, value_name = "N")]
    max_comms: Option<MaxComms>,

    /// What to log: error, warn, info, debug or trace [default: info]
    #[arg(long = "log.level", value_name = "LEVEL")]
    log_level: Option<LogLevel>,

    /// How to log, on standard error [default: text]
    #[arg(long = "log.format", value_name = "text|json")]
    log_format: Option<LogFormat>,
}

/// What the daemon does.
#[derive(Clone, Debug, PartialEq)]
pub struct DaemonConfig {
    pub netns: Netns,
    pub listen: Vec<SocketAddr>,
    pub telemetry_path: String,
    pub socket: PathBuf,
    /// In bytes.
    pub ring_size: u64,
    pub reconcile_interval: Duration,
    pub max_comms: NonZeroUsize,
    pub log_level: LogLevel,
    pub log_format: LogFormat,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("not TOML: {problem} (line {line})")]
    Syntax { problem: String, line: usize },
    #[error("unknown key `{key}`; known: {known}")]
    UnknownKey { key: String, known: String },
    #[error("key `{key}`: {problem}")]
    Value { key: String, problem: String },
}

impl Settings {
    /// Reads a file's text. A dotted key is the same quoted, bare, or in a table: `"log.level"`, `log.level`, `[log]`.
    ///
    /// # Errors
    /// One line about the first thing that is no setting.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let table: Table = toml::from_str(text).map_err(|error: toml::de::Error| {
            let before = error.span().map_or(0, |span| span.start);
            ConfigError::Syntax {
                problem: error.message().trim().replace('\n', ", "),
                line: 1 + text[..before].matches('\n').count(),
            }
        })?;
        let mut settings = Self::default();
        for (key, value) in flattened(table) {
            let mut fields = settings.fields();
            let Some((_, field)) = fields.iter_mut().find(|(known, _)| *known == key) else {
                return Err(ConfigError::UnknownKey {
                    key: key.escape_debug().to_string(),
                    known: fields.map(|(name, _)| name).join(", "),
                });
            };
            field
                .set(&value)
                .map_err(|ValueError(problem)| ConfigError::Value { key, problem })?;
        }
        Ok(settings)
    }

    /// What was given here, and for the rest what `other` gives.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            netns: self.netns.or(other.netns),
            listen: if self.listen.is_empty() {
                other.listen
            } else {
                self.listen
            },
            telemetry_path: self.telemetry_path.or(other.telemetry_path),
            socket: self.socket.or(other.socket),
            ring_size: self.ring_size.or(other.ring_size),
            reconcile_interval: self.reconcile_interval.or(other.reconcile_interval),
            max_comms: self.max_comms.or(other.max_comms),
            log_level: self.log_level.or(other.log_level),
            log_format: self.log_format.or(other.log_format),
        }
    }

    #[must_use]
    pub fn with_defaults(self) -> DaemonConfig {
        let listen: Vec<_> = self.listen.into_iter().map(|Listen(addr)| addr).collect();
        let socket = self
            .socket
            .map_or(DEFAULT_SOCKET.into(), |SocketPath(path)| path);
        let path = self.telemetry_path.map(|TelemetryPath(path)| path);
        let interval = self.reconcile_interval.map(|Interval(interval)| interval);
        DaemonConfig {
            netns: self.netns.unwrap_or(Netns::All),
            listen: if listen.is_empty() {
                vec![DEFAULT_LISTEN]
            } else {
                listen
            },
            telemetry_path: path.unwrap_or_else(|| DEFAULT_TELEMETRY_PATH.to_owned()),
            socket,
            ring_size: self.ring_size.unwrap_or_default().0,
            reconcile_interval: interval.unwrap_or(DEFAULT_RECONCILE_INTERVAL),
            max_comms: self.max_comms.map_or(DEFAULT_MAX_COMMS, |MaxComms(n)| n),
            log_level: self.log_level.unwrap_or(LogLevel::Info),
            log_format: self.log_format.unwrap_or(LogFormat::Text),
        }
    }

    /// Each setting by the name of its flag and of its key.
    fn fields(&mut self) -> [(&'static str, &mut dyn Field); 9] {
        [
            ("netns", &mut self.netns),
            ("web.listen-address", &mut self.listen),
            ("web.telemetry-path", &mut self.telemetry_path),
            ("socket", &mut self.socket),
            ("ring-size", &mut self.ring_size),
            ("reconcile-interval", &mut self.reconcile_interval),
            ("max-comms", &mut self.max_comms),
            ("log.level", &mut self.log_level),
            ("log.format", &mut self.log_format),
        ]
    }
}

fn flattened(table: Table) -> Vec<(String, Value)> {
    let mut flat = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                let inner = flattened(inner).into_iter();
                flat.extend(inner.map(|(rest, value)| (format!("{key}.{rest}"), value)));
            }
            value => flat.push((key, value)),
        }
    }
    flat
}

/// A setting as a file gives it.
trait Field {
    fn set(&mut self, value: &Value) -> Result<(), ValueError>;
}

/// What type a file writes a value in.
enum Written {
    String,
    Integer,
    Either,
}

/// A value, read from the same text on the command line and in a file.
trait Setting: FromStr<Err: Display> {
    const WRITTEN: Written = Written::String;

    fn read(value: &Value) -> Result<Self, ValueError> {
        let text = match (value, Self::WRITTEN) {
            (Value::String(text), Written::String | Written::Either) => text.clone(),
            (Value::Integer(number), Written::Integer | Written::Either) => number.to_string(),
            (_, written) => {
                let expected = match written {
                    Written::String => "a string",
                    Written::Integer => "an integer",
                    Written::Either => "a string or an integer",
                };
                return Err(ValueError(format!(
                    "{} given; expected {expected}",
                    value.type_str()
                )));
            }
        };
        let read = text.parse();
        read.map_err(|error: Self::Err| ValueError(error.to_string()))
    }
}

impl<T: Setting> Field for Option<T> {
    fn set(&mut self, value: &Value) -> Result<(), ValueError> {
        if self.is_some() {
            return Err(ValueError("given twice; expected one value".to_owned()));
        }
        *self = Some(T::read(value)?);
        Ok(())
    }
}

impl<T: Setting> Field for Vec<T> {
    fn set(&mut self, value: &Value) -> Result<(), ValueError> {
        match value {
            Value::Array(values) => {
                for value in values {
                    self.push(T::read(value)?);
                }
            }
            value => self.push(T::read(value)?),
        }
        Ok(())
    }
}

fn refuse<T>(value: &str, expected: &str) -> Result<T, ValueError> {
    let value = value.escape_debug();
    Err(ValueError(format!("`{value}` is {expected}")))
}

impl Setting for Netns {
    const WRITTEN: Written = Written::Either;
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Listen(SocketAddr);

impl Setting for Listen {}

impl FromStr for Listen {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        // As Go does: no address is every address, of both families.
        let any = |port: &str| {
            let port = port.parse().ok()?;
            Some(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))
        };
        let addr = match text.strip_prefix(':') {
            Some(port) => any(port),
            None => text.parse().ok(),
        };
        match addr {
            Some(addr) => Ok(Self(addr)),
            None => refuse(
                text,
                "no address to listen on; expected ADDR:PORT with a numeric address, :PORT or [::1]:PORT",
            ),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct TelemetryPath(String);

impl Setting for TelemetryPath {}

impl FromStr for TelemetryPath {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let plain = |char: char| char.is_ascii_alphanumeric() || "/-_.~".contains(char);
        if text.len() < 2 || !text.starts_with('/') || !text.chars().all(plain) {
            return refuse(
                text,
                "no path for the metrics; expected / and letters, digits or -_.~, such as /metrics",
            );
        }
        if text.starts_with("/-/") || text.starts_with("/v1/") {
            return refuse(text, "taken by the daemon itself; try /metrics");
        }
        Ok(Self(text.to_owned()))
    }
}

#[derive(Clone, Debug, PartialEq)]
struct SocketPath(PathBuf);

impl Setting for SocketPath {}

impl FromStr for SocketPath {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.is_empty() {
            return refuse(text, "no path for the socket");
        }
        Ok(Self(PathBuf::from(text)))
    }
}

/// In bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize(pub u64);

impl Default for RingSize {
    fn default() -> Self {
        Self(4 << 20)
    }
}

impl Setting for RingSize {
    const WRITTEN: Written = Written::Either;
}

impl FromStr for RingSize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (digits, unit) = if let Some(digits) = text.strip_suffix("KiB") {
            (digits, 1 << 10)
        } else if let Some(digits) = text.strip_suffix("MiB") {
            (digits, 1 << 20)
        } else {
            (text, 1)
        };
        let number: Option<u64> = digits.parse().ok();
        match number.and_then(|number| number.checked_mul(unit)) {
            Some(bytes) => Ok(Self(bytes)),
            None => refuse(text, "no size; expected bytes, KiB or MiB, such as 4MiB"),
        }
    }
}

/// A duration above zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval(pub Duration);

impl Setting for Interval {}

impl FromStr for Interval {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.parse()? {
            Span(Duration::ZERO) => refuse(text, "too short; expected more than zero, such as 10s"),
            Span(duration) => Ok(Self(duration)),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct MaxComms(NonZeroUsize);

impl Setting for MaxComms {
    const WRITTEN: Written = Written::Integer;
}

impl FromStr for MaxComms {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.parse() {
            Ok(number) => Ok(Self(number)),
            Err(_) => refuse(text, "no number of names; expected 1 or more, such as 100"),
        }
    }
}

named! {
    pub enum LogLevel ("log level") {
        Error = "error",
        Warn = "warn",
        Info = "info",
        Debug = "debug",
        Trace = "trace",
    }
}

impl Setting for LogLevel {}

named! {
    pub enum LogFormat ("log format") {
        Text = "text",
        Json = "json",
    }
}

impl Setting for LogFormat {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{Command, FromArgMatches as _};

    use super::*;

    fn command() -> Command {
        Settings::augment_args(Command::new("daemon"))
    }

    fn flags(args: &str) -> Settings {
        let args = std::iter::once("daemon").chain(args.split_ascii_whitespace());
        let matches = command().try_get_matches_from(args).unwrap();
        Settings::from_arg_matches(&matches).unwrap()
    }

    fn error(text: &str) -> String {
        Settings::from_toml(text).unwrap_err().to_string()
    }

    const WHOLE: &str = r#"
        netns = 4026531840
        "web.listen-address" = [":9100", "[::1]:9101"]
        web.telemetry-path = "/m"
        socket = "/tmp/s"
        ring-size = "8MiB"
        reconcile-interval = "1m"
        max-comms = 5
        [log]
        level = "debug"
        format = "json"
    "#;

    #[test]
    fn a_file_says_the_same_as_the_flags() {
        let file = Settings::from_toml(WHOLE).unwrap();
        let flags = flags(
            "--netns 4026531840 --web.listen-address :9100 --web.listen-address [::1]:9101 \
             --web.telemetry-path /m --socket /tmp/s --ring-size 8192KiB --reconcile-interval 60s \
             --max-comms 5 --log.level debug --log.format json",
        );
        assert_eq!(file, flags);
    }

    #[test]
    fn flags_and_keys_have_the_same_names() {
        let flags: BTreeSet<String> = command()
            .get_arguments()
            .filter_map(|arg| arg.get_long().map(str::to_owned))
            .collect();
        let keys = Settings::default()
            .fields()
            .map(|(name, _)| name.to_owned());
        assert_eq!(flags, keys.into());
    }

    #[test]
    fn the_command_line_wins_over_the_file_and_the_file_over_the_defaults() {
        let file = Settings::from_toml(WHOLE).unwrap();
        let args = "--web.listen-address 127.0.0.2:1 --max-comms 7 --log.level warn";
        let config = flags(args).or(file.clone()).with_defaults();
        assert_eq!(
            config,
            DaemonConfig {
                listen: vec!["127.0.0.2:1".parse().unwrap()],
                max_comms: 7.try_into().unwrap(),
                log_level: LogLevel::Warn,
                ..file.with_defaults()
            }
        );
    }

    /// The help says these.
    #[test]
    fn defaults_are_those_that_the_help_names() {
        let given = flags(
            "--netns all --web.listen-address 127.0.0.1:10975 --web.telemetry-path /metrics \
             --socket /run/tcpstate/tcpstate.sock --ring-size 4MiB --reconcile-interval 30s --max-comms 100 \
             --log.level info --log.format text",
        );
        assert_eq!(given.with_defaults(), Settings::default().with_defaults());
    }

    #[test]
    fn no_address_is_every_address() {
        let all = flags("--web.listen-address :9100").with_defaults();
        assert_eq!(all.listen, ["[::]:9100".parse().unwrap()]);
    }

    #[test]
    fn a_file_says_what_is_wrong_with_it() {
        for (text, problem) in [
            (
                "ring_size = 1",
                "unknown key `ring_size`; known: netns, web.listen-address, web.telemetry-path, socket, \
                 ring-size, reconcile-interval, max-comms, log.level, log.format",
            ),
            (
                "[web]\nlisten = 1",
                "unknown key `web.listen`; known: netns, web.listen-address, web.telemetry-path, socket, \
                 ring-size, reconcile-interval, max-comms, log.level, log.format",
            ),
            (
                "max-comms = \"5\"",
                "key `max-comms`: string given; expected an integer",
            ),
            (
                "max-comms = 0",
                "key `max-comms`: `0` is no number of names; expected 1 or more, such as 100",
            ),
            (
                "web.listen-address = [1]",
                "key `web.listen-address`: integer given; expected a string",
            ),
            (
                "web.listen-address = \"localhost:80\"",
                "key `web.listen-address`: `localhost:80` is no address to listen on; expected ADDR:PORT with a \
                 numeric address, :PORT or [::1]:PORT",
            ),
            (
                "ring-size = 1.5",
                "key `ring-size`: float given; expected a string or an integer",
            ),
            (
                "ring-size = \"4MB\"",
                "key `ring-size`: `4MB` is no size; expected bytes, KiB or MiB, such as 4MiB",
            ),
            (
                "reconcile-interval = \"0s\"",
                "key `reconcile-interval`: `0s` is too short; expected more than zero, such as 10s",
            ),
            (
                "web.telemetry-path = \"/{x}\"",
                "key `web.telemetry-path`: `/{x}` is no path for the metrics; expected / and letters, digits or \
                 -_.~, such as /metrics",
            ),
            (
                "web.telemetry-path = \"/-/ready\"",
                "key `web.telemetry-path`: `/-/ready` is taken by the daemon itself; try /metrics",
            ),
            (
                "log.level = \"loud\"",
                "key `log.level`: unknown log level `loud`; known: error, warn, info, debug, trace",
            ),
            (
                "\"log.level\" = \"info\"\nlog.level = \"info\"",
                "key `log.level`: given twice; expected one value",
            ),
        ] {
            assert_eq!(error(text), problem);
        }
        let syntax = error("netns = \"all\"\nmax-comms =");
        assert!(syntax.starts_with("not TOML: "), "{syntax}");
        assert!(syntax.ends_with(" (line 2)"), "{syntax}");
        assert_eq!(syntax.lines().count(), 1);
    }
}
