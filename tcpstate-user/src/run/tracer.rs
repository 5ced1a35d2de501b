//! The thread that drains the ring and owns the table and the statistics.
//!
//! Everything else asks it by message and gets immutable answers. Nothing here waits but for the ring, its own
//! tick and messages: at 240,000 events a second the default ring holds 150 ms.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustc_hash::{FxHashMap, FxHashSet};
use rustix::time::{ClockId, clock_gettime};
use tcpstate_common::event::{FLAG_SOCKET_READ, FLAG_TASK};
use tcpstate_common::{Event, SetState};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::list::{Lists, NoList, Reply};
use super::streams::{Batch, MOST_STREAMS, Stream, Streams};
use crate::filter::{Selection, Subscription};
use crate::kernel::netns::{Lead, NetnsError};
use crate::kernel::snapshot::{self, SnapshotError};
use crate::kernel::{Counters, Drained, Path, Session};
use crate::model::view::{Counted, EVENT_LOSSES, Health, KernelCounted, Program, View};
use crate::model::{Comm, Listed, Loss, LossReason, NetnsSelection, ProcessId, TcpState};
use crate::owner::{self, Containers, Swept, comm_of, in_initial_pid_namespace, names};
use crate::stats::Stats;
use crate::table::{Change, Identity, STORE_NS, Snapshot, StateMask, Table, Unreachable};

/// How long an event may lie in the ring that has not filled to where the kernel wakes us.
const TICK: Duration = Duration::from_millis(25);

/// Records taken before messages get their turn: some milliseconds' work.
const BUDGET: usize = 8192;

const SECOND_NS: u64 = 1_000_000_000;

/// How old the count of what no event follows may be at a scrape.
const MINI_AGE_NS: u64 = SECOND_NS;

/// How long a scrape waits for a dump before it gets what there is.
const SCRAPE_WAIT_NS: u64 = 2 * SECOND_NS;

/// Between two sweeps lie at least as many times the time that one took.
const SWEEP_PAUSE: u64 = 50;

/// What no event follows to its end: half-open requests, and timewait sockets where the kernel shows no more than the
/// tracepoint does.
const fn mini_states(sees_timewait: bool) -> StateMask {
    if sees_timewait {
        StateMask::of(&[TcpState::NEW_SYN_RECV])
    } else {
        StateMask::of(&[
            TcpState::TIME_WAIT,
            TcpState::FIN_WAIT2,
            TcpState::NEW_SYN_RECV,
        ])
    }
}

pub struct Options {
    pub netns: NetnsSelection,
    pub reconcile_interval: Duration,
    pub max_comms: usize,
}

/// Handle of the running tracer; clones ask the same one. When all are gone, it ends.
#[derive(Clone)]
pub struct Tracer {
    commands: mpsc::UnboundedSender<Command>,
    ready: Arc<AtomicBool>,
    netns: NetnsSelection,
    stream_places: Arc<Semaphore>,
}

enum Command {
    View(oneshot::Sender<Arc<View>>),
    Subscribe(Box<Stream>),
    List(Box<Selection>, Reply),
    /// With the names that owners have now, of a full dump.
    Dumped(
        Dump,
        Result<Snapshot, SnapshotError>,
        FxHashMap<ProcessId, Comm>,
    ),
    Swept(io::Result<Sweep>),
    Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dump {
    /// Every state.
    Full,
    /// [`mini_states`].
    Mini,
}

/// Who holds which sockets, and how long it took to find out.
struct Sweep {
    found: Swept,
    took_ns: u64,
}

/// The tracer has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the tracer has stopped")]
pub struct Stopped;

#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum NoStream {
    #[error(transparent)]
    Stopped(#[from] Stopped),
    #[error(
        "{MOST_STREAMS} streams are read already, which is all there may be; try again when one has ended"
    )]
    TooMany,
}

