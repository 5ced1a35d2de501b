//! The door for dumps: merges one with the events that came meanwhile.
//!
//! A dump is not atomic. So an event that is newer than a record wins over it, an older one yields, and a
//! socket that a dump lacks is taken for gone only if the next dump lacks it too.

use rustc_hash::FxHashSet;
use tcpstate_common::TcpState;

use super::apply::TIME_WAIT_NS;
use super::full::Dumped;
use super::joins::{Alike, Closed, Joins};
use super::owners::own_by;
use super::{
    Change, Correction, Dwell, Full, Identity, Mini, Place, Record, Snapshot, Socket, StateMask,
    Stay, Table, Tuple,
};
use crate::model::{ConnectionId, End, Evidence, Role};

/// The event comes before the kernel stores the new state; an interrupt or a stolen CPU may lie between. A
/// record read this soon after an event may still show the state before it: a first dump waits this long
/// after the programs were attached.
pub const STORE_NS: u64 = 20_000_000;

impl Table {
    /// To be called before a dump begins: from now on the table remembers what closes.
    pub fn snapshot_begins(&mut self) {
        self.closed = Some(Closed::default());
    }

    /// The dump that had begun failed.
    pub fn snapshot_failed(&mut self) {
        self.closed = None;
    }

    /// Merges a dump. All events up to its end must have been applied.
    ///
    /// Tells whether it lacked a full socket for the first time: the next dump decides.
    pub fn reconcile(&mut self, snapshot: &Snapshot, mut sink: impl FnMut(&Change<'_>)) -> bool {
        let closed = self.closed.take().unwrap_or_default();
        let mut joins = Joins {
            closed,
            minis: self
                .mini
                .iter()
                .filter_map(|(&key, mini)| Some((mini.socket.cookie?, key)))
                .collect(),
            ..Joins::default()
        };
        let mut seen_full = FxHashSet::default();
        let mut seen_mini = FxHashSet::default();
        for record in &snapshot.records {
            if is_mini(record) {
                if let Some(key) = self.mini_record(record, &mut joins, &mut sink) {
                    // A socket can come twice in one dump.
                    joins.minis.insert(record.cookie, key);
                    seen_mini.insert(key);
                }
            } else if let Some(key) = self.full_record(record, &mut joins, &mut sink) {
                seen_full.insert(key);
            }
        }
        self.learn_joins(&joins, snapshot.started_ns);
        // What events follow is not for a dump of some states to end.
        let doubtful =
            snapshot.states == StateMask::ALL && self.drop_full(snapshot, &seen_full, &mut sink);
        self.drop_mini(snapshot, &seen_mini, &mut sink);
        if snapshot.whole_host && snapshot.states == StateMask::ALL {
            // The inode of a namespace that is gone may be another's, which no dump lists, once nothing is left in it.
            let sockets = self.full.sockets();
            let left: FxHashSet<u32> = sockets.filter_map(|socket| socket.netns).collect();
            self.listed.retain(|netns| left.contains(netns));
        }
        self.listed.extend(&snapshot.netns);
        self.corrections.begun = true;
        doubtful
    }

    fn record_ends(&self, record: &Record) -> Tuple {
        self.identity
            .tuple(Some(record.netns), record.local, record.remote)
    }

    /// Gives the key of the table's entry for a full socket, if there is one now.
    fn full_record(
        &mut self,
        record: &Record,
        joins: &mut Joins,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Option<u64> {
        if let Some(key) = self.full.with_cookie(record.cookie) {
            self.merge_full(key, record, sink);
            return Some(key);
        }
        if joins.closed.has_cookie_of(record) {
            return None;
        }
        if self.identity != Identity::Cookie {
            let ends = self.record_ends(record);
            let mut known = joins.by_ends(&self.full, ends, record);
            if known.is_none() {
                if joins.closed.has_ends_of(record, ends) {
                    return None;
                }
                known = joins.unbound(&self.full, ends, record);
            }
            if let Some(key) = known {
                // So that it is known if it comes again.
                let guess = Some(record.cookie);
                self.full.change(key, |full| full.guess = guess);
                self.merge_full(key, record, sink);
                return Some(key);
            }
        }
        self.corrections.count(Correction::Found);
        Some(self.found(record, joins, sink))
    }

    /// Makes of guesses what they are worth.
    fn learn_joins(&mut self, joins: &Joins, started_ns: u64) {
        // One record, and one socket, of which the dump must have one.
        let certain = |alike: &&Alike| (alike.entries, alike.records) == (1, 1);
        for alike in joins.alike.values().filter(certain) {
            let Some((key, record)) = alike.joined else {
                continue;
            };
            self.full.change(key, |full| {
                let there = full.begun_ns.saturating_add(STORE_NS) < started_ns;
                if !there || newer(full.event_ns, &record) {
                    return;
                }
                if record.state == full.socket.state {
                    full.dumped = Some(Dumped::of(&record));
                }
                if self.identity == Identity::Address {
                    full.guess = None;
                    full.socket.cookie = Some(record.cookie);
                    learn(&mut full.socket, &record);
                }
            });
        }
        if self.identity == Identity::AddressWithoutNetns {
            // No event will ever put one right.
            for &key in &joins.guessed {
                self.full.change(key, |full| full.guess = None);
            }
        }
    }

    fn merge_full(&mut self, key: u64, record: &Record, sink: &mut impl FnMut(&Change<'_>)) {
        let before = self.full.change(key, |full| {
            full.missed = false;
            let dumped = full.guess.is_none().then(|| Dumped::of(record));
            if record.state == full.socket.state {
                full.dumped = dumped;
            }
            if newer(full.event_ns, record) {
                return None;
            }
            let before = Place::of(&full.socket);
            if full.guess.is_none() {
                learn(&mut full.socket, record);
            }
            if record.state == before.state {
                return None;
            }
            full.socket.state = record.state;
            full.socket.established |= was_established(record.state);
            full.dumped = dumped;
            full.stay = Stay {
                since_ns: record.read_ns.1,
                seen: false,
            };
            Some(before)
        });
        let (Some(before), Some(full)) = (before.flatten(), self.full.get(key)) else {
            return;
        };
        self.corrections.count(Correction::State);
        sink(&Change {
            time_ns: record.read_ns.1,
            socket: &full.socket,
            kernel: None,
            shown: Some((before.state, record.state)),
            dwell: Dwell::None,
            evidence: Evidence::Snapshot,
            end: None,
            before: Some(before),
            after: Some(Place::of(&full.socket)),
        });
    }

    /// Takes in a full socket that no event has shown.
    fn found(
        &mut self,
        record: &Record,
        joins: &mut Joins,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> u64 {
        let id = self.new_id(Some(record.cookie));
        let mut socket = found_socket(record, id);
        let key = match self.identity {
            Identity::Cookie => record.cookie,
            Identity::Address | Identity::AddressWithoutNetns => self.own_key(),
        };
        own_by(&mut socket, self.owners.accepted_early(key, 0));
        sink(&found_change(record, &socket));
        let stay = Stay {
            since_ns: record.read_ns.1,
            seen: false,
        };
        let mut full = Full::new(socket, stay, 0);
        full.dumped = Some(Dumped::of(record));
        if self.identity == Identity::AddressWithoutNetns {
            full.guess = full.socket.cookie.take();
            joins.guessed.push(key);
        }
        self.full.insert(key, full);
        key
    }

    /// Turns a full socket whose end was lost into a minisocket in the same state, and gives its key; what the dump
    /// shows moves it on.
    fn demote(&mut self, key: u64) -> Option<u64> {
        let Full { socket, stay, .. } = self.full.remove(key)?;
        self.corrections.count(Correction::State);
        self.generations.closed(socket.id);
        Some(self.insert_mini(Mini {
            socket,
            stay,
            expires_ns: None,
            missed: false,
            event_ns: 0,
        }))
    }

    /// Gives the key of the table's entry for a minisocket, if there is one now.
    fn mini_record(
        &mut self,
        record: &Record,
        joins: &mut Joins,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Option<u64> {
        let ends = self.record_ends(record);
        let full = self.full.with_cookie(record.cookie);
        let full = full.or_else(|| Some(self.full.nameless(ends).next()?.0));
        if record.state == TcpState::NEW_SYN_RECV {
            // Its child has come since.
            if full.is_some()
                || joins.closed.has_cookie_of(record)
                || joins.closed.has_ends_of(record, ends)
            {
                return None;
            }
        } else if let Some(key) = full
            && self.full.get(key).is_some_and(|full| {
                let ends = (full.socket.local, full.socket.remote);
                !newer(full.event_ns, record) && ends == (record.local, record.remote)
            })
        {
            // Its →CLOSE was lost: what the table holds as full is this minisocket.
            let key = self.demote(key)?;
            return Some(self.merge_mini(record, Some(key), sink));
        }
        if joins.closed.has_timewait_of(record) {
            return None;
        }
        let known = joins.minis.get(&record.cookie).copied().or_else(|| {
            let key = *self.timewait.get(&ends)?;
            self.mini.get(&key)?.socket.cookie.is_none().then_some(key)
        });
        Some(self.merge_mini(record, known, sink))
    }

    /// Gives the key of the table's entry: there is one now.
    fn merge_mini(
        &mut self,
        record: &Record,
        known: Option<u64>,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> u64 {
        let expires_ns = record
            .expires_ns
            .map(|left| record.read_ns.1.saturating_add(left));
        if let Some((key, mini)) = known.and_then(|key| Some((key, self.mini.get_mut(&key)?))) {
            mini.missed = false;
            mini.expires_ns = expires_ns;
            if self.identity == Identity::Address {
                mini.socket.cookie = Some(record.cookie);
            }
            if mini.socket.state == record.state {
                return key;
            }
            if let Some(mini) = self.remove_mini(key) {
                return self.move_mini(mini, record, sink);
            }
        }
        let free = self.full.with_cookie(record.cookie).is_none();
        let id = self.new_id(free.then_some(record.cookie));
        let socket = found_socket(record, id);
        sink(&found_change(record, &socket));
        self.insert_mini(Mini {
            socket,
            stay: Stay {
                since_ns: entered_time_wait(record, expires_ns).unwrap_or(record.read_ns.1),
                seen: false,
            },
            expires_ns,
            missed: false,
            event_ns: 0,
        })
    }

    /// An orphan got its peer's FIN; or an event's hint was wrong, and the dump is right.
    fn move_mini(
        &mut self,
        mut mini: Mini,
        record: &Record,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> u64 {
        let before = Place::of(&mini.socket);
        mini.socket.state = record.state;
        let entered_ns = entered_time_wait(record, mini.expires_ns).unwrap_or(record.read_ns.1);
        let ends = record.state == TcpState::TIME_WAIT;
        mini.stay = Stay {
            since_ns: entered_ns,
            seen: false,
        };
        sink(&Change {
            time_ns: entered_ns,
            socket: &mini.socket,
            kernel: None,
            shown: Some((before.state, record.state)),
            dwell: Dwell::None,
            evidence: Evidence::Snapshot,
            end: ends.then(|| mini_end(before.state)),
            before: Some(before),
            after: Some(Place::of(&mini.socket)),
        });
        self.insert_mini(mini)
    }

    /// Full sockets that the dump should have shown; tells whether there was one that no dump had lacked before.
    fn drop_full(
        &mut self,
        snapshot: &Snapshot,
        seen: &FxHashSet<u64>,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> bool {
        // A namespace that no dump has listed may live where none can find it, and its events come.
        let known = |netns| self.listed.contains(&netns);
        let (gone, doubtful) = self.full.miss(|key, full| {
            covers(snapshot, &full.socket, known)
                && full.event_ns.saturating_add(STORE_NS) < snapshot.started_ns
                && !seen.contains(&key)
        });
        for key in gone {
            let Some(Full { mut socket, .. }) = self.full.remove(key) else {
                continue;
            };
            // With its namespace a socket goes without an event.
            if socket
                .netns
                .is_none_or(|netns| snapshot.netns.contains(&netns))
            {
                self.corrections.count(Correction::Gone);
            }
            self.generations.closed(socket.id);
            let before = Place::of(&socket);
            socket.state = TcpState::CLOSE;
            sink(&gone_change(
                snapshot.finished_ns,
                &socket,
                before,
                End::Unknown,
            ));
        }
        doubtful
    }

    /// Minisockets that the dump should have shown: gone at once if their time was over, else if the next
    /// dump lacks them too.
    fn drop_mini(
        &mut self,
        snapshot: &Snapshot,
        seen: &FxHashSet<u64>,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        let mut gone = Vec::new();
        for (&key, mini) in &mut self.mini {
            // In a namespace that is not found nothing tells of a minisocket any more.
            let due = covers(snapshot, &mini.socket, |_| true)
                && mini.event_ns.saturating_add(STORE_NS) < snapshot.started_ns;
            if !due || seen.contains(&key) {
                continue;
            }
            let expired = mini.expires_ns.is_some_and(|at| at <= snapshot.started_ns);
            if expired || std::mem::replace(&mut mini.missed, true) {
                gone.push(key);
            }
        }
        for key in gone {
            let Some(Mini {
                mut socket,
                expires_ns,
                ..
            }) = self.remove_mini(key)
            else {
                continue;
            };
            let before = Place::of(&socket);
            socket.state = TcpState::CLOSE;
            let found_ns = snapshot.finished_ns;
            let time_ns = expires_ns.map_or(found_ns, |at| at.min(found_ns));
            sink(&gone_change(
                time_ns,
                &socket,
                before,
                mini_end(before.state),
            ));
        }
    }
}

/// Whether an event, or the store of its state, may have come after the record was read.
pub(super) const fn newer(event_ns: u64, record: &Record) -> bool {
    event_ns.saturating_add(STORE_NS) >= record.read_ns.0
}

/// A timewait socket or a request: their records have a timer of their own kind.
fn is_mini(record: &Record) -> bool {
    record.expires_ns.is_some() || record.state == TcpState::NEW_SYN_RECV
}

/// Whether the dump would show the socket if it were there. `known`: whether a namespace that is not found is gone.
fn covers(snapshot: &Snapshot, socket: &Socket, known: impl Fn(u32) -> bool) -> bool {
    let unreachable = |netns| {
        let mut unreachable = snapshot.unreachable.iter();
        unreachable.any(|namespace| namespace.netns == Some(netns))
    };
    snapshot.states.contains(socket.state)
        && socket.netns.is_none_or(|netns| {
            snapshot.netns.contains(&netns)
                || (snapshot.whole_host && !unreachable(netns) && known(netns))
        })
}

fn was_established(state: TcpState) -> bool {
    !matches!(
        state,
        TcpState::CLOSE
            | TcpState::LISTEN
            | TcpState::SYN_SENT
            | TcpState::SYN_RECV
            | TcpState::NEW_SYN_RECV
    )
}

/// The end of a connection of which the kernel kept a timewait socket that was not in TIME_WAIT: no event
/// shows what came then, but who closed first is known.
pub(super) fn mini_end(before: TcpState) -> End {
    match before {
        TcpState::FIN_WAIT2 => End::LocalClose,
        TcpState::CLOSING => End::SimultaneousClose,
        _ => End::Unknown,
    }
}

/// When a timewait socket entered TIME_WAIT, by its timer.
fn entered_time_wait(record: &Record, expires_ns: Option<u64>) -> Option<u64> {
    (record.state == TcpState::TIME_WAIT).then_some(
        expires_ns?
            .saturating_sub(TIME_WAIT_NS)
            .min(record.read_ns.1),
    )
}

/// Adds to a socket what events could not tell; not where the record may be another's.
fn learn(socket: &mut Socket, record: &Record) {
    socket.local.port = socket.local.port.or(record.local.port);
    socket.local.addr = socket.local.addr.or(record.local.addr);
    socket.netns = socket.netns.or(Some(record.netns));
    socket.uid = record.uid.or(socket.uid);
}

fn found_socket(record: &Record, id: ConnectionId) -> Socket {
    Socket {
        id,
        cookie: Some(record.cookie),
        netns: Some(record.netns),
        family: record.family,
        local: record.local,
        remote: record.remote,
        state: record.state,
        role: match record.state {
            TcpState::SYN_SENT => Some(Role::Active),
            TcpState::NEW_SYN_RECV => Some(Role::Passive),
            // Without a file: not accepted yet. An orphan is past these states.
            TcpState::ESTABLISHED | TcpState::CLOSE_WAIT if record.inode == 0 => {
                Some(Role::Passive)
            }
            _ => None,
        },
        owner: None,
        uid: record.uid,
        container: None,
        holders: None,
        established: was_established(record.state),
    }
}

fn found_change<'a>(record: &Record, socket: &'a Socket) -> Change<'a> {
    Change {
        time_ns: record.read_ns.1,
        socket,
        kernel: None,
        shown: None,
        dwell: Dwell::None,
        evidence: Evidence::Snapshot,
        end: None,
        before: None,
        after: Some(Place::of(socket)),
    }
}

/// A socket that dumps no longer show. A request that is gone is no transition of a socket.
pub(super) fn gone_change(time_ns: u64, socket: &Socket, before: Place, end: End) -> Change<'_> {
    let connection = !matches!(
        before.state,
        TcpState::LISTEN | TcpState::NEW_SYN_RECV | TcpState::TIME_WAIT
    );
    Change {
        time_ns,
        socket,
        kernel: None,
        shown: (before.state != TcpState::NEW_SYN_RECV).then_some((before.state, TcpState::CLOSE)),
        dwell: Dwell::None,
        evidence: Evidence::Snapshot,
        end: connection.then_some(end),
        before: Some(before),
        after: None,
    }
}
