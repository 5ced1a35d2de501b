//! How long sockets have been in the states that they are in: read from the whole table, once in a while.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::Comm;
use crate::model::view::{Aged, MIN_AGES, StateCounts, gauge_index};
use crate::table::Place;

/// A scan is work for the thread that drains the ring, and anybody may scrape.
const FRESH_NS: u64 = 1_000_000_000;

#[derive(Debug, Default)]
pub struct Ages {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    scanned_ns: Option<u64>,
    /// By label.
    by_comm: HashMap<Arc<str>, Aged>,
}

/// A look at how old sockets are, made in parts.
#[derive(Debug)]
pub struct AgeScan {
    now_ns: u64,
    aged: Vec<(Option<Comm>, Aged)>,
    /// Where in `aged` a name is. Others choose the names: the standard hasher, as in `names`.
    known: HashMap<Option<Comm>, usize>,
}

impl AgeScan {
    /// `now_ns`: `CLOCK_BOOTTIME`.
    #[must_use]
    pub fn new(now_ns: u64) -> Self {
        Self {
            now_ns,
            aged: Vec::new(),
            known: HashMap::new(),
        }
    }

    pub const fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// `stays`: where sockets count, and since when; each socket once in all parts, but for one whose
    /// timewait socket came in its place between two of them.
    pub fn part(&mut self, stays: impl Iterator<Item = (Place, u64)>) {
        let mut last = None;
        for (Place { state, comm, .. }, since_ns) in stays {
            let Some(state) = gauge_index(state) else {
                continue;
            };
            // Sockets of one process are often neighbours.
            let at = match last {
                Some((name, at)) if name == comm => at,
                _ => *self.known.entry(comm).or_insert_with(|| {
                    self.aged.push((comm, Aged::default()));
                    self.aged.len() - 1
                }),
            };
            last = Some((comm, at));
            let (_, of_name) = &mut self.aged[at];
            let oldest = &mut of_name.oldest_ns[state];
            *oldest = Some(oldest.map_or(since_ns, |oldest| oldest.min(since_ns)));
            let age_ns = self.now_ns.saturating_sub(since_ns);
            for ((_, min), counts) in MIN_AGES.iter().zip(&mut of_name.counts) {
                if u128::from(age_ns) >= min.as_nanos() {
                    counts[state] += 1;
                }
            }
        }
    }
}

impl Ages {
    pub fn are_fresh(&self, now_ns: u64) -> bool {
        self.scanned_ns.is_some_and(|at| now_ns < at + FRESH_NS)
    }

    /// `label`: what a name counts as.
    pub fn take(
        &mut self,
        scan: AgeScan,
        boot_to_unix_ns: i64,
        mut label: impl FnMut(Option<Comm>) -> Arc<str>,
    ) {
        self.scanned_ns = Some(scan.now_ns);
        self.by_comm.clear();
        for (comm, aged) in scan.aged {
            self.by_comm.entry(label(comm)).or_default().add(&aged);
        }
        let unix_ns = |boot_ns: u64| boot_ns.saturating_add_signed(boot_to_unix_ns);
        for aged in self.by_comm.values_mut() {
            for oldest in aged.oldest_ns.iter_mut().flatten() {
                *oldest = unix_ns(*oldest);
            }
        }
    }

    /// `sockets`: how many there are now; those that went since the scan are not old.
    pub fn of(&self, label: &str, sockets: &StateCounts) -> Aged {
        let mut aged = self.by_comm.get(label).cloned().unwrap_or_default();
        for (state, &live) in sockets.iter().enumerate() {
            for counts in &mut aged.counts {
                counts[state] = counts[state].min(live);
            }
            if live == 0 {
                aged.oldest_ns[state] = None;
            }
        }
        aged
    }
}

#[cfg(test)]
mod tests {
    use tcpstate_common::TcpState;

    use super::*;
    use crate::model::view::{CommView, Counted, GAUGE_STATES};
    use crate::model::{ConnectionId, Endpoint, Evidence, Family, Owner, OwnerSource, Process};
    use crate::stats::Stats;
    use crate::table::{Change, Dwell, Owned, Socket};

    const SECOND: u64 = 1_000_000_000;
    const HOUR: u64 = 3600 * SECOND;
    const NOW: u64 = 10 * HOUR;
    /// Unix time is 5 s ahead.
    const OFFSET: i64 = 5 * SECOND as i64;

    fn place(state: TcpState, comm: Option<Comm>) -> Place {
        Place {
            state,
            comm,
            source: comm.map(|_| OwnerSource::Connect),
        }
    }

