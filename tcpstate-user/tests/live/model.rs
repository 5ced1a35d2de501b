//! Random lives of sockets, and whether the product's every gauge and every owner is right whenever they pause.
//!
//! A seed makes a plan (`driver`), workers carry it out (`worker`), the `book` has what must be told. Each lane has a
//! network namespace of its own for all its seeds, followed by a daemon of its own, so that its gauges count nothing else;
//! it makes small dumps only, but for a list at a seed's end. Another daemon follows all namespaces of the host, for owners
//! (each list has a dump and a sweep) and for namespaces that come and go: `/v1/sockets` says which one a row is of, gauges
//! don't.
//!
//! `TCPSTATE_SEEDS=N` takes N seeds rather than the usual ones, `TCPSTATE_SEED=S` only that.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::daemon::{Daemon, Metrics, in_namespace};
use crate::sys;

mod book;
mod driver;
mod worker;

use book::{Row, Rows, bounds, is_silent, row_of};
use driver::{What, World, plan};

/// Seeds that failed once.
const REGRESSIONS: [u64; 2] = [11, 27];
const SEEDS: u64 = 100;
/// As many at a time: a pause is mostly waiting. No more lists are held by a daemon.
const LANES: usize = 4;
/// Of one seed: the kernel may skip the program, which the product tells, and then can't know all.
const TRIES: usize = 4;
/// What is found to be wrong is not looked for further.
const MOST_FAILURES: usize = 8;
/// Nothing is on its way in a namespace that did not change for so long: an ACK may be delayed for 40 ms.
const QUIET: Duration = Duration::from_millis(60);
/// A scrape has what no event follows as of a second ago at most, and what ends silently is gone at the second dump.
const SILENT_LIMIT: Duration = Duration::from_millis(4500);
/// Lists, each of a dump: what ended silently is in one, and not in the next but one.
const LISTS: usize = 3;

/// By the kernel's words; `CLOSE` has no gauge.
const GAUGES: [&str; 10] = [
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
];

enum Wrong {
    /// The kernel did not show the product all that happened, as that says.
    Lost,
    Told(String),
}

/// What the daemons had counted when a seed began.
struct Counted {
    lost: [f64; 2],
    corrections: f64,
}

struct Lane {
    world: World,
    own: Daemon,
    all: Arc<Daemon>,
    counted: Counted,
}

impl Lane {
    fn new(number: usize, home: u32, all: Arc<Daemon>) -> Self {
        // Orphans of some lanes vanish soon, those of others hardly within a seed.
        let fin_timeout = ["3", "60"][number % 2];
        for (name, value) in [
            ("tcp_fin_timeout", fin_timeout),
            // Without cookies on both sides.
            ("tcp_fastopen", "519"),
            ("tcp_syn_retries", "2"),
        ] {
            sys::set_sysctl(&format!("net/ipv4/{name}"), value).expect("a sysctl");
        }
        let own = Daemon::start(&["--reconcile-interval", "1h"]);
        Self {
            world: World::new(number, home),
            own,
            all,
            counted: Counted {
                lost: [0.0; 2],
                corrections: 0.0,
            },
        }
    }

    fn seed(&mut self, seed: u64) -> Result<(), Wrong> {
        let metrics = self.own.metrics();
        self.counted = Counted {
            lost: self.lost(&metrics),
            corrections: metrics.sum("tcpstate_corrections_total"),
        };
        self.world.begin(seed);
        let mut result = Ok(());
        for step in plan(seed) {
            if matches!(step.what, What::Pause) {
                result = self.pause();
            } else {
                self.world.take(step);
            }
            if result.is_err() {
                break;
            }
        }
        let visited = self.world.namespaces();
        self.world.end();
        result?;
        self.left(&visited)
    }

    fn lost(&self, own: &Metrics) -> [f64; 2] {
        let lost = "tcpstate_events_lost_total";
        [own.sum(lost), self.all.metrics().sum(lost)]
    }

    /// A complaint counts only where nothing was lost.
    fn wrong(&self, text: String) -> Wrong {
        let metrics = self.own.metrics();
        if self.lost(&metrics) == self.counted.lost {
            Wrong::Told(text)
        } else {
            Wrong::Lost
        }
    }

