//! Scripts of events.

use super::*;

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
    let socket = &watched.table.mini.get(7).unwrap().socket;
    assert_eq!(socket.local.port, Some(1007));
}

/// Up to 6.12 the child's first event has its listener's cookie and no remote end, from 6.18 its own.
#[test]
fn an_accepted_socket_never_moves_its_listener() {
    let listener = by(
        with(event(1, 3, CLOSE, LISTEN), |event| {
            event.local_port = SERVER_PORT;
        }),
        42,
        "nginx",
    );
    for (identity, first_cookie, first_port) in [
        (Identity::Cookie, 3, 0),
        (Identity::Cookie, 9, 1007),
        (Identity::Address, 0, 0),
        (Identity::Address, 3, 0),
        (Identity::Ends, 0, 1007),
    ] {
        let child = |time, from, to| {
            with(event(time, 9, from, to), |event| {
                event.local_port = SERVER_PORT;
                event.remote_port = 1007;
            })
        };
        let first = with(child(5, LISTEN, SYN_RECV), |event| {
            event.cookie = first_cookie;
            event.remote_port = first_port;
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
    type Case = (&'static str, TcpState, i32, u8, u8, TcpState, Option<End>);
    let cases: [Case; 18] = [
        (
            "reset",
            ESTABLISHED,
            104,
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
            CLOSE,
            Some(End::ResetSent),
        ),
        (
            "unread after half-close",
            FIN_WAIT2,
            0,
            3,
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
            CLOSE,
            Some(End::ResetSent),
        ),
        (
            "disconnect",
            ESTABLISHED,
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
            CLOSE,
            Some(End::ResetReceived),
        ),
        ("ss -K", ESTABLISHED, 103, 0, 0, CLOSE, Some(End::ResetSent)),
        (
            "ss -K of a connect",
            SYN_SENT,
            103,
            0,
            0,
            CLOSE,
            Some(End::Aborted),
        ),
        ("refused", SYN_SENT, 111, 0, 0, CLOSE, Some(End::Refused)),
        ("no answer", SYN_SENT, 110, 0, 0, CLOSE, Some(End::Timeout)),
        (
            "no route",
            SYN_SENT,
            113,
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
            CLOSE,
            Some(End::Aborted),
        ),
        ("out of ports", SYN_SENT, 0, 0, 0, CLOSE, Some(End::Unknown)),
        (
            "peer closed first",
            LAST_ACK,
            0,
            3,
            FLAG_DEAD,
            CLOSE,
            Some(End::RemoteClose),
        ),
        (
            "peer's FIN",
            FIN_WAIT2,
            0,
            3,
            FLAG_DONE,
            TIME_WAIT,
            Some(End::LocalClose),
        ),
        (
            "both closed",
            CLOSING,
            0,
            3,
            FLAG_DEAD,
            TIME_WAIT,
            Some(End::SimultaneousClose),
        ),
        ("orphan", FIN_WAIT2, 0, 3, FLAG_DEAD, FIN_WAIT2, None),
        (
            "orphan, TCP_LINGER2 -1",
            FIN_WAIT2,
            0,
            3,
            FLAG_DEAD | FLAG_NO_LINGER,
            CLOSE,
            Some(End::ResetSent),
        ),
    ];
    for (name, from, sk_err, shutdown, flags, state, expected) in cases {
        let close = with(event(9, 5, from, CLOSE), |event| {
            event.sk_err = sk_err;
            event.shutdown = shutdown;
            event.flags |= flags;
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
    let first = with(event(1, 5, LISTEN, SYN_RECV), |event| event.remote_port = 0);
    let mut watched = run(Identity::Cookie, &[first]);
    assert_eq!(watched.seen, []);
    watched.take(|table, sink| table.flush_children(2 * MS, sink));
    assert_eq!(watched.last().kernel, Some((LISTEN, SYN_RECV)));
    assert_eq!(watched.last().id, "~1");
    assert!(watched.table.is_empty());
}

/// By TCP Fast Open it can stay in SYN_RECV for long.
#[test]
fn an_accepted_socket_that_its_first_event_tells_is_there_at_once() {
    let listen = with(event(1, 3, CLOSE, LISTEN), |event| event.local_port = 1009);
    let first = event(5, 9, LISTEN, SYN_RECV);
    let mut watched = run(Identity::Cookie, &[by(listen, 42, "nginx"), first]);
    assert_eq!(watched.last().id, "9.0");
    watched.take(|table, sink| table.flush_children(u64::MAX, sink));
    watched.reconcile(&dump(3000, 3001, vec![record(3000, 9, SYN_RECV)]));
    watched.apply(&event(4000, 9, SYN_RECV, ESTABLISHED));
    assert_eq!(watched.last().dwell, Dwell::Seen(3995 * MS));
    assert_eq!(watched.last().role, Some(Role::Passive));
    assert_eq!(watched.last().source, Some(OwnerSource::Listener));
    assert_eq!(watched.table.corrections(), [0; 4]);
}

#[test]
fn an_event_without_the_cookie_that_each_should_have_is_refused() {
    let nameless = with(event(1, 5, SYN_SENT, ESTABLISHED), |event| event.cookie = 0);
    for identity in [Identity::Cookie, Identity::Address] {
        let mut table = Table::new(identity);
        let taken = table.apply(&nameless, None, |_| {});
        assert_eq!(taken.is_ok(), identity == Identity::Address);
        assert_eq!(table.len(), usize::from(taken.is_ok()));
    }
}
