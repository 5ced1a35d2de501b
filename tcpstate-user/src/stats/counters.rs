//! What only grows: dwell times, connections and how they ended, of one name.

use super::dwell::{self, Timed};
use crate::model::view::{FAILURE_REASONS, GAUGE_STATES, Histogram, StateCounts};
use crate::model::{End, Named, Role};

#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// By [`Role::ALL`], then those whose opening was not seen.
    pub connections: [u64; Role::ALL.len() + 1],
    /// By [`End::ALL`].
    pub ends: [u64; End::ALL.len()],
    /// By [`FAILURE_REASONS`].
    pub failures: [u64; FAILURE_REASONS.len()],
    dwell: [Histogram; GAUGE_STATES.len()],
    /// States that its sockets have been in: only these have a histogram.
    states: [bool; GAUGE_STATES.len()],
}

impl Counters {
    /// A socket entered this state.
    pub fn note_state(&mut self, state: usize) {
        self.states[state] = true;
    }

    pub fn note_states(&mut self, sockets: &StateCounts) {
        for (noted, &count) in self.states.iter_mut().zip(sockets) {
            *noted |= count > 0;
        }
    }

    pub fn record_dwell(&mut self, state: usize, dwell_ns: u64) {
        self.note_state(state);
        dwell::record(&mut self.dwell[state], dwell_ns);
    }

    pub fn count_connection(&mut self, role: Option<Role>) {
        let role = role.and_then(|role| Role::ALL.iter().position(|&known| known == role));
        self.connections[role.unwrap_or(Role::ALL.len())] += 1;
    }

    pub fn count_end(&mut self, end: End) {
        count(&mut self.ends, End::ALL, end);
    }

    /// An active open that never got there.
    pub fn count_failure(&mut self, end: End) {
        let reason = if FAILURE_REASONS.contains(&end) {
            end
        } else {
            End::Unknown
        };
        count(&mut self.failures, &FAILURE_REASONS, reason);
    }

    /// `None` for states that events can't time, and for those that none of its sockets was in.
    pub fn dwell(&self, timed: Timed) -> [Option<Histogram>; GAUGE_STATES.len()] {
        std::array::from_fn(|state| {
            (self.states[state] && timed.contains(state)).then_some(self.dwell[state])
        })
    }
}

fn count(counts: &mut [u64], all: &[End], end: End) {
    if let Some(at) = all.iter().position(|&known| known == end) {
        counts[at] += 1;
    }
}
