//! The report of a check, for people and as JSON lines.

use std::fmt::Display;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use super::SCHEMA;
use crate::model::check::{Actor, Finding, Proof, Report, Status, Subject, Verdict};
use crate::model::{Named as _, named};

named! {
    /// Of what is no stream.
    pub enum ReportFormat ("output format") {
        Text = "text",
        Json = "json",
    }
}

const WELL: Style = AnsiColor::Green.on_default();
const TROUBLE: Style = AnsiColor::Red.on_default();
const DOUBT: Style = AnsiColor::Yellow.on_default();
const QUIET: Style = Style::new().dimmed();

/// `initial_pid_namespace`.
const NAME: usize = 21;
/// `undecided`.
const STATUS: usize = 9;

/// The table, the proof, and the verdict in one line.
#[must_use]
pub fn text(report: &Report, color: bool) -> String {
    let mut table = Table {
        color,
        text: String::new(),
    };
    for finding in &report.findings {
        let (style, status) = match (finding.status, finding.subject.lost()) {
            (Status::InUse, _) => (WELL, "in use"),
            (Status::Missing, None) => (QUIET, "off"),
            (Status::Missing, Some(_)) => (TROUBLE, "missing"),
            (Status::Undecided, _) => (DOUBT, "undecided"),
        };
        let reason = finding.reason.as_deref().unwrap_or_default();
        table.row(finding.subject.name(), style, status, reason);
        // What is undecided for one reason would be long.
        if let (Status::Missing, Some(lost)) = (finding.status, finding.lost()) {
            table.row("", Style::new(), "", &format!("so {lost}"));
        }
    }
    table.text.push('\n');
    match &report.proof {
        Proof::Done {
            own_namespace,
            pid,
            actors,
        } => {
            let of = pid.map_or(String::new(), |pid| format!(" of pid {pid}"));
            let place = if *own_namespace {
                "a network namespace of their own"
            } else {
                "this network namespace"
            };
            table.line(format_args!(
                "proof: two loopback connections{of} in {place}"
            ));
            for (actor, told) in actors {
                match told {
                    Ok(()) => table.row(actor.name(), WELL, "told", &course(*actor)),
                    Err(reason) => table.row(actor.name(), TROUBLE, "wrong", reason),
                }
            }
        }
        Proof::Undecided(reason) => table.row("proof", DOUBT, "undecided", reason),
    }
    table.text.push('\n');
    table.line(clean(&summary(report)));
    table.text
}

struct Table {
    color: bool,
    text: String,
}

impl Table {
    fn row(&mut self, name: &str, style: Style, status: &str, what: &str) {
        let style = if self.color { style } else { Style::new() };
        let row = format!(
            "{name:NAME$}  {style}{status}{style:#}{:pad$}  {}",
            "",
            clean(what),
            pad = STATUS - status.len()
        );
        self.line(row.trim_end());
    }

    fn line(&mut self, line: impl Display) {
        self.text += &format!("{line}\n");
    }
}

/// Without control characters: paths can hold anything.
fn clean(text: &str) -> String {
    let chars = text.chars();
    let clean = chars.map(|char| match char {
        _ if char.is_control() => char.escape_default().to_string(),
        _ => char.to_string(),
    });
    clean.collect()
}

fn course(actor: Actor) -> String {
    let names: Vec<String> = actor.course().iter().map(ToString::to_string).collect();
    names.join(" -> ")
}

/// The verdict in one line.
fn summary(report: &Report) -> String {
    match report.verdict() {
        Verdict::Complete => "tcpstate works here, with all that it can use".to_owned(),
        Verdict::Partial => {
            let listed = |status| report.with(status).collect::<Vec<_>>().join(", ");
            let mut text = "tcpstate works here".to_owned();
            for (before, names) in [
                ("without", listed(Status::Missing)),
                ("undecided:", listed(Status::Undecided)),
            ] {
                if !names.is_empty() {
                    text += &format!(", {before} {names}");
                }
            }
            if let Proof::Undecided(_) = report.proof {
                text += ", but that could not be proven";
            }
            text
        }
        Verdict::Impossible => format!("tcpstate can't work here: {}", impediment(report)),
    }
}

fn impediment(report: &Report) -> String {
    if let Proof::Done { actors, .. } = &report.proof
        && let Some((actor, Err(reason))) = actors.iter().find(|(_, told)| told.is_err())
    {
        return format!("of the proof's {actor}, {reason}");
    }
    let tracing = |finding: &&Finding| finding.subject == Subject::Tracing;
    let tracing = report.findings.iter().find(tracing);
    tracing
        .and_then(|finding| finding.reason.clone())
        .unwrap_or_default()
}

/// `{"type":"check",…}` for each finding, `{"type":"proof",…}` for each socket of the proof, and `{"type":"verdict",…}`.
#[must_use]
pub fn json(report: &Report) -> String {
    let mut lines = Vec::new();
    for finding in &report.findings {
        lines.push(Line::Check {
            schema: SCHEMA,
            feature: finding.subject.name(),
            status: finding.status.name(),
            reason: finding.reason.as_deref(),
            lost: finding.lost(),
        });
    }
    for actor in Actor::ALL {
        lines.push(proof(&report.proof, *actor));
    }
    lines.push(Line::Verdict {
        schema: SCHEMA,
        verdict: report.verdict().name(),
        missing: report.with(Status::Missing).collect(),
        undecided: report.with(Status::Undecided).collect(),
        summary: summary(report),
    });
    let mut text = String::new();
    for line in lines {
        text += &serde_json::to_string(&line).expect("strings, numbers and lists");
        text.push('\n');
    }
    text
}

