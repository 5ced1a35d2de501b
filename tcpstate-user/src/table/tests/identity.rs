//! Where events have no cookie: which socket of the table a record of a dump is.

use super::*;
use crate::table::Socket;

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

const WITHOUT_COOKIES: [Identity; 2] = [Identity::Address, Identity::AddressWithoutNetns];

/// What the kernel says where tracing programs can't ask for the cookie: whether a dump made one, where that can be seen.
fn blind(identity: Identity, event: SetState, dumped: bool) -> SetState {
    with(event, |event| {
        if identity == Identity::AddressWithoutNetns {
            (event.netns, event.cookie) = (0, 0);
        } else if !dumped {
            event.cookie = 0;
        }
    })
}

fn listen(identity: Identity, socket: u16) -> SetState {
    let listen = with(event(1, socket, CLOSE, LISTEN), |event| {
        event.local_port = SERVER_PORT;
    });
    by(
        blind(identity, listen, false),
        40 + u32::from(socket),
        "worker",
    )
}

fn unlisten(identity: Identity, time_ms: u64, socket: u16, dumped: bool) -> SetState {
    let close = with(event(time_ms, socket, LISTEN, CLOSE), |event| {
        event.local_port = SERVER_PORT;
    });
    blind(identity, close, dumped)
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
        let mut watched = run(identity, &[by(blind(identity, connect, false), 42, "curl")]);
        for time in [1000, 2000, 3000] {
            watched.reconcile(&dump(time, time, vec![record(time, 9, SYN_SENT)]));
            assert_eq!(watched.count(SYN_SENT), 1, "{identity:?}");
        }
        let established = blind(identity, event(4001, 9, SYN_SENT, ESTABLISHED), true);
        watched.apply(&established);
        assert_eq!(watched.last().dwell, Dwell::Seen(4000 * MS));
        assert_eq!(
            (watched.last().id.as_str(), watched.last().pid),
            ("~1", Some(42))
        );
        watched.reconcile(&dump(5000, 5000, vec![record(5000, 9, ESTABLISHED)]));
        assert_eq!((watched.count(ESTABLISHED), watched.table.len()), (1, 1));
        assert_eq!(watched.table.corrections(), [0; 4]);
    }
}

/// What a dump shows of one of several is told of none.
#[test]
fn of_connects_that_are_alike_none_gets_a_port_by_guess() {
    let connect = |socket| {
        let connect = with(event(1, socket, CLOSE, SYN_SENT), |event| {
            event.local_port = 0
        });
        blind(Identity::Address, connect, false)
    };
    let mut watched = run(Identity::Address, &[connect(8), connect(9)]);
    for time in [1000, 2000] {
        let records = vec![record(time, 9, SYN_SENT), record(time, 8, SYN_SENT)];
        watched.reconcile(&dump(time, time, records));
        assert_eq!(watched.count(SYN_SENT), 2);
        let told = |socket: &Socket| socket.local.port.is_some() || socket.cookie.is_some();
        assert!(!watched.table.full.sockets().any(told));
    }
    for socket in [8, 9] {
        watched.apply(&event(3000, socket, SYN_SENT, ESTABLISHED));
        assert_eq!(watched.last().dwell, Dwell::Seen(2999 * MS));
    }
    let records = vec![record(4000, 9, ESTABLISHED), record(4000, 8, ESTABLISHED)];
    watched.reconcile(&dump(4000, 4000, records));
    assert_eq!((watched.count(ESTABLISHED), watched.table.len()), (2, 2));
    assert_eq!(watched.table.corrections(), [0; 4]);
}

