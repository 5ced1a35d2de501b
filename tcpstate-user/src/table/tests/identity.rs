//! Where events have no cookie: which socket of the table a record of a dump is.

use super::*;

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
    let mut watched = run(Identity::Ends, &[connect, blind(2, SYN_SENT, ESTABLISHED)]);
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
    let socket = watched.table.full.sockets().next();
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

const WITHOUT_COOKIES: [Identity; 2] = [Identity::Address, Identity::Ends];

impl Watched {
    /// A dump of that moment, as it is made where this identity is in use.
    fn shows(&mut self, time_ms: u64, records: &[Record]) {
        self.merges(time_ms, time_ms, records);
    }

    fn merges(&mut self, from_ms: u64, to_ms: u64, records: &[Record]) {
        let identity = self.table.identity();
        let told = records.iter().map(|&record| told(identity, record));
        self.reconcile(&dump(from_ms, to_ms, told.collect()));
    }
}

/// The iterator tells addresses and has no cookies made, inet_diag the other way.
pub(super) fn told(identity: Identity, record: Record) -> Record {
    let (cookie, address) = match identity {
        // inet_diag's.
        Identity::Cookie => (record.cookie, None),
        Identity::Address => (None, record.address),
        Identity::Ends => (record.cookie, None),
    };
    Record {
        cookie,
        address,
        ..record
    }
}

/// What the kernel says where tracing programs can't ask for the cookie.
pub(super) fn blind(identity: Identity, event: SetState) -> SetState {
    with(event, |event| {
        if identity != Identity::Cookie {
            event.cookie = 0;
        }
        if identity == Identity::Ends {
            event.netns = 0;
        }
    })
}

fn listen(identity: Identity, socket: u16) -> SetState {
    let listen = with(event(1, socket, CLOSE, LISTEN), |event| {
        event.local_port = SERVER_PORT;
    });
    by(blind(identity, listen), 40 + u32::from(socket), "worker")
}

fn unlisten(identity: Identity, time_ms: u64, socket: u16) -> SetState {
    let close = with(event(time_ms, socket, LISTEN, CLOSE), |event| {
        event.local_port = SERVER_PORT;
    });
    blind(identity, close)
}

fn listening(time_ms: u64, socket: u16) -> Record {
    let mut record = record(time_ms, socket, LISTEN);
    record.local.port = Some(SERVER_PORT);
    record
}

impl Watched {
    fn count(&self, state: TcpState) -> i64 {
        let gauges = self.gauges.iter();
        gauges
            .filter(|((of, _), _)| *of == state)
            .map(|(_, count)| count)
            .sum()
    }
}

#[test]
fn a_connect_without_a_port_is_the_one_that_a_dump_shows_with_it() {
    for identity in WITHOUT_COOKIES {
        let connect = with(event(1, 9, CLOSE, SYN_SENT), |event| event.local_port = 0);
        let mut watched = run(identity, &[by(blind(identity, connect), 42, "curl")]);
        for time in [1000, 2000, 3000] {
            watched.merges(time, time, &[record(time, 9, SYN_SENT)]);
            assert_eq!(watched.count(SYN_SENT), 1, "{identity:?}");
        }
        let established = blind(identity, event(4001, 9, SYN_SENT, ESTABLISHED));
        watched.apply(&established);
        assert_eq!(watched.last().dwell, Dwell::Seen(4000 * MS));
        assert_eq!(
            (watched.last().id.as_str(), watched.last().pid),
            ("~1", Some(42))
        );
        watched.merges(5000, 5000, &[record(5000, 9, ESTABLISHED)]);
        assert_eq!((watched.count(ESTABLISHED), watched.table.len()), (1, 1));
        assert_eq!(watched.table.corrections(), [0; 4]);
    }
}

