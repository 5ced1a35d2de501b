//! `tcpstate check`: what it says of the running kernel, without rights, and in a container's namespaces.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;
use tempfile::TempDir;

use crate::judge::kernel;
use crate::tracer::product;
use crate::without::{CLASSIC, WHOLE, flags};

/// Each socket of the proof.
const SOCKETS: [&str; 5] = [
    "listener",
    "closing_client",
    "closing_server",
    "resetting_client",
    "reset_server",
];

struct Said {
    status: Option<i32>,
    pid: u32,
    lines: Vec<Value>,
}

impl Said {
    fn by(command: &mut Command, arguments: &[&str]) -> Self {
        let child = command
            .args(["check", "-o", "json"])
            .args(arguments)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("the product starts");
        let pid = child.id();
        let output = child.wait_with_output().expect("our child");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        let text = String::from_utf8(output.stdout).expect("text");
        let parse = |line| serde_json::from_str(line).expect("JSON");
        Self {
            status: output.status.code(),
            pid,
            lines: text.lines().map(parse).collect(),
        }
    }

    fn of(&self, kind: &str) -> Vec<&Value> {
        self.lines
            .iter()
            .filter(|line| line["type"] == kind)
            .collect()
    }

    /// Its status, and the reason.
    fn feature(&self, name: &str) -> (&str, &str) {
        let lines = self.of("check");
        let mut lines = lines.into_iter().filter(|line| line["feature"] == name);
        let line = lines
            .next()
            .unwrap_or_else(|| panic!("no {name}: {:?}", self.lines));
        assert_eq!(lines.next(), None, "{name}");
        let text = |field: &str| line[field].as_str();
        (
            text("status").expect("a status"),
            text("reason").unwrap_or_default(),
        )
    }

    fn verdict(&self) -> (&str, &[Value]) {
        let last = self.lines.last().expect("a line");
        assert_eq!(last["type"], "verdict");
        let verdict = last["verdict"].as_str().expect("a verdict");
        (verdict, last["missing"].as_array().expect("a list"))
    }

    fn assert_proven(&self, pid: Option<u32>) {
        let proof = self.of("proof");
        let sockets: Vec<&Value> = proof.iter().map(|line| &line["socket"]).collect();
        assert_eq!(sockets, SOCKETS);
        for line in proof {
            assert_eq!(line["told"], true, "{line}");
            assert_eq!(line["own_namespace"], true, "{line}");
            assert_eq!(line["pid"].as_u64(), pid.map(u64::from), "{line}");
        }
    }

    fn assert_untried(&self) {
        let (status, reason) = self.feature("tracing");
        assert_eq!(status, "missing", "{reason}");
        assert_eq!(self.feature("accept_fexit").0, "undecided");
        for line in self.of("proof") {
            assert_eq!(line["told"], Value::Null, "{line}");
        }
        assert_eq!(self.verdict().0, "impossible");
        assert_eq!(self.status, Some(1));
    }
}

