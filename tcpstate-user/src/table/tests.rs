//! The table against scripts of events, and against a kernel in miniature whose dumps are not atomic.

mod owners;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use tcpstate_common::TcpState;
use tcpstate_common::event::{
    AF_INET, FLAG_DEAD, FLAG_DONE, FLAG_SOCKET_READ, FLAG_TASK, SEND_SHUTDOWN, SetState,
};
use zerocopy::FromZeros as _;

use super::{
    Change, Discard, Dwell, Identity, Place, Record, STORE_NS, Snapshot, Socket, StateMask, Table,
    Unreachable,
};
use crate::model::{Comm, End, Endpoint, Evidence, Family, OwnerSource, Role};

const CLOSE: TcpState = TcpState::CLOSE;
const LISTEN: TcpState = TcpState::LISTEN;
const SYN_SENT: TcpState = TcpState::SYN_SENT;
const SYN_RECV: TcpState = TcpState::SYN_RECV;
const ESTABLISHED: TcpState = TcpState::ESTABLISHED;
const FIN_WAIT1: TcpState = TcpState::FIN_WAIT1;
const FIN_WAIT2: TcpState = TcpState::FIN_WAIT2;
const TIME_WAIT: TcpState = TcpState::TIME_WAIT;
const CLOSE_WAIT: TcpState = TcpState::CLOSE_WAIT;
const LAST_ACK: TcpState = TcpState::LAST_ACK;
const CLOSING: TcpState = TcpState::CLOSING;
const NEW_SYN_RECV: TcpState = TcpState::NEW_SYN_RECV;

const NETNS: u32 = 4_026_531_840;
const MS: u64 = 1_000_000;
const SERVER_PORT: u16 = 80;

/// An event of a loopback socket; `socket` stands for its cookie, its address and its local port.
fn event(time_ms: u64, socket: u16, from: TcpState, to: TcpState) -> SetState {
    let mut addr = [0; 16];
    addr[10..].copy_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
    SetState {
        time_ns: time_ms * MS,
        sk: 0xffff_8880_0000_0000 + u64::from(socket) * 4096,
        cookie: u64::from(socket),
        netns: NETNS,
        uid: 1000,
        local_addr: addr,
        remote_addr: addr,
        local_port: 1000 + socket,
        remote_port: SERVER_PORT,
        family: AF_INET,
        from: from.number(),
        to: to.number(),
        flags: FLAG_SOCKET_READ,
        ..SetState::new_zeroed()
    }
}

fn with(mut event: SetState, change: impl FnOnce(&mut SetState)) -> SetState {
    change(&mut event);
    event
}

fn by(event: SetState, pid: u32, comm: &str) -> SetState {
    with(event, |event| {
        event.flags |= FLAG_TASK;
        event.tgid = pid;
        event.start_ns = u64::from(pid);
        event.comm[..comm.len()].copy_from_slice(comm.as_bytes());
    })
}

/// What a test keeps of a change.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    id: String,
    kernel: Option<(TcpState, TcpState)>,
    shown: Option<(TcpState, TcpState)>,
    dwell: Dwell,
    evidence: Evidence,
    end: Option<End>,
    pid: Option<u32>,
    source: Option<OwnerSource>,
    role: Option<Role>,
    uid: Option<u32>,
    time_ms: u64,
}

impl Seen {
    fn of(change: &Change<'_>) -> Self {
        let owner = change.socket.owner;
        Self {
            id: change.socket.id.to_string(),
            kernel: change.kernel,
            shown: change.shown,
            dwell: change.dwell,
            evidence: change.evidence,
            end: change.end,
            pid: owner.map(|owner| owner.process.pid),
            source: owner.map(|owner| owner.source),
            role: change.socket.role,
            uid: change.socket.uid,
            time_ms: change.time_ns / MS,
        }
    }
}

/// A table whose changes are kept, and whose gauges are added up from them as `stats` does.
struct Watched {
    table: Table,
    seen: Vec<Seen>,
    gauges: BTreeMap<(TcpState, Option<Comm>), i64>,
}

impl Watched {
    fn new(identity: Identity) -> Self {
        Self {
            table: Table::new(identity),
            seen: Vec::new(),
            gauges: BTreeMap::new(),
        }
    }

