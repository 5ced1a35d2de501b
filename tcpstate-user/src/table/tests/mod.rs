//! The table against scripts of events and dumps; here what the scripts are made of.

mod cost;
mod dumps;
mod events;
mod identity;
mod limit;
mod owners;
mod properties;
mod timewait;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use rustc_hash::FxHashMap;
use tcpstate_common::TcpState;
use tcpstate_common::event::{
    AF_INET, FLAG_DEAD, FLAG_DONE, FLAG_NO_LINGER, FLAG_SOCKET_READ, FLAG_TASK, SEND_SHUTDOWN,
    SetState,
};
use zerocopy::FromZeros as _;

use super::{
    Change, Discard, Dwell, Held, Holder, Identity, Merge, Merged, Place, Record, STORE_NS,
    Snapshot, Socket, StateMask, Sweep, Table, Unreachable, Walk,
};
use crate::model::{Comm, End, Endpoint, Evidence, Family, Listed, Named, OwnerSource, Role};

const CLOSE: TcpState = TcpState::CLOSE;
const LISTEN: TcpState = TcpState::LISTEN;
const SYN_SENT: TcpState = TcpState::SYN_SENT;
const SYN_RECV: TcpState = TcpState::SYN_RECV;
const ESTABLISHED: TcpState = TcpState::ESTABLISHED;
const FIN_WAIT1: TcpState = TcpState::FIN_WAIT1;
const FIN_WAIT2: TcpState = TcpState::FIN_WAIT2;
const TIME_WAIT: TcpState = TcpState::TIME_WAIT;
const CLOSE_WAIT: TcpState = TcpState::CLOSE_WAIT;
const LAST_ACK: TcpState = TcpState::LAST_ACK;
const CLOSING: TcpState = TcpState::CLOSING;
const NEW_SYN_RECV: TcpState = TcpState::NEW_SYN_RECV;

const NETNS: u32 = 4_026_531_840;
const MS: u64 = 1_000_000;
const SERVER_PORT: u16 = 80;

fn address(socket: u16) -> u64 {
    0xffff_8880_0000_0000 + u64::from(socket) * 4096
}

/// An event of a loopback socket; `socket` stands for its cookie, its address and its local port.
fn event(time_ms: u64, socket: u16, from: TcpState, to: TcpState) -> SetState {
    let mut addr = [0; 16];
    addr[10..].copy_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
    SetState {
        time_ns: time_ms * MS,
        sk: address(socket),
        cookie: u64::from(socket),
        netns: NETNS,
        uid: 1000,
        local_addr: addr,
        remote_addr: addr,
        local_port: 1000 + socket,
        remote_port: SERVER_PORT,
        family: AF_INET,
        from: from.number(),
        to: to.number(),
        flags: FLAG_SOCKET_READ,
        ..SetState::new_zeroed()
    }
}

fn with(mut event: SetState, change: impl FnOnce(&mut SetState)) -> SetState {
    change(&mut event);
    event
}

fn by(event: SetState, pid: u32, comm: &str) -> SetState {
    with(event, |event| {
        event.flags |= FLAG_TASK;
        event.tgid = pid;
        event.start_ns = u64::from(pid);
        event.comm[..comm.len()].copy_from_slice(comm.as_bytes());
    })
}

impl Table {
    fn sockets(&self) -> impl Iterator<Item = &Socket> {
        let (mini, _) = self.mini.part(0, usize::MAX);
        self.full
            .sockets()
            .chain(mini.map(|(_, mini)| &mini.socket))
    }
}

/// What a test keeps of a change.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    id: String,
    kernel: Option<(TcpState, TcpState)>,
    shown: Option<(TcpState, TcpState)>,
    dwell: Dwell,
    evidence: Evidence,
    end: Option<End>,
    pid: Option<u32>,
    source: Option<OwnerSource>,
    role: Option<Role>,
    uid: Option<u32>,
    time_ms: u64,
}

impl Seen {
    fn of(change: &Change<'_>) -> Self {
        let owner = change.socket.owner();
        Self {
            id: change.socket.id.to_string(),
            kernel: change.kernel,
            shown: change.shown,
            dwell: change.dwell,
            evidence: change.evidence,
            end: change.end,
            pid: owner.map(|owner| owner.process.pid),
            source: owner.map(|owner| owner.source),
            role: change.socket.role,
            uid: change.socket.uid,
            time_ms: change.time_ns / MS,
        }
    }
}

/// A table whose changes are kept, and whose gauges are added up from them as `stats` does.
struct Watched {
    table: Table,
    seen: Vec<Seen>,
    gauges: BTreeMap<(TcpState, Option<Comm>), i64>,
    /// Sockets by how their owner is known, added up the same way.
    sources: BTreeMap<Option<&'static str>, i64>,
    /// What the last dump found.
    merged: Merged,
}

/// So few that every script has a merge of several parts.
const PART: usize = 2;

impl Watched {
    fn new(identity: Identity) -> Self {
        Self::of(Table::new(identity))
    }

    fn holding(identity: Identity, most: usize) -> Self {
        Self::of(Table::holding(identity, most))
    }

