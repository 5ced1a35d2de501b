//! A seed makes a plan of steps; the driver has workers take them, and keeps the book. A step that finds nothing to be done
//! on (no listener, no socket) is passed over, so that the plan is the seed's alone.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use super::book::{Book, Index, Rows, kernels};
use super::worker::{Call, How, Worker, name};
use crate::lab::nobody_elses;
use crate::sys;

const STEPS: usize = 90;
/// How often all is compared within a plan, and at its end.
const PAUSE_EVERY: usize = 30;
/// In one namespace.
const MOST_WORKERS: usize = 4;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[derive(Clone, Copy, Debug)]
pub enum What {
    Listen,
    ShareListener,
    Connect,
    SelfConnect,
    FastOpen,
    Accept,
    Send,
    Fill,
    Shutdown,
    Close,
    Reset,
    Reconnect,
    Pass,
    Fork,
    Kill,
    Nap,
    Pause,
}

const WEIGHTS: [(What, u64); 16] = [
    (What::Listen, 6),
    (What::ShareListener, 1),
    (What::Connect, 24),
    (What::SelfConnect, 1),
    (What::FastOpen, 2),
    (What::Accept, 18),
    (What::Send, 4),
    (What::Fill, 4),
    (What::Shutdown, 8),
    (What::Close, 12),
    (What::Reset, 3),
    (What::Reconnect, 3),
    (What::Pass, 4),
    (What::Fork, 3),
    (What::Kill, 2),
    (What::Nap, 6),
];

/// With what to choose by, where there is a choice.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub what: What,
    picks: [u32; 3],
}

pub fn plan(seed: u64) -> Vec<Step> {
    let mut random = Random(seed);
    let sum: u64 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
    let mut steps = Vec::new();
    for number in 1..=STEPS {
        let mut left = random.next() % sum;
        let chosen = WEIGHTS.iter().find(|(_, weight)| {
            let found = left < *weight;
            left = left.saturating_sub(*weight);
            found
        });
        let picks = [(); 3].map(|()| (random.next() >> 32) as u32);
        let what = chosen.expect("one of them").0;
        steps.push(Step { what, picks });
        if number % PAUSE_EVERY == 0 {
            let what = What::Pause;
            steps.push(Step { what, picks });
        }
    }
    steps
}

struct Process {
    netns: u32,
    /// `None` once it was ended.
    worker: Option<Worker>,
}

/// A lane's namespaces and processes, and the book of what they do. The first namespace is the calling thread's and stays;
/// the second comes and goes with the seeds that want it.
pub struct World {
    lane: usize,
    pub home: u32,
    /// Where sockets listen: of each family, and of both.
    addresses: [IpAddr; 3],
    /// Nobody else has these, and all is done there: the namespace is not told.
    pub alone: bool,
    pub book: Book,
    /// By their place in the book.
    processes: Vec<Process>,
    /// What was done, for people.
    pub log: String,
}

impl World {
    /// `alone`: at addresses that no other namespace has.
    pub fn new(lane: usize, home: u32, alone: bool) -> Self {
        let addresses = if alone {
            let [v4, v6] = nobody_elses(100 + lane as u8);
            [v4, v6, v6]
        } else {
            [
                Ipv4Addr::LOCALHOST.into(),
                Ipv6Addr::LOCALHOST.into(),
                Ipv6Addr::UNSPECIFIED.into(),
            ]
        };
        Self {
            lane,
            home,
            addresses,
            alone,
            book: Book::default(),
            processes: Vec::new(),
            log: String::new(),
        }
    }

    /// Begins with some processes in one namespace or two.
    pub fn begin(&mut self, seed: u64) {
        self.log.clear();
        self.spawn();
        self.spawn();
        if seed.is_multiple_of(3) && !self.alone {
            self.visit();
        }
    }

    fn new_name(&self) -> String {
        format!("lane{}-{}", self.lane, self.processes.len())
    }

    fn joins(&mut self, worker: Worker, name: String, netns: u32) -> Index {
        // `/proc` tells starts apart by ticks.
        thread::sleep(Duration::from_millis(11));
        self.book.pids.push((worker.pid, name));
        let worker = Some(worker);
        self.processes.push(Process { netns, worker });
        self.processes.len() - 1
    }

    fn spawn(&mut self) {
        let text = self.new_name();
        let worker = Worker::new(name(&text));
        self.joins(worker, text, self.home);
    }

