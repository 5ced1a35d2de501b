//! When dumps and sweeps are made, and what comes of them: at the start, regularly, after a loss, and where a scrape or a
//! list wants one.
//!
//! Each is made on a thread of its own: namespaces are a thread's, and it takes long.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::oneshot;

use super::work::Work;
use super::{Command, SECOND_NS, State};
use crate::filter::Selection;
use crate::kernel::netns::{Lead, NetnsError};
use crate::kernel::snapshot::{self, SnapshotError, SocketIterator};
use crate::kernel::{Session, jiffy_ns};
use crate::model::view::View;
use crate::model::{Comm, NetnsSelection, ProcessId, TcpState};
use crate::owner::{self, names};
use crate::run::clock::now_ns;
use crate::run::list::Reply;
use crate::table::{
    Identity, Merge, Merged, Record, STORE_NS, Snapshot, StateMask, Sweep, Unreachable, Walk,
};

/// How old the count of what no event follows may be at a scrape.
const MINI_AGE_NS: u64 = SECOND_NS;

/// Between two sweeps lie at least as many times the time that one took.
const SWEEP_PAUSE: u64 = 50;

/// The same after a full dump that failed.
const DUMP_PAUSE: u64 = 10;

/// What events don't follow to its end: half-open requests, and timewait sockets. Those also where fentry programs do: the
/// kernel begins what it then has no room for (`tcp_max_tw_buckets`, memory), and only a dump shows that.
const MINI_STATES: StateMask = StateMask::of(&[
    TcpState::TIME_WAIT,
    TcpState::FIN_WAIT2,
    TcpState::NEW_SYN_RECV,
]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dump {
    /// Every state.
    Full,
    /// [`MINI_STATES`].
    Mini,
}

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpError {
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(
        "{0} of its sockets have no cookie or address, by which events tell what became of them"
    )]
    Unknowable(usize),
}

/// Who holds which sockets, and how it was found out.
pub(super) struct Swept {
    pub(super) sweep: Sweep,
    pub(super) leads: FxHashSet<Lead>,
    pub(super) took_ns: u64,
    /// Why it was not.
    pub(super) failure: Option<io::Error>,
}

impl State {
    pub(super) fn scrape(&mut self, reply: oneshot::Sender<Arc<View>>, session: &mut Session) {
        let now_ns = now_ns();
        self.drain_to(session, now_ns);
        self.waiting.push((now_ns, reply));
        if !self.is_ready() || now_ns < self.dumped_ns + MINI_AGE_NS {
            self.answer(session);
        } else if self.dump.is_none() {
            self.begin_dump(Dump::Mini, now_ns);
        }
    }

    pub(super) fn list(&mut self, selection: Selection, reply: Reply) {
        // The first dump is made anyway, and none is younger.
        let dumping = self.dump == Some(Dump::Full) && !self.is_ready();
        let due_ns = self.lists.ask(selection, reply, dumping);
        if !dumping {
            self.next_full_ns = self.next_full_ns.min(due_ns);
        }
    }

    /// Where namespaces may be that nothing else leads to.
    fn leads(&self) -> FxHashSet<Lead> {
        if self.netns == NetnsSelection::All && self.pids_are_ours {
            &self.owned_leads | &self.swept_leads
        } else {
            FxHashSet::default()
        }
    }

    /// A namespace that no dump knew of is looked for at once, but only once by the same leads.
    pub(super) fn follow(&mut self, leads: &FxHashSet<Lead>, now_ns: u64) {
        let all = self.netns == NetnsSelection::All && self.pids_are_ours;
        let followed = self.leads();
        let mut new = leads.difference(&followed);
        if all && new.any(|&(netns, _)| !self.table.lists(netns)) {
            self.next_full_ns = now_ns;
        }
    }

    const fn states(dump: Dump) -> StateMask {
        match dump {
            Dump::Full => StateMask::ALL,
            Dump::Mini => MINI_STATES,
        }
    }