/// Its address tells which is which, and its port with it.
#[test]
fn connects_that_are_alike_get_the_port_that_is_theirs() {
    let mut watched = Watched::new(Identity::Address);
    for socket in [8, 9] {
        let connect = with(event(1, socket, CLOSE, SYN_SENT), |event| {
            event.local_port = 0;
        });
        watched.apply(&blind(Identity::Address, connect));
    }
    watched.shows(
        1000,
        &[record(1000, 9, SYN_SENT), record(1000, 8, SYN_SENT)],
    );
    let sockets = watched.table.full.sockets();
    let ports: BTreeMap<String, Option<u16>> = sockets
        .map(|socket| (socket.id.to_string(), socket.local.port))
        .collect();
    let expected = [("~1", Some(1008)), ("~2", Some(1009))];
    assert_eq!(
        ports,
        expected.map(|(id, port)| (id.to_owned(), port)).into()
    );
    // None had a cookie made.
    assert!(
        watched
            .table
            .full
            .sockets()
            .all(|socket| socket.cookie.is_none())
    );
    for socket in [8, 9] {
        watched.apply(&event(3000, socket, SYN_SENT, ESTABLISHED));
        assert_eq!(watched.last().dwell, Dwell::Seen(2999 * MS));
    }
    watched.shows(
        4000,
        &[record(4000, 9, ESTABLISHED), record(4000, 8, ESTABLISHED)],
    );
    assert_eq!((watched.count(ESTABLISHED), watched.table.len()), (2, 2));
    assert_eq!(watched.table.corrections(), [0; 4]);
}

#[test]
fn listeners_that_share_a_port_stay_as_many_as_they_are() {
    for identity in WITHOUT_COOKIES {
        let mut watched = run(identity, &[listen(identity, 3), listen(identity, 4)]);
        for time in [1000, 2000, 3000] {
            watched.merges(time, time, &[listening(time, 4), listening(time, 3)]);
            assert_eq!(watched.count(LISTEN), 2, "{identity:?}");
        }
        watched.apply(&unlisten(identity, 4000, 3));
        assert_eq!((watched.last().pid, watched.count(LISTEN)), (Some(43), 1));
        for time in [5000, 6000, 7000] {
            watched.merges(time, time, &[listening(time, 4)]);
            assert_eq!(watched.count(LISTEN), 1, "{identity:?}");
        }
        watched.apply(&unlisten(identity, 8000, 4));
        assert_eq!((watched.last().pid, watched.table.len()), (Some(44), 0));
        assert_eq!(watched.table.corrections(), [0; 4]);
    }
}

/// One that was there before, and one whose event came: a dump can't tell which is which, and the order of its records
/// must not matter.
#[test]
fn a_listener_found_beside_one_that_is_known_is_not_taken_for_it() {
    for identity in WITHOUT_COOKIES {
        for order in [[3, 4], [4, 3]] {
            for closes in [3, 4] {
                let mut watched = run(identity, &[listen(identity, 4)]);
                let records = order.map(|socket| listening(1000, socket));
                watched.merges(1000, 1000, &records);
                assert_eq!(watched.count(LISTEN), 2);
                watched.apply(&unlisten(identity, 2000, closes));
                assert_eq!(watched.count(LISTEN), 1, "{identity:?} {order:?} {closes}");
                let other = listening(3000, 7 - closes);
                watched.merges(3000, 3000, &[other]);
                assert_eq!(watched.count(LISTEN), 1);
                watched.apply(&unlisten(identity, 4000, 7 - closes));
                assert_eq!(watched.table.len(), 0);
                assert_eq!(watched.table.corrections(), [0; 4]);
            }
        }
    }
}

#[test]
fn listeners_that_a_dump_found_meet_their_events_one_each() {
    for identity in WITHOUT_COOKIES {
        let mut watched = Watched::new(identity);
        for time in [1000, 2000] {
            watched.merges(time, time, &[listening(time, 3), listening(time, 4)]);
            assert_eq!(watched.count(LISTEN), 2);
        }
        for (time, socket) in [(3000, 4), (4000, 3)] {
            // `shutdown` before `close`.
            watched.apply(&blind(
                identity,
                with(event(time, socket, LISTEN, LISTEN), |event| {
                    event.local_port = SERVER_PORT;
                }),
            ));
            assert_eq!(watched.count(LISTEN), 2, "{identity:?}");
        }
        watched.merges(5000, 5000, &[listening(5000, 3), listening(5000, 4)]);
        assert_eq!(watched.count(LISTEN), 2);
        watched.apply(&unlisten(identity, 6000, 4));
        watched.merges(7000, 7000, &[listening(7000, 3)]);
        assert_eq!(watched.count(LISTEN), 1);
        assert_eq!(watched.table.corrections(), [0; 4]);
    }
}

