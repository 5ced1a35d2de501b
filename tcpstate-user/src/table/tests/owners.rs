//! Whose a socket is, by accepts and sweeps in any order with events and dumps.

use std::num::NonZero;

use proptest::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};
use tcpstate_common::Accept;

use super::*;
use crate::model::{Owner, Process};

const MASTER: u32 = 40;
const WORKER: u32 = 42;
const LISTENER: u16 = 3;
const CHILD: u16 = 9;

/// Of a process that started at `pid` milliseconds, as [`by`] and [`accept`] have it.
fn process(pid: u32, comm: &str) -> Process {
    Process {
        pid,
        start_ns: u64::from(pid) * MS,
        comm: Some(Comm::from_bytes(comm.as_bytes())),
    }
}

const fn held(socket: u64) -> Held {
    Held {
        socket,
        quiet_ns: None,
    }
}

fn holder(process: Process, sockets: &[u16]) -> Holder {
    Holder {
        process,
        container: None,
        sockets: sockets.iter().map(|&cookie| held(cookie.into())).collect(),
    }
}

/// An event by a process that started at `pid` milliseconds.
fn called(event: SetState, pid: u32, comm: &str) -> SetState {
    with(by(event, pid, comm), |event| {
        event.start_ns = u64::from(pid) * MS;
    })
}

fn accept(time_ms: u64, socket: u16, pid: u32, comm: &str) -> Accept {
    let made = event(time_ms, socket, CLOSE, CLOSE);
    let mut accept = Accept {
        time_ns: made.time_ns,
        sk: made.sk,
        cookie: made.cookie,
        start_ns: u64::from(pid) * MS,
        cgroup_id: 0,
        tgid: pid,
        lost: 0,
        comm: [0; 16],
    };
    accept.comm[..comm.len()].copy_from_slice(comm.as_bytes());
    accept
}

fn listen(time_ms: u64) -> SetState {
    let made = with(event(time_ms, LISTENER, CLOSE, LISTEN), |event| {
        event.local_port = SERVER_PORT;
    });
    called(made, MASTER, "master")
}

/// Of a connection that [`LISTENER`] took.
fn child(time_ms: u64, from: TcpState, to: TcpState) -> SetState {
    with(event(time_ms, CHILD, from, to), |event| {
        event.local_port = SERVER_PORT;
        event.remote_port = 1007;
    })
}

fn child_record(time_ms: u64, inode: u32) -> Record {
    let found = record(time_ms, CHILD, ESTABLISHED);
    Record {
        local: found.remote,
        remote: Endpoint {
            port: Some(1007),
            ..found.local
        },
        inode,
        ..found
    }
}

fn listener_record(time_ms: u64) -> Record {
    let found = record(time_ms, LISTENER, LISTEN);
    Record {
        local: Endpoint {
            addr: found.local.addr,
            port: Some(SERVER_PORT),
        },
        ..found
    }
}

impl Watched {
    fn accepted(&mut self, accept: &Accept) {
        self.take(|table, sink| table.accepted(accept, None, sink));
    }

    fn socket(&self, cookie: u16) -> &Socket {
        let of_it = |socket: &&Socket| socket.cookie == NonZero::new(cookie.into());
        self.table
            .sockets()
            .find(of_it)
            .expect("the socket is in the table")
    }

    /// Pid and source.
    fn owner(&self, cookie: u16) -> Option<(u32, OwnerSource)> {
        let owner = self.socket(cookie).owner();
        owner.map(|owner| (owner.process.pid, owner.source))
    }

    fn gauge(&self, state: TcpState, comm: &str) -> i64 {
        let comm = Some(Comm::from_bytes(comm.as_bytes()));
        self.gauges.get(&(state, comm)).copied().unwrap_or(0)
    }
}