/// What of the kernel's is missing, and why, where the product does without these.
fn known_to_lack(without: &str) -> Vec<(&'static str, &'static str)> {
    const TOLD: &str = "told to do without";
    let told = |feature: &str| without.split(',').any(|it| it == feature);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    let btf = !told("tp_btf");
    let cookie = btf && !told("socket_cookie") && kernel() >= (5, 12);
    let because = |feature, reasons: &[(bool, &'static str)]| {
        let told = [(told(feature), TOLD), (!btf, "it needs BTF")];
        let mut all = told.iter().chain(reasons);
        Some((feature, all.find(|(holds, _)| *holds)?.1))
    };
    // Firecracker's kernel, where tcpstate is developed, refuses fexit and fentry.
    let refused = (release.contains("-fc-"), "Operation not permitted");
    let no_cookie = (!cookie, "it needs the socket cookie");
    // Of the function behind accept; the program for kernels without cookies is for theirs.
    let arguments = (!cookie && kernel() >= (6, 10), "has 2 arguments");
    let all = [
        because("tp_btf", &[]),
        because(
            "socket_cookie",
            &[(!cookie, "unknown func bpf_get_socket_cookie")],
        ),
        because("accept_fexit", &[arguments, refused]),
        because("time_wait_fentry", &[no_cookie, refused]),
        because("task_file_iter", &[no_cookie]),
        because("tcp_iter", &[]).filter(|_| !cookie),
    ];
    all.into_iter().flatten().collect()
}

/// What is missing is what that kernel is known to lack, and no more.
#[test]
fn what_this_kernel_has_is_told() {
    features(WHOLE);
}

pub fn features(without: &'static str) {
    in_thread(move || {
        if without == CLASSIC {
            crate::sys::mount_tracefs().expect("tracefs in a mount namespace needs root");
        }
        told_of_features(without);
    });
}

fn told_of_features(without: &str) {
    let said = Said::by(&mut Command::new(product()), &flags(without));
    let mut missing = known_to_lack(without);
    if let Err(error) = fs::metadata("/proc/1/ns/net") {
        missing.push(("network_namespaces", error.kind().to_string().leak()));
    }
    let (verdict, told) = said.verdict();
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    assert_eq!(told, names, "{:?}", said.lines);
    for (name, reason) in missing {
        let (status, told) = said.feature(name);
        assert_eq!(status, "missing");
        let told = told.to_lowercase();
        assert!(told.contains(&reason.to_lowercase()), "{name}: {told}");
    }
    for name in ["tracing", "inet_diag", "initial_pid_namespace"] {
        assert_eq!(said.feature(name).0, "in_use", "{name}");
    }
    let expected = if names.is_empty() {
        ("complete", Some(0))
    } else {
        ("partial", Some(3))
    };
    assert_eq!((verdict, said.status), expected);
    said.assert_proven(Some(said.pid));
}

#[test]
fn check_without_rights_says_what_would_help() {
    // The product may lie where others don't get to.
    let folder = TempDir::new().expect("a folder");
    let product_of_all = folder.path().join("tcpstate");
    fs::copy(product(), &product_of_all).expect("a copy");
    let all = || Permissions::from_mode(0o755);
    fs::set_permissions(folder.path(), all()).expect("ours");
    fs::set_permissions(&product_of_all, all()).expect("ours");

    let mut command = Command::new(product_of_all);
    // Sets the groups too, and with root's uid the capabilities go.
    let said = Said::by(command.uid(65534).gid(65534), &[]);
    said.assert_untried();
    let (_, reason) = said.feature("tracing");
    assert!(reason.contains("CAP_BPF and CAP_PERFMON"), "{reason}");
    assert!(reason.contains("run as root"), "{reason}");
    let (status, reason) = said.feature("network_namespaces");
    assert_eq!(status, "missing");
    assert!(reason.contains("CAP_SYS_ADMIN"), "{reason}");
    assert_eq!(said.feature("inet_diag").0, "in_use");
}

#[test]
fn check_in_a_user_namespace_says_that_it_is_in_the_way() {
    let mut command = Command::new(product());
    // SAFETY: between fork and exec it makes system calls only.
    unsafe {
        // SAFETY: the child is one thread; no descriptors are unshared.
        command.pre_exec(|| Ok(unshare_unsafe(UnshareFlags::NEWUSER)?));
    }
    let said = Said::by(&mut command, &[]);
    said.assert_untried();
    let (_, reason) = said.feature("tracing");
    assert!(reason.starts_with("no right to load eBPF"), "{reason}");
}

/// Its own pids are others' there, and owners are told right all the same.
#[test]
fn check_in_a_pid_namespace_of_its_own_proves_without_its_pid() {
    in_thread(|| {
        // SAFETY: children of this thread get it; no descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.expect("root");
        let mut command = Command::new(product());
        // SAFETY: between fork and exec it makes system calls only.
        unsafe {
            command.pre_exec(own_proc);
        }
        let said = Said::by(&mut command, &[]);
        let (status, reason) = said.feature("initial_pid_namespace");
        assert_eq!(status, "missing");
        assert!(reason.contains("--pid=host"), "{reason}");
        let (verdict, missing) = said.verdict();
        assert_eq!(verdict, "partial");
        assert!(missing.contains(&"initial_pid_namespace".into()));
        assert_eq!(said.status, Some(3));
        said.assert_proven(None);
    });
}

/// A `/proc` for the pid namespace, in a mount namespace.
fn own_proc() -> io::Result<()> {
    // SAFETY: the child is one thread; no descriptors are unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    Ok(mount("proc", "/proc", "proc", MountFlags::empty(), None)?)
}

/// Namespaces are a thread's.
fn in_thread(test: impl FnOnce() + Send + 'static) {
    thread::spawn(test)
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
