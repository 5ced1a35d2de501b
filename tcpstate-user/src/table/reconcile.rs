//! The door for dumps: merges one with the events that came meanwhile.
//!
//! A dump is not atomic. So an event that is newer than a record wins over it, an older one yields, and a
//! socket that a dump lacks is taken for gone only if the next dump lacks it too.

use rustc_hash::{FxHashMap, FxHashSet};
use tcpstate_common::TcpState;

use super::apply::TIME_WAIT_NS;
use super::{
    Change, Correction, DumpKey, Dwell, Full, Identity, Mini, Place, Record, Snapshot, Socket,
    Stay, Table,
};
use crate::model::{ConnectionId, End, Evidence, Role};

/// The event comes before the kernel stores the new state; an interrupt or a stolen CPU may lie between. A
/// record read this soon after an event may still show the state before it: a first dump waits this long
/// after the programs were attached.
pub const STORE_NS: u64 = 20_000_000;

impl Table {
    /// To be called before a dump begins: from now on the table remembers what closes.
    pub fn snapshot_begins(&mut self) {
        self.closed = Some(FxHashMap::default());
        self.ended = Some(FxHashMap::default());
    }

    /// The dump that had begun failed.
    pub fn snapshot_failed(&mut self) {
        self.closed = None;
        self.ended = None;
    }

