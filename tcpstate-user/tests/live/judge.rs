//! Whether the lines of a stream are what the contract promises, and tell of each socket what was expected.
//! Shares no code with the product.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use crate::lab::Expected;
use crate::without::{CLASSIC, NO_COOKIE};

/// Nobody listens there: connects to it mark a place in the stream.
pub const MARKER_PORT: u16 = 1;

const FIELDS: [&str; 23] = [
    "type",
    "schema",
    "seq",
    "time",
    "id",
    "cookie",
    "netns",
    "family",
    "local_addr",
    "local_port",
    "remote_addr",
    "remote_port",
    "from",
    "to",
    "dwell_ns",
    "evidence",
    "role",
    "pid",
    "comm",
    "uid",
    "container",
    "owner_source",
    "end",
];

pub struct Context {
    /// What the product does without.
    pub without: &'static str,
    /// `None`: all of them.
    pub netns: Option<u32>,
    /// Unix time before the tracer's start and after the last event, nanoseconds.
    pub window: (u128, u128),
}

impl Context {
    fn knows_cookies(&self) -> bool {
        self.reads_kernel() && !self.without.contains(NO_COOKIE) && kernel() >= (5, 12)
    }

    /// Fields of the socket and of the process' leader, read at offsets from BTF.
    fn reads_kernel(&self) -> bool {
        self.without != CLASSIC
    }
}

/// Of the running kernel, the first two numbers of its release.
pub fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    let mut numbers = release
        .split(|char: char| !char.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// One socket's lines, in the order of the stream.
#[derive(Default)]
pub struct Seen<'a> {
    pub lines: Vec<&'a Value>,
}

impl Seen<'_> {
    fn states(&self) -> String {
        let mut states = String::new();
        let mut last = "";
        for line in &self.lines {
            let (from, to) = (text(line, "from"), text(line, "to"));
            if from != last {
                // A break in the chain shows as two states with a bar between.
                states += if last.is_empty() { "" } else { " | " };
                states += from;
            }
            states += " ";
            states += to;
            last = to;
        }
        states
    }

    /// The last that is told of an end.
    fn end_point(&self, addr: &str, port: &str) -> Option<SocketAddr> {
        self.lines.iter().rev().find_map(|line| {
            let ip: IpAddr = line[addr].as_str()?.parse().ok()?;
            let port = u16::try_from(line[port].as_u64()?).ok()?;
            Some(SocketAddr::new(ip, port))
        })
    }

    fn is(&self, expected: &Expected) -> bool {
        let local = self.end_point("local_addr", "local_port");
        let remote = self.end_point("remote_addr", "remote_port");
        remote == expected.remote
            && expected.local.is_none_or(|address| local == Some(address))
            && self.states() == expected.states
    }
}

fn text<'a>(line: &'a Value, field: &str) -> &'a str {
    line[field].as_str().unwrap_or("?")
}

/// What holds for every stream.
pub fn stream(lines: &[Value], context: &Context) {
    let start = lines.first().expect("a first line");
    let netns = context
        .netns
        .map_or("all".to_owned(), |inode| inode.to_string());
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("/proc");
    let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("/proc");
    for (field, value) in [
        ("type", Value::from("start")),
        ("schema", 1.into()),
        ("source", "direct".into()),
        ("netns", netns.into()),
        ("boot_id", boot_id.trim().into()),
        ("host", host.trim().into()),
    ] {
        assert_eq!(start[field], value, "{field} of the first line {start}");
    }
    for (line, seq) in lines.iter().zip(0_u64..) {
        assert_eq!(line["seq"], seq, "lines are counted without gaps: {line}");
        assert_ne!(line["type"], "lost", "{line}");
        let time = text(line, "time");
        let nanos = unix_ns(time).unwrap_or_else(|| panic!("no time with nine digits: {line}"));
        // The tracer reads two clocks one after the other to turn boot time into Unix time.
        let (from, to) = (context.window.0 - 1_000_000, context.window.1 + 1_000_000);
        assert!(
            (from..=to).contains(&nanos),
            "not the time of the test: {line}"
        );
    }
    for line in &lines[1..] {
        let fields: BTreeSet<&str> = line
            .as_object()
            .map(|object| object.keys().map(String::as_str).collect())
            .unwrap_or_default();
        let promised: BTreeSet<&str> = FIELDS.into_iter().collect();
        assert_eq!(fields, promised, "fields of {line}");
    }
}

/// `2026-11-20T23:10:11.123456789Z`
fn unix_ns(time: &str) -> Option<u128> {
    let digits = time.strip_suffix('Z')?.split_once('.')?.1;
    let timestamp: jiff::Timestamp = time.parse().ok()?;
    (digits.len() == 9).then_some(timestamp.as_nanosecond().unsigned_abs())
}

