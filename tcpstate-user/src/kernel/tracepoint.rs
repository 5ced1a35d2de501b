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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of Linux 6.18, without the print format.
    const FORMAT: &str = "\
name: inet_sock_set_state
ID: 2287
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:const void * skaddr;\toffset:8;\tsize:8;\tsigned:0;
\tfield:int oldstate;\toffset:16;\tsize:4;\tsigned:1;
\tfield:int newstate;\toffset:20;\tsize:4;\tsigned:1;
\tfield:__u16 sport;\toffset:24;\tsize:2;\tsigned:0;
\tfield:__u16 dport;\toffset:26;\tsize:2;\tsigned:0;
\tfield:__u16 family;\toffset:28;\tsize:2;\tsigned:0;
\tfield:__u16 protocol;\toffset:30;\tsize:2;\tsigned:0;
\tfield:__u8 saddr[4];\toffset:32;\tsize:4;\tsigned:0;
\tfield:__u8 daddr[4];\toffset:36;\tsize:4;\tsigned:0;
\tfield:__u8 saddr_v6[16];\toffset:40;\tsize:16;\tsigned:0;
\tfield:__u8 daddr_v6[16];\toffset:56;\tsize:16;\tsigned:0;
";

    fn refusal(format: &str) -> String {
        check_format(format).unwrap_err().to_string()
    }

    #[test]
    fn the_layout_that_the_program_reads_is_accepted() {
        check_format(FORMAT).unwrap();
    }

    #[test]
    fn another_layout_is_refused_with_the_field() {
        assert_eq!(
            refusal(&FORMAT.replace("offset:30;\tsize:2", "offset:30;\tsize:1")),
            "the tracepoint's field protocol is at 30 with 1 bytes where at 30 with 2 bytes was expected"
        );
        assert_eq!(
            refusal(&FORMAT.replace("oldstate;\toffset:16", "oldstate;\toffset:20")),
            "the tracepoint's field oldstate is at 20 with 4 bytes where at 16 with 4 bytes was expected"
        );
        assert_eq!(
            refusal(&FORMAT.replace(" skaddr;", " skaddr_old;")),
            "the tracepoint's field skaddr is absent where at 8 with 8 bytes was expected"
        );
        assert!(check_format("").is_err());
    }

    proptest! {
        #[test]
        fn any_text_never_panics(text in "(\\\\tfield:[a-z_\\\\[\\\\]* ;:0-9]{0,40}\\\\n){0,4}") {
            let _ = check_format(&text);
        }
    }
}
