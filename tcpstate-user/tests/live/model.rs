//! Random lives of sockets, and whether the product's every gauge and every owner is right whenever they pause.
//!
//! A seed makes a plan (`driver`), workers carry it out (`worker`), the `book` has what must be told. Each lane has a
//! network namespace of its own for all its seeds, followed by a daemon of its own, so that its gauges count nothing else.
//! They are compared first: the list that the owners are read from has a full dump made, whose corrections then tell what
//! had been wrong. Another daemon follows all namespaces of the host, for those that come and go with a seed: a row of
//! `/v1/sockets` says which one it is of, a gauge doesn't.
//!
//! `TCPSTATE_SEEDS=N` takes N seeds rather than the usual ones, `TCPSTATE_SEED=S` only that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::daemon::{Daemon, Metrics, in_namespace};
use crate::lab::kernel_hides;
use crate::list::STATES;
use crate::sys;
use crate::without::{CLASSIC, WHOLE, flags, knows_holders};

mod book;
mod driver;
mod worker;

use book::{Row, Rows, bounds, is_silent, row_of};
pub use driver::Random;
use driver::{What, World, plan};

/// Seeds that failed once: what waits at a listener was told to be a process's that had left it.
const REGRESSIONS: [u64; 2] = [6, 35];
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
/// What a processor can be away for.
const STOLEN: Duration = Duration::from_millis(100);
/// The step of some seeds before which a daemon begins: between two pauses.
const RESTART: usize = 45;
/// What a dump would mend on its own must not be.
const RECONCILES_NEVER: [&str; 2] = ["--reconcile-interval", "1h"];
/// Lists, each of a dump: what ended silently is in one, and not in the next but one.
const LISTS: usize = 3;

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
    /// What the product does without.
    without: &'static str,
    world: World,
    own: Daemon,
    all: Arc<Daemon>,
    counted: Counted,
    /// The seed has another namespace.
    visits: bool,
    /// How many sockets were right in each state.
    right: BTreeMap<String, usize>,
}

impl Lane {
    fn new(without: &'static str, number: usize, home: u32, all: Arc<Daemon>) -> Self {
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
        let world = World::new(number, home, without == CLASSIC);
        let own = Daemon::without(without, &RECONCILES_NEVER);
        Self {
            without,
            world,
            own,
            all,
            counted: Counted {
                lost: [0.0; 2],
                corrections: 0.0,
            },
            visits: false,
            right: BTreeMap::new(),
        }
    }

