//! What tools write, read: whose line it is, how many of all they told, and how many they say are missing.

use serde_json::Value;

use crate::figures::{Replay, Told};
use crate::http::Metrics;
use crate::load::Loads;

/// Of lines that tell one transition each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Watch,
    Tcpstates,
    Printf,
}

/// Whose transition a line tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    pub local: u16,
    pub remote: u16,
    /// Whether the socket is closed.
    pub closed: bool,
}

impl Ends {
    /// Of one of these connections, of either end.
    pub fn is_of(self, loads: &Loads) -> bool {
        loads.has(self.local) || loads.has(self.remote)
    }
}

impl Format {
    /// `None` of a line that tells no transition of the tracepoint's.
    pub fn read(self, line: &str) -> Option<Ends> {
        match self {
            Self::Watch => {
                let mut rest = line.strip_prefix(r#"{"type":"transition","#)?;
                let mut next = |name| field(&mut rest, name);
                let local = port(next(r#""local_port":"#)?)?;
                let remote = port(next(r#""remote_port":"#)?)?;
                let (from, to) = (next(r#""from":"#)?, next(r#""to":"#)?);
                // What only a dump found is no event that was told, nor is the end of TIME_WAIT: that is a timer's.
                if from == "TIME_WAIT" || next(r#""evidence":"#)? == "snapshot" {
                    return None;
                }
                Some(Ends {
                    local,
                    remote,
                    closed: matches!(to, "CLOSE" | "TIME_WAIT"),
                })
            }
            Self::Tcpstates => {
                // A name may have spaces.
                let fields: Vec<&str> = line.split_whitespace().collect();
                let [.., local, _, remote, _, "->", to, _] = fields[..] else {
                    return None;
                };
                Some(Ends {
                    local: local.parse().ok()?,
                    remote: remote.parse().ok()?,
                    closed: to == "CLOSE",
                })
            }
            Self::Printf => {
                let mut fields = line.split_whitespace();
                let mut next = || fields.next();
                let (local, remote, _, to) = (next()?, next()?, next()?, next()?);
                Some(Ends {
                    local: local.parse().ok()?,
                    remote: remote.parse().ok()?,
                    closed: to == "7",
                })
            }
        }
    }

    /// How many transitions a line that tells none says are missing.
    pub fn lost(self, line: &str) -> u64 {
        match self {
            Self::Watch => watch_lost(line).unwrap_or(0),
            Self::Tcpstates | Self::Printf => said_lost(line),
        }
    }
}

/// A port that is not known is 0 in lines of others too.
fn port(text: &str) -> Option<u16> {
    match text {
        "null" => Some(0),
        number => number.parse().ok(),
    }
}

/// Of a line of JSON as the product writes it: flat, without spaces, in one order. Leaves the rest after it: who reads each
/// line of a fast stream looks at no byte twice.
fn field<'a>(line: &mut &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(name)?;
    let (value, rest) = rest.split_at(rest.find([',', '}'])?);
    *line = rest;
    Some(value.trim_matches('"'))
}

fn watch_lost(line: &str) -> Option<u64> {
    let mut rest = line.strip_prefix(r#"{"type":"lost","#)?;
    field(&mut rest, r#""count":"#)?.parse().ok()
}

/// Sum of what libbpf-tools (`lost N events on CPU #0!`) and bpftrace (`Lost N events`) say.
pub fn said_lost(text: &str) -> u64 {
    let counts = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let first = words.next()?;
        let count: u64 = words.next()?.parse().ok()?;
        (first.eq_ignore_ascii_case("lost") && words.next()?.starts_with("event")).then_some(count)
    });
    counts.sum()
}

/// All that is in the histograms of bpftrace's JSON, without sockets that stopped listening.
pub fn counted_by_histogram(text: &str) -> Option<u64> {
    const LISTEN: &str = "10";
    let printed = text.lines().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        (line["type"] == "hist").then_some(line)
    })?;
    let states = printed["data"]["@dwell_us"].as_object()?;
    let counts = states
        .iter()
        .filter(|(state, _)| *state != LISTEN)
        .filter_map(|(_, buckets)| buckets.as_array())
        .flatten()
        .map(|bucket| bucket["count"].as_u64());
    counts.sum()
}

/// By what reached the daemon: not by the kernel side's counters, which a full ring leaves as they are. `connections`: each has
/// two ends that become established, and count; as many of all transitions were told at most. The least of all that tells.
pub fn told_by_daemon(expected: u64, connections: u64, before: &Metrics, after: &Metrics) -> Told {
    let counted = |metric| (after.sum(metric) - before.sum(metric)).max(0.0);
    let lost = counted("tcpstate_events_lost_total");
    let established = counted("tcpstate_connections_total");
    let mut told = expected as f64 * established / (2 * connections) as f64;
    let others = after
        .series("tcpstate_kernel_feature")
        .any(|(labels, in_use)| {
            in_use > 0.0 && (labels.contains("accept_fexit") || labels.contains("time_wait_fentry"))
        });
    // Else records of other kinds arrive too.
    if !others {
        told = told.min(counted("tcpstate_events_received_total"));
    }
    Told {
        expected,
        told: told as u64,
        said_lost: lost as u64,
    }
}

/// What the replay of a stream prints: `1000 open: 9.87 (8.10 to 10.20) million transitions/s`, among other lines.
pub fn replays(text: &str) -> Vec<Replay> {
    let read = |line: &str| {
        let (open, rate) = line.split_once(" open: ")?;
        let (median, rest) = rate
            .strip_suffix(") million transitions/s")?
            .split_once(" (")?;
        let (least, most) = rest.split_once(" to ")?;
        Some(Replay {
            open: open.parse().ok()?,
            median: median.parse().ok()?,
            least: least.parse().ok()?,
            most: most.parse().ok()?,
        })
    };
    text.lines().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATCH: &str = r#"{"type":"transition","schema":1,"seq":1,"time":"2026-11-20T23:10:11.123456789Z","id":"4711.0","cookie":"4711","netns":4026531840,"family":"ipv4","local_addr":"127.0.0.1","local_port":47778,"remote_addr":"127.0.0.1","remote_port":37463,"from":"SYN_SENT","to":"ESTABLISHED","dwell_ns":312000,"evidence":"tracepoint","role":"active","pid":4388,"comm":"python3","uid":0,"container":null,"owner_source":"connect","end":null}
"#;

    fn ends(local: u16, remote: u16, closed: bool) -> Option<Ends> {
        Some(Ends {
            local,
            remote,
            closed,
        })
    }

    #[test]
    fn lines_of_watch() {
        assert_eq!(Format::Watch.read(WATCH), ends(47778, 37463, false));
        let unbound = WATCH
            .replace("47778", "null")
            .replace("ESTABLISHED", "CLOSE");
        assert_eq!(Format::Watch.read(&unbound), ends(0, 37463, true));
        let timer = WATCH.replace("SYN_SENT", "TIME_WAIT");
        assert_eq!(Format::Watch.read(&timer), None);
        let found = WATCH.replace(r#""tracepoint""#, r#""snapshot""#);
        assert_eq!(Format::Watch.read(&found), None);
        let lost = r#"{"type":"lost","schema":1,"seq":4,"time":"2026-11-20T23:10:11.1Z","count":12,"reason":"ring_full"}"#;
        assert_eq!(Format::Watch.read(lost), None);
        assert_eq!(Format::Watch.lost(lost), 12);
        assert_eq!(Format::Watch.lost(r#"{"type":"start","schema":1}"#), 0);
    }

    #[test]
    fn lines_of_tcpstates() {
        let head = "SKADDR           PID     COMM       LADDR           LPORT RADDR           RPORT OLDSTATE    -> NEWSTATE    MS";
        assert_eq!(Format::Tcpstates.read(head), None);
        let line = "ffff9fd7e8192000 22384   a b        127.0.0.1       51234 127.0.0.1       80    ESTABLISHED -> CLOSE       0.123";
        assert_eq!(Format::Tcpstates.read(line), ends(51234, 80, true));
        assert_eq!(Format::Tcpstates.lost("lost 17 events on CPU #1!"), 17);
    }

    #[test]
    fn lines_of_bpftrace() {
        assert_eq!(Format::Printf.read("Attaching 1 probe..."), None);
        assert_eq!(
            Format::Printf.read("51234 80 1 7 99 a b\n"),
            ends(51234, 80, true)
        );
        assert_eq!(said_lost("Lost 3 events\nother\nLost 4 events\n"), 7);
        assert_eq!(said_lost("lost in thought\n"), 0);
    }

    #[test]
    fn replays_are_read_beside_their_calibration() {
        let text = "calibration: 300.00 (290.00 to 310.00) million steps/s\n\
                    1000 open: 9.87 (8.10 to 10.20) million transitions/s\n\
                    100000 open: 4.00 (3.00 to 5.00) million transitions/s\n";
        let read = replays(text);
        assert_eq!(
            read.iter().map(|it| it.open).collect::<Vec<_>>(),
            [1000, 100_000]
        );
        let first = &read[0];
        assert_eq!((first.median, first.least, first.most), (9.87, 8.1, 10.2));
    }

    #[test]
    fn histograms_are_added_up() {
        let text = r#"{"type": "attached_probes", "data": {"probes": 2}}
{"type": "hist", "data": {"@dwell_us": {"1": [{"min": 2, "max": 3, "count": 5}, {"min": 4, "max": 7, "count": 6}], "2": [{"max": 0, "count": 7}], "10": [{"min": 1, "max": 1, "count": 90}]}}}
"#;
        assert_eq!(counted_by_histogram(text), Some(18));
        assert_eq!(counted_by_histogram("{}"), None);
    }

    fn metrics(established: u64, received: u64, fentry: u64, lost: u64) -> Metrics {
        let page = format!(
            "tcpstate_connections_total{{comm=\"a\",role=\"active\"}} {established}\n\
             tcpstate_connections_total{{comm=\"a\",role=\"passive\"}} {established}\n\
             tcpstate_events_received_total {received}\n\
             tcpstate_kernel_feature{{feature=\"accept_fexit\"}} 0\n\
             tcpstate_kernel_feature{{feature=\"time_wait_fentry\"}} {fentry}\n\
             tcpstate_events_lost_total{{reason=\"ring_full\"}} {lost}\n"
        );
        Metrics::of(&page).unwrap()
    }

    #[test]
    fn a_daemon_told_what_reached_it() {
        let before = metrics(3, 18, 0, 1);
        let whole = told_by_daemon(60, 10, &before, &metrics(13, 78, 0, 1));
        assert_eq!((whole.told, whole.said_lost), (60, 0));
        let records = told_by_daemon(60, 10, &before, &metrics(13, 77, 0, 2));
        assert_eq!((records.told, records.said_lost), (59, 1));
        let connections = told_by_daemon(60, 10, &before, &metrics(12, 78, 0, 1));
        assert_eq!(connections.missing(), 6);
        // Of what these programs tell there are more records than transitions.
        let others = told_by_daemon(60, 10, &before, &metrics(13, 70, 1, 1));
        assert_eq!(others.missing(), 0);
    }
}
