//! The classic tracepoint's layout, from tracefs, against the one that the eBPF program was built for.
//!
//! Needed only where there is no BTF. Does not mount tracefs.

use std::{
    fs,
    io::{self, ErrorKind},
    mem::offset_of,
};

use tcpstate_common::tracepoint::InetSockSetState;

pub const CATEGORY: &str = "sock";
pub const NAME: &str = "inet_sock_set_state";

/// Where tracefs is mounted, as aya looks for it.
const MOUNTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

#[derive(Debug, thiserror::Error)]
pub enum TracepointError {
    #[error(
        "tracefs is not mounted, which the classic tracepoint needs; mount -t tracefs tracefs /sys/kernel/tracing"
    )]
    NotMounted,
    #[error(
        "tracefs cannot be read, which the classic tracepoint needs: CAP_DAC_READ_SEARCH is missing"
    )]
    Unreadable,
    #[error(
        "the kernel has no tracepoint {CATEGORY}:{NAME}; it needs Linux 4.16 or later with CONFIG_INET"
    )]
    Missing,
    #[error("cannot read {path}: {error}")]
    Read { path: String, error: io::Error },
    #[error("the tracepoint's field {field} is {found} where {expected} was expected")]
    Layout {
        field: &'static str,
        found: Place,
        expected: Place,
    },
}

/// Where a field is in the record, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Absent,
    At { offset: usize, size: usize },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Absent => f.write_str("absent"),
            Self::At { offset, size } => write!(f, "at {offset} with {size} bytes"),
        }
    }
}

/// Checks the running kernel's tracepoint.
///
/// # Errors
/// Where tracefs can't be read, or the layout is another.
pub fn check() -> Result<(), TracepointError> {
    let mut unreadable = false;
    for mount in MOUNTS {
        // An empty folder stands there where nothing is mounted.
        match fs::read_dir(mount).map(|mut entries| entries.next().is_some()) {
            Ok(false) => {}
            Ok(true) => return check_in(mount),
            Err(error) => unreadable |= error.kind() == ErrorKind::PermissionDenied,
        }
    }
    Err(if unreadable {
        TracepointError::Unreadable
    } else {
        TracepointError::NotMounted
    })
}

fn check_in(mount: &str) -> Result<(), TracepointError> {
    let path = format!("{mount}/events/{CATEGORY}/{NAME}/format");
    match fs::read_to_string(&path) {
        Ok(format) => check_format(&format),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(TracepointError::Missing),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(TracepointError::Unreadable)
        }
        Err(error) => Err(TracepointError::Read { path, error }),
    }
}

/// Compares a `format` file with [`InetSockSetState`].
///
/// # Errors
/// [`TracepointError::Layout`] for the first field that differs.
pub fn check_format(format: &str) -> Result<(), TracepointError> {
    const fn size_of_field<T>(_: fn(&InetSockSetState) -> &T) -> usize {
        size_of::<T>()
    }
    macro_rules! fields {
        ($($name:ident),+) => {
            [$((
                stringify!($name),
                Place::At { offset: offset_of!(InetSockSetState, $name), size: size_of_field(|r| &r.$name) },
            )),+]
        };
    }
    let fields = fields!(
        skaddr, oldstate, newstate, sport, dport, family, protocol, saddr, daddr, saddr_v6,
        daddr_v6
    );
    for (field, expected) in fields {
        let found = format
            .lines()
            .find_map(|line| place_of(line, field))
            .unwrap_or(Place::Absent);
        if found != expected {
            return Err(TracepointError::Layout {
                field,
                found,
                expected,
            });
        }
    }
    Ok(())
}

/// The place in a line like `\tfield:__u8 saddr[4];\toffset:32;\tsize:4;\tsigned:0;`, where it is that of `name`.
fn place_of(line: &str, name: &str) -> Option<Place> {
    let mut parts = line.split(';').map(str::trim);
    let declaration = parts.next()?.strip_prefix("field:")?;
    let declared = declaration.rsplit([' ', '*']).next()?;
    if declared.split('[').next()? != name {
        return None;
    }
    let (mut offset, mut size) = (None, None);
    for part in parts {
        if let Some(value) = part.strip_prefix("offset:") {
            offset = value.parse().ok();
        } else if let Some(value) = part.strip_prefix("size:") {
            size = value.parse().ok();
        }
    }
    Some(Place::At {
        offset: offset?,
        size: size?,
    })
}
