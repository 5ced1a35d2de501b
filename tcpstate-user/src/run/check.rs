//! `tcpstate check`: tries each thing that tcpstate uses of a host, and has a connection of its own traced.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use rustc_hash::FxHashSet;

use super::{proof, resolve};
use crate::cli::Check;
use crate::export::Look;
use crate::export::check::{ReportFormat, json, text};
use crate::kernel::btf::VMLINUX;
use crate::kernel::snapshot::{self, SnapshotError};
use crate::kernel::tracepoint::{self, TracepointError};
use crate::kernel::{Path, StartError, info, netns};
use crate::model::check::{Finding, Proof, Report, Status, Subject, Verdict};
use crate::model::view::Feature;
use crate::model::{Named as _, NetnsSelection, TcpState};
use crate::owner::{Containers, in_initial_pid_namespace};
use crate::table::StateMask;

/// Tracing works, and something is missing.
const PARTIAL: u8 = 3;

pub fn run(args: &Check) -> anyhow::Result<ExitCode> {
    let report = report(args)?;
    let out = match args.output {
        ReportFormat::Text => text(&report, Look::of_stdout(true).color),
        ReportFormat::Json => json(&report),
    };
    match io::stdout().write_all(out.as_bytes()) {
        // Whoever read along has had enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
        written => written.context("can't write to stdout")?,
    }
    Ok(match report.verdict() {
        Verdict::Complete => ExitCode::SUCCESS,
        Verdict::Partial => PARTIAL.into(),
        Verdict::Impossible => ExitCode::FAILURE,
    })
}

fn report(args: &Check) -> anyhow::Result<Report> {
    let selection = resolve(args.netns)?;
    let mut findings = vec![kernel(), btf()];
    if findings
        .iter()
        .any(|finding| finding.status != Status::InUse)
    {
        findings.push(tracefs());
    }
    let (path, proof) = match proof::perform(args.without.features.clone()) {
        Ok(performed) => {
            let by = format!("by {}", performed.path);
            findings.push(finding(Subject::Tracing, Status::InUse, by));
            findings.extend(performed.features.into_iter().map(|(feature, in_use)| {
                let (status, reason) = match in_use {
                    Ok(()) => (Status::InUse, feature.gives().to_owned()),
                    Err(reason) => (Status::Missing, reason),
                };
                finding(Subject::Feature(feature), status, reason)
            }));
            (Some(performed.path), performed.proof)
        }
        Err(error) => {
            findings.push(finding(
                Subject::Tracing,
                Status::Missing,
                format!("{error:#}"),
            ));
            let untried = "tracing does not start";
            findings.extend(Feature::ALL.iter().map(|&feature| {
                finding(
                    Subject::Feature(feature),
                    Status::Undecided,
                    untried.to_owned(),
                )
            }));
            (None, Proof::Undecided(untried.to_owned()))
        }
    };
    findings.extend([
        inet_diag(),
        network_namespaces(selection, path),
        initial_pid_namespace(),
        cgroup_v2(),
        bpf_statistics(),
    ]);
    Ok(Report { findings, proof })
}

const fn finding(subject: Subject, status: Status, reason: String) -> Finding {
    Finding {
        subject,
        status,
        reason: Some(reason),
    }
}

fn kernel() -> Finding {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    // The mode in brackets is the one that holds; there is no such file where securityfs is not mounted.
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").ok();
    let lockdown = lockdown.as_deref().and_then(|text| {
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0)
    });
    let lockdown = lockdown.unwrap_or("unknown");
    finding(
        Subject::Kernel,
        Status::InUse,
        format!("{release}, lockdown {lockdown}"),
    )
}

fn btf() -> Finding {
    let (status, reason) = match File::open(VMLINUX) {
        Ok(_) => (Status::InUse, VMLINUX.to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (
            Status::Missing,
            format!("there is no {VMLINUX}; CONFIG_DEBUG_INFO_BTF=y gives it"),
        ),
        Err(error) => (Status::Undecided, format!("{VMLINUX}: {error}")),
    };
    finding(Subject::Btf, status, reason)
}

fn tracefs() -> Finding {
    let (status, reason) = match tracepoint::check() {
        Ok(()) => (Status::InUse, "the tracepoint is as expected".to_owned()),
        Err(error @ TracepointError::Unreadable) => (Status::Undecided, error.to_string()),
        Err(error) => (Status::Missing, error.to_string()),
    };
    finding(Subject::Tracefs, status, reason)
}

fn inet_diag() -> Finding {
    let dump = netns::own().map_err(|error| error.to_string()).map(|own| {
        snapshot::take(
            NetnsSelection::One(own),
            StateMask::ALL,
            FxHashSet::default(),
            None,
        )
    });
    let (status, reason) = match dump {
        Ok(Ok(dump)) => (
            Status::InUse,
            format!("sockets in this network namespace: {}", dump.records.len()),
        ),
        Ok(Err(error @ SnapshotError::Dump { .. })) => (Status::Missing, error.to_string()),
        Ok(Err(error)) => (Status::Undecided, error.to_string()),
        Err(reason) => (Status::Undecided, reason),
    };
    finding(Subject::InetDiag, status, reason)
}

/// Whether the selected ones can be had: found, entered, asked.
fn network_namespaces(selection: NetnsSelection, path: Option<Path>) -> Finding {
    let dump = snapshot::take(
        selection,
        StateMask::of(&[TcpState::LISTEN]),
        FxHashSet::default(),
        None,
    );
    let (status, reason) = match (dump, selection) {
        (Ok(_), NetnsSelection::One(_)) if path == Some(Path::Tracepoint) => {
            (Status::Missing, StartError::NetnsUnknown.to_string())
        }
        (Ok(_), NetnsSelection::One(inode)) => (Status::InUse, format!("only {inode}")),
        (Ok(dump), NetnsSelection::All) => {
            let found = dump.netns.len();
            match dump.unreachable.first() {
                None => (Status::InUse, format!("{found}, each of them reachable")),
                Some(first) => (
                    Status::Missing,
                    format!("{found} reachable, others not: {}", first.reason),
                ),
            }
        }
        (Err(error @ (SnapshotError::Netns(_) | SnapshotError::Dump { .. })), _) => {
            (Status::Missing, error.to_string())
        }
        (Err(error), _) => (Status::Undecided, error.to_string()),
    };
    finding(Subject::NetworkNamespaces, status, reason)
}

fn initial_pid_namespace() -> Finding {
    let (status, reason) = if in_initial_pid_namespace() {
        (Status::InUse, None)
    } else {
        let help = "this is another one; `--pid=host`, or its like, runs a container in it";
        (Status::Missing, Some(help.to_owned()))
    };
    Finding {
        subject: Subject::InitialPidNamespace,
        status,
        reason,
    }
}

fn cgroup_v2() -> Finding {
    let containers = Containers::new();
    let (status, reason) = match containers.cgroup_v2() {
        Some(path) => (Status::InUse, path.display().to_string()),
        None => (
            Status::Missing,
            "not mounted: containers are looked up process by process".to_owned(),
        ),
    };
    finding(Subject::CgroupV2, status, reason)
}

fn bpf_statistics() -> Finding {
    let (status, reason) = if info::stats_enabled() {
        (Status::InUse, "kernel.bpf_stats_enabled is 1")
    } else {
        (
            Status::Missing,
            "kernel.bpf_stats_enabled is not 1: no metrics tcpstate_ebpf_*",
        )
    };
    finding(Subject::BpfStatistics, status, reason.to_owned())
}
