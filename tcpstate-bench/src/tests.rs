//! The page and the chart of a run that never was, whole; and that those in docs/ are of the figures beside them.

use std::fs;
use std::path::Path;

use crate::figures::{
    Absent, BesideLoad, Crowd, Delay, Growth, Machine, Measured, Page, Pipe, Poll, Poller, Replay,
    Results, Round, Start, Told,
};
use crate::load::Made;
use crate::process::Memory;
use crate::spread::percentiles;
use crate::tools::Tool;
use crate::{chart, page};

fn made(connections: u64) -> Made {
    Made {
        connections,
        transitions: 6 * connections,
        seconds: 1.0,
        worked: 0.5,
    }
}

fn memory(anonymous: u64) -> Memory {
    Memory {
        anonymous,
        file: 9_000_000,
        shared: 4_200_000,
        ring: Some(8_400_000),
    }
}

/// Three rounds, the second of which was disturbed.
fn measured(tool: Tool, share: f64, kernel_ns: Option<f64>, told: Option<Told>) -> Measured {
    let has_process = !matches!(tool, Tool::Untraced | Tool::UntracedAgain | Tool::Floor);
    let rounds = [40_000.0, 20_000.0, 41_000.0].map(|rate| Round {
        made: vec![
            made((rate * share) as u64),
            made((rate * share / 2.0) as u64),
        ],
        cpu_seconds: has_process.then_some(0.1 * share),
        kernel_ns,
        foreign: kernel_ns.map(|_| 0.001),
        told,
        memory: has_process.then(|| memory(5_000_000)),
    });
    Measured {
        tool,
        rounds: rounds.into(),
    }
}

fn results() -> Results {
    let told = |told, said_lost| {
        Some(Told {
            expected: 240_000,
            told,
            said_lost,
        })
    };
    let poller = |name: &str, share: f64, cpu, looks: &[f64]| Poller {
        name: name.to_owned(),
        rounds: vec![Poll {
            made: made((40_000.0 * share) as u64),
            cpu,
            looks: looks.to_vec(),
        }],
    };
    Results {
        date: "2026-11-21".to_owned(),
        machine: Machine {
            kernel: Some("6.18.1".to_owned()),
            processors: 2,
            model: Some("A Processor".to_owned()),
            hypervisor: Some(true),
            clocksource: Some("tsc".to_owned()),
            jit: None,
            spectre_v2: Some("Mitigation: Retpolines".to_owned()),
            load_before: Some(0.1),
            load_after: Some(1.25),
        },
        versions: vec![("bpftrace".to_owned(), "bpftrace v0.17.0".to_owned())],
        lacks: vec!["accept_fexit".to_owned()],
        rounds: 3,
        loads: vec!["resets".to_owned(), "closed by both ends".to_owned()],
        tools: vec![
            measured(Tool::Untraced, 1.0, None, None),
            measured(Tool::UntracedAgain, 1.01, None, None),
            measured(Tool::Floor, 0.98, Some(60.0), None),
            measured(Tool::Daemon, 0.96, Some(200.0), told(240_000, 0)),
            measured(Tool::Watch, 0.9, Some(201.0), told(240_006, 0)),
            measured(Tool::Printf, 0.3, Some(8300.0), told(120_000, 118_000)),
        ],
        absent: vec![Absent {
            what: "`tcpstates`".to_owned(),
            why: "there is none".to_owned(),
        }],
        crowd: Some(Crowd {
            sockets: 50_000,
            pollers: vec![
                poller("nobody", 1.0, None, &[]),
                poller("`ss`", 0.8, Some(0.5), &[0.3, 0.4]),
            ],
        }),
        memory: Some(Growth {
            idle: memory(5_000_000),
            settled: vec![
                (10_000, memory(7_000_000)),
                (60_800, memory(22_000_000)),
                (100_000, memory(25_000_000)),
                (121_600, memory(29_000_000)),
            ],
            peak: 31_000_000,
        }),
        delays: vec![Delay {
            tool: Tool::Watch,
            connections: 3,
            told: 3,
            percentiles: percentiles(vec![0.001, 0.012, 0.024]),
        }],
        starts: [(Tool::Daemon, 0.15), (Tool::Watch, 0.31)]
            .map(|(tool, seconds)| Start {
                name: tool.name().to_owned(),
                seconds: vec![seconds; 3],
            })
            .into(),
        pipe: Some(Pipe {
            wanted: 200_000,
            made: Made {
                connections: 333_340,
                transitions: 2_000_040,
                seconds: 10.0,
                worked: 7.0,
            },
            lines: 2_000_040,
            lost: 0,
        }),
        page: Some(Page {
            bytes: 600_000,
            alone: vec![0.008, 0.009, 0.016],
            at_once: 8,
            slowest: vec![0.02; 3],
            cpu_alone: vec![0.008; 3],
            cpu_at_once: vec![0.016; 3],
            beside_load: Some(BesideLoad {
                pages: 90,
                told: told(240_000, 0).unwrap(),
            }),
        }),
        replays: [(1_000, 11.0), (100_000, 9.5)]
            .map(|(open, median)| Replay {
                open,
                median,
                least: median - 1.0,
                most: median + 1.0,
            })
            .into(),
    }
}

fn golden(name: &str, text: &str) {
    insta::with_settings!({
        snapshot_path => "../golden",
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn the_page_and_the_chart_of_a_run() {
    golden("page", &page::measured(&results()));
    golden("chart", &chart::chart(&results()));
}

/// Of a machine without BTF, peers, or anything else.
#[test]
fn what_was_not_measured_is_no_figure() {
    let nothing = Results {
        tools: Vec::new(),
        crowd: None,
        memory: None,
        delays: Vec::new(),
        starts: Vec::new(),
        pipe: None,
        page: None,
        replays: Vec::new(),
        ..results()
    };
    let page = page::page(&nothing);
    let bars = page
        .lines()
        .filter(|line| line.contains("| not told: not "));
    assert_eq!(bars.count(), 11, "{page}");
    assert!(!page.contains("NaN"), "{page}");
}

#[test]
fn figures_come_back_from_their_file() {
    let json = serde_json::to_string(&results()).unwrap();
    let again: Results = serde_json::from_str(&json).unwrap();
    assert_eq!(page::page(&again), page::page(&results()));
}

#[test]
fn the_documents_are_of_the_figures_beside_them() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let read = |name: &str| fs::read_to_string(docs.join(name)).expect("it is in docs/");
    let results: Results = serde_json::from_str(&read("performance.json")).expect("figures");
    let again = "`cargo xtask bench --page` writes it anew";
    assert!(page::page(&results) == read("performance.md"), "{again}");
    assert!(chart::chart(&results) == read("performance.svg"), "{again}");
}
