//! The rules of the counting, and a proptest that recounts everything from the sockets themselves.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tcpstate_common::TcpState;

use super::names::SHOWN_NS;
use super::*;
use crate::model::view::{FAILURE_REASONS, GAUGE_STATES};
use crate::model::{ConnectionId, End, Endpoint, Evidence, Family, Owner, OwnerSource, Process};
use crate::table::{Discard, Owned, Socket};

const SECOND: u64 = 1_000_000_000;
const HOUR: u64 = 3600 * SECOND;

fn owned_by(comm: &str, source: OwnerSource) -> Arc<Owned> {
    let process = Process {
        pid: 1,
        start_ns: 1,
        comm: Some(Comm::from_bytes(comm.as_bytes())),
    };
    Arc::new(Owned {
        owner: Owner { process, source },
        container: None,
    })
}

fn socket(comm: Option<&str>, state: TcpState) -> Socket {
    Socket {
        id: ConnectionId::Own(1),
        cookie: None,
        netns: None,
        family: Family::Ipv4,
        local: Endpoint::default(),
        remote: Endpoint::default(),
        state,
        role: Some(Role::Active),
        owned: comm.map(|comm| owned_by(comm, OwnerSource::Connect)),
        uid: None,
        holders: None,
        established: false,
    }
}

fn place(socket: &Socket) -> Option<Place> {
    let gone = socket.state == TcpState::CLOSE;
    (!gone).then_some(Place {
        state: socket.state,
        comm: socket.owner().and_then(|owner| owner.process.comm),
        source: socket.owner().map(|owner| owner.source),
    })
}

/// What the table would say of a socket that was `before` and is `after`.
fn change<'a>(time_ns: u64, before: Option<&Socket>, after: &'a Socket) -> Change<'a> {
    let from = before.map_or(TcpState::CLOSE, |before| before.state);
    let moved = (from != after.state).then_some((from, after.state));
    Change {
        time_ns,
        socket: after,
        kernel: moved,
        shown: moved,
        dwell: Dwell::None,
        evidence: Evidence::Tracepoint,
        end: None,
        before: before.and_then(place),
        after: place(after),
    }
}

/// Opens one socket of that name, in ESTABLISHED.
fn open(stats: &mut Stats, time_ns: u64, comm: &str) -> Socket {
    let opened = socket(Some(comm), TcpState::ESTABLISHED);
    stats.apply(&change(time_ns, None, &opened));
    opened
}

fn close(stats: &mut Stats, time_ns: u64, open: &Socket) {
    let closed = Socket {
        state: TcpState::CLOSE,
        ..open.clone()
    };
    stats.apply(&change(time_ns, Some(open), &closed));
}

fn at(stats: &mut Stats, now_ns: u64) -> Counted {
    stats.counted(now_ns, 0, [0; 4])
}

fn labels(counted: &Counted) -> Vec<&str> {
    counted.comms.iter().map(|comm| &*comm.comm).collect()
}

fn comm<'a>(counted: &'a Counted, label: &str) -> &'a CommView {
    let found = counted.comms.iter().find(|comm| &*comm.comm == label);
    found.unwrap_or_else(|| panic!("no `{label}` among {:?}", labels(counted)))
}

fn open_sockets(counted: &Counted, label: &str) -> u64 {
    comm(counted, label).sockets.iter().sum()
}

#[test]
fn a_page_begins_with_sockets_without_owner_alone() {
    let counted = at(&mut Stats::new(2), 0);
    assert_eq!(labels(&counted), [NONE]);
    assert_eq!(counted.sockets, [0; 10]);
}

/// How often owners came to be known in each way.
fn owners(stats: &mut Stats) -> Vec<(&'static str, u64)> {
    let lookups = at(stats, 0).owner_lookups;
    lookups
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .collect()
}

