//! What `tcpstate daemon` is told, by flags and by a file with the same names.
//!
//! Owns reading and merging them. What can be had on this host (a port, a path) shows when it is tried.

mod value;

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use toml::{Table, Value};

pub use value::Interval;
use value::{Listen, MaxComms, SocketPath, TelemetryPath};

use crate::export::http::DEFAULT_SOCKET;
use crate::export::log::{LogFormat, LogLevel};
use crate::filter::{Netns, ValueError};
use crate::kernel::RingSize;

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

    /// Where to serve the metrics: `ADDR:PORT`, `:PORT` or `[::1]:PORT`; may be given more than once
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

    /// Command names that get series of their own; the rest count as `<other>` [default: 100]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
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
    pub ring_size: RingSize,
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
            ring_size: self.ring_size.unwrap_or_default(),
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
            Value::Array(values) if values.is_empty() => {
                return Err(ValueError(
                    "an empty list given; expected one value or more".to_owned(),
                ));
            }
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

#[cfg(test)]
mod tests;
