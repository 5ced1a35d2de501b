//! Why the kernel refused: turns an errno of bpf(2) into a line that says what would help.
//!
//! Nothing is probed before: what was tried and refused is explained.

use std::{error::Error, fs, io, path::Path as FsPath};

use aya::programs::ProgramError;
use caps::{CapSet, Capability};

use super::{
    btf::{BtfError, VMLINUX},
    load::Path,
    tracepoint::TracepointError,
};

/// Ring buffer, CAP_BPF.
const OLDEST: (u32, u32) = (5, 8);
/// From here on maps count against the memory cgroup, no longer against RLIMIT_MEMLOCK.
const CGROUP_ACCOUNTING: (u32, u32) = (5, 11);

/// Why tracing did not start; nothing is left attached. The text is one line.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Btf(#[from] BtfError),
    #[error(transparent)]
    Tracepoint(#[from] TracepointError),
    #[error(
        "one network namespace can't be chosen on the classic tracepoint, which doesn't show it; \
         use --netns all, or a kernel with BTF"
    )]
    NetnsUnknown,
    #[error(
        "no right to load eBPF: {0} missing; run as root, or give the program these capabilities"
    )]
    Capabilities(String),
    #[error(
        "no right to load eBPF though {0} are there: a user namespace, a container's seccomp filter or a security \
         module refuses bpf(2)"
    )]
    Forbidden(&'static str),
    #[error(
        "kernel lockdown is in confidentiality mode, which forbids eBPF to read kernel memory; it takes a boot with \
         lockdown=integrity, or without"
    )]
    Lockdown,
    #[error("kernel {0} is too old; 5.8 or later is needed")]
    KernelTooOld(String),
    #[error(
        "not enough memory for the ring of {ring_size} bytes and the programs: {limit}; try a smaller --ring-size"
    )]
    Memory { ring_size: u32, limit: &'static str },
    #[error("the kernel's verifier refused the program for {path}: {reason}")]
    Verifier { path: Path, reason: String },
    #[error("cannot {step}: {reason}")]
    Other { step: &'static str, reason: String },
}

/// What was tried when an error came.
#[derive(Clone, Copy)]
pub(super) struct Attempt {
    pub step: &'static str,
    pub path: Path,
    pub ring_size: u32,
}

impl Attempt {
    /// Explains an error of aya's by its errno and by what this process and kernel are.
    pub(super) fn explain(self, error: &(dyn Error + 'static)) -> StartError {
        let release = release();
        if version(&release).is_some_and(|version| version < OLDEST) {
            return StartError::KernelTooOld(release);
        }
        let errno = errno_of(error);
        match errno {
            Some(libc::EPERM | libc::EACCES) if !missing().is_empty() => {
                return StartError::Capabilities(listed(&missing()));
            }
            Some(libc::EPERM) if locked_down() => return StartError::Lockdown,
            // Before 5.11 the limit is answered with EPERM.
            Some(libc::EPERM)
                if version(&release).is_some_and(|version| version < CGROUP_ACCOUNTING)
                    && memlock_limited() =>
            {
                return StartError::Memory {
                    ring_size: self.ring_size,
                    limit: "RLIMIT_MEMLOCK is too low, and could not be raised",
                };
            }
            Some(libc::EPERM) => return StartError::Forbidden("CAP_BPF and CAP_PERFMON"),
            Some(libc::ENOMEM) => {
                return StartError::Memory {
                    ring_size: self.ring_size,
                    limit: "the memory cgroup's limit, or the machine's memory, is used up",
                };
            }
            Some(errno @ (libc::EMFILE | libc::ENFILE)) => {
                return StartError::Other {
                    step: self.step,
                    reason: io::Error::from_raw_os_error(errno).to_string(),
                };
            }
            _ => {}
        }
        if let Some(log) = verifier_log(error) {
            return refusal(self.path, &log);
        }
        StartError::Other {
            step: self.step,
            reason: chain(error),
        }
    }
}

/// What the verifier's log means.
fn refusal(path: Path, log: &str) -> StartError {
    let reason = last_words(log);
    // Every kernel that we run on has this helper, and lockdown takes it away.
    if reason.contains("bpf_probe_read_kernel#") {
        return StartError::Lockdown;
    }
    StartError::Verifier { path, reason }
}

/// The capabilities that this thread lacks to trace in every network namespace, in words.
pub(super) fn missing_for_all_namespaces() -> Option<String> {
    let effective = caps::read(None, CapSet::Effective).unwrap_or_default();
    let mut names = missing();
    // To enter a namespace, and to find those of other users' processes.
    for (capability, name) in [
        (Capability::CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
        (Capability::CAP_SYS_PTRACE, "CAP_SYS_PTRACE"),
    ] {
        if !effective.contains(&capability) {
            names.push(name);
        }
    }
    (!names.is_empty()).then(|| listed(&names))
}

fn listed(names: &[&str]) -> String {
    match names {
        [most @ .., last] if !most.is_empty() => format!("{} and {last}", most.join(", ")),
        names => names.concat(),
    }
}

/// Names of the capabilities that loading needs and that this thread lacks.
fn missing() -> Vec<&'static str> {
    let Ok(effective) = caps::read(None, CapSet::Effective) else {
        return Vec::new();
    };
    if effective.contains(&Capability::CAP_SYS_ADMIN) {
        return Vec::new();
    }
    [
        (Capability::CAP_BPF, "CAP_BPF"),
        (Capability::CAP_PERFMON, "CAP_PERFMON"),
    ]
    .into_iter()
    .filter(|(capability, _)| !effective.contains(capability))
    .map(|(_, name)| name)
    .collect()
}

fn locked_down() -> bool {
    fs::read_to_string("/sys/kernel/security/lockdown")
        .is_ok_and(|text| text.contains("[confidentiality]"))
}

fn memlock_limited() -> bool {
    rustix::process::getrlimit(rustix::process::Resource::Memlock)
        .current
        .is_some()
}

/// Lifts the limit that maps count against before 5.11. Without the right to, loading says so.
pub(super) fn lift_memlock() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if version(&release()).is_some_and(|version| version < CGROUP_ACCOUNTING) {
        // A failure shows as EPERM of the first map, which is explained there.
        let _ = setrlimit(
            Resource::Memlock,
            Rlimit {
                current: None,
                maximum: None,
            },
        );
    }
}

pub(super) fn has_btf() -> bool {
    FsPath::new(VMLINUX).exists()
}

fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// Major and minor number of a release like `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn errno_of(error: &(dyn Error + 'static)) -> Option<i32> {
    sources(error).find_map(|error| error.downcast_ref::<io::Error>()?.raw_os_error())
}

