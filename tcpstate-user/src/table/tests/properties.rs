//! Whatever happens: against a kernel in miniature whose dumps are not atomic.

use proptest::prelude::*;

use super::identity::told;
use super::*;
use crate::table::Refused;

/// A step of the kernel in miniature.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) socket: usize,
    pub(super) choice: u8,
    wait_ms: u64,
}

pub(super) fn step(sockets: usize) -> impl Strategy<Value = Step> {
    (0..sockets, any::<u8>(), 1u64..60).prop_map(|(socket, choice, wait_ms)| Step {
        socket,
        choice,
        wait_ms,
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(6), 10..120)
}

/// Where a socket can go from a state. A →CLOSE from FIN_WAIT2 or CLOSING with DONE leaves a TIME_WAIT.
pub(super) fn next(state: TcpState, choice: u8) -> TcpState {
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

/// A record as a dump gives it. A full socket has the address of the one that was at its place before, a timewait socket
/// one of its own.
fn in_its_place(identity: Identity, record: Record, socket: u16) -> Record {
    let place = match record.state {
        TIME_WAIT => 6 + socket,
        _ => socket % 6,
    };
    let record = Record {
        address: Some(address(place)),
        ..record
    };
    told(identity, record)
}

impl Watched {
    /// As [`Watched::states`], where each socket has a port of its own.
    fn by_port(&self) -> BTreeMap<u64, TcpState> {
        let mut states = BTreeMap::new();
        for socket in self.table.sockets() {
            let port = socket.local.port.expect("each event tells it");
            let twice = states.insert(u64::from(port) - 1000, socket.state);
            assert_eq!(twice, None, "{socket:?} is there twice");
        }
        states
    }
}

/// Sockets that their ends can't tell apart: listeners that share a port, connects to the same address.
#[derive(Default)]
struct AlikeKernel {
    now_ms: u64,
    made: u16,
    sockets: BTreeMap<u16, Alike>,
}

#[derive(Clone, Copy)]
struct Alike {
    state: TcpState,
    /// The least that was free: used again at once.
    address: u16,
    /// The kernel has made one.
    cookie: bool,
}

impl AlikeKernel {
    /// Something happens, and the kernel says so.
    fn step(&mut self, identity: Identity, step: &Step) -> SetState {
        self.now_ms += step.wait_ms;
        let old = self.sockets.keys().nth(step.socket).copied();
        let number = old.unwrap_or(self.made);
        let socket = self.sockets.remove(&number).unwrap_or_else(|| {
            let used = |address| self.sockets.values().any(|it| it.address == address);
            Alike {
                state: CLOSE,
                address: (0..).find(|&address| !used(address)).expect("one is free"),
                cookie: step.choice & 4 != 0,
            }
        });
        let from = socket.state;
        let to = match from {
            CLOSE => [LISTEN, SYN_SENT][usize::from(step.choice) % 2],
            SYN_SENT => [ESTABLISHED, CLOSE][usize::from(step.choice) % 2],
            _ => CLOSE,
        };
        if old.is_none() {
            self.made += 1;
        }
        if to != CLOSE {
            let socket = Alike {
                state: to,
                ..socket
            };
            self.sockets.insert(number, socket);
        }
        with(event(self.now_ms, number + 1, from, to), |event| {
            event.sk = address(socket.address);
            event.local_port = match (from, to) {
                (LISTEN, _) | (_, LISTEN) => SERVER_PORT,
                (_, SYN_SENT) => 0,
                _ => event.local_port,
            };
            if !socket.cookie {
                event.cookie = 0;
            }
            if identity == Identity::Ends {
                (event.cookie, event.netns) = (0, 0);
            }
        })
    }

    fn read(&self, identity: Identity, number: u16) -> Option<Record> {
        let socket = self.sockets.get(&number)?;
        let mut record = record(self.now_ms, number + 1, socket.state);
        if socket.state == LISTEN {
            record.local.port = Some(SERVER_PORT);
        }
        record.address = (identity == Identity::Address).then(|| address(socket.address));
        if identity == Identity::Address && !socket.cookie {
            record.cookie = None;
        }
        Some(record)
    }

    fn gauges(&self) -> BTreeMap<TcpState, i64> {
        let mut gauges = BTreeMap::new();
        for socket in self.sockets.values() {
            *gauges.entry(socket.state).or_default() += 1;
        }
        gauges
    }
}

/// Steps before a dump, steps while it is read, where between those each socket is read, and steps between the parts of
/// the merge.
type Round = (Vec<Step>, Vec<Step>, Vec<usize>, Vec<Step>);

fn rounds() -> impl Strategy<Value = Vec<Round>> {
    let round = (
        prop::collection::vec(step(8), 0..6),
        prop::collection::vec(step(8), 0..6),
        prop::collection::vec(0usize..6, 8),
        prop::collection::vec(step(8), 0..4),
    );
    prop::collection::vec(round, 1..8)
}

/// After each dump, and before the next, there are as many in the table as in the kernel, and nothing was corrected.
fn alike(identity: Identity, before: &[Step], rounds: &[Round]) {
    let mut kernel = AlikeKernel {
        now_ms: 1000,
        ..AlikeKernel::default()
    };
    let mut watched = Watched::new(identity);
    for unseen in before {
        kernel.step(identity, unseen);
    }
    kernel.now_ms += 100;
    // By ends, one that begins or ends while a dump is read can be taken for another that is alike.
    let known = identity == Identity::Address;
    for (round, (steps, during, reads, between)) in rounds.iter().enumerate() {
        for seen in steps {
            watched.apply(&kernel.step(identity, seen));
        }
        if round > 0 {
            assert_eq!(gauges(&watched), kernel.gauges(), "before dump {round}");
        }
        let during = if known { &during[..] } else { &[] };
        kernel.now_ms += 1;
        let started_ms = kernel.now_ms;
        watched.table.snapshot_begins();
        let mut records = Vec::new();
        for part in 0..=during.len() {
            for socket in 0..kernel.made {
                let at = reads[usize::from(socket) % reads.len()] % (during.len() + 1);
                if at == part {
                    records.extend(kernel.read(identity, socket));
                }
            }
            if let Some(seen) = during.get(part) {
                watched.apply(&kernel.step(identity, seen));
            }
        }
        let mut merge = Merge::new(dump(started_ms, kernel.now_ms, records));
        let mut between = between.iter().filter(|_| known);
        while !watched.merge(&mut merge) {
            if let Some(seen) = between.next() {
                watched.apply(&kernel.step(identity, seen));
            }
        }
        assert_eq!(gauges(&watched), kernel.gauges(), "after dump {round}");
        kernel.now_ms += 1000;
    }
    assert_eq!(watched.table.corrections(), [0; 4]);
}

/// By their cookies and by guesses, which were tried, one stood for another here, and was counted wrong when an event
/// told them apart.
#[test]
fn sockets_that_are_alike_are_counted_where_guesses_went_wrong() {
    let steps = |steps: &[(usize, u8)]| -> Vec<Step> {
        let step = |&(socket, choice)| Step {
            socket,
            choice,
            wait_ms: 1,
        };
        steps.iter().map(step).collect()
    };
    let before = steps(&[(0, 0), (0, 0), (0, 0), (0, 1), (0, 2), (0, 3), (0, 0)]);
    let last = vec![0, 0, 2, 0, 0, 0, 0, 0];
    let rounds = [
        (
            steps(&[(3, 0)]),
            steps(&[(4, 66), (0, 0), (0, 0)]),
            vec![0; 8],
            Vec::new(),
        ),
        (
            steps(&[(3, 29), (4, 32), (1, 0), (3, 0)]),
            steps(&[(3, 74), (4, 152), (5, 73)]),
            last,
            Vec::new(),
        ),
        (Vec::new(), Vec::new(), vec![0; 8], Vec::new()),
        (steps(&[(4, 0)]), Vec::new(), vec![0; 8], Vec::new()),
    ];
    alike(Identity::Address, &before, &rounds);
}

fn gauges(watched: &Watched) -> BTreeMap<TcpState, i64> {
    let mut gauges = BTreeMap::new();
    for ((state, _), count) in &watched.gauges {
        *gauges.entry(*state).or_default() += count;
    }
    gauges.retain(|_, count| *count != 0);
    gauges
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever happens while a dump is read, or while it is merged, and whatever it misses under churn, the table is right after
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
        identity in prop::sample::select(vec![Identity::Cookie, Identity::Address]),
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
            records.push(in_its_place(identity, record(read_ms, socket, state), socket));
        }

        let mut watched = Watched::new(identity);
        let mut begun = false;
        let mut merged = false;
        let mut merging = None;
        let first = dump(begin_ms, end_ms, records);
        let kernel_event = |moment: &Moment| {
            let to = if moment.to == TIME_WAIT { CLOSE } else { moment.to };
            with(event(moment.event_ms, moment.socket, moment.from, to), |event| {
                if moment.to == TIME_WAIT {
                    event.flags |= FLAG_DONE;
                }
                if identity == Identity::Address {
                    (event.sk, event.cookie) = (address(moment.socket % 6), 0);
                }
            })
        };
        for moment in moments.iter().filter(|moment| moment.event_ms > attach_ms) {
            if !begun && moment.event_ms >= begin_ms {
                watched.table.snapshot_begins();
                begun = true;
            }
            // An event between two parts of the merge, or all of them before it.
            if !merged && !late_events && moment.event_ms > end_ms {
                let merge = merging.get_or_insert_with(|| Merge::new(first.clone()));
                merged = watched.merge(merge);
                if merged {
                    prop_assert!(missed || watched.by_port() == states_at(&moments, moment.event_ms - 1, false));
                }
            }
            watched.apply(&kernel_event(moment));
        }
        if !begun {
            watched.table.snapshot_begins();
        }
        if !merged {
            let mut merge = merging.unwrap_or_else(|| Merge::new(first));
            while !watched.merge(&mut merge) {}
        }
        if !missed {
            prop_assert_eq!(watched.by_port(), states_at(&moments, last_ms, false));
            prop_assert_eq!(watched.table.corrections(), [0; 4]);
        }
        // One dump that lacks a socket ends nothing.
        let ended = |seen: &Seen| seen.evidence == Evidence::Snapshot && seen.shown.is_some();
        prop_assert_eq!(watched.seen.iter().find(|seen| ended(seen)), None);
        for round in 1..3 {
            let now = last_ms.max(end_ms) + round * 1000;
            let all = states_at(&moments, now, true);
            let records = all.iter().map(|(&socket, &state)| {
                in_its_place(identity, record(now, socket as u16, state), socket as u16)
            });
            watched.table.snapshot_begins();
            watched.reconcile(&dump(now, now + 1, records.collect()));
        }
        prop_assert_eq!(watched.by_port(), states_at(&moments, last_ms, false));
    }

    /// Whatever happens before dumps, while they are read, between the parts in which they are merged, and between them,
    /// also where the kernel uses addresses again at once.
    #[test]
    fn sockets_that_are_alike_are_counted(
        before in prop::collection::vec(step(8), 0..12),
        rounds in rounds(),
    ) {
        alike(Identity::Address, &before, &rounds);
    }

    /// Where only ends tell, that holds as long as nothing happens to them while a dump is read or merged
    /// (`docs/principles.md`).
    #[test]
    fn sockets_that_are_alike_are_counted_by_their_ends(
        before in prop::collection::vec(step(8), 0..12),
        rounds in rounds(),
    ) {
        alike(Identity::Ends, &before, &rounds);
    }

    /// Any bytes of the right length are a record: the table takes them without panic, and its gauges stay
    /// those of what it holds.
    #[test]
    fn no_events_break_the_table(
        events in prop::collection::vec((0u16..5, 0u8..16, 0u8..16, any::<u8>(), 0..120), 0..200),
        identity in prop::sample::select(vec![
            Identity::Cookie,
            Identity::Address,
            Identity::Ends,
        ]),
        dumps in prop::collection::vec((0u16..5, prop::sample::select(TcpState::ALL.to_vec())), 0..20),
        most in 1usize..20,
    ) {
        let mut watched = Watched::holding(identity, most);
        for (index, &(socket, from, to, flags, sk_err)) in events.iter().enumerate() {
            let index = index as u64;
            if index % 50 == 25 {
                let records = dumps.iter().map(|&(socket, state)| record(index, socket, state));
                watched.table.snapshot_begins();
                watched.reconcile(&dump(index, index, records.collect()));
            }
            let states = (TcpState::from_kernel(from), TcpState::from_kernel(to));
            let event = with(event(index, socket, states.0, states.1), |event| {
                event.flags = flags;
                event.sk_err = sk_err;
                if identity == Identity::Ends {
                    (event.netns, event.cookie) = (0, 0);
                }
            });
            watched.take(|table, sink| {
                let taken = table.apply(&event, None, sink);
                let unnamed = identity == Identity::Cookie && socket == 0;
                assert_eq!(taken == Err(Refused::NoCookie), unnamed);
                assert!(table.len() <= most);
            });
        }
        watched.take(|table, sink| table.flush_children(u64::MAX, sink));
    }
}