#[test]
fn an_accept_gives_the_connection_to_who_took_it() {
    let mut watched = run(
        Identity::Cookie,
        &[
            listen(1),
            child(5, LISTEN, SYN_RECV),
            child(6, SYN_RECV, ESTABLISHED),
        ],
    );
    assert_eq!(watched.owner(CHILD), Some((MASTER, OwnerSource::Listener)));
    assert_eq!(watched.gauge(ESTABLISHED, "master"), 1);
    watched.accepted(&accept(7, CHILD, WORKER, "worker"));
    assert_eq!(watched.owner(CHILD), Some((WORKER, OwnerSource::Accept)));
    assert_eq!(watched.gauge(ESTABLISHED, "master"), 0);
    assert_eq!(watched.gauge(ESTABLISHED, "worker"), 1);
    // Nothing happened to the connection: no line.
    assert_eq!(watched.last().shown, None);
    // Who closes it, perhaps another, changes nothing.
    watched.apply(&called(child(9, ESTABLISHED, FIN_WAIT1), 77, "other"));
    assert_eq!(watched.owner(CHILD), Some((WORKER, OwnerSource::Accept)));
}

/// Accept needs only that the connection is in the listener's queue: it can come before the child's second event.
#[test]
fn an_accept_before_the_second_event_counts_too() {
    for identity in [Identity::Cookie, Identity::Address] {
        let mut watched = run(identity, &[listen(1), child(5, LISTEN, SYN_RECV)]);
        watched.accepted(&accept(6, CHILD, WORKER, "worker"));
        watched.apply(&child(7, SYN_RECV, ESTABLISHED));
        let (pid, source) = (watched.last().pid, watched.last().source);
        assert_eq!((pid, source), (Some(WORKER), Some(OwnerSource::Accept)));
        assert_eq!(watched.gauge(ESTABLISHED, "worker"), 1);
    }
}

/// One from before the start, which neither an event nor a dump has shown.
#[test]
fn an_accept_of_an_unknown_socket_waits_for_what_shows_it() {
    for identity in [Identity::Cookie, Identity::Address] {
        let mut watched = run(identity, &[]);
        watched.accepted(&accept(6, CHILD, WORKER, "worker"));
        assert!(watched.table.is_empty());
        watched.apply(&child(7, ESTABLISHED, CLOSE_WAIT));
        let (pid, source) = (watched.last().pid, watched.last().source);
        assert_eq!((pid, source), (Some(WORKER), Some(OwnerSource::Accept)));
    }
    for identity in [Identity::Cookie, Identity::Address] {
        let mut watched = run(identity, &[]);
        watched.accepted(&accept(6, CHILD, WORKER, "worker"));
        watched.reconcile(&dump(8, 9, vec![child_record(8, 1)]));
        assert_eq!(watched.owner(CHILD), Some((WORKER, OwnerSource::Accept)));
    }
}

/// The kernel uses addresses again at once.
#[test]
fn an_accept_is_not_the_next_sockets_at_that_address() {
    let again = [
        child(20, LISTEN, SYN_RECV),
        child(21, SYN_RECV, ESTABLISHED),
    ];
    let connects = [
        event(20, CHILD, CLOSE, SYN_SENT),
        event(21, CHILD, SYN_SENT, ESTABLISHED),
    ];
    for next in [again, connects] {
        let mut watched = run(Identity::Address, &[]);
        watched.accepted(&accept(6, CHILD, WORKER, "worker"));
        for event in &next {
            watched.apply(event);
        }
        assert_eq!(watched.last().shown.map(|(_, to)| to), Some(ESTABLISHED));
        assert_eq!(watched.last().pid, None);
    }
}

#[test]
fn an_accept_that_nothing_follows_is_forgotten() {
    let mut watched = run(Identity::Cookie, &[]);
    watched.accepted(&accept(6, CHILD, WORKER, "worker"));
    watched.take(|table, sink| table.flush_children(7 * MS, sink));
    watched.apply(&child(2000, ESTABLISHED, CLOSE_WAIT));
    assert_eq!(watched.owner(CHILD), None);
}

#[test]
fn of_several_holders_the_one_that_started_first_counts() {
    let established = event(1, 7, SYN_SENT, ESTABLISHED);
    let (old, young) = (process(50, "old"), process(60, "young"));
    for holders in [
        [holder(old, &[7]), holder(young, &[7, 8])],
        [holder(young, &[7, 8]), holder(old, &[7])],
    ] {
        let mut watched = run(
            Identity::Cookie,
            &[established, event(1, 8, SYN_SENT, ESTABLISHED)],
        );
        assert_eq!(watched.socket(7).holders, None);
        watched.swept(2, &holders);
        assert_eq!(watched.owner(7), Some((50, OwnerSource::Sweep)));
        assert_eq!(watched.owner(8), Some((60, OwnerSource::Sweep)));
        assert_eq!(watched.socket(7).holders, NonZero::new(2));
        assert_eq!(watched.socket(8).holders, NonZero::new(1));
        assert_eq!(watched.gauge(ESTABLISHED, "old"), 1);
        assert_eq!(watched.gauge(ESTABLISHED, "young"), 1);
        // The old one closes its descriptor.
        watched.swept(3, &[holder(young, &[7, 8])]);
        assert_eq!(watched.owner(7), Some((60, OwnerSource::Sweep)));
        assert_eq!(watched.socket(7).holders, NonZero::new(1));
    }
}

