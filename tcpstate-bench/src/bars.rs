//! The bars that tcpstate is held to, each with what was measured, and whether it is met.

use crate::figures::{DOUBLED, Measured, Replay, Results};
use crate::load::Made;
use crate::spread::{Spread, quantile};
use crate::tools::Tool;
use crate::words::{grouped, or_dash};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Met,
    NotMet,
    /// There is no bar: it is to be said.
    Said,
    /// And why.
    Unknown(String),
}

impl Verdict {
    const fn of(met: bool) -> Self {
        if met { Self::Met } else { Self::NotMet }
    }
}

pub struct Bar {
    pub what: &'static str,
    pub bar: &'static str,
    pub measured: String,
    pub verdict: Verdict,
}

const MEGABYTE: f64 = 1e6;
const SOCKETS: u64 = 100_000;
/// Between the quartiles of untraced connections against untraced ones.
const RESTLESS: f64 = 0.05;
/// For so long the stream must be whole.
const LONG: f64 = 60.0;

pub fn bars(results: &Results) -> Vec<Bar> {
    let daemon = results.tool(Tool::Daemon);
    let both = daemon.zip(results.tool(Tool::Floor));
    vec![
        by_clock(results, both),
        of_work(both),
        spread(
            "in-kernel time a transition, against the empty program",
            "≤ 3.5 ×; goal 2.6 ×",
            both.and_then(|(daemon, floor)| daemon.kernel_against(floor)),
            |ratio| format!("{ratio:.2} ×"),
            |median| median <= 3.5,
        ),
        spread(
            "the daemon's user and system time for a million transitions, everything on",
            "≤ 0.30 s",
            daemon.and_then(Measured::cpu),
            |seconds| format!("{seconds:.2} s"),
            |median| median <= 0.30,
        ),
        pipe(results),
        idle(results),
        per_socket(results),
        peak(results),
        page(results),
        spread(
            "start to first event",
            "≤ 300 ms",
            slowest_start(results),
            |seconds| format!("{:.0} ms", seconds.map(|it| it * 1e3)),
            |median| median <= 0.3,
        ),
        replay(results),
    ]
}

/// With few sockets open, and with many: the slower one counts.
fn replay(results: &Results) -> Bar {
    let (what, bar) = (
        "replay of a synthetic stream through table and statistics, one core",
        "≥ 10 million transitions a second",
    );
    let slowest = results.replays.iter().map(|replay| replay.median);
    let Some(slowest) = slowest.min_by(f64::total_cmp) else {
        return unmeasured(what, bar);
    };
    let shown = results.replays.iter().map(|replay| {
        let Replay {
            median,
            least,
            most,
            open,
        } = replay;
        format!(
            "{median:.1} million (from {least:.1} to {most:.1}) with {} sockets open",
            grouped(*open)
        )
    });
    Bar {
        what,
        bar,
        measured: shown.collect::<Vec<_>>().join("; "),
        verdict: Verdict::of(slowest >= 10.0),
    }
}

/// Undecided where untraced connections differ as much from each other as the bar is about.
fn by_clock(results: &Results, both: Option<(&Measured, &Measured)>) -> Bar {
    let mut bar = spread(
        "connections a second with the daemon, against the empty program",
        "≥ 0.96; goal 0.975",
        both.and_then(|(daemon, floor)| daemon.rate_against(floor, 0, Made::rate)),
        |ratio| format!("{ratio:.3}"),
        |median| median >= 0.96,
    );
    let untraced = results
        .tool(Tool::UntracedAgain)
        .zip(results.tool(Tool::Untraced))
        .and_then(|(again, untraced)| again.rate_against(untraced, 0, Made::rate));
    if let Some(untraced) = untraced.filter(|it| it.high - it.low > RESTLESS) {
        bar.verdict = Verdict::Unknown(format!(
            "the machine was not quiet, untraced against itself is {untraced:.3}"
        ));
    }
    bar
}

/// What a busy machine leaves as it is.
fn of_work(both: Option<(&Measured, &Measured)>) -> Bar {
    let ratio = both.and_then(|(daemon, floor)| daemon.rate_against(floor, 0, Made::rate_of_work));
    let mut bar = spread(
        "the same, for each second of the load's own processor time",
        "to be said",
        ratio,
        |ratio| format!("{ratio:.3}"),
        |_| true,
    );
    if ratio.is_some() {
        bar.verdict = Verdict::Said;
    }
    bar
}

fn spread(
    what: &'static str,
    bar: &'static str,
    spread: Option<Spread>,
    shown: impl Fn(Spread) -> String,
    met: impl Fn(f64) -> bool,
) -> Bar {
    Bar {
        what,
        bar,
        measured: spread.map_or("-".to_owned(), shown),
        verdict: spread.map_or(Verdict::Unknown("not measured".to_owned()), |spread| {
            Verdict::of(met(spread.median))
        }),
    }
}

/// A bar of which nothing was measured.
fn unmeasured(what: &'static str, bar: &'static str) -> Bar {
    spread(what, bar, None, |_| String::new(), |_| false)
}

/// Of the product's two ways the one that takes longer.
fn slowest_start(results: &Results) -> Option<Spread> {
    let ours = [Tool::Daemon, Tool::Watch].map(|tool| {
        let start = results.starts.iter().find(|it| it.name == tool.name())?;
        Spread::of(&start.seconds)
    });
    let [daemon, watch] = ours;
    let (daemon, watch) = (daemon?, watch?);
    Some(if daemon.median > watch.median {
        daemon
    } else {
        watch
    })
}

