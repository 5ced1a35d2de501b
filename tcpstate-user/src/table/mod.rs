//! The table of sockets: turns the kernel's events and dumps into what happened, and says how it knows.
//!
//! Pure: time comes in with the events, and nothing here knows where they came from. The doors are
//! [`Table::apply`], [`Table::accepted`] and [`Table::time_wait`] for events, [`Table::merge`] for a dump of sockets, and
//! [`Table::sweep`] for one of who holds them. What goes over all sockets does so in parts.

mod adopt;
mod alike;
mod apply;
mod closed;
mod fate;
mod full;
mod generations;
mod listeners;
mod merge;
mod minis;
mod owners;
mod reconcile;
mod rows;
mod snapshot;
mod socket;
mod store;
mod sweep;
#[cfg(test)]
mod tests;
mod timewait;

use std::num::NonZero;

use rustc_hash::{FxHashMap, FxHashSet};
use tcpstate_common::{SetState, TcpState};

use crate::model::{ConnectionId, Endpoint, Named, named};
pub use apply::Refused;
use closed::Closed;
use full::{Full, FullSockets};
use generations::Generations;
pub use merge::{Merge, Merged};
use minis::{Mini, Minis, is_request};
pub use owners::Owned;
use owners::Owners;
pub use reconcile::STORE_NS;
pub use rows::Walk;
pub use snapshot::{Held, Holder, Record, Snapshot, StateMask, Unreachable};
pub use socket::{Change, Discard, Dwell, Place, Socket};
pub use sweep::Sweep;

/// What tells two sockets apart, in events and in dumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The kernel's socket cookie (from 5.12).
    Cookie,
    /// The address of the socket, which the kernel uses again at once. A cookie is known where something had the kernel
    /// make one, and tells nothing apart.
    Address,
    /// The address in events. A dump tells none, so a socket of it is matched by its ends alone, which may be those of
    /// another, in another namespace too: nothing is learned from the match, which no event could put right.
    Ends,
}

impl Identity {
    /// What the table knows the record's full socket by; `None` where only its ends can tell.
    #[must_use]
    pub const fn key(self, record: &Record) -> Option<u64> {
        match self {
            Self::Cookie => record.cookie,
            Self::Address => record.address,
            Self::Ends => None,
        }
    }

    const fn tuple(self, netns: Option<u32>, local: Endpoint, remote: Endpoint) -> Tuple {
        match self {
            // The classic tracepoint does not tell it.
            Self::Ends => (None, local, remote),
            Self::Cookie | Self::Address => (netns, local, remote),
        }
    }

    fn ends(self, socket: &Socket) -> Tuple {
        self.tuple(socket.netns(), socket.local, socket.remote)
    }
}

named! {
    /// What was repaired in the table. Only what events can tell is a correction: minisocks are read from
    /// dumps in any case.
    pub enum Correction ("correction") {
        /// An event's old state was not the one that the table held.
        Event = "event",
        /// A dump showed another state.
        State = "state",
        /// A dump showed a socket that the table did not hold.
        Found = "found",
        /// Two dumps in a row did not show a socket that the table held, or one showed another at its address.
        Gone = "gone",
    }
}

/// The times of the stay in the present state. Packed: each socket has one.
#[derive(Clone, Copy, Debug)]
#[repr(C, packed(4))]
struct Stay {
    /// When the state was entered, or first seen.
    since_ns: u64,
    /// The entry was seen.
    seen: bool,
}

impl Stay {
    /// No event told of its beginning, and no dump before that which began at `started_ns`.
    const fn first_shown(&self, started_ns: u64) -> bool {
        !self.seen && self.since_ns >= started_ns
    }

    /// The state was not entered later than at `acked_ns`, where it is one that an ACK leads into. A state first seen after
    /// `started_ns`, when that was read, may be a later one.
    fn begun_by(&mut self, state: TcpState, acked_ns: u64, started_ns: u64) {
        let by_ack = matches!(
            state,
            TcpState::ESTABLISHED | TcpState::FIN_WAIT2 | TcpState::CLOSE_WAIT | TcpState::CLOSING
        );
        if by_ack && !self.seen && self.since_ns <= started_ns {
            self.since_ns = self.since_ns.min(acked_ns);
        }
    }

    /// What an end at `now_ns` makes of it, if events were lost up to `lost_until_ns`.
    fn dwell(self, now_ns: u64, lost_until_ns: u64) -> Dwell {
        if !self.seen {
            Dwell::Unknown(Discard::StartUnseen)
        } else if self.since_ns <= lost_until_ns {
            Dwell::Unknown(Discard::Lost)
        } else {
            // The clocks of two CPUs may differ by less than it takes to hand a socket over.
            Dwell::Seen(now_ns.saturating_sub(self.since_ns))
        }
    }
}

/// How many sockets a table holds, of all kinds: memory is bounded, whatever a host does.
pub const MOST_SOCKETS: usize = 1_000_000;

/// Network namespace, as far as events tell it, and both ends.
type Tuple = (Option<u32>, Endpoint, Endpoint);

#[derive(Debug)]
pub struct Table {
    identity: Identity,
    full: FullSockets,
    mini: Minis,
    /// First events of accepted sockets, by address, until the next event tells whose they are: up to 6.12
    /// they carry the listener's cookie and no remote end.
    children: FxHashMap<u64, SetState>,
    owners: Owners,
    /// As many sockets as it may hold.
    most: usize,
    /// What it had no room for; `None` where it lacks none.
    refused: Option<Lacking>,
    generations: Generations,
    /// Namespaces that a dump has covered: one that is not found any more is gone, and forgotten with its sockets.
    listed: FxHashSet<u32>,
    /// From when a dump begins until it is merged: what closed meanwhile.
    closed: Option<Closed>,
    /// How many were merged.
    dumps: u32,
    own_numbers: u64,
    newest_ns: u64,
    /// Stays that began no later than this may have lost events.
    lost_until_ns: u64,
    corrections: Corrections,
}