#[test]
fn an_owner_counts_when_it_comes_to_be_known_and_again_by_another_way() {
    let mut stats = Stats::new(2);
    let nobodys = socket(None, TcpState::ESTABLISHED);
    stats.apply(&change(1, None, &nobodys));
    assert_eq!(owners(&mut stats), []);
    let owned = |source, state| Socket {
        owned: Some(owned_by("server", source)),
        ..socket(None, state)
    };
    let [waiting, accepted, closing, closed] = [
        owned(OwnerSource::Listener, TcpState::ESTABLISHED),
        owned(OwnerSource::Accept, TcpState::ESTABLISHED),
        owned(OwnerSource::Accept, TcpState::CLOSE_WAIT),
        owned(OwnerSource::Accept, TcpState::CLOSE),
    ];
    stats.apply(&change(2, Some(&nobodys), &waiting));
    stats.apply(&change(3, Some(&waiting), &accepted));
    stats.apply(&change(4, Some(&accepted), &closing));
    stats.apply(&change(5, Some(&closing), &closed));
    assert_eq!(owners(&mut stats), [("accept", 1), ("listener", 1)]);

    // One that nobody owned until its close told of somebody.
    let closed = owned(OwnerSource::Closer, TcpState::CLOSE);
    stats.apply(&change(6, None, &nobodys));
    stats.apply(&change(7, Some(&nobodys), &closed));
    let all = [("accept", 1), ("listener", 1), ("closer", 1)];
    assert_eq!(owners(&mut stats), all);
    // Nobody's again, as after a disconnect and a connect by the kernel itself.
    stats.apply(&change(8, None, &waiting));
    stats.apply(&change(9, Some(&waiting), &nobodys));
    assert_eq!(owners(&mut stats)[1], ("listener", 2));
}

#[test]
fn a_name_without_place_is_other_in_every_metric() {
    let mut stats = Stats::new(1);
    let first = open(&mut stats, 1, "first");
    let second = open(&mut stats, 2, "second");
    let third = open(&mut stats, 3, "third");
    let ended = Socket {
        state: TcpState::CLOSE,
        established: true,
        ..second.clone()
    };
    stats.apply(&Change {
        dwell: Dwell::Seen(5),
        end: Some(End::LocalClose),
        ..change(4, Some(&second), &ended)
    });
    let counted = at(&mut stats, 5);
    assert_eq!(labels(&counted), [NONE, OTHER, "first"]);
    assert_eq!(counted.comm_overflow, 2);
    assert_eq!(open_sockets(&counted, "first"), 1);
    assert_eq!(open_sockets(&counted, OTHER), 1);
    let other = comm(&counted, OTHER);
    assert_eq!(other.ends.iter().sum::<u64>(), 1);
    assert_eq!(other.dwell[0].map(|dwell| dwell.sum_ns), Some(5));

    // The first has no live socket any more: the third, which has one, takes its place once all that the first has
    // counted has been shown.
    close(&mut stats, 6, &first);
    let counted = at(&mut stats, 5 + SHOWN_NS);
    assert_eq!(labels(&counted), [NONE, OTHER, "first"]);
    let counted = at(&mut stats, 6 + SHOWN_NS);
    assert_eq!(labels(&counted), [NONE, OTHER, "third"]);
    assert_eq!(open_sockets(&counted, "third"), 1);
    assert_eq!(open_sockets(&counted, OTHER), 0);
    // `<other>` keeps what it counted, or it would seem to have been reset.
    assert_eq!(comm(&counted, OTHER).ends.iter().sum::<u64>(), 1);
    close(&mut stats, SHOWN_NS + 8, &third);
    assert_eq!(at(&mut stats, SHOWN_NS + 9).sockets, [0; 10]);
}

#[test]
fn a_name_keeps_its_place_for_an_hour_without_sockets() {
    let mut stats = Stats::new(5);
    let a = open(&mut stats, 0, "a");
    let b = open(&mut stats, 0, "b");
    close(&mut stats, 10 * SECOND, &a);
    close(&mut stats, 20 * SECOND, &b);
    let counted = at(&mut stats, HOUR + 10 * SECOND - 1);
    assert_eq!(labels(&counted), [NONE, "a", "b"]);
    let counted = at(&mut stats, HOUR + 10 * SECOND);
    assert_eq!(labels(&counted), [NONE, "b"]);
    // A new socket in time: the hour begins anew with its end.
    let b = open(&mut stats, HOUR + 11 * SECOND, "b");
    let counted = at(&mut stats, 3 * HOUR);
    assert_eq!(labels(&counted), [NONE, "b"]);
    close(&mut stats, 3 * HOUR, &b);
    assert_eq!(labels(&at(&mut stats, 4 * HOUR - 1)), [NONE, "b"]);
    assert_eq!(labels(&at(&mut stats, 4 * HOUR)), [NONE]);
    assert_eq!(at(&mut stats, 4 * HOUR).comm_overflow, 0);
}

