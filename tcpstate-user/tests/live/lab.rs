//! A network namespace of its own with a tracer in it: what a scenario does, and what it expects to be told.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::judge::{self, Context, Seen};
use crate::sockets;
use crate::sys;
use crate::tracer::Tracer;
use crate::without::{CLASSIC, flags};

/// How often a scenario is done in which the kernel skips the program.
const TRIES: usize = 3;

/// What is expected of one socket.
#[derive(Clone, Debug)]
pub struct Expected {
    pub who: &'static str,
    /// `None` where the test can't know it.
    pub local: Option<SocketAddr>,
    pub remote: Option<SocketAddr>,
    /// The states, first to last.
    pub states: &'static str,
    pub role: Option<&'static str>,
    pub owner_source: &'static str,
    pub pid: Option<u32>,
    /// Who holds it besides; a sweep may come at any time.
    pub heir: Option<u32>,
    pub end: Option<&'static str>,
    /// Bounds of the last dwell that is told, by the test's own clock.
    pub dwell: Option<(Duration, Duration)>,
}

impl Expected {
    /// `end` is what its last line says.
    pub fn end(mut self, end: &'static str) -> Self {
        self.end = Some(end);
        self
    }

    pub fn pid(mut self, pid: u32) -> Self {
        self.pid = Some(pid);
        self
    }

    pub fn heir(mut self, pid: u32) -> Self {
        self.heir = Some(pid);
        self
    }

    pub fn dwell(mut self, least: Duration, most: Duration) -> Self {
        self.dwell = Some((least, most));
        self
    }
}

fn expected(who: &'static str, states: &'static str) -> Expected {
    Expected {
        who,
        local: None,
        remote: None,
        states,
        role: None,
        owner_source: "listen",
        pid: Some(std::process::id()),
        heir: None,
        end: None,
        dwell: None,
    }
}

pub fn client(local: SocketAddr, remote: SocketAddr, states: &'static str) -> Expected {
    Expected {
        local: Some(local),
        ..unbound_client(remote, states)
    }
}

/// One whose local end the test never learns.
pub fn unbound_client(remote: SocketAddr, states: &'static str) -> Expected {
    Expected {
        remote: Some(remote),
        role: Some("active"),
        owner_source: "connect",
        ..expected("client", states)
    }
}

/// The socket that a listener makes for a connection.
pub fn child(local: SocketAddr, remote: SocketAddr, states: &'static str) -> Expected {
    Expected {
        local: Some(local),
        remote: Some(remote),
        role: Some("passive"),
        owner_source: "listener",
        ..expected("child", states)
    }
}

pub fn listener(local: SocketAddr, states: &'static str) -> Expected {
    Expected {
        local: Some(local),
        ..expected("listener", states)
    }
}

/// A closed socket told to be closed, with no connection to belong to.
pub fn closed(local: SocketAddr) -> Expected {
    Expected {
        local: Some(local),
        owner_source: "none",
        pid: None,
        ..expected("closed socket", "CLOSE CLOSE")
    }
}

pub struct Lab {
    pub inode: u32,
    /// What the product does without.
    without: &'static str,
    /// The kernel did what the scenario does not expect: it is to be done again.
    again: Arc<AtomicBool>,
    tracer: Tracer,
    started: SystemTime,
    addresses: [IpAddr; 2],
    expected: Vec<Expected>,
    /// Local ends that were one socket's, one after the other.
    same: Vec<(SocketAddr, SocketAddr)>,
    kept: Vec<Box<dyn Any>>,
}