/// How it was known first says more than that a sweep saw it too; but a listener and a closer were second best.
#[test]
fn a_sweep_that_finds_the_same_process_keeps_the_better_source() {
    let worker = process(WORKER, "worker");
    let connects = called(event(1, 7, CLOSE, SYN_SENT), WORKER, "worker");
    let mut watched = run(Identity::Cookie, &[connects]);
    watched.swept(2, &[holder(worker, &[7])]);
    assert_eq!(watched.owner(7), Some((WORKER, OwnerSource::Connect)));

    let opened = [
        listen(1),
        child(5, LISTEN, SYN_RECV),
        child(6, SYN_RECV, ESTABLISHED),
    ];
    let mut watched = run(Identity::Cookie, &opened);
    watched.accepted(&accept(7, CHILD, WORKER, "worker"));
    let master = process(MASTER, "master");
    watched.swept(8, &[holder(master, &[LISTENER]), holder(worker, &[CHILD])]);
    assert_eq!(watched.owner(CHILD), Some((WORKER, OwnerSource::Accept)));
    assert_eq!(watched.owner(LISTENER), Some((MASTER, OwnerSource::Listen)));

    // A server of one process: accepted, which nothing but the sweep can tell.
    let mut watched = run(Identity::Cookie, &opened);
    watched.swept(8, &[holder(master, &[LISTENER, CHILD])]);
    assert_eq!(watched.owner(CHILD), Some((MASTER, OwnerSource::Sweep)));

    // It shut the connection down, and holds it.
    let mut watched = run(Identity::Cookie, &[child(6, SYN_RECV, ESTABLISHED)]);
    watched.apply(&called(child(7, ESTABLISHED, FIN_WAIT1), WORKER, "worker"));
    assert_eq!(watched.owner(CHILD), Some((WORKER, OwnerSource::Closer)));
    watched.swept(8, &[holder(worker, &[CHILD])]);
    assert_eq!(watched.owner(CHILD), Some((WORKER, OwnerSource::Sweep)));
}

/// The descriptor was another socket's, which had the address when the sweep began.
#[test]
fn a_sweep_tells_nothing_of_the_next_socket_at_an_address() {
    let holders = [Holder {
        sockets: vec![held(address(7))],
        ..holder(process(WORKER, "worker"), &[])
    }];
    for (began, expected) in [(10, None), (30, Some((WORKER, OwnerSource::Sweep)))] {
        let mut watched = run(Identity::Address, &[event(20, 7, CLOSE, SYN_SENT)]);
        let sweep = Sweep::new(
            Some(holders.to_vec()),
            FxHashMap::default(),
            (began * MS, began * MS),
        );
        watched.sweep(40, sweep);
        assert_eq!(watched.owner(7), expected);
    }
}