    fn seed(&mut self, seed: u64) -> Result<(), Wrong> {
        self.world.begin(seed);
        self.visits = self.world.namespaces().len() > 1;
        let metrics = self.own.metrics();
        self.counted = Counted {
            lost: self.lost(&metrics),
            corrections: metrics.sum("tcpstate_corrections_total"),
        };
        let mut result = Ok(());
        for (number, step) in plan(seed).into_iter().enumerate() {
            if number == RESTART && seed % 4 == 1 && knows_holders(self.without) {
                self.restart();
            }
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

    /// Another daemon takes the place of the lane's: what is there by now is older than all that it sees.
    fn restart(&mut self) {
        self.own.end();
        let there = book::kernels(self.world.home, "thread-self");
        self.own = Daemon::without(self.without, &RECONCILES_NEVER);
        self.world.book.restarted(self.world.home, &there);
        self.counted = Counted {
            lost: self.lost(&self.own.metrics()),
            corrections: 0.0,
        };
    }

    /// Of what the seed depends on.
    fn lost(&self, own: &Metrics) -> [f64; 2] {
        let lost = "tcpstate_events_lost_total";
        let all = if self.visits {
            self.all.metrics().sum(lost)
        } else {
            0.0
        };
        [own.sum(lost), all]
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
        if !knows_holders(self.without) {
            return self.pause_with_ends_alone();
        }
        // At once, as far as events tell.
        self.gauges_of_events().map_err(|text| self.wrong(text))?;
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

    /// Dumps are joined with events by ends: what began or ended while one was made is right two dumps later, and nothing is
    /// learned from them. The classic tracepoint shows the sockets of other namespaces too, which the gauges count.
    fn pause_with_ends_alone(&mut self) -> Result<(), Wrong> {
        self.list().map_err(|text| self.wrong(text))?;
        let limit = Instant::now() + SILENT_LIMIT;
        while self.without != CLASSIC
            && let Err(text) = self.gauges(|_| true)
        {
            if Instant::now() > limit {
                return Err(self.wrong(text));
            }
            thread::sleep(Duration::from_millis(100));
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

    /// At the second look, for what ends has left the kernel's tables before the event that tells of it (`tcp_set_state`
    /// unhashes, then traces), and others' records may be on their way before that in the ring: microseconds, but on a
    /// processor that others take away. What a dump would have repaired between the two is a correction.
    fn gauges_of_events(&self) -> Result<(), String> {
        let look = || self.gauges(|state| !is_silent(state));
        look().or_else(|first| {
            thread::sleep(STOLEN);
            look().map_err(|then| format!("{first}{STOLEN:?} later:\n{then}"))?;
            println!("right at the second look: {first}");
            Ok(())
        })
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
        // CLOSE has no gauge.
        let gauges = STATES
            .into_iter()
            .filter(|state| !["", "CLOSE"].contains(state));
        for state in gauges.filter(|state| wanted(state)) {
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
            let (text, lasting) = self.compare(&before, &told, &after);
            if text.is_empty() {
                let book = &mut self.world.book;
                let complaints = if knows_holders(self.without) {
                    book.complaints(&told)
                } else {
                    book.strangers(&told)
                };
                book.swept(&after);
                if !complaints.is_empty() {
                    return Err(complaints);
                }
                // Of one daemon's, which may give a name that is another daemon's too.
                let ids = told
                    .iter()
                    .map(|(row, it)| (row.netns == self.world.home, it["id"].as_str()));
                let ids: BTreeSet<_> = ids.collect();
                if ids.len() != told.len() {
                    return Err(format!("{} ids of {} sockets", ids.len(), told.len()));
                }
                for (row, _) in &told {
                    *self.right.entry(row.state.clone()).or_default() += 1;
                }
                return Ok(());
            }
            if (lasting && knows_holders(self.without)) || tries == LISTS {
                return Err(text);
            }
        }
    }

    fn compare(&self, before: &Rows, told: &[(Row, Value)], after: &Rows) -> (String, bool) {
        if knows_holders(self.without) {
            return compare(before, told, after);
        }
        let [before, after] = [before, after].map(|rows| {
            let mut known = Rows::new();
            for (row, count) in rows {
                *known.entry(row.clone().by_events()).or_default() += count;
            }
            known
        });
        compare(&before, told, &after)
    }

    /// What a line says of a socket.
    fn row_of(&self, line: &Value) -> Result<Row, String> {
        if knows_holders(self.without) {
            row_of(line, None)
        } else {
            row_of(line, Some(0)).map(Row::by_events)
        }
    }

    /// Of the lane's namespace its own daemon tells, of another the one that follows all.
    fn told(&self, namespaces: &[u32]) -> Result<Vec<(Row, Value)>, String> {
        if self.world.alone {
            return self.told_of_addresses();
        }
        let home = [self.world.home];
        let others: Vec<u32> = namespaces
            .iter()
            .copied()
            .filter(|it| !home.contains(it))
            .collect();
        let mut told: Vec<Value> = listed_in(&self.own, &home).collect();
        if !others.is_empty() {
            told.extend(listed_in(&self.all, &others));
        }
        let with_row = |line: Value| Ok((self.row_of(&line)?, line));
        told.into_iter().map(with_row).collect()
    }

    /// Where no namespace is told.
    fn told_of_addresses(&self) -> Result<Vec<(Row, Value)>, String> {
        let ours = listed(&self.own).filter(|line| {
            let ends = ["local_addr", "remote_addr"].map(|end| line[end].as_str());
            let ends = ends.map(|end| end.and_then(|text| text.parse().ok()));
            ends.into_iter().any(|end| self.world.is_ours(end))
        });
        let netns = self.world.home;
        let at_home = |line: Value| {
            Ok((
                Row {
                    netns,
                    ..self.row_of(&line)?
                },
                line,
            ))
        };
        ours.map(at_home).collect()
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
            let (text, lasting) = self.compare(&before, &told, &after);
            if text.is_empty() {
                return Ok(());
            }
            if (lasting && tries > 1) || tries > LISTS {
                return Err(self.wrong(format!("all have ended: {text}")));
            }
        }
    }
}

fn listed(daemon: &Daemon) -> impl Iterator<Item = Value> {
    let (status, body) = daemon.get("/v1/sockets");
    assert_eq!(status, 200, "{body}");
    let lines = body.lines().filter(|line| line.starts_with('{'));
    let lines = lines.map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let sockets: Vec<Value> = lines.filter(|line| line["type"] == "socket").collect();
    sockets.into_iter()
}

fn listed_in(daemon: &Daemon, namespaces: &[u32]) -> impl Iterator<Item = Value> {
    listed(daemon).filter(|line| namespaces.iter().any(|netns| line["netns"] == *netns))
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
    let all: BTreeSet<&Row> = all.copied().collect();
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
    let others = (1..=count).filter(|seed| !REGRESSIONS.contains(seed));
    REGRESSIONS.into_iter().chain(others).collect()
}

/// What all lanes work on.
struct Work {
    without: &'static str,
    seeds: Vec<u64>,
    next: AtomicUsize,
    /// Seeds that failed where the kernel may have hidden an event, and are to be done once more: why they failed.
    again: Mutex<Vec<(u64, String)>>,
    /// How many of these are being done, or have been.
    taken_again: AtomicUsize,
    passed: AtomicUsize,
    redone: AtomicUsize,
    opened: AtomicUsize,
    failures: Mutex<Vec<String>>,
    right: Mutex<BTreeMap<String, usize>>,
}

impl Work {
    fn failed(&self, text: String) -> usize {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push(text);
        failures.len()
    }

    fn again(&self) -> MutexGuard<'_, Vec<(u64, String)>> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<u64> {
        let again = self.again();
        let taken = self.taken_again.load(Ordering::Relaxed);
        if let Some((seed, _)) = again.get(taken) {
            self.taken_again.store(taken + 1, Ordering::Relaxed);
            return Some(*seed);
        }
        drop(again);
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        self.seeds.get(next).copied()
    }

    fn is_done(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= self.seeds.len()
            && self.taken_again.load(Ordering::Relaxed) >= self.again().len()
    }

    /// Whether the kernel may have hidden an event from the seed that failed, and it is to be done once more.
    fn may_be_hidden(&self, seed: u64, text: &str) -> bool {
        let mut again = self.again();
        let first = again.iter().all(|(known, _)| *known != seed);
        let may = kernel_hides() && first && again.len() < MOST_FAILURES;
        if may {
            again.push((seed, text.to_owned()));
        }
        may
    }

    /// Until a seed fails, after which the lane begins afresh.
    fn lane(&self, number: usize, home: u32, all: &Arc<Daemon>) {
        let mut lane = Lane::new(self.without, number, home, Arc::clone(all));
        while let Some(seed) = self.next() {
            let result = self.until_nothing_is_lost(&mut lane, seed);
            let right = std::mem::take(&mut lane.right);
            let opened = std::mem::take(&mut lane.world.book.added);
            self.opened.fetch_add(opened, Ordering::Relaxed);
            let mut all = self.right.lock().unwrap_or_else(PoisonError::into_inner);
            for (state, count) in right {
                *all.entry(state).or_default() += count;
            }
            if let Err(text) = result {
                if self.may_be_hidden(seed, &text) {
                    return;
                }
                let log = &lane.world.log;
                if self.failed(format!("seed {seed}, lane {number}:\n{log}{text}")) >= MOST_FAILURES
                {
                    self.next.store(self.seeds.len(), Ordering::Relaxed);
                }
                return;
            }
        }
    }

    fn until_nothing_is_lost(&self, lane: &mut Lane, seed: u64) -> Result<(), String> {
        for _ in 0..TRIES {
            match lane.seed(seed) {
                Ok(()) => {
                    self.passed.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                Err(Wrong::Told(text)) => return Err(text),
                Err(Wrong::Lost) => self.redone.fetch_add(1, Ordering::Relaxed),
            };
        }
        Err(format!("events were lost {TRIES} times"))
    }
}

fn run(without: &'static str, lanes: usize, usual: u64) {
    let work = Arc::new(Work {
        without,
        seeds: seeds(usual),
        next: AtomicUsize::new(0),
        again: Mutex::default(),
        taken_again: AtomicUsize::new(0),
        passed: AtomicUsize::new(0),
        redone: AtomicUsize::new(0),
        opened: AtomicUsize::new(0),
        failures: Mutex::default(),
        right: Mutex::default(),
    });
    let begun = Instant::now();
    let shared = Arc::clone(&work);
    in_namespace(move |_| {
        if without == CLASSIC {
            sys::mount_tracefs().expect("tracefs in a mount namespace needs root");
        }
        let all = Arc::new(Daemon::tracing("all", &flags(without)));
        let lane = |number: usize| {
            let (work, all) = (Arc::clone(&shared), Arc::clone(&all));
            thread::spawn(move || {
                while !work.is_done() {
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
    let seeds = work.seeds.len();
    let passed = work.passed.load(Ordering::Relaxed);
    let redone = work.redone.load(Ordering::Relaxed);
    let opened = work.opened.load(Ordering::Relaxed);
    let seconds = begun.elapsed().as_secs_f32();
    let right = work.right.lock().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{passed} of {seeds} seeds passed in {seconds:.0} s, {redone} redone; {opened} sockets were opened or accepted; \
         right were {right:?}"
    );
    for (seed, text) in work.again().iter() {
        println!("seed {seed} was done once more, for this kernel hides events: {text}");
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn gauges_and_owners_of_random_sockets_are_the_kernels() {
    run(WHOLE, LANES, SEEDS);
}

/// Those that failed once, and some more.
pub fn few(without: &'static str) {
    run(without, LANES, 3);
}
