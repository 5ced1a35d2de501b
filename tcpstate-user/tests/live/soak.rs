//! Whether a daemon grows. `cargo xtask soak`: under random load for as long as is asked. Judges by the second
//! quarter of the time and the last: what the first costs once is no growth. Looks between readers: queues of those that
//! stand still are bounded, but how full they are changes with all that the machine has to do.

use std::collections::VecDeque;
use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::Shutdown;

use crate::daemon::{Daemon, LOOPBACK, in_namespace, storm};
use crate::lab::{TWO_SWEEPS, emulated, kernel_hides, not_applicable, until, until_within};
use crate::model::Random;
use crate::sockets::{Tcp, connect_to_nobody};

/// Connections that a worker holds at most.
const HELD: usize = 500;
const WORKERS: u64 = 3;
/// Connections that come first: more than are remembered when they were closed (`Generations`: 57,344), however slow the
/// machine is.
const FILL: u64 = 200_000;
const READ: Duration = Duration::from_secs(20);
/// Until readers that are gone cost no more: what their queues took goes back within 10 s.
const REST: Duration = Duration::from_secs(15);
/// Of resident memory, in percent.
const GROWTH: f64 = 2.0;
/// At most, of all transitions, by the kernel that hides some.
const HIDDEN: f64 = 1e-5;

/// One after the other, of every kind, by a process that changes its name now and then.
fn work(seed: u64, over: &AtomicBool, connections: &AtomicU64) {
    let mut random = Random(seed);
    let mut pick = |of: u64| random.next() % of;
    let listener = Tcp::listening(LOOPBACK, 64);
    let mut held = VecDeque::new();
    while !over.load(Ordering::Relaxed) {
        let (client, server) = (Tcp::connected(listener.local()), listener.accept());
        connections.fetch_add(1, Ordering::Relaxed);
        match pick(8) {
            0 | 1 => client.reset_on_close(),
            2 => {
                client.shutdown(Shutdown::Write);
                server.peek();
                drop(server);
            }
            3 => {
                client.shutdown(Shutdown::Write);
                held.push_back((client, server));
            }
            4 => held.push_back((client, server)),
            5 => {
                client.send();
                drop(server);
            }
            6 => drop(connect_to_nobody(SocketAddr::new(LOOPBACK, 9))),
            _ => {}
        }
        while held.len() as u64 > pick(HELD as u64) {
            held.pop_front();
        }
        match pick(200) {
            0 => {
                // The process', which is the main thread's: prctl(2) names the thread that calls it.
                let name = format!("soak {}", pick(1000));
                fs::write("/proc/self/comm", name).expect("a name of one's own");
            }
            1..60 => thread::sleep(Duration::from_millis(pick(20))),
            _ => {}
        }
    }
}

/// Readers that come and go, some of which stand still for a while; in the end all are gone.
fn read(daemon: &Daemon, random: &mut Random) {
    let mut streams: VecDeque<UnixStream> = VecDeque::new();
    let end = Instant::now() + READ;
    while Instant::now() < end {
        match random.next() % 4 {
            0 => assert_eq!(daemon.get("/v1/sockets?state=close_wait").0, 200),
            1 => streams.push_back(daemon.events("?to=close_wait")),
            2 => streams.push_back(daemon.events("")),
            _ => {
                for stream in &mut streams {
                    stream.set_nonblocking(true).expect("a socket");
                    // As far as it goes.
                    let _ = stream.read(&mut [0; 1 << 16]);
                }
            }
        }
        if streams.len() > 8 {
            streams.pop_front();
        }
        thread::sleep(Duration::from_millis(500));
    }
}

#[derive(Clone, Copy)]
struct Sample {
    resident: f64,
    /// In the table: whether the load is the same at all times.
    sockets: f64,
    files: f64,
}

fn mean(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    samples.iter().map(of).sum::<f64>() / samples.len() as f64
}

