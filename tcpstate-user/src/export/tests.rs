//! Each format over the same lines, and JSON read back.

use std::net::IpAddr;

use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::*;
use crate::model::{
    Comm, ConnectionId, End, Endpoint, Evidence, Family, Listed, Loss, LossReason, Named,
    NetnsSelection, Owner, OwnerSource, Process, Role, Source, Start, TcpState, Transition,
};

const TIME_NS: u64 = 1_795_216_211_123_456_789;

fn endpoint(addr: &str, port: u16) -> Endpoint {
    Endpoint {
        addr: Some(addr.parse().unwrap()),
        port: Some(port),
    }
}

fn owner(pid: u32, comm: &[u8], source: OwnerSource) -> Option<Owner> {
    Some(Owner {
        process: Process {
            pid,
            start_ns: 0,
            comm: Some(Comm::from_bytes(comm)),
        },
        source,
    })
}

fn transition() -> Transition {
    Transition {
        time_ns: TIME_NS,
        id: ConnectionId::Cookie {
            cookie: 4711,
            generation: 0,
        },
        cookie: Some(4711),
        netns: Some(4_026_531_840),
        family: Family::Ipv4,
        local: endpoint("127.0.0.1", 47778),
        remote: endpoint("127.0.0.1", 37463),
        from: TcpState::SYN_SENT,
        to: TcpState::ESTABLISHED,
        dwell_ns: Some(312_000),
        evidence: Evidence::Tracepoint,
        role: Some(Role::Active),
        owner: owner(4388, b"python3", OwnerSource::Connect),
        uid: Some(0),
        container: None,
        end: None,
    }
}

fn start() -> Line {
    Line::Start(Start {
        time_ns: TIME_NS,
        host: "web-1".to_owned(),
        boot_id: "5e9a1c0e-6f1f-4d5c-8d7c-2f0f3a1b9c11".to_owned(),
        version: "0.1.0".to_owned(),
        source: Source::Direct,
        netns: NetnsSelection::All,
    })
}

/// What can stand in a stream: all known, nothing known, long, hostile, lost.
fn lines() -> Vec<Line> {
    let listener = Transition {
        local: endpoint("0.0.0.0", 8080),
        remote: Endpoint::default(),
        from: TcpState::CLOSE,
        to: TcpState::LISTEN,
        dwell_ns: None,
        role: None,
        owner: owner(7, b"nginx", OwnerSource::Listen),
        ..transition()
    };
    let widest = Transition {
        local: endpoint("255.255.255.255", 65535),
        remote: endpoint("255.255.255.255", 65535),
        from: TcpState::ESTABLISHED,
        to: TcpState::CLOSE_WAIT,
        dwell_ns: Some(86_399_000_000_000),
        role: Some(Role::Passive),
        owner: owner(4_194_304, b"fifteen-letters", OwnerSource::Listener),
        uid: Some(65534),
        container: Some("8f3c1d2e4b5a".into()),
        ..transition()
    };
    let unknown = Transition {
        id: ConnectionId::Own(12),
        cookie: None,
        netns: None,
        local: Endpoint::default(),
        remote: Endpoint {
            addr: Some([192, 0, 2, 7].into()),
            port: None,
        },
        from: TcpState::from_kernel(13),
        to: TcpState::CLOSE,
        dwell_ns: None,
        evidence: Evidence::Inferred,
        role: None,
        owner: None,
        uid: None,
        end: Some(End::Unknown),
        ..transition()
    };
    let v6 = Transition {
        family: Family::Ipv6,
        local: endpoint("2001:db8:1234:5678:9abc:def0:1234:5678", 443),
        remote: endpoint("::1", 50000),
        from: TcpState::FIN_WAIT2,
        to: TcpState::TIME_WAIT,
        dwell_ns: Some(61_345_000_000),
        evidence: Evidence::Snapshot,
        owner: owner(99, b"haproxy", OwnerSource::Closer),
        end: Some(End::LocalClose),
        ..transition()
    };
    let hostile = |comm: &[u8]| Transition {
        from: TcpState::ESTABLISHED,
        to: TcpState::CLOSE,
        owner: owner(666, comm, OwnerSource::Connect),
        end: Some(End::ResetReceived),
        ..transition()
    };
    let loss = |count, reason| {
        Line::Lost(Loss {
            time_ns: TIME_NS + 1_000_000,
            count,
            reason,
        })
    };
    let mut lines = vec![start(), Line::Transition(transition())];
    lines.extend([listener, widest, unknown, v6].map(Line::Transition));
    lines.push(loss(17, LossReason::RingFull));
    lines.extend(
        [
            b"\x1b[2J\x1b[31m".as_slice(),
            b"a,\"b\"\n\\n",
            b"\xff\xfe bad",
            "caf\u{e9}\u{202e}".as_bytes(),
            b"=1+1|x",
        ]
        .map(|comm| Line::Transition(hostile(comm))),
    );
    lines.push(loss(1, LossReason::SlowReader));
    lines
}

