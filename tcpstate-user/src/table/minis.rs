//! The minisockets of the table, and both ways to find one: by key, and by ends.

use std::hash::{Hash as _, Hasher as _};

use rustc_hash::FxHasher;
use tcpstate_common::TcpState;

use super::store::{Places, Store};
use super::{Identity, Socket, Stay, Tuple};

/// What no event follows: a timewait socket (TIME_WAIT, or an orphan's FIN_WAIT2) or a half-open request.
/// The kernel calls them minisocks.
#[derive(Debug)]
pub(super) struct Mini {
    pub(super) socket: Socket,
    pub(super) stay: Stay,
    /// When its timer ends its life; `None` until that is known.
    pub(super) expires_ns: Option<u64>,
    /// Number of the last dump that showed it.
    pub(super) seen: u32,
    pub(super) missed: bool,
    /// Time of the →CLOSE that told of it; 0 for one that only a dump has shown.
    pub(super) event_ns: u64,
}

#[derive(Debug)]
pub(super) struct Minis {
    identity: Identity,
    /// By cookie, or by a key of our own where that is not known or another's already.
    by_key: Store<Mini>,
    /// Timewait sockets, and requests, by their ends.
    by_ends: Places,
}

impl Minis {
    pub(super) fn new(identity: Identity) -> Self {
        Self {
            identity,
            by_key: Store::default(),
            by_ends: Places::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.by_key.contains(key)
    }

    pub(super) fn get(&self, key: u64) -> Option<&Mini> {
        self.by_key.get(key)
    }

    /// To change what it is not found by: neither its ends, nor a request into a timewait socket.
    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut Mini> {
        self.by_key.get_mut(key)
    }

    /// As [`Store::part`].
    pub(super) fn part(
        &self,
        from: usize,
        most: usize,
    ) -> (impl Iterator<Item = (u64, &Mini)>, Option<usize>) {
        self.by_key.part(from, most)
    }

    /// The same, as [`Minis::get_mut`].
    pub(super) fn part_mut(
        &mut self,
        from: usize,
        most: usize,
    ) -> (impl Iterator<Item = (u64, &mut Mini)>, Option<usize>) {
        self.by_key.part_mut(from, most)
    }

    /// The key must be free.
    pub(super) fn insert(&mut self, key: u64, mini: Mini) {
        let identity = self.identity;
        let hash = hash_of(identity, &mini.socket);
        let place = self.by_key.insert(key, mini);
        let by_key = &self.by_key;
        self.by_ends.insert(hash, place, |place| {
            by_key
                .at(place)
                .map_or(0, |(_, mini)| hash_of(identity, &mini.socket))
        });
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<Mini> {
        let place = self.by_key.place(key)?;
        let (_, mini) = self.by_key.remove_at(place)?;
        self.by_ends
            .remove(hash_of(self.identity, &mini.socket), place);
        Some(mini)
    }

    /// The key of one of that kind that has these ends and is wanted; several can have them: addresses carry no zone.
    pub(super) fn with_ends(
        &self,
        requests: bool,
        ends: Tuple,
        wanted: impl Fn(&Mini) -> bool,
    ) -> Option<u64> {
        let is_it = |mini: &Mini| {
            is_request(mini.socket.state) == requests
                && self.identity.ends(&mini.socket) == ends
                && wanted(mini)
        };
        let at = |place| self.by_key.at(place);
        let found = self.by_ends.find(hash(requests, ends), |place| {
            at(place).is_some_and(|(_, mini)| is_it(mini))
        });
        at(found?).map(|(key, _)| key)
    }
}

pub(super) fn is_request(state: TcpState) -> bool {
    state == TcpState::NEW_SYN_RECV
}

fn hash_of(identity: Identity, socket: &Socket) -> u64 {
    hash(is_request(socket.state), identity.ends(socket))
}

fn hash(request: bool, ends: Tuple) -> u64 {
    let mut hasher = FxHasher::default();
    (request, ends).hash(&mut hasher);
    hasher.finish()
}
