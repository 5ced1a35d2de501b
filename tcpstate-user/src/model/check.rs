//! What a check of this host found: what tcpstate can use of it, what is lost without the rest, and whether a connection
//! of its own was told right.

use super::view::Feature;
use super::{Named, TcpState, named};

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Release and lockdown.
    Kernel,
    Btf,
    /// Looked at only where there is no BTF.
    Tracefs,
    /// The program at `sock:inet_sock_set_state`: loaded and attached.
    Tracing,
    Feature(Feature),
    /// Dumps of the kernel's sockets.
    InetDiag,
    NetworkNamespaces,
    InitialPidNamespace,
    CgroupV2,
    BpfStatistics,
}

impl Subject {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Btf => "btf",
            Self::Tracefs => "tracefs",
            Self::Tracing => "tracing",
            Self::Feature(feature) => Named::name(feature),
            Self::InetDiag => "inet_diag",
            Self::NetworkNamespaces => "network_namespaces",
            Self::InitialPidNamespace => "initial_pid_namespace",
            Self::CgroupV2 => "cgroup_v2",
            Self::BpfStatistics => "bpf_statistics",
        }
    }

    /// What there is instead where it is missing; `None` where nothing that tcpstate shows depends on it.
    #[must_use]
    pub const fn lost(self) -> Option<&'static str> {
        match self {
            Self::Kernel | Self::CgroupV2 | Self::BpfStatistics => None,
            Self::Btf => Some("only the classic tracepoint is left, which needs tracefs"),
            Self::Tracefs => Some("without BTF and tracefs nothing can be traced"),
            Self::Tracing => Some("nothing can be traced"),
            Self::Feature(feature) => Some(feature.without()),
            Self::InetDiag => Some(
                "no gauges and statistics; sockets older than tcpstate, half-open requests and the end of TIME_WAIT are \
                 not seen, and what was lost is not repaired",
            ),
            Self::NetworkNamespaces => Some(
                "sockets in the others are followed by events only, or, with --netns self, not at all",
            ),
            Self::InitialPidNamespace => Some(
                "owners from sweeps and containers are unknown, and network namespaces of processes outside are not \
                 found; pids are those of the initial pid namespace all the same",
            ),
        }
    }
}

named! {
    pub enum Status ("status") {
        InUse = "in_use",
        Missing = "missing",
        /// It could not be tried.
        Undecided = "undecided",
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub subject: Subject,
    pub status: Status,
    /// What there is, or why not.
    pub reason: Option<String>,
}

impl Finding {
    /// What is lost here.
    #[must_use]
    pub fn lost(&self) -> Option<&'static str> {
        match self.status {
            Status::InUse => None,
            Status::Missing | Status::Undecided => self.subject.lost(),
        }
    }
}

named! {
    /// The sockets of the proof.
    pub enum Actor ("socket of the proof") {
        Listener = "listener",
        /// Of a connection that is closed by both ends, the client first.
        ClosingClient = "closing_client",
        ClosingServer = "closing_server",
        /// Of a connection that the client resets.
        ResettingClient = "resetting_client",
        ResetServer = "reset_server",
    }
}

impl Actor {
    /// The states that it goes through.
    #[must_use]
    pub const fn course(self) -> &'static [TcpState] {
        use TcpState as S;
        match self {
            Self::Listener => &[S::CLOSE, S::LISTEN, S::CLOSE],
            Self::ClosingClient => &[
                S::CLOSE,
                S::SYN_SENT,
                S::ESTABLISHED,
                S::FIN_WAIT1,
                S::FIN_WAIT2,
                S::TIME_WAIT,
            ],
            Self::ClosingServer => &[
                S::NEW_SYN_RECV,
                S::SYN_RECV,
                S::ESTABLISHED,
                S::CLOSE_WAIT,
                S::LAST_ACK,
                S::CLOSE,
            ],
            Self::ResettingClient => &[S::CLOSE, S::SYN_SENT, S::ESTABLISHED, S::CLOSE],
            Self::ResetServer => &[S::NEW_SYN_RECV, S::SYN_RECV, S::ESTABLISHED, S::CLOSE],
        }
    }
}

/// What came of connections of the check's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    Done {
        /// Made for it; else it was done in the namespace that the check runs in.
        own_namespace: bool,
        /// The owner that had to be told; `None` where the check can't know its own.
        pid: Option<u32>,
        /// Each socket, and what was wrong with what was told of it.
        actors: Vec<(Actor, Result<(), String>)>,
    },
    /// Why it could not be tried.
    Undecided(String),
}

named! {
    pub enum Verdict ("verdict") {
        Complete = "complete",
        /// Tracing works, and something is missing or undecided.
        Partial = "partial",
        Impossible = "impossible",
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub findings: Vec<Finding>,
    pub proof: Proof,
}

impl Report {
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let wrong = match &self.proof {
            Proof::Done { actors, .. } => actors.iter().any(|(_, told)| told.is_err()),
            Proof::Undecided(_) => false,
        };
        if wrong
            || self
                .with(Status::Missing)
                .any(|name| name == Subject::Tracing.name())
        {
            return Verdict::Impossible;
        }
        let whole = self.findings.iter().all(|finding| finding.lost().is_none());
        match self.proof {
            Proof::Done { .. } if whole => Verdict::Complete,
            Proof::Done { .. } | Proof::Undecided(_) => Verdict::Partial,
        }
    }

    /// Names of what has this status, and whose lack loses something.
    pub fn with(&self, status: Status) -> impl Iterator<Item = &'static str> {
        let findings = self.findings.iter();
        let with =
            findings.filter(move |finding| finding.status == status && finding.lost().is_some());
        with.map(|finding| finding.subject.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(subject: Subject, status: Status, told: Result<(), String>) -> Report {
        let finding = Finding {
            subject,
            status,
            reason: None,
        };
        Report {
            findings: vec![finding],
            proof: Proof::Done {
                own_namespace: true,
                pid: None,
                actors: vec![(Actor::Listener, told)],
            },
        }
    }

    #[test]
    fn the_verdict_is_the_worst_of_all() {
        use Status::{InUse, Missing, Undecided};
        let accept = Subject::Feature(Feature::AcceptFexit);
        for (subject, status, verdict) in [
            (accept, InUse, Verdict::Complete),
            (accept, Missing, Verdict::Partial),
            (accept, Undecided, Verdict::Partial),
            (Subject::BpfStatistics, Missing, Verdict::Complete),
            (Subject::Tracing, Missing, Verdict::Impossible),
        ] {
            let report = report(subject, status, Ok(()));
            assert_eq!(report.verdict(), verdict, "{subject:?} {status}");
        }
        let wrong = report(accept, InUse, Err("…".to_owned()));
        assert_eq!(wrong.verdict(), Verdict::Impossible);
        let untried = Report {
            proof: Proof::Undecided(String::new()),
            ..report(accept, InUse, Ok(()))
        };
        assert_eq!(untried.verdict(), Verdict::Partial);
    }
}
