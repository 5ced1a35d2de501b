//! What a record of a dump means, after the events that came meanwhile.
//!
//! A dump is not atomic. So an event that is newer than a record wins over it, an older one yields, and a
//! socket that a dump lacks is taken for gone only if the next dump lacks it too (`merge`).

use std::num::NonZero;

use tcpstate_common::TcpState;

use super::alike::{Alikes, Joined, unbound};
use super::apply::{TIME_WAIT_NS, ends};
use super::closed::Closed;
use super::full::Dumped;
use super::{
    Change, Correction, Dwell, Full, Identity, Mini, Place, Record, Socket, Stay, Table, Tuple,
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

    /// `dump`: its number.
    pub(super) fn record(
        &mut self,
        record: &Record,
        dump: u32,
        alikes: &mut Alikes,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        if record.is_mini() {
            self.mini_record(record, dump, sink);
        } else if self.identity == Identity::Ends {
            self.alike_record(record, dump, alikes, sink);
        } else if let Some(key) = self.identity.key(record) {
            self.full_record(key, record, dump, sink);
        }
    }

    fn record_ends(&self, record: &Record) -> Tuple {
        self.identity
            .tuple(Some(record.netns), record.local, record.remote)
    }

    /// A full socket that its key tells.
    fn full_record(
        &mut self,
        key: u64,
        record: &Record,
        dump: u32,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        // Who it is, its second event tells.
        let is_child = match record.address {
            Some(sk) => self.children.contains_key(&sk),
            // Only one of Fast Open stays long without its second event, and is in SYN_RECV.
            None => record.state == TcpState::SYN_RECV && self.is_new_child(record),
        };
        if is_child {
            return;
        }
        if let Some(full) = self.full.get(key) {
            if full.begun_ns > record.read_ns.1 {
                // An earlier life of that address, or of that socket, which is over.
                return;
            }
            let another = self.identity == Identity::Address
                && full.socket.is_another(
                    cookie(record),
                    record.state,
                    record.local,
                    record.remote,
                );
            if !another {
                self.merge_full(key, record, dump, true, sink);
                return;
            }
            if newer(full.event_ns, record) {
                return;
            }
            // A later life, and what lies between was lost.
            if let Some(Full { socket, .. }) = self.full.remove(key) {
                self.full_is_gone(socket, true, record.read_ns.1, sink);
            }
        } else if let Some(closed) = &self.closed
            && closed.has_full(key, record)
        {
            return;
        }
        let (accepted_ns, known) = self.owners.accepted_early(key, 0).unzip();
        let mut socket = found_socket(record, self.new_id(cookie(record)));
        socket.owned = known;
        self.found(key, socket, record, dump, Some(Dumped::of(record)), sink);
        if let (Some(accepted_ns), Some(full)) = (accepted_ns, self.full.get_mut(key)) {
            full.accepted_ns = accepted_ns;
        }
    }

    /// Whether it may be one of `children`, by what their first events tell of the ends.
    fn is_new_child(&self, record: &Record) -> bool {
        !self.full.contains(record.cookie.unwrap_or_default())
            && self.children.values().any(|first| {
                let (_, local, remote) = ends(first);
                local.port == record.local.port
                    && remote
                        .addr
                        .is_none_or(|addr| record.remote.addr == Some(addr))
            })
    }

    /// One that only its ends tell: of those that are alike, which is which is not known, and nothing is learned.
    fn alike_record(
        &mut self,
        record: &Record,
        dump: u32,
        alikes: &mut Alikes,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        if let Some(key) = alikes.same(record) {
            self.merge_full(key, record, dump, false, sink);
            return;
        }
        let mut ends = self.record_ends(record);
        let mut joined = alikes.join(&self.full, ends, record);
        self.doubt(&joined);
        if joined.key.is_none() {
            if let Some(closed) = &mut self.closed
                && closed.has_full_by_ends(ends, record)
            {
                return;
            }
            if let Some(unbound) = unbound(ends, record) {
                ends = unbound;
                joined = alikes.join(&self.full, ends, record);
                self.doubt(&joined);
            }
        }
        let key = joined.key.unwrap_or_else(|| self.own_key());
        alikes.stands(record, ends, key);
        if joined.key.is_some() {
            self.merge_full(key, record, dump, joined.certain, sink);
        } else {
            let mut socket = found_socket(record, self.new_id(None));
            socket.cookie = None;
            let dumped = joined.certain.then(|| Dumped::of(record));
            self.found(key, socket, record, dump, dumped, sink);
        }
    }

    fn doubt(&mut self, joined: &Joined) {
        if let Some(first) = joined.doubted {
            self.full.change(first, |full| full.dumped = None);
        }
    }

    /// `certain`: the record is that socket's.
    fn merge_full(
        &mut self,
        key: u64,
        record: &Record,
        dump: u32,
        certain: bool,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        let learns = certain && self.identity != Identity::Ends;
        let before = self.full.change(key, |full| {
            full.missed = false;
            full.seen = dump;
            let dumped = certain.then(|| Dumped::of(record));
            if record.state == full.socket.state {
                full.dumped = dumped;
            }
            if newer(full.event_ns, record) {
                return None;
            }
            let before = Place::of(&full.socket);
            if learns {
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
        key: u64,
        socket: Socket,
        record: &Record,
        dump: u32,
        dumped: Option<Dumped>,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        if !self.has_room(Some(record.netns), record.read_ns.1) {
            return;
        }
        self.correct_lack(Correction::Found);
        sink(&found_change(record, &socket));
        let stay = Stay {
            since_ns: record.read_ns.1,
            seen: false,
        };
        let full = Full {
            seen: dump,
            dumped,
            ..Full::new(socket, stay, 0)
        };
        self.full.insert(key, full);
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
            seen: 0,
            missed: false,
            event_ns: 0,
        }))
    }

    /// Ends are unique among timewait sockets, and among requests, and tell them where no cookie does.
    fn mini_record(&mut self, record: &Record, dump: u32, sink: &mut impl FnMut(&Change<'_>)) {
        let ends = self.record_ends(record);
        if let Some(closed) = &self.closed
            && closed.has_mini(ends, record)
        {
            return;
        }
        let full = match self.identity {
            Identity::Cookie => record.cookie.filter(|&its| self.full.contains(its)),
            Identity::Address | Identity::Ends => {
                self.full.with_ends(ends).next().map(|(key, _)| key)
            }
        };
        let mut known = self.mini_of(record.state, ends, cookie(record));
        if let Some(key) = full {
            let request = record.state == TcpState::NEW_SYN_RECV;
            let is_it = self.full.get(key).is_some_and(|full| {
                let ends = (full.socket.local, full.socket.remote);
                !newer(full.event_ns, record) && ends == (record.local, record.remote)
            });
            if request {
                // Its child has come since.
                return;
            }
            if is_it {
                // Its →CLOSE was lost: what the table holds as full is this minisocket.
                known = self.demote(key);
            }
        }
        let key = self.merge_mini(record, known, sink);
        if let Some(mini) = key.and_then(|key| self.mini.get_mut(key)) {
            mini.seen = dump;
        }
    }

    /// Gives the key of the table's entry; none where there is no room for one.
    fn merge_mini(
        &mut self,
        record: &Record,
        known: Option<u64>,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Option<u64> {
        let expires_ns = record
            .expires_ns
            .map(|left| record.read_ns.1.saturating_add(left));
        if let Some((key, mini)) = known.and_then(|key| Some((key, self.mini.get_mut(key)?))) {
            mini.missed = false;
            mini.expires_ns = expires_ns;
            if self.identity == Identity::Address {
                mini.socket.cookie = cookie(record).or(mini.socket.cookie);
            }
            if mini.socket.state == record.state {
                return Some(key);
            }
            if let Some(mini) = self.mini.remove(key) {
                return Some(self.move_mini(mini, record, sink));
            }
        }
        if !self.has_room(Some(record.netns), record.read_ns.1) {
            return None;
        }
        let free = cookie(record).filter(|its| !self.full.contains(its.get()));
        let id = self.new_id(free);
        let socket = found_socket(record, id);
        sink(&found_change(record, &socket));
        Some(self.insert_mini(Mini {
            socket,
            stay: Stay {
                since_ns: entered_time_wait(record, expires_ns).unwrap_or(record.read_ns.1),
                seen: false,
            },
            expires_ns,
            seen: 0,
            missed: false,
            event_ns: 0,
        }))
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
}

/// Whether an event, or the store of its state, may have come after the record was read.
pub(super) const fn newer(event_ns: u64, record: &Record) -> bool {
    event_ns.saturating_add(STORE_NS) >= record.read_ns.0
}

const fn cookie(record: &Record) -> Option<NonZero<u64>> {
    match record.cookie {
        Some(cookie) => NonZero::new(cookie),
        None => None,
    }
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
    socket.cookie = cookie(record).or(socket.cookie);
    socket.netns = socket.netns.or(NonZero::new(record.netns));
    socket.uid = record.uid.or(socket.uid);
}

fn found_socket(record: &Record, id: ConnectionId) -> Socket {
    Socket {
        id,
        cookie: cookie(record),
        netns: NonZero::new(record.netns),
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
        owned: None,
        uid: record.uid,
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