impl Tracer {
    /// Starts the thread; `session` is attached already. The first snapshot begins at once.
    ///
    /// # Errors
    /// No thread, or the ring can't be polled.
    pub fn start(
        session: Session,
        options: Options,
    ) -> io::Result<(Self, JoinHandle<io::Result<()>>)> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let tracer = Self {
            commands: commands.clone(),
            ready: Arc::default(),
            netns: options.netns,
            stream_places: Arc::new(Semaphore::new(MOST_STREAMS)),
        };
        let state = State::new(&session, options, commands.downgrade(), &tracer.ready);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let thread = thread::Builder::new()
            .name("tracer".to_owned())
            .spawn(move || runtime.block_on(state.run(session, inbox)))?;
        Ok((tracer, thread))
    }

    /// What it covers.
    #[must_use]
    pub const fn netns(&self) -> NetnsSelection {
        self.netns
    }

    /// The first snapshot is merged.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// What has been counted up to now.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn view(&self) -> Result<Arc<View>, Stopped> {
        let (reply, view) = oneshot::channel();
        self.commands
            .send(Command::View(reply))
            .map_err(|_| Stopped)?;
        view.await.map_err(|_| Stopped)
    }

    /// A stream of what happens from now on. Who does not keep up loses lines, and is told how many.
    ///
    /// # Errors
    /// [`NoStream`].
    pub fn subscribe(&self, subscription: Subscription) -> Result<mpsc::Receiver<Batch>, NoStream> {
        let place = Arc::clone(&self.stream_places).try_acquire_owned();
        let place = place.map_err(|_| NoStream::TooMany)?;
        let (stream, batches) = Stream::new(subscription, now_ns(), place);
        self.commands
            .send(Command::Subscribe(Box::new(stream)))
            .map_err(|_| Stopped)?;
        Ok(batches)
    }

    /// The sockets that exist now, as the kernel lists them, sorted.
    ///
    /// # Errors
    /// [`NoList`].
    pub async fn list(&self, selection: Selection) -> Result<Vec<Listed>, NoList> {
        let (reply, rows) = oneshot::channel();
        self.commands
            .send(Command::List(Box::new(selection), reply))
            .map_err(|_| Stopped)?;
        let mut rows = rows.await.map_err(|_| Stopped)??;
        // Not on the tracer's thread, and long enough to hold up a runtime's.
        let sorted = tokio::task::spawn_blocking(move || {
            Listed::sort(&mut rows);
            rows
        });
        Ok(sorted.await.map_err(|_| Stopped)?)
    }

    /// Waits for its end.
    pub async fn stopped(&self) {
        self.commands.closed().await;
    }

    /// Ends it after what is in the ring now; streams end behind their last line.
    pub fn stop(&self) {
        // It may have ended by itself.
        let _ = self.commands.send(Command::Stop);
    }
}

struct State {
    netns: NetnsSelection,
    table: Table,
    stats: Stats,
    streams: Streams,
    containers: Containers,
    health: Health,
    ready: Arc<AtomicBool>,
    commands: mpsc::WeakUnboundedSender<Command>,
    /// Scrapes that wait for a dump, and since when.
    waiting: Vec<(u64, oneshot::Sender<Arc<View>>)>,
    lists: Lists,
    dump: Option<Dump>,
    dumped_ns: u64,
    next_full_ns: u64,
    mini_states: StateMask,
    sweeping: bool,
    /// When the next sweep is due; none while nothing asks for one.
    next_sweep_ns: Option<u64>,
    /// No sweep before: so that they take a small part of a processor.
    sweep_pause_ns: u64,
    /// Of the last sweep.
    swept_leads: FxHashSet<Lead>,
    reconcile_interval_ns: u64,
    /// Pids are here what they are in records.
    pids_are_ours: bool,
    unreachable: usize,
    unlisted: Unlisted,
    /// Why the last dump that failed did; empty after one that did not.
    dump_failure: String,
    /// The same of sweeps.
    sweep_failure: String,
    /// As the newest record had it, or the map.
    lost: u32,
    recursion_misses: u64,
    newest_ns: u64,
    checked_ns: u64,
    boot_to_unix_ns: i64,
    /// The last drain stopped at its budget.
    more: bool,
}

