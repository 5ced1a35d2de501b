//! More sockets than the table holds.

use proptest::prelude::*;
use tcpstate_common::TimeWait;
use tcpstate_common::event::{TIMEWAIT_BEGINS, TIMEWAIT_ENDS};

use super::properties::{Step, next, step};
use super::*;
use crate::table::Refused;

impl Watched {
    /// As [`Watched::apply`], of what may be refused.
    fn tell(&mut self, event: &SetState) -> Result<(), Refused> {
        let mut told = Ok(());
        self.take(|table, sink| told = table.apply(event, None, sink));
        told
    }
}

/// Of two connects, for which there is room, and a third.
fn full() -> Watched {
    let mut watched = Watched::holding(Identity::Cookie, 2);
    watched.apply(&event(1, 1, CLOSE, SYN_SENT));
    watched.apply(&event(1, 2, CLOSE, SYN_SENT));
    assert!(!watched.table.is_incomplete());
    let third = watched.tell(&event(2, 3, CLOSE, SYN_SENT));
    assert_eq!(third, Err(Refused::Full));
    watched
}

#[test]
fn what_there_is_no_room_for_is_refused_and_the_rest_goes_on() {
    let mut watched = full();
    assert!(watched.table.is_incomplete() && !watched.table.wants_dump());
    assert_eq!(watched.seen.len(), 2);
    let fourth = [
        event(3, 4, LISTEN, SYN_RECV),
        with(event(3, 4, LISTEN, SYN_RECV), |event| event.remote_port = 0),
        event(3, 4, SYN_RECV, ESTABLISHED),
        event(3, 4, ESTABLISHED, CLOSE),
    ];
    for event in fourth {
        assert_eq!(watched.tell(&event), Err(Refused::Full));
    }
    assert_eq!(watched.seen.len(), 2);
    watched.apply(&event(4, 1, SYN_SENT, ESTABLISHED));
    assert_eq!(watched.last().dwell, Dwell::Seen(3 * MS));
    watched.apply(&event(5, 1, ESTABLISHED, CLOSE));
    watched.apply(&event(6, 5, CLOSE, SYN_SENT));
    assert_eq!(watched.table.len(), 2);
    assert!(watched.table.is_incomplete());
    assert_eq!(watched.table.corrections(), [0; 4]);
}