/// The last ACK came when the state was entered, or later; what came before the tracer is not exact for that.
#[test]
fn a_socket_that_received_no_ack_for_long_is_no_younger() {
    let age = |state, began_ms, quiet_ms| {
        let mut watched = Watched::new(Identity::Cookie);
        watched.reconcile(&dump(20_000, 20_000, vec![record(20_000, 7, state)]));
        let holders = [Holder {
            sockets: vec![Held {
                quiet_ns: NonZero::new(quiet_ms * MS),
                ..held(7)
            }],
            ..holder(process(WORKER, "worker"), &[])
        }];
        let time_ns = (began_ms * MS, 21_000 * MS);
        let sweep = Sweep::new(Some(holders.to_vec()), FxHashMap::default(), time_ns);
        watched.sweep(21_000, sweep);
        let row = &watched.rows()[0];
        (row.since_ns / MS, row.age_exact)
    };
    for state in [ESTABLISHED, FIN_WAIT2, CLOSE_WAIT, CLOSING] {
        assert_eq!(age(state, 20_500, 15_000), (6_000, false));
        // Data was acknowledged since.
        assert_eq!(age(state, 20_500, 10), (20_000, false));
        // It may have been in another state still.
        assert_eq!(age(state, 19_900, 15_000), (20_000, false));
    }
    // No ACK leads there.
    for state in [LISTEN, SYN_SENT, FIN_WAIT1, LAST_ACK] {
        assert_eq!(age(state, 20_500, 15_000), (20_000, false));
    }

    // Its entry was seen.
    let mut watched = run(Identity::Cookie, &[event(20_000, 7, SYN_SENT, ESTABLISHED)]);
    let quiet = Held {
        quiet_ns: NonZero::new(15_000 * MS),
        ..held(7)
    };
    watched.swept(
        21_000,
        &[Holder {
            sockets: vec![quiet],
            ..holder(process(WORKER, "worker"), &[])
        }],
    );
    assert_eq!(watched.rows()[0].since_ns, 20_000 * MS);
}

/// The sweep came to who accepts or connects too early, and to a process that was forked for an instant in time.
#[test]
fn a_sweep_that_began_before_an_event_told_the_owner_does_not_overrule_it() {
    const FORKED: u32 = 60;
    let unaccepted = [
        listen(1),
        child(5, LISTEN, SYN_RECV),
        child(6, SYN_RECV, ESTABLISHED),
    ];
    let taken = || accept(20, CHILD, WORKER, "worker");
    let connects = called(event(20, CHILD, CLOSE, SYN_SENT), WORKER, "worker");
    for identity in [Identity::Cookie, Identity::Address] {
        let mut accepted = run(identity, &unaccepted);
        accepted.accepted(&taken());
        let mut early = run(identity, &unaccepted[..2]);
        early.accepted(&taken());
        early.apply(&child(21, SYN_RECV, ESTABLISHED));
        let mut dumped = run(identity, &[]);
        dumped.accepted(&taken());
        dumped.reconcile(&dump(50, 51, vec![child_record(50, 1)]));
        for (mut watched, source) in [
            (accepted, OwnerSource::Accept),
            (early, OwnerSource::Accept),
            (dumped, OwnerSource::Accept),
            (run(identity, &[connects]), OwnerSource::Connect),
        ] {
            let key = match identity {
                Identity::Cookie => u64::from(CHILD),
                Identity::Address | Identity::Ends => address(CHILD),
            };
            let sweep = |began_ms: u64, pid| {
                let found = Holder {
                    sockets: vec![held(key)],
                    ..holder(process(pid, "found"), &[])
                };
                let time_ns = (began_ms * MS, 60 * MS);
                Sweep::new(Some(vec![found]), FxHashMap::default(), time_ns)
            };
            for began_ms in [10, 20] {
                watched.sweep(60, sweep(began_ms, FORKED));
                assert_eq!(watched.owner(CHILD), Some((WORKER, source)));
                // Nor is that one the only holder.
                assert_eq!(watched.socket(CHILD).holders, None);
            }
            // Passed on: one that began later is right.
            watched.sweep(61, sweep(21, FORKED));
            let swept = Some((FORKED, OwnerSource::Sweep));
            assert_eq!(watched.owner(CHILD), swept);
            assert_eq!(watched.socket(CHILD).holders, NonZero::new(1));
        }
    }
}

#[test]
fn a_sweep_moves_what_a_renamed_process_holds() {
    let connects = called(event(1, 7, CLOSE, SYN_SENT), WORKER, "shell");
    let mut watched = run(Identity::Cookie, &[connects]);
    assert_eq!(watched.gauge(SYN_SENT, "shell"), 1);
    watched.swept(2, &[holder(process(WORKER, "curl"), &[7])]);
    assert_eq!(watched.owner(7), Some((WORKER, OwnerSource::Connect)));
    assert_eq!(watched.gauge(SYN_SENT, "shell"), 0);
    assert_eq!(watched.gauge(SYN_SENT, "curl"), 1);
    // `/proc` may lack a name; that takes none away.
    let nameless = Process {
        comm: None,
        ..process(WORKER, "")
    };
    watched.swept(3, &[holder(nameless, &[7])]);
    assert_eq!(watched.gauge(SYN_SENT, "curl"), 1);
}

