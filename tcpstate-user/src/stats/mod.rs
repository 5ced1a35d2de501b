//! Counts what the table says: sockets by owner and state, dwell times, connections and how they ended.
//!
//! Pure: time comes in with the changes. How it is shown is `export`'s; what happened is `table`'s.

mod ages;
mod counters;
mod dwell;
mod gauges;
mod names;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tcpstate_common::TcpState;

use self::ages::Ages;
use self::counters::Counters;
use self::dwell::Timed;
use self::gauges::Gauges;
use self::names::Names;
use crate::model::view::{CommView, Counted, StateCounts, gauge_index};
use crate::model::{Comm, Named, OwnerSource, Role};
use crate::table::{Change, Correction, Discard, Dwell, Place};

pub use self::ages::AgeScan;
pub use self::dwell::timed_states;

/// The label of sockets without owner.
pub const NONE: &str = "<none>";
/// The label of all names that have no place.
pub const OTHER: &str = "<other>";

#[derive(Debug)]
pub struct Stats {
    /// Sockets without owner.
    none_gauges: Gauges,
    none: Counters,
    names: Names,
    ages: Ages,
    timed: Timed,
    /// By [`Discard::ALL`].
    discarded: [u64; Discard::ALL.len()],
    /// By [`OwnerSource::ALL`].
    owners: [u64; OwnerSource::ALL.len()],
}

/// A gauge, as a socket's place addresses it: the owner's name, and the state's index.
type Gauge = (Option<Comm>, usize);

fn gauge(place: Option<Place>) -> Option<Gauge> {
    let place = place?;
    Some((place.comm, gauge_index(place.state)?))
}

impl Stats {
    /// At most `max_comms` names are label values at one time, `<none>` and `<other>` apart.
    #[must_use]
    pub fn new(max_comms: usize) -> Self {
        Self {
            none_gauges: Gauges::default(),
            none: Counters::default(),
            names: Names::new(max_comms),
            ages: Ages::default(),
            timed: Timed::new(false),
            discarded: [0; Discard::ALL.len()],
            owners: [0; OwnerSource::ALL.len()],
        }
    }

    /// From now on the table is told of timewait sockets, so stays in TIME_WAIT and FIN_WAIT2 have both ends.
    pub fn times_timewait(&mut self) {
        self.timed = Timed::new(true);
    }

    pub fn apply(&mut self, change: &Change<'_>) {
        self.count_owner(change);
        let (before, after) = (gauge(change.before), gauge(change.after));
        match (before, after) {
            (Some((from, left)), Some((to, entered))) if from == to => {
                let happened = self.happened(change);
                let counters = self.shift(from, left, entered);
                if let Some(happened) = happened {
                    happened.count(change, counters);
                }
            }
            _ => {
                // The new name first and the old one last: what happened counts while both are there.
                if let Some((comm, state)) = after {
                    self.enter(comm, state);
                }
                self.count(change);
                if let Some((comm, state)) = before {
                    self.leave(comm, state, change.time_ns);
                }
            }
        }
    }

    /// Whether it was looked within the last second how old sockets are.
    #[must_use]
    pub fn ages_are_fresh(&self, now_ns: u64) -> bool {
        self.ages.are_fresh(now_ns)
    }

    /// Takes how old sockets are.
    ///
    /// `boot_to_unix_ns`: what to add to `CLOCK_BOOTTIME` for Unix time.
    pub fn age(&mut self, scan: AgeScan, boot_to_unix_ns: i64) {
        // As it does before the names are shown.
        self.names.settle(scan.now_ns());
        let names = &mut self.names;
        self.ages.take(scan, boot_to_unix_ns, |comm| match comm {
            None => NONE.into(),
            Some(comm) => names.label(comm).unwrap_or_else(|| OTHER.into()),
        });
    }

    /// What has been counted, with what the table knows of itself.
    ///
    /// `now_ns`: `CLOCK_BOOTTIME`. Names that lost their right to a place by then have lost it.
    pub fn counted(
        &mut self,
        now_ns: u64,
        table_entries: u64,
        corrections: [u64; Correction::ALL.len()],
    ) -> Counted {
        self.names.settle(now_ns);
        let mut comms = vec![self.view(NONE.into(), self.none_gauges.by_state(), &self.none)];
        if self.names.overflow > 0 {
            let sockets = gauges::sum(self.names.waiting().map(Gauges::by_state));
            comms.push(self.view(OTHER.into(), &sockets, &self.names.other));
        }
        comms.extend(self.names.places().map(|place| {
            let label = Arc::clone(&place.label);
            self.view(label, place.gauges.by_state(), &place.counters)
        }));
        comms.sort_unstable_by(|a, b| a.comm.cmp(&b.comm));
        Counted {
            sockets: gauges::sum(comms.iter().map(|comm| &comm.sockets)),
            comms,
            comm_overflow: self.names.overflow,
            dwell_discarded: by_name::<Discard, _>(self.discarded),
            corrections: by_name::<Correction, _>(corrections),
            owner_lookups: by_name::<OwnerSource, _>(self.owners),
            table_entries,
            incomplete: false,
        }
    }

