//! How long sockets stay in their states, by the test's own clock: each dwell that is told must lie between the least and
//! the most that its readings before and after the calls allow.

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::net::{RecvFlags, Shutdown};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::daemon::{Daemon, LOOPBACK, in_namespace};
use crate::lab::{proc_states, until};
use crate::owners::fill;
use crate::sockets::{Pair, Tcp};
use crate::sys;
use crate::tracer::Tracer;

/// Of two processors, and of the kernel's quick way to read the clock.
const CLOCKS: u64 = 20_000;
/// Of timers, at 100 a second; more than the daemon's idea of the time of day may be off.
pub const TICK: u64 = 10_000_000;
const RECONCILE_NS: u64 = 1_000_000_000;
/// Between the end of a dump that a busy machine took long for, and the line.
const LATE_NS: u64 = 1_500_000_000;
pub const TIME_WAIT_NS: u64 = 60_000_000_000;
const FIN_TIMEOUT_NS: u64 = 2_000_000_000;
/// How often all is done where the kernel skips the program.
pub const TRIES: usize = 3;

const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
pub const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;

pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    Duration::try_from(now).expect("not negative").as_nanos() as u64
}

/// Readings of the clock before and after something happened.
#[derive(Clone, Copy, Debug)]
pub struct When {
    pub before: u64,
    pub after: u64,
}

impl When {
    /// What followed came by then.
    const fn by(self, after: u64) -> Self {
        Self { after, ..self }
    }
}

/// `what` ends no sooner than what it does shows in /proc.
pub fn when<T>(what: impl FnOnce() -> T) -> (When, T) {
    let before = now();
    let result = what();
    let after = now();
    (When { before, after }, result)
}

/// From when it was last seen not to be so.
pub fn when_shown(shown: impl Fn() -> bool) -> When {
    let mut before = now();
    let end = before + 90_000_000_000;
    loop {
        let begun = now();
        if shown() {
            return When {
                before,
                after: now(),
            };
        }
        assert!(begun < end, "the kernel's timer does not come");
        before = begun;
        thread::sleep(Duration::from_millis(5));
    }
}

#[derive(Debug)]
pub struct Stay {
    pub local: SocketAddr,
    pub remote: Option<SocketAddr>,
    pub state: &'static str,
    pub entered: When,
    pub left: When,
}

impl Stay {
    fn bounds(&self) -> (u64, u64) {
        let least = self.left.before.saturating_sub(self.entered.after);
        let most = self.left.after - self.entered.before;
        (least.saturating_sub(CLOCKS), most + CLOCKS)
    }

    pub fn is(&self, line: &Value) -> bool {
        let end = |which: &str| -> Option<SocketAddr> {
            let addr = line[format!("{which}_addr")].as_str()?.parse().ok()?;
            let port = line[format!("{which}_port")].as_u64()?;
            Some(SocketAddr::new(addr, port.try_into().ok()?))
        };
        line["from"] == self.state
            && end("local") == Some(self.local)
            && end("remote") == self.remote
    }
}

/// One end of a connection, or a listener: its states one after the other.
struct Life<'a> {
    stays: &'a mut Vec<Stay>,
    local: SocketAddr,
    remote: Option<SocketAddr>,
    state: &'static str,
    entered: When,
}

impl Life<'_> {
    fn goes(&mut self, state: &'static str, at: When) {
        self.stays.push(Stay {
            local: self.local,
            remote: self.remote,
            state: self.state,
            entered: self.entered,
            left: at,
        });
        (self.state, self.entered) = (state, at);
    }
}

struct Connection {
    pair: Pair,
    /// When it was opened: all of that came between the two readings.
    opened: When,
}

fn open() -> Connection {
    let (opened, pair) = when(|| Pair::new(LOOPBACK));
    Connection { pair, opened }
}

impl Connection {
    /// Client and server, established.
    fn lives<'a>(&self, client: &'a mut Vec<Stay>, server: &'a mut Vec<Stay>) -> [Life<'a>; 2] {
        let ends = [
            (self.pair.near, self.pair.far),
            (self.pair.far, self.pair.near),
        ];
        let first = ["SYN_SENT", "SYN_RECV"];
        let mut stays = [Some(client), Some(server)];
        [0, 1].map(|at| {
            let mut life = Life {
                stays: stays[at].take().expect("one each"),
                local: ends[at].0,
                remote: Some(ends[at].1),
                state: first[at],
                entered: self.opened,
            };
            life.goes("ESTABLISHED", self.opened);
            life
        })
    }
}