/// `/proc` rounds it down to a tick of 10 ms: the start that the kernel gave stays.
#[test]
fn a_rounded_start_is_the_same_process_and_a_later_one_is_not() {
    let exact = with(event(1, 7, CLOSE, SYN_SENT), |event| {
        *event = by(*event, WORKER, "curl");
        event.start_ns = 1_234_567_890;
    });
    let swept_with = |start_ns| {
        let mut watched = run(Identity::Cookie, &[exact]);
        let found = Process {
            start_ns,
            ..process(WORKER, "curl")
        };
        watched.swept(2, &[holder(found, &[7])]);
        let Owner { process, source } = watched.socket(7).owner().expect("an owner");
        (process.start_ns, source)
    };
    assert_eq!(
        swept_with(1_230_000_000),
        (1_234_567_890, OwnerSource::Connect)
    );
    // The pid was given away.
    assert_eq!(
        swept_with(1_250_000_000),
        (1_250_000_000, OwnerSource::Sweep)
    );
}

/// It may be on its way to another process, or the sweep came too early.
#[test]
fn a_sweep_never_takes_an_owner_away() {
    let connects = called(event(1, 7, CLOSE, SYN_SENT), WORKER, "curl");
    let mut watched = run(Identity::Cookie, &[connects]);
    watched.swept(2, &[]);
    watched.swept(3, &[holder(process(77, "other"), &[8])]);
    assert_eq!(watched.owner(7), Some((WORKER, OwnerSource::Connect)));
    assert_eq!(watched.gauge(SYN_SENT, "curl"), 1);
}

#[test]
fn time_wait_and_an_orphan_keep_the_last_owner() {
    for flags in [FLAG_DONE, FLAG_DEAD] {
        let mut watched = run(
            Identity::Cookie,
            &[
                event(1, 7, SYN_SENT, ESTABLISHED),
                event(2, 7, ESTABLISHED, FIN_WAIT1),
                event(3, 7, FIN_WAIT1, FIN_WAIT2),
            ],
        );
        watched.swept(4, &[holder(process(WORKER, "worker"), &[7])]);
        watched.apply(&with(event(5, 7, FIN_WAIT2, CLOSE), |event| {
            event.flags |= flags;
        }));
        watched.swept(6, &[]);
        assert_eq!(watched.owner(7), Some((WORKER, OwnerSource::Sweep)));
        let state = watched.socket(7).state;
        assert_eq!(watched.gauge(state, "worker"), 1);
        // And through what a dump tells of it.
        watched.reconcile(&dump(990, 1200, vec![record(1000, 7, TIME_WAIT)]));
        assert_eq!(watched.owner(7), Some((WORKER, OwnerSource::Sweep)));
        assert_eq!(watched.gauge(TIME_WAIT, "worker"), 1);
    }
}

/// From before the start: nobody holds it, so the sweep tells of it only by who listens.
#[test]
fn a_connection_that_a_dump_finds_unaccepted_is_its_listeners() {
    let mut watched = Watched::new(Identity::Cookie);
    watched.reconcile(&dump(1, 2, vec![listener_record(1), child_record(1, 0)]));
    assert_eq!(watched.owner(CHILD), None);
    watched.swept(3, &[holder(process(MASTER, "master"), &[LISTENER])]);
    assert_eq!(watched.owner(LISTENER), Some((MASTER, OwnerSource::Sweep)));
    assert_eq!(watched.owner(CHILD), Some((MASTER, OwnerSource::Listener)));
    assert_eq!(watched.gauge(ESTABLISHED, "master"), 1);
    watched.swept(4, &[holder(process(WORKER, "worker"), &[CHILD])]);
    assert_eq!(watched.owner(CHILD), Some((WORKER, OwnerSource::Sweep)));
    // One that has a file, or had one, is not.
    let mut watched = Watched::new(Identity::Cookie);
    watched.reconcile(&dump(1, 2, vec![listener_record(1), child_record(1, 5)]));
    watched.swept(3, &[holder(process(MASTER, "master"), &[LISTENER])]);
    assert_eq!(watched.owner(CHILD), None);
}