impl State {
    fn new(
        session: &Session,
        options: Options,
        commands: mpsc::WeakUnboundedSender<Command>,
        ready: &Arc<AtomicBool>,
    ) -> Self {
        let identity = match session.path() {
            Path::TpBtf => Identity::Cookie,
            Path::TpBtfNoCookie => Identity::Address,
            Path::Tracepoint => Identity::AddressWithoutNetns,
        };
        let features = session
            .features()
            .map(|(feature, in_use)| (feature, in_use.is_ok()))
            .collect();
        let mut table = Table::new(identity);
        if session.accept().is_ok() {
            table.sees_accepts();
        }
        let mut stats = Stats::new(options.max_comms);
        if session.time_wait().is_ok() {
            stats.times_timewait();
        }
        Self {
            netns: options.netns,
            table,
            stats,
            streams: Streams::default(),
            containers: Containers::default(),
            health: Health {
                features,
                ..Health::default()
            },
            ready: Arc::clone(ready),
            commands,
            waiting: Vec::new(),
            lists: Lists::default(),
            dump: None,
            dumped_ns: 0,
            next_full_ns: 0,
            mini_states: mini_states(session.time_wait().is_ok()),
            sweeping: false,
            next_sweep_ns: None,
            sweep_pause_ns: 0,
            swept_leads: FxHashSet::default(),
            reconcile_interval_ns: u64::try_from(options.reconcile_interval.as_nanos())
                .unwrap_or(u64::MAX),
            pids_are_ours: in_initial_pid_namespace(),
            unreachable: 0,
            unlisted: Unlisted::default(),
            dump_failure: String::new(),
            sweep_failure: String::new(),
            lost: 0,
            recursion_misses: 0,
            newest_ns: 0,
            checked_ns: 0,
            boot_to_unix_ns: boot_to_unix_ns(),
            more: false,
        }
    }

