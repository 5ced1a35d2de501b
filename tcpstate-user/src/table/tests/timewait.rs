//! Timewait sockets, where the kernel's own functions tell of them.

use std::num::NonZero;

use tcpstate_common::TimeWait;
use tcpstate_common::event::{TIMEWAIT_BEGINS, TIMEWAIT_ENDS, TIMEWAIT_SET_AGAIN};

use super::*;
use crate::model::Process;

fn step(time_ms: u64, socket: u16, what: u8, state: TcpState) -> TimeWait {
    TimeWait {
        time_ns: time_ms * MS,
        cookie: socket.into(),
        netns: NETNS,
        lost: 0,
        what,
        state: state.number(),
        pad: [0; 6],
    }
}

/// A socket in FIN_WAIT2 from 8 ms on, orphaned.
fn orphaned() -> Watched {
    run(
        Identity::Cookie,
        &[
            by(event(1, 5, CLOSE, SYN_SENT), 10, "client"),
            event(2, 5, SYN_SENT, ESTABLISHED),
            by(event(7, 5, ESTABLISHED, FIN_WAIT1), 10, "client"),
            event(8, 5, FIN_WAIT1, FIN_WAIT2),
        ],
    )
}

fn close(time_ms: u64) -> SetState {
    with(event(time_ms, 5, FIN_WAIT2, CLOSE), |event| {
        event.flags |= FLAG_DEAD;
    })
}

impl Watched {
    fn step(&mut self, event: &TimeWait) {
        self.take(|table, sink| table.time_wait(event, sink));
    }
}

#[test]
fn an_orphan_is_followed_to_its_end() {
    let mut watched = orphaned();
    watched.step(&step(9, 5, TIMEWAIT_BEGINS, FIN_WAIT2));
    watched.apply(&close(9));
    assert_eq!(watched.last().shown, None);
    assert_eq!(watched.states(), BTreeMap::from([(5, FIN_WAIT2)]));

    watched.step(&step(500, 5, TIMEWAIT_SET_AGAIN, TIME_WAIT));
    assert_eq!(watched.last().shown, Some((FIN_WAIT2, TIME_WAIT)));
    assert_eq!(watched.last().evidence, Evidence::Fentry);
    assert_eq!(watched.last().dwell, Dwell::Seen(492 * MS));
    assert_eq!(watched.last().end, Some(End::LocalClose));

    // A segment that comes in TIME_WAIT begins its time anew, and is nothing that happened.
    let told = watched.seen.len();
    watched.step(&step(600, 5, TIMEWAIT_SET_AGAIN, TIME_WAIT));
    assert_eq!(watched.seen.len(), told);

    watched.step(&step(60_600, 5, TIMEWAIT_ENDS, CLOSE));
    assert_eq!(watched.last().shown, Some((TIME_WAIT, CLOSE)));
    assert_eq!(watched.last().dwell, Dwell::Seen(60_100 * MS));
    assert_eq!(watched.last().end, None);
    assert_eq!(watched.table.len(), 0);
    assert_eq!(watched.table.corrections(), [0; 4]);
}

/// Another CPU meets the timewait socket before the full one is closed.
#[test]
fn a_step_can_come_before_the_close_that_it_follows() {
    let mut watched = orphaned();
    watched.step(&step(9, 5, TIMEWAIT_BEGINS, FIN_WAIT2));
    watched.step(&step(9, 5, TIMEWAIT_SET_AGAIN, TIME_WAIT));
    watched.apply(&close(9));
    assert_eq!(watched.last().shown, Some((FIN_WAIT2, TIME_WAIT)));

    let mut watched = orphaned();
    watched.step(&step(9, 5, TIMEWAIT_BEGINS, FIN_WAIT2));
    watched.step(&step(9, 5, TIMEWAIT_ENDS, CLOSE));
    watched.apply(&close(9));
    assert_eq!(watched.last().shown, Some((FIN_WAIT2, CLOSE)));
    assert_eq!(watched.table.len(), 0);
}

/// A socket is connected again while its timewait socket lives: they share the cookie.
#[test]
fn the_end_of_an_old_timewait_socket_is_not_its_successors() {
    let mut watched = orphaned();
    watched.step(&step(9, 5, TIMEWAIT_BEGINS, TIME_WAIT));
    watched.apply(&close(9));
    watched.apply(&by(event(10, 5, CLOSE, SYN_SENT), 10, "client"));
    watched.step(&step(20, 5, TIMEWAIT_ENDS, CLOSE));
    assert_eq!(watched.states(), BTreeMap::from([(5, SYN_SENT)]));
    watched.step(&step(21, 5, TIMEWAIT_ENDS, CLOSE));
    assert_eq!(watched.states(), BTreeMap::from([(5, SYN_SENT)]));
}

/// A dump read the timewait socket just before it ended.
#[test]
fn a_dump_does_not_bring_back_what_ended_meanwhile() {
    let mut watched = orphaned();
    watched.step(&step(9, 5, TIMEWAIT_BEGINS, TIME_WAIT));
    watched.apply(&close(9));
    watched.table.snapshot_begins();
    watched.step(&step(1000, 5, TIMEWAIT_ENDS, CLOSE));
    watched.reconcile(&dump(995, 1001, vec![record(999, 5, TIME_WAIT)]));
    assert_eq!(watched.states(), BTreeMap::new());
    // And one that the table did not know.
    watched.table.snapshot_begins();
    watched.step(&step(2000, 6, TIMEWAIT_ENDS, CLOSE));
    watched.reconcile(&dump(1995, 2001, vec![record(1999, 6, TIME_WAIT)]));
    assert_eq!(watched.states(), BTreeMap::new());
}

#[test]
fn who_held_a_socket_says_nothing_of_it_once_nobody_is_found() {
    let mut watched = orphaned();
    let holder = Holder {
        process: Process {
            pid: 10,
            start_ns: 10,
            comm: None,
        },
        container: None,
        sockets: vec![Held {
            socket: 5,
            quiet_ns: None,
        }],
    };
    let count = |watched: &Watched| watched.table.full.sockets().next().map(|it| it.holders);
    watched.swept(20, &[holder]);
    assert_eq!(count(&watched), Some(NonZero::new(1)));
    watched.swept(30, &[]);
    assert_eq!(count(&watched), Some(None));
}

/// No kernel says so, but a record may be malformed.
#[test]
fn a_time_at_the_end_of_time_is_taken() {
    let at_the_end = |event| with(event, |event: &mut SetState| event.time_ns = u64::MAX);
    let mut watched = orphaned();
    watched.step(&step(9, 5, TIMEWAIT_BEGINS, TIME_WAIT));
    watched.apply(&at_the_end(close(9)));
    watched.step(&TimeWait {
        time_ns: u64::MAX,
        ..step(10, 5, TIMEWAIT_SET_AGAIN, TIME_WAIT)
    });
    assert_eq!(watched.states(), BTreeMap::from([(5, TIME_WAIT)]));
}