    fn of(table: Table) -> Self {
        Self {
            table,
            seen: Vec::new(),
            gauges: BTreeMap::new(),
            sources: BTreeMap::new(),
            merged: Merged::default(),
        }
    }

    fn take(&mut self, change: impl FnOnce(&mut Table, &mut dyn FnMut(&Change<'_>))) {
        let (seen, gauges, sources) = (&mut self.seen, &mut self.gauges, &mut self.sources);
        change(&mut self.table, &mut |change| {
            for (place, step) in [(change.before, -1), (change.after, 1)] {
                if let Some(Place {
                    state,
                    comm,
                    source,
                }) = place
                {
                    *sources.entry(source.map(Named::name)).or_default() += step;
                    let gauge = gauges.entry((state, comm)).or_default();
                    *gauge += step;
                    assert!(*gauge >= 0, "gauge of {state} below 0 by {change:?}");
                }
            }
            seen.push(Seen::of(change));
        });
        self.check_gauges();
        self.table.full.check();
    }

    fn apply(&mut self, event: &SetState) {
        self.take(|table, sink| table.apply(event, None, sink).expect("a cookie"));
    }

    fn reconcile(&mut self, snapshot: &Snapshot) {
        let mut merge = Merge::new(snapshot.clone());
        while !self.merge(&mut merge) {}
    }

    /// A part; tells whether it was the last.
    fn merge(&mut self, merge: &mut Merge) -> bool {
        let mut merged = None;
        self.take(|table, sink| merged = table.merge(merge, PART, sink));
        let done = merged.is_some();
        self.merged = merged.unwrap_or_default();
        done
    }

    fn sweep(&mut self, time_ms: u64, mut sweep: Sweep) {
        let mut done = false;
        while !done {
            self.take(|table, sink| done = table.sweep(&mut sweep, PART, time_ms * MS, sink));
        }
    }

    fn swept(&mut self, time_ms: u64, holders: &[Holder]) {
        let holders = Some(holders.to_vec());
        self.sweep(
            time_ms,
            Sweep::new(holders, FxHashMap::default(), (time_ms * MS, time_ms * MS)),
        );
    }

    fn rows(&self) -> Vec<Listed> {
        let (mut rows, mut walk) = (Vec::new(), Walk::default());
        while !walk.is_done() {
            rows.extend(self.table.rows(&mut walk, PART, 0, 0));
        }
        rows
    }

    /// The gauges added up from the changes are those of the sockets that the table holds: no change of a state, a name or
    /// a source goes untold.
    fn check_gauges(&self) {
        let mut held: BTreeMap<_, i64> = BTreeMap::new();
        let mut known: BTreeMap<_, i64> = BTreeMap::new();
        for socket in self.table.sockets() {
            let Place {
                state,
                comm,
                source,
            } = Place::of(socket);
            *known.entry(source.map(Named::name)).or_default() += 1;
            *held.entry((state, comm)).or_default() += 1;
        }
        let mut gauges = self.gauges.clone();
        gauges.retain(|_, count| *count != 0);
        assert_eq!(gauges, held);
        let mut sources = self.sources.clone();
        sources.retain(|_, count| *count != 0);
        assert_eq!(sources, known);
    }

    fn shown(&self) -> Vec<(TcpState, TcpState)> {
        self.seen.iter().filter_map(|seen| seen.shown).collect()
    }

    fn last(&self) -> &Seen {
        self.seen.last().expect("a change")
    }

    /// Of each cookie; the table must not hold one twice.
    fn states(&self) -> BTreeMap<u64, TcpState> {
        let mut states = BTreeMap::new();
        for socket in self.table.sockets() {
            if let Some(cookie) = socket.cookie {
                let twice = states.insert(cookie.get(), socket.state);
                assert_eq!(twice, None, "{socket:?} is there twice");
            }
        }
        states
    }
}

fn run(identity: Identity, events: &[SetState]) -> Watched {
    let mut watched = Watched::new(identity);
    for event in events {
        watched.apply(event);
    }
    watched
}

fn record(time_ms: u64, socket: u16, state: TcpState) -> Record {
    let local = Endpoint {
        addr: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        port: Some(1000 + socket),
    };
    let remote = Endpoint {
        port: Some(SERVER_PORT),
        ..local
    };
    Record {
        cookie: Some(u64::from(socket)),
        address: Some(address(socket)),
        netns: NETNS,
        family: Family::Ipv4,
        local,
        remote: if state == LISTEN {
            Endpoint::default()
        } else {
            remote
        },
        state,
        uid: Some(1000),
        inode: 1,
        recv_queue: 7,
        send_queue: 9,
        expires_ns: matches!(state, TIME_WAIT | NEW_SYN_RECV).then_some(30_000 * MS),
        read_ns: (time_ms * MS, time_ms * MS),
    }
}

fn dump(from_ms: u64, to_ms: u64, records: Vec<Record>) -> Snapshot {
    Snapshot {
        records,
        netns: vec![NETNS],
        unreachable: Vec::<Unreachable>::new(),
        started_ns: from_ms * MS,
        finished_ns: to_ms * MS,
        states: StateMask::ALL,
        whole_host: true,
    }
}