    /// Has the kernel's sockets listed on a thread of their own: namespaces are a thread's, and it takes long.
    pub(super) fn begin_dump(&mut self, dump: Dump, now_ns: u64) {
        let Some(commands) = self.commands.upgrade() else {
            return;
        };
        if dump == Dump::Full {
            self.tried_ns = now_ns;
            self.next_full_ns = now_ns.saturating_add(self.reconcile_interval_ns);
        }
        let (netns, first) = (self.netns, !self.is_ready());
        let leads = self.leads();
        let states = Self::states(dump);
        let (identity, iterator) = (self.table.identity(), self.iterator.clone());
        let begun = thread::Builder::new()
            .name("dump".to_owned())
            .spawn(move || {
                if first {
                    // Of what came before the attachment nothing may be unstored.
                    thread::sleep(Duration::from_nanos(STORE_NS));
                }
                let result = take(netns, states, leads, iterator, identity);
                // The tracer may have ended meanwhile.
                let _ = commands.send(Command::Dumped(dump, result));
            });
        match begun {
            Ok(_) => {
                self.table.snapshot_begins();
                self.dump = Some(dump);
                if dump == Dump::Full {
                    self.lists.dump_begins(now_ns);
                }
            }
            Err(error) => self.dump_failed(dump, &format!("can't start a thread: {error}"), now_ns),
        }
    }

    pub(super) fn dumped(
        &mut self,
        dump: Dump,
        result: Result<Box<Merge>, DumpError>,
        session: &mut Session,
    ) {
        let merge = match result {
            Ok(merge) => merge,
            // It was there before: it is gone, and its sockets with it.
            Err(DumpError::Snapshot(SnapshotError::Netns(NetnsError::NotFound {
                inode, ..
            }))) if self.is_ready() => Box::new(Merge::new(Snapshot {
                netns: vec![inode],
                started_ns: now_ns(),
                finished_ns: now_ns(),
                states: Self::states(dump),
                ..Snapshot::default()
            })),
            Err(error) => {
                self.dump = None;
                self.dump_failed(dump, &error.to_string(), now_ns());
                self.answer(session);
                return;
            }
        };
        self.drain_to(session, merge.snapshot().finished_ns);
        self.check_losses(session);
        self.work.push_back(Work::Merge(dump, merge));
    }

    /// All of a dump is in the table.
    pub(super) fn merged(
        &mut self,
        dump: Dump,
        snapshot: &Snapshot,
        merged: Merged,
        session: &Session,
    ) {
        self.dump = None;
        if merged.doubtful {
            // What two dumps lack is gone: the second should not be long.
            self.next_full_ns = self.next_full_ns.min(snapshot.finished_ns + SECOND_NS);
        }
        self.dumped_ns = snapshot.finished_ns;
        self.dump_failure.clear();
        self.health.reconciles += 1;
        self.health.last_reconcile_duration_ns =
            Some(snapshot.finished_ns.saturating_sub(snapshot.started_ns));
        self.health.last_reconcile_success_ns = Some(
            snapshot
                .finished_ns
                .saturating_add_signed(self.boot_to_unix_ns),
        );
        if snapshot.unreachable.len() > self.unreachable {
            for Unreachable { netns, reason } in &snapshot.unreachable {
                match netns {
                    Some(inode) => tracing::warn!(
                        "sockets of network namespace {inode} can't be listed: {reason}"
                    ),
                    None => tracing::warn!(
                        "network namespaces may be missed, for some could not be read: {reason}"
                    ),
                }
            }
        }
        self.unreachable = snapshot.unreachable.len();
        if dump == Dump::Full {
            self.tell_unlisted(merged.unlisted);
            self.follow(&merged.leads, now_ns());
            self.undated |= merged.undated;
            self.owned_leads = merged.leads;
            self.owners = merged.owners;
            self.want_sweep(0);
            if self.lists.dumped() {
                self.next_sweep_ns = Some(0);
            }
        }
        self.answer(session);
    }

