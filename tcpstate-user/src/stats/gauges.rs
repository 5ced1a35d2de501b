//! Sockets by state, of one name. Moved by changes, never recounted.

use crate::model::view::{GAUGE_STATES, StateCounts};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Gauges {
    by_state: StateCounts,
    /// Their sum.
    live: u64,
}

impl Gauges {
    pub fn by_state(&self) -> &StateCounts {
        &self.by_state
    }

    pub fn live(&self) -> u64 {
        self.live
    }

    /// `state`: as [`gauge_index`](crate::model::view::gauge_index) gives it.
    pub fn add(&mut self, state: usize) {
        self.by_state[state] += 1;
        self.live += 1;
    }

    /// A socket that was never added here is the table's defect. Tests stop at it; a release build rather has a
    /// gauge that is one too high than one of 18 quintillion, or a daemon that dies.
    /// False: there was none.
    pub fn remove(&mut self, state: usize) -> bool {
        let count = &mut self.by_state[state];
        debug_assert!(*count > 0, "no socket in {}", GAUGE_STATES[state]);
        if *count == 0 {
            return false;
        }
        *count -= 1;
        self.live -= 1;
        true
    }
}

pub fn sum<'a>(counts: impl IntoIterator<Item = &'a StateCounts>) -> StateCounts {
    let mut sum = StateCounts::default();
    for counts in counts {
        for (total, count) in sum.iter_mut().zip(counts) {
            *total += count;
        }
    }
    sum
}
