//! What 100,000 sockets cost, for `cargo xtask bench`: the product's own parts, and its daemon, measured from outside.
//! Prints a table, and says on which machine it was measured.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tcpstate_user::kernel::{Netns, Options, RingSize, Session, jiffy_ns, snapshot};
use tcpstate_user::model::{NetnsSelection, TcpState};
use tcpstate_user::owner::{Swept, by_iterator, by_proc};
use tcpstate_user::table::{Identity, Snapshot, StateMask};

use crate::daemon::{Daemon, in_namespace};
use crate::sockets::{Tcp, held};
use crate::sys::Fork;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Of processes: one alone may not have as many descriptors everywhere.
const PAIRS: usize = 4;
const CONNECTIONS: usize = 50_000 / PAIRS;
/// After one that does not count.
const ROUNDS: usize = 9;

/// How long something took, in milliseconds, once a round.
#[derive(Default)]
struct Costs {
    time: Vec<f64>,
    /// Of the processors, in this process and in the kernel for it: what a busy machine leaves as it is. Empty where
    /// another process does the work.
    work: Vec<f64>,
}

impl Costs {
    fn measure<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let before = worked();
        let result = self.wait(work);
        self.work.push(millis(worked() - before));
        result
    }

    fn wait<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = work();
        self.time.push(millis(begun.elapsed()));
        result
    }

    fn print(mut self, what: &str) {
        let [time, work] = [&mut self.time, &mut self.work].map(|rounds| {
            // The first round was to warm up.
            let counted = rounds.get_mut(1..)?;
            counted.sort_by(f64::total_cmp);
            let (least, most) = (*counted.first()?, *counted.last()?);
            Some([counted[counted.len() / 2], least, most])
        });
        let [median, least, most] = time.expect("it was measured");
        let work = work.map_or("-".to_owned(), |[median, ..]| format!("{median:.1}"));
        println!("{what:<44} {median:>8.1} {least:>8.1} {most:>8.1} {work:>10}");
    }
}

fn print_head() {
    let [what, median, least, most, work] =
        ["milliseconds", "median", "least", "most", "processor"];
    println!("{what:<44} {median:>8} {least:>8} {most:>8} {work:>10}");
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn worked() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).expect("not negative")
}

/// Kernel, processors, and how busy they are.
fn print_machine() {
    let read = |path| fs::read_to_string(path).expect("/proc is mounted");
    let kernel = read("/proc/sys/kernel/osrelease");
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split(": ").nth(1));
    let cpus = thread::available_parallelism().expect("processors");
    let load = read("/proc/loadavg");
    println!(
        "Linux {}, {cpus} processors ({}), load {}; {ROUNDS} interleaved rounds after one to warm up",
        kernel.trim(),
        model.unwrap_or("of no known model"),
        load.split(' ').next().expect("three of them"),
    );
}

fn check_sweep(swept: &Swept, processes: &[Fork]) {
    for process in processes {
        let holder = swept
            .holders
            .iter()
            .find(|it| it.process.pid == process.pid);
        let sockets = holder.map_or(0, |holder| holder.sockets.len());
        assert!(
            sockets >= CONNECTIONS,
            "{sockets} sockets of {}",
            process.pid
        );
    }
}

#[test]
#[ignore = "measures, and has 100,000 sockets open, which others would feel"]
fn snapshots_and_sweeps() {
    in_namespace(|inode| {
        print_machine();
        let processes = held(PAIRS, CONNECTIONS);
        let options = Options {
            netns: Netns::Inode(inode),
            ring_size: RingSize::default(),
            without: Vec::new(),
        };
        let mut session = Session::start(&options).expect("the program loads");
        let dump = |states| {
            let netns = NetnsSelection::One(inode);
            snapshot::take(netns, states, HashSet::default(), None).expect("a dump of the sockets")
        };
        // What a scrape asks for.
        let minisockets = StateMask::of(&[
            TcpState::TIME_WAIT,
            TcpState::FIN_WAIT2,
            TcpState::NEW_SYN_RECV,
        ]);
        let [mut full, mut filtered, mut sweep, mut files]: [Costs; 4] = Default::default();
        for _ in 0..=ROUNDS {
            let all: Snapshot = full.measure(|| dump(StateMask::ALL));
            assert!(all.records.len() >= 2 * PAIRS * CONNECTIONS);
            let some = filtered.measure(|| dump(minisockets));
            assert!(some.records.is_empty(), "nothing is closed");
            let swept = sweep.measure(|| {
                let file = session.begin_sweep(false).expect("the iterator begins");
                by_iterator(file, jiffy_ns()).expect("it can be read")
            });
            check_sweep(&swept, &processes);
            let swept = files
                .measure(|| by_proc(&all.records, Identity::Cookie).expect("/proc is mounted"));
            check_sweep(&swept, &processes);
        }
        print_head();
        full.print("snapshot, all states");
        filtered.print("snapshot, what a scrape asks for");
        sweep.print("sweep by the iterator");
        files.print("sweep by /proc (needs a snapshot besides)");
    });
}

