//! An immutable picture of what has been counted, which the exports read: made by the thread that owns the
//! table, shared by all concurrent readers.

use std::sync::Arc;
use std::time::Duration;

use tcpstate_common::TcpState;

use super::{End, LossReason, Named, Role, named};

/// The states that gauges and dwell times are kept for: all but CLOSE, which nobody can count.
/// A half-open request counts as SYN_RECV, as in `ss`.
pub const GAUGE_STATES: [TcpState; 10] = [
    TcpState::ESTABLISHED,
    TcpState::SYN_SENT,
    TcpState::SYN_RECV,
    TcpState::FIN_WAIT1,
    TcpState::FIN_WAIT2,
    TcpState::TIME_WAIT,
    TcpState::CLOSE_WAIT,
    TcpState::LAST_ACK,
    TcpState::LISTEN,
    TcpState::CLOSING,
];

/// By the kernel's number of a state; asked for each event, so a table and no search.
const GAUGE_INDEX: [Option<usize>; 16] = {
    let mut index = [None; 16];
    let mut at = 0;
    while at < GAUGE_STATES.len() {
        index[GAUGE_STATES[at].number() as usize] = Some(at);
        at += 1;
    }
    index[TcpState::NEW_SYN_RECV.number() as usize] = index[TcpState::SYN_RECV.number() as usize];
    index
};

/// Index into [`GAUGE_STATES`]; `None` for CLOSE and for states that this version does not know.
#[must_use]
pub fn gauge_index(state: TcpState) -> Option<usize> {
    GAUGE_INDEX.get(usize::from(state.number())).copied()?
}

/// Sockets by [`GAUGE_STATES`].
pub type StateCounts = [u64; GAUGE_STATES.len()];

/// Ages that sockets are counted by, with their labels.
pub const MIN_AGES: [(&str, Duration); 3] = [
    ("1m", Duration::from_secs(60)),
    ("10m", Duration::from_secs(600)),
    ("1h", Duration::from_secs(3600)),
];

/// How long sockets have been in their states, as far as is known: never less.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Aged {
    /// By [`MIN_AGES`]: those at least that old. What counts for one counts for the lesser ones.
    pub counts: [StateCounts; MIN_AGES.len()],
    /// By [`GAUGE_STATES`]: when the one that has been there for longest entered the state, nanoseconds.
    pub oldest_ns: [Option<u64>; GAUGE_STATES.len()],
}

impl Aged {
    pub fn add(&mut self, other: &Self) {
        let counts = self.counts.as_flattened_mut().iter_mut();
        for (count, more) in counts.zip(other.counts.as_flattened()) {
            *count += more;
        }
        for (oldest, other) in self.oldest_ns.iter_mut().zip(other.oldest_ns) {
            *oldest = match (*oldest, other) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (one, other) => one.or(other),
            };
        }
    }
}

/// Upper bounds of the dwell buckets, seconds; clear of the kernel's own timers.
pub const DWELL_BUCKETS: [f64; 13] = [
    0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 45.0, 90.0, 300.0, 1800.0, 7500.0, 86400.0,
];

#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Histogram {
    /// Samples in each of [`DWELL_BUCKETS`], not cumulated; those above the last bound are only in `count`.
    pub buckets: [u64; DWELL_BUCKETS.len()],
    pub count: u64,
    /// Wide: 100,000 sockets that stay two days each are more nanoseconds than 64 bits hold.
    pub sum_ns: u128,
}

/// Why connects failed: the part of [`End`] that they can have.
pub const FAILURE_REASONS: [End; 5] = [
    End::Refused,
    End::Timeout,
    End::Unreachable,
    End::Aborted,
    End::Unknown,
];

/// Why events did not reach the table: the part of [`LossReason`] that is the tracer's own and not a stream's.
pub const EVENT_LOSSES: [LossReason; 4] = [
    LossReason::RingFull,
    LossReason::Recursion,
    LossReason::Decode,
    LossReason::TableFull,
];

named! {
    /// What a kernel may lack, and tcpstate then does without.
    pub enum Feature ("kernel feature") {
        TpBtf = "tp_btf",
        SocketCookie = "socket_cookie",
        AcceptFexit = "accept_fexit",
        TimeWaitFentry = "time_wait_fentry",
        TaskFileIter = "task_file_iter",
        TcpIter = "tcp_iter",
    }
}

