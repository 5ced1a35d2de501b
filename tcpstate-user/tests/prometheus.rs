//! The metrics page: whole, against its documentation, and as Prometheus' own tools see it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use prometheus::proto::MetricType;
use tcpstate_common::TcpState;
use tcpstate_user::export::process::ProcessMetrics;
use tcpstate_user::export::prometheus::{BuildInfo, METRICS, page};
use tcpstate_user::model::view::{
    Aged, CommView, Counted, Feature, Health, Histogram, KernelCounted, Program, View,
};
use tcpstate_user::model::{Named as _, NetnsSelection};

const BUILD: BuildInfo = BuildInfo {
    version: "0.1.0",
    revision: "0123abc",
    netns: NetnsSelection::All,
};

const PROCESS: ProcessMetrics = ProcessMetrics {
    cpu_seconds: 1.234_567_891,
    resident_bytes: Some(9_437_184),
    start_time_seconds: Some(1_795_216_270.25),
    open_fds: Some(17),
    max_fds: Some(20_000),
};

/// Dwell times of the states at these indices.
fn dwell(states: &[(usize, Histogram)]) -> [Option<Histogram>; 10] {
    let mut dwell = [None; 10];
    for &(state, histogram) in states {
        dwell[state] = Some(histogram);
    }
    dwell
}