    /// Two processes in a namespace that ends with the last of them.
    fn visit(&mut self) {
        let names = [0, 1].map(|more| format!("lane{}-{}", self.lane, self.processes.len() + more));
        let given = names.each_ref().map(|text| name(text));
        let there = thread::spawn(move || {
            let inode = sys::new_namespace().expect("network namespaces need root");
            (inode, given.map(Worker::new))
        });
        let (inode, workers) = there.join().expect("a namespace");
        for (worker, text) in workers.into_iter().zip(names) {
            self.joins(worker, text, inode);
        }
    }

    /// Whether it can be no other world's.
    pub fn is_ours(&self, end: Option<IpAddr>) -> bool {
        !self.alone || end.is_some_and(|ip| self.addresses.contains(&ip))
    }

    /// Of the kernel, in all namespaces that a worker is in, and at home.
    pub fn kernels(&self) -> Rows {
        let mut rows = kernels(self.home, "thread-self");
        let mut seen = vec![self.home];
        for Process { netns, worker } in &self.processes {
            if let Some(worker) = worker.as_ref().filter(|_| !seen.contains(netns)) {
                rows.extend(kernels(*netns, &worker.pid.to_string()));
                seen.push(*netns);
            }
        }
        rows.retain(|row, _| {
            let ends = [Some(row.local), row.remote];
            ends.into_iter()
                .any(|end| self.is_ours(end.map(|it| it.ip())))
        });
        rows
    }

