//! What it costs to find out who holds 100,000 sockets, printed; the product's own parts, measured from outside.

use std::collections::HashSet;
use std::fmt;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, BorrowedFd, IntoRawFd as _};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use tcpstate_user::kernel::{Netns, Options, RingSize, Session, snapshot};
use tcpstate_user::model::NetnsSelection;
use tcpstate_user::owner::{by_iterator, by_proc};
use tcpstate_user::table::{Holder, StateMask};

use crate::daemon::in_namespace;
use crate::sockets::Tcp;
use crate::sys::{self, Fork};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Of processes: one alone may not have as many descriptors everywhere.
const PAIRS: usize = 4;
const CONNECTIONS: usize = 50_000 / PAIRS;
/// Of a [`crowd`], with its listeners.
pub const SOCKETS: usize = 2 * PAIRS * CONNECTIONS + PAIRS;
const ROUNDS: u32 = 7;
const PATIENCE: Duration = Duration::from_secs(120);

/// How long something took.
#[derive(Clone, Copy)]
pub struct Cost {
    pub time: Duration,
    /// Of the processors: what a busy machine leaves as it is.
    pub work: Duration,
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [time, work] = [self.time, self.work].map(|part| part.as_secs_f64() * 1e3);
        write!(f, "{time:.1} ms, {work:.1} ms of a processor")
    }
}

fn worked() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).expect("not negative")
}

pub fn cost_of<T>(work: impl FnOnce() -> T) -> (Cost, T) {
    let (begun, before) = (Instant::now(), worked());
    let result = work();
    let cost = Cost {
        time: begun.elapsed(),
        work: worked() - before,
    };
    (cost, result)
}

/// The least of some rounds.
fn least<T>(mut work: impl FnMut() -> T) -> (Cost, T) {
    let rounds = (0..ROUNDS).map(|_| cost_of(&mut work));
    rounds
        .min_by_key(|(cost, _)| cost.time)
        .expect("there are some")
}

/// Processes that hold 100,000 connected sockets together.
pub fn crowd() -> Vec<Fork> {
    let (ready, tell) = sys::pipe().expect("a pipe");
    let process = |keep: &[BorrowedFd<'_>], open: &dyn Fn() -> Tcp| {
        let process = Fork::new(&[keep, &[tell.as_fd()]].concat(), || {
            let limit = getrlimit(Resource::Nofile);
            let most = Rlimit {
                current: limit.maximum,
                ..limit
            };
            setrlimit(Resource::Nofile, most).expect("no more than is allowed");
            for _ in 0..CONNECTIONS {
                let _ = open().fd.into_raw_fd();
            }
            rustix::io::write(&tell, b"!").expect("somebody reads");
            loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            }
        });
        process.expect("a process")
    };
    let mut processes = Vec::new();
    for _ in 0..PAIRS {
        let listener = Tcp::listening(LOOPBACK, 64);
        let address = listener.local();
        processes.push(process(&[listener.fd.as_fd()], &|| listener.accept()));
        processes.push(process(&[], &|| Tcp::connected(address)));
    }
    let over = Instant::now() + PATIENCE;
    while rustix::io::ioctl_fionread(&ready).expect("a pipe") < processes.len() as u64 {
        let ended = processes.iter().any(|process| process.ended().is_some());
        let limit = getrlimit(Resource::Nofile);
        assert!(!ended, "a process could not open its sockets: {limit:?}");
        assert!(Instant::now() < over, "opening the sockets takes too long");
        thread::sleep(Duration::from_millis(5));
    }
    processes
}

#[test]
#[ignore = "measures, and has 100,000 sockets open, which others would feel"]
fn a_sweep_of_100_000_sockets() {
    in_namespace(|inode| {
        let processes = crowd();
        let options = Options {
            netns: Netns::Inode(inode),
            ring_size: RingSize::default(),
            path: None,
            inet_diag: false,
        };
        let mut session = Session::start(&options).expect("the program loads");
        let check = |way: &str, cost: Cost, holders: &[Holder]| {
            for process in &processes {
                let holder = holders.iter().find(|it| it.process.pid == process.pid);
                let sockets = holder.map_or(0, |holder| holder.sockets.len());
                assert!(
                    sockets >= CONNECTIONS,
                    "{way}: {sockets} of {}",
                    process.pid
                );
            }
            println!("{way}: {cost}");
        };
        let (reading, _) = least(|| {
            let mut bytes = Vec::new();
            let mut file = session.begin_sweep().expect("the iterator begins");
            file.read_to_end(&mut bytes).expect("it can be read")
        });
        println!("to read the iterator alone: {reading}");
        let (by_kernel, swept) = least(|| {
            let file = session.begin_sweep().expect("the iterator begins");
            by_iterator(file).expect("it can be read")
        });
        check("by the iterator", by_kernel, &swept.holders);
        let (dumped, dump) = least(|| {
            snapshot::take(
                NetnsSelection::One(inode),
                StateMask::ALL,
                HashSet::default(),
                None,
            )
            .expect("a dump of the sockets")
        });
        println!("the dump that /proc needs besides: {dumped}");
        let (by_files, swept) = least(|| by_proc(&dump.records).expect("/proc is mounted"));
        check("by /proc", by_files, &swept.holders);
        assert!(by_kernel.time < by_files.time);
    });
}
