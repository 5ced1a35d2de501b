//! How a dump comes into the table: a part at a time, so that events get their turn between.
//!
//! The records first; then what the dump should have shown and did not. What a record means is `reconcile`'s.

use rustc_hash::FxHashSet;
use tcpstate_common::TcpState;

use super::alike::Alikes;
use super::reconcile::{gone_change, mini_end};
use super::{Change, Correction, Full, Mini, Place, STORE_NS, Snapshot, Socket, StateMask, Table};
use crate::model::{End, ProcessId};

/// A dump on its way into the table, by [`Table::merge`].
#[derive(Debug)]
pub struct Merge {
    snapshot: Snapshot,
    covered: FxHashSet<u32>,
    unreachable: FxHashSet<u32>,
    alikes: Alikes,
    next: Next,
    /// Of this dump; what it showed has it too.
    number: u32,
    merged: Merged,
}

/// Where the merge goes on.
#[derive(Clone, Copy, Debug)]
enum Next {
    Begin,
    Record(usize),
    Full(usize),
    Mini(usize),
    End,
}

/// What a merge found. All but the first are of a dump of all states only.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// The dump lacked a full socket for the first time: the next one decides.
    pub doubtful: bool,
    /// It was the first to show some full sockets in their state: a sweep may tell how long they have been in it.
    pub undated: bool,
    /// Who owns a socket.
    pub owners: FxHashSet<ProcessId>,
    /// Network namespaces with the pids of who owns a full socket there.
    pub leads: FxHashSet<(u32, u32)>,
    /// Network namespaces that full sockets are in and that no dump has covered.
    pub unlisted: FxHashSet<u32>,
}

impl Merge {
    #[must_use]
    pub fn new(snapshot: Snapshot) -> Self {
        let unreachable = snapshot.unreachable.iter();
        Self {
            covered: snapshot.netns.iter().copied().collect(),
            unreachable: unreachable.filter_map(|it| it.netns).collect(),
            alikes: Alikes::default(),
            next: Next::Begin,
            number: 0,
            merged: Merged::default(),
            snapshot,
        }
    }

    #[must_use]
    pub const fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    const fn is_of_all(&self) -> bool {
        self.snapshot.states.bits() == StateMask::ALL.bits()
    }

    /// Whether the dump would show the socket if it were there. `known`: whether a namespace that is not found is gone.
    fn covers(&self, socket: &Socket, known: impl Fn(u32) -> bool) -> bool {
        self.snapshot.states.contains(socket.state)
            && socket.netns().is_none_or(|netns| {
                self.covered.contains(&netns)
                    || (self.snapshot.whole_host
                        && !self.unreachable.contains(&netns)
                        && known(netns))
            })
    }

    /// What events told last, at `event_ns`, was so before the dump began.
    const fn was_there(&self, event_ns: u64) -> bool {
        event_ns.saturating_add(STORE_NS) < self.snapshot.started_ns
    }
}

