//! What events cost on the user side: a stream of records that is always the same, decoded, through the table and the
//! statistics, and the metrics page at its end.
//!
//! `cargo bench --bench replay` prints how many transitions a second one core takes. With `once` it is replayed once, for
//! `cargo xtask check`, which counts the instructions of [`replay`]. The stream is `stream`'s.

mod stream;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tcpstate_common::Event;
use tcpstate_user::export::process::ProcessMetrics;
use tcpstate_user::export::prometheus::{BuildInfo, page};
use tcpstate_user::model::NetnsSelection;
use tcpstate_user::model::view::{Counted, Health, KernelCounted, View};
use tcpstate_user::stats::Stats;
use tcpstate_user::table::{Identity, Table};

use self::stream::Stream;

/// The first does not count.
const ROUNDS: usize = 12;

fn main() {
    if std::env::args().any(|argument| argument == "once") {
        let stream = Stream::new(1_000, 200_000);
        check(&stream, &replay(&stream));
        println!("{} transitions", stream.transitions);
        return;
    }
    let streams = [(1_000, 1_000_000), (100_000, 2_000_000)]
        .map(|(open, transitions)| (open, Stream::new(open, transitions)));
    let mut calibrations = Vec::new();
    let mut took = streams.each_ref().map(|_| Vec::new());
    for round in 0..ROUNDS {
        let steps = million_a_second(CALIBRATION, calibrate);
        calibrations.extend((round > 0).then_some(steps));
        for ((_, stream), took) in streams.iter().zip(&mut took) {
            let rate = million_a_second(stream.transitions, || check(stream, &replay(stream)));
            took.extend((round > 0).then_some(rate));
        }
    }
    println!("calibration: {} million steps/s", shown(calibrations));
    for ((open, _), took) in streams.iter().zip(took) {
        println!("{open} open: {} million transitions/s", shown(took));
    }
}

/// From bytes to the page, with what was counted.
#[inline(never)]
fn replay(stream: &Stream) -> (Arc<Counted>, String) {
    let mut table = Table::new(Identity::Cookie);
    table.sees_accepts();
    let mut stats = Stats::new(100);
    stats.times_timewait();
    let mut now_ns = 0;
    for record in stream.records() {
        let event = Event::decode(record).expect("a record");
        now_ns = event.time_ns();
        match event {
            Event::SetState(event) => {
                let applied = table.apply(&event, None, |change| stats.apply(change));
                applied.expect("a cookie");
            }
            Event::Accept(event) => table.accepted(&event, None, |change| stats.apply(change)),
            Event::TimeWait(event) => table.time_wait(&event, |change| stats.apply(change)),
        }
    }
    let counted = stats.counted(now_ns, table.len() as u64, table.corrections());
    let counted = Arc::new(counted);
    let view = View {
        health: Health::default(),
        kernel: KernelCounted::default(),
        counted: Some(Arc::clone(&counted)),
    };
    let build = BuildInfo {
        version: "0",
        revision: "0",
        netns: NetnsSelection::All,
    };
    let page = page(&view, &ProcessMetrics::default(), &build).expect("a page");
    (counted, page)
}

/// What is wrong may well be quick.
fn check(stream: &Stream, (counted, page): &(Arc<Counted>, String)) {
    assert_eq!(counted.sockets, stream.left);
    assert!(counted.corrections.iter().all(|&(_, count)| count == 0));
    assert!(page.contains("tcpstate_dwell_seconds_bucket{comm=\"name-0\""));
}

const CALIBRATION: u64 = 10_000_000;

/// Work that no change of ours makes quicker: two runs, or two machines, can be compared by it.
fn calibrate() {
    let mut words = vec![0_u64; 1 << 16];
    let mut random = 1;
    for _ in 0..CALIBRATION {
        random = stream::next(random);
        let word = &mut words[random as usize % (1 << 16)];
        *word = word.wrapping_add(random);
    }
    black_box(words);
}

fn million_a_second(count: u64, work: impl FnOnce()) -> f64 {
    let processor = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("a time");
    let begun = processor();
    work();
    count as f64 / 1e6 / (processor() - begun).as_secs_f64()
}

/// The median, and the least and the most.
fn shown(mut rates: Vec<f64>) -> String {
    rates.sort_unstable_by(f64::total_cmp);
    let (least, most) = (rates[0], rates[rates.len() - 1]);
    format!("{:.2} ({least:.2} to {most:.2})", rates[rates.len() / 2])
}