/// The lines of a daemon's stream, and a listener to make some.
struct Stream {
    lines: std::io::Lines<BufReader<std::os::unix::net::UnixStream>>,
    listener: Tcp,
}

impl Stream {
    fn new(daemon: &Daemon) -> Self {
        Self {
            lines: BufReader::new(daemon.events("")).lines(),
            listener: Tcp::listening(LOOPBACK, 8),
        }
    }

    /// Makes a connection, and waits for the line that tells of it.
    fn connect(&mut self) {
        let socket = Tcp::connected(self.listener.local());
        let accepted = self.listener.accept();
        let SocketAddr::V4(local) = socket.local() else {
            unreachable!("it was connected to an IPv4 address");
        };
        for one in [&socket, &accepted] {
            one.reset_on_close();
        }
        let port = format!("\"local_port\":{},", local.port());
        let mut lines = self.lines.by_ref().map_while(Result::ok);
        let told =
            lines.any(|line| line.contains(&port) && line.contains("\"to\":\"ESTABLISHED\""));
        assert!(told, "the stream ended");
    }
}

/// Of those that are begun until `over`, in milliseconds.
fn slowest<T>(over: &AtomicBool, mut work: impl FnMut() -> T) -> f64 {
    let mut all = Costs::default();
    while !over.load(Ordering::Relaxed) {
        all.wait(&mut work);
    }
    all.time.into_iter().fold(0.0, f64::max)
}

/// How long lines and scrapes take while nothing is read anew, and while all sockets and their holders are.
#[test]
#[ignore = "measures, and has 100,000 sockets open, which others would feel"]
fn neither_snapshot_nor_sweep_stalls_lines_and_scrapes() {
    in_namespace(|_| {
        print_machine();
        let _processes = held(PAIRS, CONNECTIONS);
        let daemon = Daemon::start(&["--reconcile-interval", "1h"]);
        let mut stream = Stream::new(&daemon);
        let [
            mut line,
            mut busy_line,
            mut scrape,
            mut busy_scrape,
            mut list,
        ]: [Costs; 5] = Default::default();
        for _ in 0..=ROUNDS {
            // A scrape within a second of a snapshot makes none of its own.
            thread::sleep(Duration::from_millis(1100));
            line.wait(|| stream.connect());
            scrape.wait(|| daemon.get("/metrics"));
            thread::sleep(Duration::from_millis(1100));
            let (daemon, list, listed) = (&daemon, &mut list, AtomicBool::new(false));
            let scraped = thread::scope(|scope| {
                scope.spawn(|| {
                    // It shows nothing, but a snapshot and a sweep are made for it.
                    list.wait(|| daemon.get("/v1/sockets?state=closing"));
                    listed.store(true, Ordering::Relaxed);
                });
                let scraping = scope.spawn(|| slowest(&listed, || daemon.get("/metrics")));
                busy_line.time.push(slowest(&listed, || stream.connect()));
                scraping.join().expect("scraped")
            });
            busy_scrape.time.push(scraped);
        }
        let metrics = daemon.metrics();
        assert_eq!(metrics.sum("tcpstate_events_lost_total"), 0.0);
        assert_eq!(metrics.sum("tcpstate_corrections_total"), 0.0);
        let resident = metrics.get("process_resident_memory_bytes") / f64::from(1 << 20);
        let sockets = metrics.get("tcpstate_table_entries");
        println!("the daemon has {sockets} sockets in its table, {resident:.0} MiB resident");
        print_head();
        line.print("a line of the stream");
        busy_line.print("the slowest while the list is made");
        scrape.print("a scrape, with its snapshot");
        busy_scrape.print("the slowest while the list is made");
        list.print("the list: a snapshot and a sweep");
    });
}
