//! The door for sweeps over all descriptors: who holds which sockets, and the names that owners have now.
//!
//! Goes over the table a part at a time, as a merge does.

use std::num::NonZero;

use rustc_hash::FxHashMap;
use tcpstate_common::TcpState;

use super::owners::give;
use super::{Change, Full, Held, Holder, Identity, Owned, Socket, Table};
use crate::model::{Comm, Owner, OwnerSource, Process, ProcessId, Role};

/// What was found, on its way into the table by [`Table::sweep`].
#[derive(Debug)]
pub struct Sweep {
    /// By the socket's key. `None` where that could not be looked up.
    held: Option<FxHashMap<u64, Found>>,
    holders: Vec<Holder>,
    names: FxHashMap<ProcessId, Comm>,
    started_ns: u64,
    finished_ns: u64,
    next: Next,
    /// Connections that may be waiting to be accepted.
    waiting: Vec<u64>,
}

/// What was found of a socket.
#[derive(Clone, Copy, Debug)]
struct Found {
    /// Which holder started first.
    first: usize,
    holders: u32,
    quiet_ns: Option<NonZero<u64>>,
}

/// Where it goes on.
#[derive(Clone, Copy, Debug)]
enum Next {
    Full(usize),
    Waiting,
    Mini(usize),
}

impl Sweep {
    /// `holders`: `None` where they could not be looked up. `names`: those that owners have now, as far as they were read.
    /// The sweep began and ended at `time_ns`.
    #[must_use]
    pub fn new(
        holders: Option<Vec<Holder>>,
        names: FxHashMap<ProcessId, Comm>,
        time_ns: (u64, u64),
    ) -> Self {
        let held = holders.as_deref().map(held);
        Self {
            held,
            holders: holders.unwrap_or_default(),
            names,
            started_ns: time_ns.0,
            finished_ns: time_ns.1,
            next: Next::Full(0),
            waiting: Vec::new(),
        }
    }

    /// What it tells of a full socket: nothing of a later one at the same address.
    fn found(&self, key: u64, begun_ns: u64, identity: Identity) -> Option<Found> {
        let found = *self.held.as_ref()?.get(&key)?;
        let same = identity == Identity::Cookie || begun_ns < self.started_ns;
        same.then_some(found)
    }

    /// The owner with the name that it has now, where that is another.
    fn renamed(&self, socket: &Socket) -> Option<Owned> {
        let owned = socket.owned.as_ref()?;
        let process = owned.owner.process;
        let now = self.names.get(&process.id()?)?;
        if process.comm.as_ref() == Some(now) {
            return None;
        }
        let mut renamed = Owned::clone(owned);
        renamed.owner.process.comm = Some(*now);
        Some(renamed)
    }
}

fn held(holders: &[Holder]) -> FxHashMap<u64, Found> {
    let sockets = holders.iter().map(|holder| holder.sockets.len()).sum();
    let mut held = FxHashMap::with_capacity_and_hasher(sockets, Default::default());
    for (index, holder) in holders.iter().enumerate() {
        for &Held { socket, quiet_ns } in &holder.sockets {
            let found = held.entry(socket).or_insert(Found {
                first: index,
                holders: 0,
                quiet_ns,
            });
            found.holders += 1;
            if holder.process.start_ns < holders[found.first].process.start_ns {
                found.first = index;
            }
        }
    }
    held
}

