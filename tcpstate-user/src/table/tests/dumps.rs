//! Dumps among events.

use rustc_hash::FxHashSet;

use super::*;

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
    let identities = [
        (Identity::Cookie, 9),
        (Identity::Address, 9),
        (Identity::Ends, 0),
    ];
    for (identity, cookie) in identities {
        let mut watched = Watched::new(identity);
        watched.reconcile(&dump(10, 11, vec![record(10, 9, NEW_SYN_RECV)]));
        for (time, from, to) in [(20, LISTEN, SYN_RECV), (21, SYN_RECV, ESTABLISHED)] {
            watched.apply(&with(event(time, 9, from, to), |event| {
                event.cookie = cookie
            }));
        }
        assert_eq!(watched.gauges[&(NEW_SYN_RECV, None)], 0, "{identity:?}");
        assert_eq!(watched.gauges[&(ESTABLISHED, None)], 1, "{identity:?}");
        assert_eq!(watched.table.len(), 1);
    }
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
    // Another namespace has its inode now, and no dump finds it: its socket stays, for its events come.
    watched.apply(&by(event(8000, 9, CLOSE, LISTEN), 10, "a"));
    for time in [9000, 10_000, 11_000] {
        watched.reconcile(&elsewhere(time));
    }
    assert_eq!(watched.table.len(), 1);
    let met = Merged {
        doubtful: false,
        undated: false,
        owners: FxHashSet::from_iter([(10, 10)]),
        leads: FxHashSet::from_iter([(NETNS, 10)]),
        unlisted: FxHashSet::from_iter([NETNS]),
    };
    assert_eq!(watched.merged, met);
}

/// A sweep is to tell their age: once, for the sockets that no event and no dump has shown before.
#[test]
fn a_dump_tells_that_sockets_are_new_and_not_dated() {
    let mut watched = Watched::new(Identity::Cookie);
    watched.apply(&event(1, 7, SYN_SENT, ESTABLISHED));
    let mut undated = |time_ms, records| {
        watched.reconcile(&dump(time_ms, time_ms + 1, records));
        watched.merged.undated
    };
    assert!(!undated(1000, vec![record(1000, 7, ESTABLISHED)]));
    let both = |time_ms, state| vec![record(time_ms, 7, state), record(time_ms, 9, ESTABLISHED)];
    assert!(undated(2000, both(2000, ESTABLISHED)));
    assert!(!undated(3000, both(3000, ESTABLISHED)));
    // Its event was lost.
    assert!(undated(4000, both(4000, CLOSE_WAIT)));
    assert!(!undated(5000, both(5000, CLOSE_WAIT)));
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

/// A dump of some states leaves to full dumps what events follow.
#[test]
fn a_small_dump_ends_no_full_socket() {
    let half_closed = event(1, 7, FIN_WAIT1, FIN_WAIT2);
    let closed = with(event(2, 8, FIN_WAIT2, CLOSE), |event| {
        event.flags |= FLAG_DONE
    });
    let mut watched = run(Identity::Cookie, &[half_closed, closed]);
    for time in [1000, 2000] {
        watched.reconcile(&Snapshot {
            states: StateMask::of(&[TIME_WAIT, FIN_WAIT2, NEW_SYN_RECV]),
            ..dump(time, time, vec![])
        });
    }
    assert_eq!(watched.states(), BTreeMap::from([(7, FIN_WAIT2)]));
    watched.reconcile(&dump(3000, 3000, vec![]));
    watched.reconcile(&dump(4000, 4000, vec![]));
    assert!(watched.table.is_empty());
}

/// It was read before a connect, whose ends it had, took it out of the way.
#[test]
fn a_dump_brings_back_no_timewait_socket_whose_ends_were_used_again() {
    for identity in [Identity::Cookie, Identity::Address] {
        let mut watched = Watched::new(identity);
        watched.table.snapshot_begins();
        let connects = [(CLOSE, SYN_SENT), (SYN_SENT, ESTABLISHED)];
        for (time, (from, to)) in (2000..).zip(connects) {
            watched.apply(&with(event(time, 8, from, to), |event| {
                event.local_port = 1007
            }));
        }
        let mut read_before = record(1000, 7, TIME_WAIT);
        read_before.address = Some(1);
        watched.reconcile(&dump(990, 2100, vec![read_before]));
        assert_eq!(watched.states(), BTreeMap::from([(8, ESTABLISHED)]));
    }
}

/// A socket that is connected again while its timewait socket lives leaves another one later: all have its cookie.
#[test]
fn timewait_sockets_with_one_cookie_are_told_apart_by_their_ends() {
    let mut watched = Watched::new(Identity::Cookie);
    let closes = |time, port| {
        let life = [
            (CLOSE, SYN_SENT),
            (SYN_SENT, ESTABLISHED),
            (ESTABLISHED, FIN_WAIT1),
            (FIN_WAIT1, FIN_WAIT2),
            (FIN_WAIT2, CLOSE),
        ];
        life.map(|(from, to)| {
            with(event(time, 7, from, to), |event| {
                event.local_port = port;
                event.flags |= FLAG_DONE;
            })
        })
    };
    for event in [closes(1, 1007), closes(2, 1008)].as_flattened() {
        watched.apply(event);
    }
    for time in [1000, 2000, 3000] {
        let records = [1007, 1008].map(|port| {
            let mut record = record(time, 7, TIME_WAIT);
            record.local.port = Some(port);
            record
        });
        watched.reconcile(&dump(time, time, records.to_vec()));
        assert_eq!(watched.gauges[&(TIME_WAIT, None)], 2);
    }
    assert_eq!(watched.table.corrections(), [0; 4]);
}

/// A socket is connected again while its timewait socket lives, and only dumps have shown that one.
#[test]
fn a_life_after_a_timewait_socket_has_a_name_of_its_own() {
    let timewait = Record {
        expires_ns: Some(30_000 * MS),
        ..record(1, 7, TIME_WAIT)
    };
    let again = |time| {
        let mut record = record(time, 7, ESTABLISHED);
        record.local.port = Some(4000);
        record
    };
    let names = |watched: &Watched| {
        let mut names: Vec<_> = watched
            .rows()
            .iter()
            .map(|row| row.id.to_string())
            .collect();
        names.sort();
        names
    };
    for records in [[timewait, again(1)], [again(1), timewait]] {
        let mut watched = Watched::new(Identity::Cookie);
        watched.reconcile(&dump(1, 2, records.to_vec()));
        let names = names(&watched);
        assert_eq!(names.len(), 2);
        assert_ne!(names[0], names[1]);
    }
    let mut watched = Watched::new(Identity::Cookie);
    watched.reconcile(&dump(1, 2, vec![timewait]));
    watched.apply(&with(event(100, 7, CLOSE, SYN_SENT), |event| {
        event.local_port = 0;
    }));
    assert_eq!(names(&watched), ["7.0", "7.1"]);
}