/// A socket in each way that a list can have it: all known, a listener, nothing known, hostile.
fn list() -> Vec<Line> {
    let held = Listed {
        time_ns: TIME_NS,
        id: ConnectionId::Cookie {
            cookie: 4711,
            generation: 0,
        },
        cookie: Some(4711),
        netns: Some(4_026_531_840),
        family: Family::Ipv4,
        local: endpoint("255.255.255.255", 65535),
        remote: endpoint("10.0.0.7", 55000),
        state: TcpState::CLOSE_WAIT,
        since_ns: TIME_NS - 7_384_000_000_000,
        age_ns: 7_384_000_000_000,
        age_exact: true,
        role: Some(Role::Passive),
        owner: owner(4_194_304, b"fifteen-letters", OwnerSource::Accept),
        uid: Some(65534),
        container: Some("8f3c1d2e4b5a".into()),
        orphan: Some(false),
        holders: Some(2),
        recv_queue: Some(1),
        send_queue: Some(4_194_304),
    };
    let listener = Listed {
        local: endpoint("::", 443),
        family: Family::Ipv6,
        remote: Endpoint::default(),
        state: TcpState::LISTEN,
        since_ns: TIME_NS - 86_399_000_000_000,
        age_ns: 86_399_000_000_000,
        age_exact: false,
        role: None,
        owner: owner(7, b"nginx", OwnerSource::Sweep),
        container: None,
        recv_queue: Some(0),
        send_queue: Some(511),
        ..held.clone()
    };
    let unknown = Listed {
        id: ConnectionId::Own(12),
        cookie: None,
        netns: None,
        state: TcpState::NEW_SYN_RECV,
        since_ns: TIME_NS,
        age_ns: 0,
        age_exact: false,
        role: None,
        owner: None,
        uid: None,
        container: None,
        orphan: None,
        holders: None,
        recv_queue: None,
        send_queue: None,
        ..held.clone()
    };
    let hostile = Listed {
        state: TcpState::FIN_WAIT2,
        owner: owner(666, b"=\x1b[2J\"\n,", OwnerSource::Closer),
        orphan: Some(true),
        ..held.clone()
    };
    let rows = [listener, held, unknown, hostile];
    std::iter::once(start())
        .chain(rows.map(Line::Socket))
        .collect()
}

fn listed(format: Format, color: bool) -> String {
    write(&list(), format, color, Rows::Sockets)
}

fn written(format: Format, color: bool) -> String {
    write(&lines(), format, color, Rows::Transitions)
}

fn write(lines: &[Line], format: Format, color: bool, rows: Rows) -> String {
    let look = Look {
        color,
        zone: TimeZone::fixed(jiff::tz::offset(1)),
    };
    let mut writer = LineWriter::new(format, look, rows);
    let mut out = Vec::new();
    for line in lines {
        writer.write(line, &mut out);
    }
    String::from_utf8(out).unwrap()
}

macro_rules! golden {
    ($name:literal, $text:expr) => {
        insta::with_settings!({
            snapshot_path => "../../tests/golden",
            prepend_module_to_snapshot => false,
            omit_expression => true,
        }, { insta::assert_snapshot!($name, $text) })
    };
}

#[test]
fn json_as_documented() {
    let text = written(Format::Json, false);
    for line in text.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
    golden!("stream.json", text);
}

