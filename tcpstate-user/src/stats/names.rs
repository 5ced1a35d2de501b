//! Which names of processes are label values: the rule that keeps metrics and memory bounded although any user
//! can rename processes at will.
//!
//! A name with a place is itself in every metric; one without is `<other>` in every metric, and only its
//! gauges are kept, so that they are right when it gets a place. Held at most: the places, and the names that
//! have live sockets at this time.
//!
//! Events only give places that nobody has. A place is taken back when a page is made, from a name that has counted
//! nothing for so long that pages have shown all of it: else who changes names fast would make counts vanish unseen.

use std::collections::HashMap;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use rustc_hash::FxBuildHasher;

use super::counters::Counters;
use super::gauges::Gauges;
use crate::model::Comm;

/// How long a name keeps its place without a live socket.
pub const KEPT_NS: u64 = 3600 * 1_000_000_000;

/// How long it keeps it though others wait for one: as long as Prometheus' scrapes may lie apart.
pub const SHOWN_NS: u64 = 120 * 1_000_000_000;

const HINTS: usize = 64;

/// A name as it is counted: `_` in place of a leading `<`, so that nobody can pass for `<none>` or `<other>`.
///
/// `<x` and `_x` are one name from here on: two series under one label would void the whole page. Nobody gains
/// from it who could not as well choose the name `_x` itself.
fn key(comm: Comm) -> Comm {
    match comm.as_bytes() {
        [b'<', rest @ ..] => Comm::from_bytes(&[b"_", rest].concat()),
        _ => comm,
    }
}

/// A process that took its name away is `<empty>`: to Prometheus an empty label is none.
fn label(key: Comm) -> Arc<str> {
    match key.to_string() {
        name if name.is_empty() => "<empty>".into(),
        name => name.into(),
    }
}

/// What is kept of a name that is itself in every metric.
#[derive(Debug)]
pub struct Place {
    /// `None` while nobody has the place.
    key: Option<Comm>,
    pub label: Arc<str>,
    pub gauges: Gauges,
    pub counters: Counters,
    /// If it has no live socket: when it last had one, or counted something for one.
    idle_since_ns: Option<u64>,
}

#[derive(Debug)]
pub struct Names {
    max: usize,
    /// Never more than `max`.
    places: Vec<Place>,
    free: Vec<usize>,
    /// Others choose the names and must not be able to make them collide: the standard hasher, not a faster one.
    taken: HashMap<Comm, usize>,
    /// Names with live sockets and no place.
    waiting: HashMap<Comm, Gauges>,
    /// The places asked for last, by a few bits of the name: events come in turn from few names. That names can be made
    /// to collide here costs a look into `taken`.
    hints: [usize; HINTS],
    /// What names without place count.
    pub other: Counters,
    /// How many names had to count as `<other>`.
    pub overflow: u64,
}

impl Names {
    pub fn new(max: usize) -> Self {
        Self {
            max,
            places: Vec::new(),
            free: Vec::new(),
            taken: HashMap::new(),
            waiting: HashMap::new(),
            hints: [0; HINTS],
            other: Counters::default(),
            overflow: 0,
        }
    }

    /// One more live socket of that name.
    pub fn enter(&mut self, comm: Comm, state: usize) {
        let place = match self.find(comm) {
            // One that waits gets a place when a page is made.
            None if !self.waiting.contains_key(&key(comm)) => self.take(key(comm)),
            place => place,
        };
        let (gauges, counters) = match place {
            Some(at) => {
                let place = &mut self.places[at];
                place.idle_since_ns = None;
                (&mut place.gauges, &mut place.counters)
            }
            None => {
                let overflow = &mut self.overflow;
                let gauges = self.waiting.entry(key(comm)).or_insert_with(|| {
                    *overflow += 1;
                    Gauges::default()
                });
                (gauges, &mut self.other)
            }
        };
        gauges.add(state);
        counters.note_state(state);
    }

    /// One live socket of that name fewer.
    pub fn leave(&mut self, comm: Comm, state: usize, now_ns: u64) {
        if let Some(at) = self.find(comm) {
            let place = &mut self.places[at];
            if place.gauges.remove(state) && place.gauges.live() == 0 {
                place.idle_since_ns = Some(now_ns);
            }
        } else if let Some(gauges) = self.waiting.get_mut(&key(comm)) {
            gauges.remove(state);
            if gauges.live() == 0 {
                self.waiting.remove(&key(comm));
            }
        } else {
            debug_assert!(false, "no socket of {comm:?}");
        }
    }

    /// A live socket of that name went from one state to another. Gives where else counts what happened to it.
    pub fn shift(&mut self, comm: Comm, from: usize, to: usize) -> &mut Counters {
        let (gauges, counters) = if let Some(at) = self.find(comm) {
            let place = &mut self.places[at];
            (&mut place.gauges, &mut place.counters)
        } else if let Some(gauges) = self.waiting.get_mut(&key(comm)) {
            (gauges, &mut self.other)
        } else {
            debug_assert!(false, "no socket of {comm:?}");
            return &mut self.other;
        };
        if gauges.remove(from) {
            gauges.add(to);
            counters.note_state(to);
        }
        counters
    }

