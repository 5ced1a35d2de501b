//! Dwell times: which states can be timed, and which bucket a stay falls into.

use tcpstate_common::TcpState;

use crate::model::view::{DWELL_BUCKETS, GAUGE_STATES, Histogram};

/// By [`GAUGE_STATES`]: can events time a stay in it?
///
/// - FIN_WAIT2: an orphan lives on as a timewait socket, and no event shows its end (`tcp_time_wait`, all
///   kernels): samples of those that end otherwise would be biased.
/// - TIME_WAIT: neither its beginning nor its end is an event.
/// - SYN_RECV: a passive socket's stay begins as a half-open request, which no event shows
///   (`inet_csk_clone_lock` fires when the request is answered).
const TIMED: [bool; GAUGE_STATES.len()] = {
    let mut timed = [true; GAUGE_STATES.len()];
    let mut at = 0;
    while at < timed.len() {
        timed[at] = !matches!(
            GAUGE_STATES[at],
            TcpState::FIN_WAIT2 | TcpState::TIME_WAIT | TcpState::SYN_RECV
        );
        at += 1;
    }
    timed
};

/// `state`: as [`gauge_index`](crate::model::view::gauge_index) gives it.
pub fn is_timed(state: usize) -> bool {
    TIMED[state]
}

/// The states that have dwell times.
pub fn timed_states() -> impl Iterator<Item = TcpState> {
    let states = GAUGE_STATES.iter().zip(TIMED);
    states.filter_map(|(&state, timed)| timed.then_some(state))
}

/// [`DWELL_BUCKETS`] in nanoseconds: compared as integers, so that a stay of exactly a bound is within it.
const BOUNDS_NS: [u64; DWELL_BUCKETS.len()] = {
    let mut bounds = [0; DWELL_BUCKETS.len()];
    let mut at = 0;
    while at < bounds.len() {
        bounds[at] = (DWELL_BUCKETS[at] * 1e9 + 0.5) as u64;
        at += 1;
    }
    bounds
};

pub fn record(histogram: &mut Histogram, dwell_ns: u64) {
    let bucket = BOUNDS_NS.partition_point(|&bound| bound < dwell_ns);
    if let Some(samples) = histogram.buckets.get_mut(bucket) {
        *samples += 1;
    }
    histogram.count += 1;
    histogram.sum_ns += u128::from(dwell_ns);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_within_its_bucket() {
        assert_eq!(
            BOUNDS_NS[..4],
            [1_000_000, 5_000_000, 25_000_000, 100_000_000]
        );
        assert_eq!(BOUNDS_NS[12], 86_400_000_000_000);
        for (at, bound) in BOUNDS_NS.into_iter().enumerate() {
            for (dwell_ns, bucket) in [(bound - 1, at), (bound, at), (bound + 1, at + 1)] {
                let mut histogram = Histogram::default();
                record(&mut histogram, dwell_ns);
                let found = histogram.buckets.iter().position(|&samples| samples == 1);
                assert_eq!(found, (bucket < 13).then_some(bucket), "{dwell_ns} ns");
                assert_eq!((histogram.count, histogram.sum_ns), (1, dwell_ns.into()));
            }
        }
    }

    #[test]
    fn a_sum_holds_more_than_64_bits() {
        let mut histogram = Histogram::default();
        record(&mut histogram, u64::MAX);
        record(&mut histogram, u64::MAX);
        assert_eq!(histogram.sum_ns, 2 * u128::from(u64::MAX));
    }

    #[test]
    fn what_events_cannot_time_has_no_histogram() {
        let timed: Vec<_> = timed_states().filter_map(TcpState::name).collect();
        assert_eq!(
            timed,
            [
                "ESTABLISHED",
                "SYN_SENT",
                "FIN_WAIT1",
                "CLOSE_WAIT",
                "LAST_ACK",
                "LISTEN",
                "CLOSING"
            ]
        );
    }
}
