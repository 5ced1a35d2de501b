//! The full sockets of the table, and every way to find one: by key, by cookie, by ends; of listeners by what they took.
//!
//! What a socket is found by changes in here only, so that all ways lead to the same sockets.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;
use tcpstate_common::TcpState;

use super::listeners::Listeners;
use super::owners::Known;
use super::{Identity, Record, Socket, Stay, Tuple};
use crate::model::Endpoint;

/// A socket that events follow.
#[derive(Debug)]
pub(super) struct Full {
    pub(super) socket: Socket,
    pub(super) stay: Stay,
    /// When its beginning was seen; 0 where that was not.
    pub(super) begun_ns: u64,
    /// Time of its newest event; 0 for one that only a dump has shown.
    pub(super) event_ns: u64,
    /// The last dump that covers it lacked it.
    pub(super) missed: bool,
    /// The cookie of the record that stands for it, which may be that of another with the same ends.
    pub(super) guess: Option<u64>,
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
    pub(super) fn new(socket: Socket, stay: Stay, event_ns: u64) -> Self {
        Self {
            socket,
            stay,
            begun_ns: 0,
            event_ns,
            missed: false,
            guess: None,
            timewait: None,
            dumped: None,
        }
    }

    /// As far as it is known, or guessed.
    pub(super) fn cookie(&self) -> Option<u64> {
        self.socket.cookie.or(self.guess)
    }
}

#[derive(Debug)]
pub(super) struct FullSockets {
    identity: Identity,
    /// By cookie; by address where events have no cookie, and there by a key of our own until an event tells the
    /// address of a socket that a dump found.
    by_key: FxHashMap<u64, Full>,
    listeners: Listeners,
    /// Where the cookie is not the key: the keys of those whose cookie is known, or guessed.
    by_cookie: FxHashMap<u64, u64>,
    /// The same for ends, which several can share: listeners by SO_REUSEPORT, connects, whose port does not count.
    by_ends: BTreeSet<(Tuple, u64)>,
}

/// What a socket is found by, beside its key.
#[derive(PartialEq)]
struct Found {
    listens: Option<(Option<u32>, Endpoint)>,
    cookie: Option<u64>,
    ends: Option<Tuple>,
}

impl Found {
    fn by(identity: Identity, full: &Full) -> Self {
        let socket = &full.socket;
        let listens = socket.state == TcpState::LISTEN;
        let by_key = identity == Identity::Cookie;
        Self {
            listens: listens.then_some((socket.netns, socket.local)),
            cookie: full.cookie().filter(|_| !by_key),
            ends: (!by_key).then(|| alike(identity, socket)),
        }
    }
}

/// A connect is told before it has a port: by its ends it is one of those to the same address.
fn alike(identity: Identity, socket: &Socket) -> Tuple {
    let mut local = socket.local;
    if socket.state == TcpState::SYN_SENT {
        local.port = None;
    }
    identity.tuple(socket.netns, local, socket.remote)
}

