//! Network namespaces: which are found and entered, and what is said where one can't be.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::net::Shutdown;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tempfile::TempDir;

use crate::daemon::{Daemon, in_namespace, refused};
use crate::lab::{TWO_SWEEPS, until, until_within};
use crate::sockets::{Tcp, connect_to_nobody};
use crate::sys;
use crate::tracer::{Tracer, product};
use crate::without::{COOKIE_ALONE, WHOLE, flags};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own, by which nobody finds that: it is not its process' main thread.
struct Inside {
    inode: u32,
    jobs: mpsc::Sender<Job>,
}

impl Inside {
    fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (ready, inode) = mpsc::channel();
        thread::spawn(move || {
            let inode = sys::new_namespace().expect("network namespaces need root");
            ready.send(inode).expect("awaited");
            todo.into_iter().for_each(|job| job());
        });
        let inode = inode.recv().expect("it begins");
        Self { inode, jobs }
    }

    /// Runs it there, and waits.
    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || done.send(job()).expect("awaited"));
        self.jobs.send(job).expect("it runs");
        result.recv().expect("the job ends")
    }

    /// Listens there with that many sockets.
    fn listen(&self, count: usize) -> Vec<Tcp> {
        self.run(move || (0..count).map(|_| Tcp::listening(LOOPBACK, 1)).collect())
    }

    /// A process whose main thread is there.
    fn process(&self) -> sys::Fork {
        self.run(|| {
            let pause = || loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            };
            sys::Fork::new(&[], pause).expect("a process")
        })
    }

    /// Gives it a name, as `ip netns add` does, in a mount namespace of the calling thread's own.
    fn mount(&self, folder: &Path) {
        let name = folder.join("name");
        File::create(&name).expect("a file");
        let there = self.run(|| File::open("/proc/thread-self/ns/net").expect("/proc"));
        // SAFETY: this thread gets its own idea of the root and current folders; it changes neither.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("mount namespaces need root");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).expect("private mounts");
        let there = format!("/proc/self/fd/{}", there.as_raw_fd());
        mount_bind(there, &name).expect("a mount");
    }
}

/// Whether a thread of this process is in that namespace.
fn has_thread_in(inode: u32) -> bool {
    let threads = std::fs::read_dir("/proc/self/task").expect("/proc is mounted");
    let mut links = threads.flatten().map(|thread| thread.path().join("ns/net"));
    links.any(|link| rustix::fs::stat(&link).is_ok_and(|it| it.st_ino == u64::from(inode)))
}

/// Listeners that are older than the daemon, as no event shows them: only a dump of their namespace does. So many that
/// those of the host and of other tests make no difference.
#[test]
fn all_namespaces_are_those_of_processes_names_and_threads() {
    for without in [WHOLE, COOKIE_ALONE] {
        all_namespaces(without);
    }
}

fn all_namespaces(without: &'static str) {
    in_namespace(move |_| {
        let folder = TempDir::new().expect("a folder");
        let [lived_in, named, visited] = [Inside::new(), Inside::new(), Inside::new()];
        let _process = lived_in.process();
        named.mount(folder.path());
        let sockets = [lived_in.listen(100), named.listen(200), visited.listen(400)];
        for (inside, count) in [(&lived_in, 100.0), (&named, 200.0)] {
            let one = Daemon::tracing(&inside.inode.to_string(), &["--reconcile-interval", "1h"]);
            assert_eq!(one.metrics().state("listen"), count);
        }

        let often = ["--reconcile-interval", "200ms"];
        let daemon = Daemon::tracing("all", &[&flags(without)[..], &often].concat());
        let comm = std::fs::read_to_string("/proc/self/comm").expect("/proc is mounted");
        let series = format!(
            "tcpstate_process_sockets{{comm=\"{}\",state=\"listen\"}}",
            comm.trim()
        );
        let ours = || daemon.metrics().get(&series);
        let found = ours();
        assert!(found >= 300.0, "{found} listeners");
        // A thread of who is known to own a socket there leads to the namespace. The kernel's iterator finds the holders of
        // any; in `/proc` only those of sockets that were dumped are known, and then an event has to tell of an owner.
        let _told = (!daemon.metrics().uses("task_file_iter")).then(|| visited.listen(1));
        let what = "the namespace that only a thread is in is found";
        until_within(TWO_SWEEPS, what, || (700.0..800.0).contains(&ours()));
        thread::sleep(Duration::from_millis(500));
        assert!(ours() >= 700.0, "what was found stays");
        drop(sockets);
    });
}

