//! Things by key, which can also be walked a part at a time while others come and go.
//!
//! A thing stays at its place for as long as it is there, and no growth moves it: 100,000 of them are not copied within
//! one event.

use rustc_hash::FxHashMap;

/// Places that are made room for together.
const PAGE: usize = 1024;

#[derive(Debug)]
pub(super) struct Store<T> {
    places: FxHashMap<u64, u32>,
    /// Each but the last is full.
    pages: Vec<Vec<Option<(u64, T)>>>,
    free: Vec<u32>,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self {
            places: FxHashMap::default(),
            pages: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Store<T> {
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.places.contains_key(&key)
    }

    pub(super) fn get(&self, key: u64) -> Option<&T> {
        let (page, at) = split(*self.places.get(&key)?);
        self.pages[page][at].as_ref().map(|(_, thing)| thing)
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (page, at) = split(*self.places.get(&key)?);
        self.pages[page][at].as_mut().map(|(_, thing)| thing)
    }

    /// The key must be free.
    pub(super) fn insert(&mut self, key: u64, thing: T) {
        let place = self.free.pop().unwrap_or_else(|| self.new_place());
        let (page, at) = split(place);
        self.pages[page][at] = Some((key, thing));
        let before = self.places.insert(key, place);
        debug_assert_eq!(before, None, "two things with one key");
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<T> {
        let place = self.places.remove(&key)?;
        self.free.push(place);
        let (page, at) = split(place);
        self.pages[page][at].take().map(|(_, thing)| thing)
    }

    /// The things at `most` places from `from` on; and where to go on, if there are more places.
    pub(super) fn part(
        &self,
        from: usize,
        most: usize,
    ) -> (impl Iterator<Item = (u64, &T)>, Option<usize>) {
        let (from, to, next) = self.bounds(from, most);
        let pages = self.pages.iter().skip(from / PAGE).flatten();
        let places = pages.skip(from % PAGE).take(to - from);
        let things = places.filter_map(|place| place.as_ref().map(|(key, thing)| (*key, thing)));
        (things, next)
    }

    /// The same, to change them.
    pub(super) fn part_mut(
        &mut self,
        from: usize,
        most: usize,
    ) -> (impl Iterator<Item = (u64, &mut T)>, Option<usize>) {
        let (from, to, next) = self.bounds(from, most);
        let pages = self.pages.iter_mut().skip(from / PAGE).flatten();
        let places = pages.skip(from % PAGE).take(to - from);
        let things = places.filter_map(|place| place.as_mut().map(|(key, thing)| (*key, thing)));
        (things, next)
    }

    fn bounds(&self, from: usize, most: usize) -> (usize, usize, Option<usize>) {
        let last = self.pages.last().map_or(0, Vec::len);
        let all = self.pages.len().saturating_sub(1) * PAGE + last;
        let from = from.min(all);
        let to = from.saturating_add(most).min(all);
        (from, to, (to < all).then_some(to))
    }

    fn new_place(&mut self) -> u32 {
        if self.pages.last().is_none_or(|page| page.len() == PAGE) {
            self.pages.push(Vec::with_capacity(PAGE));
        }
        let page = self.pages.len() - 1;
        self.pages[page].push(None);
        // A table of so many sockets would not fit into memory.
        u32::try_from(page * PAGE + self.pages[page].len() - 1).unwrap_or(u32::MAX)
    }
}

const fn split(place: u32) -> (usize, usize) {
    (place as usize / PAGE, place as usize % PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_in_parts_meets_what_stays_once() {
        let mut store = Store::default();
        for key in 0..3000u64 {
            store.insert(key, key * 2);
        }
        let (mut met, mut next, mut came) = (Vec::new(), Some(0), 10_000);
        while let Some(from) = next {
            let part;
            (part, next) = store.part(from, 700);
            met.extend(part.map(|(key, _)| key));
            // Others come and go.
            for key in came..came + 10 {
                store.insert(key, key);
                assert_eq!(store.remove(key - 10_000), Some((key - 10_000) * 2));
            }
            came += 10;
        }
        let mut stayed: Vec<u64> = met.into_iter().filter(|key| *key < 3000).collect();
        stayed.sort_unstable();
        stayed.dedup();
        assert_eq!(stayed.len(), 3000);
        assert_eq!((store.get(2999), store.get(0)), (Some(&5998), None));
        assert!(store.contains(10_000));
        assert_eq!(store.len(), 3000);
        // The places of those that went are used again.
        let (all, _) = store.part_mut(0, usize::MAX);
        assert_eq!(all.count(), 3000);
        assert_eq!(store.pages.len(), 3);
        let (none, end) = store.part(5000, 1);
        assert_eq!((none.count(), end), (0, None));
    }
}
