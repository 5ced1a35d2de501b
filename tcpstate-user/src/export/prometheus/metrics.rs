//! Every metric: name, type, labels with their values, help, and where its samples come from.
//!
//! `docs/metrics.md` explains each; a test compares the two.

use std::collections::BTreeMap;

use ::prometheus::proto::MetricType::{COUNTER, GAUGE, HISTOGRAM};
use tcpstate_common::TcpState;

use super::{Label, Metric, Samples, Scrape};
use crate::model::view::{
    CommView, Counted, EVENT_LOSSES, FAILURE_REASONS, Feature, GAUGE_STATES, MIN_AGES, Program,
    StateCounts,
};
use crate::model::{End, Named, OwnerSource, Role};
use crate::stats::timed_states;
use crate::table::{Correction, Discard};

/// In the order of the page: what happens to sockets, tcpstate itself, its process.
pub static METRICS: &[Metric] = &[
    Metric {
        name: "tcpstate_sockets",
        kind: GAUGE,
        labels: &[STATE],
        help: "TCP sockets by state.",
        samples: |scrape, samples| {
            if let Some(counted) = complete(scrape) {
                push_states(samples, None, &counted.sockets);
            }
        },
    },
    Metric {
        name: "tcpstate_process_sockets",
        kind: GAUGE,
        labels: &[COMM, STATE],
        help: "TCP sockets by name of the owning process and state.",
        samples: |scrape, samples| {
            for comm in complete_comms(scrape) {
                push_states(samples, Some(&comm.comm), &comm.sockets);
            }
        },
    },
    Metric {
        name: "tcpstate_process_sockets_aged",
        kind: GAUGE,
        labels: &[
            COMM,
            STATE,
            Label {
                name: "min_age",
                values: Some(|| MIN_AGES.map(|(name, _)| name.to_owned()).into()),
            },
        ],
        help: "TCP sockets that have been in their state for at least so long; values of min_age nest.",
        samples: |scrape, samples| {
            for comm in complete_comms(scrape) {
                for (at, state) in states().enumerate() {
                    for ((min_age, _), counts) in MIN_AGES.iter().zip(&comm.aged.counts) {
                        samples.push_count(&[&comm.comm, &state, min_age], counts[at]);
                    }
                }
            }
        },
    },
    Metric {
        name: "tcpstate_process_oldest_state_entry_timestamp_seconds",
        kind: GAUGE,
        labels: &[COMM, STATE],
        help: "When the socket that has been in the state for longest entered it, Unix time.",
        samples: |scrape, samples| {
            for comm in complete_comms(scrape) {
                for (state, oldest_ns) in states().zip(comm.aged.oldest_ns) {
                    if let Some(ns) = oldest_ns {
                        samples.push(&[&comm.comm, &state], ns as f64 / 1e9);
                    }
                }
            }
        },
    },
    Metric {
        name: "tcpstate_dwell_seconds",
        kind: HISTOGRAM,
        labels: &[
            COMM,
            Label {
                name: "state",
                values: Some(|| timed_states().map(|state| label(Some(state))).collect()),
            },
        ],
        help: "How long sockets stayed in the state that they left, where both ends of the stay were seen.",
        samples: |scrape, samples| {
            for comm in comms(scrape) {
                for (state, dwell) in states().zip(&comm.dwell) {
                    if let Some(dwell) = dwell {
                        samples.push_histogram(&[&comm.comm, &state], dwell);
                    }
                }
            }
        },
    },
    Metric {
        name: "tcpstate_kernel_transitions_total",
        kind: COUNTER,
        labels: &[
            Label {
                name: "from",
                values: Some(kernel_states),
            },
            Label {
                name: "to",
                values: Some(kernel_states),
            },
        ],
        help: "Transitions as the kernel emitted and counted them, exact even when events were lost.",
        samples: |scrape, samples| {
            if scrape.view.counted.is_none() {
                return;
            }
            // Numbers without a name here are one series.
            let mut transitions = BTreeMap::new();
            for &(from, to, count) in &scrape.view.kernel.transitions {
                *transitions.entry((from, to)).or_insert(0) += count;
            }
            for ((from, to), count) in transitions {
                if count > 0 {
                    samples.push_count(&[&label(from), &label(to)], count);
                }
            }
        },
    },
    Metric {
        name: "tcpstate_connections_total",
        kind: COUNTER,
        labels: &[
            COMM,
            Label {
                name: "role",
                values: Some(|| roles().map(str::to_owned).collect()),
            },
        ],
        help: "Connections that reached ESTABLISHED.",
        samples: |scrape, samples| {
            for comm in comms(scrape) {
                for (role, &count) in roles().zip(&comm.connections) {
                    if role != UNKNOWN || count > 0 {
                        samples.push_count(&[&comm.comm, role], count);
                    }
                }
            }
        },
    },
    Metric {
        name: "tcpstate_connection_ends_total",
        kind: COUNTER,
        labels: &[
            COMM,
            Label {
                name: "end",
                values: Some(|| names(End::ALL)),
            },
        ],
        help: "Connections that had reached ESTABLISHED and ended, by how.",
        samples: |scrape, samples| {
            for comm in comms(scrape) {
                for (end, &count) in End::ALL.iter().zip(&comm.ends) {
                    samples.push_count(&[&comm.comm, end.name()], count);
                }
            }
        },
    },
    Metric {
        name: "tcpstate_connect_failures_total",
        kind: COUNTER,
        labels: &[
            COMM,
            Label {
                name: "reason",
                values: Some(|| names(&FAILURE_REASONS)),
            },
        ],
        help: "Active opens that never reached ESTABLISHED, by why.",
        samples: |scrape, samples| {
            for comm in comms(scrape) {
                for (reason, &count) in FAILURE_REASONS.iter().zip(&comm.failures) {
                    samples.push_count(&[&comm.comm, reason.name()], count);
                }
            }
        },
    },
    Metric {
        name: "tcpstate_build_info",
        kind: GAUGE,
        labels: &[
            Label::open("version"),
            Label::open("revision"),
            Label::open("netns"),
        ],
        help: "Which tcpstate this is and which network namespaces it covers; always 1.",
        samples: |scrape, samples| {
            let build = scrape.build;
            let netns = build.netns.to_string();
            samples.push_count(&[build.version, build.revision, &netns], 1);
        },
    },
    Metric {
        name: "tcpstate_kernel_feature",
        kind: GAUGE,
        labels: &[Label {
            name: "feature",
            values: Some(|| names(Feature::ALL)),
        }],
        help: "Whether a feature that not every kernel has is in use.",
        samples: |scrape, samples| {
            for &(feature, in_use) in &scrape.view.health.features {
                samples.push_count(&[feature.name()], in_use.into());
            }
        },
    },
    Metric {
        name: "tcpstate_events_received_total",
        kind: COUNTER,
        labels: &[],
        help: "Events that arrived from the kernel.",
        samples: |scrape, samples| samples.push_count(&[], scrape.view.health.events_received),
    },
    Metric {
        name: "tcpstate_events_lost_total",
        kind: COUNTER,
        labels: &[Label {
            name: "reason",
            values: Some(|| names(&EVENT_LOSSES)),
        }],
        help: "Events that did not arrive, or found no room.",
        samples: |scrape, samples| {
            for (reason, &count) in EVENT_LOSSES.iter().zip(&scrape.view.health.events_lost) {
                samples.push_count(&[reason.name()], count);
            }
        },
    },
    Metric {
        name: "tcpstate_dwell_samples_discarded_total",
        kind: COUNTER,
        labels: &[Label {
            name: "reason",
            values: Some(|| names(Discard::ALL)),
        }],
        help: "Stays that ended without a sample in tcpstate_dwell_seconds.",
        samples: |scrape, samples| {
            if let Some(counted) = &scrape.view.counted {
                push_named(samples, &counted.dwell_discarded);
            }
        },
    },
    Metric {
        name: "tcpstate_corrections_total",
        kind: COUNTER,
        labels: &[Label {
            name: "kind",
            values: Some(|| names(Correction::ALL)),
        }],
        help: "Differences between the table of sockets and the kernel that were found and repaired.",
        samples: |scrape, samples| {
            if let Some(counted) = &scrape.view.counted {
                push_named(samples, &counted.corrections);
            }
        },
    },
    Metric {
        name: "tcpstate_reconciles_total",
        kind: COUNTER,
        labels: &[],
        help: "Snapshots of the kernel's sockets that were merged into the table.",
        samples: |scrape, samples| samples.push_count(&[], scrape.view.health.reconciles),
    },
    Metric {
        name: "tcpstate_reconcile_failures_total",
        kind: COUNTER,
        labels: &[],
        help: "Snapshots of the kernel's sockets that failed.",
        samples: |scrape, samples| samples.push_count(&[], scrape.view.health.reconcile_failures),
    },
    Metric {
        name: "tcpstate_last_reconcile_duration_seconds",
        kind: GAUGE,
        labels: &[],
        help: "How long the last snapshot took that was merged.",
        samples: |scrape, samples| {
            if let Some(ns) = scrape.view.health.last_reconcile_duration_ns {
                samples.push(&[], ns as f64 / 1e9);
            }
        },
    },
    Metric {
        name: "tcpstate_last_reconcile_success_timestamp_seconds",
        kind: GAUGE,
        labels: &[],
        help: "When the last snapshot was merged, Unix time.",
        samples: |scrape, samples| {
            if let Some(ns) = scrape.view.health.last_reconcile_success_ns {
                samples.push(&[], ns as f64 / 1e9);
            }
        },
    },
    Metric {
        name: "tcpstate_table_entries",
        kind: GAUGE,
        labels: &[],
        help: "Entries in the table of sockets.",
        samples: |scrape, samples| {
            if let Some(counted) = &scrape.view.counted {
                samples.push_count(&[], counted.table_entries);
            }
        },
    },
    Metric {
        name: "tcpstate_owner_lookups_total",
        kind: COUNTER,
        labels: &[Label {
            name: "source",
            values: Some(|| names(OwnerSource::ALL)),
        }],
        help: "Sockets whose owner came to be known, by how.",
        samples: |scrape, samples| {
            if let Some(counted) = &scrape.view.counted {
                push_named(samples, &counted.owner_lookups);
            }
        },
    },
    Metric {
        name: "tcpstate_comm_overflow_total",
        kind: COUNTER,
        labels: &[],
        help: "Names of processes that had to count as <other>.",
        samples: |scrape, samples| {
            if let Some(counted) = &scrape.view.counted {
                samples.push_count(&[], counted.comm_overflow);
            }
        },
    },
    Metric {
        name: "tcpstate_stream_clients",
        kind: GAUGE,
        labels: &[],
        help: "Clients that follow the stream of events now.",
        samples: |scrape, samples| samples.push_count(&[], scrape.view.health.stream_clients),
    },
    Metric {
        name: "tcpstate_stream_lines_dropped_total",
        kind: COUNTER,
        labels: &[],
        help: "Lines that streams left out because their clients read too slowly.",
        samples: |scrape, samples| samples.push_count(&[], scrape.view.health.stream_lines_dropped),
    },
    Metric {
        name: "tcpstate_ebpf_run_seconds_total",
        kind: COUNTER,
        labels: &[PROGRAM],
        help: "Time that an eBPF program ran, where the kernel's BPF statistics are on.",
        samples: |scrape, samples| {
            for &(program, _, ns) in &scrape.view.kernel.runs {
                samples.push(&[program.name()], ns as f64 / 1e9);
            }
        },
    },
    Metric {
        name: "tcpstate_ebpf_runs_total",
        kind: COUNTER,
        labels: &[PROGRAM],
        help: "Runs of an eBPF program, where the kernel's BPF statistics are on.",
        samples: |scrape, samples| {
            for &(program, runs, _) in &scrape.view.kernel.runs {
                samples.push_count(&[program.name()], runs);
            }
        },
    },
    Metric {
        name: "process_cpu_seconds_total",
        kind: COUNTER,
        labels: &[],
        help: "Total user and system CPU time spent in seconds.",
        samples: |scrape, samples| samples.push(&[], scrape.process.cpu_seconds),
    },
    Metric {
        name: "process_resident_memory_bytes",
        kind: GAUGE,
        labels: &[],
        help: "Resident memory size in bytes.",
        samples: |scrape, samples| {
            if let Some(bytes) = scrape.process.resident_bytes {
                samples.push_count(&[], bytes);
            }
        },
    },
    Metric {
        name: "process_start_time_seconds",
        kind: GAUGE,
        labels: &[],
        help: "Start time of the process since unix epoch in seconds.",
        samples: |scrape, samples| {
            if let Some(seconds) = scrape.process.start_time_seconds {
                samples.push(&[], seconds);
            }
        },
    },
    Metric {
        name: "process_open_fds",
        kind: GAUGE,
        labels: &[],
        help: "Number of open file descriptors.",
        samples: |scrape, samples| {
            if let Some(count) = scrape.process.open_fds {
                samples.push_count(&[], count);
            }
        },
    },
    Metric {
        name: "process_max_fds",
        kind: GAUGE,
        labels: &[],
        help: "Maximum number of open file descriptors.",
        samples: |scrape, samples| {
            if let Some(count) = scrape.process.max_fds {
                samples.push_count(&[], count);
            }
        },
    },
];