/// Whether nothing that is expected is missing.
pub fn all_told(expected: &[Expected], seen: &BTreeMap<&str, Seen<'_>>) -> bool {
    expected
        .iter()
        .all(|expected| seen.values().any(|seen| seen.is(expected)))
}

/// What is wrong with the sockets of a stream, in lines for people; empty if nothing is.
pub fn sockets(
    expected: &[Expected],
    seen: &BTreeMap<&str, Seen<'_>>,
    context: &Context,
) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut unclaimed: BTreeMap<&str, &Seen<'_>> =
        seen.iter().map(|(id, seen)| (*id, seen)).collect();
    for expected in expected {
        let found = unclaimed
            .iter()
            .find(|(_, seen)| seen.is(expected))
            .map(|(id, _)| *id);
        match found.and_then(|id| unclaimed.remove_entry(id)) {
            Some((id, seen)) => {
                let mut complain = |line: &Value, what: String| {
                    complaints.push(format!("{}: {what}, in {line}", expected.who));
                };
                identity(id, seen, context, &mut complain);
                fields(expected, seen, context, &mut complain);
                dwells(expected, seen, &mut complain);
            }
            None => complaints.push(format!("expected, but not told: {expected:?}")),
        }
    }
    for (id, seen) in unclaimed {
        complaints.push(format!(
            "told, but not expected: {id}, {:?} to {:?}, {}",
            seen.end_point("local_addr", "local_port"),
            seen.end_point("remote_addr", "remote_port"),
            seen.states()
        ));
    }
    complaints
}

/// Whether `then` has the cookie of `first` and the next generation.
pub fn generations(
    first: SocketAddr,
    then: SocketAddr,
    seen: &BTreeMap<&str, Seen<'_>>,
    context: &Context,
) -> Option<String> {
    let id_of = |address| {
        // The accepted ends have this address as their remote one.
        seen.iter()
            .find(|(_, seen)| seen.end_point("local_addr", "local_port") == Some(address))
            .map(|(id, _)| *id)
    };
    let (first, then) = (id_of(first)?, id_of(then)?);
    let follows = if context.knows_cookies() {
        let cut = |id: &str| {
            let (cookie, generation) = id.split_once('.')?;
            Some((cookie.to_owned(), generation.parse::<u32>().ok()?))
        };
        cut(first).map(|(cookie, generation)| (cookie, generation + 1)) == cut(then)
    } else {
        first != then
    };
    (!follows).then(|| format!("{first} was connected again, but shows as {then}"))
}

fn identity(
    id: &str,
    seen: &Seen<'_>,
    context: &Context,
    complain: &mut impl FnMut(&Value, String),
) {
    for line in &seen.lines {
        let cookie = line["cookie"].as_str();
        let fits = if context.knows_cookies() {
            cookie.is_some_and(|cookie| {
                id.split_once('.').is_some_and(|(prefix, generation)| {
                    prefix == cookie && generation.parse::<u32>().is_ok()
                })
            })
        } else {
            // It has one where something had the kernel make it.
            (line["cookie"].is_null() || cookie.is_some_and(|cookie| cookie.parse::<u64>().is_ok()))
                && id
                    .strip_prefix('~')
                    .is_some_and(|number| number.parse::<u64>().is_ok())
        };
        if !fits {
            complain(
                line,
                format!("id {id} and cookie {cookie:?} don't fit the kernel"),
            );
        }
        let netns = if context.reads_kernel() {
            context.netns
        } else {
            None
        };
        if line["netns"] != netns.map_or(Value::Null, Value::from) {
            complain(line, format!("the namespace is {netns:?}"));
        }
    }
}

