//! The time of day is set by an hour, and the machine sleeps: what is told of stays, and when, is right all the same. Only
//! on a machine that is ours alone.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use serde_json::Value;

use crate::daemon::{Daemon, LOOPBACK, in_namespace};
use crate::dwell::{
    Seen, Stay, TICK, TIME_WAIT, TIME_WAIT_NS, TRIES, dwells, ends, now, when, when_shown,
};
use crate::faults::until_right;
use crate::lab::{is_guest, not_applicable, proc_states};
use crate::sockets::{Pair, connect_to_nobody};
use crate::tracer::Tracer;

const HOUR: i64 = 3600;
/// After which all that is told has the time of day that was set: the offset is read each second, and ages are a second old
/// at most.
const FOLLOWS: Duration = Duration::from_secs(3);

/// Nanoseconds since 1970.
fn unix() -> i128 {
    let time = clock_gettime(ClockId::Realtime);
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

fn set_ahead(seconds: i64) {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Realtime);
    let time = Timespec {
        tv_sec: tv_sec + seconds,
        tv_nsec,
    };
    clock_settime(ClockId::Realtime, time).expect("root sets the clock");
}

/// How far the clock that goes on in sleep is before the one that does not.
fn slept() -> Duration {
    let [all, awake] = [ClockId::Boottime, ClockId::Monotonic]
        .map(|clock| Duration::try_from(clock_gettime(clock)).expect("not negative"));
    all.saturating_sub(awake)
}

/// Has the kernel do all of a sleep but to turn off the machine, which is awake again after five seconds
/// (`suspend_test`, kernel/power/suspend.c).
fn sleep() -> io::Result<Duration> {
    let before = slept();
    fs::write("/sys/power/mem_sleep", "deep")?;
    fs::write("/sys/power/pm_test", "core")?;
    fs::write("/sys/power/state", "mem")?;
    fs::write("/sys/power/pm_test", "none")?;
    Ok(slept() - before)
}

fn time_of(line: &Value) -> i128 {
    let time = line["time"].as_str().expect("a string");
    let time: jiff::Timestamp = time.parse().expect("a time");
    time.as_nanosecond()
}

/// The sockets that live while the clocks do what they do, and who tells of them.
struct Watched {
    daemon: Daemon,
    /// One by the daemon, one on its own.
    watches: [Tracer; 2],
    skipped: Arc<AtomicBool>,
    seen: Seen,
    /// In TIME_WAIT, but for its end.
    closed: Stay,
    pair: Pair,
    open: Stay,
}

impl Watched {
    fn new() -> Self {
        let daemon = Daemon::start(&["--reconcile-interval", "1s"]);
        let socket = daemon.socket.to_str().expect("text");
        let skipped = Arc::new(AtomicBool::new(false));
        let watch = |from: &[&str]| {
            let arguments = ["watch", "-o", "json", "--netns", "self"];
            Tracer::start(&[&arguments, from].concat(), Arc::clone(&skipped))
        };
        let watches = [watch(&["--socket", socket]), watch(&["--direct"])];
        let mut seen = Seen::default();
        let (near, far, entered) = crate::dwell::closes(&mut seen);
        let closed = Stay {
            local: near,
            remote: Some(far),
            state: "TIME_WAIT",
            entered,
            left: entered,
        };
        let (opened, pair) = when(|| Pair::new(LOOPBACK));
        let open = Stay {
            local: pair.near,
            remote: Some(pair.far),
            state: "ESTABLISHED",
            entered: opened,
            left: opened,
        };
        Self {
            daemon,
            watches,
            skipped,
            seen,
            closed,
            pair,
            open,
        }
    }

    /// What happens now is told with the time of day, or with one that is `also` later by so many seconds.
    fn lines_have_the_time(&self, also: i64) {
        let before = unix();
        let port = connect_to_nobody(SocketAddr::new(LOOPBACK, 9));
        let after = unix();
        let tick = i128::from(TICK);
        for watch in &self.watches {
            watch.wait_for("the failure, with its time", |line| {
                if line["local_port"] != port || line["to"] != "CLOSE" {
                    return false;
                }
                let time = time_of(line);
                let other = time - i128::from(also) * 1_000_000_000;
                let fits = |time| (before - tick..=after + tick).contains(&time);
                assert!(fits(time) || fits(other), "{before} to {after}: {line}");
                true
            });
        }
    }