/// Also those that no dump could find.
#[test]
fn events_come_from_all_namespaces() {
    in_namespace(|own| {
        let others = [Inside::new(), Inside::new()];
        let arguments = ["watch", "--direct", "-o", "json", "--netns", "all"];
        let tracer = Tracer::start(&arguments, Arc::new(AtomicBool::new(false)));
        let refused = || connect_to_nobody((LOOPBACK, 9).into());
        let ports = [refused(), others[0].run(refused), others[1].run(refused)];
        let inodes = [own, others[0].inode, others[1].inode];
        for (port, inode) in ports.into_iter().zip(inodes) {
            tracer.wait_for(&format!("the failure in {inode}"), |line| {
                line["netns"] == inode && line["local_port"] == port && line["end"] == "refused"
            });
        }
        assert!(tracer.stop().0.success());
    });
}

/// It holds a listener whose owner has ended: no dump can tell of it.
#[test]
fn a_namespace_that_nothing_leads_to_is_named() {
    in_namespace(|_| {
        let folder = TempDir::new().expect("a folder");
        let mut daemon = Command::new(product())
            .args(["daemon", "--netns", "all", "--reconcile-interval", "200ms"])
            .args(["--web.listen-address", "127.0.0.1:0", "--socket"])
            .arg(folder.path().join("socket"))
            .stderr(Stdio::piped())
            .spawn()
            .expect("the product starts");
        let mut said = BufReader::new(daemon.stderr.take().expect("piped")).lines();
        // Where a line does not come, its end is awaited: with the test, or when time is up.
        let (done, over) = mpsc::channel::<()>();
        let limit = thread::spawn(move || {
            let _ = over.recv_timeout(Duration::from_secs(20));
            daemon.kill().expect("it lives");
            daemon.wait().expect("it ends");
        });
        let mut says = |words: &[&str]| {
            let mut lines = said.by_ref().map_while(Result::ok);
            lines.any(|line| words.iter().all(|word| line.contains(word)))
        };
        assert!(says(&["tracing directly"]));
        let inside = Inside::new();
        let inode = inside.inode;
        let socket = inside.run(|| Tcp::bound(LOOPBACK));
        // Nor does a thread of who holds it now. Before it listens: a dump that found the namespace would take it for gone
        // with the thread.
        drop(inside);
        until("the thread has ended", || !has_thread_in(inode));
        let listen = || rustix::net::listen(&socket.fd, 1).expect("listen");
        let process = sys::Fork::new(&[socket.fd.as_fd()], listen).expect("a process");
        until("it listened, and ended", || process.ended().is_some());
        drop(process);
        let named = says(&["known from events only", &inode.to_string()]);
        drop(done);
        limit.join().expect("no panic");
        drop(socket);
        assert!(named, "{inode} was not named");
    });
}