impl FullSockets {
    pub(super) fn new(identity: Identity) -> Self {
        Self {
            identity,
            by_key: FxHashMap::default(),
            listeners: Listeners::default(),
            by_cookie: FxHashMap::default(),
            by_ends: BTreeSet::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.by_key.contains_key(&key)
    }

    pub(super) fn get(&self, key: u64) -> Option<&Full> {
        self.by_key.get(&key)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Full> {
        self.by_key.values()
    }

    pub(super) fn sockets(&self) -> impl Iterator<Item = &Socket> {
        self.values().map(|full| &full.socket)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Socket)> {
        self.by_key.iter().map(|(&key, full)| (key, &full.socket))
    }

    /// To change its owner, by which no socket is found.
    pub(super) fn socket_mut(&mut self, key: u64) -> Option<&mut Socket> {
        self.by_key.get_mut(&key).map(|full| &mut full.socket)
    }

    /// The same of all.
    pub(super) fn sockets_mut(&mut self) -> impl Iterator<Item = &mut Socket> {
        self.by_key.values_mut().map(|full| &mut full.socket)
    }

    /// The key must be free.
    pub(super) fn insert(&mut self, key: u64, full: Full) {
        let found = Found::by(self.identity, &full);
        self.by_key.insert(key, full);
        self.link(key, &found);
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<Full> {
        let full = self.by_key.remove(&key)?;
        self.unlink(key, &Found::by(self.identity, &full));
        Some(full)
    }

    pub(super) fn change<T>(&mut self, key: u64, change: impl FnOnce(&mut Full) -> T) -> Option<T> {
        let full = self.by_key.get_mut(&key)?;
        let before = Found::by(self.identity, full);
        let result = change(full);
        let after = Found::by(self.identity, full);
        if before != after {
            self.unlink(key, &before);
            self.link(key, &after);
        }
        Some(result)
    }

    /// The keys of those for which it holds, which marks them as missed; it is told whether they were.
    pub(super) fn miss(&mut self, mut lacks: impl FnMut(u64, &Full) -> bool) -> (Vec<u64>, bool) {
        let (mut again, mut first) = (Vec::new(), false);
        for (&key, full) in &mut self.by_key {
            if lacks(key, full) {
                if std::mem::replace(&mut full.missed, true) {
                    again.push(key);
                } else {
                    first = true;
                }
            }
        }
        (again, first)
    }

    pub(super) fn with_cookie(&self, cookie: u64) -> Option<u64> {
        match self.identity {
            Identity::Cookie => self.contains(cookie).then_some(cookie),
            Identity::Address | Identity::AddressWithoutNetns => {
                self.by_cookie.get(&cookie).copied()
            }
        }
    }

    /// Where the cookie is not the key: those that have these ends, and no cookie.
    pub(super) fn nameless(&self, ends: Tuple) -> impl Iterator<Item = (u64, &Full)> {
        let alike = self.with_ends(ends);
        alike.filter(|(_, full)| full.cookie().is_none())
    }

    /// Where the cookie is not the key: one that has these ends, and that no event has shown.
    pub(super) fn found(&self, ends: Tuple) -> Option<u64> {
        let mut alike = self.with_ends(ends);
        alike.find_map(|(key, full)| (full.event_ns == 0).then_some(key))
    }

    /// The same for the ends of a socket.
    pub(super) fn found_beside(&self, key: u64) -> Option<u64> {
        self.found(alike(self.identity, &self.get(key)?.socket))
    }

    fn with_ends(&self, ends: Tuple) -> impl Iterator<Item = (u64, &Full)> {
        let keys = self.by_ends.range((ends, 0)..=(ends, u64::MAX));
        keys.filter_map(|&(_, key)| Some((key, self.get(key)?)))
    }

    /// Who owns the listener that took `child`, with the container, if there can be no doubt.
    pub(super) fn listener_of(&self, child: &Socket) -> Option<Known> {
        self.listeners.of(child, |key| {
            let socket = &self.get(key)?.socket;
            Some((socket.owner?, socket.container.clone()))
        })
    }

    fn link(&mut self, key: u64, found: &Found) {
        if let Some((netns, local)) = found.listens {
            self.listeners.insert(key, netns, local);
        }
        if let Some(cookie) = found.cookie {
            self.by_cookie.insert(cookie, key);
        }
        if let Some(ends) = found.ends {
            self.by_ends.insert((ends, key));
        }
    }

    fn unlink(&mut self, key: u64, found: &Found) {
        if let Some((netns, local)) = found.listens {
            self.listeners.remove(key, netns, local);
        }
        if let Some(cookie) = found.cookie
            && self.by_cookie.get(&cookie) == Some(&key)
        {
            self.by_cookie.remove(&cookie);
        }
        if let Some(ends) = found.ends {
            self.by_ends.remove(&(ends, key));
        }
    }
}

#[cfg(test)]
impl FullSockets {
    /// All ways lead to sockets that are there.
    pub(super) fn check(&self) {
        let mut again = Self::new(self.identity);
        for (&key, full) in &self.by_key {
            again.link(key, &Found::by(self.identity, full));
        }
        assert_eq!(self.by_ends, again.by_ends);
        let cookies = |sockets: &Self| sockets.by_cookie.keys().copied().collect::<BTreeSet<_>>();
        assert_eq!(cookies(self), cookies(&again));
        for (cookie, key) in &self.by_cookie {
            assert_eq!(self.by_key[key].cookie(), Some(*cookie));
        }
    }
}
