//! The reader's end of the ring: its size, and draining it in batches.
//!
//! When to drain is the caller's: the kernel side wakes only for much (see [`WAKE_SHARE`]), so a tick is needed.

use aya::maps::{MapData, RingBuf};
use tcpstate_common::{Event, event::BadRecord};

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
    mut sink: impl FnMut(Result<Event, BadRecord>),
    budget: usize,
) -> Drained {
    for _ in 0..budget {
        let Some(record) = ring.next() else {
            return Drained::Empty;
        };
        sink(Event::decode(&record));
    }
    Drained::Budget
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refusal(asked: u64) -> String {
        check_against(asked, 4096).unwrap_err().to_string()
    }

    #[test]
    fn sizes_that_the_kernel_takes() {
        for size in [4096, 8192, DEFAULT_RING_SIZE.into(), MAX_RING_SIZE] {
            assert_eq!(check_against(size, 4096).map(u64::from), Ok(size));
        }
    }

    #[test]
    fn others_are_refused_with_one_that_would_do() {
        assert_eq!(
            refusal(3000),
            "ring size 3000 is not a power of two of pages; try 4096"
        );
        assert_eq!(
            refusal(0),
            "ring size 0 is not a power of two of pages; try 4096"
        );
        assert_eq!(
            refusal(2048),
            "ring size 2048 is not a power of two of pages; try 4096"
        );
        assert_eq!(
            refusal(5000),
            "ring size 5000 is not a power of two of pages; try 8192"
        );
        assert_eq!(
            refusal(u64::MAX),
            "ring size 18446744073709551615 is not at most 1 GiB; try 1073741824"
        );
        assert_eq!(
            check_against(4096, 65536).unwrap_err().to_string(),
            "ring size 4096 is not a power of two of pages; try 65536"
        );
    }

    proptest! {
        #[test]
        fn a_suggestion_is_always_accepted(asked in any::<u64>(), page in prop::sample::select(vec![4096_u64, 16384, 65536])) {
            if let Err(error) = check_against(asked, page) {
                prop_assert!(check_against(error.suggestion, page).is_ok());
            }
        }
    }
}