#[test]
fn memory_of_streams_that_are_gone_goes_back() {
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        let resident = || daemon.metrics().get("process_resident_memory_bytes");
        storm(Duration::from_secs(1));
        let before = resident();
        let streams: Vec<_> = (0..4).map(|_| daemon.events("")).collect();
        let dropped = "tcpstate_stream_lines_dropped_total";
        until_within(TWO_SWEEPS, "the queues are full", || {
            storm(Duration::from_secs(1));
            daemon.metrics().get(dropped) > 0.0
        });
        let full = resident();
        drop(streams);
        if full < before + 32e6 && emulated() {
            not_applicable("no burst that an emulated machine makes takes enough memory to tell");
            return;
        }
        assert!(full > before + 32e6, "the queues took no memory");
        until("most of it is given back", || resident() < before + 8e6);
        println!("{before} bytes, then {full}, then {}", resident());
    });
}

#[test]
#[ignore = "takes as long as is asked"]
fn a_daemon_under_random_load_does_not_grow() {
    let minutes =
        std::env::var("TCPSTATE_MINUTES").expect("TCPSTATE_MINUTES, as `cargo xtask soak` sets it");
    let minutes: u64 = minutes.parse().expect("TCPSTATE_MINUTES is a number");
    in_namespace(move |_| {
        // TIME_WAIT must not use up the ports.
        crate::sys::set_sysctl("net/ipv4/tcp_max_tw_buckets", "5000").expect("a sysctl");
        let daemon = Daemon::start(&["--reconcile-interval", "5s"]);
        let fill = || {
            let mut filled = 0;
            while filled < FILL {
                filled += storm(Duration::from_secs(1));
            }
            filled
        };
        let filled = thread::scope(|scope| scope.spawn(fill).join());
        let (over, connections) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut samples = Vec::new();
        thread::scope(|scope| {
            for seed in 0..WORKERS {
                let (over, connections) = (&over, &connections);
                scope.spawn(move || work(seed, over, connections));
            }
            let _over = crate::sys::SetOnDrop(&over);
            let mut random = Random(WORKERS);
            let end = Instant::now() + Duration::from_secs(60 * minutes);
            while Instant::now() < end {
                read(&daemon, &mut random);
                thread::sleep(REST);
                let metrics = daemon.metrics();
                samples.push(Sample {
                    resident: metrics.get("process_resident_memory_bytes"),
                    sockets: metrics.get("tcpstate_table_entries"),
                    files: metrics.get("process_open_fds"),
                });
            }
        });
        let quarter = samples.len() / 4;
        let [second, last] = [&samples[quarter..2 * quarter], &samples[3 * quarter..]];
        let resident = [second, last].map(|samples| mean(samples, |sample| sample.resident));
        let files = [second, last].map(|samples| mean(samples, |sample| sample.files));
        let sockets = [second, last].map(|samples| mean(samples, |sample| sample.sockets));
        let grown = (resident[1] / resident[0] - 1.0) * 100.0;
        let metrics = daemon.metrics();
        let lost = metrics.sum("tcpstate_events_lost_total");
        let corrections = metrics.sum("tcpstate_corrections_total");
        let transitions = metrics.sum("tcpstate_kernel_transitions_total");
        let eighths = samples.chunks(samples.len().div_ceil(8));
        let trend = eighths.map(|some| mean(some, |sample| sample.resident) / f64::from(1 << 20));
        let trend: Vec<String> = trend.map(|mib| format!("{mib:.1}")).collect();
        println!("resident memory, MiB, by eighths: {}", trend.join(" "));
        println!(
            "{minutes} minutes, {} connections, {transitions} transitions, {lost} lost, {corrections} corrected; resident memory \
             {:.1} MiB in the second quarter, {:.1} MiB in the last ({grown:+.2} %); {:.1} files open, then {:.1}; {:.0} sockets in the \
             table, then {:.0}",
            filled.expect("no panic") + connections.load(Ordering::Relaxed),
            resident[0] / f64::from(1 << 20),
            resident[1] / f64::from(1 << 20),
            files[0],
            files[1],
            sockets[0],
            sockets[1],
        );
        assert!(grown < GROWTH, "resident memory grew");
        assert!(files[1] < files[0] + 5.0, "descriptors leak");
        // A transition that was lost is corrected, by the socket's next one and by a dump; and so is what the kernel hid,
        // which nothing tells: a few of a million there.
        let hidden = if kernel_hides() {
            transitions * HIDDEN
        } else {
            0.0
        };
        assert!(
            corrections <= hidden + 2.0 * lost,
            "{corrections} corrections of {transitions} transitions, of which {lost} were lost"
        );
    });
}
