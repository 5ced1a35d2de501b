//! Which of the table's full sockets a dump's records are, where only their ends can tell: by their number.

use rustc_hash::FxHashMap;
use tcpstate_common::TcpState;

use super::full::FullSockets;
use super::{Record, Tuple};
use crate::model::Endpoint;

/// What the records of one dump have been taken for.
#[derive(Debug, Default)]
pub(super) struct Alikes {
    by_ends: FxHashMap<Tuple, Alike>,
    /// Keys by the cookies of the records: one can come twice.
    by_cookie: FxHashMap<u64, u64>,
}

/// Full sockets that have the same ends, and the records that do.
#[derive(Debug)]
struct Alike {
    entries: usize,
    records: usize,
    /// When they began, and the keys, of those that no record stands for yet: the oldest is last, for it is the one
    /// that the dump must show.
    left: Vec<(u64, u64)>,
    /// What the first record stands for.
    first: Option<u64>,
}

/// What a record is taken for.
pub(super) struct Joined {
    pub(super) key: Option<u64>,
    /// The dump has shown no other such record, and the table had no other such socket.
    pub(super) certain: bool,
    /// That there was one such record was no longer so: what was learned from the first is to be forgotten.
    pub(super) doubted: Option<u64>,
}

impl Alikes {
    pub(super) fn same(&self, record: &Record) -> Option<u64> {
        self.by_cookie.get(&record.cookie?).copied()
    }

    /// The table's entry for a full socket. For a connect, `ends` may be without the port, which does not tell it from
    /// others then.
    pub(super) fn join(&mut self, full: &FullSockets, ends: Tuple, record: &Record) -> Joined {
        let alike = self.by_ends.entry(ends).or_insert_with(|| {
            let mut left: Vec<(u64, u64)> = full
                .with_ends(ends)
                .map(|(key, full)| (full.begun_ns, key))
                .collect();
            left.sort_unstable_by(|one, other| other.cmp(one));
            Alike {
                entries: left.len(),
                records: 0,
                left,
                first: None,
            }
        });
        alike.records += 1;
        let doubted = (alike.records == 2).then_some(alike.first).flatten();
        let begun_before = |&mut (begun_ns, _): &mut (u64, u64)| begun_ns <= record.read_ns.1;
        let mut key = None;
        while let Some((begun_ns, left)) = alike.left.pop_if(begun_before) {
            // It may have closed since, and its address be another's.
            let there = full.get(left);
            if there.is_some_and(|there| there.begun_ns == begun_ns) {
                key = Some(left);
                break;
            }
        }
        Joined {
            key,
            certain: alike.records == 1 && alike.entries == usize::from(key.is_some()),
            doubted,
        }
    }

    /// What the record stands for.
    pub(super) fn stands(&mut self, record: &Record, ends: Tuple, key: u64) {
        if let Some(cookie) = record.cookie {
            self.by_cookie.insert(cookie, key);
        }
        if let Some(alike) = self.by_ends.get_mut(&ends) {
            alike.first.get_or_insert(key);
        }
    }
}

/// The ends that a connect is known by before it has a port.
pub(super) fn unbound(ends: Tuple, record: &Record) -> Option<Tuple> {
    let (netns, local, remote) = ends;
    let local = Endpoint {
        port: None,
        ..local
    };
    (record.state == TcpState::SYN_SENT).then_some((netns, local, remote))
}