    fn view(&self, comm: Arc<str>, sockets: &StateCounts, counters: &Counters) -> CommView {
        CommView {
            sockets: *sockets,
            aged: self.ages.of(&comm, sockets),
            comm,
            dwell: counters.dwell(self.timed),
            connections: counters.connections,
            ends: counters.ends,
            failures: counters.failures,
        }
    }

    fn enter(&mut self, comm: Option<Comm>, state: usize) {
        match comm {
            Some(comm) => self.names.enter(comm, state),
            None => {
                self.none_gauges.add(state);
                self.none.note_state(state);
            }
        }
    }

    fn leave(&mut self, comm: Option<Comm>, state: usize, now_ns: u64) {
        match comm {
            Some(comm) => self.names.leave(comm, state, now_ns),
            None => {
                self.none_gauges.remove(state);
            }
        }
    }

    /// Gives where counts what happened to a socket of that name.
    fn shift(&mut self, comm: Option<Comm>, from: usize, to: usize) -> &mut Counters {
        match comm {
            Some(comm) => self.names.shift(comm, from, to),
            None => {
                if self.none_gauges.remove(from) {
                    self.none_gauges.add(to);
                    self.none.note_state(to);
                }
                &mut self.none
            }
        }
    }

    /// Of the socket, and not of where it counts now: one that is gone can have come to be known by its close.
    fn count_owner(&mut self, change: &Change<'_>) {
        let source = change.socket.owner().map(|owner| owner.source);
        let before = change.before.and_then(|before| before.source);
        if let Some(source) = source.filter(|_| source != before) {
            self.owners[source as usize] += 1;
        }
    }

    /// What the change adds to the counters of the name that the socket's owner has now.
    fn count(&mut self, change: &Change<'_>) {
        let Some(happened) = self.happened(change) else {
            return;
        };
        let owned = change.socket.owned.as_ref();
        let counters = match owned.and_then(|owned| owned.owner.process.comm) {
            Some(comm) => self.names.counters(comm, change.time_ns),
            None => &mut self.none,
        };
        happened.count(change, counters);
    }

    /// `None` if nothing counts for the socket's owner.
    fn happened(&mut self, change: &Change<'_>) -> Option<Happened> {
        let dwell = match change.dwell {
            Dwell::Seen(ns) => timed_state_left(change, self.timed).map(|state| (state, ns)),
            Dwell::Unknown(reason) => {
                if timed_state_left(change, self.timed).is_some() {
                    self.discarded[reason as usize] += 1;
                }
                None
            }
            Dwell::None => None,
        };
        let connected = matches!(
            change.kernel,
            Some((
                TcpState::SYN_SENT | TcpState::SYN_RECV,
                TcpState::ESTABLISHED
            ))
        );
        let any = dwell.is_some() || connected || change.end.is_some();
        any.then_some(Happened { dwell, connected })
    }
}

/// What counts, beside how the connection ended.
struct Happened {
    /// The state that the socket left, and how long it was there.
    dwell: Option<(usize, u64)>,
    connected: bool,
}

impl Happened {
    fn count(self, change: &Change<'_>, counters: &mut Counters) {
        let socket = change.socket;
        if let Some((state, ns)) = self.dwell {
            counters.record_dwell(state, ns);
        }
        if self.connected {
            counters.count_connection(socket.role);
        }
        match change.end {
            Some(end) if socket.established => counters.count_end(end),
            Some(end) if socket.role == Some(Role::Active) => counters.count_failure(end),
            _ => {}
        }
    }
}

/// `counts`: by the type's values, in their order.
fn by_name<T: Named, const N: usize>(counts: [u64; N]) -> Vec<(&'static str, u64)> {
    let names = T::ALL.iter().map(|value| value.name());
    names.zip(counts).collect()
}

/// The state whose stay the change ended, if events can time it.
fn timed_state_left(change: &Change<'_>, timed: Timed) -> Option<usize> {
    let (left, _) = change.shown?;
    gauge_index(left).filter(|&state| timed.contains(state))
}
