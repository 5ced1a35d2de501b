//! The rounds: in each of them every tool once, one after the other, so that a machine that is slow for a while is so for
//! all. The first does not count, and each has another order.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Error, Result, ensure};

use crate::bpf::{Measuring, Runs};
use crate::figures::{Absent, Measured, Round};
use crate::load::{Close, Load, Loads, Made, NO_SIX, Six};
use crate::tools::{Place, Running, Tool};

/// While the kernel's statistics are on, which cost something themselves.
const IN_KERNEL: Duration = Duration::from_millis(300);
/// Against the load's events. Where there are more of others, it is measured again, so many times in all.
const MOST_FOREIGN: f64 = 0.01;
const TRIES: usize = 3;

/// The loads, and for how long each runs. The bars are about the first.
fn all_loads(processors: usize) -> [(Load, Duration); 3] {
    let alone = Load {
        name: "resets, IPv4, one thread",
        close: Close::Reset,
        six: Six::None,
        threads: 1,
        rate: None,
    };
    [
        (alone, Duration::from_millis(1000)),
        (
            Load {
                name: "closed by both ends, IPv6, one thread",
                close: Close::Full,
                six: Six::All,
                ..alone
            },
            Duration::from_millis(400),
        ),
        (
            Load {
                name: "resets, IPv4 and IPv6, a thread on each processor",
                six: Six::Half,
                threads: processors,
                ..alone
            },
            Duration::from_millis(400),
        ),
    ]
}

/// Those that this host can run; `absent` takes the others.
pub fn loads(loads: &Loads, absent: &mut Vec<Absent>) -> Vec<(Load, Duration)> {
    let mut all = all_loads(loads.most_threads()).to_vec();
    all.retain(|(load, _)| {
        let can = loads.can(load);
        if !can {
            absent.push(Absent {
                what: format!("the load \"{}\"", load.name),
                why: NO_SIX.to_owned(),
            });
        }
        can
    });
    all
}

/// In which order so many are measured in a round: with an even number of them, in as many rounds each comes once right after
/// each other, for it may leave something behind.
pub fn order(many: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..many).map(move |place| {
        let zigzag = match place % 2 {
            0 => many - place / 2,
            _ => place.div_ceil(2),
        };
        (zigzag + round) % many
    })
}

/// Of what can't be measured, or not to its end: what it gave before that stays.
pub fn gone(what: &str, counted: usize, error: &Error) -> Absent {
    let before = match counted {
        0 => String::new(),
        rounds => format!("measured in {rounds} rounds, then no more: "),
    };
    eprintln!("without {what}: {error:#}");
    Absent {
        what: what.to_owned(),
        why: format!("{before}{error:#}"),
    }
}

/// `absent`: takes the peers that can't be had.
pub fn measure(
    place: &Place,
    loads: &[(Load, Duration)],
    rounds: usize,
    absent: &mut Vec<Absent>,
) -> Result<Vec<Measured>> {
    let mut measured = Tool::ALL.map(|tool| Measured {
        tool,
        rounds: Vec::new(),
    });
    let mut without = Vec::new();
    for number in 0..=rounds {
        eprintln!("round {number} of {rounds}");
        for index in order(Tool::ALL.len(), number) {
            let Measured { tool, rounds } = &mut measured[index];
            if without.contains(tool) {
                continue;
            }
            match round(*tool, place, loads) {
                Ok(_) if number == 0 => {}
                Ok(round) => rounds.push(round),
                // A peer that can't be had; the product must work.
                Err(error) if tool.program().is_some() => {
                    absent.push(gone(tool.name(), rounds.len(), &error));
                    without.push(*tool);
                }
                Err(error) => return Err(error.context(tool.name())),
            }
        }
    }
    let measured = measured.into_iter();
    Ok(measured.filter(|it| !it.rounds.is_empty()).collect())
}

fn round(tool: Tool, place: &Place, loads: &[(Load, Duration)]) -> Result<Round> {
    let mut running = Running::start(tool, place)?;
    let begun = running.process.as_ref().map(|it| it.cpu()).transpose()?;
    let mut made = Vec::new();
    for (load, time) in loads {
        made.push(place.loads.run(load, *time)?);
    }
    let (mut cpu, mut memory) = (None, None);
    if let Some((process, begun)) = running.process.as_mut().zip(begun) {
        process.settle()?;
        cpu = Some((process.cpu()? - begun).as_secs_f64());
        memory = Some(process.memory()?);
    }
    let counted = made.len();
    let programs = running.programs()?;
    let kernel = match programs.is_empty() {
        true => None,
        false => Some(in_kernel(&programs, place, &loads[0].0, &mut made)?),
    };
    if let Some(process) = &mut running.process {
        process.settle()?;
    }
    let told = running.finish(&made)?;
    made.truncate(counted);
    Ok(Round {
        made,
        cpu_seconds: cpu,
        kernel_ns: kernel.map(|it| it.ns),
        foreign: kernel.and_then(|it| it.foreign),
        told,
        memory,
    })
}

#[derive(Clone, Copy)]
struct InKernel {
    /// For each transition.
    ns: f64,
    foreign: Option<f64>,
}

/// One program's time is that for each of its runs, whoever made it run. Several run unequally often: their time is that for
/// each transition of the load, to which events of others add. `made`: takes what the load made.
fn in_kernel(
    programs: &BTreeSet<u32>,
    place: &Place,
    load: &Load,
    made: &mut Vec<Made>,
) -> Result<InKernel> {
    let mut best: Option<(f64, f64)> = None;
    for _ in 0..TRIES {
        let measuring = Measuring::begin()?;
        let before = Runs::of(programs)?;
        let under = place.loads.run(load, IN_KERNEL)?;
        let runs = Runs::of(programs)?.since(&before);
        drop(measuring);
        made.push(under);
        let (time, most) = (runs.time_ns() as f64, runs.most());
        ensure!(most > 0, "its eBPF programs did not run under the load");
        if programs.len() == 1 {
            return Ok(InKernel {
                ns: time / most as f64,
                foreign: None,
            });
        }
        let transitions = under.transitions as f64;
        let foreign = most.saturating_sub(under.transitions) as f64 / transitions;
        if best.is_none_or(|(least, _)| foreign < least) {
            best = Some((foreign, time / transitions));
        }
        if foreign <= MOST_FOREIGN {
            break;
        }
    }
    let (foreign, ns) = best.expect("it was tried");
    Ok(InKernel {
        ns,
        foreign: Some(foreign),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_follows_each_other_once() {
        for many in [4, 8] {
            let mut pairs = BTreeSet::new();
            for round in 0..many {
                let all: Vec<usize> = order(many, round).collect();
                assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), many);
                pairs.extend(all.windows(2).map(|pair| (pair[0], pair[1])));
            }
            assert_eq!(pairs.len(), many * (many - 1));
        }
    }

    #[test]
    fn what_was_measured_before_a_failure_is_said() {
        let error = anyhow::anyhow!("it ended");
        assert_eq!(gone("ss", 0, &error).why, "it ended");
        assert_eq!(
            gone("ss", 4, &error).why,
            "measured in 4 rounds, then no more: it ended"
        );
    }
}