#[test]
fn the_name_that_was_idle_for_longest_is_displaced_first() {
    let mut stats = Stats::new(3);
    for (time_ns, name) in [(1, "a"), (2, "b"), (3, "c")] {
        let opened = open(&mut stats, time_ns, name);
        close(&mut stats, 10 * time_ns, &opened);
    }
    let again = open(&mut stats, 40, "a");
    close(&mut stats, 50, &again);
    open(&mut stats, 60, "d");
    let counted = at(&mut stats, 60);
    assert_eq!(labels(&counted), [NONE, OTHER, "a", "b", "c"]);
    let counted = at(&mut stats, 60 + SHOWN_NS);
    assert_eq!(labels(&counted), [NONE, OTHER, "a", "c", "d"]);
    assert_eq!(counted.comm_overflow, 1);
}

/// Processes that take one name after the other, each for one connect that fails.
#[test]
fn no_count_vanishes_with_names_that_come_and_go() {
    let mut stats = Stats::new(100);
    for count in 0..10_000_u64 {
        let name = format!("n{count}");
        let opened = socket(Some(&name), TcpState::SYN_SENT);
        stats.apply(&change(count * SECOND / 1000, None, &opened));
        let failed = Socket {
            state: TcpState::CLOSE,
            ..opened.clone()
        };
        stats.apply(&Change {
            end: Some(End::Refused),
            ..change(count * SECOND / 1000, Some(&opened), &failed)
        });
    }
    let counted = at(&mut stats, 10 * SECOND);
    assert_eq!(counted.comms.iter().map(failures).sum::<u64>(), 10_000);
    assert_eq!(failures(comm(&counted, OTHER)), 9_900);
    assert_eq!(counted.comm_overflow, 9_900);
    assert_eq!(counted.comms.len(), 102);
}

fn failures(comm: &CommView) -> u64 {
    comm.failures.iter().sum()
}

/// An end of which no live socket tells keeps a name from losing its place before it was shown.
#[test]
fn what_a_name_counts_without_a_socket_is_shown_too() {
    let mut stats = Stats::new(1);
    let first = open(&mut stats, 0, "first");
    close(&mut stats, 0, &first);
    open(&mut stats, 0, "second");
    let unowned = socket(None, TcpState::ESTABLISHED);
    stats.apply(&change(1, None, &unowned));
    let closed = Socket {
        established: true,
        ..socket(Some("first"), TcpState::CLOSE)
    };
    stats.apply(&Change {
        end: Some(End::ResetSent),
        ..change(SHOWN_NS, Some(&unowned), &closed)
    });
    let counted = at(&mut stats, SHOWN_NS + 1);
    assert_eq!(comm(&counted, "first").ends[4], 1);
    assert_eq!(
        labels(&at(&mut stats, 2 * SHOWN_NS)),
        [NONE, OTHER, "second"]
    );
}

#[test]
fn an_end_counts_for_an_owner_that_is_known_only_then() {
    let mut stats = Stats::new(1);
    let unowned = socket(None, TcpState::ESTABLISHED);
    let closed_by = |name| Socket {
        established: true,
        ..socket(Some(name), TcpState::CLOSE)
    };
    for name in ["closer", "another"] {
        stats.apply(&change(1, None, &unowned));
        let closed = closed_by(name);
        stats.apply(&Change {
            end: Some(End::ResetSent),
            ..change(2, Some(&unowned), &closed)
        });
    }
    let counted = at(&mut stats, 3);
    assert_eq!(labels(&counted), [NONE, OTHER, "closer"]);
    assert_eq!(comm(&counted, "closer").ends[4], 1);
    // It had no live socket, so it displaces nobody before an hour is over.
    assert_eq!(comm(&counted, OTHER).ends[4], 1);
    assert_eq!(counted.comm_overflow, 1);
}