fn verifier_log(error: &(dyn Error + 'static)) -> Option<String> {
    sources(error).find_map(|error| match error.downcast_ref()? {
        ProgramError::LoadError { verifier_log, .. } => Some(verifier_log.to_string()),
        _ => None,
    })
}

/// Why the kernel did not take a program that it may lack: the errno, and the verifier's reason where it gave one.
pub(super) fn in_short(error: &(dyn Error + 'static)) -> String {
    match (errno_of(error), verifier_log(error)) {
        (_, Some(log)) if !log.trim().is_empty() => last_words(&log),
        (Some(errno), _) => io::Error::from_raw_os_error(errno).to_string(),
        _ => chain(error),
    }
}

/// The verifier's last line that is not statistics: the reason.
fn last_words(log: &str) -> String {
    const STATISTICS: [&str; 4] = [
        "processed ",
        "verification time",
        "stack depth",
        "peak_states",
    ];
    log.lines()
        .map(str::trim)
        .rfind(|line| !line.is_empty() && !STATISTICS.iter().any(|word| line.starts_with(word)))
        .unwrap_or("it gave no reason")
        .to_owned()
}

/// The error and its causes in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for error in sources(error) {
        let part = error.to_string().replace('\n', " ");
        if !text.ends_with(&part) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&part);
        }
    }
    text
}

fn sources<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("5.10.0"), Some((5, 10)));
        assert!(version("5.10.0").unwrap() > OLDEST);
        assert!(version("5.4.0").unwrap() < OLDEST);
        assert_eq!(version("unknown"), None);
    }

    #[test]
    fn the_verifier_is_quoted_with_its_reason() {
        let log = "0: (85) call bpf_get_socket_cookie#46\nunknown func bpf_get_socket_cookie#46\n\
                   verification time 30 usec\nstack depth 0\nprocessed 3 insns (limit 1000000) peak_states 0\n\n";
        assert_eq!(last_words(log), "unknown func bpf_get_socket_cookie#46");
        assert_eq!(last_words(""), "it gave no reason");
    }

    #[test]
    fn a_helper_that_lockdown_takes_away_is_told_as_that() {
        for path in [Path::TpBtf, Path::TpBtfNoCookie] {
            for refused in ["unknown func", "program of this type cannot use helper"] {
                let log = |helper| {
                    format!("7: (85) call {helper}\n{refused} {helper}\nprocessed 8 insns\n")
                };
                let locked = refusal(path, &log("bpf_probe_read_kernel#113"));
                assert!(matches!(locked, StartError::Lockdown), "{locked}");
                let old = refusal(path, &log("bpf_get_socket_cookie#46"));
                assert!(matches!(old, StartError::Verifier { .. }), "{old}");
            }
        }
    }

    #[test]
    fn names_are_listed_as_one_says_them() {
        assert_eq!(listed(&["A"]), "A");
        assert_eq!(listed(&["A", "B"]), "A and B");
        assert_eq!(listed(&["A", "B", "C"]), "A, B and C");
    }

    #[test]
    fn causes_come_in_one_line() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot map\nthe ring")]
        struct Outer(#[source] io::Error);

        let error = Outer(io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(errno_of(&error), Some(libc::ENOSPC));
        assert_eq!(
            chain(&error),
            "cannot map the ring: No space left on device (os error 28)"
        );
    }
}