    /// Sockets with their ages in seconds, and the statistics that were told of them.
    fn counted(stats: &mut Stats, now_ns: u64, sockets: &[(&str, TcpState, u64)]) -> Counted {
        let stays = sockets.iter().map(|&(comm, state, age)| {
            let comm = (!comm.is_empty()).then(|| Comm::from_bytes(comm.as_bytes()));
            (place(state, comm), NOW - age * SECOND)
        });
        if !stats.ages_are_fresh(now_ns) {
            let mut scan = AgeScan::new(now_ns);
            let stays: Vec<_> = stays.collect();
            for part in stays.chunks(2) {
                scan.part(part.iter().copied());
            }
            stats.age(scan, OFFSET);
        }
        stats.counted(now_ns, 0, [0; 4])
    }

    fn tell(stats: &mut Stats, comm: &str, from: Option<TcpState>, to: Option<TcpState>) {
        let comm = (!comm.is_empty()).then(|| Comm::from_bytes(comm.as_bytes()));
        let process = Process {
            pid: 1,
            start_ns: 1,
            comm,
        };
        let socket = Socket {
            id: ConnectionId::Own(1),
            cookie: None,
            netns: None,
            family: Family::Ipv4,
            local: Endpoint::default(),
            remote: Endpoint::default(),
            state: to.unwrap_or(TcpState::CLOSE),
            role: None,
            owned: comm.map(|_| {
                let source = OwnerSource::Connect;
                Arc::new(Owned {
                    owner: Owner { process, source },
                    container: None,
                })
            }),
            uid: None,
            holders: None,
            established: false,
        };
        stats.apply(&Change {
            time_ns: NOW,
            socket: &socket,
            kernel: None,
            shown: None,
            dwell: Dwell::None,
            evidence: Evidence::Snapshot,
            end: None,
            before: from.map(|state| place(state, comm)),
            after: to.map(|state| place(state, comm)),
        });
    }

    fn of<'a>(counted: &'a Counted, comm: &str) -> &'a CommView {
        let mut comms = counted.comms.iter();
        comms.find(|view| &*view.comm == comm).expect("it is shown")
    }

    fn at(state: TcpState) -> usize {
        GAUGE_STATES.iter().position(|&s| s == state).unwrap()
    }

    #[test]
    fn ages_nest_and_the_oldest_is_dated() {
        const SOCKETS: [(&str, TcpState, u64); 7] = [
            ("a", TcpState::CLOSE_WAIT, 59),
            ("a", TcpState::CLOSE_WAIT, 60),
            ("a", TcpState::CLOSE_WAIT, 3600),
            ("a", TcpState::NEW_SYN_RECV, 1),
            ("", TcpState::TIME_WAIT, 61),
            // Two names without place.
            ("b", TcpState::ESTABLISHED, 600),
            ("c", TcpState::ESTABLISHED, 700),
        ];
        let mut stats = Stats::new(1);
        for (comm, state, _) in SOCKETS {
            tell(&mut stats, comm, None, Some(state));
        }
        let counted = counted(&mut stats, NOW, &SOCKETS);
        let a = &of(&counted, "a").aged;
        let close_wait = at(TcpState::CLOSE_WAIT);
        assert_eq!(a.counts.map(|counts| counts[close_wait]), [2, 1, 1]);
        let entered = NOW - HOUR + 5 * SECOND;
        assert_eq!(a.oldest_ns[close_wait], Some(entered));
        assert_eq!(a.oldest_ns[at(TcpState::SYN_RECV)], Some(NOW + 4 * SECOND));
        assert_eq!(a.oldest_ns[at(TcpState::ESTABLISHED)], None);
        let none = &of(&counted, "<none>").aged;
        let time_wait = at(TcpState::TIME_WAIT);
        assert_eq!(none.counts.map(|counts| counts[time_wait]), [1, 0, 0]);
        let other = &of(&counted, "<other>").aged;
        let established = at(TcpState::ESTABLISHED);
        assert_eq!(other.counts.map(|counts| counts[established]), [2, 2, 0]);
        let entered = NOW - 695 * SECOND;
        assert_eq!(other.oldest_ns[established], Some(entered));
    }

    #[test]
    fn one_scan_a_second_and_none_is_old_that_is_gone() {
        let mut stats = Stats::new(1);
        let state = TcpState::CLOSE_WAIT;
        let aged = |counted: &Counted| {
            let aged = &of(counted, "a").aged;
            (
                aged.counts[0][at(state)],
                aged.oldest_ns[at(state)].is_some(),
            )
        };
        tell(&mut stats, "a", None, Some(state));
        let old = [("a", state, 100)];
        assert_eq!(aged(&counted(&mut stats, NOW, &old)), (1, true));
        // Told of no socket, it would say so had it asked.
        let later = NOW + SECOND - 1;
        assert_eq!(aged(&counted(&mut stats, later, &[])), (1, true));
        tell(&mut stats, "a", Some(state), None);
        assert_eq!(aged(&counted(&mut stats, later, &old)), (0, false));
        tell(&mut stats, "a", None, Some(state));
        let later = NOW + SECOND;
        assert_eq!(aged(&counted(&mut stats, later, &[])), (0, false));
    }
}