#[test]
fn a_rename_moves_the_gauges_and_nothing_else() {
    let mut stats = Stats::new(5);
    let sh = open(&mut stats, 1, "sh");
    let nginx = Socket {
        owned: socket(Some("nginx"), TcpState::ESTABLISHED).owned,
        ..sh.clone()
    };
    stats.apply(&change(2, Some(&sh), &nginx));
    let counted = at(&mut stats, 3);
    assert_eq!(open_sockets(&counted, "sh"), 0);
    assert_eq!(open_sockets(&counted, "nginx"), 1);
    assert_eq!(
        comm(&counted, "sh").dwell[0].map(|dwell| dwell.count),
        Some(0)
    );
}

#[test]
fn connections_count_at_established_by_role() {
    let mut stats = Stats::new(5);
    let cases = [
        (TcpState::SYN_SENT, Some(Role::Active)),
        (TcpState::SYN_RECV, Some(Role::Passive)),
        (TcpState::SYN_RECV, Some(Role::Passive)),
        (TcpState::SYN_RECV, None),
    ];
    for (from, role) in cases {
        let before = socket(Some("a"), from);
        stats.apply(&change(1, None, &before));
        let after = Socket {
            role,
            established: true,
            ..socket(Some("a"), TcpState::ESTABLISHED)
        };
        stats.apply(&change(2, Some(&before), &after));
    }
    // Found established by a snapshot: nobody saw it get there.
    let found = socket(Some("a"), TcpState::ESTABLISHED);
    stats.apply(&Change {
        kernel: None,
        shown: None,
        evidence: Evidence::Snapshot,
        ..change(3, None, &found)
    });
    let counted = at(&mut stats, 4);
    assert_eq!(comm(&counted, "a").connections, [1, 2, 1]);
    assert_eq!(open_sockets(&counted, "a"), 5);
}

#[test]
fn an_end_is_an_end_or_a_failure_or_neither() {
    for end in End::ALL.iter().copied() {
        for (established, role) in [
            (true, Some(Role::Active)),
            (true, None),
            (false, Some(Role::Active)),
            (false, Some(Role::Passive)),
            (false, None),
        ] {
            let mut stats = Stats::new(5);
            let before = socket(Some("a"), TcpState::SYN_SENT);
            stats.apply(&change(1, None, &before));
            let after = Socket {
                role,
                established,
                ..socket(Some("a"), TcpState::CLOSE)
            };
            stats.apply(&Change {
                end: Some(end),
                ..change(2, Some(&before), &after)
            });
            let counted = at(&mut stats, 3);
            let a = comm(&counted, "a");
            let ends: Vec<End> = (0..10)
                .filter(|&at| a.ends[at] > 0)
                .map(|at| End::ALL[at])
                .collect();
            let failures: Vec<End> = (0..5)
                .filter(|&at| a.failures[at] > 0)
                .map(|at| FAILURE_REASONS[at])
                .collect();
            let reason = if FAILURE_REASONS.contains(&end) {
                end
            } else {
                End::Unknown
            };
            match (established, role) {
                (true, _) => assert_eq!((ends, failures), (vec![end], vec![])),
                (false, Some(Role::Active)) => {
                    assert_eq!((ends, failures), (vec![], vec![reason]));
                }
                (false, _) => assert_eq!((ends, failures), (vec![], vec![])),
            }
        }
    }
}

#[test]
fn only_stays_that_events_can_time_count_or_are_discarded() {
    count_stays(Stats::new(5), Timed::new(false));
    let mut stats = Stats::new(5);
    stats.times_timewait();
    count_stays(stats, Timed::new(true));
}

