//! Things by key, which can also be walked a part at a time while others come and go; and by whatever else they are to be
//! found.
//!
//! A thing stays at its place for as long as it is there, and no growth moves it: 100,000 of them are not copied within
//! one event.

use std::hash::Hasher as _;

use hashbrown::HashTable;
use rustc_hash::FxHasher;

/// Places that are made room for together.
const PAGE: usize = 1024;

#[derive(Debug)]
pub(super) struct Store<T> {
    by_key: Places,
    /// Each but the last is full.
    pages: Pages<T>,
    free: Vec<u32>,
}

type Pages<T> = Vec<Vec<Option<(u64, T)>>>;

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self {
            by_key: Places::default(),
            pages: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Store<T> {
    pub(super) fn len(&self) -> usize {
        self.all() - self.free.len()
    }

    /// Where the thing with this key is.
    pub(super) fn place(&self, key: u64) -> Option<u32> {
        self.by_key
            .find(hash(key), |place| key_in(&self.pages, place) == Some(key))
    }

    /// What is at a place.
    pub(super) fn at(&self, place: u32) -> Option<(u64, &T)> {
        let (page, at) = split(place);
        self.pages[page][at]
            .as_ref()
            .map(|(key, thing)| (*key, thing))
    }

    pub(super) fn at_mut(&mut self, place: u32) -> Option<(u64, &mut T)> {
        let (page, at) = split(place);
        self.pages[page][at]
            .as_mut()
            .map(|(key, thing)| (*key, thing))
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.place(key).is_some()
    }

    pub(super) fn get(&self, key: u64) -> Option<&T> {
        self.at(self.place(key)?).map(|(_, thing)| thing)
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        self.at_mut(self.place(key)?).map(|(_, thing)| thing)
    }

    /// Gives its place. The key must be free.
    pub(super) fn insert(&mut self, key: u64, thing: T) -> u32 {
        debug_assert!(!self.contains(key), "two things with one key");
        let place = self.free.pop().unwrap_or_else(|| self.new_place());
        let (page, at) = split(place);
        self.pages[page][at] = Some((key, thing));
        let pages = &self.pages;
        self.by_key.insert(hash(key), place, |place| {
            key_in(pages, place).map_or(0, hash)
        });
        place
    }

    /// With its key.
    pub(super) fn remove_at(&mut self, place: u32) -> Option<(u64, T)> {
        let (page, at) = split(place);
        let (key, thing) = self.pages[page][at].take()?;
        self.by_key.remove(hash(key), place);
        self.free.push(place);
        Some((key, thing))
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
        let all = self.all();
        let from = from.min(all);
        let to = from.saturating_add(most).min(all);
        (from, to, (to < all).then_some(to))
    }

    /// Places, those that are free too.
    fn all(&self) -> usize {
        let last = self.pages.last().map_or(0, Vec::len);
        self.pages.len().saturating_sub(1) * PAGE + last
    }

    fn new_place(&mut self) -> u32 {
        if self.pages.last().is_none_or(|page| page.len() == PAGE) {
            self.pages.push(Vec::with_capacity(PAGE));
        }
        let page = self.pages.len() - 1;
        self.pages[page].push(None);
        // A table of so many sockets would not fit into memory.
        u32::try_from(self.all() - 1).unwrap_or(u32::MAX)
    }
}

const fn split(place: u32) -> (usize, usize) {
    (place as usize / PAGE, place as usize % PAGE)
}

fn key_in<T>(pages: &Pages<T>, place: u32) -> Option<u64> {
    let (page, at) = split(place);
    pages[page][at].as_ref().map(|(key, _)| *key)
}

fn hash(key: u64) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write_u64(key);
    hasher.finish()
}

/// Places by a hash of what is there, which whoever asks compares: four bytes for each, and one of the table's own.
///
/// In parts that grow by themselves: one event never waits until all are moved, nor are all there twice meanwhile.
#[derive(Debug)]
pub(super) struct Places([HashTable<u32>; PARTS]);

const PARTS: usize = 64;

impl Default for Places {
    fn default() -> Self {
        Self([const { HashTable::new() }; PARTS])
    }
}

impl Places {
    pub(super) fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        let part = &self.0[Self::part(hash)];
        part.find(hash, |&place| is_it(place)).copied()
    }

    /// `hash_of`: of what is at a place that was inserted before.
    pub(super) fn insert(&mut self, hash: u64, place: u32, hash_of: impl Fn(u32) -> u64) {
        let part = &mut self.0[Self::part(hash)];
        part.insert_unique(hash, place, |&place| hash_of(place));
    }

    pub(super) fn remove(&mut self, hash: u64, place: u32) {
        let part = &mut self.0[Self::part(hash)];
        if let Ok(entry) = part.find_entry(hash, |&its| its == place) {
            entry.remove();
        }
    }

    /// By bits that a part does not look at: it takes the highest seven, and the lowest, which are not so many for less
    /// than 60 million.
    const fn part(hash: u64) -> usize {
        (hash >> 20) as usize % PARTS
    }
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
                let place = store.place(key - 10_000).expect("it is there");
                let gone = (key - 10_000, (key - 10_000) * 2);
                assert_eq!(store.remove_at(place), Some(gone));
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