fn wait(milliseconds: u64) {
    thread::sleep(Duration::from_millis(milliseconds));
}

/// Waits for the socket to come to the state; when it did, at the latest. To look into /proc can take a tenth of a second.
fn until_is(socket: &Tcp, state: u8) -> u64 {
    let end = now() + 20_000_000_000;
    while socket.state() != state {
        assert!(now() < end, "waited in vain for state {state}");
        thread::sleep(Duration::from_micros(100));
    }
    now()
}

/// Reads all that was sent, and that there is no more.
fn drain(socket: &Tcp) {
    rustix::io::ioctl_fionbio(&socket.fd, false).expect("blocking");
    let mut data = vec![0_u8; 1 << 16];
    while rustix::net::recv(&socket.fd, &mut data[..], RecvFlags::empty())
        .expect("data")
        .1
        > 0
    {}
}

/// What a run saw, to be told.
#[derive(Default)]
pub struct Seen {
    pub stays: Vec<Stay>,
    /// Stays that a timer ends, and how long it is.
    pub timed: Vec<(Stay, u64)>,
    keep: Vec<Tcp>,
}

/// In TIME_WAIT from when it gives back; with its ports.
pub fn closes(seen: &mut Seen) -> (SocketAddr, SocketAddr, When) {
    let connection = open();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let [mut client, mut server] = connection.lives(&mut ours, &mut theirs);
    let Pair {
        listener,
        client: active,
        server: passive,
        near,
        far,
    } = connection.pair;
    wait(150);
    let (at, ()) = when(|| active.shutdown(Shutdown::Write));
    client.goes("FIN_WAIT1", at);
    client.goes("FIN_WAIT2", at.by(until_is(&active, FIN_WAIT2)));
    server.goes("CLOSE_WAIT", at.by(until_is(&passive, CLOSE_WAIT)));
    wait(120);
    let (at, ()) = when(|| drop(passive));
    server.goes("LAST_ACK", at);
    // A timewait socket has its place.
    let at = at.by(until_is(&active, CLOSE));
    assert!(proc_states(near.port()).contains(&TIME_WAIT));
    client.goes("TIME_WAIT", at);
    until("its peer has closed", || {
        !proc_states(far.port()).contains(&LAST_ACK)
    });
    server.goes("CLOSE", at.by(now()));
    seen.stays.extend(ours.into_iter().chain(theirs));
    seen.keep.extend([listener, active]);
    (near, far, at)
}

/// Its FIN waits behind data that nobody reads.
fn fin_is_held_up(seen: &mut Seen) {
    let connection = open();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let [mut client, mut server] = connection.lives(&mut ours, &mut theirs);
    let Pair {
        listener,
        client: active,
        server: passive,
        ..
    } = connection.pair;
    fill(&active);
    let (at, ()) = when(|| active.shutdown(Shutdown::Write));
    client.goes("FIN_WAIT1", at);
    wait(130);
    assert_eq!(active.state(), FIN_WAIT1);
    let (at, ()) = when(|| drain(&passive));
    client.goes("FIN_WAIT2", at.by(until_is(&active, FIN_WAIT2)));
    server.goes("CLOSE_WAIT", at);
    seen.stays.extend(ours.into_iter().chain(theirs));
    seen.keep.extend([listener, active, passive]);
}

/// The last FIN waits behind data that nobody reads.
fn last_ack_is_held_up(seen: &mut Seen) {
    let connection = open();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let [mut client, mut server] = connection.lives(&mut ours, &mut theirs);
    let Pair {
        listener,
        client: active,
        server: passive,
        ..
    } = connection.pair;
    let (at, ()) = when(|| active.shutdown(Shutdown::Write));
    client.goes("FIN_WAIT1", at);
    client.goes("FIN_WAIT2", at.by(until_is(&active, FIN_WAIT2)));
    server.goes("CLOSE_WAIT", at.by(until_is(&passive, CLOSE_WAIT)));
    fill(&passive);
    let (at, ()) = when(|| passive.shutdown(Shutdown::Write));
    server.goes("LAST_ACK", at);
    wait(110);
    assert_eq!(passive.state(), LAST_ACK);
    let (at, ()) = when(|| drain(&active));
    server.goes("CLOSE", at.by(until_is(&passive, CLOSE)));
    client.goes("TIME_WAIT", at.by(until_is(&active, CLOSE)));
    seen.stays.extend(ours.into_iter().chain(theirs));
    seen.keep.extend([listener, active, passive]);
}

