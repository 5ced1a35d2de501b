//! The reader's end of the ring: its size, and draining it in batches.
//!
//! When to drain is the caller's: the kernel side wakes only for much (see [`WAKE_SHARE`]), so a tick is needed.

use aya::maps::{MapData, RingBuf};
use tcpstate_common::{SetState, event::BadRecord};

/// 150 ms of slack at 240,000 events a second.
pub const DEFAULT_RING_SIZE: u32 = 4 << 20;

/// The kernel wakes the reader where this part of the ring is full.
pub const WAKE_SHARE: u32 = 4;

const MAX_RING_SIZE: u64 = 1 << 30;

/// A ring size that the kernel would not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ring size {asked} is not {expected}; try {suggestion}")]
pub struct RingSizeError {
    asked: u64,
    expected: &'static str,
    suggestion: u64,
}

/// # Errors
/// Where the size is not a power of two of pages, or above 1 GiB.
pub fn check_ring_size(bytes: u64) -> Result<u32, RingSizeError> {
    check_against(bytes, rustix::param::page_size() as u64)
}

fn check_against(asked: u64, page: u64) -> Result<u32, RingSizeError> {
    if asked > MAX_RING_SIZE {
        return Err(RingSizeError {
            asked,
            expected: "at most 1 GiB",
            suggestion: MAX_RING_SIZE,
        });
    }
    let suggestion = asked.next_power_of_two().max(page);
    match u32::try_from(asked) {
        Ok(size) if asked == suggestion => Ok(size),
        _ => Err(RingSizeError {
            asked,
            expected: "a power of two of pages",
            suggestion,
        }),
    }
}

/// Why a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Nothing waits: readiness may be cleared.
    Empty,
    /// The budget was used up, and more may wait: readiness must stay, since the ring wakes but once.
    Budget,
}

pub(super) fn drain(
    ring: &mut RingBuf<MapData>,
    mut sink: impl FnMut(Result<SetState, BadRecord>),
    budget: usize,
) -> Drained {
    for _ in 0..budget {
        let Some(record) = ring.next() else {
            return Drained::Empty;
        };
        sink(SetState::decode(&record));
    }
    Drained::Budget
}
