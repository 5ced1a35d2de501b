//! What was measured: each figure of each round, as it is kept in the JSON file, and what is said of all rounds of a tool.
//!
//! Pure. What could not be measured is absent, never 0.

use serde::{Deserialize, Serialize};

use crate::load::Made;
use crate::process::Memory;
use crate::spread::Spread;
use crate::tools::Tool;

/// A run, as far as it went.
#[derive(Default, Serialize, Deserialize)]
pub struct Results {
    /// Of the day on which it was measured.
    pub date: String,
    pub machine: Machine,
    /// The product's, and its peers', as they say themselves.
    pub versions: Vec<(String, String)>,
    /// Of the kernel's features those that the product lacks here, in its own words.
    pub lacks: Vec<String>,
    pub rounds: usize,
    pub loads: Vec<String>,
    pub tools: Vec<Measured>,
    /// Of tools and parts: what was not measured, and why.
    pub absent: Vec<Absent>,
    pub crowd: Option<Crowd>,
    pub memory: Option<Growth>,
    pub delays: Vec<Delay>,
    pub starts: Vec<Start>,
    pub pipe: Option<Pipe>,
    pub page: Option<Page>,
    pub replays: Vec<Replay>,
}

#[derive(Default, Serialize, Deserialize)]
pub struct Machine {
    pub kernel: Option<String>,
    pub processors: usize,
    pub model: Option<String>,
    pub hypervisor: Option<bool>,
    pub clocksource: Option<String>,
    pub jit: Option<String>,
    pub spectre_v2: Option<String>,
    pub load_before: Option<f64>,
    pub load_after: Option<f64>,
}

#[derive(Serialize, Deserialize)]
pub struct Absent {
    pub what: String,
    pub why: String,
}

/// One tool in all rounds.
#[derive(Serialize, Deserialize)]
pub struct Measured {
    pub tool: Tool,
    pub rounds: Vec<Round>,
}

#[derive(Serialize, Deserialize)]
pub struct Round {
    /// In the order of [`Results::loads`].
    pub made: Vec<Made>,
    /// User and system time of its process, for these loads.
    pub cpu_seconds: Option<f64>,
    /// In its eBPF programs, for each transition.
    pub kernel_ns: Option<f64>,
    /// Events of others while that was measured, against the load's; `None` of one program, whose runs the kernel counts.
    #[serde(default)]
    pub foreign: Option<f64>,
    pub told: Option<Told>,
    /// After the loads.
    pub memory: Option<Memory>,
}

/// Whether a tool told of all that happened.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// What it should tell of, by what the load made.
    pub expected: u64,
    pub told: u64,
    /// What it says itself that it lost.
    pub said_lost: u64,
}

/// The same over all rounds. What was told too often in one of them makes up for nothing in another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ToldInAll {
    pub expected: u64,
    pub missing: u64,
    pub of_others: u64,
    pub said_lost: u64,
}

impl Told {
    pub const fn missing(self) -> u64 {
        self.expected.saturating_sub(self.told)
    }
}

/// Beside so many sockets.
#[derive(Serialize, Deserialize)]
pub struct Crowd {
    pub sockets: u64,
    pub pollers: Vec<Poller>,
}

#[derive(Serialize, Deserialize)]
pub struct Poller {
    pub name: String,
    pub rounds: Vec<Poll>,
}

#[derive(Serialize, Deserialize)]
pub struct Poll {
    pub made: Made,
    /// Of a processor, for each second.
    pub cpu: Option<f64>,
    /// How long each look took, in seconds.
    pub looks: Vec<f64>,
}

/// Numbers of sockets just past a doubling of the table, which finds them by 64 hash tables: each doubles with 7/8 of a power
/// of two in it, but not all at the same moment. At 6 % more than 64 times that, most have.
pub const DOUBLED: [u64; 4] = [15_200, 30_400, 60_800, 121_600];

/// A daemon's memory while sockets become more.
#[derive(Serialize, Deserialize)]
pub struct Growth {
    pub idle: Memory,
    /// By number of sockets, when what is free had gone back.
    pub settled: Vec<(u64, Memory)>,
    /// The most anonymous memory that was ever seen.
    pub peak: u64,
}

/// From a transition to its line at a reader.
#[derive(Serialize, Deserialize)]
pub struct Delay {
    pub tool: Tool,
    pub connections: u64,
    /// Connections whose line came.
    pub told: u64,
    /// At each percent of these, from the quickest to the slowest, in seconds.
    pub percentiles: Vec<f64>,
}

/// From the program's start to the first line of an event.
#[derive(Serialize, Deserialize)]
pub struct Start {
    pub name: String,
    pub seconds: Vec<f64>,
}

/// A stream into a pipe whose reader counts and discards.
#[derive(Serialize, Deserialize)]
pub struct Pipe {
    pub wanted: u64,
    pub made: Made,
    /// Those that are of the load.
    pub lines: u64,
    /// By what it says itself.
    pub lost: u64,
}

impl Pipe {
    pub fn missing(&self) -> u64 {
        self.made
            .transitions
            .saturating_sub(self.lines)
            .max(self.lost)
    }
}

/// The metrics page at the cap of names.
#[derive(Serialize, Deserialize)]
pub struct Page {
    pub bytes: u64,
    pub alone: Vec<f64>,
    /// The slowest of so many at once.
    pub at_once: u64,
    pub slowest: Vec<f64>,
    /// User and system time of the daemon for one page alone, and for all of those at once.
    pub cpu_alone: Vec<f64>,
    pub cpu_at_once: Vec<f64>,
    #[serde(default)]
    pub beside_load: Option<BesideLoad>,
}