#[test]
fn a_dump_that_finds_room_for_all_completes_it() {
    let records = |time, sockets: &[u16]| {
        let records = sockets.iter().map(|&it| record(time, it, ESTABLISHED));
        dump(time, time, records.collect())
    };
    let mut watched = full();
    watched.apply(&event(3, 2, SYN_SENT, CLOSE));
    assert!(watched.table.wants_dump());
    // So soon after the third was refused it may show what that was before.
    watched.reconcile(&records(10, &[1]));
    assert!(watched.table.is_incomplete());
    // The fourth does not fit.
    watched.reconcile(&records(1000, &[1, 3, 4]));
    assert!(watched.table.is_incomplete());
    assert_eq!(watched.table.len(), 2);
    // One of some states says nothing of the others.
    watched.reconcile(&Snapshot {
        states: StateMask::of(&[TIME_WAIT]),
        ..records(2000, &[])
    });
    assert!(watched.table.is_incomplete());
    watched.reconcile(&records(3000, &[1, 3]));
    assert!(!watched.table.is_incomplete());
    assert_eq!(watched.states().into_keys().collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn what_closed_unknown_while_a_dump_was_read_is_not_brought_back() {
    let mut watched = full();
    watched.table.snapshot_begins();
    let unknown = watched.tell(&event(1001, 3, SYN_SENT, CLOSE));
    assert_eq!(unknown, Err(Refused::Full));
    watched.apply(&event(1002, 2, SYN_SENT, CLOSE));
    let records = [1, 2, 3].map(|socket| record(1000, socket, SYN_SENT));
    watched.reconcile(&dump(1000, 1000, records.into()));
    assert_eq!(watched.states().into_keys().collect::<Vec<_>>(), [1]);
}

/// Sockets that come and go, each with a number of its own.
#[derive(Default)]
struct Kernel {
    now_ms: u64,
    made: u16,
    sockets: BTreeMap<u64, TcpState>,
}

impl Kernel {
    /// Something happens to one, and the table is told.
    fn step(&mut self, step: &Step, watched: &mut Watched) {
        self.now_ms += 1;
        let old = self.sockets.keys().nth(step.socket).copied();
        let number = old.unwrap_or_else(|| {
            self.made += 1;
            u64::from(self.made)
        });
        let from = self.sockets.remove(&number).unwrap_or(CLOSE);
        let timewait = |what, state: TcpState| TimeWait {
            time_ns: self.now_ms * MS,
            cookie: number,
            what,
            state: state.number(),
            ..TimeWait::new_zeroed()
        };
        if from == TIME_WAIT {
            let ends = timewait(TIMEWAIT_ENDS, CLOSE);
            return watched.take(|table, sink| table.time_wait(&ends, sink));
        }
        let to = next(from, step.choice);
        let mut event = event(self.now_ms, number as u16, from, to);
        if to == TIME_WAIT {
            let begins = timewait(TIMEWAIT_BEGINS, TIME_WAIT);
            watched.take(|table, sink| table.time_wait(&begins, sink));
            event.to = CLOSE.number();
            event.flags |= FLAG_DONE;
        }
        if to != CLOSE {
            self.sockets.insert(number, to);
        }
        let known = watched.states().contains_key(&number);
        let told = watched.tell(&event);
        assert!(
            told.is_ok() || !known,
            "{event:?} is of a socket that is known"
        );
    }

    fn dump(&self) -> Snapshot {
        let sockets = self.sockets.iter();
        let records = sockets.map(|(&socket, &state)| record(self.now_ms, socket as u16, state));
        dump(self.now_ms, self.now_ms, records.collect())
    }
}

/// Steps, and steps between the parts in which a dump after them is merged.
fn rounds() -> impl Strategy<Value = Vec<(Vec<Step>, Vec<Step>)>> {
    let steps = |most| prop::collection::vec(step(8), 0..most);
    prop::collection::vec((steps(20), steps(4)), 1..8)
}

#[test]
fn what_a_dump_had_no_room_for_is_no_correction() {
    let mut watched = Watched::holding(Identity::Cookie, 1);
    let both = [1, 2].map(|it| record(1000, it, ESTABLISHED));
    watched.reconcile(&dump(1000, 1000, both.into()));
    assert!(watched.table.is_incomplete());
    watched.apply(&event(2000, 1, ESTABLISHED, CLOSE));
    watched.apply(&event(2001, 2, ESTABLISHED, CLOSE_WAIT));
    watched.apply(&event(2002, 2, CLOSE_WAIT, LAST_ACK));
    watched.apply(&event(2003, 2, LAST_ACK, CLOSE));
    watched.reconcile(&dump(3000, 3000, vec![record(3000, 3, ESTABLISHED)]));
    assert!(!watched.table.is_incomplete());
    assert_eq!(watched.table.corrections(), [0; 4]);
}

#[test]
fn a_dump_that_could_not_look_there_does_not_complete_it() {
    let mut watched = Watched::holding(Identity::Cookie, 1);
    watched.apply(&event(1, 1, CLOSE, SYN_SENT));
    let there = with(event(2, 2, CLOSE, SYN_SENT), |event| event.netns += 1);
    assert_eq!(watched.tell(&there), Err(Refused::Full));
    watched.apply(&event(3, 1, SYN_SENT, CLOSE));
    for (netns, incomplete) in [(there.netns, true), (there.netns + 1, false)] {
        let unreachable = Unreachable {
            netns: Some(netns),
            reason: String::new(),
        };
        watched.reconcile(&Snapshot {
            unreachable: vec![unreachable],
            ..dump(1000, 1000, Vec::new())
        });
        assert_eq!(watched.table.is_incomplete(), incomplete);
    }
}

/// Up to 6.12 the child's first event has no remote end, and it is the second that tells what it takes the place of.
#[test]
fn a_refused_child_ends_the_timewait_socket_with_its_ends() {
    let mut watched = Watched::holding(Identity::Cookie, 2);
    let steps = [CLOSE, SYN_SENT, ESTABLISHED, FIN_WAIT1, FIN_WAIT2];
    for (time, step) in (1..).zip(steps.windows(2)) {
        watched.apply(&event(time, 1, step[0], step[1]));
    }
    let close = with(event(5, 1, FIN_WAIT2, CLOSE), |event| {
        event.flags |= FLAG_DONE
    });
    watched.apply(&close);
    watched.apply(&event(6, 2, CLOSE, SYN_SENT));
    let child = |time, from, to| {
        with(event(time, 9, from, to), |event| {
            event.local_port = close.local_port;
            event.remote_port = close.remote_port;
        })
    };
    let first = with(child(7, LISTEN, SYN_RECV), |event| event.remote_port = 0);
    assert_eq!(watched.tell(&first), Err(Refused::Full));
    assert_eq!(watched.tell(&child(8, SYN_RECV, ESTABLISHED)), Ok(()));
    assert_eq!(
        watched.states(),
        BTreeMap::from([(2, SYN_SENT), (9, ESTABLISHED)])
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Where the table does not say that it is incomplete, it holds what the kernel does, and it comes to that as soon as
    /// there is room for all.
    #[test]
    fn a_table_that_lacks_sockets_says_so(most in 1usize..8, rounds in rounds()) {
        let mut watched = Watched::holding(Identity::Cookie, most);
        let mut kernel = Kernel { now_ms: 1000, ..Kernel::default() };
        for (steps, between) in &rounds {
            for step in steps {
                kernel.step(step, &mut watched);
                let complete = !watched.table.is_incomplete();
                prop_assert!(!complete || watched.states() == kernel.sockets);
            }
            kernel.now_ms += 100;
            watched.table.snapshot_begins();
            let mut merge = Merge::new(kernel.dump());
            let mut between = between.iter();
            while !watched.merge(&mut merge) {
                if let Some(step) = between.next() {
                    kernel.step(step, &mut watched);
                }
            }
            prop_assert!(watched.table.len() <= most);
            let complete = !watched.table.is_incomplete();
            prop_assert!(!complete || watched.states() == kernel.sockets);
            kernel.now_ms += 100;
        }
        // No more than the table holds, and twice what a dump shows.
        kernel.sockets = kernel.sockets.into_iter().take(most).collect();
        for _ in 0..3 {
            kernel.now_ms += 100;
            watched.table.snapshot_begins();
            watched.reconcile(&kernel.dump());
        }
        prop_assert!(!watched.table.is_incomplete());
        prop_assert_eq!(watched.states(), kernel.sockets);
    }
}