fn fields(
    expected: &Expected,
    seen: &Seen<'_>,
    context: &Context,
    complain: &mut impl FnMut(&Value, String),
) {
    let address = expected
        .remote
        .or(expected.local)
        .map(|address| address.ip());
    let family = match address {
        Some(IpAddr::V4(_)) => "ipv4",
        _ => "ipv6",
    };
    let local = seen.end_point("local_addr", "local_port");
    let last = seen.lines.len() - 1;
    let mut closing = false;
    for (index, &line) in seen.lines.iter().enumerate() {
        let mut must_be = |field: &str, value: Value| {
            if line[field] != value {
                complain(line, format!("{field} must be {value}"));
            }
        };
        must_be("evidence", "tracepoint".into());
        must_be("family", family.into());
        must_be("role", expected.role.map_or(Value::Null, Value::from));
        let end = match expected.end {
            // Nothing tells why, nor whether a timewait socket took its place.
            Some(_) if !context.reads_kernel() => {
                (!["FIN_WAIT2", "CLOSING"].contains(&text(line, "from"))).then_some("unknown")
            }
            end => end,
        };
        let end = end.filter(|_| index == last);
        must_be("end", end.map_or(Value::Null, Value::from));
        if let Some(remote) = expected.remote {
            must_be("remote_addr", remote.ip().to_string().into());
            must_be("remote_port", remote.port().into());
        } else {
            must_be("remote_addr", Value::Null);
            must_be("remote_port", Value::Null);
        }
        // What is told of the local end is right, or nothing.
        for (field, value) in [
            (
                "local_addr",
                local.map(|local| Value::from(local.ip().to_string())),
            ),
            ("local_port", local.map(|local| Value::from(local.port()))),
        ] {
            let unknown_yet = index == 0 && expected.owner_source == "connect";
            if local.is_some() && !(line[field].is_null() && unknown_yet) {
                must_be(field, value.unwrap_or(Value::Null));
            }
        }
        let inherited = line["owner_source"] == "sweep"
            && expected.heir.is_some_and(|heir| line["pid"] == heir);
        let pid = expected.heir.filter(|_| inherited).or(expected.pid);
        must_be("pid", pid.map_or(Value::Null, Value::from));
        // A process that closes a connection held it, whoever accepted it.
        closing |= ["FIN_WAIT1", "LAST_ACK"].contains(&text(line, "to"));
        let sources = match expected.owner_source {
            _ if inherited => &["sweep"][..],
            // Who accepted it is seen at once, by a sweep, or when it closes: as the kernel and the time allow.
            "listener" if closing => &["accept", "sweep", "closer"][..],
            "listener" => &["listener", "accept", "sweep"],
            ref source => std::slice::from_ref(source),
        };
        if context.reads_kernel() || !line["comm"].is_null() {
            must_be(
                "comm",
                pid.map_or(Value::Null, |pid| {
                    // A process that is gone can't be asked any more.
                    comm(pid).map_or(line["comm"].clone(), Value::from)
                }),
            );
        }
        let uid = context.reads_kernel().then_some(0);
        must_be("uid", uid.map_or(Value::Null, Value::from));
        if !sources.iter().any(|&source| line["owner_source"] == source) {
            complain(line, format!("owner_source must be one of {sources:?}"));
        }
    }
}

/// Of the thread-group leader; `None` if the process is gone.
fn comm(pid: u32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end_matches('\n').to_owned())
}

/// Dwells are told by a clock that is never set, times by one that is slewed (by 0.05 % at most), and how far the
/// two are apart can be read only as exactly as an emulated machine reads its clocks.
fn same_time(a: u128, b: u128) -> bool {
    a.abs_diff(b) <= 50_000 + a / 1000
}

/// A dwell is the time between two lines of its socket; there is none for what was not seen to begin.
fn dwells(expected: &Expected, seen: &Seen<'_>, complain: &mut impl FnMut(&Value, String)) {
    let mut entered: Option<u128> = None;
    let mut told = None;
    for &line in &seen.lines {
        let (from, to) = (text(line, "from"), text(line, "to"));
        let now = unix_ns(text(line, "time"));
        let dwell = line["dwell_ns"].as_u64();
        match (dwell, entered) {
            _ if from == to => {
                if dwell.is_some() {
                    complain(line, "a dwell, though no stay ended".to_owned());
                }
                continue;
            }
            (Some(dwell), Some(entered)) => {
                let between = now.map(|now| now - entered);
                if !between.is_some_and(|between| same_time(between, dwell.into())) {
                    complain(
                        line,
                        format!("dwell {dwell}, but {between:?} between the lines"),
                    );
                }
                told = Some(dwell);
            }
            (Some(_), None) => complain(line, "a dwell, though its start was not seen".to_owned()),
            // The stay only looks ended: the orphan lives on.
            (None, Some(_)) if (from, to) == ("FIN_WAIT2", "CLOSE") => {}
            (None, Some(_)) => complain(line, "no dwell, though both ends were seen".to_owned()),
            (None, None) => {}
        }
        entered = now;
    }
    if let Some((least, most)) = expected.dwell {
        let fits = told.is_some_and(|ns| (least.as_nanos()..=most.as_nanos()).contains(&ns.into()));
        if !fits {
            let last = seen.lines[seen.lines.len() - 1];
            complain(
                last,
                format!("the last dwell is {told:?}, not in {least:?} to {most:?}"),
            );
        }
    }
}
