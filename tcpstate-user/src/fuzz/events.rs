//! The ring's records, and those of dumps and sweeps, on their way through the table to statistics and lines.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rustc_hash::FxHashMap;
use tcpstate_common::wire::{Addrs6, Caller, Head, With};
use tcpstate_common::{Event, SetState, Socket, TcpState};
use zerocopy::IntoBytes as _;

use super::shown;
use crate::export::fuzz::Writers;
use crate::kernel::snapshot::fuzz::records;
use crate::model::view::{GAUGE_STATES, gauge_index};
use crate::model::{Comm, Line, ProcessId};
use crate::stats::Stats;
use crate::table::{
    Change, Identity, Merge, Place, Record, Snapshot, StateMask, Sweep, Table, Walk,
};

const MOST_COMMS: usize = 3;
const LINES: usize = 4;

/// Any records in any order: what the gauges add up to is what the table holds, it holds no more than it was told of, and
/// the last of its lines and sockets can be shown.
///
/// The first byte chooses by what sockets are told apart; then come records, each after a byte that says what it is.
pub fn events(bytes: &[u8]) {
    let Some((&head, mut rest)) = bytes.split_first() else {
        return;
    };
    let mut tracer = Tracer::new(head);
    while let Some((&kind, after)) = rest.split_first() {
        let len = match kind % 9 {
            0 => size_of::<Head>(),
            1 => size_of::<With<Head, Addrs6>>(),
            2 => size_of::<With<Head, Caller>>(),
            3 => SetState::LONGEST,
            4 => size_of::<tcpstate_common::Accept>(),
            5 => size_of::<tcpstate_common::TimeWait>(),
            6 => size_of::<Socket>(),
            _ => 0,
        };
        let (record, after) = after.split_at(len.min(after.len()));
        rest = after;
        match kind % 9 {
            0..=5 => tracer.event(record),
            6 => tracer.listed.extend(records(record, tracer.netns).0),
            7 => tracer.sweep(),
            _ => tracer.dump(),
        }
    }
    tracer.check();
}

/// As the tracer's thread: the table, and where its changes go.
struct Tracer {
    table: Table,
    told: Told,
    /// Of the next dump.
    listed: Vec<Record>,
    /// Of the last event, as that of the next dump.
    netns: u32,
    newest_ns: u64,
    /// Sockets that it was told of, at most.
    records: usize,
    names: FxHashMap<ProcessId, Comm>,
}

struct Told {
    stats: Stats,
    gauges: BTreeMap<(TcpState, Option<Comm>), i64>,
    /// The last ones: to look at all of them would leave time for few inputs.
    lines: VecDeque<Line>,
}

impl Told {
    fn take(&mut self, change: &Change<'_>) {
        self.stats.apply(change);
        for (place, step) in [(change.before, -1), (change.after, 1)] {
            if let Some(Place { state, comm, .. }) = place {
                let gauge = self.gauges.entry((state, comm)).or_default();
                *gauge += step;
                assert!(*gauge >= 0, "gauge of {state} below 0 by {change:?}");
            }
        }
        for raw in [false, true] {
            if let Some(transition) = change.line(raw, 0) {
                self.lines.push_back(Line::Transition(transition));
            }
        }
        while self.lines.len() > LINES {
            self.lines.pop_front();
        }
    }
}

impl Tracer {
    fn new(head: u8) -> Self {
        let identity = match head % 3 {
            0 => Identity::Cookie,
            1 => Identity::Address,
            _ => Identity::Ends,
        };
        let mut table = Table::new(identity);
        let mut stats = Stats::new(MOST_COMMS);
        if head & 0x10 != 0 {
            table.sees_accepts();
        }
        if head & 0x20 != 0 {
            stats.times_timewait();
        }
        Self {
            table,
            told: Told {
                stats,
                gauges: BTreeMap::new(),
                lines: VecDeque::new(),
            },
            listed: Vec::new(),
            netns: 1,
            newest_ns: 0,
            records: 0,
            names: FxHashMap::default(),
        }
    }

