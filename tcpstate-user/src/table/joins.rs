//! Which of the table's sockets a dump's records are, where not every socket's cookie is known; and what closed while
//! the dump was read.

use rustc_hash::FxHashMap;
use tcpstate_common::TcpState;

use super::full::FullSockets;
use super::reconcile::newer;
use super::{Record, Tuple};
use crate::model::Endpoint;

/// Which of the table's sockets the records of one dump are.
#[derive(Default)]
pub(super) struct Joins {
    pub(super) closed: Closed,
    /// Of minisockets, by cookie.
    pub(super) minis: FxHashMap<u64, u64>,
    pub(super) alike: FxHashMap<Tuple, Alike>,
    /// The keys of full sockets of which only the ends told.
    pub(super) guessed: Vec<u64>,
}

/// Full sockets without a cookie that have the same ends, and the records that do.
pub(super) struct Alike {
    pub(super) entries: usize,
    pub(super) records: usize,
    /// When they began, and the keys, of those that no record stands for yet: the oldest is last, for it is the one
    /// that the dump must show.
    left: Vec<(u64, u64)>,
    pub(super) joined: Option<(u64, Record)>,
}

impl Joins {
    /// The table's entry for a full socket, where only the ends can tell.
    pub(super) fn by_ends(
        &mut self,
        full: &FullSockets,
        ends: Tuple,
        record: &Record,
    ) -> Option<u64> {
        let alike = self.alike.entry(ends).or_insert_with(|| {
            let nameless = full.nameless(ends);
            let mut left: Vec<(u64, u64)> =
                nameless.map(|(key, full)| (full.begun_ns, key)).collect();
            left.sort_unstable_by(|one, other| other.cmp(one));
            Alike {
                entries: left.len(),
                records: 0,
                left,
                joined: None,
            }
        });
        alike.records += 1;
        let begun_before = |&mut (begun_ns, _): &mut (u64, u64)| begun_ns <= record.read_ns.1;
        let (_, key) = alike.left.pop_if(begun_before)?;
        alike.joined = Some((key, *record));
        self.guessed.push(key);
        Some(key)
    }

    /// The same for a connect, which its port does not tell from others.
    pub(super) fn unbound(
        &mut self,
        full: &FullSockets,
        ends: Tuple,
        record: &Record,
    ) -> Option<u64> {
        let (netns, local, remote) = ends;
        let local = Endpoint {
            port: None,
            ..local
        };
        let connects = record.state == TcpState::SYN_SENT;
        connects
            .then(|| self.by_ends(full, (netns, local, remote), record))
            .flatten()
    }
}

/// What closed, and when: by cookie, or by its ends where that was not known.
#[derive(Debug, Default)]
pub(super) struct Closed {
    /// When timewait sockets ended, by cookie.
    pub(super) timewait: FxHashMap<u64, u64>,
    by_cookie: FxHashMap<u64, u64>,
    by_ends: FxHashMap<Tuple, Vec<u64>>,
}

impl Closed {
    pub(super) fn insert(&mut self, cookie: Option<u64>, ends: Tuple, time_ns: u64) {
        match cookie {
            Some(cookie) => {
                self.by_cookie.insert(cookie, time_ns);
            }
            None => self.by_ends.entry(ends).or_default().push(time_ns),
        }
    }

    /// The record's socket closed after it was read.
    pub(super) fn has_cookie_of(&self, record: &Record) -> bool {
        let closed_ns = self.by_cookie.get(&record.cookie);
        closed_ns.is_some_and(|&ns| newer(ns, record))
    }

    /// The record's timewait socket ended after it was read.
    pub(super) fn has_timewait_of(&self, record: &Record) -> bool {
        let ended_ns = self.timewait.get(&record.cookie);
        ended_ns.is_some_and(|&ns| newer(ns, record))
    }

    /// One with the record's ends, and with a cookie that is not known, closed after it was read.
    pub(super) fn has_ends_of(&mut self, record: &Record, ends: Tuple) -> bool {
        let Some(closed) = self.by_ends.get_mut(&ends) else {
            return false;
        };
        let since = closed.iter().position(|&ns| newer(ns, record));
        if let (Some(at), TcpState::LISTEN) = (since, record.state) {
            // Others may listen there too: it stands for one record.
            closed.swap_remove(at);
        }
        since.is_some()
    }
}