impl Table {
    /// Takes a part of a sweep: looks at `most` sockets. All events up to its end must have been applied before the first
    /// part; others may come between the parts. What it does not show may be held all the same, or have been by who is
    /// known.
    ///
    /// Tells whether it is done.
    pub fn sweep(
        &mut self,
        sweep: &mut Sweep,
        most: usize,
        time_ns: u64,
        mut sink: impl FnMut(&Change<'_>),
    ) -> bool {
        sweep.next = match sweep.next {
            Next::Full(from) => {
                let next = self.sweep_full(sweep, from, most, time_ns, &mut sink);
                next.map_or(Next::Waiting, Next::Full)
            }
            Next::Waiting => {
                let from = sweep.waiting.len().saturating_sub(most);
                for key in sweep.waiting.split_off(from) {
                    self.waiting_for_accept(key, time_ns, &mut sink);
                }
                match from {
                    0 => Next::Mini(0),
                    _ => Next::Waiting,
                }
            }
            Next::Mini(from) => {
                let (part, next) = self.mini.part_mut(from, most);
                for (_, mini) in part {
                    if let Some(renamed) = sweep.renamed(&mini.socket) {
                        let owned = self.owners.shared.share(renamed);
                        give(&mut mini.socket, owned, time_ns, &mut sink);
                    }
                }
                let Some(next) = next else {
                    return true;
                };
                Next::Mini(next)
            }
        };
        false
    }

    fn sweep_full(
        &mut self,
        sweep: &mut Sweep,
        from: usize,
        most: usize,
        time_ns: u64,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Option<usize> {
        let (part, next) = self.full.part_mut(from, most);
        for (key, full) in part {
            // The sweep may have come to that process before, and since to one that was forked for an instant.
            let told_since = full.owned_ns() >= Some(sweep.started_ns);
            let socket = &mut full.socket;
            if sweep.held.is_some() {
                // Of what it does not show the count is unknown: not accepted, orphaned, or not ours to look into.
                socket.holders = None;
            }
            if let Some(found) = sweep.found(key, full.begun_ns, self.identity) {
                if !told_since {
                    let holder = &sweep.holders[found.first];
                    socket.holders = NonZero::new(found.holders);
                    let owned = self.owners.shared.share(as_held(socket.owner(), holder));
                    give(socket, owned, time_ns, sink);
                }
                if let Some(quiet_ns) = found.quiet_ns {
                    let acked_ns = sweep.finished_ns.saturating_sub(quiet_ns.get());
                    full.stay.begun_by(socket.state, acked_ns, sweep.started_ns);
                }
            }
            if let Some(renamed) = sweep.renamed(socket) {
                let owned = self.owners.shared.share(renamed);
                give(socket, owned, time_ns, sink);
            }
            if sweep.held.is_some() && may_wait(full) {
                sweep.waiting.push(key);
            }
        }
        next
    }

    /// Gives a connection that is not accepted yet to who listens: who that is may be known only now, or be another now.
    fn waiting_for_accept(&mut self, key: u64, time_ns: u64, sink: &mut impl FnMut(&Change<'_>)) {
        let waits = self.full.get(key).filter(|full| may_wait(full));
        let Some(listener) = waits.and_then(|full| self.full.listener_of(&full.socket)) else {
            return;
        };
        let owned = self.owners.shared.as_listener(listener);
        if let Some(full) = self.full.get_mut(key) {
            give(&mut full.socket, owned, time_ns, sink);
        }
    }
}

/// That a sweep does not show who holds it does not say that nobody does: an accepted one stays who listened then.
fn may_wait(full: &Full) -> bool {
    let socket = &full.socket;
    let without_file = || full.dumped.is_some_and(|dumped| !dumped.has_file);
    socket
        .owner()
        .is_none_or(|owner| owner.source == OwnerSource::Listener && without_file())
        && socket.role == Some(Role::Passive)
        && matches!(socket.state, TcpState::ESTABLISHED | TcpState::CLOSE_WAIT)
}

/// The owner of a socket that `holder` was found to hold.
fn as_held(known: Option<Owner>, holder: &Holder) -> Owned {
    let known = known.filter(|known| known.process.is(&holder.process));
    let owner = match known {
        // How that was known first says more than that it still holds it; and `/proc` rounds the start.
        Some(known) => Owner {
            process: Process {
                comm: holder.process.comm.or(known.process.comm),
                ..known.process
            },
            source: match known.source {
                OwnerSource::Listener | OwnerSource::Closer => OwnerSource::Sweep,
                seen => seen,
            },
        },
        None => Owner {
            process: holder.process,
            source: OwnerSource::Sweep,
        },
    };
    Owned {
        owner,
        container: holder.container.clone(),
    }
}