    pub fn namespaces(&self) -> Vec<u32> {
        let lived_in = self.processes.iter().filter(|it| it.worker.is_some());
        let mut all: Vec<u32> = lived_in.map(|it| it.netns).collect();
        all.push(self.home);
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Ends all processes.
    pub fn end(&mut self) {
        for at in 0..self.processes.len() {
            self.kill(at);
        }
    }

    fn kill(&mut self, at: Index) {
        if let Some(worker) = self.processes[at].worker.take() {
            worker.kill();
            self.book.ended(at);
        }
    }

    fn living(&self, netns: Option<u32>) -> Vec<Index> {
        let all = self.processes.iter().enumerate();
        let living = all.filter(|(_, it)| it.worker.is_some());
        let wanted = living.filter(|(_, it)| netns.is_none_or(|netns| it.netns == netns));
        wanted.map(|(at, _)| at).collect()
    }

    fn worker(&self, at: Index) -> &Worker {
        self.processes[at].worker.as_ref().expect("it lives")
    }

    fn call(&mut self, by: Index, call: Call) -> super::worker::Answer {
        let answer = self.worker(by).call(call);
        let name = &self.book.pids[by].1;
        let result = answer.result;
        writeln!(self.log, "  {name}: {call:?} = {result:?}").expect("memory");
        answer
    }

    fn note(&mut self, text: &str) {
        writeln!(self.log, "  {text}").expect("memory");
    }

    pub fn take(&mut self, step: Step) {
        // Where it can't be done, nothing is.
        let _ = self.try_take(step);
    }

    fn try_take(&mut self, Step { what, picks }: Step) -> Option<()> {
        let [a, b, c] = picks;
        let process = *pick(&self.living(None), a)?;
        match what {
            What::Pause => {}
            What::Nap => thread::sleep(Duration::from_millis(u64::from(a % 20))),
            What::Listen => self.listen(process, b, c),
            What::ShareListener => self.share_listener(a, b)?,
            What::Connect => self.connect(process, b, c)?,
            What::SelfConnect => self.self_connect(process),
            What::FastOpen => {
                let (to, _) = self.target(process, b)?;
                let at = self.open(process, to, false);
                let (_, fd) = self.holder(at, c)?;
                self.connects(at, process, Call::ConnectSending { fd, to }, to);
            }
            What::Accept => self.accept(a, b)?,
            What::Send => {
                let (by, fd) = self.holder(self.connection(a)?, b)?;
                self.call(by, Call::Send { fd });
            }
            What::Fill => {
                let at = self.connection(a)?;
                let (by, fd) = self.holder(at, b)?;
                self.call(by, Call::Fill { fd });
                if c.is_multiple_of(2) {
                    // Its FIN waits behind what nobody may ever read.
                    let how = How::Write;
                    self.book.closes(at, by);
                    self.call(by, Call::Shutdown { fd, how });
                }
            }
            What::Shutdown => {
                let at = self.connection(a)?;
                let (by, fd) = self.holder(at, b)?;
                let how = *pick(&[How::Write, How::Write, How::Both, How::Read], c)?;
                self.book.closes(at, by);
                self.call(by, Call::Shutdown { fd, how });
            }
            What::Close => self.close(self.held(a)?, b)?,
            What::Reset => {
                let at = self.connection(a)?;
                let (by, fd) = self.holder(at, b)?;
                let seconds = u64::from(c.is_multiple_of(4));
                self.call(by, Call::Linger { fd, seconds });
                self.close(at, b)?;
            }
            What::Reconnect => self.reconnect(a, b, c)?,
            What::Pass => {
                let at = self.held(a)?;
                let (by, fd) = self.holder(at, b)?;
                let to = *pick(&self.living(None), c)?;
                if !self.book.sockets[at].holders.contains_key(&to) {
                    let there = self.worker(by).pass(fd, self.worker(to));
                    self.note(&format!(
                        "{} passes {fd} to {}",
                        self.book.pids[by].1, self.book.pids[to].1
                    ));
                    self.book.hold(at, to, there);
                }
            }
            What::Fork => self.fork(process)?,
            What::Kill => {
                // The last one keeps its namespace.
                if self.living(Some(self.processes[process].netns)).len() > 1 {
                    self.note(&format!("{} is killed", self.book.pids[process].1));
                    self.kill(process);
                }
            }
        }
        Some(())
    }

    /// A socket that somebody holds.
    fn held(&self, pick_by: u32) -> Option<usize> {
        let all = self.book.sockets.iter().enumerate();
        let held: Vec<usize> = all
            .filter(|(_, it)| !it.holders.is_empty())
            .map(|(at, _)| at)
            .collect();
        pick(&held, pick_by).copied()
    }

    /// One of those that is no listener.
    fn connection(&self, pick_by: u32) -> Option<usize> {
        let all = self.book.sockets.iter().enumerate();
        let connections = all.filter(|(_, socket)| {
            !socket.holders.is_empty() && socket.ends.is_some_and(|(_, remote)| remote.is_some())
        });
        let connections: Vec<usize> = connections.map(|(at, _)| at).collect();
        pick(&connections, pick_by).copied()
    }

    fn holder(&self, at: usize, pick_by: u32) -> Option<(Index, i32)> {
        let holders: Vec<(Index, i32)> = self.book.sockets[at]
            .holders
            .iter()
            .map(|(at, fd)| (*at, *fd))
            .collect();
        pick(&holders, pick_by).copied()
    }

    /// A new socket of the process, of the family of `like`, and bound where that is told.
    fn open(&mut self, by: Index, like: SocketAddr, binds: bool) -> usize {
        let at = if binds {
            like
        } else {
            SocketAddr::new(like.ip(), 0)
        };
        let answer = self.call(
            by,
            Call::Open {
                at,
                binds,
                shares: false,
            },
        );
        let fd = answer.result.expect("a socket");
        let (pid, netns) = (self.book.pids[by].0, self.processes[by].netns);
        self.book.add(netns, (pid, "connect"), (by, fd))
    }

    fn listen(&mut self, by: Index, how: u32, more: u32) {
        let [v4, v6, both] = self.addresses;
        let ip = match how % 4 {
            0 => v6,
            1 => both,
            _ => v4,
        };
        let shares = more.is_multiple_of(3);
        let at = SocketAddr::new(ip, 0);
        let answer = self.call(
            by,
            Call::Open {
                at,
                binds: true,
                shares,
            },
        );
        let fd = answer.result.expect("a socket");
        let backlog = [0, 1, 8, 8][(more >> 4) as usize % 4];
        let defers = (more >> 8).is_multiple_of(6);
        self.listens(by, fd, backlog, defers);
    }

    fn listens(&mut self, by: Index, fd: i32, backlog: i32, defers: bool) {
        let answer = self.call(
            by,
            Call::Listen {
                fd,
                backlog,
                defers,
            },
        );
        let (pid, netns) = (self.book.pids[by].0, self.processes[by].netns);
        let at = self.book.add(netns, (pid, "listen"), (by, fd));
        if let Some(local) = answer.local.filter(|_| answer.result.is_ok()) {
            self.book.listens(at, local);
        }
    }

    /// Another process listens on the port of one that shares it.
    fn share_listener(&mut self, which: u32, by: u32) -> Option<()> {
        let (at, _) = self.listener(None, which)?;
        let socket = &self.book.sockets[at];
        let (local, _) = socket.ends?;
        let by = *pick(&self.living(Some(socket.netns)), by)?;
        let open = Call::Open {
            at: local,
            binds: true,
            shares: true,
        };
        // Not all share.
        let fd = self.call(by, open).result.ok()?;
        self.listens(by, fd, 8, false);
        Some(())
    }

    fn listener(&self, netns: Option<u32>, which: u32) -> Option<(usize, SocketAddr)> {
        let all = self.book.listeners();
        let there = all.filter(|(_, socket)| netns.is_none_or(|netns| socket.netns == netns));
        let there: Vec<(usize, SocketAddr)> = there
            .filter_map(|(at, socket)| Some((at, socket.ends?.0)))
            .collect();
        pick(&there, which).copied()
    }

    /// Where to connect to: mostly somebody listens there.
    fn target(&self, by: Index, which: u32) -> Option<(SocketAddr, bool)> {
        let netns = self.processes[by].netns;
        let [v4, v6, _] = self.addresses;
        let nobody = SocketAddr::new(v4, 9);
        if which.is_multiple_of(12) {
            return Some((nobody, false));
        }
        let Some((_, local)) = self.listener(Some(netns), which >> 4) else {
            return Some((nobody, false));
        };
        let ip = match local.ip() {
            ip if !ip.is_unspecified() => ip,
            _ if which & 8 == 0 => v4,
            _ => v6,
        };
        Some((SocketAddr::new(ip, local.port()), true))
    }

    fn connect(&mut self, by: Index, which: u32, how: u32) -> Option<()> {
        let (to, _) = self.target(by, which)?;
        let at = self.open(by, to, false);
        let (_, fd) = self.holder(at, 0)?;
        let waits = how & 1 == 0;
        self.connects(at, by, Call::Connect { fd, to, waits }, to);
        Some(())
    }

    fn connects(&mut self, at: usize, by: Index, call: Call, to: SocketAddr) {
        let answer = self.call(by, call);
        let under_way = match answer.result {
            Ok(_) => true,
            Err(error) => error == libc::EINPROGRESS,
        };
        self.book.sockets[at].ends = None;
        self.book.connects(at, by);
        if let Some(local) = answer.local.filter(|_| under_way) {
            self.book.connected(at, local, to);
        }
    }

    fn self_connect(&mut self, by: Index) {
        let at = self.open(by, SocketAddr::new(self.addresses[0], 0), true);
        let socket = self.holder(at, 0);
        let (_, fd) = socket.expect("it holds it");
        let local = self.local(by, fd);
        let waits = true;
        self.connects(
            at,
            by,
            Call::Connect {
                fd,
                to: local,
                waits,
            },
            local,
        );
    }

    fn local(&mut self, by: Index, fd: i32) -> SocketAddr {
        self.call(by, Call::Name { fd }).local.expect("it is bound")
    }

    fn accept(&mut self, which: u32, by: u32) -> Option<()> {
        let (at, _) = self.listener(None, which)?;
        let netns = self.book.sockets[at].netns;
        let (by, fd) = self.holder(at, by)?;
        let answer = self.call(by, Call::Accept { fd });
        let fd = answer.result.ok()?;
        let Some((local, remote)) = answer.local.zip(answer.remote) else {
            // It was reset while it waited.
            self.call(by, Call::Close { fd });
            return None;
        };
        let pid = self.book.pids[by].0;
        let at = self.book.add(netns, (pid, "accept"), (by, fd));
        self.book.accepted(at, local, remote);
        Some(())
    }

    fn close(&mut self, at: usize, by: u32) -> Option<()> {
        let (by, fd) = self.holder(at, by)?;
        self.call(by, Call::Close { fd });
        self.book.leave(at, by);
        Some(())
    }

    /// The same socket, given up and connected anew.
    fn reconnect(&mut self, which: u32, by: u32, to: u32) -> Option<()> {
        let at = self.connection(which)?;
        let (by, fd) = self.holder(at, by)?;
        if self.book.sockets[at].netns != self.processes[by].netns {
            // The target is chosen where the process is.
            return None;
        }
        let (local, _) = self.book.sockets[at].ends?;
        let (to, _) = self.target(by, to)?;
        self.call(by, Call::Disconnect { fd });
        self.book.gives_up(at);
        let (v4, to_v4) = (local.is_ipv4(), to.is_ipv4());
        if v4 == to_v4 {
            self.connects(
                at,
                by,
                Call::Connect {
                    fd,
                    to,
                    waits: false,
                },
                to,
            );
        }
        Some(())
    }

    fn fork(&mut self, parent: Index) -> Option<()> {
        let netns = self.processes[parent].netns;
        if self.living(Some(netns)).len() >= MOST_WORKERS {
            return None;
        }
        let text = self.new_name();
        let child = self.worker(parent).fork(name(&text));
        self.note(&format!("{} forks {text}", self.book.pids[parent].1));
        let child = self.joins(child, text, netns);
        for at in 0..self.book.sockets.len() {
            if let Some(&fd) = self.book.sockets[at].holders.get(&parent) {
                self.book.hold(at, child, fd);
            }
        }
        Some(())
    }
}

fn pick<T>(from: &[T], by: u32) -> Option<&T> {
    from.get((by as usize).checked_rem(from.len())?)
}