/// Pages that were asked for, one after the other, while the load ran, and what the daemon told of that load.
#[derive(Serialize, Deserialize)]
pub struct BesideLoad {
    pub pages: u64,
    pub told: Told,
}

/// A synthetic stream through decoding, table and statistics, on one core, as the replay's own program measures it.
#[derive(Serialize, Deserialize)]
pub struct Replay {
    /// Sockets that are open at a time.
    pub open: u64,
    /// Millions of transitions a second: the median, the least and the most.
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Results {
    pub fn tool(&self, tool: Tool) -> Option<&Measured> {
        self.tools.iter().find(|it| it.tool == tool)
    }
}

impl Measured {
    /// Of each round.
    fn each(&self, of: impl Fn(&Round) -> Option<f64>) -> Option<Spread> {
        let all: Option<Vec<f64>> = self.rounds.iter().map(of).collect();
        Spread::of(&all?)
    }

    /// Against the other tool's in the same round. `rate`: of what a load made.
    pub fn rate_against(
        &self,
        other: &Self,
        load: usize,
        rate: impl Fn(Made) -> f64,
    ) -> Option<Spread> {
        let both = self.rounds.iter().zip(&other.rounds);
        let ratio = |(ours, theirs): (&Round, &Round)| {
            Some(rate(*ours.made.get(load)?) / rate(*theirs.made.get(load)?))
        };
        let all: Option<Vec<f64>> = both.map(ratio).collect();
        Spread::of(&all?)
    }

    pub fn rate(&self, load: usize, rate: impl Fn(Made) -> f64) -> Option<Spread> {
        self.each(|round| Some(rate(*round.made.get(load)?)))
    }

    pub fn kernel_ns(&self) -> Option<Spread> {
        self.each(|round| round.kernel_ns)
    }

    pub fn kernel_against(&self, other: &Self) -> Option<Spread> {
        let both = self.rounds.iter().zip(&other.rounds);
        let all: Option<Vec<f64>> = both
            .map(|(ours, theirs)| Some(ours.kernel_ns? / theirs.kernel_ns?))
            .collect();
        Spread::of(&all?)
    }

    /// Seconds for a million transitions.
    pub fn cpu(&self) -> Option<Spread> {
        self.each(|round| {
            let transitions: u64 = round.made.iter().map(|made| made.transitions).sum();
            Some(round.cpu_seconds? / transitions as f64 * 1e6)
        })
    }

    /// In megabytes.
    pub fn memory(&self, of: impl Fn(Memory) -> u64) -> Option<Spread> {
        self.each(|round| Some(of(round.memory?) as f64 / 1e6))
    }

    /// Over all rounds.
    pub fn told(&self) -> Option<ToldInAll> {
        let all: Option<Vec<Told>> = self.rounds.iter().map(|round| round.told).collect();
        let all = all?;
        let sum = |of: fn(&Told) -> u64| all.iter().map(of).sum();
        Some(ToldInAll {
            expected: sum(|told| told.expected),
            missing: sum(|told| told.missing()),
            of_others: sum(|told| told.told.saturating_sub(told.expected)),
            said_lost: sum(|told| told.said_lost),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(seconds: f64, kernel_ns: Option<f64>) -> Round {
        Round {
            made: vec![Made {
                connections: 1000,
                transitions: 6000,
                seconds,
                worked: 0.5,
            }],
            cpu_seconds: Some(0.003),
            kernel_ns,
            foreign: None,
            told: None,
            memory: None,
        }
    }

    fn measured(rounds: Vec<Round>) -> Measured {
        Measured {
            tool: Tool::Floor,
            rounds,
        }
    }

    /// A machine that is slow for a while is so for both.
    #[test]
    fn ratios_are_of_the_same_round() {
        let ours = measured(vec![round(2.0, None), round(20.0, None)]);
        let theirs = measured(vec![round(1.0, None), round(10.0, None)]);
        let ratio = ours.rate_against(&theirs, 0, Made::rate).unwrap();
        assert_eq!((ratio.low, ratio.high), (0.5, 0.5));
        let ratio = ours.rate_against(&theirs, 0, Made::rate_of_work).unwrap();
        assert_eq!((ratio.low, ratio.high), (1.0, 1.0));
        assert_eq!(ours.cpu().unwrap().median, 0.5);
    }

    #[test]
    fn what_is_missing_in_one_round_no_other_makes_up_for() {
        let told = |told| Round {
            told: Some(Told {
                expected: 100,
                told,
                said_lost: 1,
            }),
            ..round(1.0, None)
        };
        let all = measured(vec![told(90), told(110)]).told().unwrap();
        assert_eq!(
            (all.expected, all.missing, all.of_others, all.said_lost),
            (200, 10, 10, 2)
        );
    }

    #[test]
    fn a_figure_that_a_round_lacks_is_absent() {
        let lacks = measured(vec![round(1.0, Some(60.0)), round(1.0, None)]);
        assert_eq!(lacks.kernel_ns(), None);
        assert_eq!(lacks.told(), None);
        assert_eq!(lacks.rate_against(&measured(vec![]), 0, Made::rate), None);
        assert_eq!(lacks.rate(1, Made::rate), None);
    }
}