impl Lab {
    /// Runs a scenario in a new namespace with a tracer that sees only that, then judges what was told.
    ///
    /// The kernel runs no program on a CPU that is running it already: transitions in a softirq that interrupts it are
    /// not shown. Where the product tells of that, the scenario is done again; where the kernel [keeps an
    /// orphan](keeps_orphan); and where it [hides events](kernel_hides).
    pub fn run(without: &'static str, scenario: impl Fn(&mut Self) + Clone + Send + 'static) {
        let name = thread::current().name().unwrap_or("lab").to_owned();
        for attempt in 1..=TRIES {
            let skipped = Arc::new(AtomicBool::new(false));
            let (told, scenario) = (Arc::clone(&skipped), scenario.clone());
            let judged = thread::Builder::new()
                .name(name.clone())
                .spawn(move || {
                    let mut lab = Self::start(without, told);
                    scenario(&mut lab);
                    lab.finish();
                })
                .expect("a thread")
                .join();
            match judged {
                Ok(()) => return,
                Err(_) if skipped.load(Ordering::Relaxed) => {}
                Err(_) if kernel_hides() && attempt < TRIES => {
                    println!("done once more, for this kernel hides events");
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        panic!("the kernel skipped the program, or kept an orphan, in each of {TRIES} tries");
    }

    fn start(without: &'static str, skipped: Arc<AtomicBool>) -> Self {
        let inode = sys::new_namespace().expect("network namespaces need root");
        let mut addresses = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let netns = inode.to_string();
        let mut arguments = vec!["watch", "-o", "json", "--raw", "--direct", "--netns"];
        if without == CLASSIC {
            sys::mount_tracefs().expect("tracefs in a mount namespace needs root");
            // It sees every namespace.
            addresses = nobody_elses(77);
            arguments.push("all");
        } else {
            arguments.push(&netns);
        }
        arguments.extend(flags(without));
        let started = SystemTime::now();
        Self {
            inode,
            without,
            again: Arc::clone(&skipped),
            tracer: Tracer::start(&arguments, skipped),
            started,
            addresses,
            expected: Vec::new(),
            same: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Addresses of this namespace, one of each family: what works for one must for the other.
    pub fn addresses(&self) -> [IpAddr; 2] {
        self.addresses
    }

    pub fn expect(&mut self, sockets: impl IntoIterator<Item = Expected>) {
        self.expected.extend(sockets);
    }

    /// The connections with these local ends were the same socket's, with nothing in between.
    pub fn expect_same_socket(&mut self, first: SocketAddr, then: SocketAddr) {
        self.same.push((first, then));
    }

    /// Keeps sockets open until the tracer has ended.
    pub fn keep(&mut self, what: impl Any) {
        self.kept.push(Box::new(what));
    }

    /// Waits until a socket with this local port was told to be in the state.
    pub fn wait_for(&self, local: SocketAddr, state: &str) {
        let port = Value::from(local.port());
        let what = format!("{local} in {state}");
        self.tracer.wait_for(&what, |line| {
            line["local_port"] == port && line["to"] == state
        });
    }

    /// Waits until all transitions up to now have been told.
    pub fn settle(&self) {
        let address = SocketAddr::new(self.addresses[0], judge::MARKER_PORT);
        let markers = |line: &Value| is_marker(line, address) && line["to"] == "CLOSE";
        let port = sockets::connect_to_nobody(address);
        let port = Value::from(port);
        self.tracer.wait_for("the marker", |line| {
            markers(line) && line["local_port"] == port
        });
    }

    fn finish(self) {
        // What is still on its way; then the marker shows that nothing else is.
        self.tracer.wait_until(Duration::from_secs(10), |lines| {
            judge::all_told(&self.expected, &self.sockets(lines))
        });
        if keeps_orphan() {
            self.again.store(true, Ordering::Relaxed);
        }
        self.settle();
        let (status, lines, said) = self.tracer.stop();
        let finished = SystemTime::now();
        assert!(
            status.success(),
            "SIGTERM ended the product with {status}; it said {said:?}"
        );
        let context = Context {
            without: self.without,
            netns: (self.without != CLASSIC).then_some(self.inode),
            window: (unix_ns(self.started), unix_ns(finished)),
        };
        if context.netns.is_some() {
            assert_eq!(said.len(), 1, "more than the line `tracing …`: {said:?}");
        }
        judge::stream(&lines, &context);
        let sockets = sockets_of(&lines, self.without, self.addresses);
        let mut complaints = judge::sockets(&self.expected, &sockets, &context);
        for (first, then) in self.same {
            complaints.extend(judge::generations(first, then, &sockets, &context));
        }
        if !complaints.is_empty() {
            let mut report = complaints.join("\n");
            for line in &lines {
                write!(report, "\n{line}").expect("memory");
            }
            panic!("{report}");
        }
        drop(self.kept);
    }

    fn sockets<'a>(&self, lines: &'a [Value]) -> BTreeMap<&'a str, Seen<'a>> {
        sockets_of(lines, self.without, self.addresses)
    }
}

/// The lab's own sockets by id, without the markers.
fn sockets_of<'a>(
    lines: &'a [Value],
    without: &str,
    addresses: [IpAddr; 2],
) -> BTreeMap<&'a str, Seen<'a>> {
    let marker = SocketAddr::new(addresses[0], judge::MARKER_PORT);
    let ours = |line: &Value| {
        addresses.iter().any(|address| {
            let address = address.to_string();
            line["local_addr"] == *address || line["remote_addr"] == *address
        })
    };
    let mut sockets: BTreeMap<&str, Seen<'_>> = BTreeMap::new();
    for line in lines.iter().filter(|line| line["type"] == "transition") {
        if is_marker(line, marker) || (without == CLASSIC && !ours(line)) {
            continue;
        }
        let id = line["id"].as_str().expect("id is a string");
        sockets.entry(id).or_default().lines.push(line);
    }
    sockets
}

/// Has the runner show why the test can't tell anything on this kernel; it then ends without having failed.
pub fn not_applicable(reason: &str) {
    println!("not applicable: {reason}");
}

/// Whether QEMU computes what the processor does: no time says anything there.
pub fn emulated() -> bool {
    let cpus = fs::read_to_string("/proc/cpuinfo");
    cpus.expect("/proc is mounted").contains("QEMU TCG")
}

/// Whether nobody else uses the machine, whose clocks are ours to set: one that `cargo xtask vm` has booted.
pub fn is_guest() -> bool {
    std::env::var_os("TCPSTATE_GUEST").is_some()
}

/// The kernel that tcpstate is developed on runs no tracing program, and counts no skip, while a thread of its own first
/// process is the current task (`docs/principles.md`): what a timer does just then is told by no event.
pub fn kernel_hides() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    release.expect("/proc is mounted").contains("-fc-")
}

/// Whether the calling thread's namespace has a full socket in FIN_WAIT2 without a descriptor. An ACK that comes just while
/// the last close gives the socket's lock back leaves one there, with a timer, in place of a timewait socket
/// (`tcp_rcv_state_process`): its →CLOSE comes a minute later.
fn keeps_orphan() -> bool {
    ["tcp", "tcp6"].iter().any(|name| {
        let path = format!("/proc/thread-self/net/{name}");
        let text = fs::read_to_string(path).expect("/proc is mounted");
        text.lines().skip(1).any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // State, timer (2: of a full socket), inode.
            fields[3] == "05" && fields[5].starts_with("02:") && fields[9] == "0"
        })
    })
}