    /// Gauges and lists have the time of day, and ages have nothing to do with it.
    fn ages_are_right(&self) {
        let offset = unix() - i128::from(now());
        let opened = self.open.entered;
        let entered = [opened.before - TICK, opened.after + TICK];
        let entered = entered.map(|at| i128::from(at) + offset);
        let entered = entered[0]..=entered[1];
        let comm = fs::read_to_string("/proc/self/comm").expect("/proc is mounted");
        let labels = format!("{{comm=\"{}\",state=\"established\"}}", comm.trim());
        let oldest = "tcpstate_process_oldest_state_entry_timestamp_seconds";
        let metrics = self.daemon.metrics();
        let told = (metrics.get(&format!("{oldest}{labels}")) * 1e9) as i128;
        assert!(entered.contains(&told), "{told}, not in {entered:?}");
        let aged = metrics.0.iter().filter(|(series, _)| {
            series.starts_with("tcpstate_process_sockets_aged{") && series.contains("\"1h\"")
        });
        assert!(aged.clone().count() > 0);
        for (series, count) in aged {
            assert_eq!(*count, 0.0, "{series}");
        }

        let before = now();
        let (status, body) = self.daemon.get("/v1/sockets?state=established");
        let after = now();
        assert_eq!(status, 200, "{body}");
        let lines = body.lines().filter(|line| line.starts_with('{'));
        let mut rows = lines.map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let row = rows.find(|row| row["local_port"] == self.pair.near.port());
        let row = row.unwrap_or_else(|| panic!("not listed: {body}"));
        let age = row["age_ns"].as_u64().expect("an age");
        let ages = before - opened.after - TICK..=after - opened.before + TICK;
        assert!(ages.contains(&age), "not in {ages:?}: {row}");
        let since = row["since"].as_str().expect("a string");
        let since: jiff::Timestamp = since.parse().expect("a time");
        assert!(entered.contains(&since.as_nanosecond()), "{row}");
    }

    /// All have ended, and every stay was told as long as it was. Whether nothing was lost.
    fn end(self) -> bool {
        let Self {
            daemon,
            watches,
            skipped,
            mut seen,
            mut closed,
            pair,
            mut open,
        } = self;
        let follows = daemon.metrics().uses("time_wait_fentry");
        pair.client.reset_on_close();
        (open.left, ()) = when(|| drop(pair.client));
        pair.server.wait_for_error();
        let port = closed.local.port();
        closed.left = when_shown(|| !proc_states(port).contains(&TIME_WAIT));
        println!(
            "in TIME_WAIT for {:?}",
            Duration::from_nanos(closed.left.after - closed.entered.before)
        );
        seen.stays.push(open);
        until_right(&daemon);
        let mut all_told = true;
        for watch in watches {
            // Where no event tells of the end, a dump does: each 30 s of a watch's own.
            watch.wait_until(Duration::from_secs(45), |lines| {
                lines.iter().any(|line| closed.is(line))
            });
            let (_, lines, _) = watch.stop();
            if skipped.load(Ordering::Relaxed) {
                all_told = false;
                continue;
            }
            for stay in &seen.stays {
                dwells(stay, &lines, follows);
            }
            ends(&closed, TIME_WAIT_NS, &lines, follows);
        }
        all_told
    }
}

fn until_nothing_is_lost(test: impl Fn() -> bool + Send + 'static) {
    in_namespace(move |_| {
        let done = (0..TRIES).any(|_| test());
        assert!(done, "the kernel skipped the program {TRIES} times");
    });
}

#[test]
fn a_clock_that_is_set_changes_times_and_no_dwell() {
    if !is_guest() {
        not_applicable("sets the clock: only in a machine that `cargo xtask vm` booted");
        return;
    }
    until_nothing_is_lost(|| {
        let watched = Watched::new();
        watched.lines_have_the_time(0);
        watched.ages_are_right();
        for hours in [1, -1] {
            set_ahead(hours * HOUR);
            watched.lines_have_the_time(-hours * HOUR);
            thread::sleep(FOLLOWS);
            watched.lines_have_the_time(0);
            watched.ages_are_right();
        }
        watched.end()
    });
}

#[test]
fn a_sleep_of_the_machine_is_part_of_a_stay() {
    if !is_guest() {
        not_applicable("puts the machine to sleep: only one that `cargo xtask vm` booted");
        return;
    }
    until_nothing_is_lost(|| {
        let watched = Watched::new();
        let gap = match sleep() {
            Ok(gap) if gap > Duration::from_secs(1) => gap,
            result => {
                not_applicable(&format!("this kernel was not had to sleep: {result:?}"));
                return true;
            }
        };
        println!("the machine slept for {gap:?}");
        // The offset is another one if the two clocks did not go on alike.
        thread::sleep(FOLLOWS);
        watched.lines_have_the_time(0);
        watched.ages_are_right();
        let slept = watched.open.entered.after + gap.as_nanos() as u64;
        assert!(now() > slept, "the sleep is no part of the stay");
        until_right(&watched.daemon);
        watched.end()
    });
}
