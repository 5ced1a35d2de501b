//! The full sockets of the table, and every way to find one: by key, and by ends where records have no key; of listeners
//! by what they took.
//!
//! What a socket is found by changes in here only, so that all ways lead to the same sockets.

use std::collections::BTreeSet;
use std::hash::{Hash as _, Hasher as _};
use std::sync::Arc;

use rustc_hash::FxHasher;
use tcpstate_common::TcpState;

use super::listeners::Listeners;
use super::store::Store;
use super::{Identity, Owned, Record, Socket, Stay, Tuple};
use crate::model::{Endpoint, OwnerSource};

/// A socket that events follow.
#[derive(Debug)]
pub(super) struct Full {
    pub(super) socket: Socket,
    pub(super) stay: Stay,
    /// When its beginning was seen; 0 where that was not.
    pub(super) begun_ns: u64,
    /// When it was accepted; 0 where no event told that.
    pub(super) accepted_ns: u64,
    /// Time of its newest event; 0 for one that only a dump has shown.
    pub(super) event_ns: u64,
    /// Number of the last dump that showed it.
    pub(super) seen: u32,
    /// The last dump that covers it lacked it.
    pub(super) missed: bool,
    /// The state in which a timewait socket is about to take its place.
    pub(super) timewait: Option<TcpState>,
    /// What only a dump tells; `None` from a transition on until the next one, and where the record may be another's.
    pub(super) dumped: Option<Dumped>,
}

/// What a full socket was when a dump read it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dumped {
    pub(super) recv_queue: u32,
    pub(super) send_queue: u32,
    /// A descriptor stands for it.
    pub(super) has_file: bool,
}

impl Dumped {
    pub(super) const fn of(record: &Record) -> Self {
        Self {
            recv_queue: record.recv_queue,
            send_queue: record.send_queue,
            has_file: record.inode != 0,
        }
    }
}

impl Full {
    pub(super) const fn new(socket: Socket, stay: Stay, event_ns: u64) -> Self {
        Self {
            socket,
            stay,
            begun_ns: 0,
            accepted_ns: 0,
            event_ns,
            seen: 0,
            missed: false,
            timewait: None,
            dumped: None,
        }
    }

    /// When an event told who made it or took it; `None` where its owner is known otherwise.
    pub(super) fn owned_ns(&self) -> Option<u64> {
        match self.socket.owned.as_ref()?.owner.source {
            OwnerSource::Connect | OwnerSource::Listen => Some(self.begun_ns),
            OwnerSource::Accept => Some(self.accepted_ns),
            OwnerSource::Sweep | OwnerSource::Listener | OwnerSource::Closer => None,
        }
    }
}

#[derive(Debug)]
pub(super) struct FullSockets {
    identity: Identity,
    /// By cookie or by address. Where records have neither, by a key of our own until an event tells the address of a
    /// socket that a dump found.
    by_key: Store<Full>,
    listeners: Listeners,
    /// Where the cookie is not the key: places by a hash of the ends, which many can share: listeners by SO_REUSEPORT,
    /// connects, whose port does not count.
    by_ends: BTreeSet<(u32, u32)>,
}

/// What a socket is found by, beside its key.
#[derive(PartialEq)]
struct Found {
    listens: Option<(Option<u32>, Endpoint)>,
    ends: Option<Tuple>,
}

impl Found {
    /// `None` for most, which are asked at each event.
    fn by(identity: Identity, socket: &Socket) -> Option<Self> {
        let listens = socket.state == TcpState::LISTEN;
        let by_ends = identity != Identity::Cookie;
        (listens || by_ends).then(|| Self {
            listens: listens.then_some((socket.netns(), socket.local)),
            ends: by_ends.then(|| alike(identity, socket)),
        })
    }
}

/// A connect is told before it has a port: by its ends it is one of those to the same address.
fn alike(identity: Identity, socket: &Socket) -> Tuple {
    let mut local = socket.local;
    if socket.state == TcpState::SYN_SENT {
        local.port = None;
    }
    identity.tuple(socket.netns(), local, socket.remote)
}

fn hash(ends: Tuple) -> u32 {
    let mut hasher = FxHasher::default();
    ends.hash(&mut hasher);
    hasher.finish() as u32
}