fn count_stays(mut stats: Stats, timed: Timed) {
    let states = GAUGE_STATES
        .into_iter()
        .chain([TcpState::CLOSE, TcpState::NEW_SYN_RECV]);
    for state in states {
        for dwell in [
            Dwell::Seen(1_000_000),
            Dwell::Unknown(Discard::StartUnseen),
            Dwell::Unknown(Discard::Lost),
            Dwell::Unknown(Discard::Lost),
            Dwell::Unknown(Discard::Mismatch),
            Dwell::None,
        ] {
            let before = socket(Some("a"), state);
            stats.apply(&change(1, None, &before));
            let after = socket(Some("a"), TcpState::CLOSE);
            stats.apply(&Change {
                dwell,
                ..change(2, Some(&before), &after)
            });
        }
    }
    let counted = at(&mut stats, 3);
    for (state, dwell) in comm(&counted, "a").dwell.iter().enumerate() {
        assert_eq!(
            dwell.map(|dwell| (dwell.buckets[0], dwell.count)),
            timed.contains(state).then_some((1, 1))
        );
    }
    let all = 0..GAUGE_STATES.len();
    let states = all.filter(|&state| timed.contains(state)).count() as u64;
    assert_eq!(
        counted.dwell_discarded,
        [
            ("start_unseen", states),
            ("lost", 2 * states),
            ("mismatch", states)
        ]
    );
}

#[test]
fn a_state_has_a_histogram_once_a_socket_was_in_it() {
    let mut stats = Stats::new(1);
    let first = open(&mut stats, 1, "first");
    open(&mut stats, 1, "second");
    close(&mut stats, 2, &first);
    let counted = at(&mut stats, 2 + SHOWN_NS);
    // Taken along from the time when it waited for a place.
    let second = comm(&counted, "second");
    let present: Vec<_> = second.dwell.iter().map(Option::is_some).collect();
    assert_eq!(
        present,
        [
            true, false, false, false, false, false, false, false, false, false
        ]
    );
}

/// What a step of the proptest does to the socket at an index, or to the clock.
#[derive(Clone, Debug)]
enum Step {
    Open(usize, TcpState),
    Move(prop::sample::Index, TcpState),
    Rename(prop::sample::Index, usize),
    Look { after_ns: u64 },
}

const NAMES: [Option<&str>; 9] = [
    None,
    Some("a"),
    Some("b"),
    Some("c"),
    Some("d"),
    Some("<x"),
    Some("_x"),
    Some("<other>"),
    Some(""),
];

fn state() -> impl Strategy<Value = TcpState> {
    (0..=14_u8).prop_map(TcpState::from_kernel)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..NAMES.len(), state()).prop_map(|(name, state)| Step::Open(name, state)),
        4 => (any::<prop::sample::Index>(), state()).prop_map(|(at, state)| Step::Move(at, state)),
        3 => any::<prop::sample::Index>().prop_map(|at| Step::Move(at, TcpState::CLOSE)),
        1 => (any::<prop::sample::Index>(), 0..NAMES.len()).prop_map(|(at, name)| Step::Rename(at, name)),
        2 => (0..2 * HOUR).prop_map(|after_ns| Step::Look { after_ns }),
    ]
}

/// The label that a name has if it has a place.
fn label_of(name: usize) -> &'static str {
    match NAMES[name] {
        None => NONE,
        Some("<x") => "_x",
        Some("<other>") => "_other>",
        Some("") => "<empty>",
        Some(name) => name,
    }
}

