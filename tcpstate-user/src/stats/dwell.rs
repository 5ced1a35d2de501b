//! Dwell times: which states can be timed, and which bucket a stay falls into.

use tcpstate_common::TcpState;

use crate::model::view::{DWELL_BUCKETS, GAUGE_STATES, Histogram};

/// The states of which both ends of each stay can be seen; of others the samples would be biased.
///
/// - FIN_WAIT2 and TIME_WAIT: an orphan lives on as a timewait socket (`tcp_time_wait`, all kernels), whose end the
///   tracepoint does not show, nor the whole of TIME_WAIT.
/// - SYN_RECV: a passive socket's stay begins as a half-open request, which no event shows
///   (`inet_csk_clone_lock` fires when the request is answered).
#[derive(Clone, Copy, Debug)]
pub struct Timed {
    timewait: bool,
}

impl Timed {
    /// `timewait`: events tell of timewait sockets.
    pub const fn new(timewait: bool) -> Self {
        Self { timewait }
    }

    /// `state`: as [`gauge_index`](crate::model::view::gauge_index) gives it.
    pub const fn contains(self, state: usize) -> bool {
        match GAUGE_STATES[state] {
            TcpState::SYN_RECV => false,
            TcpState::FIN_WAIT2 | TcpState::TIME_WAIT => self.timewait,
            _ => true,
        }
    }
}

/// The states that have dwell times somewhere.
pub fn timed_states() -> impl Iterator<Item = TcpState> {
    let states = GAUGE_STATES.into_iter().enumerate();
    states.filter_map(|(at, state)| Timed::new(true).contains(at).then_some(state))
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
        let without = |timewait| -> Vec<&str> {
            let timed = Timed::new(timewait);
            let states = GAUGE_STATES.iter().enumerate();
            let without = states.filter(|(at, _)| !timed.contains(*at));
            without.filter_map(|(_, state)| state.name()).collect()
        };
        assert_eq!(without(false), ["SYN_RECV", "FIN_WAIT2", "TIME_WAIT"]);
        assert_eq!(without(true), ["SYN_RECV"]);
    }
}