/// Sockets that there was no room for.
#[derive(Debug, Default)]
struct Lacking {
    /// When the last of them came.
    newest_ns: u64,
    /// Where they are, as far as that is known.
    netns: FxHashSet<u32>,
}

#[derive(Debug, Default)]
struct Corrections {
    /// Before the first dump is merged, that the table lacks a socket is no fault.
    begun: bool,
    counts: [u64; <Correction as Named>::ALL.len()],
}

impl Corrections {
    fn count(&mut self, correction: Correction) {
        if self.begun {
            self.counts[correction as usize] += 1;
        }
    }
}

impl Table {
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self::holding(identity, MOST_SOCKETS)
    }

    /// Of so many sockets at most.
    #[must_use]
    pub fn holding(identity: Identity, most: usize) -> Self {
        Self {
            most,
            refused: None,
            identity,
            full: FullSockets::new(identity),
            mini: Minis::new(identity),
            children: FxHashMap::default(),
            owners: Owners::default(),
            generations: Generations::default(),
            listed: FxHashSet::default(),
            closed: None,
            dumps: 0,
            own_numbers: 0,
            newest_ns: 0,
            lost_until_ns: 0,
            corrections: Corrections::default(),
        }
    }

    #[must_use]
    pub const fn identity(&self) -> Identity {
        self.identity
    }

    /// Events were lost before `time_ns`: the dwell of every stay that spans that time is unknown.
    pub fn events_lost(&mut self, time_ns: u64) {
        self.lost_until_ns = self.newest_ns.max(time_ns);
    }

    /// Full sockets, minisocks and accepted sockets that wait for their second event.
    #[must_use]
    pub fn len(&self) -> usize {
        self.full.len() + self.mini.len() + self.children.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// There was no room for some sockets, and no dump of all has been merged since that found room for all: what it says
    /// of those that it holds is right, but they are not all.
    #[must_use]
    pub const fn is_incomplete(&self) -> bool {
        self.refused.is_some()
    }

    /// It lacks some, and has room again for a part of what it may hold: a dump may complete it.
    #[must_use]
    pub fn wants_dump(&self) -> bool {
        self.is_incomplete() && self.len() < self.most - self.most / 16
    }

    /// Whether there is room for one more, of that namespace, which came at `time_ns`.
    fn has_room(&mut self, netns: Option<u32>, time_ns: u64) -> bool {
        let room = self.len() < self.most;
        if !room {
            let lacking = self.refused.get_or_insert_default();
            lacking.newest_ns = lacking.newest_ns.max(time_ns);
            lacking.netns.extend(netns);
        }
        room
    }

    /// The table lacked a socket. That is no fault where it may be one that there was no room for.
    fn correct_lack(&mut self, correction: Correction) {
        if !self.is_incomplete() {
            self.corrections.count(correction);
        }
    }

    /// Whether a dump has covered this network namespace.
    #[must_use]
    pub fn lists(&self, netns: u32) -> bool {
        self.listed.contains(&netns)
    }

    /// By [`Correction`], in the order of its values.
    #[must_use]
    pub fn corrections(&self) -> [u64; <Correction as Named>::ALL.len()] {
        self.corrections.counts
    }

    fn own_number(&mut self) -> u64 {
        self.own_numbers += 1;
        self.own_numbers
    }

    /// A key of our own: no cookie grows so large, and the kernel's addresses are larger.
    fn own_key(&mut self) -> u64 {
        1 << 62 | self.own_number()
    }

    /// The cookie of an event makes the name only where each event has one: a name never changes.
    fn new_id(&mut self, cookie: Option<NonZero<u64>>) -> ConnectionId {
        match cookie.map(NonZero::get) {
            Some(cookie) if self.identity == Identity::Cookie => ConnectionId::Cookie {
                cookie,
                generation: self.generations.of(cookie).max(self.after_timewait(cookie)),
            },
            _ => ConnectionId::Own(self.own_number()),
        }
    }

    /// The first generation that no timewait socket has, which a dump may have found with the cookie that is a living
    /// socket's again.
    fn after_timewait(&self, cookie: u64) -> u32 {
        let mini = self.mini.get(cookie).map(|mini| &mini.socket);
        let timewait = mini.filter(|socket| !is_request(socket.state));
        match timewait.map(|socket| socket.id) {
            Some(ConnectionId::Cookie { generation, .. }) => generation + 1,
            _ => 0,
        }
    }

    /// Gives its key.
    fn insert_mini(&mut self, mini: Mini) -> u64 {
        let key = match mini.socket.cookie {
            // A socket can be connected again while its timewait socket lives, and both have its cookie.
            Some(cookie) if !self.mini.contains(cookie.get()) => cookie.get(),
            _ => self.own_key(),
        };
        self.mini.insert(key, mini);
        key
    }

    /// The key of the entry for a minisocket in `state`. Ends that another cookie has too are those of another: addresses
    /// carry no zone.
    fn mini_of(&self, state: TcpState, ends: Tuple, cookie: Option<NonZero<u64>>) -> Option<u64> {
        let its = |mini: &Mini| {
            let known = mini.socket.cookie;
            known.is_none() || cookie.is_none() || known == cookie
        };
        let by_ends = self.mini.with_ends(is_request(state), ends, its);
        by_ends.or_else(|| {
            let key = cookie?.get();
            let mini = self.mini.get(key)?;
            (its(mini) && self.tuple(&mini.socket) == ends).then_some(key)
        })
    }

    fn tuple(&self, socket: &Socket) -> Tuple {
        self.identity.ends(socket)
    }
}