/// Waits until so many sockets, over all states, count by that name.
fn until_there_are(daemon: &Daemon, comm: &str, count: f64) {
    let label = format!("tcpstate_process_sockets{{comm=\"{comm}\"");
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let mut series = daemon.metrics().0;
        series.retain(|name, count| name.starts_with(&label) && *count > 0.0);
        if series.values().sum::<f64>() == count {
            return;
        }
        if Instant::now() > end {
            let (_, listed) = daemon.get(&format!("/v1/sockets?comm={comm}"));
            panic!("waited in vain for {count} sockets of {comm}: {series:#?}, {listed}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A process of that name, in the calling thread's namespaces, that has 20 sockets and leaves 10 in TIME_WAIT.
fn lives(name: &'static CStr) -> sys::Fork {
    let process = sys::Fork::new(&[], || {
        // SAFETY: the kernel reads a name that lives through the call.
        unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
        let listener = Tcp::listening(LOOPBACK, 32);
        let pair = || (Tcp::connected(listener.local()), listener.accept());
        for _ in 0..10 {
            let (client, server) = pair();
            client.shutdown(Shutdown::Write);
            server.peek();
            drop(server);
            drop(client);
        }
        let _pairs = [(); 9].map(|()| pair());
        let _other = Tcp::listening(LOOPBACK, 1);
        loop {
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        }
    });
    process.expect("a process")
}

/// With pid, network and cgroup namespaces of its own, as a container has; then its first process is killed, and with it
/// all that it had.
#[test]
fn a_container_that_was_stopped_has_no_sockets() {
    in_namespace(|_| {
        let daemon = Daemon::tracing("all", &["--reconcile-interval", "500ms"]);
        let inside = Inside::new();
        let init = inside.run(|| {
            let own = UnshareFlags::NEWPID | UnshareFlags::NEWCGROUP;
            // SAFETY: what this thread starts from now on is concerned, and its view of cgroups.
            unsafe { unshare_unsafe(own) }.expect("namespaces need root");
            lives(c"contained")
        });
        until_there_are(&daemon, "contained", 30.0);
        drop(init);
        drop(inside);
        until_there_are(&daemon, "contained", 0.0);
    });
}

/// The kernel gives a new namespace the number of one that is gone: what is told is of the new one.
#[test]
fn a_namespace_with_the_inode_of_one_that_went_is_right() {
    in_namespace(|_| {
        let daemon = Daemon::tracing("all", &["--reconcile-interval", "500ms"]);
        let mut inodes = BTreeSet::new();
        let mut reused = false;
        for _ in 0..20 {
            let inside = Inside::new();
            reused = !inodes.insert(inside.inode);
            let process = inside.run(|| lives(c"inside"));
            until_there_are(&daemon, "inside", 30.0);
            drop(process);
            drop(inside);
            if reused {
                break;
            }
        }
        assert!(reused, "the kernel gave {inodes:?}");
        until_there_are(&daemon, "inside", 0.0);
    });
}

/// The product without capabilities, by number, though it is root's.
fn without(capabilities: &'static [libc::c_ulong], arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(product());
    command.args(arguments).stdout(Stdio::null());
    // SAFETY: only makes system calls.
    unsafe {
        command.pre_exec(move || {
            for &capability in capabilities {
                if libc::prctl(libc::PR_CAPBSET_DROP, capability) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    refused(&mut command)
}

#[test]
fn a_namespace_that_can_not_be_entered_is_told_at_the_start() {
    const SYS_PTRACE: libc::c_ulong = 19;
    const SYS_ADMIN: libc::c_ulong = 21;
    in_namespace(|own| {
        let inside = Inside::new();
        let _process = inside.process();
        let (inode, own) = (inside.inode.to_string(), own.to_string());
        let folder = TempDir::new().expect("a folder");
        let socket = folder.path().join("socket");
        let daemon = [
            "daemon",
            "--socket",
            socket.to_str().expect("text"),
            "--netns",
        ];
        let watch = ["watch", "--direct", "-d", "100ms", "--netns"];
        for command in [&daemon[..], &watch] {
            let told = |capabilities, netns: &str, expected: &[&str]| {
                let (status, said) = without(capabilities, &[command, &[netns]].concat());
                assert_eq!((status, said.lines().count()), (1, 1), "{said}");
                for words in expected {
                    assert!(said.contains(words), "{said}");
                }
            };
            let can_not = format!("can't trace network namespace {inode}: entering it");
            let help = ["CAP_SYS_ADMIN", "--netns self", &can_not];
            told(&[SYS_ADMIN], &inode, &help);
            told(
                &[SYS_ADMIN],
                "all",
                &[": CAP_SYS_ADMIN missing;", "--netns self"],
            );
            told(
                &[SYS_PTRACE],
                "all",
                &[": CAP_SYS_PTRACE missing;", "--netns self"],
            );
            told(&[], "1", &["no network namespace 1 found", "lsns -t net"]);
        }
        // The own one needs neither, by whatever name.
        for netns in [&own, "self"] {
            let (status, said) =
                without(&[SYS_ADMIN, SYS_PTRACE], &[&watch[..], &[netns]].concat());
            assert_eq!(status, 0, "{said}");
            assert!(said.contains("tracing "), "{said}");
        }
    });
}

/// Where most processes can't be seen, that is said; of one namespace nothing is missed.
#[test]
fn another_pid_namespace_is_told() {
    for netns in ["all", "self"] {
        in_namespace(move |_| {
            // SAFETY: only what this thread starts from now on is concerned.
            unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.expect("pid namespaces need root");
            let mut command = Command::new(product());
            command.args(["watch", "--direct", "-d", "100ms", "--netns", netns]);
            let (status, said) = refused(command.stdout(Stdio::null()));
            assert_eq!(status, 0, "{said}");
            // Where sweeps read `/proc`, it is told besides that owners can't be looked up.
            let told = said.contains("network namespaces of processes outside can't be found");
            assert_eq!(told, netns == "all", "{said}");
        });
    }
}
