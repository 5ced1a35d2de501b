//! The thread that drains the ring and owns the table and the statistics.
//!
//! Everything else asks it by message and gets immutable answers. Nothing here waits but for the ring, its own
//! tick and messages: at 240,000 events a second the default ring holds 150 ms.

mod dumps;
mod work;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustc_hash::FxHashSet;
use tcpstate_common::event::{FLAG_SOCKET_READ, FLAG_TASK};
use tcpstate_common::{Event, SetState};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use self::dumps::{Dump, DumpError, Swept, Unlisted};
use self::work::Work;
use super::clock::{boot_to_unix_ns, now_ns};
use super::list::{self, Lists, NoList, Reply};
use super::streams::{Batch, MOST_STREAMS, Stream, Streams};
use crate::filter::{Selection, Subscription};
use crate::kernel::netns::Lead;
use crate::kernel::snapshot::SocketIterator;
use crate::kernel::{Counters, Drained, Path, Session};
use crate::model::view::{Counted, EVENT_LOSSES, Health, KernelCounted, View};
use crate::model::{Listed, Loss, LossReason, NetnsSelection, ProcessId, TcpState};
use crate::owner::{Containers, comm_of, in_initial_pid_namespace};
use crate::stats::{AgeScan, Stats};
use crate::table::{Change, Identity, MOST_SOCKETS, Merge, Refused, STORE_NS, Table, Walk};

/// How long an event may lie in the ring that has not filled to where the kernel wakes us.
const TICK: Duration = Duration::from_millis(25);

/// Records taken before messages get their turn: some milliseconds' work.
const BUDGET: usize = 8192;

const SECOND_NS: u64 = 1_000_000_000;

/// How long a scrape waits for a dump before it gets what there is.
const SCRAPE_WAIT_NS: u64 = 2 * SECOND_NS;

