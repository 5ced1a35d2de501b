//! The clocks: that of events, and the time of day.

use rustix::time::{ClockId, clock_gettime};

/// Unix time, nanoseconds.
pub fn unix_now_ns() -> u64 {
    nanoseconds(ClockId::Realtime).unsigned_abs()
}

/// `CLOCK_BOOTTIME`, nanoseconds.
pub fn now_ns() -> u64 {
    nanoseconds(ClockId::Boottime).unsigned_abs()
}

/// What to add to `CLOCK_BOOTTIME` for Unix time; changes where somebody sets the clock.
///
/// Of a few readings the tightest counts: an interruption between the two clocks would set all the times that are
/// told with it off by its length.
pub fn boot_to_unix_ns() -> i64 {
    let reading = || {
        let before = nanoseconds(ClockId::Boottime);
        let unix = nanoseconds(ClockId::Realtime);
        let after = nanoseconds(ClockId::Boottime);
        (after - before, unix - (before + (after - before) / 2))
    };
    let (_, offset) = [reading(), reading(), reading(), reading()]
        .into_iter()
        .min()
        .expect("there are four");
    offset
}

fn nanoseconds(clock: ClockId) -> i64 {
    let time = clock_gettime(clock);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}
