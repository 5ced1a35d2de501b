//! What the kernel side tells through the ring, and the checked decoding of its records; and the record of a sweep.
//!
//! Records are integers and arrays only, no hidden bytes: `zerocopy`'s derives refuse to compile otherwise. How a
//! transition lies in the ring is [`wire`](crate::wire)'s.

use core::fmt;
use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::state::TcpState;

/// Length of a command name, as the kernel's `TASK_COMM_LEN`.
pub const COMM_LEN: usize = 16;

pub const AF_INET: u16 = 2;
pub const AF_INET6: u16 = 10;

/// `flags`: the kernel's SOCK_DONE (a FIN was received).
pub const FLAG_DONE: u8 = 1 << 0;
/// `flags`: the kernel's SOCK_DEAD (orphaned: no descriptor leads to the socket any more).
pub const FLAG_DEAD: u8 = 1 << 1;
/// `flags`: `shutdown`, FLAG_DONE, FLAG_DEAD and FLAG_NO_LINGER were read; without it (classic tracepoint: no BTF,
/// so no offsets) they and `sk_err` are unknown.
pub const FLAG_SOCKET_READ: u8 = 1 << 2;
/// `flags`: the process fields are those of the task that made the call which caused this transition.
pub const FLAG_TASK: u8 = 1 << 3;

/// `flags`: `tcp_sock.linger2` is below 0, so that an orphan does not wait in FIN_WAIT2. Read at FIN_WAIT2→CLOSE only.
pub const FLAG_NO_LINGER: u8 = 1 << 4;

/// `shutdown`: the kernel's RCV_SHUTDOWN.
pub const RCV_SHUTDOWN: u8 = 1;
/// `shutdown`: the kernel's SEND_SHUTDOWN.
pub const SEND_SHUTDOWN: u8 = 2;

/// One transition, as `sock:inet_sock_set_state` saw it, before the kernel stored the new state.
///
/// Fields in host byte order unless they say otherwise; 0 where the kernel side could not know, but where a
/// flag tells whether 0 is a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromZeros)]
pub struct SetState {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub time_ns: u64,
    /// Address of the `struct sock`: reused by the kernel at once, so never an identity by itself.
    pub sk: u64,
    /// The kernel's socket cookie; 0 where it has none yet or tracing programs can't ask for it (before 5.12).
    /// Up to 6.12 an accepted child's first event carries its listener's.
    pub cookie: u64,
    /// Start of the process (thread-group leader), `CLOCK_BOOTTIME` nanoseconds; only with [`FLAG_TASK`], and 0 where
    /// it can't be read (classic tracepoint).
    pub start_ns: u64,
    /// The process' cgroup v2 id; only with [`FLAG_TASK`].
    pub cgroup_id: u64,
    /// Inode of the socket's network namespace; 0 where it can't be read (classic tracepoint).
    pub netns: u32,
    /// The process' thread-group id in the initial pid namespace; only with [`FLAG_TASK`].
    pub tgid: u32,
    /// The socket's own uid (`sk_uid`), in the initial user namespace; `u32::MAX` where it can't be read.
    pub uid: u32,
    /// The socket's pending error (`sk_err`), an errno.
    pub sk_err: i32,
    /// v6 as it is, v4 in the last four of 16 bytes behind `::ffff:` (network order).
    pub local_addr: [u8; 16],
    pub remote_addr: [u8; 16],
    /// Name of the process (thread-group leader), up to the first NUL; only with [`FLAG_TASK`]. Empty where it can't be
    /// read (classic tracepoint, in any thread but the leader).
    pub comm: [u8; COMM_LEN],
    pub local_port: u16,
    pub remote_port: u16,
    /// The socket's family: an AF_INET6 socket may well talk to a v4 peer.
    pub family: u16,
    /// Records lost for want of room in the ring since the programs were loaded, on all CPUs, when this one
    /// was reserved (wrapping): where it grows from one record to the next, the loss lies between them.
    pub lost: u32,
    /// The kernel's number of the state that the socket leaves (`skc_state` is an `unsigned char`).
    pub from: u8,
    /// The state that it enters.
    pub to: u8,
    /// `sk_shutdown`: RCV_SHUTDOWN, SEND_SHUTDOWN.
    pub shutdown: u8,
    pub flags: u8,
}