fn pipe(results: &Results) -> Bar {
    let (what, bar) = (
        "`watch -o json` into a pipe whose reader counts and discards: lost at 200,000 transitions a second for 60 s",
        "0",
    );
    let Some(pipe) = &results.pipe else {
        return unmeasured(what, bar);
    };
    let rate = pipe.made.transitions as f64 / pipe.made.seconds;
    let missing = pipe.missing();
    let seconds = pipe.made.seconds;
    Bar {
        what,
        bar,
        measured: format!(
            "{} of {} lost, in {seconds:.0} s at {} a second",
            grouped(missing),
            grouped(pipe.made.transitions),
            grouped(rate as u64)
        ),
        verdict: if missing > 0 {
            Verdict::NotMet
        } else if rate < 0.99 * pipe.wanted as f64 {
            Verdict::Unknown("this load does not make as many here".to_owned())
        } else if seconds < LONG {
            Verdict::Unknown(format!("{seconds:.0} s; `--long` has 60"))
        } else {
            Verdict::Met
        },
    }
}

fn idle(results: &Results) -> Bar {
    let (what, bar) = (
        "anonymous memory, idle (the ring told apart below)",
        "≤ 6 MB",
    );
    let Some(growth) = &results.memory else {
        return unmeasured(what, bar);
    };
    let idle = growth.idle.anonymous as f64 / MEGABYTE;
    Bar {
        what,
        bar,
        measured: format!("{idle:.1} MB"),
        verdict: Verdict::of(idle <= 6.0),
    }
}

/// Of anonymous memory above that of an idle daemon: with 100,000 sockets, and the most just past a doubling.
fn per_socket(results: &Results) -> Bar {
    let (what, bar) = (
        "a socket's memory at 100,000 sockets, and just past each doubling of the table",
        "≤ 200 B",
    );
    let Some(growth) = &results.memory else {
        return unmeasured(what, bar);
    };
    let each = |&(sockets, memory): &(u64, crate::process::Memory)| {
        let grown = memory.anonymous.saturating_sub(growth.idle.anonymous);
        (sockets, grown as f64 / sockets as f64)
    };
    let at = growth
        .settled
        .iter()
        .find(|(sockets, _)| *sockets == SOCKETS);
    let most = growth
        .settled
        .iter()
        .filter(|(sockets, _)| DOUBLED.contains(sockets))
        .map(each)
        .max_by(|one, other| one.1.total_cmp(&other.1));
    let Some(((_, at), (sockets, most))) = at.map(each).zip(most) else {
        return unmeasured(what, bar);
    };
    Bar {
        what,
        bar,
        measured: format!(
            "{at:.0} B; the most past a doubling, {most:.0} B with {} sockets",
            grouped(sockets)
        ),
        verdict: Verdict::of(at <= 200.0 && most <= 200.0),
    }
}

fn peak(results: &Results) -> Bar {
    let (what, bar) = ("its peak while the table grows", "to be said");
    let Some(growth) = &results.memory else {
        return unmeasured(what, bar);
    };
    let last = growth.settled.last().map(|(sockets, _)| *sockets);
    let Some(sockets) = last.filter(|sockets| DOUBLED.contains(sockets)) else {
        return unmeasured(what, bar);
    };
    Bar {
        what,
        bar,
        measured: format!(
            "{:.1} MB, growing to {} sockets",
            growth.peak as f64 / MEGABYTE,
            grouped(sockets)
        ),
        verdict: Verdict::Said,
    }
}

fn page(results: &Results) -> Bar {
    let (what, bar) = (
        "`/metrics` at the cap of names, without the filtered dump; scrapes at once share one; the drain never waits for it",
        "≤ 15 ms; less than half of what as many pages would cost; 0 missing",
    );
    let Some(page) = &results.page else {
        return unmeasured(what, bar);
    };
    let mut alone = page.alone.clone();
    alone.sort_by(f64::total_cmp);
    let Some(((median, worst), together)) = quantile(&alone, 0.5)
        .zip(alone.last())
        .zip(Spread::of(&page.cpu_at_once).zip(Spread::of(&page.cpu_alone)))
    else {
        return unmeasured(what, bar);
    };
    let (at_once, one) = together;
    let times = at_once.median / one.median;
    let slowest = Spread::of(&page.slowest).map(|slowest| slowest.map(|it| it * 1e3));
    let mut measured = format!(
        "{:.1} ms, at worst {:.1}, for {} kB; of {} at once the slowest {} ms, all cost {times:.1} × the processor time of one",
        median * 1e3,
        worst * 1e3,
        page.bytes / 1000,
        page.at_once,
        or_dash(slowest.map(|slowest| format!("{slowest:.1}"))),
    );
    let met = median <= 0.015 && times < page.at_once as f64 / 2.0;
    let verdict = match &page.beside_load {
        Some(beside) => {
            let missing = beside.told.missing();
            measured += &format!(
                "; {} of {} transitions missing beside {} pages",
                grouped(missing),
                grouped(beside.told.expected),
                grouped(beside.pages)
            );
            Verdict::of(met && missing == 0)
        }
        None if met => Verdict::Unknown("whether the drain waits was not measured".to_owned()),
        None => Verdict::NotMet,
    };
    Bar {
        what,
        bar,
        measured,
        verdict,
    }
}