    /// Says which namespaces have come to be known from events alone.
    fn tell_unlisted(&mut self, unlisted: FxHashSet<u32>) {
        let news = self.unlisted.news(unlisted);
        if !news.is_empty() {
            tracing::warn!(
                "{} network namespaces can't be found, and what is in them is known from events only: {}",
                news.len(),
                shortened(&news)
            );
        }
    }

    pub(super) fn want_sweep(&mut self, at_ns: u64) {
        let at_ns = at_ns.max(self.sweep_pause_ns);
        self.next_sweep_ns = Some(
            self.next_sweep_ns
                .map_or(at_ns, |next_ns| next_ns.min(at_ns)),
        );
    }

    /// Has the holders of all sockets listed on a thread of their own.
    pub(super) fn begin_sweep(&mut self, session: &mut Session) {
        let Some(commands) = self.commands.upgrade() else {
            return;
        };
        self.next_sweep_ns = None;
        self.lists.sweep_begins();
        let acks = std::mem::take(&mut self.undated);
        let iterator = session.sweep().is_ok().then(|| session.begin_sweep(acks));
        let (netns, leads) = (self.netns, self.leads());
        let (identity, sockets) = (self.table.identity(), self.iterator.clone());
        let owners = if self.pids_are_ours {
            std::mem::take(&mut self.owners)
        } else {
            FxHashSet::default()
        };
        let find = move || match iterator {
            Some(file) => owner::by_iterator(file?, jiffy_ns()),
            // A dump's sockets are joined with the table's by number only: which is which is not known.
            None if identity == Identity::Ends => Ok(owner::Swept::default()),
            None => {
                let dump = snapshot::take(netns, StateMask::ALL, leads, sockets);
                let dump = dump.map_err(io::Error::other)?;
                owner::by_proc(&dump.records, identity)
            }
        };
        let begun = thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(move || {
                let started_ns = now_ns();
                // Its message is on stderr then.
                let found = catch_unwind(AssertUnwindSafe(find));
                let found = found.unwrap_or_else(|_| Err(io::Error::other("the sweep panicked")));
                let took_ns = now_ns() - started_ns;
                let swept = swept(found, names(&owners), (started_ns, took_ns));
                // The tracer may have ended meanwhile.
                let _ = commands.send(Command::Swept(Box::new(swept)));
            });
        self.sweeping = true;
        if let Err(error) = begun {
            let swept = swept(Err(error), FxHashMap::default(), (now_ns(), 0));
            self.swept(Box::new(swept), session);
        }
    }

    pub(super) fn swept(&mut self, swept: Box<Swept>, session: &mut Session) {
        let now_ns = now_ns();
        // What was accepted by then is in the ring, and what a list must not lack.
        self.drain_to(session, now_ns);
        self.work.push_back(Work::Sweep(swept, now_ns));
    }

    /// All of a sweep is in the table.
    pub(super) fn taken(&mut self, swept: Swept, now_ns: u64) {
        self.sweeping = false;
        let took_ns = if let Some(error) = swept.failure {
            let reason = error.to_string();
            // Once for each reason: it may come with every sweep.
            if self.sweep_failure != reason {
                tracing::warn!("owners of sockets can't be looked up: {reason}");
                self.sweep_failure = reason;
            }
            self.undated = true;
            SECOND_NS
        } else {
            self.follow(&swept.leads, now_ns);
            self.swept_leads = swept.leads;
            self.sweep_failure.clear();
            swept.took_ns
        };
        self.sweep_pause_ns = now_ns + took_ns.saturating_mul(SWEEP_PAUSE);
        if !self.is_ready() {
            self.ready.store(true, Ordering::Release);
        }
        for listing in self.lists.swept(self.table.len()) {
            if self.table.is_incomplete() {
                // So it would be at its end.
                listing.finish(true);
                continue;
            }
            let work = Work::List(Box::new(listing), Walk::default());
            self.work.push_back(work);
        }
    }

