//! Reads the JSON lines of a stream back: a client's side of the daemon's stream.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Deserialize;

use super::SCHEMA;
use crate::model::{
    Comm, ConnectionId, Endpoint, Line, Listed, Loss, Named, NetnsSelection, Owner, Process, Start,
    TcpState, Transition,
};

#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    #[error("not a line of a stream: {0}")]
    Json(#[from] serde_json::Error),
    #[error(
        "schema {0} is not the {SCHEMA} that this version reads; use the same version on both sides"
    )]
    Schema(u32),
    #[error("field `{field}`: {problem}")]
    Field {
        field: &'static str,
        problem: String,
    },
}

/// Reads one line: its number and what it says, or `None` for a type that this version does not know.
///
/// Fields that it does not know are passed over, as schema 1 promises.
///
/// # Errors
/// The line is no JSON object of schema 1, or has a value that this version can't show.
pub fn parse_line(line: &str) -> Result<Option<(u64, Line)>, ParseError> {
    let head: Head = serde_json::from_str(line)?;
    if head.schema != SCHEMA {
        return Err(ParseError::Schema(head.schema));
    }
    let time_ns = unix_ns("time", head.time)?;
    let line = match head.kind {
        "start" => Line::Start(serde_json::from_str::<StartFields>(line)?.start(time_ns)?),
        "transition" => {
            let fields: TransitionFields = serde_json::from_str(line)?;
            Line::Transition(fields.transition(time_ns)?)
        }
        "socket" => {
            let fields: SocketFields = serde_json::from_str(line)?;
            Line::Socket(fields.socket(time_ns)?)
        }
        "lost" => {
            let fields: LostFields = serde_json::from_str(line)?;
            Line::Lost(Loss {
                time_ns,
                count: fields.count,
                reason: named("reason", fields.reason)?,
            })
        }
        _ => return Ok(None),
    };
    Ok(Some((head.seq, line)))
}

// Borrowed from the line where the vocabulary has nothing to escape: this is done for every line.

#[derive(Deserialize)]
struct Head<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    schema: u32,
    seq: u64,
    time: &'a str,
}

#[derive(Deserialize)]
struct StartFields {
    host: String,
    boot_id: String,
    version: String,
    source: String,
    netns: String,
}

#[derive(Deserialize)]
struct TransitionFields<'a> {
    id: &'a str,
    cookie: Option<&'a str>,
    netns: Option<u32>,
    family: &'a str,
    local_addr: Option<IpAddr>,
    local_port: Option<u16>,
    remote_addr: Option<IpAddr>,
    remote_port: Option<u16>,
    from: &'a str,
    to: &'a str,
    dwell_ns: Option<u64>,
    evidence: &'a str,
    role: Option<&'a str>,
    pid: Option<u32>,
    comm: Option<String>,
    uid: Option<u32>,
    container: Option<String>,
    owner_source: &'a str,
    end: Option<&'a str>,
}

#[derive(Deserialize)]
struct SocketFields<'a> {
    id: &'a str,
    cookie: Option<&'a str>,
    netns: Option<u32>,
    family: &'a str,
    local_addr: Option<IpAddr>,
    local_port: Option<u16>,
    remote_addr: Option<IpAddr>,
    remote_port: Option<u16>,
    state: &'a str,
    since: &'a str,
    age_ns: u64,
    age_exact: bool,
    role: Option<&'a str>,
    pid: Option<u32>,
    comm: Option<String>,
    uid: Option<u32>,
    container: Option<String>,
    owner_source: &'a str,
    orphan: Option<bool>,
    holders: Option<u32>,
    recv_queue: Option<u32>,
    send_queue: Option<u32>,
}

#[derive(Deserialize)]
struct LostFields<'a> {
    count: u64,
    reason: &'a str,
}

impl StartFields {
    fn start(self, time_ns: u64) -> Result<Start, ParseError> {
        Ok(Start {
            time_ns,
            source: named("source", &self.source)?,
            netns: match self.netns.as_str() {
                "all" => NetnsSelection::All,
                inode => NetnsSelection::One(read("netns", inode)?),
            },
            host: plain("host", self.host)?,
            boot_id: plain("boot_id", self.boot_id)?,
            version: plain("version", self.version)?,
        })
    }
}

impl TransitionFields<'_> {
    fn transition(self, time_ns: u64) -> Result<Transition, ParseError> {
        let cookie = self.cookie.map(|cookie| read("cookie", cookie));
        Ok(Transition {
            time_ns,
            id: connection_id(self.id)?,
            cookie: cookie.transpose()?,
            netns: self.netns,
            family: named("family", self.family)?,
            local: Endpoint {
                addr: self.local_addr,
                port: self.local_port,
            },
            remote: Endpoint {
                addr: self.remote_addr,
                port: self.remote_port,
            },
            from: state("from", self.from)?,
            to: state("to", self.to)?,
            dwell_ns: self.dwell_ns,
            evidence: named("evidence", self.evidence)?,
            role: optional("role", self.role)?,
            owner: owner(self.pid, self.comm.as_deref(), self.owner_source)?,
            uid: self.uid,
            container: container(self.container)?,
            end: optional("end", self.end)?,
        })
    }
}