/// Between two dumps that are to complete a table that lacked room.
const REFILL_NS: u64 = 10 * SECOND_NS;

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
    Subscribe(Box<Stream>, oneshot::Sender<()>),
    List(Box<Selection>, Reply),
    Dumped(Dump, Result<Box<Merge>, DumpError>),
    Swept(Box<Swept>),
    Stop,
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
    pub async fn subscribe(
        &self,
        subscription: Subscription,
    ) -> Result<mpsc::Receiver<Batch>, NoStream> {
        let place = Arc::clone(&self.stream_places).try_acquire_owned();
        let place = place.map_err(|_| NoStream::TooMany)?;
        let (stream, batches) = Stream::new(subscription, now_ns(), place);
        let (reply, added) = oneshot::channel();
        self.commands
            .send(Command::Subscribe(Box::new(stream), reply))
            .map_err(|_| Stopped)?;
        // The tracer may be draining, and take what happens next before it looks for commands.
        added.await.map_err(|_| Stopped)?;
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
        let rows = rows.await.map_err(|_| Stopped)??;
        // Not on the tracer's thread, and long enough to hold up a runtime's.
        let settled = tokio::task::spawn_blocking(move || list::settled(rows));
        Ok(settled.await.map_err(|_| Stopped)?)
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
    /// To dump sockets by; none where inet_diag has to do.
    iterator: Option<SocketIterator>,
    work: VecDeque<Work>,
    /// What is being made or merged.
    dump: Option<Dump>,
    dumped_ns: u64,
    /// When the last full one began.
    tried_ns: u64,
    next_full_ns: u64,
    /// One is being made or taken in.
    sweeping: bool,
    /// The next sweep may tell of sockets how long they have been in their state.
    undated: bool,
    /// When the next sweep is due; none while nothing asks for one.
    next_sweep_ns: Option<u64>,
    /// No sweep before: so that they take a small part of a processor.
    sweep_pause_ns: u64,
    /// Of the last sweep.
    swept_leads: FxHashSet<Lead>,
    /// Of the owners that the table knew at the last full dump.
    owned_leads: FxHashSet<Lead>,
    /// Owners whose names are due to be read again.
    owners: FxHashSet<ProcessId>,
    reconcile_interval_ns: u64,
    /// Pids are here what they are in records.
    pids_are_ours: bool,
    unreachable: usize,
    /// The table lacked sockets when that was last looked at.
    incomplete: bool,
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
        let features = session
            .features()
            .map(|(feature, in_use)| (feature, in_use.is_ok()))
            .collect();
        let mut table = Table::new(identity(session));
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
            iterator: session.sockets().ok().cloned(),
            work: VecDeque::new(),
            dump: None,
            dumped_ns: 0,
            tried_ns: 0,
            next_full_ns: 0,
            sweeping: false,
            undated: false,
            next_sweep_ns: None,
            sweep_pause_ns: 0,
            swept_leads: FxHashSet::default(),
            owned_leads: FxHashSet::default(),
            owners: FxHashSet::default(),
            reconcile_interval_ns: u64::try_from(options.reconcile_interval.as_nanos())
                .unwrap_or(u64::MAX),
            pids_are_ours: in_initial_pid_namespace(),
            unreachable: 0,
            incomplete: false,
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
                () = std::future::ready(()), if self.more || !self.work.is_empty() => {
                    self.drain(ring.get_mut());
                    self.work(ring.get_ref());
                }
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
            Command::Subscribe(stream, reply) => {
                self.streams.add(*stream);
                // Who asked may have given up: then the stream is closed, and forgotten.
                let _ = reply.send(());
            }
            Command::View(reply) => self.scrape(reply, session),
            Command::List(selection, reply) => self.list(*selection, reply),
            Command::Dumped(dump, result) => self.dumped(dump, result, session),
            Command::Swept(swept) => self.swept(swept, session),
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
        match self.table.apply(&event, container.as_ref(), tell) {
            Ok(()) => {}
            Err(Refused::NoCookie) => self.lose(LossReason::Decode, 1, event.time_ns),
            // Of the sockets that it has, nothing is lost.
            Err(Refused::Full) => self.count_loss(LossReason::TableFull, 1, event.time_ns),
        }
    }

    fn lose(&mut self, reason: LossReason, count: u64, time_ns: u64) {
        self.table.events_lost(time_ns);
        self.count_loss(reason, count, time_ns);
        // What the table missed, a dump repairs.
        self.next_full_ns = self.next_full_ns.min(time_ns.saturating_add(SECOND_NS));
    }

    fn count_loss(&mut self, reason: LossReason, count: u64, time_ns: u64) {
        if let Some(index) = EVENT_LOSSES.iter().position(|&known| known == reason) {
            self.health.events_lost[index] += count;
        }
        self.streams.lost(Loss {
            time_ns: time_ns.saturating_add_signed(self.boot_to_unix_ns),
            count,
            reason,
        });
    }

    /// Says once that the table lacks sockets, and has it completed when it has room.
    fn check_room(&mut self) {
        let incomplete = self.table.is_incomplete();
        if incomplete && !self.incomplete {
            tracing::warn!(
                "there are more sockets than the table holds, {MOST_SOCKETS}: there are no gauges of them until it has room \
                 for all"
            );
        }
        self.incomplete = incomplete;
        if self.table.wants_dump() && self.dump != Some(Dump::Full) {
            let due_ns = self.tried_ns.saturating_add(REFILL_NS);
            self.next_full_ns = self.next_full_ns.min(due_ns);
        }
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
            self.check_room();
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
        if let Some(&(since_ns, _)) = self.waiting.first() {
            if now_ns >= since_ns + 2 * SCRAPE_WAIT_NS {
                // With ages as they were: those of now take too long.
                self.answer_now(session);
            } else if now_ns >= since_ns + SCRAPE_WAIT_NS {
                self.answer(session);
            }
        }
    }

    /// Gives all that wait the same view, once it is known how old sockets are.
    fn answer(&mut self, session: &Session) {
        let now_ns = now_ns();
        if self.waiting.is_empty() {
            return;
        }
        if !self.is_ready() || self.stats.ages_are_fresh(now_ns) {
            self.answer_now(session);
        } else if !self.work.iter().any(|work| matches!(work, Work::Ages(..))) {
            // Before what takes longer.
            let work = Work::Ages(AgeScan::new(now_ns), Walk::default());
            self.work.push_front(work);
        }
    }

    fn answer_now(&mut self, session: &Session) {
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
            Arc::new(Counted {
                incomplete: self.table.is_incomplete(),
                ..self.stats.counted(now_ns(), entries, corrections)
            })
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

/// By what sockets are told apart: what each event has, and each record of a dump too.
fn identity(session: &Session) -> Identity {
    match session.path() {
        Path::TpBtf => Identity::Cookie,
        Path::TpBtfNoCookie if session.sockets().is_ok() => Identity::Address,
        // inet_diag tells no address.
        Path::TpBtfNoCookie | Path::Tracepoint => Identity::Ends,
    }
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
    let runs = session.run_stats()?.into_iter();
    Ok(KernelCounted {
        transitions: transitions(&session.counters()?),
        runs: runs
            .map(|stats| (stats.program, stats.run_count, stats.run_time_ns))
            .collect(),
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