fn proof(proof: &Proof, actor: Actor) -> Line<'_> {
    let (told, own_namespace, pid) = match proof {
        Proof::Done {
            own_namespace,
            pid,
            actors,
        } => {
            let found = actors.iter().find(|(known, _)| *known == actor);
            let told = found.map(|(_, told)| told.as_ref().map_err(String::as_str));
            (told, Some(*own_namespace), *pid)
        }
        Proof::Undecided(_) => (None, None, None),
    };
    Line::Proof {
        schema: SCHEMA,
        socket: actor.name(),
        states: actor.course().iter().map(ToString::to_string).collect(),
        told: told.map(|told| told.is_ok()),
        reason: match proof {
            Proof::Done { .. } => told.and_then(Result::err),
            Proof::Undecided(reason) => Some(reason),
        },
        own_namespace,
        pid,
    }
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Line<'a> {
    Check {
        schema: u32,
        feature: &'static str,
        status: &'static str,
        reason: Option<&'a str>,
        lost: Option<&'static str>,
    },
    Proof {
        schema: u32,
        socket: &'static str,
        states: Vec<String>,
        /// Null where it could not be tried.
        told: Option<bool>,
        reason: Option<&'a str>,
        own_namespace: Option<bool>,
        pid: Option<u32>,
    },
    Verdict {
        schema: u32,
        verdict: &'static str,
        missing: Vec<&'static str>,
        undecided: Vec<&'static str>,
        summary: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::view::Feature;

    macro_rules! golden {
        ($name:literal, $text:expr) => {
            insta::with_settings!({
                snapshot_path => "../../tests/golden",
                prepend_module_to_snapshot => false,
                omit_expression => true,
            }, { insta::assert_snapshot!($name, $text) })
        };
    }

    fn finding(subject: Subject, status: Status, reason: &str) -> Finding {
        Finding {
            subject,
            status,
            reason: Some(reason.to_owned()),
        }
    }

    /// Each status, and what nothing is lost by.
    fn partial() -> Report {
        let gives =
            |feature: Feature| finding(Subject::Feature(feature), Status::InUse, feature.gives());
        Report {
            findings: vec![
                finding(Subject::Kernel, Status::InUse, "6.18.44, lockdown none"),
                finding(Subject::Tracing, Status::InUse, "by tp_btf"),
                gives(Feature::TpBtf),
                finding(
                    Subject::Feature(Feature::AcceptFexit),
                    Status::Missing,
                    "Operation not permitted (os error 1)",
                ),
                finding(Subject::InetDiag, Status::Undecided, "can't start a thread"),
                finding(
                    Subject::NetworkNamespaces,
                    Status::Missing,
                    "3 reachable, others not: /run/netns/\x1b[31m: Permission denied",
                ),
                Finding {
                    subject: Subject::InitialPidNamespace,
                    status: Status::InUse,
                    reason: None,
                },
                finding(Subject::BpfStatistics, Status::Missing, "it is 0"),
            ],
            proof: Proof::Done {
                own_namespace: true,
                pid: Some(4711),
                actors: Actor::ALL.iter().map(|&actor| (actor, Ok(()))).collect(),
            },
        }
    }

    fn impossible() -> Report {
        let reason = "no right to load eBPF: CAP_BPF missing";
        let untried = "tracing does not start";
        Report {
            findings: vec![
                finding(Subject::Tracing, Status::Missing, reason),
                finding(Subject::Feature(Feature::TpBtf), Status::Undecided, untried),
            ],
            proof: Proof::Undecided(untried.to_owned()),
        }
    }

    fn wrong() -> Report {
        let mut report = partial();
        report.proof = Proof::Done {
            own_namespace: false,
            pid: None,
            actors: vec![
                (Actor::Listener, Ok(())),
                (
                    Actor::ClosingServer,
                    Err("CLOSE_WAIT -> LAST_ACK did not arrive".to_owned()),
                ),
            ],
        };
        report
    }

    fn complete() -> Report {
        let mut report = partial();
        report.findings.retain(|finding| finding.lost().is_none());
        report
    }

    #[test]
    fn the_report_for_people() {
        golden!("check.text", text(&partial(), false));
        golden!("check.colour", text(&partial(), true));
        golden!("check.impossible.text", text(&impossible(), false));
        golden!("check.wrong.text", text(&wrong(), false));
    }

    #[test]
    fn the_report_as_json() {
        golden!("check.json", json(&partial()));
        golden!("check.impossible.json", json(&impossible()));
        golden!("check.wrong.json", json(&wrong()));
    }

    #[test]
    fn a_host_that_has_all_is_told_so() {
        let text = text(&complete(), false);
        let last = text.lines().last();
        assert_eq!(last, Some("tcpstate works here, with all that it can use"));
    }
}