    /// A record of the ring is what its length says, whatever is in it.
    fn event(&mut self, record: &[u8]) {
        let event = match Event::decode(record) {
            Ok(event) => event,
            Err(error) => {
                shown(&error.to_string(), 0);
                assert!(![56, 88, 96, 128, 64, 32].contains(&record.len()));
                return self.table.events_lost(self.newest_ns);
            }
        };
        self.newest_ns = self.newest_ns.max(event.time_ns());
        self.records += 1;
        let told = &mut self.told;
        match event {
            Event::SetState(event) => {
                let mut room = [0; SetState::LONGEST];
                let again = Event::decode(event.encode(&mut room));
                assert_eq!(again, Ok(Event::SetState(event)));
                self.netns = event.netns;
                let applied = self.table.apply(&event, None, |change| told.take(change));
                let lacks = self.table.identity() == Identity::Cookie && event.cookie == 0;
                assert_eq!(applied.is_err(), lacks);
            }
            Event::Accept(event) => {
                assert_eq!(event.as_bytes(), record);
                let process = (event.tgid, event.start_ns);
                self.names.insert(process, Comm::from_bytes(b"renamed"));
                self.table
                    .accepted(&event, None, |change| told.take(change));
            }
            Event::TimeWait(event) => {
                assert_eq!(event.as_bytes(), record);
                self.table.time_wait(&event, |change| told.take(change));
            }
        }
    }

    /// A dump of what was listed since the last one.
    fn dump(&mut self) {
        self.table.snapshot_begins();
        self.records += self.listed.len();
        let mut merge = Merge::new(Snapshot {
            records: std::mem::take(&mut self.listed),
            netns: vec![self.netns],
            unreachable: Vec::new(),
            whole_host: true,
            started_ns: self.newest_ns,
            finished_ns: self.newest_ns,
            states: StateMask::ALL,
        });
        let told = &mut self.told;
        while self
            .table
            .merge(&mut merge, 2, |change| told.take(change))
            .is_none()
        {}
    }

    /// A sweep that found nobody, and read the names of those who accepted.
    fn sweep(&mut self) {
        let mut sweep = Sweep::new(
            Some(Vec::new()),
            self.names.clone(),
            (self.newest_ns, self.newest_ns),
        );
        let told = &mut self.told;
        while !self
            .table
            .sweep(&mut sweep, 2, self.newest_ns, |change| told.take(change))
        {}
        self.table
            .flush_children(self.newest_ns, |change| told.take(change));
    }

    fn check(mut self) {
        assert!(self.table.len() <= self.records);
        let mut held: BTreeMap<_, i64> = BTreeMap::new();
        let mut by_state = [0; GAUGE_STATES.len()];
        let mut walk = Walk::default();
        while !walk.is_done() {
            for (place, _) in self.table.stays(&mut walk, 2) {
                *held.entry((place.state, place.comm)).or_default() += 1;
                if let Some(state) = gauge_index(place.state) {
                    by_state[state] += 1;
                }
            }
        }
        let told = &mut self.told;
        told.gauges.retain(|_, count| *count != 0);
        assert_eq!(told.gauges, held);

        let entries = self.table.len() as u64;
        let counted = told
            .stats
            .counted(self.newest_ns, entries, self.table.corrections());
        assert_eq!(counted.sockets, by_state);
        // `<none>` and `<other>` beside them.
        assert!(counted.comms.len() <= MOST_COMMS + 2);
        let labels: BTreeSet<_> = counted.comms.iter().map(|it| &*it.comm).collect();
        assert_eq!(labels.len(), counted.comms.len());
        for label in labels {
            assert!(!label.is_empty());
            shown(label, 16);
        }

        let mut walk = Walk::default();
        while !walk.is_done() {
            let rows = self.table.rows(&mut walk, 2, self.newest_ns, 0);
            told.lines.extend(rows.map(Line::Socket));
        }
        let mut writers = Writers::default();
        let last = told.lines.iter().rev().take(2 * LINES);
        last.for_each(|line| writers.check(line));
    }
}
