//! What the table holds of a socket, and what it says when that changes.

use std::num::NonZero;
use std::sync::Arc;

use tcpstate_common::TcpState;

use super::Owned;
use crate::model::{
    Comm, ConnectionId, End, Endpoint, Evidence, Family, Owner, OwnerSource, Role, Transition,
    named,
};

/// One socket, or what the kernel keeps of it in TIME_WAIT, or a half-open request.
#[derive(Clone, Debug, PartialEq)]
pub struct Socket {
    pub id: ConnectionId,
    pub cookie: Option<NonZero<u64>>,
    /// Inode, which is never 0.
    pub netns: Option<NonZero<u32>>,
    pub family: Family,
    pub local: Endpoint,
    pub remote: Endpoint,
    pub state: TcpState,
    pub role: Option<Role>,
    pub owned: Option<Arc<Owned>>,
    pub uid: Option<u32>,
    /// How many processes held it when that was last looked at.
    pub holders: Option<NonZero<u32>>,
    /// It has been ESTABLISHED, as far as was seen.
    pub established: bool,
}

/// There are a million of them.
const _: () = assert!(size_of::<Socket>() == 96);

impl Socket {
    #[must_use]
    pub fn owner(&self) -> Option<Owner> {
        self.owned.as_ref().map(|owned| owned.owner)
    }

    #[must_use]
    pub fn container(&self) -> Option<&Arc<str>> {
        self.owned.as_ref()?.container.as_ref()
    }

    pub(super) fn netns(&self) -> Option<u32> {
        self.netns.map(NonZero::get)
    }

    /// Whether this, told of what has its address, can't be of it.
    pub(super) fn is_another(
        &self,
        cookie: Option<NonZero<u64>>,
        state: TcpState,
        local: Endpoint,
        remote: Endpoint,
    ) -> bool {
        fn differ<T: PartialEq>(one: Option<T>, other: Option<T>) -> bool {
            one.is_some() && other.is_some() && one != other
        }
        let listens = |state| state == TcpState::LISTEN;
        // A connect is told before it has its port.
        let bound = ![self.state, state].contains(&TcpState::SYN_SENT);
        differ(self.cookie, cookie)
            || listens(self.state) != listens(state)
            || (bound && differ(self.local.port, local.port))
            || differ(self.remote.port, remote.port)
            || differ(self.remote.addr, remote.addr)
    }
}

/// Where the gauges count a socket, and how it is known whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub state: TcpState,
    /// Name of the owner.
    pub comm: Option<Comm>,
    /// `None` where there is no owner.
    pub source: Option<OwnerSource>,
}

impl Place {
    pub(super) fn of(socket: &Socket) -> Self {
        let owner = socket.owned.as_ref().map(|owned| &owned.owner);
        Self {
            state: socket.state,
            comm: owner.and_then(|owner| owner.process.comm),
            source: owner.map(|owner| owner.source),
        }
    }
}

named! {
    /// Why a stay that ended gives no dwell.
    pub enum Discard ("reason without dwell") {
        /// The state was entered before the tracer could see it.
        StartUnseen = "start_unseen",
        /// Events were lost during the stay.
        Lost = "lost",
        /// The event's old state is not the one that the table held.
        Mismatch = "mismatch",
    }
}

/// The stay that a change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dwell {
    /// Start and end were both seen; nanoseconds.
    Seen(u64),
    Unknown(Discard),
    /// Nothing that could be timed ended: a no-op, a new socket, or a stay that only looks ended.
    None,
}

/// Something that happened to one socket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change<'a> {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub time_ns: u64,
    /// As it is after the change.
    pub socket: &'a Socket,
    /// What the kernel said; `None` where no event did.
    pub kernel: Option<(TcpState, TcpState)>,
    /// What happened; `None` where nothing did (a no-op, an orphan that lives on, a socket only found).
    pub shown: Option<(TcpState, TcpState)>,
    pub dwell: Dwell,
    pub evidence: Evidence,
    /// Set once a connection, on its first change into TIME_WAIT or CLOSE.
    pub end: Option<End>,
    /// Where the gauges counted the socket before; `None` if it is new to them.
    pub before: Option<Place>,
    /// Where they count it now; `None` if it is gone.
    pub after: Option<Place>,
}

impl Change<'_> {
    /// The line that a stream shows for it; `None` if it shows none.
    ///
    /// `raw`: the kernel's own transitions rather than what happened.
    /// `boot_to_unix_ns`: what to add to `CLOCK_BOOTTIME` for Unix time.
    #[must_use]
    pub fn line(&self, raw: bool, boot_to_unix_ns: i64) -> Option<Transition> {
        let (from, to) = if raw { self.kernel } else { self.shown }?;
        let socket = self.socket;
        Some(Transition {
            time_ns: self.time_ns.saturating_add_signed(boot_to_unix_ns),
            id: socket.id,
            cookie: socket.cookie.map(NonZero::get),
            netns: socket.netns(),
            family: socket.family,
            local: socket.local,
            remote: socket.remote,
            from,
            to,
            dwell_ns: match self.dwell {
                Dwell::Seen(ns) => Some(ns),
                Dwell::Unknown(_) | Dwell::None => None,
            },
            evidence: if raw {
                Evidence::Tracepoint
            } else {
                self.evidence
            },
            role: socket.role,
            owner: socket.owner(),
            uid: socket.uid,
            container: socket.container().cloned(),
            end: self.end,
        })
    }
}