impl FullSockets {
    pub(super) fn new(identity: Identity) -> Self {
        Self {
            identity,
            by_key: Store::default(),
            listeners: Listeners::default(),
            by_ends: BTreeSet::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.by_key.contains(key)
    }

    pub(super) fn get(&self, key: u64) -> Option<&Full> {
        self.by_key.get(key)
    }

    /// As [`Store::place`].
    pub(super) fn place(&self, key: u64) -> Option<u32> {
        self.by_key.place(key)
    }

    /// What is at a place.
    pub(super) fn at(&self, place: u32) -> Option<&Full> {
        self.by_key.at(place).map(|(_, full)| full)
    }

    /// As [`Store::part`].
    pub(super) fn part(
        &self,
        from: usize,
        most: usize,
    ) -> (impl Iterator<Item = (u64, &Full)>, Option<usize>) {
        self.by_key.part(from, most)
    }

    /// The same, to change what no socket is found by.
    pub(super) fn part_mut(
        &mut self,
        from: usize,
        most: usize,
    ) -> (impl Iterator<Item = (u64, &mut Full)>, Option<usize>) {
        self.by_key.part_mut(from, most)
    }

    /// To change its owner, by which no socket is found.
    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut Full> {
        self.by_key.get_mut(key)
    }

    /// Gives its place. The key must be free.
    pub(super) fn insert(&mut self, key: u64, full: Full) -> u32 {
        let found = Found::by(self.identity, &full.socket);
        let place = self.by_key.insert(key, full);
        self.link(key, place, found);
        place
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<Full> {
        self.remove_at(self.by_key.place(key)?)
    }

    /// What is at a place.
    pub(super) fn remove_at(&mut self, place: u32) -> Option<Full> {
        let (key, full) = self.by_key.remove_at(place)?;
        self.unlink(key, place, Found::by(self.identity, &full.socket));
        Some(full)
    }

    pub(super) fn change<T>(&mut self, key: u64, change: impl FnOnce(&mut Full) -> T) -> Option<T> {
        self.change_at(self.by_key.place(key)?, change)
    }

    /// The same of what is at a place.
    pub(super) fn change_at<T>(
        &mut self,
        place: u32,
        change: impl FnOnce(&mut Full) -> T,
    ) -> Option<T> {
        let (key, full) = self.by_key.at_mut(place)?;
        let before = Found::by(self.identity, &full.socket);
        let result = change(full);
        let after = Found::by(self.identity, &full.socket);
        if before != after {
            self.unlink(key, place, before);
            self.link(key, place, after);
        }
        Some(result)
    }

    /// Where the cookie is not the key: those that have these ends.
    pub(super) fn with_ends(&self, ends: Tuple) -> impl Iterator<Item = (u64, &Full)> {
        let hash = hash(ends);
        let places = self.by_ends.range((hash, 0)..=(hash, u32::MAX));
        let found = places.filter_map(|&(_, place)| self.by_key.at(place));
        found.filter(move |(_, full)| alike(self.identity, &full.socket) == ends)
    }

    /// Who owns the listener that took `child`, if there can be no doubt.
    pub(super) fn listener_of(&self, child: &Socket) -> Option<&Arc<Owned>> {
        self.listeners
            .of(child, |key| self.get(key)?.socket.owned.as_ref())
    }

    fn link(&mut self, key: u64, place: u32, found: Option<Found>) {
        let Some(found) = found else {
            return;
        };
        if let Some((netns, local)) = found.listens {
            self.listeners.insert(key, netns, local);
        }
        if let Some(ends) = found.ends {
            self.by_ends.insert((hash(ends), place));
        }
    }

    fn unlink(&mut self, key: u64, place: u32, found: Option<Found>) {
        let Some(found) = found else {
            return;
        };
        if let Some((netns, local)) = found.listens {
            self.listeners.remove(key, netns, local);
        }
        if let Some(ends) = found.ends {
            self.by_ends.remove(&(hash(ends), place));
        }
    }
}

#[cfg(test)]
impl FullSockets {
    pub(super) fn sockets(&self) -> impl Iterator<Item = &Socket> {
        self.part(0, usize::MAX).0.map(|(_, full)| &full.socket)
    }

    /// All ways lead to sockets that are there.
    pub(super) fn check(&self) {
        let mut again = Self::new(self.identity);
        for (key, full) in self.part(0, usize::MAX).0 {
            let place = self.by_key.place(key).expect("it is there");
            again.link(key, place, Found::by(self.identity, &full.socket));
        }
        assert_eq!(self.by_ends, again.by_ends);
        assert_eq!(self.listeners.len(), again.listeners.len());
    }
}