    fn pause(&mut self) -> Result<(), Wrong> {
        self.settle();
        // At once, as far as events tell.
        self.gauges(|state| !is_silent(state))
            .map_err(|text| self.wrong(text))?;
        self.list().map_err(|text| self.wrong(text))?;
        let limit = Instant::now() + SILENT_LIMIT;
        while let Err(text) = self.gauges(|_| true) {
            if Instant::now() > limit {
                return Err(self.wrong(text));
            }
            thread::sleep(Duration::from_millis(100));
        }
        let corrections = self.own.metrics().sum("tcpstate_corrections_total");
        let new = corrections - self.counted.corrections;
        if new > 0.0 {
            return Err(self.wrong(format!("{new} corrections, though nothing was lost")));
        }
        Ok(())
    }

    fn settle(&self) {
        let limit = Instant::now() + Duration::from_secs(2);
        let mut last = self.world.kernels();
        let mut since = Instant::now();
        while since.elapsed() < QUIET && Instant::now() < limit {
            thread::sleep(Duration::from_millis(10));
            let rows = self.world.kernels();
            if rows != last {
                (last, since) = (rows, Instant::now());
            }
        }
    }

    /// Those of the lane's own namespace.
    fn gauges(&self, wanted: impl Fn(&str) -> bool) -> Result<(), String> {
        let before = book::kernels(self.world.home, "thread-self");
        let metrics = self.own.metrics();
        let after = book::kernels(self.world.home, "thread-self");
        let mut by_state: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for (row, (least, most)) in bounds(&before, &after) {
            let of_state = by_state.entry(&row.state).or_default();
            *of_state = (of_state.0 + least, of_state.1 + most);
        }
        let mut text = String::new();
        for state in GAUGES.into_iter().filter(|state| wanted(state)) {
            let (least, most) = by_state.get(state).copied().unwrap_or_default();
            let told = metrics.state(&state.to_lowercase());
            if !(least as f64..=most as f64).contains(&told) {
                writeln!(
                    text,
                    "the gauge of {state} is {told}, the kernel has {least} to {most}"
                )
                .expect("memory");
            }
        }
        let sums = ["tcpstate_sockets", "tcpstate_process_sockets"].map(|it| metrics.sum(it));
        if sums[0] != sums[1] {
            writeln!(text, "gauges and gauges by process: {sums:?}").expect("memory");
        }
        if text.is_empty() { Ok(()) } else { Err(text) }
    }

    /// All sockets of all the lane's namespaces, and whose they are.
    fn list(&mut self) -> Result<(), String> {
        let mut tries = 0;
        loop {
            tries += 1;
            let before = self.world.kernels();
            let told = self.told(&self.world.namespaces())?;
            let after = self.world.kernels();
            let (text, lasting) = compare(&before, &told, &after);
            if text.is_empty() {
                let complaints = self.world.book.complaints(&told);
                self.world.book.swept(&after);
                return if complaints.is_empty() {
                    Ok(())
                } else {
                    Err(complaints)
                };
            }
            if lasting || tries == LISTS {
                return Err(text);
            }
        }
    }

    fn told(&self, namespaces: &[u32]) -> Result<Vec<(Row, Value)>, String> {
        let (status, body) = self.all.get("/v1/sockets");
        assert_eq!(status, 200, "{body}");
        let lines = body.lines().filter(|line| line.starts_with('{'));
        let sockets = lines
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
            .filter(|line| line["type"] == "socket");
        let ours = sockets.filter(|line| {
            let of = |netns: &&u32| line["netns"] == **netns;
            namespaces.iter().any(|netns| of(&netns))
        });
        ours.map(|line| Ok((row_of(&line)?, line))).collect()
    }

    /// When its processes have gone, nothing is left in the namespace that went with them; nor is anything at home but
    /// what the kernel has.
    fn left(&mut self, visited: &[u32]) -> Result<(), Wrong> {
        self.settle();
        let mut tries = 0;
        loop {
            tries += 1;
            let before = self.world.kernels();
            let told = self.told(visited).map_err(|text| self.wrong(text))?;
            let after = self.world.kernels();
            // Another's namespace may have the same inode by now; its processes are not in our book.
            let pids = &self.world.book.pids;
            let home = self.world.home;
            let ours = told.into_iter().filter(|(row, line)| {
                let pid = line["pid"].as_u64();
                row.netns == home || pids.iter().any(|(its, _)| pid == Some((*its).into()))
            });
            let told: Vec<(Row, Value)> = ours.collect();
            let (text, lasting) = compare(&before, &told, &after);
            if text.is_empty() {
                return Ok(());
            }
            if (lasting && tries > 1) || tries > LISTS {
                return Err(self.wrong(format!("all have ended: {text}")));
            }
        }
    }
}

