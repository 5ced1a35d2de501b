//! The table of sockets: turns the kernel's events and dumps into what happened, and says how it knows.
//!
//! Pure: time comes in with the events, and nothing here knows where they came from. The doors are
//! [`Table::apply`], [`Table::accepted`] and [`Table::time_wait`] for events, [`Table::reconcile`] for a dump of the sockets, and
//! [`Table::swept`] for one of who holds them.

mod apply;
mod fate;
mod listeners;
mod owners;
mod reconcile;
mod snapshot;
mod socket;
#[cfg(test)]
mod tests;
mod timewait;

use std::collections::VecDeque;

use rustc_hash::{FxHashMap, FxHashSet};
use tcpstate_common::{SetState, TcpState};

use crate::model::{ConnectionId, Endpoint, Named, named};
use listeners::Listeners;
use owners::Owners;
pub use reconcile::STORE_NS;
pub use snapshot::{Holder, Record, Snapshot, StateMask, Unreachable};
pub use socket::{Change, Discard, Dwell, Place, Socket};

/// What tells two sockets apart in events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The kernel's socket cookie (from 5.12).
    Cookie,
    /// The address of the socket, which the kernel uses again at once.
    Address,
    /// As [`Address`](Self::Address), and events don't tell the network namespace (classic tracepoint). A socket of a
    /// dump is matched by its ends alone then, which may be those of another in another namespace.
    AddressWithoutNetns,
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
        /// Two dumps in a row did not show a socket that the table held.
        Gone = "gone",
    }
}

/// The times of the stay in the present state.
#[derive(Clone, Copy, Debug)]
struct Stay {
    /// When the state was entered, or first seen.
    since_ns: u64,
    /// The entry was seen.
    seen: bool,
}

impl Stay {
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

/// A socket that events follow.
#[derive(Debug)]
struct Full {
    socket: Socket,
    stay: Stay,
    /// Time of its newest event; 0 for one that only a dump has shown.
    event_ns: u64,
    /// The last dump that covers it lacked it.
    missed: bool,
    /// The state in which a timewait socket is about to take its place.
    timewait: Option<TcpState>,
}

impl Full {
    fn new(socket: Socket, stay: Stay, event_ns: u64) -> Self {
        Self {
            socket,
            stay,
            event_ns,
            missed: false,
            timewait: None,
        }
    }
}

/// What no event follows: a timewait socket (TIME_WAIT, or an orphan's FIN_WAIT2) or a half-open request.
/// The kernel calls them minisocks.
#[derive(Debug)]
struct Mini {
    socket: Socket,
    stay: Stay,
    /// When its timer ends its life; `None` until that is known.
    expires_ns: Option<u64>,
    missed: bool,
    /// Time of the →CLOSE that told of it; 0 for one that only a dump has shown.
    event_ns: u64,
}

/// A socket as a dump can be matched with it, where events don't carry the cookie.
type Tuple = (Option<u32>, Endpoint, Endpoint);

/// Generations of sockets that were closed and may be connected again, the oldest forgotten first.
#[derive(Debug, Default)]
struct Generations {
    next: FxHashMap<u64, u32>,
    oldest: VecDeque<u64>,
}

impl Generations {
    /// A socket whose descriptor stays open after a reset or a refusal leaves an entry here that nothing
    /// takes back, for its end shows in no event: hence a bound (about 2 MB).
    const MOST: usize = 65_536;

    fn closed(&mut self, id: ConnectionId) {
        let ConnectionId::Cookie { cookie, generation } = id else {
            return;
        };
        if self.next.insert(cookie, generation + 1).is_none() {
            self.oldest.push_back(cookie);
            if self.oldest.len() > Self::MOST
                && let Some(forgotten) = self.oldest.pop_front()
            {
                self.next.remove(&forgotten);
            }
        }
    }

    fn of(&self, cookie: u64) -> u32 {
        self.next.get(&cookie).copied().unwrap_or(0)
    }
}

#[derive(Debug)]
pub struct Table {
    identity: Identity,
    /// By cookie; by address where events have no cookie, and there by a key of our own until an event tells
    /// the address of a socket that a dump found.
    full: FxHashMap<u64, Full>,
    /// By cookie, or by a key of our own where events have no cookie: the address is another socket's by then.
    mini: FxHashMap<u64, Mini>,
    /// Of `mini`: timewait sockets by their ends.
    timewait: FxHashMap<Tuple, u64>,
    listeners: Listeners,
    /// First events of accepted sockets, by address, until the next event tells whose they are: up to 6.12
    /// they carry the listener's cookie and no remote end.
    children: FxHashMap<u64, SetState>,
    owners: Owners,
    generations: Generations,
    /// Where events have no cookie: sockets that a dump found and no event has shown.
    adopted: FxHashMap<Tuple, u64>,
    /// Namespaces that a dump has covered: one that is not found any more is gone.
    listed: FxHashSet<u32>,
    /// While a dump is under way: what closed since it began.
    closed: Option<FxHashMap<DumpKey, u64>>,
    /// The same of timewait sockets that ended, by cookie.
    ended: Option<FxHashMap<u64, u64>>,
    own_numbers: u64,
    newest_ns: u64,
    /// Stays that began no later than this may have lost events.
    lost_until_ns: u64,
    corrections: Corrections,
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

/// What tells sockets apart in a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum DumpKey {
    Cookie(u64),
    Tuple(Tuple),
}

impl Table {
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            full: FxHashMap::default(),
            mini: FxHashMap::default(),
            timewait: FxHashMap::default(),
            listeners: Listeners::default(),
            children: FxHashMap::default(),
            owners: Owners::default(),
            generations: Generations::default(),
            adopted: FxHashMap::default(),
            listed: FxHashSet::default(),
            closed: None,
            ended: None,
            own_numbers: 0,
            newest_ns: 0,
            lost_until_ns: 0,
            corrections: Corrections::default(),
        }
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

    fn new_id(&mut self, cookie: Option<u64>) -> ConnectionId {
        match cookie {
            Some(cookie) => ConnectionId::Cookie {
                cookie,
                generation: self.generations.of(cookie),
            },
            None => ConnectionId::Own(self.own_number()),
        }
    }

    fn insert_mini(&mut self, key: u64, mini: Mini) {
        if mini.socket.state != TcpState::NEW_SYN_RECV {
            self.timewait.insert(self.tuple(&mini.socket), key);
        }
        self.mini.insert(key, mini);
    }

    fn remove_mini(&mut self, key: u64) -> Option<Mini> {
        let mini = self.mini.remove(&key)?;
        let tuple = self.tuple(&mini.socket);
        if self.timewait.get(&tuple) == Some(&key) {
            self.timewait.remove(&tuple);
        }
        Some(mini)
    }

    fn dump_key(&self, socket: &Socket) -> Option<DumpKey> {
        match self.identity {
            Identity::Cookie => socket.cookie.map(DumpKey::Cookie),
            Identity::Address | Identity::AddressWithoutNetns => {
                Some(DumpKey::Tuple(self.tuple(socket)))
            }
        }
    }

    fn tuple(&self, socket: &Socket) -> Tuple {
        let netns = match self.identity {
            Identity::AddressWithoutNetns => None,
            Identity::Cookie | Identity::Address => socket.netns,
        };
        (netns, socket.local, socket.remote)
    }
}
