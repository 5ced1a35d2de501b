//! The values of the daemon's settings: how each is written and read, on the command line and in a file.

use std::net::{Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::{Setting, Written};
use crate::export::log::{LogFormat, LogLevel};
use crate::filter::{Netns, Span, ValueError};
use crate::kernel::RingSize;

fn refuse<T>(value: &str, expected: &str) -> Result<T, ValueError> {
    let value = value.escape_debug();
    Err(ValueError(format!("`{value}` is {expected}")))
}

impl Setting for Netns {
    const WRITTEN: Written = Written::Either;
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Listen(pub SocketAddr);

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
pub struct TelemetryPath(pub String);

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
pub struct SocketPath(pub PathBuf);

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
            Some(bytes) => {
                Self::new(bytes).or_else(|error| refuse(text, &format!("no ring size; {error}")))
            }
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
pub struct MaxComms(pub NonZeroUsize);

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

impl Setting for LogLevel {}

impl Setting for LogFormat {}
