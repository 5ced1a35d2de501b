//! The rounds: in each of them every tool once, one after the other, so that a machine that is slow for a while is so for
//! all. The first does not count, and each begins with another tool.

use std::time::Duration;

use anyhow::Result;

use crate::bpf::{Measuring, Runs};
use crate::figures::{Absent, Measured, Round};
use crate::load::{Close, Load, Six};
use crate::tools::{Place, Running, Tool};

/// While the kernel's statistics are on, which cost something themselves.
const IN_KERNEL: Duration = Duration::from_millis(300);

/// The loads, and for how long each runs. The bars are about the first.
pub fn loads(processors: usize) -> [(Load, Duration); 3] {
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

/// `absent`: takes the peers that can't be had.
pub fn measure(place: &Place, rounds: usize, absent: &mut Vec<Absent>) -> Result<Vec<Measured>> {
    let mut measured: Vec<Measured> = Tool::ALL
        .map(|tool| Measured {
            tool,
            rounds: Vec::new(),
        })
        .into();
    for number in 0..=rounds {
        eprintln!("round {number} of {rounds}");
        let order = Tool::ALL.iter().cycle().skip(number).take(Tool::ALL.len());
        for &tool in order {
            let Some(place_in) = measured.iter().position(|it| it.tool == tool) else {
                continue;
            };
            match round(tool, place) {
                Ok(_) if number == 0 => {}
                Ok(round) => measured[place_in].rounds.push(round),
                // A peer that can't be had; the product must work.
                Err(error) if tool.program().is_some() => {
                    eprintln!("without {}: {error:#}", tool.name());
                    absent.push(Absent {
                        what: tool.name().to_owned(),
                        why: format!("{error:#}"),
                    });
                    measured.remove(place_in);
                }
                Err(error) => return Err(error.context(tool.name())),
            }
        }
    }
    Ok(measured)
}

fn round(tool: Tool, place: &Place) -> Result<Round> {
    let mut running = Running::start(tool, place)?;
    let begun = running.process.as_ref().map(|it| it.cpu()).transpose()?;
    let mut made = Vec::new();
    let loads = loads(place.loads.most_threads());
    for (load, time) in &loads {
        made.push((load.close, place.loads.run(load, *time)?));
    }
    let (mut cpu, mut memory) = (None, None);
    if let Some((process, begun)) = running.process.as_mut().zip(begun) {
        process.settle()?;
        cpu = Some((process.cpu()? - begun).as_secs_f64());
        memory = Some(process.memory()?);
    }
    let counted = made.len();
    let programs = running.programs()?;
    let mut kernel_ns = None;
    if !programs.is_empty() {
        let (load, _) = loads[0];
        let measuring = Measuring::begin()?;
        let before = Runs::of(&programs)?;
        let under = place.loads.run(&load, IN_KERNEL)?;
        let runs = Runs::of(&programs)?.since(before);
        drop(measuring);
        kernel_ns = Some(runs.time_ns as f64 / under.transitions as f64);
        made.push((load.close, under));
    }
    if let Some(process) = &mut running.process {
        process.settle()?;
    }
    let told = running.finish(&made)?;
    Ok(Round {
        made: made.iter().take(counted).map(|&(_, made)| made).collect(),
        cpu_seconds: cpu,
        kernel_ns,
        told,
        memory,
    })
}