/// The listener was passed on, and who had it closed its descriptor or is gone.
#[test]
fn a_connection_that_is_not_accepted_goes_with_its_listener() {
    let events = [
        listen(1),
        child(5, LISTEN, SYN_RECV),
        child(6, SYN_RECV, ESTABLISHED),
    ];
    let mut watched = run(Identity::Cookie, &events);
    assert_eq!(watched.owner(CHILD), Some((MASTER, OwnerSource::Listener)));
    // It may have been accepted by somebody whom the sweep can't see.
    watched.swept(7, &[holder(process(WORKER, "worker"), &[LISTENER])]);
    assert_eq!(watched.owner(LISTENER), Some((WORKER, OwnerSource::Sweep)));
    assert_eq!(watched.owner(CHILD), Some((MASTER, OwnerSource::Listener)));
    for (inode, owner) in [(5, MASTER), (0, WORKER)] {
        watched.reconcile(&dump(
            100,
            101,
            vec![listener_record(100), child_record(100, inode)],
        ));
        watched.swept(102, &[holder(process(WORKER, "worker"), &[LISTENER])]);
        assert_eq!(watched.owner(CHILD), Some((owner, OwnerSource::Listener)));
    }
    assert_eq!(watched.gauge(ESTABLISHED, "worker"), 1);
    // Who has accepted it is not asked who listens.
    watched.swept(103, &[holder(process(MASTER, "master"), &[CHILD])]);
    watched.swept(104, &[holder(process(WORKER, "worker"), &[LISTENER])]);
    assert_eq!(watched.owner(CHILD), Some((MASTER, OwnerSource::Sweep)));
}

/// One that nobody has accepted yet, where accepts are seen, is no reason for one.
#[test]
fn a_sweep_is_wanted_where_only_it_can_tell() {
    let opened = [
        listen(1),
        child(5, LISTEN, SYN_RECV),
        child(6, SYN_RECV, ESTABLISHED),
    ];
    let wants = |accepts: bool, events: &[SetState]| {
        let mut watched = Watched::new(Identity::Cookie);
        if accepts {
            watched.table.sees_accepts();
        }
        for event in events {
            watched.apply(event);
        }
        let wants = watched.table.wants_sweep();
        assert!(!watched.table.wants_sweep(), "asked twice for the same");
        wants
    };
    assert!(wants(false, &opened));
    assert!(!wants(true, &opened));
    // Who listens is not known, or not which of several: its accept will tell all the same.
    assert!(wants(false, &opened[1..]));
    assert!(!wants(true, &opened[1..]));
    // What it is, is not known: its beginning was lost.
    assert!(wants(true, &opened[2..]));
    let connects = called(event(1, 7, CLOSE, SYN_SENT), WORKER, "curl");
    assert!(!wants(
        false,
        &[connects, event(2, 7, SYN_SENT, ESTABLISHED)]
    ));
}

/// What comes to the table, in any order.
#[derive(Clone, Debug)]
enum Door {
    Event(u16, u8, u8, u8, u32),
    Accept(u16, u32),
    Sweep(Vec<(u32, Vec<u16>)>),
    Dump(Vec<(u16, TcpState)>),
    Flush,
}

