//! A dump of the sockets that exist, as the table takes it in.
//!
//! How a dump is made is `kernel`'s; merging it with events is `table`'s reconciliation.

use std::fmt;
use std::num::NonZero;
use std::sync::Arc;

use tcpstate_common::TcpState;

use super::Identity;
use crate::model::{Endpoint, Family, Process};

/// A set of states.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct StateMask(u32);

impl StateMask {
    /// Every state that has a name.
    pub const ALL: Self = Self::of(&TcpState::ALL);

    /// # Panics
    /// If a number is above 31: the kernel's masks end there.
    #[must_use]
    pub const fn of(states: &[TcpState]) -> Self {
        let mut bits = 0;
        let mut index = 0;
        while index < states.len() {
            assert!(states[index].number() < u32::BITS as u8);
            bits |= 1 << states[index].number();
            index += 1;
        }
        Self(bits)
    }

    #[must_use]
    pub const fn contains(self, state: TcpState) -> bool {
        (state.number() as u32) < u32::BITS && self.0 & (1 << state.number()) != 0
    }

    /// Bit n stands for the state that the kernel numbers n.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for StateMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(TcpState::ALL.iter().filter(|state| self.contains(**state)))
            .finish()
    }
}

/// One socket as a dump found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Never 0. `None` where the kernel has made none, and the dump had it make none.
    pub cookie: Option<u64>,
    /// The address of the socket in the kernel; not every dump tells it.
    pub address: Option<u64>,
    /// Inode of the network namespace.
    pub netns: u32,
    /// `Ipv4` for an IPv4 peer of a dual-stack socket too.
    pub family: Family,
    pub local: Endpoint,
    /// Without parts for LISTEN.
    pub remote: Endpoint,
    /// `NEW_SYN_RECV` for a half-open request; SYN_RECV is a full socket.
    pub state: TcpState,
    /// The socket's own uid; `None` for timewait sockets and requests, for which the kernel does not give it.
    pub uid: Option<u32>,
    /// Inode of the socket's file; 0 where it has none: not accepted yet, orphaned, timewait, request.
    pub inode: u32,
    /// As in [`Listed`](crate::model::Listed): received and not read, sent and not acknowledged. Nothing of a timewait
    /// socket or a request.
    pub recv_queue: u32,
    pub send_queue: u32,
    /// What was left of a timewait socket's life, or until a request's next retransmission: nanoseconds, in
    /// the kernel's steps of a jiffy. `None` for full sockets: FIN_WAIT2 with a time is an orphan that lives
    /// on as a timewait socket.
    pub expires_ns: Option<u64>,
    /// `CLOCK_BOOTTIME` nanoseconds: not before and not after these did the kernel read the socket.
    pub read_ns: (u64, u64),
}

impl Record {
    /// A timewait socket or a request: their records have a timer of their own kind.
    #[must_use]
    pub fn is_mini(&self) -> bool {
        self.expires_ns.is_some() || self.state == TcpState::NEW_SYN_RECV
    }
}

/// A process with the TCP sockets that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub process: Process,
    pub container: Option<Arc<str>>,
    pub sockets: Vec<Held>,
}

/// A socket that a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// By what the table knows it, as [`Identity::key`](super::Identity::key) gives it.
    pub socket: u64,
    /// For at least so long it had received no ACK when the sweep read it, nanoseconds.
    pub quiet_ns: Option<NonZero<u64>>,
}

/// A namespace whose sockets the dump lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// Inode; `None` where not even that could be read.
    pub netns: Option<u32>,
    pub reason: String,
}

/// All sockets that have one of `states` in the namespaces `netns`.
///
/// Not atomic: a socket that changed meanwhile may be missing or come twice.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Snapshot {
    pub records: Vec<Record>,
    /// Inodes of the namespaces that it covers.
    pub netns: Vec<u32>,
    pub unreachable: Vec<Unreachable>,
    /// Every namespace of the host that can be found is among `netns` or `unreachable`.
    pub whole_host: bool,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub started_ns: u64,
    pub finished_ns: u64,
    pub states: StateMask,
}

impl Snapshot {
    /// How many full sockets the table could not know again by their records.
    #[must_use]
    pub fn unknowable(&self, identity: Identity) -> usize {
        let lacks = |record: &&Record| {
            identity != Identity::Ends && !record.is_mini() && identity.key(record).is_none()
        };
        self.records.iter().filter(lacks).count()
    }
}

#[cfg(test)]
mod tests {
    use super::StateMask;
    use tcpstate_common::TcpState;

    #[test]
    fn a_mask_has_the_states_it_was_made_of() {
        let mask = StateMask::of(&[TcpState::TIME_WAIT, TcpState::FIN_WAIT2]);
        assert_eq!(mask.bits(), 1 << 6 | 1 << 5);
        assert!(mask.contains(TcpState::TIME_WAIT));
        assert!(!mask.contains(TcpState::LISTEN));
        assert!(!StateMask::ALL.contains(TcpState::from_kernel(200)));
        assert_eq!(format!("{mask:?}"), "{FIN_WAIT2, TIME_WAIT}");
    }
}