/// The dump reads both before one of them closes.
#[test]
fn a_listener_that_closes_while_a_dump_is_read_stays_closed() {
    for identity in WITHOUT_COOKIES {
        for known in [true, false] {
            let mut watched = Watched::new(identity);
            if known {
                watched.apply(&listen(identity, 3));
                watched.apply(&listen(identity, 4));
            }
            watched.table.snapshot_begins();
            watched.apply(&unlisten(identity, 1010, 3));
            let read = vec![listening(1000, 3), listening(1000, 4)];
            watched.merges(990, 1020, &read);
            assert_eq!(watched.count(LISTEN), 1, "{identity:?} {known}");
        }
    }
}

impl Watched {
    fn recv_queues(&self) -> Vec<Option<u32>> {
        self.rows().iter().map(|row| row.recv_queue).collect()
    }
}

#[test]
fn where_only_ends_tell_none_of_several_has_a_queue() {
    for identity in WITHOUT_COOKIES {
        // The second was there before its events.
        for known in [&[listen(identity, 8)][..], &[]] {
            let mut watched = run(identity, known);
            for time in [1000, 2000] {
                watched.shows(time, &[listening(time, 8)]);
                assert_eq!(watched.recv_queues(), [Some(7)], "{identity:?}");
            }
        }
        let known = (identity == Identity::Address).then_some(7);
        for events in [&[listen(identity, 8), listen(identity, 9)][..], &[]] {
            let mut watched = run(identity, events);
            for time in [1000, 2000] {
                watched.shows(time, &[listening(time, 8), listening(time, 9)]);
                assert_eq!(watched.recv_queues(), [known, known], "{identity:?}");
            }
        }
    }
}

/// What has an address now is told apart from what had it, where both ends of that were lost.
#[test]
fn another_life_of_an_address_is_another_socket() {
    let connect = by(event(1, 9, CLOSE, SYN_SENT), 42, "curl");
    let before =
        [connect, event(2, 9, SYN_SENT, ESTABLISHED)].map(|event| blind(Identity::Address, event));
    let elsewhere = |time| {
        let mut record = record(time, 9, ESTABLISHED);
        record.remote.port = Some(443);
        record
    };
    let mut watched = run(Identity::Address, &before);
    for time in [1000, 2000] {
        watched.shows(time, &[record(time, 9, ESTABLISHED)]);
    }
    for time in [3000, 4000] {
        watched.shows(time, &[elsewhere(time)]);
        assert_eq!(watched.gauges[&(ESTABLISHED, None)], 1);
    }
    assert_eq!(watched.table.len(), 1);
    assert_eq!(watched.table.corrections(), [0, 0, 1, 1]);
    // And by an event.
    let mut watched = run(Identity::Address, &before);
    let closed = with(event(3, 9, ESTABLISHED, CLOSE_WAIT), |event| {
        event.remote_port = 443
    });
    watched.apply(&blind(Identity::Address, closed));
    assert_eq!((watched.last().pid, watched.table.len()), (None, 1));
}

/// A dump read what had the address before, and its record comes after the events of what has it now.
#[test]
fn a_record_of_an_earlier_life_changes_nothing() {
    let mut watched = run(
        Identity::Address,
        &[blind(Identity::Address, event(1, 9, SYN_SENT, ESTABLISHED))],
    );
    watched.table.snapshot_begins();
    let connect = by(event(1003, 9, CLOSE, SYN_SENT), 42, "curl");
    for event in [
        event(1002, 9, ESTABLISHED, CLOSE),
        connect,
        event(1004, 9, SYN_SENT, ESTABLISHED),
    ] {
        watched.apply(&blind(Identity::Address, event));
    }
    let mut earlier = record(1001, 9, ESTABLISHED);
    earlier.remote.port = Some(443);
    watched.merges(990, 1010, &[earlier, record(1005, 9, ESTABLISHED)]);
    assert_eq!(watched.last().pid, Some(42));
    assert_eq!((watched.count(ESTABLISHED), watched.table.len()), (1, 1));
    assert_eq!(watched.recv_queues(), [Some(7)]);
    assert_eq!(watched.table.corrections(), [0; 4]);
}

/// Nor are its queues those of what listens there now.
#[test]
fn a_listener_has_no_queue_of_the_one_before_it() {
    let mut watched = run(Identity::Address, &[listen(Identity::Address, 9)]);
    watched.table.snapshot_begins();
    watched.apply(&unlisten(Identity::Address, 1002, 9));
    let again = with(listen(Identity::Address, 9), |event| {
        event.time_ns = 1003 * MS
    });
    watched.apply(&again);
    watched.merges(990, 1010, &[listening(1001, 9)]);
    assert_eq!(watched.recv_queues(), [None]);
    watched.shows(2000, &[listening(2000, 9)]);
    assert_eq!(watched.recv_queues(), [Some(7)]);
    assert_eq!(watched.table.corrections(), [0; 4]);
}