proptest! {
    #[test]
    fn gauges_are_what_a_recount_gives(
        max in 0..6_usize,
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut stats = Stats::new(max);
        let mut open: Vec<(usize, Socket)> = Vec::new();
        let mut now_ns = 0;
        let mut left_ns: BTreeMap<&str, u64> = BTreeMap::new();
        for step in steps {
            now_ns += SECOND;
            match step {
                Step::Open(name, state) => {
                    let new = socket(NAMES[name], state);
                    stats.apply(&change(now_ns, None, &new));
                    open.push((name, new));
                }
                Step::Move(at, state) if !open.is_empty() => {
                    let at = at.index(open.len());
                    let after = Socket { state, ..open[at].1.clone() };
                    let change = Change {
                        dwell: Dwell::Seen(1),
                        ..change(now_ns, Some(&open[at].1), &after)
                    };
                    stats.apply(&change);
                    left_ns.insert(label_of(open[at].0), now_ns);
                    open[at].1 = after;
                }
                Step::Rename(at, name) if !open.is_empty() => {
                    let at = at.index(open.len());
                    let after = socket(NAMES[name], open[at].1.state);
                    stats.apply(&change(now_ns, Some(&open[at].1), &after));
                    left_ns.insert(label_of(open[at].0), now_ns);
                    open[at] = (name, after);
                }
                Step::Move(..) | Step::Rename(..) => {}
                Step::Look { after_ns } => now_ns += after_ns,
            }
            open.retain(|(_, socket)| socket.state != TcpState::CLOSE);

            let mut recount: BTreeMap<&str, StateCounts> = BTreeMap::new();
            for (name, socket) in &open {
                if let Some(state) = gauge_index(socket.state) {
                    recount.entry(label_of(*name)).or_default()[state] += 1;
                }
            }
            let live: BTreeSet<&str> = recount.keys().copied().filter(|&name| name != NONE).collect();
            prop_assert!(stats.names.waiting().count() + stats.names.places().count() <= max + live.len());

            if !matches!(step, Step::Look { .. }) {
                continue;
            }
            let counted = at(&mut stats, now_ns);
            let total = recount.values().fold([0; 10], |sum, counts| {
                std::array::from_fn(|state| sum[state] + counts[state])
            });
            prop_assert_eq!(counted.sockets, total);
            let labels = labels(&counted);
            prop_assert!(labels.is_sorted() && labels.iter().collect::<BTreeSet<_>>().len() == labels.len());
            let placed: BTreeSet<&str> =
                labels.iter().copied().filter(|&name| name != NONE && name != OTHER).collect();
            prop_assert!(placed.len() <= max);
            for label in &labels {
                if *label != OTHER {
                    let expected = recount.remove(label).unwrap_or_default();
                    prop_assert_eq!(comm(&counted, label).sockets, expected);
                }
            }
            // Nobody waits while a place is free, or taken by a name that has been without live sockets for long.
            recount.remove(NONE);
            prop_assert!(recount.is_empty() || placed.len() == max);
            if !recount.is_empty() {
                for name in placed.difference(&live) {
                    prop_assert!(now_ns - left_ns[name] < SHOWN_NS, "{} kept its place", name);
                }
            }
        }
    }

    /// Whoever scrapes often enough misses nothing, whichever names lose their places meanwhile.
    #[test]
    fn what_pages_show_adds_up_to_what_happened(
        max in 0..4_usize,
        steps in prop::collection::vec(
            (0..NAMES.len(), 0..4_u8, prop_oneof![0..4 * SECOND, 0..2 * HOUR]),
            1..80,
        ),
    ) {
        let mut stats = Stats::new(max);
        let mut open: Vec<Socket> = Vec::new();
        let (mut now_ns, mut happened, mut shown) = (0, 0, 0);
        let mut last: BTreeMap<Arc<str>, u64> = BTreeMap::new();
        for (name, action, wait_ns) in steps {
            let established = Socket { established: true, ..socket(NAMES[name], TcpState::ESTABLISHED) };
            let closing = match action {
                0 => {
                    stats.apply(&change(now_ns, None, &established));
                    open.push(established.clone());
                    None
                }
                1 => (!open.is_empty()).then(|| open.remove(0)),
                // At once; or one whose owner only its end tells.
                kind => {
                    let owned = if kind == 2 { established.owned.clone() } else { None };
                    let opened = Socket { owned, ..established.clone() };
                    stats.apply(&change(now_ns, None, &opened));
                    Some(opened)
                }
            };
            if let Some(before) = closing {
                let owned = before.owned.clone().or(established.owned.clone());
                let closed = Socket { state: TcpState::CLOSE, owned, ..before.clone() };
                let end = Some(End::LocalClose);
                stats.apply(&Change { end, ..change(now_ns, Some(&before), &closed) });
                happened += 1;
            }
            // A page now, and others while nothing happens, as far apart as they may be.
            for wait_ns in (0..=wait_ns).step_by(SHOWN_NS as usize) {
                let counted = at(&mut stats, now_ns + wait_ns);
                let ends = counted.comms.iter().map(|comm| (Arc::clone(&comm.comm), comm.ends.iter().sum()));
                let page: BTreeMap<_, u64> = ends.collect();
                for (label, value) in &page {
                    let before = last.get(label).copied().unwrap_or_default();
                    prop_assert!(*value >= before, "{} fell", label);
                    shown += value - before;
                }
                last = page;
            }
            prop_assert_eq!(shown, happened);
            now_ns += wait_ns;
        }
    }
}
