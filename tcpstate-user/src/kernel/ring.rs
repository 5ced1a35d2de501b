//! The reader's end of the ring: its size, and draining it in batches.
//!
//! When to drain is the caller's: the kernel side wakes only for much (see [`WAKE_SHARE`]), so a tick is needed.

use std::fmt;

use aya::maps::{MapData, RingBuf};
use tcpstate_common::{Event, event::BadRecord};

/// The kernel wakes the reader where this part of the ring is full.
pub const WAKE_SHARE: u32 = 4;

const LARGEST: u64 = 1 << 30;

/// In bytes, as the kernel takes it: a power of two of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize(u32);

/// Not a [`RingSize`]; says what would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSizeError {
    least: u64,
    /// `None` where only one is near.
    below: Option<u64>,
    above: u64,
}

impl RingSize {
    /// # Errors
    /// Where the size is not a power of two of pages, or above 1 GiB.
    pub fn new(bytes: u64) -> Result<Self, RingSizeError> {
        Self::of_pages(bytes, rustix::param::page_size() as u64)
    }

    fn of_pages(bytes: u64, page: u64) -> Result<Self, RingSizeError> {
        let sizes = page..=LARGEST;
        match u32::try_from(bytes) {
            Ok(size) if size.is_power_of_two() && sizes.contains(&bytes) => Ok(Self(size)),
            _ => {
                let above = bytes.clamp(page, LARGEST).next_power_of_two();
                Err(RingSizeError {
                    least: page,
                    below: sizes.contains(&bytes).then_some(above / 2),
                    above,
                })
            }
        }
    }

    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.0
    }
}

impl Default for RingSize {
    /// 150 ms of slack at 240,000 events a second.
    fn default() -> Self {
        Self(4 << 20)
    }
}

impl std::error::Error for RingSizeError {}

impl fmt::Display for RingSizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let least = self.least;
        write!(f, "expected a power of two from {least} (a page) to 1GiB")?;
        match self.below {
            Some(below) => write!(f, "; the nearest are {below} and {}", self.above),
            None => write!(f, "; the nearest is {}", self.above),
        }
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

    fn refusal(bytes: u64) -> String {
        RingSize::of_pages(bytes, 4096).unwrap_err().to_string()
    }

    #[test]
    fn sizes_that_the_kernel_takes() {
        for size in [4096, 8192, 4 << 20, LARGEST] {
            let taken = RingSize::of_pages(size, 4096).unwrap();
            assert_eq!(u64::from(taken.bytes()), size);
        }
        let default = RingSize::default().bytes().into();
        assert_eq!(RingSize::of_pages(default, 65536), Ok(RingSize::default()));
    }

    #[test]
    fn others_are_refused_with_those_that_would_do() {
        let expected = "expected a power of two from 4096 (a page) to 1GiB; the nearest";
        for size in [0, 1, 2048, 3000] {
            assert_eq!(refusal(size), format!("{expected} is 4096"));
        }
        assert_eq!(refusal(5000), format!("{expected} are 4096 and 8192"));
        for size in [LARGEST + 1, LARGEST * 2, u64::MAX] {
            assert_eq!(refusal(size), format!("{expected} is 1073741824"));
        }
        assert_eq!(
            RingSize::of_pages(4096, 65536).unwrap_err().to_string(),
            "expected a power of two from 65536 (a page) to 1GiB; the nearest is 65536"
        );
    }

    proptest! {
        #[test]
        fn what_is_offered_is_taken(size in any::<u64>(), page in prop::sample::select(vec![4096_u64, 16384, 65536])) {
            if let Err(RingSizeError { below, above, .. }) = RingSize::of_pages(size, page) {
                for offered in below.into_iter().chain([above]) {
                    prop_assert!(RingSize::of_pages(offered, page).is_ok());
                }
            }
        }
    }
}
