//! Which lives of a socket there were: it can be closed while its descriptor stays open, and be connected again.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use crate::model::ConnectionId;

/// Generations of sockets that were closed and may be connected again, the oldest forgotten first.
#[derive(Debug, Default)]
pub(super) struct Generations {
    next: FxHashMap<u64, u32>,
    oldest: VecDeque<u64>,
}

impl Generations {
    /// A socket whose descriptor stays open after a reset or a refusal leaves an entry here that nothing takes back, for
    /// its end shows in no event: hence a bound. As many as half of a map of 2^17 buckets holds (some 2 MB): what is removed
    /// leaves a mark in its bucket, and a map that is full of entries and marks grows, unless no more than half of it are
    /// entries.
    const MOST: usize = (1 << 16) / 8 * 7;

    pub(super) fn closed(&mut self, id: ConnectionId) {
        let ConnectionId::Cookie { cookie, generation } = id else {
            return;
        };
        if let Some(next) = self.next.get_mut(&cookie) {
            *next = generation + 1;
            return;
        }
        // First, so that neither ever holds one more.
        if self.oldest.len() == Self::MOST
            && let Some(forgotten) = self.oldest.pop_front()
        {
            self.next.remove(&forgotten);
        }
        self.oldest.push_back(cookie);
        self.next.insert(cookie, generation + 1);
    }

    pub(super) fn of(&self, cookie: u64) -> u32 {
        self.next.get(&cookie).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::{ConnectionId, Generations};

    fn closed(generations: &mut Generations, cookie: u64, generation: u32) {
        generations.closed(ConnectionId::Cookie { cookie, generation });
    }

    #[test]
    fn the_last_that_were_closed_are_remembered() {
        let mut generations = Generations::default();
        let most = Generations::MOST as u64;
        for cookie in 0..=most {
            closed(&mut generations, cookie, 6);
        }
        assert_eq!([0, 1, most].map(|cookie| generations.of(cookie)), [0, 7, 7]);
        // Again: nothing is forgotten for it.
        closed(&mut generations, 1, 7);
        assert_eq!([1, 2].map(|cookie| generations.of(cookie)), [8, 7]);
    }

    #[test]
    fn the_map_does_not_grow_with_what_it_forgets() {
        let mut generations = Generations::default();
        let mut largest = [0; 2];
        for cookie in 0..1_000_000 {
            closed(&mut generations, cookie, 0);
            let now = [generations.next.capacity(), generations.oldest.capacity()];
            largest = [0, 1].map(|at| largest[at].max(now[at]));
        }
        assert_eq!(generations.next.len(), Generations::MOST);
        // Of 2^17 buckets seven eighths.
        assert!(largest[0] <= 2 * Generations::MOST, "{largest:?}");
        assert!(largest[1] <= 1 << 16, "{largest:?}");
    }
}
