//! One transition with all that a line of output says of it, and the other lines of a stream.
//!
//! How lines are written and read is `export`'s.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use tcpstate_common::TcpState;

use super::name::named;
use super::{Comm, End, Listed};

named! {
    /// Where a transition comes from.
    pub enum Evidence ("evidence") {
        /// The kernel's tracepoint said so.
        Tracepoint = "tracepoint",
        /// A program on one of the kernel's functions saw it.
        Fentry = "fentry",
        /// Told from the socket's fields at its →CLOSE; a snapshot settles it.
        Inferred = "inferred",
        /// A dump of the kernel's sockets showed it.
        Snapshot = "snapshot",
    }
}

named! {
    pub enum Role ("role") {
        Active = "active",
        Passive = "passive",
    }
}

named! {
    pub enum Family ("family") {
        /// Also an IPv4 peer of a dual-stack socket.
        Ipv4 = "ipv4",
        Ipv6 = "ipv6",
    }
}

named! {
    /// How the owner is known.
    pub enum OwnerSource ("owner source") {
        /// It called connect.
        Connect = "connect",
        /// It called listen.
        Listen = "listen",
        /// It accepted the connection.
        Accept = "accept",
        /// It was found holding the socket.
        Sweep = "sweep",
        /// Not seen accepted: the process that listens.
        Listener = "listener",
        /// It closed the socket, and no better is known.
        Closer = "closer",
    }
}

named! {
    pub enum LossReason ("loss reason") {
        RingFull = "ring_full",
        /// The kernel skipped the program because it was already running on that CPU.
        Recursion = "recursion",
        /// The reader of this stream did not keep up.
        SlowReader = "slow_reader",
        Decode = "decode",
        /// The table of sockets had no room for the event's.
        TableFull = "table_full",
    }
}

named! {
    pub enum Source ("source") {
        Direct = "direct",
        Daemon = "daemon",
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    /// Thread-group id in the initial pid namespace.
    pub pid: u32,
    /// Start, `CLOCK_BOOTTIME` nanoseconds: tells a reused pid apart.
    pub start_ns: u64,
    /// Name of the thread-group leader; `None` where it can't be known.
    pub comm: Option<Comm>,
}

impl Process {
    /// `/proc` gives the start in ticks of the clock, rounded down.
    const TICK_NS: u64 = 10_000_000;

    /// Whether both are the same process, whatever names it had.
    #[must_use]
    pub const fn is(&self, other: &Self) -> bool {
        self.pid == other.pid && self.start_ns.abs_diff(other.start_ns) < Self::TICK_NS
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    pub process: Process,
    pub source: OwnerSource,
}

/// Names a connection from its first state to the end of its TIME_WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConnectionId {
    /// Unique with the boot id.
    Cookie { cookie: u64, generation: u32 },
    /// Our own number, where the kernel gave no cookie: unique for one run of the tracer.
    Own(u64),
}

/// Pid and start: one process of this boot.
pub type ProcessId = (u32, u64);

impl Process {
    /// `None` where the start is not known, and the pid may be another's by now.
    #[must_use]
    pub fn id(&self) -> Option<ProcessId> {
        (self.start_ns != 0).then_some((self.pid, self.start_ns))
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cookie { cookie, generation } => write!(f, "{cookie}.{generation}"),
            Self::Own(number) => write!(f, "~{number}"),
        }
    }
}

/// An end of a connection; what is unknown, or has no meaning (a listener's remote end), is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Endpoint {
    pub addr: Option<IpAddr>,
    pub port: Option<u16>,
}

/// One socket leaving one state and entering another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Unix time, nanoseconds.
    pub time_ns: u64,
    pub id: ConnectionId,
    pub cookie: Option<u64>,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    pub family: Family,
    pub local: Endpoint,
    pub remote: Endpoint,
    pub from: TcpState,
    pub to: TcpState,
    /// How long it stayed in `from`; `None` where the start was not seen.
    pub dwell_ns: Option<u64>,
    pub evidence: Evidence,
    pub role: Option<Role>,
    pub owner: Option<Owner>,
    /// The socket's own uid.
    pub uid: Option<u32>,
    /// Full id of the owner's container.
    pub container: Option<Arc<str>>,
    pub end: Option<End>,
}

/// Events that did not come, at the place in the stream where they are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Unix time at which the loss was found, nanoseconds.
    pub time_ns: u64,
    /// How many, before any filter.
    pub count: u64,
    pub reason: LossReason,
}

/// What a stream covers: every network namespace, or one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NetnsSelection {
    All,
    /// By inode.
    One(u32),
}

impl fmt::Display for NetnsSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::One(inode) => write!(f, "{inode}"),
        }
    }
}

/// The first line of every stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Unix time, nanoseconds.
    pub time_ns: u64,
    pub host: String,
    pub boot_id: String,
    pub version: String,
    pub source: Source,
    pub netns: NetnsSelection,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    Start(Start),
    Transition(Transition),
    Socket(Listed),
    Lost(Loss),
}