#[test]
fn csv_as_documented() {
    let text = written(Format::Csv, false);
    let mut rows = ::csv::Reader::from_reader(text.as_bytes());
    let rows: Vec<_> = rows.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), lines().len() - 1);
    assert!(rows.iter().all(|row| row.len() == 25));
    golden!("stream.csv", text);
}

#[test]
fn text_is_a_table() {
    let text = written(Format::Text, false);
    assert!(!text.contains('\x1b'));
    assert!(text.lines().all(|line| !line.ends_with(' ')));
    golden!("stream.text", text);
}

#[test]
fn wide_says_all() {
    golden!("stream.wide", written(Format::Wide, false));
}

#[test]
fn colours_change_nothing_but_colours() {
    let text = written(Format::Text, true);
    let plain = anstream::adapter::strip_str(&text).to_string();
    assert_eq!(plain, written(Format::Text, false));
    golden!("stream.colour", text.replace('\x1b', "␛"));
}

#[test]
fn a_list_in_each_format() {
    let json = listed(Format::Json, false);
    let csv = listed(Format::Csv, false);
    let mut rows = ::csv::Reader::from_reader(csv.as_bytes());
    let header = rows.headers().unwrap().clone();
    // The same fields in the same order.
    for text in json.lines().skip(1) {
        let fields = header.iter().map(|name| format!("\"{name}\":"));
        let places: Vec<_> = fields.map(|name| text.find(&name)).collect();
        assert!(places.iter().all(Option::is_some), "{text}");
        assert!(places.is_sorted(), "{text}");
    }
    for row in rows.records() {
        assert_eq!(row.unwrap().len(), header.len());
    }
    let colour = listed(Format::Text, true);
    let text = listed(Format::Text, false);
    assert_eq!(anstream::adapter::strip_str(&colour).to_string(), text);
    golden!("list.json", json);
    golden!("list.csv", csv);
    golden!("list.text", text);
    golden!("list.wide", listed(Format::Wide, false));
}

#[test]
fn a_list_is_read_back() {
    for (text, line) in listed(Format::Json, false).lines().zip(list()) {
        assert_eq!(parse_line(text).unwrap().unwrap().1, line);
    }
}

fn one_of<T: Named + std::fmt::Debug>() -> impl Strategy<Value = T> {
    prop::sample::select(T::ALL)
}

fn endpoints() -> impl Strategy<Value = Endpoint> {
    let addr = prop::option::of(prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(IpAddr::from),
    ]);
    (addr, any::<Option<u16>>()).prop_map(|(addr, port)| Endpoint { addr, port })
}

fn owners() -> impl Strategy<Value = Option<Owner>> {
    let comm = prop::collection::vec(1u8.., 0..16);
    let known = (any::<u32>(), comm, one_of::<OwnerSource>());
    prop::option::of(known.prop_map(|(pid, comm, source)| owner(pid, &comm, source).unwrap()))
}

fn ids() -> impl Strategy<Value = ConnectionId> {
    prop_oneof![
        any::<u64>().prop_map(ConnectionId::Own),
        any::<(u64, u32)>()
            .prop_map(|(cookie, generation)| ConnectionId::Cookie { cookie, generation }),
    ]
}

/// What may be shown as it is.
fn texts() -> impl Strategy<Value = String> {
    r"[^\p{C}\p{Zl}\p{Zp}]*"
}

prop_compose! {
    fn transitions()(
        (time_ns, id, cookie, netns) in (any::<u64>(), ids(), any::<Option<u64>>(), any::<Option<u32>>()),
        (family, local, remote) in (one_of(), endpoints(), endpoints()),
        (from, to) in any::<(u8, u8)>(),
        (dwell_ns, evidence, role) in (any::<Option<u64>>(), one_of(), prop::option::of(one_of())),
        (owner, uid, container) in (owners(), any::<Option<u32>>(), prop::option::of(texts())),
        end in prop::option::of(one_of()),
    ) -> Line {
        Line::Transition(Transition {
            time_ns, id, cookie, netns, family, local, remote,
            from: TcpState::from_kernel(from),
            to: TcpState::from_kernel(to),
            dwell_ns, evidence, role, owner, uid,
            container: container.map(Into::into),
            end,
        })
    }
}