const COMM: Label = Label::open("comm");
const STATE: Label = Label {
    name: "state",
    values: Some(|| states().collect()),
};
const PROGRAM: Label = Label {
    name: "program",
    values: Some(|| names(Program::ALL)),
};

const UNKNOWN: &str = "unknown";

fn comms(scrape: Scrape<'_>) -> impl Iterator<Item = &CommView> {
    let counted: Option<&Counted> = scrape.view.counted.as_deref();
    counted.into_iter().flat_map(|counted| &counted.comms)
}

/// Where the gauges lack no socket.
fn complete(scrape: Scrape<'_>) -> Option<&Counted> {
    let counted = scrape.view.counted.as_deref();
    counted.filter(|counted| !counted.incomplete)
}

fn complete_comms(scrape: Scrape<'_>) -> impl Iterator<Item = &CommView> {
    complete(scrape)
        .into_iter()
        .flat_map(|counted| &counted.comms)
}

fn push_states(samples: &mut Samples, comm: Option<&str>, sockets: &StateCounts) {
    for (state, &count) in states().zip(sockets) {
        match comm {
            Some(comm) => samples.push_count(&[comm, &state], count),
            None => samples.push_count(&[&state], count),
        }
    }
}

fn push_named(samples: &mut Samples, counts: &[(&'static str, u64)]) {
    for &(name, count) in counts {
        samples.push_count(&[name], count);
    }
}

fn names<T: Named>(values: &[T]) -> Vec<String> {
    values.iter().map(|value| value.name().to_owned()).collect()
}

/// A state as node_exporter writes it; one that this version does not know is `unknown`.
fn label(state: Option<TcpState>) -> String {
    let name = state.and_then(TcpState::name);
    name.unwrap_or(UNKNOWN).to_ascii_lowercase()
}

fn states() -> impl Iterator<Item = String> {
    GAUGE_STATES.into_iter().map(|state| label(Some(state)))
}

/// What the kernel's tracepoint can name.
fn kernel_states() -> Vec<String> {
    let states = TcpState::ALL.into_iter().map(Some).chain([None]);
    states.map(label).collect()
}

fn roles() -> impl Iterator<Item = &'static str> {
    let known = Role::ALL.iter().map(|role| role.name());
    known.chain([UNKNOWN])
}
