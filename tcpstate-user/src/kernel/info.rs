//! What the kernel counts: the program's own counters, and what `bpf(2)` tells of the program.

use std::{
    fs, io,
    mem::size_of,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use aya::maps::{Array, MapData, MapError, PerCpuArray};
use tcpstate_common::counters::{SLOTS, STATES, transition_slot};
use zerocopy::{FromZeros, IntoBytes};

use rustix::time::{ClockId, clock_getres};

use crate::model::view::Program;

/// All slots of one CPU.
pub(super) type Block = [u64; SLOTS];

/// Totals since the start, over all CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// By kernel number of the old and the new state; index 0 holds numbers that are too high.
    pub transitions: [[u64; STATES]; STATES],
    /// Records for which the ring had no room.
    pub ring_full: u64,
}

pub(super) fn counters(
    transitions: &PerCpuArray<MapData, Block>,
    lost: &Array<MapData, u64>,
) -> Result<Counters, MapError> {
    Ok(Counters {
        transitions: sum(transitions.get(&0, 0)?.iter()),
        ring_full: lost.get(&0, 0)?,
    })
}

fn sum<'a>(cpus: impl Iterator<Item = &'a Block>) -> [[u64; STATES]; STATES] {
    let mut sum = [[0; STATES]; STATES];
    for block in cpus {
        for (from, row) in (0..).zip(&mut sum) {
            for (to, cell) in (0..).zip(row) {
                *cell += block[transition_slot(from, to)];
            }
        }
    }
    sum
}

/// What the kernel measured of a program, or of several that do one thing together, while its BPF statistics were on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunStats {
    pub program: Program,
    pub run_time_ns: u64,
    pub run_count: u64,
}

/// Whether the kernel measures programs now (`kernel.bpf_stats_enabled`).
#[must_use]
pub fn stats_enabled() -> bool {
    fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").is_ok_and(|text| text.trim() == "1")
}

/// `struct bpf_prog_info` of Linux 5.12, with names for what is used here.
#[repr(C)]
#[derive(IntoBytes, FromZeros, zerocopy::Immutable)]
pub(super) struct ProgInfo {
    before: [u8; 192],
    pub run_time_ns: u64,
    pub run_count: u64,
    /// Calls skipped since the program was running already on that CPU. 5.12+
    recursion_misses: u64,
    /// How much of this the kernel filled: not part of the kernel's struct.
    filled: u64,
}

/// Length of the kernel's struct as far as it is declared here.
const INFO_LEN: usize = size_of::<ProgInfo>() - size_of::<u64>();

const _: () = assert!(std::mem::offset_of!(ProgInfo, run_time_ns) == 192);
const _: () = assert!(INFO_LEN == 216);

impl ProgInfo {
    /// Asks the kernel.
    pub(super) fn of(program: BorrowedFd<'_>) -> io::Result<Self> {
        /// `union bpf_attr` for the command.
        #[repr(C)]
        struct Attr {
            bpf_fd: u32,
            info_len: u32,
            info: u64,
        }
        const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

        let mut info = Self::new_zeroed();
        let mut attr = Attr {
            bpf_fd: program.as_raw_fd().cast_unsigned(),
            info_len: INFO_LEN as u32,
            info: (&raw mut info).expose_provenance() as u64,
        };
        // SAFETY: the command reads and writes `attr` within the size given, and writes no more than `info_len` bytes
        // at `info`, where there are more; `info` is all zeros before, so it asks for nothing to be copied elsewhere.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_OBJ_GET_INFO_BY_FD,
                &raw mut attr,
                size_of::<Attr>(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        info.filled = u64::from(attr.info_len);
        Ok(info)
    }

    /// `None` where the kernel does not count them (before 5.12).
    pub(super) fn recursion_misses(&self) -> Option<u64> {
        (self.filled >= INFO_LEN as u64).then_some(self.recursion_misses)
    }
}

/// How long a jiffy is, the kernel's `TICK_NSEC`.
#[must_use]
pub fn jiffy_ns() -> u64 {
    let jiffy = clock_getres(ClockId::MonotonicCoarse);
    jiffy.tv_sec.unsigned_abs() * 1_000_000_000 + jiffy.tv_nsec.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transitions_are_summed_over_cpus_by_both_states() {
        let (mut one, mut other) = ([0; SLOTS], [0; SLOTS]);
        one[transition_slot(7, 2)] = 3;
        other[transition_slot(7, 2)] = 4;
        other[transition_slot(2, 7)] = 5;
        other[transition_slot(99, 1)] = 6;

        let sum = sum([one, other].iter());
        assert_eq!((sum[7][2], sum[2][7], sum[0][1]), (7, 5, 6));
        assert_eq!(sum.as_flattened().iter().sum::<u64>(), 18);
    }

    #[test]
    fn misses_are_unknown_where_the_kernel_filled_less() {
        let mut info = ProgInfo::new_zeroed();
        info.recursion_misses = 0;
        info.filled = 208;
        assert_eq!(info.recursion_misses(), None);
        info.filled = 216;
        assert_eq!(info.recursion_misses(), Some(0));
    }
}
