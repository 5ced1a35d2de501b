//! What is told on standard error while we work: the daemon's log, as text or as JSON; a tool's warnings.

use std::fmt;
use std::io::{self, IsTerminal as _};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::model::named;

named! {
    pub enum LogLevel ("log level") {
        Error = "error",
        Warn = "warn",
        Info = "info",
        Debug = "debug",
        Trace = "trace",
    }
}

named! {
    pub enum LogFormat ("log format") {
        Text = "text",
        Json = "json",
    }
}

/// What a line begins with that a tool says on standard error.
pub const PROGRAM: &str = "tcpstate";

/// Sets up the log of this process for a tool that a user runs: warnings and errors, as it says them itself.
///
/// # Errors
/// There is one already.
pub fn init_warnings() -> Result<(), TryInitError> {
    tracing_subscriber::registry()
        .with(warnings(io::stderr))
        .try_init()
}

fn warnings<S>(to: impl for<'w> MakeWriter<'w> + Send + Sync + 'static) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(to);
    let lines = lines.with_ansi(false).event_format(Saying);
    lines.with_filter(LevelFilter::WARN)
}

/// `tcpstate: warning: …`
struct Saying;

impl<S, N> FormatEvent<S, N> for Saying
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let kind = match *event.metadata().level() {
            Level::ERROR => "error",
            _ => "warning",
        };
        write!(writer, "{PROGRAM}: {kind}: ")?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Sets up the log of this process. Of the libraries, only warnings and errors are shown.
///
/// # Errors
/// There is one already.
pub fn init(level: LogLevel, format: LogFormat) -> Result<(), TryInitError> {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let shown = Targets::new()
        // Also `tcpstate_ebpf`, whose messages come through aya-log.
        .with_target("tcpstate", level)
        .with_default(level.min(LevelFilter::WARN));
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match format {
        LogFormat::Text => {
            let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            let color = io::stderr().is_terminal() && !plain;
            lines.with_ansi(color).with_target(false).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).with_target(false).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(shown))
        .try_init()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Seek as _};
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_tool_warns_in_one_plain_line() {
        let mut file = tempfile::tempfile().unwrap();
        let to: File = file.try_clone().unwrap();
        let lines = tracing_subscriber::registry().with(warnings(Mutex::new(to)));
        tracing::subscriber::with_default(lines, || {
            tracing::info!("for nobody");
            tracing::warn!("no sockets of {}", 7);
            tracing::error!("no counters");
        });
        let mut said = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut said).unwrap();
        assert_eq!(
            said,
            "tcpstate: warning: no sockets of 7\ntcpstate: error: no counters\n"
        );
    }
}
