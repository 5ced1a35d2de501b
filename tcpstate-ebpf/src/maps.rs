//! What the kernel side shares with the user side: each map with who writes, who reads, and what happens when
//! it is full; and the globals that the loader sets.

use aya_ebpf::{
    macros::map,
    maps::{Array, PerCpuArray, RingBuf},
};
use tcpstate_common::{
    config::{Offsets, Switches},
    counters::SLOTS,
};

/// Records, [`crate::emit`] to the user side's drain. Full: the record is lost, and [`LOST`] counts it.
///
/// The loader sets the size; the one here is only the smallest that the kernel takes.
#[map]
pub static RING: RingBuf = RingBuf::with_byte_size(4096, 0);

/// Lost records, one element: written by [`crate::emit`], read by it into each record and by the user side.
#[map]
pub static LOST: Array<u64> = Array::with_max_entries(1, 0);

/// Transitions by CPU, written by [`crate::emit`], read and summed by the user side; never full.
///
/// All slots are one element, so that an event costs one lookup and a reader one system call.
#[map]
pub static COUNTERS: PerCpuArray<[u64; SLOTS]> = PerCpuArray::with_max_entries(1, 0);

/// Whether the sweep is to tell when sockets received their last ACK (not 0), one element: written by the user side before
/// a sweep begins, read by [`crate::sweep`].
#[map]
pub static ACKS: Array<u32> = Array::with_max_entries(1, 0);

/// Set by the loader. Read with [`offset!`] and [`switch!`] only: the compiler must not see these zeros.
#[unsafe(no_mangle)]
// SAFETY: the struct consists of integers, for which all-zero bytes are a value.
pub static OFFSETS: Offsets = unsafe { core::mem::zeroed() };

/// Set by the loader, as [`OFFSETS`].
#[unsafe(no_mangle)]
// SAFETY: the struct consists of integers, for which all-zero bytes are a value.
pub static SWITCHES: Switches = unsafe { core::mem::zeroed() };

/// The offset of a field in the running kernel. The map behind it is read-only and frozen, so the verifier knows
/// the value and takes `pointer + offset!(field)` for what it takes a field access in C for.
macro_rules! offset {
    ($($field:tt)+) => {
        // SAFETY: reads an initialised static through a pointer made from it; volatile, because the loader
        // replaces the value behind the compiler's back.
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::OFFSETS.$($field)+) as usize }
    };
}

/// A switch as the loader set it.
macro_rules! switch {
    ($field:ident) => {
        // SAFETY: as in `offset!`.
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::SWITCHES.$field) }
    };
}

pub(crate) use {offset, switch};