    /// Merges a dump. All events up to its end must have been applied.
    ///
    /// Tells whether it lacked a full socket for the first time: the next dump decides.
    pub fn reconcile(&mut self, snapshot: &Snapshot, mut sink: impl FnMut(&Change<'_>)) -> bool {
        let mut index = self.index();
        let closed = self.closed.take().unwrap_or_default();
        let ended = self.ended.take().unwrap_or_default();
        let mut seen_full = FxHashSet::default();
        let mut seen_mini = FxHashSet::default();
        for record in &snapshot.records {
            let dump_key = self.record_key(record);
            if is_mini(record) {
                let newer = |ns: u64| ns.saturating_add(STORE_NS) >= record.read_ns.0;
                let full = index.full.get(&dump_key).copied();
                if record.state == TcpState::NEW_SYN_RECV {
                    // Its child has come since.
                    if full.is_some() || closed.get(&dump_key).is_some_and(|&ns| newer(ns)) {
                        continue;
                    }
                } else if let Some(key) = full
                    && self.full.get(&key).is_some_and(|full| {
                        let ends = (full.socket.local, full.socket.remote);
                        !newer(full.event_ns) && ends == (record.local, record.remote)
                    })
                {
                    // Its →CLOSE was lost: what the table holds as full is this minisocket.
                    index.full.remove(&dump_key);
                    if let Some(key) = self.demote(key) {
                        index.mini.insert(dump_key, key);
                    }
                }
                let known = index.mini.get(&dump_key).copied();
                if known.is_none() && ended.get(&record.cookie).is_some_and(|&ns| newer(ns)) {
                    continue;
                }
                let key = self.merge_mini(record, known, &mut sink);
                // A socket can come twice in one dump.
                index.mini.insert(dump_key, key);
                seen_mini.insert(key);
            } else {
                let closed_ns = closed.get(&dump_key).copied();
                let known = index.full.get(&dump_key).copied();
                if let Some(key) = self.merge_full(record, known, closed_ns, &mut sink) {
                    index.full.insert(dump_key, key);
                    seen_full.insert(key);
                }
            }
        }
        let doubtful = self.drop_full(snapshot, &seen_full, &mut sink);
        self.drop_mini(snapshot, &seen_mini, &mut sink);
        self.listed.extend(&snapshot.netns);
        self.corrections.begun = true;
        doubtful
    }

    fn record_key(&self, record: &Record) -> DumpKey {
        match self.identity {
            Identity::Cookie => DumpKey::Cookie(record.cookie),
            Identity::Address => DumpKey::Tuple((Some(record.netns), record.local, record.remote)),
            Identity::AddressWithoutNetns => DumpKey::Tuple((None, record.local, record.remote)),
        }
    }

    /// The keys of all sockets as dumps name them.
    fn index(&self) -> Index {
        let full = self
            .full
            .iter()
            .filter_map(|(&key, full)| self.dump_key(&full.socket).map(|name| (name, key)));
        let mini = self
            .mini
            .iter()
            .filter_map(|(&key, mini)| self.dump_key(&mini.socket).map(|name| (name, key)));
        Index {
            full: full.collect(),
            mini: mini.collect(),
        }
    }

    /// Gives the key of the table's entry for a full socket, if there is one now.
    fn merge_full(
        &mut self,
        record: &Record,
        known: Option<u64>,
        closed_ns: Option<u64>,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Option<u64> {
        let newer = |event_ns: u64| event_ns.saturating_add(STORE_NS) >= record.read_ns.0;
        let Some(key) = known else {
            if closed_ns.is_some_and(newer) {
                return None;
            }
            self.corrections.count(Correction::Found);
            return Some(self.found(record, sink));
        };
        let full = self.full.get_mut(&key)?;
        full.missed = false;
        if newer(full.event_ns) {
            return Some(key);
        }
        let before = Place::of(&full.socket);
        if self.identity != Identity::AddressWithoutNetns {
            learn(&mut full.socket, record);
        }
        if record.state == before.state {
            return Some(key);
        }
        self.corrections.count(Correction::State);
        if before.state == TcpState::LISTEN {
            self.listeners.remove(key, &full.socket);
        }
        full.socket.state = record.state;
        full.socket.established |= was_established(record.state);
        full.stay = Stay {
            since_ns: record.read_ns.1,
            seen: false,
        };
        if record.state == TcpState::LISTEN {
            self.listeners.insert(key, &full.socket);
        }
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
        Some(key)
    }

    /// Takes in a full socket that no event has shown.
    fn found(&mut self, record: &Record, sink: &mut impl FnMut(&Change<'_>)) -> u64 {
        let id = self.new_id((self.identity == Identity::Cookie).then_some(record.cookie));
        let socket = found_socket(record, id);
        let key = match self.identity {
            Identity::Cookie => record.cookie,
            Identity::Address | Identity::AddressWithoutNetns => {
                let key = self.own_key();
                self.adopted.insert(self.tuple(&socket), key);
                key
            }
        };
        sink(&found_change(record, &socket));
        if record.state == TcpState::LISTEN {
            self.listeners.insert(key, &socket);
        }
        let stay = Stay {
            since_ns: record.read_ns.1,
            seen: false,
        };
        self.full.insert(key, Full::new(socket, stay, 0));
        key
    }

    /// Turns a full socket whose end was lost into a minisocket in the same state, and gives its key; what the dump
    /// shows moves it on.
    fn demote(&mut self, key: u64) -> Option<u64> {
        let Full { socket, stay, .. } = self.full.remove(&key)?;
        self.corrections.count(Correction::State);
        if socket.state == TcpState::LISTEN {
            self.listeners.remove(key, &socket);
        }
        self.generations.closed(socket.id);
        let key = match socket.cookie {
            Some(cookie) if !self.mini.contains_key(&cookie) => cookie,
            _ => self.own_key(),
        };
        self.insert_mini(
            key,
            Mini {
                socket,
                stay,
                expires_ns: None,
                missed: false,
                event_ns: 0,
            },
        );
        Some(key)
    }

    /// Gives the key of the table's entry for a minisocket: there is one now.
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
            let before = Place::of(&mini.socket);
            if before.state == record.state {
                return key;
            }
            // An orphan got its peer's FIN; or an event's hint was wrong, and the dump is right.
            mini.socket.state = record.state;
            let entered_ns = entered_time_wait(record, expires_ns).unwrap_or(record.read_ns.1);
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
            return key;
        }
        let free = self.identity == Identity::Cookie && !self.full.contains_key(&record.cookie);
        let id = self.new_id(free.then_some(record.cookie));
        let socket = found_socket(record, id);
        let key = match self.identity {
            Identity::Cookie => record.cookie,
            Identity::Address | Identity::AddressWithoutNetns => {
                let key = self.own_key();
                if record.state == TcpState::NEW_SYN_RECV {
                    self.adopted.insert(self.tuple(&socket), key);
                }
                key
            }
        };
        sink(&found_change(record, &socket));
        let mini = Mini {
            socket,
            stay: Stay {
                since_ns: entered_time_wait(record, expires_ns).unwrap_or(record.read_ns.1),
                seen: false,
            },
            expires_ns,
            missed: false,
            event_ns: 0,
        };
        self.insert_mini(key, mini);
        key
    }

    /// Full sockets that the dump should have shown; tells whether there was one that no dump had lacked before.
    fn drop_full(
        &mut self,
        snapshot: &Snapshot,
        seen: &FxHashSet<u64>,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> bool {
        let mut gone = Vec::new();
        let mut doubtful = false;
        for (&key, full) in &mut self.full {
            // A namespace that no dump has listed may live where none can find it, and its events come.
            let known = |netns| self.listed.contains(&netns);
            let due = covers(snapshot, &full.socket, known)
                && full.event_ns.saturating_add(STORE_NS) < snapshot.started_ns;
            if due && !seen.contains(&key) {
                if std::mem::replace(&mut full.missed, true) {
                    gone.push(key);
                } else {
                    doubtful = true;
                }
            }
        }
        for key in gone {
            let Some(Full { mut socket, .. }) = self.full.remove(&key) else {
                continue;
            };
            // With its namespace a socket goes without an event.
            if socket
                .netns
                .is_none_or(|netns| snapshot.netns.contains(&netns))
            {
                self.corrections.count(Correction::Gone);
            }
            if socket.state == TcpState::LISTEN {
                self.listeners.remove(key, &socket);
            }
            self.adopted.remove(&self.tuple(&socket));
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
            self.adopted.remove(&self.tuple(&socket));
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

struct Index {
    full: FxHashMap<DumpKey, u64>,
    mini: FxHashMap<DumpKey, u64>,
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