#[test]
fn listeners_that_share_a_port_stay_as_many_as_they_are() {
    for identity in WITHOUT_COOKIES {
        let mut watched = run(identity, &[listen(identity, 3), listen(identity, 4)]);
        for time in [1000, 2000, 3000] {
            watched.reconcile(&dump(
                time,
                time,
                vec![listening(time, 4), listening(time, 3)],
            ));
            assert_eq!(watched.count(LISTEN), 2, "{identity:?}");
        }
        watched.apply(&unlisten(identity, 4000, 3, true));
        assert_eq!((watched.last().pid, watched.count(LISTEN)), (Some(43), 1));
        for time in [5000, 6000, 7000] {
            watched.reconcile(&dump(time, time, vec![listening(time, 4)]));
            assert_eq!(watched.count(LISTEN), 1, "{identity:?}");
        }
        watched.apply(&unlisten(identity, 8000, 4, true));
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
                watched.reconcile(&dump(1000, 1000, records.to_vec()));
                assert_eq!(watched.count(LISTEN), 2);
                watched.apply(&unlisten(identity, 2000, closes, true));
                assert_eq!(watched.count(LISTEN), 1, "{identity:?} {order:?} {closes}");
                let other = listening(3000, 7 - closes);
                watched.reconcile(&dump(3000, 3000, vec![other]));
                assert_eq!(watched.count(LISTEN), 1);
                watched.apply(&unlisten(identity, 4000, 7 - closes, true));
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
            watched.reconcile(&dump(
                time,
                time,
                vec![listening(time, 3), listening(time, 4)],
            ));
            assert_eq!(watched.count(LISTEN), 2);
        }
        for (time, socket) in [(3000, 4), (4000, 3)] {
            // `shutdown` before `close`.
            watched.apply(&blind(
                identity,
                with(event(time, socket, LISTEN, LISTEN), |event| {
                    event.local_port = SERVER_PORT;
                }),
                true,
            ));
            assert_eq!(watched.count(LISTEN), 2, "{identity:?}");
        }
        watched.reconcile(&dump(
            5000,
            5000,
            vec![listening(5000, 3), listening(5000, 4)],
        ));
        assert_eq!(watched.count(LISTEN), 2);
        watched.apply(&unlisten(identity, 6000, 4, true));
        watched.reconcile(&dump(7000, 7000, vec![listening(7000, 3)]));
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
            watched.apply(&unlisten(identity, 1010, 3, true));
            let read = vec![listening(1000, 3), listening(1000, 4)];
            watched.reconcile(&dump(990, 1020, read));
            assert_eq!(watched.count(LISTEN), 1, "{identity:?} {known}");
        }
    }
}

/// Its cookie tells it from one that has had its ends since.
#[test]
fn a_socket_whose_close_was_lost_is_not_the_next_with_its_ends() {
    let mut watched = run(Identity::Address, &[event(1, 9, SYN_SENT, ESTABLISHED)]);
    let other = |time| Record {
        cookie: 10,
        ..record(time, 9, ESTABLISHED)
    };
    watched.reconcile(&dump(1000, 1000, vec![record(1000, 9, ESTABLISHED)]));
    for time in [2000, 3000] {
        watched.reconcile(&dump(time, time, vec![other(time)]));
    }
    assert_eq!(watched.states(), BTreeMap::from([(10, ESTABLISHED)]));
    assert_eq!(watched.table.corrections(), [0, 0, 1, 1]);
}

impl Watched {
    fn recv_queues(&self) -> Vec<Option<u32>> {
        self.table.rows(0, 0).map(|row| row.recv_queue).collect()
    }
}

#[test]
fn of_sockets_that_are_alike_none_has_a_queue_by_guess() {
    for identity in WITHOUT_COOKIES {
        // The second was there before its events.
        for known in [&[listen(identity, 8)][..], &[]] {
            let mut watched = run(identity, known);
            for time in [1000, 2000] {
                watched.reconcile(&dump(time, time, vec![listening(time, 8)]));
                assert_eq!(watched.recv_queues(), [Some(7)], "{identity:?}");
            }
        }
        let mut watched = run(identity, &[listen(identity, 8), listen(identity, 9)]);
        for time in [1000, 2000] {
            let records = vec![listening(time, 8), listening(time, 9)];
            watched.reconcile(&dump(time, time, records));
            assert_eq!(watched.recv_queues(), [None, None], "{identity:?}");
        }
    }
}

#[test]
fn a_queue_stays_with_the_cookie_that_it_was_read_with() {
    let mut watched = run(Identity::Address, &[listen(Identity::Address, 9)]);
    // The first record is taken for the socket that is known, the second for another.
    let records = vec![listening(1000, 8), listening(1000, 9)];
    watched.reconcile(&dump(1000, 1000, records));
    // It was the other way round.
    watched.apply(&unlisten(Identity::Address, 2000, 9, true));
    assert_eq!(watched.table.full.sockets().next().unwrap().cookie, Some(8));
    assert_eq!(watched.recv_queues(), [None]);
}