    fn take(&mut self, change: impl FnOnce(&mut Table, &mut dyn FnMut(&Change<'_>))) {
        let (seen, gauges) = (&mut self.seen, &mut self.gauges);
        change(&mut self.table, &mut |change| {
            for (place, step) in [(change.before, -1), (change.after, 1)] {
                if let Some(Place { state, comm }) = place {
                    let gauge = gauges.entry((state, comm)).or_default();
                    *gauge += step;
                    assert!(*gauge >= 0, "gauge of {state} below 0 by {change:?}");
                }
            }
            seen.push(Seen::of(change));
        });
        self.check_gauges();
    }

    fn apply(&mut self, event: &SetState) {
        self.take(|table, sink| table.apply(event, None, sink));
    }

    fn reconcile(&mut self, snapshot: &Snapshot) {
        self.take(|table, sink| {
            table.reconcile(snapshot, sink);
        });
    }

    /// The gauges added up from the changes are those of the sockets that the table holds.
    fn check_gauges(&self) {
        let mut held: BTreeMap<_, i64> = BTreeMap::new();
        let full = self.table.full.values().map(|full| &full.socket);
        let mini = self.table.mini.values().map(|mini| &mini.socket);
        for socket in full.chain(mini) {
            let Place { state, comm } = Place::of(socket);
            *held.entry((state, comm)).or_default() += 1;
        }
        let mut gauges = self.gauges.clone();
        gauges.retain(|_, count| *count != 0);
        assert_eq!(gauges, held);
    }

    fn shown(&self) -> Vec<(TcpState, TcpState)> {
        self.seen.iter().filter_map(|seen| seen.shown).collect()
    }

    fn last(&self) -> &Seen {
        self.seen.last().expect("a change")
    }

    /// Of each cookie; the table must not hold one twice.
    fn states(&self) -> BTreeMap<u64, TcpState> {
        let full = self.table.full.values().map(|full| &full.socket);
        let mini = self.table.mini.values().map(|mini| &mini.socket);
        let mut states = BTreeMap::new();
        for socket in full.chain(mini) {
            if let Some(cookie) = socket.cookie {
                let twice = states.insert(cookie, socket.state);
                assert_eq!(twice, None, "{socket:?} is there twice");
            }
        }
        states
    }
}

fn run(identity: Identity, events: &[SetState]) -> Watched {
    let mut watched = Watched::new(identity);
    for event in events {
        watched.apply(event);
    }
    watched
}

fn record(time_ms: u64, socket: u16, state: TcpState) -> Record {
    let local = Endpoint {
        addr: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        port: Some(1000 + socket),
    };
    let remote = Endpoint {
        port: Some(SERVER_PORT),
        ..local
    };
    Record {
        cookie: u64::from(socket),
        netns: NETNS,
        family: Family::Ipv4,
        local,
        remote: if state == LISTEN {
            Endpoint::default()
        } else {
            remote
        },
        state,
        uid: Some(1000),
        inode: 1,
        expires_ns: matches!(state, TIME_WAIT | NEW_SYN_RECV).then_some(30_000 * MS),
        read_ns: (time_ms * MS, time_ms * MS),
    }
}

fn dump(from_ms: u64, to_ms: u64, records: Vec<Record>) -> Snapshot {
    Snapshot {
        records,
        netns: vec![NETNS],
        unreachable: Vec::<Unreachable>::new(),
        started_ns: from_ms * MS,
        finished_ns: to_ms * MS,
        states: StateMask::ALL,
        whole_host: true,
    }
}

#[test]
fn a_connect_that_is_closed_first_goes_to_time_wait() {
    let watched = run(
        Identity::Cookie,
        &[
            by(
                with(event(10, 7, CLOSE, SYN_SENT), |event| event.local_port = 0),
                42,
                "curl",
            ),
            event(11, 7, SYN_SENT, ESTABLISHED),
            by(event(21, 7, ESTABLISHED, FIN_WAIT1), 43, "other"),
            event(22, 7, FIN_WAIT1, FIN_WAIT2),
            with(event(25, 7, FIN_WAIT2, CLOSE), |event| {
                event.flags |= FLAG_DONE;
            }),
        ],
    );
    assert_eq!(
        watched.shown(),
        [
            (CLOSE, SYN_SENT),
            (SYN_SENT, ESTABLISHED),
            (ESTABLISHED, FIN_WAIT1),
            (FIN_WAIT1, FIN_WAIT2),
            (FIN_WAIT2, TIME_WAIT)
        ]
    );
    assert_eq!(
        watched.last(),
        &Seen {
            id: "7.0".into(),
            kernel: Some((FIN_WAIT2, CLOSE)),
            shown: Some((FIN_WAIT2, TIME_WAIT)),
            dwell: Dwell::Seen(3 * MS),
            evidence: Evidence::Inferred,
            end: Some(End::LocalClose),
            // Closing never changes a known owner.
            pid: Some(42),
            source: Some(OwnerSource::Connect),
            role: Some(Role::Active),
            uid: Some(1000),
            time_ms: 25,
        }
    );
    let dwells: Vec<Dwell> = watched.seen.iter().map(|seen| seen.dwell).collect();
    let seen = |ms| Dwell::Seen(ms * MS);
    assert_eq!(dwells, [Dwell::None, seen(1), seen(10), seen(1), seen(3)]);
    let socket = &watched.table.mini[&7].socket;
    assert_eq!(socket.local.port, Some(1007));
}

/// Up to 6.12 the child's first event has its listener's cookie, from 6.18 its own.
#[test]
fn an_accepted_socket_never_moves_its_listener() {
    let listener = by(
        with(event(1, 3, CLOSE, LISTEN), |event| {
            event.local_port = SERVER_PORT;
        }),
        42,
        "nginx",
    );
    for (identity, first_cookie) in [
        (Identity::Cookie, 3),
        (Identity::Cookie, 9),
        (Identity::Address, 0),
    ] {
        let child = |time, from, to| {
            with(event(time, 9, from, to), |event| {
                event.local_port = SERVER_PORT;
                event.remote_port = 1007;
            })
        };
        let first = with(child(5, LISTEN, SYN_RECV), |event| {
            event.cookie = first_cookie;
            event.remote_port = 0;
        });
        let watched = run(
            identity,
            &[listener, first, child(6, SYN_RECV, ESTABLISHED)],
        );
        assert_eq!(
            watched.gauges[&(LISTEN, Some(Comm::from_bytes(b"nginx")))],
            1
        );
        assert_eq!(
            watched.shown(),
            [
                (CLOSE, LISTEN),
                (NEW_SYN_RECV, SYN_RECV),
                (SYN_RECV, ESTABLISHED)
            ]
        );
        let [listener, first, second] = &watched.seen[..] else {
            panic!("{:?}", watched.seen);
        };
        assert_eq!(first.id, second.id);
        assert_ne!(first.id, listener.id);
        assert_eq!(first.kernel, Some((LISTEN, SYN_RECV)));
        assert_eq!((first.dwell, first.time_ms), (Dwell::None, 5));
        assert_eq!(second.dwell, Dwell::Seen(MS));
        for child in [first, second] {
            assert_eq!(child.uid, Some(1000));
            assert_eq!(child.role, Some(Role::Passive));
            assert_eq!(child.source, Some(OwnerSource::Listener));
            assert_eq!(child.pid, Some(42));
        }
        assert_eq!(
            (listener.role, listener.source),
            (None, Some(OwnerSource::Listen))
        );
    }
}

#[test]
fn of_two_processes_that_share_a_port_neither_is_named() {
    let listener = |socket, pid| {
        let listen = with(event(1, socket, CLOSE, LISTEN), |event| {
            event.local_port = SERVER_PORT;
        });
        by(listen, pid, "worker")
    };
    let child = |from, to| {
        with(event(5, 9, from, to), |event| {
            event.local_port = SERVER_PORT;
        })
    };
    let accept = [child(LISTEN, SYN_RECV), child(SYN_RECV, ESTABLISHED)];
    let two = [&[listener(3, 42), listener(4, 43)], &accept[..]].concat();
    assert_eq!(run(Identity::Cookie, &two).last().source, None);
    let one = [&[listener(3, 42), listener(4, 42)], &accept[..]].concat();
    assert_eq!(run(Identity::Cookie, &one).last().pid, Some(42));
}

#[test]
fn the_closer_owns_only_what_nobody_else_is_known_to_own() {
    let closed = by(event(9, 5, ESTABLISHED, FIN_WAIT1), 42, "worker");
    let watched = run(Identity::Cookie, &[closed]);
    assert_eq!(watched.last().source, Some(OwnerSource::Closer));
    assert_eq!(watched.last().dwell, Dwell::Unknown(Discard::StartUnseen));
    // `ss -K` of a listener, and its close.
    let killed = by(event(9, 5, LISTEN, CLOSE), 42, "ss");
    assert_eq!(run(Identity::Cookie, &[killed]).last().pid, None);
    let closed = with(killed, |event| event.shutdown = 3);
    assert_eq!(run(Identity::Cookie, &[closed]).last().pid, Some(42));
    // Without the flag the process is a bystander.
    let received = event(9, 5, ESTABLISHED, CLOSE_WAIT);
    assert_eq!(run(Identity::Cookie, &[received]).last().pid, None);
}

#[test]
fn what_a_close_meant() {
    type Case = (
        &'static str,
        TcpState,
        i32,
        u8,
        u8,
        i32,
        TcpState,
        Option<End>,
    );
    let cases: [Case; 18] = [
        (
            "reset",
            ESTABLISHED,
            104,
            0,
            0,
            0,
            CLOSE,
            Some(End::ResetReceived),
        ),
        (
            "linger 0",
            ESTABLISHED,
            0,
            3,
            0,
            0,
            CLOSE,
            Some(End::ResetSent),
        ),
        (
            "unread after half-close",
            FIN_WAIT2,
            0,
            3,
            0,
            0,
            CLOSE,
            Some(End::ResetSent),
        ),
        (
            "linger 0 after half-close",
            FIN_WAIT1,
            0,
            3,
            0,
            0,
            CLOSE,
            Some(End::ResetSent),
        ),
        (
            "disconnect",
            ESTABLISHED,
            0,
            0,
            0,
            0,
            CLOSE,
            Some(End::ResetSent),
        ),
        (
            "reset in CLOSE_WAIT",
            CLOSE_WAIT,
            32,
            0,
            0,
            0,
            CLOSE,
            Some(End::ResetReceived),
        ),
        (
            "ss -K",
            ESTABLISHED,
            103,
            0,
            0,
            0,
            CLOSE,
            Some(End::ResetSent),
        ),
        (
            "ss -K of a connect",
            SYN_SENT,
            103,
            0,
            0,
            0,
            CLOSE,
            Some(End::Aborted),
        ),
        ("refused", SYN_SENT, 111, 0, 0, 0, CLOSE, Some(End::Refused)),
        (
            "no answer",
            SYN_SENT,
            110,
            0,
            0,
            0,
            CLOSE,
            Some(End::Timeout),
        ),
        (
            "no route",
            SYN_SENT,
            113,
            0,
            0,
            0,
            CLOSE,
            Some(End::Unreachable),
        ),
        (
            "given up",
            SYN_SENT,
            0,
            SEND_SHUTDOWN,
            0,
            0,
            CLOSE,
            Some(End::Aborted),
        ),
        (
            "out of ports",
            SYN_SENT,
            0,
            0,
            0,
            0,
            CLOSE,
            Some(End::Unknown),
        ),
        (
            "peer closed first",
            LAST_ACK,
            0,
            3,
            FLAG_DEAD,
            0,
            CLOSE,
            Some(End::RemoteClose),
        ),
        (
            "peer's FIN",
            FIN_WAIT2,
            0,
            3,
            FLAG_DONE,
            0,
            TIME_WAIT,
            Some(End::LocalClose),
        ),
        (
            "both closed",
            CLOSING,
            0,
            3,
            FLAG_DEAD,
            0,
            TIME_WAIT,
            Some(End::SimultaneousClose),
        ),
        ("orphan", FIN_WAIT2, 0, 3, FLAG_DEAD, 0, FIN_WAIT2, None),
        (
            "orphan, TCP_LINGER2 -1",
            FIN_WAIT2,
            0,
            3,
            FLAG_DEAD,
            -1,
            CLOSE,
            Some(End::ResetSent),
        ),
    ];
    for (name, from, sk_err, shutdown, flags, linger2, state, expected) in cases {
        let close = with(event(9, 5, from, CLOSE), |event| {
            event.sk_err = u16::try_from(sk_err).expect("an errno");
            event.shutdown = shutdown;
            event.flags |= flags;
            event.linger2 = linger2;
        });
        let watched = run(Identity::Cookie, &[event(8, 5, CLOSE, from), close]);
        assert_eq!(watched.last().end, expected, "{name}");
        let stays = (state != CLOSE).then_some(state);
        assert_eq!(watched.states().get(&5).copied(), stays, "{name}");
        let shown = (state != from).then_some((from, state));
        assert_eq!(watched.last().shown, shown, "{name}");
    }
}

#[test]
fn without_the_sockets_fields_a_dump_decides() {
    let blind = |from| {
        with(event(900, 5, from, CLOSE), |event| {
            event.flags = 0;
        })
    };
    let mut watched = run(
        Identity::Address,
        &[event(8, 5, CLOSE, FIN_WAIT2), blind(FIN_WAIT2)],
    );
    assert_eq!(watched.last().shown, None);
    watched.reconcile(&dump(2000, 2001, vec![record(2000, 5, TIME_WAIT)]));
    assert_eq!(watched.last().shown, Some((FIN_WAIT2, TIME_WAIT)));
    assert_eq!(watched.last().evidence, Evidence::Snapshot);
    let gone = run(
        Identity::Address,
        &[event(8, 5, CLOSE, ESTABLISHED), blind(ESTABLISHED)],
    );
    assert_eq!(gone.last().end, Some(End::Unknown));
}

#[test]
fn a_socket_connected_again_gets_a_new_generation() {
    let connect = |time| event(time, 5, CLOSE, SYN_SENT);
    let refused = |time| with(event(time, 5, SYN_SENT, CLOSE), |event| event.sk_err = 111);
    let events = [connect(1), refused(2), connect(3), refused(4), connect(5)];
    let watched = run(Identity::Cookie, &events);
    let ids: Vec<&str> = watched.seen.iter().map(|seen| seen.id.as_str()).collect();
    assert_eq!(ids, ["5.0", "5.0", "5.1", "5.1", "5.2"]);
    let watched = run(Identity::Address, &events);
    let ids: Vec<&str> = watched.seen.iter().map(|seen| seen.id.as_str()).collect();
    assert_eq!(ids, ["~1", "~1", "~2", "~2", "~3"]);
}

#[test]
fn no_ops_end_no_stay() {
    let watched = run(
        Identity::Cookie,
        &[
            event(1, 5, FIN_WAIT1, FIN_WAIT2),
            event(2, 5, FIN_WAIT2, FIN_WAIT2),
            event(4, 5, FIN_WAIT2, LAST_ACK),
            event(5, 6, CLOSE, CLOSE),
        ],
    );
    assert_eq!(watched.seen[1].shown, None);
    assert_eq!(watched.seen[1].kernel, Some((FIN_WAIT2, FIN_WAIT2)));
    assert_eq!(watched.seen[2].dwell, Dwell::Seen(3 * MS));
    assert_eq!(watched.seen[3].shown, None);
    assert_eq!(watched.states(), BTreeMap::from([(5, LAST_ACK)]));
}

#[test]
fn a_stay_that_spans_a_loss_has_no_dwell() {
    let mut watched = run(Identity::Cookie, &[event(1, 5, SYN_SENT, ESTABLISHED)]);
    watched.table.events_lost(3 * MS);
    watched.apply(&event(4, 5, ESTABLISHED, CLOSE_WAIT));
    assert_eq!(watched.last().dwell, Dwell::Unknown(Discard::Lost));
    watched.apply(&event(6, 5, CLOSE_WAIT, LAST_ACK));
    assert_eq!(watched.last().dwell, Dwell::Seen(2 * MS));
}

#[test]
fn an_event_that_does_not_fit_wins_and_is_counted() {
    let mut watched = run(Identity::Cookie, &[event(1, 5, CLOSE, SYN_SENT)]);
    watched.reconcile(&dump(2, 3, vec![]));
    watched.apply(&event(4, 5, CLOSE_WAIT, LAST_ACK));
    assert_eq!(watched.last().dwell, Dwell::Unknown(Discard::Mismatch));
    assert_eq!(watched.states(), BTreeMap::from([(5, LAST_ACK)]));
    assert_eq!(watched.table.corrections(), [1, 0, 0, 0]);
}

#[test]
fn a_first_event_whose_second_was_lost_is_shown_and_forgotten() {
    let mut watched = run(Identity::Cookie, &[event(1, 5, LISTEN, SYN_RECV)]);
    assert_eq!(watched.seen, []);
    watched.take(|table, sink| table.flush_children(2 * MS, sink));
    assert_eq!(watched.last().kernel, Some((LISTEN, SYN_RECV)));
    assert_eq!(watched.last().id, "~1");
    assert!(watched.table.is_empty());
}

#[test]
fn a_time_wait_ends_when_a_dump_lacks_it_and_is_dated_by_its_timer() {
    let closed = with(event(1000, 7, FIN_WAIT2, CLOSE), |event| {
        event.flags |= FLAG_DONE;
    });
    let mut watched = run(
        Identity::Cookie,
        &[event(1, 7, FIN_WAIT1, FIN_WAIT2), closed],
    );
    watched.reconcile(&dump(30_000, 30_001, vec![record(30_000, 7, TIME_WAIT)]));
    assert_eq!(watched.states(), BTreeMap::from([(7, TIME_WAIT)]));
    watched.reconcile(&dump(70_000, 70_001, vec![]));
    let last = watched.last();
    assert_eq!(last.shown, Some((TIME_WAIT, CLOSE)));
    // The record's timer had 30 s left at 30 s.
    assert_eq!((last.time_ms, last.evidence), (60_000, Evidence::Snapshot));
    assert_eq!((last.end, last.dwell), (None, Dwell::None));
    assert_eq!(watched.table.corrections(), [0; 4]);
    // One that goes before its time is believed gone by the second dump.
    watched.apply(&with(event(80_000, 8, CLOSING, CLOSE), |_| ()));
    watched.reconcile(&dump(81_000, 81_001, vec![]));
    assert_eq!(watched.states(), BTreeMap::from([(8, TIME_WAIT)]));
    watched.reconcile(&dump(82_000, 82_001, vec![]));
    assert_eq!(watched.states(), BTreeMap::new());
}

#[test]
fn a_request_becomes_the_accepted_socket() {
    for identity in [Identity::Cookie, Identity::Address] {
        let mut watched = Watched::new(identity);
        watched.reconcile(&dump(10, 11, vec![record(10, 9, NEW_SYN_RECV)]));
        watched.apply(&event(20, 9, LISTEN, SYN_RECV));
        watched.apply(&event(21, 9, SYN_RECV, ESTABLISHED));
        assert_eq!(watched.gauges[&(NEW_SYN_RECV, None)], 0, "{identity:?}");
        assert_eq!(watched.gauges[&(ESTABLISHED, None)], 1, "{identity:?}");
        assert_eq!(watched.table.len(), 1);
    }
}

#[test]
fn without_cookies_a_socket_of_a_dump_meets_its_events_by_its_ends() {
    let mut watched = Watched::new(Identity::Address);
    watched.reconcile(&dump(10, 11, vec![record(10, 9, ESTABLISHED)]));
    watched.apply(&event(900, 9, ESTABLISHED, CLOSE_WAIT));
    watched.reconcile(&dump(2000, 2001, vec![record(2000, 9, CLOSE_WAIT)]));
    assert_eq!(watched.gauges[&(CLOSE_WAIT, None)], 1);
    assert_eq!(watched.table.len(), 1);
    assert_eq!(watched.table.corrections(), [0; 4]);
}

/// The classic tracepoint tells no namespace, a dump does.
#[test]
fn without_netns_a_dump_and_events_are_of_the_same_socket() {
    let blind = |time, from, to| {
        with(event(time, 9, from, to), |event| {
            (event.flags, event.netns, event.cookie) = (0, 0, 0);
        })
    };
    let connect = by(blind(1, CLOSE, SYN_SENT), 42, "curl");
    let mut watched = run(
        Identity::AddressWithoutNetns,
        &[connect, blind(2, SYN_SENT, ESTABLISHED)],
    );
    for time in [1000, 2000, 3000] {
        watched.reconcile(&dump(time, time, vec![record(time, 9, ESTABLISHED)]));
    }
    assert_eq!(
        watched.gauges[&(ESTABLISHED, Some(Comm::from_bytes(b"curl")))],
        1
    );
    assert_eq!(watched.table.len(), 1);
    assert_eq!(watched.table.corrections(), [0; 4]);
    // The record may be that of another socket: nothing is taken from it.
    let socket = watched.table.full.values().next().map(|full| &full.socket);
    assert_eq!(socket.and_then(|socket| socket.netns), None);
    // And one that a dump found first.
    watched.reconcile(&dump(4000, 4000, vec![record(4000, 8, ESTABLISHED)]));
    watched.apply(&with(blind(5000, ESTABLISHED, CLOSE_WAIT), |event| {
        event.sk += 4096;
        event.local_port = 1008;
    }));
    assert_eq!(watched.gauges[&(CLOSE_WAIT, None)], 1);
    assert_eq!(watched.table.corrections(), [0, 0, 1, 0]);
}

#[test]
fn what_a_namespace_held_goes_with_it() {
    let closed = with(event(1000, 7, FIN_WAIT2, CLOSE), |event| {
        event.flags |= FLAG_DONE;
    });
    let mut watched = run(
        Identity::Cookie,
        &[event(1, 7, FIN_WAIT1, FIN_WAIT2), closed],
    );
    watched.apply(&event(900, 8, CLOSE, ESTABLISHED));
    let here = vec![record(1500, 7, TIME_WAIT), record(1500, 8, ESTABLISHED)];
    watched.reconcile(&dump(1500, 1501, here));
    let elsewhere = |time| Snapshot {
        netns: vec![NETNS + 1],
        ..dump(time, time, vec![])
    };
    // A dump of one namespace says nothing of another.
    for time in [2000, 3000] {
        watched.reconcile(&Snapshot {
            whole_host: false,
            ..elsewhere(time)
        });
    }
    assert_eq!(watched.table.len(), 2);
    // Nor does one that could not enter it.
    for time in [4000, 5000] {
        watched.reconcile(&Snapshot {
            unreachable: vec![Unreachable {
                netns: Some(NETNS),
                reason: "no right".to_owned(),
            }],
            ..elsewhere(time)
        });
    }
    assert_eq!(watched.table.len(), 2);
    for time in [6000, 7000] {
        watched.reconcile(&elsewhere(time));
    }
    assert_eq!(watched.states(), BTreeMap::new());
    assert_eq!(watched.table.corrections(), [0; 4]);
}

/// The dump read it in one state, and events moved it on before the merge.
#[test]
fn a_dump_brings_back_nothing_that_changed_its_kind() {
    let mut watched = Watched::new(Identity::Cookie);
    watched.table.snapshot_begins();
    watched.apply(&event(1100, 7, ESTABLISHED, FIN_WAIT1));
    watched.apply(&event(1101, 7, FIN_WAIT1, FIN_WAIT2));
    watched.apply(&with(event(1102, 7, FIN_WAIT2, CLOSE), |event| {
        event.flags |= FLAG_DONE;
    }));
    watched.apply(&event(1100, 9, LISTEN, SYN_RECV));
    watched.apply(&event(1100, 9, SYN_RECV, ESTABLISHED));
    let read_before = vec![record(1000, 7, ESTABLISHED), record(1000, 9, NEW_SYN_RECV)];
    watched.reconcile(&dump(990, 1200, read_before));
    let expected = BTreeMap::from([(7, TIME_WAIT), (9, ESTABLISHED)]);
    assert_eq!(watched.states(), expected);
    assert_eq!(watched.table.len(), 2);
}

#[test]
fn a_close_into_time_wait_that_was_lost_is_found() {
    let mut watched = run(Identity::Cookie, &[event(1, 7, SYN_SENT, ESTABLISHED)]);
    watched.table.events_lost(500 * MS);
    watched.reconcile(&dump(990, 1200, vec![record(1000, 7, TIME_WAIT)]));
    assert_eq!(watched.states(), BTreeMap::from([(7, TIME_WAIT)]));
    assert_eq!(watched.last().id, "7.0");
    assert_eq!(watched.last().shown, Some((ESTABLISHED, TIME_WAIT)));
    assert_eq!(watched.last().end, Some(End::Unknown));
}

/// No event tells that a connect or a SYN took a timewait socket out of its way.
#[test]
fn a_connection_ends_the_time_wait_of_the_one_that_had_its_ends() {
    let closed = with(event(1000, 7, FIN_WAIT2, CLOSE), |event| {
        event.flags |= FLAG_DONE;
    });
    for identity in [Identity::Cookie, Identity::Address] {
        let same_ends =
            |time, from, to| with(event(time, 8, from, to), |event| event.local_port = 1007);
        let before = [event(1, 7, FIN_WAIT1, FIN_WAIT2), closed];
        let connects = [
            with(same_ends(2000, CLOSE, SYN_SENT), |event| {
                event.local_port = 0
            }),
            same_ends(2001, SYN_SENT, ESTABLISHED),
        ];
        let accepts = [
            same_ends(2000, LISTEN, SYN_RECV),
            same_ends(2001, SYN_RECV, ESTABLISHED),
        ];
        for again in [connects, accepts] {
            let watched = run(identity, &[&before[..], &again[..]].concat());
            let ended = Some((TIME_WAIT, CLOSE));
            let end = watched.seen.iter().find(|seen| seen.shown == ended);
            let end = end.expect("the end of TIME_WAIT");
            assert_eq!((end.evidence, end.end), (Evidence::Inferred, None));
            assert_eq!(watched.gauges[&(TIME_WAIT, None)], 0);
            assert_eq!(watched.table.len(), 1);
        }
    }
}

/// A step of the kernel in miniature.
#[derive(Clone, Copy, Debug)]
struct Step {
    socket: usize,
    choice: u8,
    wait_ms: u64,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (0usize..6, any::<u8>(), 1u64..60).prop_map(|(socket, choice, wait_ms)| Step {
        socket,
        choice,
        wait_ms,
    });
    prop::collection::vec(step, 10..120)
}

/// Where a socket can go from a state. A →CLOSE from FIN_WAIT2 or CLOSING with DONE leaves a TIME_WAIT.
fn next(state: TcpState, choice: u8) -> TcpState {
    let ways: &[TcpState] = match state {
        CLOSE | TIME_WAIT => &[SYN_SENT],
        SYN_SENT => &[ESTABLISHED, ESTABLISHED, CLOSE],
        ESTABLISHED => &[FIN_WAIT1, CLOSE_WAIT, CLOSE],
        FIN_WAIT1 => &[FIN_WAIT2, CLOSING],
        FIN_WAIT2 | CLOSING => &[TIME_WAIT],
        CLOSE_WAIT => &[LAST_ACK],
        _ => &[CLOSE],
    };
    ways[usize::from(choice) % ways.len()]
}

#[derive(Clone, Copy)]
struct Moment {
    /// When the event was made, and when the kernel had stored the state.
    event_ms: u64,
    stored_ms: u64,
    socket: u16,
    from: TcpState,
    to: TcpState,
}

/// The history of some sockets, each with a cookie of its own for each life.
fn history(steps: &[Step]) -> Vec<Moment> {
    let mut states = [CLOSE; 6];
    let mut lives = [0u16; 6];
    let mut now = 1000;
    let mut moments = Vec::new();
    for step in steps {
        now += step.wait_ms;
        let from = states[step.socket];
        let to = next(from, step.choice);
        let opening = to == SYN_SENT;
        if opening {
            lives[step.socket] += 1;
        }
        moments.push(Moment {
            event_ms: now,
            stored_ms: now + u64::from(step.choice % 12),
            socket: lives[step.socket] * 6 + step.socket as u16,
            from: if opening { CLOSE } else { from },
            to,
        });
        states[step.socket] = to;
    }
    moments
}

/// What each socket is at `now_ms`; `stored`: as a dump sees it, which is late but for what closes.
fn states_at(moments: &[Moment], now_ms: u64, stored: bool) -> BTreeMap<u64, TcpState> {
    let mut states = BTreeMap::new();
    for moment in moments {
        let early = matches!(moment.to, CLOSE | TIME_WAIT) || !stored;
        let at = if early {
            moment.event_ms
        } else {
            moment.stored_ms
        };
        if at <= now_ms {
            states.insert(u64::from(moment.socket), moment.to);
        }
    }
    states.retain(|_, state| *state != CLOSE);
    states
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever happens while a dump is read, and whatever it misses under churn, the table is right after
    /// it, or after the next one where it missed something; and without a miss nothing was corrected.
    #[test]
    fn a_dump_that_is_not_atomic_merges_with_events(
        steps in steps(),
        attach in 0.0..0.5f64,
        begin in 0.0..1.0f64,
        length in 0u64..300,
        reads in prop::collection::vec(0.0..1.0f64, 200),
        misses in prop::collection::vec(prop::bool::weighted(0.05), 200),
        late_events in prop::bool::ANY,
    ) {
        let moments = history(&steps);
        let last_ms = moments.last().map_or(0, |moment| moment.event_ms);
        let at = |part: f64, from: u64| from + ((last_ms - from) as f64 * part) as u64;
        let attach_ms = at(attach, 1000);
        let begin_ms = at(begin, attach_ms) + STORE_NS / MS;
        let end_ms = begin_ms + length;

        let mut records = Vec::new();
        let mut missed = false;
        let sockets: std::collections::BTreeSet<u16> =
            moments.iter().map(|moment| moment.socket).collect();
        for (index, &socket) in sockets.iter().enumerate() {
            let read_ms = begin_ms + (length as f64 * reads[index % reads.len()]) as u64;
            let state = states_at(&moments, read_ms, true).get(&u64::from(socket)).copied();
            let Some(state) = state else { continue };
            if misses[index % misses.len()] {
                missed = true;
                continue;
            }
            records.push(record(read_ms, socket, state));
        }

        let mut watched = Watched::new(Identity::Cookie);
        let mut begun = false;
        let mut merged = false;
        let first = dump(begin_ms, end_ms, records);
        let kernel_event = |moment: &Moment| {
            let to = if moment.to == TIME_WAIT { CLOSE } else { moment.to };
            with(event(moment.event_ms, moment.socket, moment.from, to), |event| {
                if moment.to == TIME_WAIT {
                    event.flags |= FLAG_DONE;
                }
            })
        };
        for moment in moments.iter().filter(|moment| moment.event_ms > attach_ms) {
            if !begun && moment.event_ms >= begin_ms {
                watched.table.snapshot_begins();
                begun = true;
            }
            if !merged && !late_events && moment.event_ms > end_ms {
                watched.reconcile(&first);
                prop_assert!(missed || watched.states() == states_at(&moments, end_ms, false));
                merged = true;
            }
            watched.apply(&kernel_event(moment));
        }
        if !begun {
            watched.table.snapshot_begins();
        }
        if !merged {
            watched.reconcile(&first);
        }
        if !missed {
            prop_assert_eq!(watched.states(), states_at(&moments, last_ms, false));
            prop_assert_eq!(watched.table.corrections(), [0; 4]);
        }
        // One dump that lacks a socket ends nothing.
        let ended = |seen: &Seen| seen.evidence == Evidence::Snapshot && seen.shown.is_some();
        prop_assert_eq!(watched.seen.iter().find(|seen| ended(seen)), None);
        for round in 1..3 {
            let now = last_ms.max(end_ms) + round * 1000;
            let all = states_at(&moments, now, true);
            let records = all.iter().map(|(&socket, &state)| record(now, socket as u16, state));
            watched.table.snapshot_begins();
            watched.reconcile(&dump(now, now + 1, records.collect()));
        }
        prop_assert_eq!(watched.states(), states_at(&moments, last_ms, false));
    }

    /// Any bytes of the right length are a record: the table takes them without panic, and its gauges stay
    /// those of what it holds.
    #[test]
    fn no_events_break_the_table(
        events in prop::collection::vec((0u16..5, 0u8..16, 0u8..16, any::<u8>(), 0u16..120), 0..200),
        identity in prop::sample::select(vec![Identity::Cookie, Identity::Address]),
        dumps in prop::collection::vec((0u16..5, prop::sample::select(TcpState::ALL.to_vec())), 0..20),
    ) {
        let mut watched = Watched::new(identity);
        for (index, &(socket, from, to, flags, sk_err)) in events.iter().enumerate() {
            let index = index as u64;
            if index % 50 == 25 {
                let records = dumps.iter().map(|&(socket, state)| record(index, socket, state));
                watched.table.snapshot_begins();
                watched.reconcile(&dump(index, index, records.collect()));
            }
            let states = (TcpState::from_kernel(from), TcpState::from_kernel(to));
            watched.apply(&with(event(index, socket, states.0, states.1), |event| {
                event.flags = flags;
                event.sk_err = sk_err;
            }));
        }
        watched.take(|table, sink| table.flush_children(u64::MAX, sink));
    }
}