prop_compose! {
    fn starts()(
        (time_ns, host, boot_id, version) in (any::<u64>(), texts(), texts(), texts()),
        source in one_of(),
        inode in any::<Option<u32>>(),
    ) -> Line {
        let netns = inode.map_or(NetnsSelection::All, NetnsSelection::One);
        Line::Start(Start { time_ns, host, boot_id, version, source, netns })
    }
}

fn any_line() -> impl Strategy<Value = Line> {
    let losses = (any::<u64>(), any::<u64>(), one_of()).prop_map(|(time_ns, count, reason)| {
        Line::Lost(Loss {
            time_ns,
            count,
            reason,
        })
    });
    prop_oneof![starts(), transitions(), losses]
}

proptest! {
    #[test]
    fn json_can_be_read_back(lines in prop::collection::vec(any_line(), 1..5)) {
        let (mut writer, mut out) = (LineWriter::json(), Vec::new());
        for line in &lines {
            writer.write(line, &mut out);
        }
        let text = String::from_utf8(out).unwrap();
        prop_assert_eq!(text.lines().count(), lines.len());
        for (number, (text, line)) in text.lines().zip(lines).enumerate() {
            let (seq, read) = parse_line(text).unwrap().unwrap();
            prop_assert_eq!(seq, number as u64);
            prop_assert_eq!(read, line);
        }
    }

    #[test]
    fn no_output_lets_a_name_through_as_it_is(comm in prop::collection::vec(1u8.., 0..16)) {
        let line = Line::Transition(Transition {
            owner: owner(1, &comm, OwnerSource::Connect),
            ..transition()
        });
        for &format in Format::ALL {
            let look = Look { color: false, zone: TimeZone::UTC };
            let mut out = Vec::new();
            LineWriter::new(format, look, Rows::Transitions).write(&line, &mut out);
            let text = String::from_utf8(out).unwrap();
            prop_assert!(text.ends_with('\n'));
            prop_assert!(!text.trim_end_matches('\n').contains(char::is_control), "{text:?}");
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in ".{0,80}") {
        let _ = parse_line(&text);
    }
}

#[test]
fn what_a_later_version_adds_is_passed_over() {
    let known = r#"{"type":"lost","schema":1,"seq":3,"time":"2026-11-20T23:10:11.123456789Z","count":1,"reason":"decode","since":"x"}"#;
    assert!(matches!(
        parse_line(known),
        Ok(Some((3, Line::Lost(Loss { count: 1, .. }))))
    ));
    let kind = known.replace("lost", "note");
    assert!(matches!(parse_line(&kind), Ok(None)));
}

#[test]
fn what_can_not_be_shown_is_refused_with_its_value() {
    let line = |reason: &str, schema: u32| {
        format!(
            r#"{{"type":"lost","schema":{schema},"seq":3,"time":"2026-11-20T23:10:11.5Z","count":1,"reason":"{reason}"}}"#
        )
    };
    let error = |line: &str| parse_line(line).unwrap_err().to_string();
    assert_eq!(
        error(&line("flood", 1)),
        "field `reason`: unknown loss reason `flood`; known: ring_full, recursion, slow_reader, decode, table_full"
    );
    assert_eq!(
        error(&line("decode", 2)),
        "schema 2 is not the 1 that this version reads; use the same version on both sides"
    );
    assert!(error("{").starts_with("not a line of a stream: EOF"));
}

/// Whoever serves the socket must not get at the terminal of whoever reads it.
#[test]
fn text_that_does_something_to_a_terminal_is_refused() {
    let with = |container: &str| {
        let mut out = Vec::new();
        let line = Transition {
            container: Some(container.into()),
            ..transition()
        };
        LineWriter::json().write(&Line::Transition(line), &mut out);
        parse_line(std::str::from_utf8(&out).unwrap()).map(drop)
    };
    for hostile in ["\u{1b}[2J", "a\nb", "\u{9b}2J", "\u{202e}dcba", "\u{7f}"] {
        let error = with(hostile).unwrap_err().to_string();
        let shown = hostile.escape_debug();
        assert_eq!(
            error,
            format!("field `container`: `{shown}` can't be printed")
        );
    }
    for harmless in ["8f3c1d2e4b5a", "a \"b\" \\ 'c'", "caf\u{e9}"] {
        assert!(with(harmless).is_ok());
    }
}
