//! What ended while a dump was read: a record that is older than that brings nothing back.

use rustc_hash::FxHashMap;
use tcpstate_common::TcpState;

use super::reconcile::newer;
use super::{Record, Tuple};

/// Each with when it ended.
#[derive(Debug, Default)]
pub(super) struct Closed {
    /// Full sockets, by key.
    full: FxHashMap<u64, u64>,
    /// Full sockets by their ends, where records have no key.
    by_ends: FxHashMap<Tuple, Vec<u64>>,
    /// Timewait sockets whose ends are another's now, and requests that became sockets.
    mini: FxHashMap<Tuple, u64>,
    /// Timewait sockets, by cookie.
    timewait: FxHashMap<u64, u64>,
}

impl Closed {
    pub(super) fn full(&mut self, key: u64, time_ns: u64) {
        self.full.insert(key, time_ns);
    }

    pub(super) fn full_by_ends(&mut self, ends: Tuple, time_ns: u64) {
        self.by_ends.entry(ends).or_default().push(time_ns);
    }

    pub(super) fn mini(&mut self, ends: Tuple, time_ns: u64) {
        self.mini.insert(ends, time_ns);
    }

    pub(super) fn timewait(&mut self, cookie: u64, time_ns: u64) {
        self.timewait.insert(cookie, time_ns);
    }

    /// The full socket with this key ended after the record was read.
    pub(super) fn has_full(&self, key: u64, record: &Record) -> bool {
        let ended_ns = self.full.get(&key);
        ended_ns.is_some_and(|&ns| newer(ns, record))
    }

    /// A full socket with the record's ends did.
    pub(super) fn has_full_by_ends(&mut self, ends: Tuple, record: &Record) -> bool {
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

    /// The record's timewait socket or request did.
    pub(super) fn has_mini(&self, ends: Tuple, record: &Record) -> bool {
        let by_ends = self.mini.get(&ends);
        let by_cookie = record.cookie.and_then(|its| self.timewait.get(&its));
        let ended = by_ends.into_iter().chain(by_cookie);
        ended.copied().any(|ns| newer(ns, record))
    }
}