fn never_connected(seen: &mut Seen) {
    let (opened, full) = when(|| Tcp::listening(LOOPBACK, 0));
    let mut stays = Vec::new();
    let mut listener = Life {
        stays: &mut stays,
        local: full.local(),
        remote: None,
        state: "LISTEN",
        entered: opened,
    };
    let far = full.local();
    let (opened, waiting) = when(|| Tcp::connected(far));
    for (ends, first) in [
        ((waiting.local(), far), "SYN_SENT"),
        ((far, waiting.local()), "SYN_RECV"),
    ] {
        seen.stays.push(Stay {
            local: ends.0,
            remote: Some(ends.1),
            state: first,
            entered: opened,
            left: opened,
        });
    }
    let pending = Tcp::new(LOOPBACK);
    let (entered, ()) = when(|| pending.begin_connect(far));
    let local = pending.local();
    wait(140);
    let (left, ()) = when(|| drop(pending));
    seen.stays.push(Stay {
        local,
        remote: Some(far),
        state: "SYN_SENT",
        entered,
        left,
    });
    let near = waiting.local();
    let (left, ()) = when(|| drop(full));
    let left = left.by(until_is(&waiting, CLOSE));
    listener.goes("CLOSE", left);
    // Its closing resets what it had not accepted.
    for (local, remote) in [(near, far), (far, near)] {
        seen.stays.push(Stay {
            local,
            remote: Some(remote),
            state: "ESTABLISHED",
            entered: opened,
            left,
        });
    }
    seen.stays.extend(stays);
    seen.keep.push(waiting);
}

/// In FIN_WAIT2 without a socket, until a timer ends it.
fn orphaned(seen: &mut Seen) {
    let connection = open();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let [mut client, mut server] = connection.lives(&mut ours, &mut theirs);
    let Pair {
        listener,
        client: active,
        server: passive,
        near,
        ..
    } = connection.pair;
    let (at, ()) = when(|| drop(active));
    client.goes("FIN_WAIT1", at);
    server.goes("CLOSE_WAIT", at.by(until_is(&passive, CLOSE_WAIT)));
    until("its FIN has arrived", || {
        proc_states(near.port()).contains(&FIN_WAIT2)
    });
    client.goes("FIN_WAIT2", at.by(now()));
    let left = when_shown(|| !proc_states(near.port()).contains(&FIN_WAIT2));
    client.goes("CLOSE", left);
    let last = ours.pop().expect("it was in FIN_WAIT2");
    seen.timed.push((last, FIN_TIMEOUT_NS));
    seen.stays.extend(ours.into_iter().chain(theirs));
    seen.keep.extend([listener, passive]);
}

/// Whether nothing was lost.
fn run() -> bool {
    sys::set_sysctl("net/ipv4/tcp_fin_timeout", "2").expect("a sysctl");
    let daemon = Daemon::start(&["--reconcile-interval", "1s"]);
    let follows = daemon.metrics().uses("time_wait_fentry");
    let socket = daemon.socket.to_str().expect("text");
    let skipped = Arc::new(AtomicBool::new(false));
    let arguments = ["watch", "-o", "json", "--netns", "self", "--socket", socket];
    let tracer = Tracer::start(&arguments, Arc::clone(&skipped));

    let mut seen = Seen::default();
    let (near, far, entered) = closes(&mut seen);
    fin_is_held_up(&mut seen);
    last_ack_is_held_up(&mut seen);
    never_connected(&mut seen);
    orphaned(&mut seen);
    histograms(&daemon, &seen, follows);
    let left = when_shown(|| !proc_states(near.port()).contains(&TIME_WAIT));
    let last = Stay {
        local: near,
        remote: Some(far),
        state: "TIME_WAIT",
        entered,
        left,
    };
    seen.timed.push((last, TIME_WAIT_NS));

    let timed = seen.timed.iter().map(|(stay, _)| stay);
    let all: Vec<&Stay> = seen.stays.iter().chain(timed).collect();
    tracer.wait_until(Duration::from_secs(10), |lines| {
        all.iter()
            .all(|stay| lines.iter().any(|line| stay.is(line)))
    });
    let arrived = now();
    let (_, lines, _) = tracer.stop();
    if skipped.load(Ordering::Relaxed) {
        return false;
    }
    for stay in &seen.stays {
        dwells(stay, &lines, follows);
    }
    for (stay, timer) in &seen.timed {
        ends(stay, *timer, &lines, follows);
    }
    // The last to be told was the last to end.
    let late = arrived.saturating_sub(left.after);
    assert!(
        late < RECONCILE_NS + LATE_NS,
        "told {late} ns after its end"
    );
    true
}

