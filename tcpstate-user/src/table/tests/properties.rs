//! Whatever happens: against a kernel in miniature whose dumps are not atomic.

use proptest::prelude::*;

use super::*;

/// A step of the kernel in miniature.
#[derive(Clone, Copy, Debug)]
struct Step {
    socket: usize,
    choice: u8,
    wait_ms: u64,
}

fn step(sockets: usize) -> impl Strategy<Value = Step> {
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

/// Sockets that their ends can't tell apart: listeners that share a port, connects to the same address.
#[derive(Default)]
struct AlikeKernel {
    now_ms: u64,
    made: u16,
    /// State, and whether a dump had the kernel make a cookie.
    sockets: BTreeMap<u16, (TcpState, bool)>,
}

impl AlikeKernel {
    /// Something happens, and the kernel says so.
    fn step(&mut self, identity: Identity, step: &Step) -> SetState {
        self.now_ms += step.wait_ms;
        let old = self.sockets.keys().nth(step.socket).copied();
        let socket = old.unwrap_or(self.made);
        let (from, dumped) = self.sockets.remove(&socket).unwrap_or((CLOSE, false));
        let to = match from {
            CLOSE => [LISTEN, SYN_SENT][usize::from(step.choice) % 2],
            SYN_SENT => [ESTABLISHED, CLOSE][usize::from(step.choice) % 2],
            _ => CLOSE,
        };
        if old.is_none() {
            self.made += 1;
        }
        if to != CLOSE {
            self.sockets.insert(socket, (to, dumped));
        }
        with(event(self.now_ms, socket + 1, from, to), |event| {
            event.local_port = match (from, to) {
                (LISTEN, _) | (_, LISTEN) => SERVER_PORT,
                (_, SYN_SENT) => 0,
                _ => event.local_port,
            };
            if !dumped {
                event.cookie = 0;
            }
            if identity == Identity::AddressWithoutNetns {
                (event.cookie, event.netns) = (0, 0);
            }
        })
    }

    fn read(&mut self, socket: u16) -> Option<Record> {
        let (state, dumped) = self.sockets.get_mut(&socket)?;
        *dumped = true;
        let mut record = record(self.now_ms, socket + 1, *state);
        if *state == LISTEN {
            record.local.port = Some(SERVER_PORT);
        }
        Some(record)
    }

    fn gauges(&self) -> BTreeMap<TcpState, i64> {
        let mut gauges = BTreeMap::new();
        for (state, _) in self.sockets.values() {
            *gauges.entry(*state).or_default() += 1;
        }
        gauges
    }
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

    /// Without cookies, of whatever is alike there are as many as the kernel has, and nothing was corrected: up to a dump
    /// while which one began that may be in it. From then on one can stand for another, and be counted wrong when an
    /// event tells them apart, until a later dump (`docs/principles.md`).
    #[test]
    fn sockets_that_are_alike_are_counted(
        identity in prop::sample::select(vec![Identity::Address, Identity::AddressWithoutNetns]),
        before in prop::collection::vec(step(8), 0..12),
        // Steps before each dump, steps while it is read, and where between them each socket is read.
        rounds in prop::collection::vec((
            prop::collection::vec(step(8), 0..6),
            prop::collection::vec(step(8), 0..4),
            prop::collection::vec(0usize..4, 8),
        ), 1..8),
    ) {
        let mut kernel = AlikeKernel { now_ms: 1000, ..AlikeKernel::default() };
        let mut watched = Watched::new(identity);
        for unseen in &before {
            kernel.step(identity, unseen);
        }
        kernel.now_ms += 100;
        let (mut dumped, mut right) = (false, true);
        for (round, (steps, during, reads)) in rounds.iter().enumerate() {
            for seen in steps {
                watched.apply(&kernel.step(identity, seen));
            }
            if dumped && right {
                prop_assert_eq!(gauges(&watched), kernel.gauges(), "before dump {}", round);
            }
            // No cookie tells the classic tracepoint which of several closed while a dump was read.
            let known = identity == Identity::Address;
            let during = if known { &during[..] } else { &[] };
            kernel.now_ms += 1;
            let started_ms = kernel.now_ms;
            watched.table.snapshot_begins();
            let mut records = Vec::new();
            for part in 0..=during.len() {
                for socket in 0..kernel.made {
                    let at = reads[usize::from(socket) % reads.len()] % (during.len() + 1);
                    if at == part {
                        records.extend(kernel.read(socket));
                    }
                }
                if let Some(seen) = during.get(part) {
                    let event = kernel.step(identity, seen);
                    right &= event.from() != CLOSE;
                    watched.apply(&event);
                }
            }
            watched.reconcile(&dump(started_ms, kernel.now_ms, records));
            if right {
                prop_assert_eq!(gauges(&watched), kernel.gauges(), "after dump {}", round);
            }
            dumped = true;
            kernel.now_ms += 1000;
        }
        if right {
            prop_assert_eq!(watched.table.corrections(), [0; 4]);
        }
    }

    /// Any bytes of the right length are a record: the table takes them without panic, and its gauges stay
    /// those of what it holds.
    #[test]
    fn no_events_break_the_table(
        events in prop::collection::vec((0u16..5, 0u8..16, 0u8..16, any::<u8>(), 0u16..120), 0..200),
        identity in prop::sample::select(vec![
            Identity::Cookie,
            Identity::Address,
            Identity::AddressWithoutNetns,
        ]),
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
            let event = with(event(index, socket, states.0, states.1), |event| {
                event.flags = flags;
                event.sk_err = sk_err;
                if identity == Identity::AddressWithoutNetns {
                    (event.netns, event.cookie) = (0, 0);
                }
            });
            watched.take(|table, sink| {
                let taken = table.apply(&event, None, sink);
                let unnamed = identity == Identity::Cookie && socket == 0;
                assert_eq!(taken.is_err(), unnamed);
            });
        }
        watched.take(|table, sink| table.flush_children(u64::MAX, sink));
    }
}