impl SocketFields<'_> {
    fn socket(self, time_ns: u64) -> Result<Listed, ParseError> {
        let cookie = self.cookie.map(|cookie| read("cookie", cookie));
        Ok(Listed {
            time_ns,
            id: connection_id(self.id)?,
            cookie: cookie.transpose()?,
            netns: self.netns,
            family: named("family", self.family)?,
            local: Endpoint {
                addr: self.local_addr,
                port: self.local_port,
            },
            remote: Endpoint {
                addr: self.remote_addr,
                port: self.remote_port,
            },
            state: state("state", self.state)?,
            since_ns: unix_ns("since", self.since)?,
            age_ns: self.age_ns,
            age_exact: self.age_exact,
            role: optional("role", self.role)?,
            owner: owner(self.pid, self.comm.as_deref(), self.owner_source)?,
            uid: self.uid,
            container: container(self.container)?,
            orphan: self.orphan,
            holders: self.holders,
            recv_queue: self.recv_queue,
            send_queue: self.send_queue,
        })
    }
}

fn owner(pid: Option<u32>, comm: Option<&str>, source: &str) -> Result<Option<Owner>, ParseError> {
    if source == "none" {
        return Ok(None);
    }
    let Some(pid) = pid else {
        return Err(ParseError::Field {
            field: "owner_source",
            problem: format!("`{}` without pid", source.escape_debug()),
        });
    };
    Ok(Some(Owner {
        process: Process {
            pid,
            // No line says it, and no output shows it: only the tracer itself has to tell reused pids apart.
            start_ns: 0,
            comm: comm.map(Comm::from_escaped),
        },
        source: named("owner_source", source)?,
    }))
}

fn container(id: Option<String>) -> Result<Option<Arc<str>>, ParseError> {
    let id = id.map(|id| plain("container", id)).transpose()?;
    Ok(id.map(Into::into))
}

/// What outputs show as it is, and so must not hold what acts on a terminal.
fn plain(field: &'static str, text: String) -> Result<String, ParseError> {
    if !text.chars().any(acts) {
        return Ok(text);
    }
    Err(ParseError::Field {
        field,
        problem: format!("`{}` can't be printed", text.escape_debug()),
    })
}

/// Whether it is a control character, ends a line, or has others shown in another order (Unicode's Bidi_Control).
pub(crate) fn acts(char: char) -> bool {
    char.is_control()
        || matches!(
            char,
            '\u{2028}' | '\u{2029}' | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

fn unix_ns(field: &'static str, time: &str) -> Result<u64, ParseError> {
    let instant: Timestamp = read(field, time)?;
    u64::try_from(instant.as_nanosecond()).map_err(|_| ParseError::Field {
        field,
        problem: format!("`{instant}` is out of range"),
    })
}

fn connection_id(text: &str) -> Result<ConnectionId, ParseError> {
    if let Some(number) = text.strip_prefix('~') {
        return Ok(ConnectionId::Own(read("id", number)?));
    }
    let (cookie, generation) = text.split_once('.').unwrap_or((text, ""));
    Ok(ConnectionId::Cookie {
        cookie: read("id", cookie)?,
        generation: read("id", generation)?,
    })
}

/// A state by its name, or the number of one that has none, as `TcpState` shows it.
fn state(field: &'static str, text: &str) -> Result<TcpState, ParseError> {
    if let Some(number) = text.strip_prefix("STATE_") {
        return read(field, number).map(TcpState::from_kernel);
    }
    let mut known = TcpState::ALL.into_iter();
    known
        .find(|state| state.name() == Some(text))
        .ok_or_else(|| ParseError::Field {
            field,
            problem: format!("`{}` is no TCP state", text.escape_debug()),
        })
}

fn read<T: FromStr<Err: ToString>>(field: &'static str, text: &str) -> Result<T, ParseError> {
    text.parse().map_err(|error: T::Err| ParseError::Field {
        field,
        problem: format!("`{}`: {}", text.escape_debug(), error.to_string()),
    })
}

fn named<T: Named>(field: &'static str, text: &str) -> Result<T, ParseError> {
    T::from_name(text).map_err(|error| ParseError::Field {
        field,
        problem: error.to_string(),
    })
}

fn optional<T: Named>(field: &'static str, text: Option<&str>) -> Result<Option<T>, ParseError> {
    text.map(|text| named(field, text)).transpose()
}
