//! The process whose call caused a transition: when that is the current task, and what it says of itself.
//!
//! Most transitions happen in whatever task a softirq or the backlog found there, and nothing in the task tells so
//! (backlog processing carries no softirq mark). It is told by the transition and the socket.

use aya_ebpf::helpers::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_task, bpf_get_current_task_btf,
    bpf_probe_read_kernel, generated::bpf_get_current_cgroup_id,
};
use tcpstate_common::{
    TcpState,
    event::{COMM_LEN, RCV_SHUTDOWN, SEND_SHUTDOWN},
    wire::Caller,
};

use crate::maps::offset;

/// `task_struct.flags`: a kernel thread. Where one closes a socket (a delayed `fput`), it does so for another.
const PF_KTHREAD: u32 = 0x0020_0000;

/// Close sets all of it before it changes the state. So does a shutdown of both directions (`inet_shutdown`), but that
/// leads to FIN_WAIT1 or LAST_ACK, never straight to CLOSE.
const SHUTDOWN_MASK: u8 = RCV_SHUTDOWN | SEND_SHUTDOWN;

/// The process fields of a record.
#[derive(Clone, Copy)]
pub struct Process {
    pub tgid: u32,
    /// 0 where it can't be read.
    pub start_ns: u64,
    pub cgroup_id: u64,
    /// Empty where it can't be read. In words: of bytes, LLVM would clear one after the other.
    pub comm: [u64; COMM_LEN / 8],
}

/// Whether nothing but a call (connect, listen, shutdown, close, exit) makes this transition.
#[inline(always)]
pub fn by_call(from: TcpState, to: TcpState) -> bool {
    match to {
        TcpState::SYN_SENT | TcpState::LISTEN => from == TcpState::CLOSE,
        TcpState::FIN_WAIT1 | TcpState::LAST_ACK => true,
        TcpState::CLOSE => from == TcpState::LISTEN,
        _ => false,
    }
}

/// As [`by_call`], where the socket can be read: a reset or a timer leaves its errno, and a close (without FIN: unread
/// data, SO_LINGER 0) the mask. MPTCP drops subflows in a softirq with neither.
///
/// An orphan has no caller: a close in SYN_RECV becomes FIN_WAIT1 only at the peer's ACK (6.9+).
#[inline(always)]
pub fn by_call_on(from: TcpState, to: TcpState, err: i32, shutdown: u8, dead: bool) -> bool {
    if dead {
        return false;
    }
    by_call(from, to)
        || (to == TcpState::CLOSE
            && err == 0
            && match from {
                TcpState::SYN_SENT => true,
                TcpState::ESTABLISHED | TcpState::CLOSE_WAIT | TcpState::SYN_RECV => {
                    shutdown == SHUTDOWN_MASK
                }
                _ => false,
            })
}

/// How a program reads the current task.
pub trait ReadTask {
    fn current() -> *const u8;

    /// # Safety
    /// `task` must be one that [`ReadTask::current`] leads to, with a field of type `T` at `offset`.
    unsafe fn load<T: Copy>(task: *const u8, offset: usize) -> Option<T>;
}

/// Field by field, as if it were C: the helper's result has a BTF type. 5.11+
pub struct Direct;

impl ReadTask for Direct {
    #[inline(always)]
    fn current() -> *const u8 {
        // SAFETY: takes no arguments; in every program type that has the helper a call is sound.
        unsafe { bpf_get_current_task_btf() }.cast_const().cast()
    }

    #[inline(always)]
    unsafe fn load<T: Copy>(task: *const u8, offset: usize) -> Option<T> {
        // SAFETY: the caller's promise; the verifier checks it against the BTF type.
        Some(unsafe { task.add(offset).cast::<T>().read() })
    }
}

/// By copies through a helper.
pub struct Probe;

impl ReadTask for Probe {
    #[inline(always)]
    fn current() -> *const u8 {
        // SAFETY: takes no arguments; in every program type that has the helper a call is sound.
        unsafe { bpf_get_current_task() as *const u8 }
    }

    #[inline(always)]
    unsafe fn load<T: Copy>(task: *const u8, offset: usize) -> Option<T> {
        // SAFETY: the helper checks the address and fails on one that is not mapped.
        unsafe { bpf_probe_read_kernel(task.wrapping_add(offset).cast::<T>()) }.ok()
    }
}

/// Loads the field of that name in [`Offsets`](tcpstate_common::config::Offsets) from a task; none where that fails.
macro_rules! load {
    ($task:expr, $field:ident) => {{
        let offset = offset!($field);
        // SAFETY: the task lives while the program runs, and so does its group leader; the offset is the field's by the
        // kernel's own BTF, and the type has the field's size.
        unsafe { R::load($task, offset)? }
    }};
}

/// Any process, as its thread-group leader shows it.
pub struct Leader {
    pub tgid: u32,
    pub start_ns: u64,
    pub comm: [u64; COMM_LEN / 8],
}

impl Leader {
    #[inline(always)]
    pub fn of<R: ReadTask>(task: *const u8) -> Option<Self> {
        let leader: *const u8 = load!(task, task_group_leader);
        Some(Self {
            tgid: load!(task, task_tgid),
            start_ns: load!(leader, task_start_boottime),
            comm: load!(leader, task_comm),
        })
    }
}

impl Process {
    /// The current one; `None` for a kernel thread.
    #[inline(always)]
    pub fn current<R: ReadTask>() -> Option<Self> {
        let task = R::current();
        let flags: u32 = load!(task, task_flags);
        if flags & PF_KTHREAD != 0 {
            return None;
        }
        let leader = Leader::of::<R>(task)?;
        Some(Self {
            tgid: leader.tgid,
            start_ns: leader.start_ns,
            cgroup_id: current_cgroup_id(),
            comm: leader.comm,
        })
    }

    #[inline(always)]
    pub fn caller(self) -> Caller {
        Caller {
            start_ns: self.start_ns,
            cgroup_id: self.cgroup_id,
            comm: zerocopy::transmute!(self.comm),
            tgid: self.tgid,
            pad: 0,
        }
    }

    /// The current one without BTF. The start time stays unknown, and the name too in any thread but the leader: the
    /// helper gives the thread's. A kernel thread can't be told from a process.
    #[inline(always)]
    pub fn current_without_btf() -> Self {
        let pid_tgid = bpf_get_current_pid_tgid();
        let (tgid, pid) = ((pid_tgid >> 32) as u32, pid_tgid as u32);
        let comm = if tgid == pid {
            zerocopy::transmute!(bpf_get_current_comm().unwrap_or_default())
        } else {
            [0; COMM_LEN / 8]
        };
        Self {
            tgid,
            start_ns: 0,
            cgroup_id: current_cgroup_id(),
            comm,
        }
    }
}

#[inline(always)]
fn current_cgroup_id() -> u64 {
    // SAFETY: takes no arguments; in every program type that has the helper a call is sound.
    unsafe { bpf_get_current_cgroup_id() }
}