/// What differs, and whether no later dump may mend it.
fn compare(before: &Rows, told: &[(Row, Value)], after: &Rows) -> (String, bool) {
    let mut counts: BTreeMap<&Row, usize> = BTreeMap::new();
    for (row, _) in told {
        *counts.entry(row).or_default() += 1;
    }
    let bounds = bounds(before, after);
    let (mut text, mut lasting) = (String::new(), false);
    let all = bounds.keys().chain(counts.keys());
    let all: std::collections::BTreeSet<&Row> = all.copied().collect();
    for row in all {
        let (least, most) = bounds.get(row).copied().unwrap_or_default();
        let count = counts.get(row).copied().unwrap_or_default();
        if !(least..=most).contains(&count) {
            writeln!(
                text,
                "{count} told, the kernel has {least} to {most}: {row:?}"
            )
            .expect("memory");
            lasting |= !is_silent(&row.state);
        }
    }
    (text, lasting)
}

fn seeds(usual: u64) -> Vec<u64> {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(
            text.parse()
                .unwrap_or_else(|_| panic!("{name} is no number: {text:?}")),
        )
    };
    if let Some(one) = number("TCPSTATE_SEED") {
        return vec![one];
    }
    let count = number("TCPSTATE_SEEDS").unwrap_or(usual);
    REGRESSIONS.into_iter().chain(1..=count).collect()
}

/// What all lanes work on.
struct Work {
    seeds: Vec<u64>,
    next: AtomicUsize,
    redone: AtomicUsize,
    failures: Mutex<Vec<String>>,
}

impl Work {
    fn failed(&self, text: String) -> usize {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push(text);
        failures.len()
    }

    /// Until a seed fails, after which the lane begins afresh; tells whether there is more.
    fn lane(&self, number: usize, home: u32, all: &Arc<Daemon>) {
        let mut lane = Lane::new(number, home, Arc::clone(all));
        while let Some(&seed) = self.seeds.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            for tries in 1.. {
                match lane.seed(seed) {
                    Ok(()) => break,
                    Err(Wrong::Lost) if tries < TRIES => {
                        self.redone.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(wrong) => {
                        let text = match wrong {
                            Wrong::Lost => format!("events were lost {TRIES} times"),
                            Wrong::Told(text) => text,
                        };
                        let log = &lane.world.log;
                        let text = format!("seed {seed}, lane {number}:\n{log}{text}");
                        if self.failed(text) >= MOST_FAILURES {
                            self.next.store(self.seeds.len(), Ordering::Relaxed);
                        }
                        return;
                    }
                }
            }
        }
    }
}

fn run(lanes: usize, usual: u64) {
    let work = Arc::new(Work {
        seeds: seeds(usual),
        next: AtomicUsize::new(0),
        redone: AtomicUsize::new(0),
        failures: Mutex::default(),
    });
    let begun = Instant::now();
    let shared = Arc::clone(&work);
    in_namespace(move |_| {
        let all = Arc::new(Daemon::tracing("all", &[]));
        let lane = |number: usize| {
            let (work, all) = (Arc::clone(&shared), Arc::clone(&all));
            thread::spawn(move || {
                while work.next.load(Ordering::Relaxed) < work.seeds.len() {
                    let (work, all) = (Arc::clone(&work), Arc::clone(&all));
                    in_namespace(move |home| work.lane(number, home, &all));
                }
            })
        };
        let lanes: Vec<_> = (0..lanes).map(lane).collect();
        for lane in lanes {
            lane.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    let failures = work.failures.lock().unwrap_or_else(PoisonError::into_inner);
    let (seeds, redone) = (work.seeds.len(), work.redone.load(Ordering::Relaxed));
    let seconds = begun.elapsed().as_secs_f32();
    println!("{seeds} seeds in {seconds:.0} s, {redone} redone");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn gauges_and_owners_of_random_sockets_are_the_kernels() {
    run(LANES, SEEDS);
}

/// Fewer, on an emulated machine.
pub fn few() {
    run(1, 5);
}