    async fn run(
        mut self,
        session: Session,
        mut inbox: mpsc::UnboundedReceiver<Command>,
    ) -> io::Result<()> {
        // SAFETY: the descriptor is the ring map's, which the session owns and neither closes nor replaces while it
        // lives; the AsyncFd owns the session.
        let mut ring = unsafe { AsyncFd::register_with_interest(session, Interest::READABLE) }?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                command = inbox.recv() => match command {
                    None | Some(Command::Stop) => break,
                    Some(command) => self.command(command, ring.get_mut()),
                },
                // Before what may always be ready: in lasting overload dumps are needed most.
                _ = tick.tick() => {
                    self.drain(ring.get_mut());
                    self.tick(ring.get_mut());
                }
                () = std::future::ready(()), if self.more => self.drain(ring.get_mut()),
                readable = ring.readable_mut() => {
                    let mut guard = readable?;
                    self.drain(guard.get_inner_mut());
                    // Edge-triggered: cleared with records left, it would not come again.
                    if !self.more {
                        guard.clear_ready();
                    }
                }
            }
        }
        self.drain_to(ring.get_mut(), now_ns());
        self.check_losses(ring.get_ref());
        self.streams.finish().await;
        Ok(())
    }

    fn command(&mut self, command: Command, session: &mut Session) {
        match command {
            Command::Subscribe(stream) => self.streams.add(*stream),
            Command::View(reply) => self.scrape(reply, session),
            Command::List(selection, reply) => self.list(*selection, reply),
            Command::Dumped(dump, result, names) => self.dumped(dump, result, &names, session),
            Command::Swept(result) => self.swept(result, session),
            Command::Stop => {}
        }
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Takes up to [`BUDGET`] records.
    fn drain(&mut self, session: &mut Session) {
        let drained = session.drain(|record| self.record(record), BUDGET);
        self.more = drained == Drained::Budget;
        self.streams.flush();
    }

    /// Takes what was in the ring at `until_ns`.
    fn drain_to(&mut self, session: &mut Session, until_ns: u64) {
        loop {
            self.drain(session);
            if !self.more || self.newest_ns > until_ns.saturating_add(STORE_NS) {
                break;
            }
        }
    }

    fn record<E>(&mut self, record: Result<Event, E>) {
        let Ok(event) = record else {
            self.lose(LossReason::Decode, 1, now_ns());
            return;
        };
        let lost = event.lost().wrapping_sub(self.lost).cast_signed();
        if lost > 0 {
            self.lost = event.lost();
            let count = lost.unsigned_abs().into();
            self.lose(LossReason::RingFull, count, event.time_ns());
        }
        self.health.events_received += 1;
        self.newest_ns = self.newest_ns.max(event.time_ns());
        match event {
            Event::SetState(event) => self.set_state(event),
            Event::Accept(event) => {
                let container =
                    self.containers
                        .container(event.tgid, event.start_ns, event.cgroup_id);
                let tell = tell(&mut self.stats, &mut self.streams, self.boot_to_unix_ns);
                self.table.accepted(&event, container.as_ref(), tell);
            }
            Event::TimeWait(event) => {
                let tell = tell(&mut self.stats, &mut self.streams, self.boot_to_unix_ns);
                self.table.time_wait(&event, tell);
            }
        }
    }

    fn set_state(&mut self, mut event: SetState) {
        if self.pids_are_ours
            && event.has(FLAG_TASK)
            && !event.has(FLAG_SOCKET_READ)
            && event.comm[0] == 0
        {
            event.comm = comm_of(event.tgid);
        }
        let container = if event.has(FLAG_TASK) {
            self.containers
                .container(event.tgid, event.start_ns, event.cgroup_id)
        } else {
            None
        };
        let tell = tell(&mut self.stats, &mut self.streams, self.boot_to_unix_ns);
        let applied = self.table.apply(&event, container.as_ref(), tell);
        if applied.is_err() {
            self.lose(LossReason::Decode, 1, event.time_ns);
        }
    }

    fn lose(&mut self, reason: LossReason, count: u64, time_ns: u64) {
        self.table.events_lost(time_ns);
        if let Some(index) = EVENT_LOSSES.iter().position(|&known| known == reason) {
            self.health.events_lost[index] += count;
        }
        self.streams.lost(Loss {
            time_ns: time_ns.saturating_add_signed(self.boot_to_unix_ns),
            count,
            reason,
        });
        // What the table missed, a dump repairs.
        self.next_full_ns = self.next_full_ns.min(time_ns + SECOND_NS);
    }

    /// Losses that no later record has told of.
    fn check_losses(&mut self, session: &Session) {
        let now_ns = now_ns();
        match session.lost() {
            Ok(total) => {
                let lost = (total as u32).wrapping_sub(self.lost).cast_signed();
                if lost > 0 {
                    self.lost = total as u32;
                    self.lose(LossReason::RingFull, lost.unsigned_abs().into(), now_ns);
                }
            }
            Err(error) => tracing::error!("can't read the kernel's count of losses: {error}"),
        }
        match session.recursion_misses() {
            Ok(Some(total)) if total > self.recursion_misses => {
                let count = total - self.recursion_misses;
                self.recursion_misses = total;
                self.lose(LossReason::Recursion, count, now_ns);
            }
            Ok(_) => {}
            Err(error) => tracing::error!("can't read the program's missed runs: {error}"),
        }
    }

    fn tick(&mut self, session: &mut Session) {
        let now_ns = now_ns();
        self.check_losses(session);
        if now_ns >= self.checked_ns + SECOND_NS {
            self.checked_ns = now_ns;
            self.boot_to_unix_ns = boot_to_unix_ns();
            let tell = tell(&mut self.stats, &mut self.streams, self.boot_to_unix_ns);
            self.table
                .flush_children(now_ns.saturating_sub(SECOND_NS), tell);
            self.streams.flush();
        }
        if self.dump.is_none() && now_ns >= self.next_full_ns {
            self.begin_dump(Dump::Full, now_ns);
        }
        if self.is_ready() && self.table.wants_sweep() {
            // Connections come in crowds, and one that ends at once needs no sweep: its closer is seen.
            self.want_sweep(now_ns + SECOND_NS);
        }
        if !self.sweeping && self.next_sweep_ns.is_some_and(|at_ns| now_ns >= at_ns) {
            self.begin_sweep(session);
        }
        if self
            .waiting
            .first()
            .is_some_and(|(since, _)| now_ns >= since + SCRAPE_WAIT_NS)
        {
            self.answer(session);
        }
    }

    fn scrape(&mut self, reply: oneshot::Sender<Arc<View>>, session: &mut Session) {
        let now_ns = now_ns();
        self.drain_to(session, now_ns);
        self.waiting.push((now_ns, reply));
        if !self.is_ready() || now_ns < self.dumped_ns + MINI_AGE_NS {
            self.answer(session);
        } else if self.dump.is_none() {
            self.begin_dump(Dump::Mini, now_ns);
        }
    }

    fn list(&mut self, selection: Selection, reply: Reply) {
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
            &self.table.owners_by_netns() | &self.swept_leads
        } else {
            FxHashSet::default()
        }
    }

    /// A namespace that no dump knew of is looked for at once, but only once by the same leads.
    fn lead(&mut self, leads: FxHashSet<Lead>, now_ns: u64) {
        let all = self.netns == NetnsSelection::All && self.pids_are_ours;
        let mut new = leads.difference(&self.swept_leads);
        if all && new.any(|&(netns, _)| !self.table.lists(netns)) {
            self.next_full_ns = now_ns;
        }
        self.swept_leads = leads;
    }

    const fn states(&self, dump: Dump) -> StateMask {
        match dump {
            Dump::Full => StateMask::ALL,
            Dump::Mini => self.mini_states,
        }
    }

    /// Has the kernel's sockets listed on a thread of their own: namespaces are a thread's, and it takes long.
    fn begin_dump(&mut self, dump: Dump, now_ns: u64) {
        let Some(commands) = self.commands.upgrade() else {
            return;
        };
        if dump == Dump::Full {
            self.next_full_ns = now_ns.saturating_add(self.reconcile_interval_ns);
        }
        let (netns, first) = (self.netns, !self.is_ready());
        let leads = self.leads();
        let owners = if dump == Dump::Full && self.pids_are_ours {
            self.table.owners()
        } else {
            FxHashSet::default()
        };
        let states = self.states(dump);
        let begun = thread::Builder::new()
            .name("dump".to_owned())
            .spawn(move || {
                if first {
                    // Of what came before the attachment nothing may be unstored.
                    thread::sleep(Duration::from_nanos(STORE_NS));
                }
                let result = snapshot::take(netns, states, leads);
                // The tracer may have ended meanwhile.
                let _ = commands.send(Command::Dumped(dump, result, names(&owners)));
            });
        match begun {
            Ok(_) => {
                self.table.snapshot_begins();
                self.dump = Some(dump);
                if dump == Dump::Full {
                    self.lists.dump_begins(now_ns);
                }
            }
            Err(error) => self.dump_failed(&format!("can't start a thread: {error}"), now_ns),
        }
    }

    fn dumped(
        &mut self,
        dump: Dump,
        result: Result<Snapshot, SnapshotError>,
        names: &FxHashMap<ProcessId, Comm>,
        session: &mut Session,
    ) {
        self.dump = None;
        let snapshot = match result {
            Ok(snapshot) => snapshot,
            // It was there before: it is gone, and its sockets with it.
            Err(SnapshotError::Netns(NetnsError::NotFound { inode, .. })) if self.is_ready() => {
                Snapshot {
                    netns: vec![inode],
                    started_ns: now_ns(),
                    finished_ns: now_ns(),
                    states: self.states(dump),
                    ..Snapshot::default()
                }
            }
            Err(error) => {
                self.dump_failed(&error.to_string(), now_ns());
                self.answer(session);
                return;
            }
        };
        self.drain_to(session, snapshot.finished_ns);
        self.check_losses(session);
        let mut tell = tell(&mut self.stats, &mut self.streams, self.boot_to_unix_ns);
        let doubtful = self.table.reconcile(&snapshot, &mut tell);
        self.table.rename_owners(names, snapshot.finished_ns, tell);
        if doubtful {
            // What two dumps lack is gone: the second should not be long.
            self.next_full_ns = self.next_full_ns.min(snapshot.finished_ns + SECOND_NS);
        }
        self.streams.flush();
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
            self.tell_unlisted();
            self.want_sweep(0);
            if self.lists.dumped() {
                self.next_sweep_ns = Some(0);
            }
        }
        self.answer(session);
    }

    /// Says which namespaces have come to be known from events alone.
    fn tell_unlisted(&mut self) {
        let news = self.unlisted.news(self.table.unlisted());
        if !news.is_empty() {
            tracing::warn!(
                "{} network namespaces can't be found, and what is in them is known from events only: {}",
                news.len(),
                shortened(&news)
            );
        }
    }

    fn want_sweep(&mut self, at_ns: u64) {
        let at_ns = at_ns.max(self.sweep_pause_ns);
        self.next_sweep_ns = Some(
            self.next_sweep_ns
                .map_or(at_ns, |next_ns| next_ns.min(at_ns)),
        );
    }

    /// Has the holders of all sockets listed on a thread of their own.
    fn begin_sweep(&mut self, session: &mut Session) {
        let Some(commands) = self.commands.upgrade() else {
            return;
        };
        self.next_sweep_ns = None;
        self.lists.sweep_begins();
        let iterator = session.sweep().is_ok().then(|| session.begin_sweep());
        // There a dump's sockets are joined with the table's by number only: which is which is not known.
        let joins = session.path() != Path::Tracepoint;
        let (netns, leads) = (self.netns, self.leads());
        let sweep = move || {
            let started_ns = now_ns();
            let found = match iterator {
                Some(file) => owner::by_iterator(file?)?,
                None if !joins => Swept::default(),
                None => {
                    let dump =
                        snapshot::take(netns, StateMask::ALL, leads).map_err(io::Error::other)?;
                    owner::by_proc(&dump.records)?
                }
            };
            Ok(Sweep {
                found,
                took_ns: now_ns() - started_ns,
            })
        };
        let begun = thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(move || {
                // The tracer may have ended meanwhile.
                let _ = commands.send(Command::Swept(sweep()));
            });
        match begun {
            Ok(_) => self.sweeping = true,
            Err(error) => self.swept(Err(error), session),
        }
    }

    fn swept(&mut self, result: io::Result<Sweep>, session: &mut Session) {
        self.sweeping = false;
        let now_ns = now_ns();
        // What was accepted by then is in the ring, and what a list must not lack.
        self.drain_to(session, now_ns);
        let took_ns = match result {
            Ok(sweep) => {
                let tell = tell(&mut self.stats, &mut self.streams, self.boot_to_unix_ns);
                self.table.swept(&sweep.found.holders, now_ns, tell);
                self.streams.flush();
                self.lead(sweep.found.leads, now_ns);
                self.sweep_failure.clear();
                sweep.took_ns
            }
            Err(error) => {
                let reason = error.to_string();
                // Once for each reason: it may come with every sweep.
                if self.sweep_failure != reason {
                    tracing::warn!("owners of sockets can't be looked up: {reason}");
                    self.sweep_failure = reason;
                }
                SECOND_NS
            }
        };
        self.sweep_pause_ns = now_ns + took_ns.saturating_mul(SWEEP_PAUSE);
        if !self.is_ready() {
            self.ready.store(true, Ordering::Release);
        }
        let (table, offset) = (&self.table, self.boot_to_unix_ns);
        self.lists.swept(|| table.rows(now_ns, offset));
    }

    fn dump_failed(&mut self, reason: &str, now_ns: u64) {
        self.table.snapshot_failed();
        self.lists.dump_failed(reason);
        self.health.reconcile_failures += 1;
        if !self.is_ready() {
            // Without the first one there are no gauges.
            self.next_full_ns = now_ns + SECOND_NS;
        }
        // Once for each reason: it may come with every scrape.
        if self.dump_failure != reason {
            tracing::warn!("no snapshot of the sockets: {reason}");
            reason.clone_into(&mut self.dump_failure);
        }
    }

    /// Gives all that wait the same view.
    fn answer(&mut self, session: &Session) {
        if self.waiting.is_empty() {
            return;
        }
        let view = Arc::new(self.view(session));
        for (_, reply) in self.waiting.drain(..) {
            // Who asked may have given up.
            let _ = reply.send(Arc::clone(&view));
        }
    }

    fn view(&mut self, session: &Session) -> View {
        self.check_losses(session);
        let counted = self.is_ready().then(|| {
            let entries = self.table.len() as u64;
            let corrections = self.table.corrections();
            let now_ns = now_ns();
            self.stats
                .age(now_ns, self.boot_to_unix_ns, self.table.stays());
            let counted: Counted = self.stats.counted(now_ns, entries, corrections);
            Arc::new(counted)
        });
        View {
            health: Health {
                stream_clients: self.streams.len() as u64,
                stream_lines_dropped: self.streams.dropped(),
                ..self.health.clone()
            },
            kernel: kernel_counted(session).unwrap_or_else(|error| {
                tracing::error!("can't read the kernel's counters: {error}");
                KernelCounted::default()
            }),
            counted,
        }
    }
}

