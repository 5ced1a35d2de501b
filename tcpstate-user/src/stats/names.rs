//! Which names of processes are label values: the rule that keeps metrics and memory bounded although any user
//! can rename processes at will.
//!
//! A name with a place is itself in every metric; one without is `<other>` in every metric, and only its
//! gauges are kept, so that they are right when it gets a place. Held at most: the places, and the names that
//! have live sockets at this time.

use std::collections::HashMap;
use std::sync::Arc;

use super::counters::Counters;
use super::gauges::Gauges;
use super::idle::IdleList;
use crate::model::Comm;

/// How long a name keeps its place without a live socket.
pub const KEPT_NS: u64 = 3600 * 1_000_000_000;

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
}

#[derive(Debug)]
pub struct Names {
    max: usize,
    /// Never more than `max`.
    places: Vec<Place>,
    free: Vec<usize>,
    /// Places that are taken by names without live sockets.
    idle: IdleList,
    /// Others choose the names and must not be able to make them collide: the standard hasher, not a faster one.
    taken: HashMap<Comm, usize>,
    /// Names with live sockets and no place.
    waiting: HashMap<Comm, Gauges>,
    /// The place asked for last: events come in runs of one name.
    hint: usize,
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
            idle: IdleList::new(),
            taken: HashMap::new(),
            waiting: HashMap::new(),
            hint: 0,
            other: Counters::default(),
            overflow: 0,
        }
    }

    /// One more live socket of that name.
    pub fn enter(&mut self, comm: Comm, state: usize) {
        let place = match self.find(comm) {
            Some(at) => {
                if self.places[at].gauges.live() == 0 {
                    self.idle.remove(at);
                }
                Some(at)
            }
            None => self.promote(key(comm)),
        };
        let (gauges, counters) = match place {
            Some(at) => {
                let place = &mut self.places[at];
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
            let gauges = &mut self.places[at].gauges;
            if gauges.remove(state) && gauges.live() == 0 {
                self.idle.push(at, now_ns);
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

    /// A live socket of that name went from one state to another.
    pub fn shift(&mut self, comm: Comm, from: usize, to: usize) {
        let (gauges, counters) = if let Some(at) = self.find(comm) {
            let place = &mut self.places[at];
            (&mut place.gauges, &mut place.counters)
        } else if let Some(gauges) = self.waiting.get_mut(&key(comm)) {
            (gauges, &mut self.other)
        } else {
            debug_assert!(false, "no socket of {comm:?}");
            return;
        };
        if gauges.remove(from) {
            gauges.add(to);
            counters.note_state(to);
        }
    }

    /// Where something counts that happened to a socket of that name.
    pub fn counters(&mut self, comm: Comm, now_ns: u64) -> &mut Counters {
        let place = match self.find(comm) {
            Some(at) => Some(at),
            None if self.waiting.contains_key(&key(comm)) => None,
            None => self.take_without_live(key(comm), now_ns),
        };
        match place {
            Some(at) => &mut self.places[at].counters,
            None => &mut self.other,
        }
    }

    /// Takes the places back from names that have been without live sockets for an hour, and gives places that
    /// nobody has, or only a name without live sockets, to names with: those with most sockets first.
    pub fn settle(&mut self, now_ns: u64) {
        while let Some(at) = self.expired(now_ns) {
            self.take_back(at);
        }
        if !self.waiting.is_empty() && self.has_room() {
            let waiting = self.waiting.iter();
            let mut waiting: Vec<_> = waiting.map(|(&key, gauges)| (gauges.live(), key)).collect();
            waiting.sort_unstable_by_key(|&(live, key)| (u64::MAX - live, key));
            for (_, key) in waiting {
                if self.promote(key).is_none() {
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
        let hinted = self.places.get(self.hint);
        if hinted.is_some_and(|place| place.key == Some(comm)) {
            return Some(self.hint);
        }
        self.hint = *self.taken.get(&key(comm))?;
        Some(self.hint)
    }

    /// Whether a name with live sockets can get a place.
    fn has_room(&self) -> bool {
        self.places.len() < self.max || !self.free.is_empty() || self.idle.longest().is_some()
    }

    /// Gives a place to a name that has, or is about to have, live sockets, and the gauges that it waited with.
    fn promote(&mut self, key: Comm) -> Option<usize> {
        if !self.has_room() {
            return None;
        }
        if self.places.len() >= self.max
            && self.free.is_empty()
            && let Some((longest, _)) = self.idle.longest()
        {
            self.take_back(longest);
        }
        let at = self.take(key)?;
        if let Some(gauges) = self.waiting.remove(&key) {
            let place = &mut self.places[at];
            place.gauges = gauges;
            place.counters.note_states(gauges.by_state());
        }
        Some(at)
    }

    /// Gives a place to a name that is first heard of when it has no live socket: not another's before its time.
    fn take_without_live(&mut self, key: Comm, now_ns: u64) -> Option<usize> {
        if let Some(expired) = self.expired(now_ns) {
            self.take_back(expired);
        }
        let place = self.take(key);
        match place {
            Some(at) => self.idle.push(at, now_ns),
            None => self.overflow += 1,
        }
        place
    }

    fn take(&mut self, key: Comm) -> Option<usize> {
        let place = Place {
            key: Some(key),
            label: label(key),
            gauges: Gauges::default(),
            counters: Counters::default(),
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

    fn expired(&self, now_ns: u64) -> Option<usize> {
        let (at, since_ns) = self.idle.longest()?;
        (now_ns.saturating_sub(since_ns) >= KEPT_NS).then_some(at)
    }

    /// From a name without live sockets.
    fn take_back(&mut self, at: usize) {
        self.idle.remove(at);
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