/// Addresses of the calling thread's namespace that no other has, if `last` is nobody else's.
pub fn nobody_elses(last: u8) -> [IpAddr; 2] {
    let addresses = [Ipv4Addr::new(127, 77, 0, last).into(), sys::v6(last.into())];
    sys::add_address("lo", addresses[1]).expect("an address for lo");
    sys::wait_for_address(addresses[1]).expect("an address for lo");
    addresses
}

fn is_marker(line: &Value, address: SocketAddr) -> bool {
    line["remote_port"] == address.port() && line["remote_addr"] == *address.ip().to_string()
}

fn unix_ns(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH)
        .expect("after 1970")
        .as_nanos()
}

/// Waits for the kernel to get somewhere; by polling, for nothing tells.
pub fn until(what: &str, condition: impl FnMut() -> bool) {
    until_within(Duration::from_secs(20), what, condition);
}

/// After a sweep there is none for fifty times as long as it took: a second or more where it reads `/proc` of a slow machine.
pub const TWO_SWEEPS: Duration = Duration::from_secs(120);

pub fn until_within(patience: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + patience;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The states, by number, of the sockets with this local port in the calling thread's namespace, as
/// /proc/net/tcp and tcp6 show them: TIME_WAIT and what the tracepoint can't see too.
pub fn proc_states(port: u16) -> Vec<u8> {
    ["tcp", "tcp6"]
        .iter()
        .flat_map(|name| {
            let path = format!("/proc/thread-self/net/{name}");
            let text = fs::read_to_string(path).expect("/proc is mounted");
            let states = text.lines().skip(1).filter_map(|line| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let (_, local_port) = fields[1].rsplit_once(':')?;
                (local_port == format!("{port:04X}"))
                    .then(|| u8::from_str_radix(fields[3], 16).expect("hex"))
            });
            states.collect::<Vec<u8>>()
        })
        .collect()
}
