//! An immutable picture of what has been counted, which the exports read: made by the thread that owns the
//! table, shared by all concurrent readers.

use std::sync::Arc;

use tcpstate_common::TcpState;

use super::{End, LossReason, Role};

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

/// Index into [`GAUGE_STATES`]; `None` for CLOSE and for states that this version does not know.
#[must_use]
pub fn gauge_index(state: TcpState) -> Option<usize> {
    let state = if state == TcpState::NEW_SYN_RECV {
        TcpState::SYN_RECV
    } else {
        state
    };
    GAUGE_STATES.iter().position(|&known| known == state)
}

/// Sockets by [`GAUGE_STATES`].
pub type StateCounts = [u64; GAUGE_STATES.len()];

/// Upper bounds of the dwell buckets, seconds; clear of the kernel's own timers.
pub const DWELL_BUCKETS: [f64; 13] = [
    0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 45.0, 90.0, 300.0, 1800.0, 7500.0, 86400.0,
];

#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Histogram {
    /// Samples in each of [`DWELL_BUCKETS`], not cumulated; those above the last bound are only in `count`.
    pub buckets: [u64; DWELL_BUCKETS.len()],
    pub count: u64,
    pub sum_ns: u64,
}

/// Why connects failed: the part of [`End`] that they can have.
pub const FAILURE_REASONS: [End; 5] = [
    End::Refused,
    End::Timeout,
    End::Unreachable,
    End::Aborted,
    End::Unknown,
];

/// One value of the label `comm`, as it is written: cleaned, or `<none>` or `<other>`.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct CommView {
    pub comm: String,
    pub sockets: StateCounts,
    /// By [`GAUGE_STATES`]; `None` for a state that this kernel can't time.
    pub dwell: [Option<Histogram>; GAUGE_STATES.len()],
    /// By [`Role::ALL`](super::Named::ALL), then those whose opening was not seen.
    pub connections: [u64; 3],
    /// By [`End::ALL`](super::Named::ALL).
    pub ends: [u64; 10],
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
    /// By `table::Discard`, with the names of its reasons.
    pub dwell_discarded: Vec<(&'static str, u64)>,
    /// By kind, with the names of its kinds.
    pub corrections: Vec<(&'static str, u64)>,
    pub table_entries: u64,
}

/// The kernel's own counters.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct KernelCounted {
    /// `(from, to, count)` in the kernel's order of states; a number that has no name is `None`.
    pub transitions: Vec<(Option<TcpState>, Option<TcpState>, u64)>,
    /// Per program: name, runs, nanoseconds; empty while the kernel's BPF statistics are off.
    pub runs: Vec<(&'static str, u64, u64)>,
}

/// The daemon's own health.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Health {
    pub events_received: u64,
    /// By [`LossReason::ALL`](super::Named::ALL); `slow_reader` counts per stream, so 0 here.
    pub events_lost: [u64; 4],
    /// Feature and whether it is in use.
    pub features: Vec<(&'static str, bool)>,
    pub reconciles: u64,
    pub reconcile_failures: u64,
    pub last_reconcile_duration_ns: Option<u64>,
    /// Unix time, nanoseconds.
    pub last_reconcile_success_ns: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct View {
    pub health: Health,
    pub kernel: KernelCounted,
    /// `None` until the first snapshot is merged.
    pub counted: Option<Arc<Counted>>,
}

const _: () = assert!(<Role as super::Named>::ALL.len() == 2);
const _: () = assert!(<End as super::Named>::ALL.len() == 10);
const _: () = assert!(<LossReason as super::Named>::ALL.len() == 4);