impl Table {
    /// Does a part of a merge: takes in `most` records, or looks at as many sockets. All events up to the dump's end must
    /// have been applied before the first part; others may come between the parts, and no other merge.
    ///
    /// Gives what the merge found when it is done.
    pub fn merge(
        &mut self,
        merge: &mut Merge,
        most: usize,
        mut sink: impl FnMut(&Change<'_>),
    ) -> Option<Merged> {
        merge.next = match merge.next {
            Next::Begin => {
                self.dumps += 1;
                merge.number = self.dumps;
                Next::Record(0)
            }
            Next::Record(from) => {
                let records = &merge.snapshot.records;
                let to = from.saturating_add(most).min(records.len());
                for record in &records[from..to] {
                    self.record(record, merge.number, &mut merge.alikes, &mut sink);
                }
                match to < records.len() {
                    true => Next::Record(to),
                    // What events follow is not for a dump of some states to end.
                    false if merge.is_of_all() => Next::Full(0),
                    false => Next::Mini(0),
                }
            }
            Next::Full(from) => {
                let next = self.drop_full(merge, from, most, &mut sink);
                next.map_or(Next::Mini(0), Next::Full)
            }
            Next::Mini(from) => {
                let next = self.drop_mini(merge, from, most, &mut sink);
                next.map_or(Next::End, Next::Mini)
            }
            Next::End => {
                self.merge_ends(merge);
                return Some(std::mem::take(&mut merge.merged));
            }
        };
        None
    }

    fn merge_ends(&mut self, merge: &mut Merge) {
        // Of one that was refused shortly before, the dump may have read what it was until then. One of a namespace that
        // could not be read may be there still.
        if let Some(lacking) = &self.refused
            && merge.is_of_all()
            && merge.was_there(lacking.newest_ns)
            && merge
                .snapshot
                .unreachable
                .iter()
                .all(|it| it.netns.is_none_or(|netns| !lacking.netns.contains(&netns)))
        {
            self.refused = None;
        }
        let left = &mut merge.merged.unlisted;
        if merge.snapshot.whole_host && merge.snapshot.states == StateMask::ALL {
            // The inode of a namespace that is gone may be another's, which no dump lists, once nothing is left in it.
            self.listed.retain(|netns| left.contains(netns));
        }
        self.listed.extend(&merge.covered);
        left.retain(|netns| !self.listed.contains(netns));
        self.corrections.begun = true;
        self.closed = None;
    }

    /// Full sockets that the dump should have shown.
    fn drop_full(
        &mut self,
        merge: &mut Merge,
        from: usize,
        most: usize,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Option<usize> {
        // A namespace that no dump has listed may live where none can find it, and its events come.
        let known = |netns| self.listed.contains(&netns);
        let mut gone = Vec::new();
        let mut last = None;
        let (part, next) = self.full.part_mut(from, most);
        for (key, full) in part {
            let lacks = full.seen != merge.number
                && merge.was_there(full.event_ns)
                && merge.covers(&full.socket, known);
            if lacks {
                if std::mem::replace(&mut full.missed, true) {
                    gone.push(key);
                    continue;
                }
                merge.merged.doubtful = true;
            }
            merge.merged.undated |= full.stay.first_shown(merge.snapshot.started_ns);
            // Sockets of one process are often neighbours.
            let process = full.socket.owner().map(|owner| owner.process);
            let now = (full.socket.netns(), process.map(|it| (it.pid, it.start_ns)));
            if last.replace(now) != Some(now) {
                let merged = &mut merge.merged;
                merged.unlisted.extend(full.socket.netns());
                merged.owners.extend(process.and_then(|it| it.id()));
                let lead = full.socket.netns().zip(process.map(|it| it.pid));
                merged.leads.extend(lead);
            }
        }
        for key in gone {
            let Some(Full { socket, .. }) = self.full.remove(key) else {
                continue;
            };
            // With its namespace a socket goes without an event.
            let counts = |netns| merge.covered.contains(&netns);
            let counted = socket.netns().is_none_or(counts);
            self.full_is_gone(socket, counted, merge.snapshot.finished_ns, sink);
        }
        next
    }

    /// A full socket whose end no event told, and which has left the table. `counted`: one should have.
    pub(super) fn full_is_gone(
        &mut self,
        mut socket: Socket,
        counted: bool,
        time_ns: u64,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        if counted {
            self.corrections.count(Correction::Gone);
        }
        self.generations.closed(socket.id);
        let before = Place::of(&socket);
        socket.state = TcpState::CLOSE;
        sink(&gone_change(time_ns, &socket, before, End::Unknown));
    }

    /// Minisockets that the dump should have shown: gone at once if their time was over, else if the next
    /// dump lacks them too.
    fn drop_mini(
        &mut self,
        merge: &mut Merge,
        from: usize,
        most: usize,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Option<usize> {
        let of_all = merge.is_of_all();
        let mut gone = Vec::new();
        let mut last = None;
        let (part, next) = self.mini.part_mut(from, most);
        for (key, mini) in part {
            // In a namespace that is not found nothing tells of a minisocket any more.
            let lacks = mini.seen != merge.number
                && merge.was_there(mini.event_ns)
                && merge.covers(&mini.socket, |_| true);
            if lacks {
                let at = mini.expires_ns;
                let expired = at.is_some_and(|at| at <= merge.snapshot.started_ns);
                if expired || std::mem::replace(&mut mini.missed, true) {
                    gone.push(key);
                    continue;
                }
            }
            let owner = mini.socket.owner().and_then(|owner| owner.process.id());
            if of_all && std::mem::replace(&mut last, owner) != owner {
                merge.merged.owners.extend(owner);
            }
        }
        for key in gone {
            let Some(Mini {
                mut socket,
                expires_ns,
                ..
            }) = self.mini.remove(key)
            else {
                continue;
            };
            let before = Place::of(&socket);
            socket.state = TcpState::CLOSE;
            let found_ns = merge.snapshot.finished_ns;
            let time_ns = expires_ns.map_or(found_ns, |at| at.min(found_ns));
            let end = mini_end(before.state);
            sink(&gone_change(time_ns, &socket, before, end));
        }
        next
    }
}
