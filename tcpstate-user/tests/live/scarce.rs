//! Where there is not enough: no room on the disk, no descriptors, no memory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::daemon::{Daemon, LOOPBACK, in_namespace, refused, storm};
use crate::faults::{until_right, with};
use crate::judge::kernel;
use crate::lab::{not_applicable, until};
use crate::tracer::product;

/// Where the disk is full that its lines go to.
#[test]
fn a_watch_that_can_not_write_says_so() {
    in_namespace(|_| {
        let full = OpenOptions::new().write(true).open("/dev/full");
        let mut watch = Command::new(product());
        watch.args(["watch", "--direct", "-q", "--netns", "self", "-o", "json"]);
        let output = watch.stdout(full.expect("/dev/full")).output();
        let output = output.expect("the product starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(
            said,
            "tcpstate: error: can't write to stdout: No space left on device (os error 28)\n"
        );
    });
}

/// Takes all descriptors that the daemon may have: connections that ask for nothing, as long as they are there.
fn take_all_descriptors(daemon: &Daemon) -> Vec<TcpStream> {
    /// More than it has at any time for a dump, a sweep and a scrape together.
    const MORE: u64 = 20;
    let files = format!("/proc/{}/fd", daemon.pid());
    let open = || fs::read_dir(&files).expect("ours").count() as u64;
    let most = Some(open() + MORE);
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    let pid = Pid::from_raw(daemon.pid() as i32);
    prlimit(pid, Resource::Nofile, limit).expect("our child");
    let address = SocketAddr::new(LOOPBACK, 10975);
    let silent = (0..100).map(|_| TcpStream::connect(address).expect("connected"));
    let silent = silent.collect();
    // Those of a dump come and go, and where it found none left it waits for a second before it takes a connection.
    until("it has nearly as many as it may", || {
        Some(open() + 5) >= most
    });
    silent
}

/// More connections than it may have descriptors: it goes on tracing, and answers again when they are gone.
#[test]
fn a_daemon_without_descriptors_goes_on() {
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        let before = daemon.metrics();
        let silent = take_all_descriptors(&daemon);
        let connections = storm(Duration::from_secs(2));
        drop(silent);
        until("it answers", || daemon.get("/-/ready").0 == 200);
        let right_after = until_right(&daemon);
        let after = daemon.metrics();
        let lost = |metrics, reason| with(metrics, "tcpstate_events_lost_total", reason);
        // The kernel's count of those is of the whole host.
        let skipped = lost(&after, "\"recursion\"") - lost(&before, "\"recursion\"");
        let received = "tcpstate_events_received_total";
        let received = after.sum(received) - before.sum(received);
        println!("{connections} connections; gauges right {right_after:?} after it answered");
        assert!(received + skipped >= (6 * connections) as f64);
        let counted = "tcpstate_kernel_transitions_total";
        let counted = after.sum(counted) - before.sum(counted);
        assert!(counted + skipped >= (6 * connections) as f64);
        for reason in ["\"ring_full\"", "\"decode\"", "\"table_full\""] {
            assert_eq!(lost(&after, reason), 0.0, "{reason}");
        }
    });
}

/// A dump repairs what was lost, and can't be made then.
#[test]
fn what_is_lost_without_descriptors_is_repaired_when_there_are_some() {
    in_namespace(|_| {
        let daemon = Daemon::start(&["--ring-size", "4096", "--reconcile-interval", "1h"]);
        let failed = (0..5).any(|_| {
            let silent = take_all_descriptors(&daemon);
            storm(Duration::from_secs(3));
            drop(silent);
            until("it answers", || daemon.get("/-/ready").0 == 200);
            let metrics = daemon.metrics();
            let lost = with(&metrics, "tcpstate_events_lost_total", "\"ring_full\"");
            assert!(lost > 0.0, "a ring of a page held all");
            // Descriptors that the daemon itself had free a dump may have taken back before a connection did.
            metrics.get("tcpstate_reconcile_failures_total") > 0.0
        });
        assert!(failed, "each dump was made without descriptors");
        until_right(&daemon);
    });
}

/// A memory cgroup; goes with this, when it is empty.
struct MemoryCgroup(PathBuf);

impl MemoryCgroup {
    fn new(limit: &str) -> io::Result<Self> {
        let name = format!("tcpstate-test-{}", std::process::id());
        let [v1, v2] = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].map(Path::new);
        let (parent, file) = if v1.exists() {
            (v1, "memory.limit_in_bytes")
        } else {
            fs::write(v2.join("cgroup.subtree_control"), "+memory")?;
            (v2, "memory.max")
        };
        let group = Self(parent.join(name));
        fs::create_dir(&group.0)?;
        fs::write(group.0.join(file), limit)?;
        Ok(group)
    }

    /// To write a 0 to, which has the writer moved there.
    fn door(&self) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .open(self.0.join("cgroup.procs"))
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        until("the cgroup is empty", || fs::remove_dir(&self.0).is_ok());
    }
}

#[test]
fn a_memory_limit_that_is_too_low_is_told_at_the_start() {
    in_namespace(|_| {
        if kernel() < (5, 11) {
            not_applicable("maps are charged to no memory cgroup before 5.11");
            return;
        }
        let group = MemoryCgroup::new("100M").expect("a memory cgroup needs root");
        let door = group.door().expect("ours");
        let mut watch = Command::new(product());
        watch.args(["watch", "--direct", "--netns", "self", "-d", "100ms"]);
        watch.args(["--ring-size", "256MiB"]);
        // SAFETY: makes a system call only.
        unsafe {
            watch.pre_exec(move || {
                rustix::io::write(&door, b"0")?;
                Ok(())
            });
        }
        let (status, said) = refused(&mut watch);
        assert_eq!(status, 1, "{said}");
        assert_eq!(
            said,
            "tcpstate: error: not enough memory for the ring of 268435456 bytes and the programs: the memory cgroup's \
             limit, or the machine's memory, is used up; try a smaller --ring-size\n"
        );
    });
}