/// A process took a connection from a listener: what `inet_csk_accept` gave it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Accept {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub time_ns: u64,
    /// Address of the accepted `struct sock`.
    pub sk: u64,
    /// Its cookie; 0 as in [`SetState::cookie`].
    pub cookie: u64,
    /// Of the process, as in [`SetState::start_ns`].
    pub start_ns: u64,
    pub cgroup_id: u64,
    pub tgid: u32,
    /// As in [`SetState::lost`].
    pub lost: u32,
    pub comm: [u8; COMM_LEN],
}

const _: () = assert!(size_of::<Accept>() == 64);
const _: () = assert!(offset_of!(Accept, tgid) == 40);

/// `what` of [`TimeWait`]: the kernel is about to put a timewait socket in the place of a full one.
pub const TIMEWAIT_BEGINS: u8 = 0;
/// Its timer was set again: so it is when an orphan's FIN_WAIT2 becomes TIME_WAIT.
pub const TIMEWAIT_SET_AGAIN: u8 = 1;
/// It is gone.
pub const TIMEWAIT_ENDS: u8 = 2;

/// A step in the life of a timewait socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TimeWait {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub time_ns: u64,
    /// The cookie that it has from the full socket; never 0.
    pub cookie: u64,
    /// As in [`SetState::netns`].
    pub netns: u32,
    /// As in [`SetState::lost`].
    pub lost: u32,
    pub what: u8,
    /// The kernel's number of the state that it is in now: TIME_WAIT, FIN_WAIT2 of an orphan, or CLOSE at its end.
    pub state: u8,
    /// Up to the next multiple of 8.
    pub pad: [u8; 6],
}

const _: () = assert!(size_of::<TimeWait>() == 32);
const _: () = assert!(offset_of!(TimeWait, what) == 24);

/// A process that a sweep over all descriptors (`iter/task_file`) found holding a TCP socket. Not in the ring: the
/// iterator's file gives one after the other.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Holder {
    /// The socket's cookie: never 0.
    pub cookie: u64,
    /// Start of the process, as in [`SetState::start_ns`].
    pub start_ns: u64,
    pub tgid: u32,
    /// Inode of the socket's network namespace.
    pub netns: u32,
    pub comm: [u8; COMM_LEN],
    /// Jiffies now, and at the last ACK that the socket received, both modulo 2³². 0 where that was not asked for, or none
    /// came.
    pub now_jiffies: u32,
    pub acked_jiffies: u32,
}

const _: () = assert!(size_of::<Holder>() == 48);
const _: () = assert!(offset_of!(Holder, comm) == 24);

/// What a record of the ring can be. They have different lengths, which tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    SetState(SetState),
    Accept(Accept),
    TimeWait(TimeWait),
}

const ACCEPT: usize = size_of::<Accept>();
const TIME_WAIT: usize = size_of::<TimeWait>();

impl Event {
    /// # Errors
    /// [`BadRecord`] where the length is that of none. Any bytes of a right length are a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRecord> {
        let event = match bytes.len() {
            ACCEPT => Accept::read_from_bytes(bytes).ok().map(Self::Accept),
            TIME_WAIT => TimeWait::read_from_bytes(bytes).ok().map(Self::TimeWait),
            _ => SetState::decode(bytes).map(Self::SetState),
        };
        event.ok_or(BadRecord { len: bytes.len() })
    }

    /// Losses up to it: [`SetState::lost`].
    #[must_use]
    pub const fn lost(&self) -> u32 {
        match self {
            Self::SetState(event) => event.lost,
            Self::Accept(event) => event.lost,
            Self::TimeWait(event) => event.lost,
        }
    }

    /// `CLOCK_BOOTTIME`, nanoseconds.
    #[must_use]
    pub const fn time_ns(&self) -> u64 {
        match self {
            Self::SetState(event) => event.time_ns,
            Self::Accept(event) => event.time_ns,
            Self::TimeWait(event) => event.time_ns,
        }
    }
}

/// Why bytes from the ring are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRecord {
    /// Length of what came, in bytes.
    pub len: usize,
}

impl fmt::Display for BadRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "record of {} bytes, which is as long as none that is known",
            self.len
        )
    }
}

impl core::error::Error for BadRecord {}

impl SetState {
    #[must_use]
    pub const fn from(&self) -> TcpState {
        TcpState::from_kernel(self.from)
    }

    #[must_use]
    pub const fn to(&self) -> TcpState {
        TcpState::from_kernel(self.to)
    }

    #[must_use]
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}