/// Network namespaces that sockets are in and no dump finds.
#[derive(Default)]
struct Unlisted {
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

/// Where the table's changes go.
fn tell<'a>(
    stats: &'a mut Stats,
    streams: &'a mut Streams,
    boot_to_unix_ns: i64,
) -> impl FnMut(&Change<'_>) + 'a {
    move |change| {
        stats.apply(change);
        streams.push(change, boot_to_unix_ns);
    }
}

fn kernel_counted(session: &Session) -> io::Result<KernelCounted> {
    let runs = session
        .run_stats()?
        .map(|stats| (Program::SetState, stats.run_count, stats.run_time_ns));
    Ok(KernelCounted {
        transitions: transitions(&session.counters()?),
        runs: runs.into_iter().collect(),
    })
}

/// Those that happened.
fn transitions(counters: &Counters) -> Vec<(Option<TcpState>, Option<TcpState>, u64)> {
    let state = |number: usize| {
        let state = TcpState::from_kernel(number as u8);
        state.name().map(|_| state)
    };
    let rows = counters.transitions.iter().enumerate();
    rows.flat_map(|(from, row)| {
        let cells = row.iter().enumerate().filter(|(_, count)| **count > 0);
        cells.map(move |(to, &count)| (state(from), state(to), count))
    })
    .collect()
}

/// Unix time, nanoseconds.
pub fn unix_now_ns() -> u64 {
    nanoseconds(ClockId::Realtime).unsigned_abs()
}

/// `CLOCK_BOOTTIME`, nanoseconds.
fn now_ns() -> u64 {
    nanoseconds(ClockId::Boottime).unsigned_abs()
}

/// What to add to `CLOCK_BOOTTIME` for Unix time; changes where somebody sets the clock.
///
/// Of a few readings the tightest counts: an interruption between the two clocks would set all the times that are
/// told with it off by its length.
fn boot_to_unix_ns() -> i64 {
    let reading = || {
        let before = nanoseconds(ClockId::Boottime);
        let unix = nanoseconds(ClockId::Realtime);
        let after = nanoseconds(ClockId::Boottime);
        (after - before, unix - (before + (after - before) / 2))
    };
    let (_, offset) = [reading(), reading(), reading(), reading()]
        .into_iter()
        .min()
        .expect("there are four");
    offset
}

fn nanoseconds(clock: ClockId) -> i64 {
    let time = clock_gettime(clock);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
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