/// A view in which each metric has something to say.
fn rich() -> View {
    let stays = Histogram {
        buckets: [1, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0],
        count: 7,
        sum_ns: 90_000_100_500_000_000,
    };
    let mut aged = Aged::default();
    (aged.counts[0][6], aged.counts[1][6]) = (41, 7);
    aged.oldest_ns[0] = Some(1_795_216_300_125_000_000);
    aged.oldest_ns[6] = Some(1_795_212_300_000_000_000);
    let none = CommView {
        comm: "<none>".into(),
        sockets: [0, 0, 1, 0, 2, 3, 0, 0, 0, 0],
        aged: Aged::default(),
        dwell: dwell(&[]),
        connections: [0, 0, 4],
        ends: [0, 0, 0, 0, 0, 0, 0, 0, 0, 4],
        failures: [0; 5],
    };
    let other = CommView {
        comm: "<other>".into(),
        sockets: [5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        aged: Aged::default(),
        dwell: dwell(&[(0, Histogram::default())]),
        connections: [0; 3],
        ends: [0; 10],
        failures: [0; 5],
    };
    let nginx = CommView {
        comm: "nginx".into(),
        sockets: [10, 0, 0, 0, 0, 0, 41, 0, 2, 0],
        aged,
        dwell: dwell(&[(0, stays), (6, stays)]),
        connections: [2, 60, 0],
        ends: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        failures: [1, 2, 3, 4, 5],
    };
    // As `Comm` writes a name that was chosen to break the page.
    let hostile = CommView {
        comm: r#"\u{1b}[2J"} 1\n"#.into(),
        sockets: [0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        ..other.clone()
    };
    View {
        health: Health {
            events_received: 123_456_789,
            events_lost: [17, 0, 1, 0],
            features: vec![(Feature::TpBtf, true), (Feature::SocketCookie, false)],
            reconciles: 12,
            reconcile_failures: 1,
            last_reconcile_duration_ns: Some(90_500_000),
            last_reconcile_success_ns: Some(1_795_216_300_125_000_000),
            stream_clients: 2,
            stream_lines_dropped: 5,
        },
        kernel: KernelCounted {
            transitions: vec![
                (Some(TcpState::ESTABLISHED), Some(TcpState::FIN_WAIT1), 7),
                (Some(TcpState::CLOSE), Some(TcpState::SYN_SENT), 64),
                (Some(TcpState::CLOSE), None, 1),
                (Some(TcpState::CLOSE), None, 2),
                (Some(TcpState::LISTEN), Some(TcpState::CLOSE), 0),
            ],
            runs: vec![
                (Program::SetState, 123_456_792, 30_864_198_000),
                (Program::Sweep, 800_000, 40_000_000),
            ],
        },
        counted: Some(Arc::new(Counted {
            sockets: [15, 1, 1, 0, 2, 3, 41, 0, 2, 0],
            comms: vec![none, other, hostile, nginx],
            comm_overflow: 3,
            dwell_discarded: vec![("start_unseen", 9), ("lost", 0), ("mismatch", 1)],
            corrections: vec![("event", 1), ("state", 0), ("found", 2), ("gone", 0)],
            owner_lookups: vec![("connect", 60), ("accept", 0), ("sweep", 7)],
            table_entries: 65,
            incomplete: false,
        })),
    }
}

fn rich_page() -> String {
    page(&rich(), &PROCESS, &BUILD).expect("a page")
}

/// Of a daemon that has just started: nothing of the world, and nothing that can't be known yet.
fn early_page() -> String {
    let view = View {
        health: Health {
            last_reconcile_duration_ns: None,
            last_reconcile_success_ns: None,
            ..rich().health
        },
        kernel: KernelCounted {
            runs: Vec::new(),
            ..rich().kernel
        },
        counted: None,
    };
    page(&view, &PROCESS, &BUILD).expect("a page")
}

/// `INSTA_UPDATE=always cargo test -p tcpstate-user --test prometheus` writes the files anew.
fn golden(name: &str, page: String) {
    insta::with_settings!({
        snapshot_path => "golden",
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, { insta::assert_snapshot!(name, page) });
}

#[test]
fn the_whole_page() {
    golden("metrics", rich_page());
}

#[test]
fn before_the_first_snapshot_the_page_is_about_itself() {
    golden("metrics_before_ready", early_page());
}

/// What the table had no room for is in no gauge; counters of what it did have go on.
#[test]
fn of_a_table_that_is_full_there_are_no_gauges_of_sockets() {
    let rich = rich();
    let counted = rich.counted.as_deref().expect("it was counted").clone();
    let view = View {
        counted: Some(Arc::new(Counted {
            incomplete: true,
            ..counted
        })),
        ..rich
    };
    let full = page(&view, &PROCESS, &BUILD).expect("a page");
    let names = |page: &str| -> BTreeSet<String> {
        let names = series(page).map(|series| series.split('{').next().expect("a name").to_owned());
        names.collect()
    };
    let absent: Vec<String> = names(&rich_page())
        .difference(&names(&full))
        .cloned()
        .collect();
    assert_eq!(
        absent,
        [
            "tcpstate_process_oldest_state_entry_timestamp_seconds",
            "tcpstate_process_sockets",
            "tcpstate_process_sockets_aged",
            "tcpstate_sockets",
        ]
    );
}

#[test]
fn what_is_not_known_is_absent() {
    let process = ProcessMetrics {
        cpu_seconds: 1.0,
        ..ProcessMetrics::default()
    };
    let page = page(&rich(), &process, &BUILD).expect("a page");
    assert!(page.contains("process_cpu_seconds_total 1\n"));
    assert_eq!(page.matches("# TYPE process_").count(), 1);
}

/// Name and labels of each sample.
fn series(page: &str) -> impl Iterator<Item = &str> {
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    samples.map(|line| line.rsplit_once(' ').expect("a value").0)
}

#[test]
fn the_gauges_by_name_add_up_to_the_gauges() {
    let page = rich_page();
    let mut sums: BTreeMap<String, i64> = BTreeMap::new();
    for line in page.lines() {
        let (name, value) = line.rsplit_once(' ').expect("two words");
        let sign = match name.split_once('{') {
            Some(("tcpstate_sockets", _)) => 1,
            Some(("tcpstate_process_sockets", _)) => -1,
            _ => continue,
        };
        let state = name.split("state=").nth(1).expect("a state");
        *sums.entry(state.to_owned()).or_default() +=
            sign * value.parse::<i64>().expect("a number");
    }
    assert_eq!(sums.len(), 10);
    assert!(sums.values().all(|&sum| sum == 0), "{sums:?}");
}

#[test]
fn no_series_is_there_twice() {
    for page in [rich_page(), early_page()] {
        let all: Vec<&str> = series(&page).collect();
        let different: BTreeSet<&str> = all.iter().copied().collect();
        assert_eq!(all.len(), different.len());
    }
}

#[test]
fn a_rich_page_has_every_metric() {
    let page = rich_page();
    for metric in METRICS {
        let header = format!("# HELP {} {}\n# TYPE {0} ", metric.name, metric.help);
        assert!(page.contains(&header), "{}", metric.name);
    }
}

#[test]
fn promtool_has_nothing_to_say() {
    for page in [rich_page(), early_page()] {
        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect(
                "promtool must be in PATH: `cargo xtask setup`, or `apt-get install prometheus`",
            );
        let mut stdin = promtool.stdin.take().expect("piped");
        stdin.write_all(page.as_bytes()).expect("promtool reads");
        drop(stdin);
        let output = promtool.wait_with_output().expect("promtool ends");
        let said = [output.stdout, output.stderr].concat();
        assert_eq!(String::from_utf8_lossy(&said), "");
        assert!(output.status.success(), "{}", output.status);
    }
}

/// A metric's labels, each with its values; none for a label whose values others choose.
type Labels = BTreeMap<String, Option<BTreeSet<String>>>;

/// `docs/metrics.md` has a heading for each metric, ``### `name` (type)``; below it an item for each label,
/// ``- `label`: …``, and below that, or in its line, each value in backticks.
fn documented() -> BTreeMap<String, (String, Labels)> {
    let mut metrics = BTreeMap::new();
    let mut current: Option<&mut (String, Labels)> = None;
    let mut label = String::new();
    for line in include_str!("../../docs/metrics.md").lines() {
        if let Some(heading) = line.strip_prefix("### `") {
            let (name, kind) = heading.split_once("` (").expect("a type");
            let kind = kind.strip_suffix(')').expect("a type").to_owned();
            let metric = metrics.entry(name.to_owned());
            current = Some(metric.or_insert((kind, Labels::new())));
        } else if line.starts_with('#') {
            current = None;
        } else if let Some((_, labels)) = &mut current {
            let mut quoted = line.split('`').skip(1).step_by(2).map(str::to_owned);
            if line.starts_with("- `") {
                label = quoted.next().expect("a label");
                let values: BTreeSet<String> = match line.split_once(": one of ") {
                    Some(_) => quoted.collect(),
                    None => BTreeSet::new(),
                };
                let open = line.contains(": any ");
                labels.insert(label.clone(), (!open).then_some(values));
            } else if line.starts_with("  - `")
                && let Some(Some(values)) = labels.get_mut(&label)
            {
                values.extend(quoted.next());
            }
        }
    }
    metrics
}

#[test]
fn the_documentation_names_every_metric_label_and_value_and_no_other() {
    let coded: BTreeMap<String, (String, Labels)> = METRICS
        .iter()
        .map(|metric| {
            let kind = match metric.kind {
                MetricType::COUNTER => "counter",
                MetricType::GAUGE => "gauge",
                MetricType::HISTOGRAM => "histogram",
                MetricType::SUMMARY | MetricType::UNTYPED => "not used",
            };
            let labels = metric.labels.iter().map(|label| {
                let values = label.values.map(|values| values().into_iter().collect());
                (label.name.to_owned(), values)
            });
            (metric.name.to_owned(), (kind.to_owned(), labels.collect()))
        })
        .collect();
    assert_eq!(documented(), coded);
}

/// The words of the code, which `tcpstate check` prints.
#[test]
fn the_documentation_says_of_each_feature_what_the_code_says() {
    let docs = include_str!("../../docs/metrics.md");
    for feature in Feature::ALL {
        let (gives, without) = (feature.gives(), feature.without());
        let item = format!("\n  - `{feature}`: {gives}; without it, {without}\n");
        assert!(docs.contains(&item), "missing: {item}");
    }
}

/// The lists of values that the documentation is compared with are those of the page.
#[test]
fn the_page_has_no_other_labels_and_values() {
    let page = rich_page();
    for metric in METRICS {
        for label in metric.labels {
            let Some(values) = label.values else {
                continue;
            };
            let start = format!("{}=\"", label.name);
            let of_metric = series(&page).filter(|series| {
                let name = series.split('{').next().expect("a name");
                let name = name.strip_suffix("_bucket").unwrap_or(name);
                name == metric.name
            });
            for series in of_metric {
                let (_, value) = series.rsplit_once(&start).expect("the label");
                let value = value.split('"').next().expect("a value").to_owned();
                assert!(values().contains(&value), "{series}");
            }
        }
    }
}