fn line_of<'a>(stay: &Stay, lines: &'a [Value]) -> &'a Value {
    let mut of_it = lines.iter().filter(|line| stay.is(line));
    let line = of_it
        .next()
        .unwrap_or_else(|| panic!("not told: {stay:?}, in {lines:#?}"));
    assert!(of_it.next().is_none(), "told twice: {stay:?}");
    line
}

pub fn dwells(stay: &Stay, lines: &[Value], follows: bool) {
    let line = line_of(stay, lines);
    let (least, most) = stay.bounds();
    let told = line["dwell_ns"].as_u64();
    let fits = told.is_some_and(|ns| (least..=most).contains(&ns));
    assert!(fits, "not in {least} to {most} ns: {line}");
    let evidence = match stay.state {
        "FIN_WAIT2" if follows => "fentry",
        // The kernel says CLOSE; what that meant is told by the socket.
        "FIN_WAIT2" => "inferred",
        _ => "tracepoint",
    };
    assert_eq!(line["evidence"], evidence, "{line}");
}

/// A stay that the kernel's timer ended.
pub fn ends(stay: &Stay, timer: u64, lines: &[Value], follows: bool) {
    let line = line_of(stay, lines);
    assert_eq!(line["to"], "CLOSE", "{line}");
    let time: jiff::Timestamp = line["time"]
        .as_str()
        .expect("a string")
        .parse()
        .expect("a time");
    let unix = Duration::try_from(clock_gettime(ClockId::Realtime)).expect("after 1970");
    let time = time.as_nanosecond() - unix.as_nanos() as i128 + i128::from(now());
    let time = u64::try_from(time).expect("after the boot");
    if follows {
        assert_eq!(line["evidence"], "fentry", "{line}");
        let (least, most) = stay.bounds();
        let told = line["dwell_ns"].as_u64();
        // The kernel takes it out of its tables, where the driver looks, before it calls what the program is on.
        let most = most + TICK;
        let fits = told.is_some_and(|ns| (least..=most).contains(&ns));
        assert!(fits, "not in {least} to {most} ns: {line}");
        let end = stay.left.before - TICK..=stay.left.after + TICK;
        assert!(end.contains(&time), "at {time}, not in {end:?}: {line}");
    } else {
        assert_eq!(line["evidence"], "snapshot", "{line}");
        assert!(line["dwell_ns"].is_null(), "{line}");
        // Not before its timer, which the kernel's wheel may make late; and not when a dump found that it was gone.
        let end = stay.entered.before + timer - TICK..=stay.left.after + TICK;
        assert!(end.contains(&time), "at {time}, not in {end:?}: {line}");
    }
}

/// Of the stays that have ended: as many, and as long together.
fn histograms(daemon: &Daemon, seen: &Seen, follows: bool) {
    let comm = fs::read_to_string("/proc/self/comm").expect("/proc is mounted");
    let metrics = daemon.metrics();
    let of_states = [
        "SYN_SENT",
        "ESTABLISHED",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
    ];
    for state in of_states {
        let labels = format!(
            "{{comm=\"{}\",state=\"{}\"}}",
            comm.trim(),
            state.to_lowercase()
        );
        let series = |part: &str| format!("tcpstate_dwell_seconds_{part}{labels}");
        if state == "FIN_WAIT2" {
            // Without them a sample would be of those alone that are not orphaned.
            assert_eq!(metrics.has(&series("count")), follows);
            if !follows {
                continue;
            }
        }
        let timed = seen.timed.iter().map(|(stay, _)| stay);
        let stays = seen
            .stays
            .iter()
            .chain(timed)
            .filter(|stay| stay.state == state);
        let bounds: Vec<(u64, u64)> = stays.map(Stay::bounds).collect();
        assert_eq!(
            metrics.get(&series("count")),
            bounds.len() as f64,
            "{state}"
        );
        let least: u64 = bounds.iter().map(|(least, _)| least).sum();
        let most: u64 = bounds.iter().map(|(_, most)| most).sum();
        let sum = metrics.get(&series("sum")) * 1e9;
        assert!(
            (least as f64..=most as f64).contains(&sum),
            "{state}: {sum} ns, not in {least} to {most}"
        );
    }
}

/// Takes as long as TIME_WAIT does.
#[test]
fn dwell_is_between_the_clocks_readings() {
    in_namespace(|_| {
        let done = (0..TRIES).any(|_| run());
        assert!(done, "the kernel skipped the program {TRIES} times");
    });
}