/// In words for users: `check` and docs/metrics.md say the same.
impl Feature {
    #[must_use]
    pub const fn gives(self) -> &'static str {
        match self {
            Self::TpBtf => "the socket itself is read at each transition",
            Self::SocketCookie => "events carry the kernel's own identity of a socket (5.12)",
            Self::AcceptFexit => "who accepts a connection is seen at once",
            Self::TimeWaitFentry => {
                "TIME_WAIT and the FIN_WAIT2 of an orphan are followed to their end, with their dwell (5.12)"
            }
            Self::TaskFileIter => "the kernel lists all holders of sockets (5.12)",
            Self::TcpIter => {
                "where events have no cookie, dumps tell each socket's address, and so which is which (5.9)"
            }
        }
    }

    #[must_use]
    pub const fn without(self) -> &'static str {
        match self {
            Self::TpBtf => {
                "the classic tracepoint is used, which is slower and tells neither network namespace nor uid nor why a \
                 connection ended"
            }
            Self::SocketCookie => {
                "sockets are told apart by their address and a generation, and show no cookie that nobody asked for"
            }
            Self::AcceptFexit => {
                "a connection belongs to its listener until a sweep finds its holder or a process closes it"
            }
            Self::TimeWaitFentry => {
                "the ends of TIME_WAIT and of an orphan's FIN_WAIT2 are seen late, by dumps, which date them by the kernel's \
                 timer, and no dwell of them is counted"
            }
            Self::TaskFileIter => "/proc/PID/fd of every process is read, which takes longer",
            Self::TcpIter => "sockets with the same ends can be taken for each other",
        }
    }
}

named! {
    /// Those that do one thing together, or in different kernels: the names of their functions begin with it.
    pub enum Program ("eBPF program") {
        /// At `sock:inet_sock_set_state`, whichever way it is attached.
        SetState = "set_state",
        Accept = "accept",
        TimeWait = "time_wait",
        Sweep = "sweep",
        /// The iterator over sockets, of full dumps.
        Sockets = "sockets",
    }
}

impl Program {
    #[must_use]
    pub fn of(function: &str) -> Option<Self> {
        let programs = Self::ALL.iter();
        programs
            .copied()
            .find(|program| function.starts_with(program.name()))
    }
}

/// One value of the label `comm`, as it is written: cleaned, or `<none>` or `<other>`.
#[derive(Clone, Debug, PartialEq)]
pub struct CommView {
    pub comm: Arc<str>,
    pub sockets: StateCounts,
    /// Up to a second old; times are Unix times.
    pub aged: Aged,
    /// By [`GAUGE_STATES`]; `None` for a state that this kernel can't time or that none of its sockets was in.
    pub dwell: [Option<Histogram>; GAUGE_STATES.len()],
    /// By [`Role::ALL`](Named::ALL), then those whose opening was not seen.
    pub connections: [u64; Role::ALL.len() + 1],
    /// By [`End::ALL`](Named::ALL).
    pub ends: [u64; End::ALL.len()],
    /// By [`FAILURE_REASONS`].
    pub failures: [u64; FAILURE_REASONS.len()],
}

/// What the table and the statistics know.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Counted {
    pub sockets: StateCounts,
    /// Sorted by name.
    pub comms: Vec<CommView>,
    /// Names that had to count as `<other>` for want of a place, since the start.
    pub comm_overflow: u64,
    /// With the names of `table::Discard`'s reasons.
    pub dwell_discarded: Vec<(&'static str, u64)>,
    /// With the names of `table::Correction`.
    pub corrections: Vec<(&'static str, u64)>,
    /// With the names of [`OwnerSource`](super::OwnerSource).
    pub owner_lookups: Vec<(&'static str, u64)>,
    pub table_entries: u64,
    /// There was no room in the table for some sockets: `sockets` and what is made of them are too low.
    pub incomplete: bool,
}

/// The kernel's own counters.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct KernelCounted {
    /// `(from, to, count)` in the kernel's order of states; a number that has no name is `None`.
    pub transitions: Vec<(Option<TcpState>, Option<TcpState>, u64)>,
    /// Per program that is loaded: runs, nanoseconds; empty while the kernel's BPF statistics are off.
    pub runs: Vec<(Program, u64, u64)>,
}

/// The daemon's own health.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Health {
    pub events_received: u64,
    /// By [`EVENT_LOSSES`].
    pub events_lost: [u64; EVENT_LOSSES.len()],
    /// Feature and whether it is in use.
    pub features: Vec<(Feature, bool)>,
    pub reconciles: u64,
    pub reconcile_failures: u64,
    pub last_reconcile_duration_ns: Option<u64>,
    /// Unix time, nanoseconds.
    pub last_reconcile_success_ns: Option<u64>,
    pub stream_clients: u64,
    /// Over all streams, those that have ended too.
    pub stream_lines_dropped: u64,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct View {
    pub health: Health,
    pub kernel: KernelCounted,
    /// `None` until the first snapshot is merged.
    pub counted: Option<Arc<Counted>>,
}

#[cfg(test)]
mod tests {
    use super::{GAUGE_STATES, TcpState, gauge_index};

    #[test]
    fn each_state_but_close_has_a_gauge() {
        for number in 0..=u8::MAX {
            let state = TcpState::from_kernel(number);
            let expected = match state {
                TcpState::NEW_SYN_RECV => Some(2),
                _ => GAUGE_STATES.iter().position(|&known| known == state),
            };
            assert_eq!(gauge_index(state), expected, "{state}");
        }
        assert_eq!(gauge_index(TcpState::SYN_RECV), Some(2));
        assert_eq!(gauge_index(TcpState::CLOSE), None);
    }
}