    /// Where something counts that happened to a socket of that name.
    pub fn counters(&mut self, comm: Comm, now_ns: u64) -> &mut Counters {
        let place = match self.find(comm) {
            Some(at) => Some(at),
            None if self.waiting.contains_key(&key(comm)) => None,
            None => {
                let taken = self.take(key(comm));
                self.overflow += u64::from(taken.is_none());
                taken
            }
        };
        match place {
            Some(at) => {
                let place = &mut self.places[at];
                if place.gauges.live() == 0 {
                    place.idle_since_ns = Some(now_ns);
                }
                &mut place.counters
            }
            None => &mut self.other,
        }
    }

    /// To be called before a page is made.
    ///
    /// Takes places back: from names that have been without live sockets for an hour, and, as far as names with live
    /// sockets wait for one, from those that have been without for longest, but not for less than two minutes. Of
    /// those that wait, the ones with most sockets come first.
    pub fn settle(&mut self, now_ns: u64) {
        let places = self.places.iter().enumerate();
        let mut idle: Vec<(u64, usize)> = places
            .filter(|(_, place)| place.key.is_some())
            .filter_map(|(at, place)| Some((place.idle_since_ns?, at)))
            .collect();
        idle.sort_unstable();
        let room = self.max - self.taken.len();
        let mut wanted = self.waiting.len().saturating_sub(room);
        for (since_ns, at) in idle {
            let kept_ns = if wanted > 0 { SHOWN_NS } else { KEPT_NS };
            if now_ns.saturating_sub(since_ns) < kept_ns {
                break;
            }
            wanted = wanted.saturating_sub(1);
            self.take_back(at);
        }
        if self.taken.len() < self.max {
            let waiting = self.waiting.iter();
            let mut waiting: Vec<_> = waiting.map(|(&key, gauges)| (gauges.live(), key)).collect();
            waiting.sort_unstable_by_key(|&(live, key)| (u64::MAX - live, key));
            for (_, key) in waiting {
                if !self.promote(key) {
                    break;
                }
            }
        }
        // A burst of names has passed.
        if self.waiting.capacity() > 1024 + 4 * self.waiting.len() {
            self.waiting.shrink_to(2 * self.waiting.len());
        }
    }

    /// The names that are label values, in no order.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().filter(|place| place.key.is_some())
    }

    /// The gauges of the names that count as `<other>`, in no order.
    pub fn waiting(&self) -> impl Iterator<Item = &Gauges> {
        self.waiting.values()
    }

    /// What the name counts as; `None` for one without place.
    pub fn label(&mut self, comm: Comm) -> Option<Arc<str>> {
        let at = self.find(comm)?;
        Some(Arc::clone(&self.places[at].label))
    }

    fn find(&mut self, comm: Comm) -> Option<usize> {
        let hint = &mut self.hints[FxBuildHasher.hash_one(comm) as usize % HINTS];
        let hinted = self.places.get(*hint);
        if hinted.is_none_or(|place| place.key != Some(comm)) {
            *hint = *self.taken.get(&key(comm))?;
        }
        Some(*hint)
    }

    /// Gives a place to a name that waits, with its gauges; false if none is free.
    fn promote(&mut self, key: Comm) -> bool {
        let Some(at) = self.take(key) else {
            return false;
        };
        if let Some(gauges) = self.waiting.remove(&key) {
            let place = &mut self.places[at];
            place.gauges = gauges;
            place.counters.note_states(gauges.by_state());
        }
        true
    }

    /// Gives a place that nobody has.
    fn take(&mut self, key: Comm) -> Option<usize> {
        let place = Place {
            key: Some(key),
            label: label(key),
            gauges: Gauges::default(),
            counters: Counters::default(),
            idle_since_ns: None,
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.places[at] = place;
                at
            }
            None if self.places.len() < self.max => {
                self.places.push(place);
                self.places.len() - 1
            }
            None => return None,
        };
        self.taken.insert(key, at);
        Some(at)
    }

    fn take_back(&mut self, at: usize) {
        if let Some(key) = self.places[at].key.take() {
            self.taken.remove(&key);
        }
        self.free.push(at);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nobody_passes_for_a_label_of_ours() {
        let cases: [(&[u8], &str); 6] = [
            (b"<none>", "_none>"),
            (b"<other>", "_other>"),
            (b"<", "_"),
            (b"<<x", "_<x"),
            (b"a<b", "a<b"),
            (b"", "<empty>"),
        ];
        for (name, shown) in cases {
            assert_eq!(&*label(key(Comm::from_bytes(name))), shown);
        }
    }

    proptest! {
        /// Else two series of one page would be the same, and Prometheus would refuse the page.
        #[test]
        fn different_keys_have_different_labels(
            a in prop::collection::vec(prop::sample::select(b"<_\\x\x1bu{}\xc3\xa9\n".to_vec()), 0..5),
            b in prop::collection::vec(prop::sample::select(b"<_\\x\x1bu{}\xc3\xa9\n".to_vec()), 0..5),
        ) {
            let (a, b) = (key(Comm::from_bytes(&a)), key(Comm::from_bytes(&b)));
            prop_assert_eq!(a == b, label(a) == label(b));
        }
    }
}