    fn dump_failed(&mut self, dump: Dump, reason: &str, now_ns: u64) {
        self.table.snapshot_failed();
        self.health.reconcile_failures += 1;
        if dump == Dump::Full {
            self.lists.dump_failed(reason);
            // Without the first one there are no gauges, and after a loss they stay wrong until there is one. One that
            // takes long is tried less often.
            let took_ns = now_ns.saturating_sub(self.tried_ns);
            let pause_ns = SECOND_NS.max(took_ns.saturating_mul(DUMP_PAUSE));
            self.next_full_ns = self.next_full_ns.min(now_ns.saturating_add(pause_ns));
        }
        // Once for each reason: it may come with every scrape.
        if self.dump_failure != reason {
            tracing::warn!("no snapshot of the sockets: {reason}");
            reason.clone_into(&mut self.dump_failure);
        }
    }
}

/// All sockets in these states, ready to be merged.
fn take(
    netns: NetnsSelection,
    states: StateMask,
    leads: FxHashSet<Lead>,
    iterator: Option<SocketIterator>,
    identity: Identity,
) -> Result<Box<Merge>, DumpError> {
    let mut snapshot = snapshot::take(netns, states, leads, iterator)?;
    if states != StateMask::ALL {
        // FIN_WAIT2 is also a full socket's, which events follow.
        snapshot.records.retain(Record::is_mini);
    }
    match snapshot.unknowable(identity) {
        0 => Ok(Box::new(Merge::new(snapshot))),
        count => Err(DumpError::Unknowable(count)),
    }
}

/// The last: when it began, and how long it took.
fn swept(
    found: io::Result<owner::Swept>,
    names: FxHashMap<ProcessId, Comm>,
    (started_ns, took_ns): (u64, u64),
) -> Swept {
    let (holders, leads, failure) = match found {
        Ok(found) => (Some(found.holders), found.leads, None),
        Err(error) => (None, FxHashSet::default(), Some(error)),
    };
    Swept {
        sweep: Sweep::new(holders, names, (started_ns, started_ns + took_ns)),
        leads,
        took_ns,
        failure,
    }
}

/// Network namespaces that sockets are in and no dump finds.
#[derive(Default)]
pub(super) struct Unlisted {
    /// At the last full dump, and whether they have been told. One that came to be during that dump is in none yet.
    before: FxHashMap<u32, bool>,
}

impl Unlisted {
    /// Those that were in `now` the last time too and have not been told, by inode.
    fn news(&mut self, now: FxHashSet<u32>) -> Vec<u32> {
        let before = std::mem::take(&mut self.before);
        let mut news = Vec::new();
        for inode in now {
            let told = before.get(&inode).copied();
            if told == Some(false) {
                news.push(inode);
            }
            self.before.insert(inode, told.is_some());
        }
        news.sort_unstable();
        news
    }
}

/// The first few of them.
fn shortened(inodes: &[u32]) -> String {
    const FEW: usize = 8;
    let shown: Vec<String> = inodes.iter().take(FEW).map(u32::to_string).collect();
    let more = if inodes.len() > FEW { ", …" } else { "" };
    shown.join(", ") + more
}

#[cfg(test)]
mod tests {
    use super::Unlisted;

    #[test]
    fn a_namespace_that_two_dumps_do_not_find_is_told_once() {
        let mut unlisted = Unlisted::default();
        let steps: [(&[u32], &[u32]); 7] = [
            (&[7, 8], &[]),
            (&[9, 7, 8], &[7, 8]),
            (&[9, 7], &[9]),
            (&[9, 7], &[]),
            // It was found, and then its inode is another's.
            (&[], &[]),
            (&[7], &[]),
            (&[7], &[7]),
        ];
        for (now, news) in steps {
            assert_eq!(unlisted.news(now.iter().copied().collect()), news);
        }
    }
}