fn doors() -> impl Strategy<Value = Vec<Door>> {
    let socket = || 1u16..6;
    let pid = || 1u32..5;
    let state = || prop::sample::select(TcpState::ALL.to_vec());
    let door = prop_oneof![
        6 => (socket(), 0u8..13, 0u8..13, any::<u8>(), pid())
            .prop_map(|(socket, from, to, flags, pid)| Door::Event(socket, from, to, flags, pid)),
        2 => (socket(), pid()).prop_map(|(socket, pid)| Door::Accept(socket, pid)),
        2 => prop::collection::vec((pid(), prop::collection::vec(socket(), 0..5)), 0..4)
            .prop_map(Door::Sweep),
        1 => prop::collection::vec((socket(), state()), 0..8).prop_map(Door::Dump),
        1 => Just(Door::Flush),
    ];
    prop::collection::vec(door, 0..150)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// [`Watched`] holds the changes against what the table has after each of them: no gauge is left behind under
    /// another name, and their sum stays that of the sockets.
    #[test]
    fn gauges_by_name_are_conserved_whatever_comes(
        doors in doors(),
        identity in prop::sample::select(vec![
            Identity::Cookie,
            Identity::Address,
            Identity::Ends,
        ]),
        accepts in prop::bool::ANY,
    ) {
        let mut watched = Watched::new(identity);
        if accepts {
            watched.table.sees_accepts();
        }
        // A name for each pid and time, so that processes are renamed too.
        let name = |pid: u32, now: u64| format!("p{pid}-{}", now / 20);
        for (now, door) in (1..).zip(doors) {
            match door {
                Door::Event(socket, from, to, flags, pid) => {
                    let states = (TcpState::from_kernel(from), TcpState::from_kernel(to));
                    let made = called(event(now, socket, states.0, states.1), pid, &name(pid, now));
                    watched.apply(&with(made, |event| event.flags = flags));
                }
                Door::Accept(socket, pid) => {
                    watched.accepted(&accept(now, socket, pid, &name(pid, now)));
                }
                Door::Sweep(found) => {
                    let holders: Vec<Holder> = found
                        .iter()
                        .map(|(pid, sockets)| holder(process(*pid, &name(*pid, now)), sockets))
                        .collect();
                    let owned = |watched: &Watched| {
                        let sockets = watched.table.full.sockets();
                        sockets.filter(|socket| socket.owned.is_some()).count()
                    };
                    let before = owned(&watched);
                    watched.swept(now, &holders);
                    prop_assert!(owned(&watched) >= before);
                }
                Door::Dump(found) => {
                    let records = found.iter().map(|&(socket, state)| record(now, socket, state));
                    watched.table.snapshot_begins();
                    watched.reconcile(&dump(now, now, records.collect()));
                }
                Door::Flush => {
                    watched.take(|table, sink| table.flush_children(now * MS, sink));
                }
            }
        }
    }
}

#[test]
fn the_gauges_follow_an_owner_that_has_another_name_now() {
    let mut watched = run(
        Identity::Cookie,
        &[
            by(event(1, 1, CLOSE, SYN_SENT), 10, "old"),
            by(event(2, 2, CLOSE, SYN_SENT), 10, "old"),
            event(3, 2, SYN_SENT, ESTABLISHED),
            by(event(4, 2, ESTABLISHED, FIN_WAIT1), 10, "old"),
            event(5, 2, FIN_WAIT1, FIN_WAIT2),
            with(event(6, 2, FIN_WAIT2, CLOSE), |event| {
                event.flags |= FLAG_DONE
            }),
            by(event(7, 3, CLOSE, SYN_SENT), 11, "other"),
            // Without BTF the start is not known: the pid may be anybody's by now.
            with(by(event(8, 4, CLOSE, SYN_SENT), 12, "old"), |event| {
                event.start_ns = 0
            }),
        ],
    );
    watched.reconcile(&Snapshot {
        netns: Vec::new(),
        whole_host: false,
        ..dump(9, 9, Vec::new())
    });
    let owners = FxHashSet::from_iter([(10, 10), (11, 11)]);
    assert_eq!(watched.merged.owners, owners);
    let told = watched.seen.len();
    let new = Comm::from_bytes(b"new");
    // A later process has the pid 11.
    let names = FxHashMap::from_iter([((10, 10), new), ((11, 99), new), ((12, 0), new)]);
    for time in [9, 10] {
        watched.sweep(
            time,
            Sweep::new(None, names.clone(), (time * MS, time * MS)),
        );
    }
    let gauge = |state, comm: &str| {
        let comm = Some(Comm::from_bytes(comm.as_bytes()));
        watched
            .gauges
            .get(&(state, comm))
            .copied()
            .unwrap_or_default()
    };
    assert_eq!([gauge(SYN_SENT, "new"), gauge(TIME_WAIT, "new")], [1, 1]);
    assert_eq!([gauge(SYN_SENT, "old"), gauge(TIME_WAIT, "old")], [1, 0]);
    assert_eq!(gauge(SYN_SENT, "other"), 1);
    // Each is told once, and no stream shows it.
    let renamed = &watched.seen[told..];
    assert_eq!(renamed.len(), 2);
    assert!(
        renamed
            .iter()
            .all(|seen| seen.shown.is_none() && seen.kernel.is_none())
    );
}