/// Up to 6.12 its first event does not tell whose it is.
#[test]
fn a_dump_does_not_find_a_child_before_its_second_event() {
    for identity in [Identity::Cookie, Identity::Address] {
        let mut watched = Watched::new(identity);
        watched.shows(1, &[]);
        let first = with(event(1000, 9, LISTEN, SYN_RECV), |event| {
            (event.cookie, event.remote_port) = (3, 0);
        });
        watched.apply(&first);
        watched.shows(1001, &[record(1001, 9, SYN_RECV)]);
        assert_eq!(watched.table.len(), 1);
        watched.apply(&event(1002, 9, SYN_RECV, ESTABLISHED));
        assert_eq!((watched.count(ESTABLISHED), watched.table.len()), (1, 1));
        assert_eq!(watched.table.corrections(), [0; 4]);
    }
}

/// They have addresses of their own, which no event tells, and no cookie.
#[test]
fn without_cookies_minisockets_are_known_by_their_ends() {
    let mut watched = Watched::new(Identity::Address);
    watched.shows(1, &[]);
    for (time, from, to) in [
        (10, CLOSE, SYN_SENT),
        (11, SYN_SENT, ESTABLISHED),
        (12, ESTABLISHED, FIN_WAIT1),
        (13, FIN_WAIT1, FIN_WAIT2),
        (14, FIN_WAIT2, CLOSE),
    ] {
        watched.apply(&with(
            blind(Identity::Address, event(time, 9, from, to)),
            |event| event.flags |= FLAG_DONE,
        ));
    }
    let timewait = |time| Record {
        address: Some(1),
        ..record(time, 9, TIME_WAIT)
    };
    let request = |time| Record {
        address: Some(2),
        ..record(time, 8, NEW_SYN_RECV)
    };
    for time in [1000, 2000, 3000] {
        watched.shows(time, &[timewait(time), request(time)]);
        assert_eq!(
            (watched.count(TIME_WAIT), watched.count(NEW_SYN_RECV)),
            (1, 1)
        );
    }
    assert_eq!(watched.table.len(), 2);
    // The request's child comes while a dump is read that read the request.
    watched.table.snapshot_begins();
    for (time, from, to) in [
        (3501, LISTEN, SYN_RECV),
        (3502, SYN_RECV, ESTABLISHED),
        (3503, ESTABLISHED, CLOSE),
    ] {
        watched.apply(&blind(Identity::Address, event(time, 8, from, to)));
    }
    watched.merges(3490, 3510, &[timewait(3500), request(3500)]);
    assert_eq!((watched.count(TIME_WAIT), watched.table.len()), (1, 1));
    assert_eq!(watched.table.corrections(), [0; 4]);
}

/// A full socket's →CLOSE was lost, and a dump shows what the kernel keeps of it, elsewhere.
#[test]
fn without_cookies_a_lost_close_into_time_wait_is_found() {
    let connect = by(event(1, 9, CLOSE, SYN_SENT), 42, "curl");
    let events = [connect, event(2, 9, SYN_SENT, ESTABLISHED)];
    let mut watched = run(
        Identity::Address,
        &events.map(|event| blind(Identity::Address, event)),
    );
    watched.shows(
        1000,
        &[Record {
            address: Some(1),
            ..record(1000, 9, TIME_WAIT)
        }],
    );
    assert_eq!(watched.last().shown, Some((ESTABLISHED, TIME_WAIT)));
    assert_eq!(
        (watched.last().id.as_str(), watched.last().pid),
        ("~1", Some(42))
    );
    assert_eq!(watched.table.len(), 1);
}

/// It would be taken in anew with each dump.
#[test]
fn a_record_that_nothing_tells_again_is_none() {
    let lacking = Record {
        cookie: None,
        address: None,
        ..record(1, 9, ESTABLISHED)
    };
    let timewait = Record {
        state: TIME_WAIT,
        expires_ns: Some(1),
        ..lacking
    };
    let snapshot = dump(1, 1, vec![record(1, 8, ESTABLISHED), lacking, timewait]);
    let identities = [Identity::Cookie, Identity::Address, Identity::Ends];
    assert_eq!(
        identities.map(|identity| snapshot.unknowable(identity)),
        [1, 1, 0]
    );
}
