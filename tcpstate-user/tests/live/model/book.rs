//! What must be told: the sockets that the kernel has, by /proc, and whose each is, by what the driver had the workers do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;

use serde_json::Value;

use super::worker::canonical;
use crate::list::{STATES, proc_end};

/// A socket as the kernel shows it; a listener has no remote end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    pub netns: u32,
    pub state: String,
    pub local: SocketAddr,
    pub remote: Option<SocketAddr>,
}

impl Row {
    /// As it is known where a dump teaches nothing: a connect is told before it has a port.
    pub fn by_events(mut self) -> Self {
        if self.state == "SYN_SENT" {
            self.local.set_port(0);
        }
        self
    }
}

/// Listeners can have the same ends.
pub type Rows = BTreeMap<Row, usize>;

/// Where the lane's daemon listens.
const DAEMONS_PORT: u16 = 10975;

/// States that events don't follow to their end on every kernel: told right by a dump, and one that ends early by the
/// second.
const SILENT: [&str; 3] = ["SYN_RECV", "FIN_WAIT2", "TIME_WAIT"];

pub fn is_silent(state: &str) -> bool {
    SILENT.contains(&state)
}

/// Of the namespace that a process or thread of that folder in /proc is in.
pub fn kernels(netns: u32, folder: &str) -> Rows {
    let mut rows = Rows::new();
    for name in ["tcp", "tcp6"] {
        let table = fs::read_to_string(format!("/proc/{folder}/net/{name}"));
        for line in table.expect("it lives").lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let end = |text| -> SocketAddr { proc_end(text).parse().expect("an address") };
            let state = usize::from_str_radix(fields[3], 16).expect("hexadecimal");
            let row = Row {
                netns,
                state: STATES[state].to_owned(),
                local: canonical(end(fields[1])),
                remote: (STATES[state] != "LISTEN").then(|| canonical(end(fields[2]))),
            };
            *rows.entry(row).or_default() += 1;
        }
    }
    rows
}

/// At least and at most, while the kernel went from one to the other.
pub fn bounds<'a>(before: &'a Rows, after: &'a Rows) -> BTreeMap<&'a Row, (usize, usize)> {
    let all: BTreeSet<&Row> = before.keys().chain(after.keys()).collect();
    let count = |rows: &Rows, row| rows.get(row).copied().unwrap_or(0);
    let both = all.into_iter().map(|row| {
        let (before, after) = (count(before, row), count(after, row));
        (row, (before.min(after), before.max(after)))
    });
    both.collect()
}

/// `no_port`: what stands for one that is not known.
pub fn row_of(told: &Value, no_port: Option<u16>) -> Result<Row, String> {
    let end = |which: &str| -> Option<SocketAddr> {
        let addr = told[format!("{which}_addr")].as_str()?.parse().ok()?;
        let port = told[format!("{which}_port")].as_u64();
        let port = port.and_then(|port| port.try_into().ok()).or(no_port)?;
        Some(SocketAddr::new(addr, port))
    };
    let state = told["state"].as_str().unwrap_or_default();
    let row = Row {
        netns: told["netns"].as_u64().unwrap_or_default() as u32,
        // As in /proc, and in `ss`.
        state: state.trim_start_matches("NEW_").to_owned(),
        local: end("local").ok_or_else(|| format!("no local end: {told}"))?,
        remote: end("remote"),
    };
    Ok(row)
}

/// Place of a process in the book: also the order in which they started.
pub type Index = usize;

pub struct Socket {
    pub netns: u32,
    /// Local and remote, from when it listens or connects; a listener has no remote one.
    pub ends: Option<(SocketAddr, Option<SocketAddr>)>,
    /// The pid of who connected, listened or accepted, and the word for it.
    pub origin: (u32, &'static str),
    /// With the descriptor that it is there.
    pub holders: BTreeMap<Index, i32>,
    /// Who can have been found to be the owner since all were looked up; of a socket that nobody holds the last one stays.
    owners: BTreeSet<u32>,
    /// All that ever could.
    ever: BTreeSet<u32>,
    /// More than one held it at some time.
    shared: bool,
}

#[derive(Default)]
pub struct Book {
    /// By place; also those that have ended.
    pub pids: Vec<(u32, String)>,
    pub sockets: Vec<Socket>,
    /// Who ever held a listener of that port.
    listened: BTreeMap<(u32, u16), BTreeSet<u32>>,
    /// Ends of what was there when a daemon began.
    older: BTreeSet<(u32, SocketAddr, Option<SocketAddr>)>,
    /// Of all times.
    pub added: usize,
}

impl Book {
    pub fn add(&mut self, netns: u32, origin: (u32, &'static str), holder: (Index, i32)) -> usize {
        self.added += 1;
        self.sockets.push(Socket {
            netns,
            ends: None,
            origin,
            holders: BTreeMap::from([holder]),
            owners: BTreeSet::from([origin.0]),
            ever: BTreeSet::from([origin.0]),
            shared: false,
        });
        self.sockets.len() - 1
    }

    /// The socket has these ends from now on.
    pub fn connected(&mut self, at: usize, local: SocketAddr, remote: SocketAddr) {
        // What had the ends of its peer, or its own, is no more.
        let netns = self.sockets[at].netns;
        for other in &mut self.sockets {
            let ends = [(local, Some(remote)), (remote, Some(local))];
            if other.netns == netns && other.ends.is_some_and(|its| ends.contains(&its)) {
                other.ends = None;
            }
        }
        self.sockets[at].ends = Some((local, Some(remote)));
    }

    /// A connection was taken from its listener's queue.
    pub fn accepted(&mut self, at: usize, local: SocketAddr, remote: SocketAddr) {
        self.sockets[at].ends = Some((local, Some(remote)));
    }

    /// It is given up; what the kernel may keep of it is nobody's any more.
    pub fn gives_up(&mut self, at: usize) {
        let socket = &mut self.sockets[at];
        let rest = Socket {
            netns: socket.netns,
            ends: socket.ends.take(),
            origin: socket.origin,
            holders: BTreeMap::new(),
            owners: socket.owners.clone(),
            ever: socket.ever.clone(),
            shared: socket.shared,
        };
        self.sockets.push(rest);
    }

    /// It listens there from now on.
    pub fn listens(&mut self, at: usize, local: SocketAddr) {
        self.sockets[at].ends = Some((local, None));
        self.remember_listener(at);
    }

    fn remember_listener(&mut self, at: usize) {
        let socket = &self.sockets[at];
        if let Some((local, None)) = socket.ends {
            let pids = self.listened.entry((socket.netns, local.port()));
            pids.or_default().extend(&socket.ever);
        }
    }

    /// A daemon begins at `home`, where these sockets are: a sweep finds the holders, and of what has none there is no owner.
    pub fn restarted(&mut self, home: u32, there: &Rows) {
        let firsts: Vec<Option<u32>> = self
            .sockets
            .iter()
            .map(|it| self.first_holder(it))
            .collect();
        let sockets = self.sockets.iter_mut().zip(firsts);
        for (socket, first) in sockets.filter(|(socket, _)| socket.netns == home) {
            socket.origin.1 = "sweep";
            socket.owners = first.into_iter().collect();
            socket.shared = true;
        }
        let ends = there.keys().map(|row| (row.netns, row.local, row.remote));
        self.older = ends.collect();
    }

    /// The process calls connect.
    pub fn connects(&mut self, at: usize, by: Index) {
        let pid = self.pids[by].0;
        self.sockets[at].origin = (pid, "connect");
        self.sockets[at].owners.insert(pid);
        self.sockets[at].ever.insert(pid);
    }

    /// Closing by shutdown, or by the last close, tells of an owner where none is known.
    pub fn closes(&mut self, at: usize, by: Index) {
        let pid = self.pids[by].0;
        if self.sockets[at].origin.1 == "accept" {
            self.sockets[at].owners.insert(pid);
        }
    }

    pub fn hold(&mut self, at: usize, holder: Index, fd: i32) {
        self.sockets[at].holders.insert(holder, fd);
        self.sockets[at].ever.insert(self.pids[holder].0);
        self.sockets[at].shared = true;
        self.remember_listener(at);
        self.note(at);
    }

    pub fn leave(&mut self, at: usize, holder: Index) {
        self.closes(at, holder);
        self.sockets[at].holders.remove(&holder);
        self.note(at);
    }

    pub fn ended(&mut self, process: Index) {
        for at in 0..self.sockets.len() {
            if self.sockets[at].holders.contains_key(&process) {
                self.leave(at, process);
            }
        }
    }

    fn note(&mut self, at: usize) {
        if let Some(pid) = self.first_holder(&self.sockets[at]) {
            self.sockets[at].owners.insert(pid);
        }
    }

    fn first_holder(&self, socket: &Socket) -> Option<u32> {
        let (&first, _) = socket.holders.first_key_value()?;
        Some(self.pids[first].0)
    }

    /// A sweep has found all holders, and the sockets that are there are these: others need no place.
    pub fn swept(&mut self, kernels: &Rows) {
        let there: BTreeMap<_, &str> = kernels
            .keys()
            .map(|row| ((row.netns, row.local, row.remote), row.state.as_str()))
            .collect();
        let firsts: Vec<Option<u32>> = self
            .sockets
            .iter()
            .map(|it| self.first_holder(it))
            .collect();
        for (socket, first) in self.sockets.iter_mut().zip(firsts) {
            let ends = socket
                .ends
                .map(|(local, remote)| (socket.netns, local, remote));
            let state = ends.and_then(|ends| there.get(&ends));
            // What took its place is not held.
            if let Some(pid) = first.filter(|_| state != Some(&"TIME_WAIT")) {
                socket.owners = BTreeSet::from([pid]);
            }
        }
        self.sockets.retain(|socket| {
            let there = |(local, remote)| there.contains_key(&(socket.netns, local, remote));
            !socket.holders.is_empty() || socket.ends.is_some_and(there)
        });
    }

    pub fn listeners(&self) -> impl Iterator<Item = (usize, &Socket)> {
        let sockets = self.sockets.iter().enumerate();
        sockets.filter(|(_, socket)| {
            !socket.holders.is_empty() && socket.ends.is_some_and(|(_, remote)| remote.is_none())
        })
    }

    /// What is wrong with what is told of whose the sockets are, in lines for people.
    pub fn complaints(&self, told: &[(Row, Value)]) -> String {
        let mut text = String::new();
        for (row, value) in told {
            if let Err(expected) = self.judge(row, value) {
                writeln!(text, "expected {expected} of {value}").expect("memory");
            }
        }
        text
    }

    /// Owners that never had to do with the socket, nor listened for it: what is wrong even where no sweep finds holders.
    pub fn strangers(&self, told: &[(Row, Value)]) -> String {
        let mut text = String::new();
        for (row, value) in told {
            let Some(pid) = value["pid"].as_u64().map(|pid| pid as u32) else {
                continue;
            };
            let listened = self.listened.get(&(row.netns, row.local.port()));
            let mut known = self.sockets.iter().filter(|socket| {
                let ends = socket.ends.map(|(local, remote)| Row {
                    local,
                    remote,
                    ..row.clone()
                });
                socket.netns == row.netns && ends.map(Row::by_events).as_ref() == Some(row)
            });
            let right = listened.is_some_and(|pids| pids.contains(&pid))
                || known.any(|socket| socket.ever.contains(&pid));
            let name = value["comm"].as_str();
            if !right {
                writeln!(text, "the owner never held it: {value}").expect("memory");
            } else if name.is_some_and(|name| Some(name) != self.name_of(pid)) {
                writeln!(text, "expected comm {:?} of {value}", self.name_of(pid)).expect("memory");
            }
        }
        text
    }

    fn name_of(&self, pid: u32) -> Option<&str> {
        let known = self.pids.iter().rfind(|(it, _)| *it == pid);
        known.map(|(_, name)| name.as_str())
    }

    fn judge(&self, row: &Row, told: &Value) -> Result<(), String> {
        if row.local.port() == DAEMONS_PORT {
            return Ok(());
        }
        let pid = told["pid"].as_u64().map(|pid| pid as u32);
        let source = told["owner_source"].as_str().unwrap_or_default();
        let ends = Some((row.local, row.remote));
        let older = self.older.contains(&(row.netns, row.local, row.remote));
        let known: Vec<&Socket> = self
            .sockets
            .iter()
            .filter(|socket| socket.netns == row.netns && socket.ends == ends)
            .collect();
        let (pids, sources, holders) = match known[..] {
            [] => self.of_unaccepted(row, older),
            // Which of several listeners of a port is which can't be told by their ends.
            _ => {
                let mut pids = BTreeSet::new();
                let mut sources = BTreeSet::new();
                let mut holders = BTreeSet::new();
                for socket in known {
                    // A timewait socket stands for one that may be held on, closed.
                    let count = match row.state.as_str() {
                        "TIME_WAIT" => 0,
                        _ => socket.holders.len(),
                    };
                    let (owners, words) = self.owner(socket, count > 0);
                    // A timewait socket that took its place before the daemon began is nobody's.
                    if owners.is_empty() || (older && row.state == "TIME_WAIT") {
                        pids.insert(None);
                        sources.insert("none");
                    }
                    pids.extend(owners.into_iter().map(Some));
                    sources.extend(words);
                    holders.insert((count > 0).then_some(count as u64));
                }
                (pids, sources, holders)
            }
        };
        let fits = pids.contains(&pid)
            && sources.contains(source)
            && holders.contains(&told["holders"].as_u64());
        if !fits {
            return Err(format!("pid {pids:?}, {sources:?}, holders {holders:?}"));
        }
        if let Some(pid) = pid {
            let name = self.name_of(pid);
            if told["comm"].as_str() != name {
                return Err(format!("comm {name:?}"));
            }
        }
        let ends = ["FIN_WAIT1", "FIN_WAIT2", "CLOSING", "LAST_ACK"];
        let orphan = ends.contains(&row.state.as_str()) && holders == BTreeSet::from([None]);
        if told["orphan"] != orphan {
            return Err(format!("orphan {orphan}"));
        }
        Ok(())
    }

    /// Who can be its owner, and how that can be known.
    fn owner(&self, socket: &Socket, held: bool) -> (BTreeSet<u32>, BTreeSet<&'static str>) {
        let (pid, word) = socket.origin;
        // An accept is told only where its function can be traced.
        let accepted = word == "accept";
        let owners = match self.first_holder(socket) {
            Some(first) if held => BTreeSet::from([first]),
            _ => socket.owners.clone(),
        };
        let mut words = BTreeSet::new();
        if owners.contains(&pid) {
            words.insert(word);
        }
        if socket.shared || accepted {
            words.insert("sweep");
        }
        if accepted && !held {
            words.insert("closer");
        }
        (owners, words)
    }

    /// A connection that nobody has accepted is its listener's; a request is nobody's.
    fn of_unaccepted(
        &self,
        row: &Row,
        older: bool,
    ) -> (
        BTreeSet<Option<u32>>,
        BTreeSet<&'static str>,
        BTreeSet<Option<u64>>,
    ) {
        let listening = self.listeners().filter(|(_, socket)| {
            let port = socket.ends.map(|(local, _)| local.port());
            socket.netns == row.netns && port == Some(row.local.port())
        });
        let mut pids: BTreeSet<Option<u32>> = listening
            .map(|(_, socket)| self.first_holder(socket))
            .collect();
        let mut sources = BTreeSet::from(["listener"]);
        if row.state == "SYN_RECV" {
            pids = BTreeSet::from([None]);
        } else if pids.len() > 1 {
            // Which listener the kernel took is told by the events of some kernels only.
            pids.insert(None);
        } else if older && !["ESTABLISHED", "CLOSE_WAIT"].contains(&row.state.as_str()) {
            // That it waited for its accept shows in a life only.
            pids.insert(None);
        }
        if pids.contains(&None) {
            sources.insert("none");
        }
        (pids, sources, BTreeSet::from([None]))
    }
}
