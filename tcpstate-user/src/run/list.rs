//! `tcpstate list`: the sockets that exist now, from a running daemon or from a tracer of its own, to stdout; and the
//! lists that a tracer owes.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use rustc_hash::FxHashSet;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::streams::Batch;
use super::tracer::{self, Stopped, Tracer};
use super::{attach, resolve, runtime, say, select, start, warn};
use crate::cli::List;
use crate::export::client::{ConnectError, Events, StreamError};
use crate::export::http::DEFAULT_SOCKET;
use crate::export::{LineWriter, Look, Rows, log};
use crate::filter::{Inode, Selection};
use crate::kernel::RingSize;
use crate::model::{Line, Listed, NetnsSelection, Source};
use crate::table::MOST_SOCKETS;

/// Each holds all its rows, some 30 MB for 100,000 sockets, until its reader has taken them.
pub const MOST_LISTS: usize = 4;

/// From one dump for lists to the next: dumps and sweeps take their time.
const PAUSE_NS: u64 = 1_000_000_000;

/// Lines that go to a reader together.
const BATCH_LINES: usize = 1024;

/// Longer than any list takes: no dump is due meanwhile.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(30);

/// Where a list goes.
pub type Reply = oneshot::Sender<Result<Vec<Listed>, NoList>>;

#[derive(Clone, Debug, thiserror::Error)]
pub enum NoList {
    #[error(transparent)]
    Stopped(#[from] Stopped),
    #[error("no snapshot of the sockets: {0}")]
    NoDump(String),
    #[error(
        "there are more sockets than the table holds, {MOST_SOCKETS}, and a list would lack some; \
         `tcpstate list --direct --netns INODE` lists one network namespace"
    )]
    Incomplete,
}

/// Lists that were asked for. Each waits for a dump of all sockets, and for a sweep over their holders after that.
#[derive(Default)]
pub struct Lists {
    waiting: Vec<(Due, Selection, Reply)>,
    /// No dump for lists before; `CLOCK_BOOTTIME`, nanoseconds.
    next_ns: u64,
}

/// What a list waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// That a dump begins, …
    Dump,
    /// … that it ends, …
    DumpEnd,
    /// … that a sweep begins, …
    Sweep,
    /// … and that it ends.
    SweepEnd,
}

impl Lists {
    /// Tells when a dump is due. `dumping`: one is under way that will do.
    pub fn ask(&mut self, selection: Selection, reply: Reply, dumping: bool) -> u64 {
        let due = if dumping { Due::DumpEnd } else { Due::Dump };
        self.waiting.push((due, selection, reply));
        self.next_ns
    }

    pub fn dump_begins(&mut self, now_ns: u64) {
        if self.advance(Due::Dump, Due::DumpEnd) {
            self.next_ns = now_ns + PAUSE_NS;
        }
    }

    /// Tells whether a sweep is due at once.
    pub fn dumped(&mut self) -> bool {
        self.advance(Due::DumpEnd, Due::Sweep)
    }

    pub fn dump_failed(&mut self, reason: &str) {
        for (_, _, reply) in self
            .waiting
            .extract_if(.., |(due, ..)| matches!(due, Due::Dump | Due::DumpEnd))
        {
            // Who asked may have given up.
            let _ = reply.send(Err(NoList::NoDump(reason.to_owned())));
        }
    }

    pub fn sweep_begins(&mut self) {
        self.advance(Due::Sweep, Due::SweepEnd);
    }

    /// The lists whose sweep this was: what they want of `sockets`, which they are to be given in parts.
    pub fn swept(&mut self, sockets: usize) -> Vec<Listing> {
        let due = self
            .waiting
            .extract_if(.., |(due, ..)| *due == Due::SweepEnd);
        due.map(|(_, selection, reply)| Listing {
            selection,
            reply,
            // Rows are not copied while it grows; what is not used of it is never touched, and costs no memory.
            rows: Vec::with_capacity(sockets),
        })
        .collect()
    }

    fn advance(&mut self, from: Due, to: Due) -> bool {
        let mut any = false;
        for (due, ..) in &mut self.waiting {
            if *due == from {
                *due = to;
                any = true;
            }
        }
        any
    }
}

/// A list that is being made.
pub struct Listing {
    selection: Selection,
    rows: Vec<Listed>,
    reply: Reply,
}

impl Listing {
    pub fn part(&mut self, rows: impl Iterator<Item = Listed>) {
        let rows = rows.filter(|row| self.selection.matches(row));
        self.rows.extend(rows);
    }

    /// `incomplete`: the table lacks some.
    pub fn finish(self, incomplete: bool) {
        let rows = match incomplete {
            true => Err(NoList::Incomplete),
            false => Ok(self.rows),
        };
        // Who asked may have given up.
        let _ = self.reply.send(rows);
    }
}

/// In the order of a list; of two rows of one connection, which changed its kind between two parts, the later.
pub fn settled(mut rows: Vec<Listed>) -> Vec<Listed> {
    let mut met = FxHashSet::default();
    rows.reverse();
    rows.retain(|row| met.insert((row.id, row.local, row.remote)));
    Listed::sort(&mut rows);
    rows
}

/// A stream of the rows, which keeps its place until its reader has taken them.
pub fn batches(rows: Vec<Listed>, place: OwnedSemaphorePermit) -> mpsc::Receiver<Batch> {
    let (sender, batches) = mpsc::channel(1);
    tokio::spawn(async move {
        let _place = place;
        let mut rows = rows.into_iter().map(Line::Socket);
        while rows.len() > 0 {
            let batch = rows.by_ref().take(BATCH_LINES).collect();
            if sender.send(batch).await.is_err() {
                break;
            }
        }
    });
    batches
}

pub fn run(args: &List) -> anyhow::Result<()> {
    log::init_warnings()?;
    let runtime = runtime(1)?;
    {
        let _entered = runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt()).context("can't wait for signals")?;
        let mut terminate = signal(SignalKind::terminate()).context("can't wait for signals")?;
        runtime.spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            // What we attached goes with the process.
            std::process::exit(0);
        });
    }
    let lines = lines(args, &runtime)?;
    let mut writer = LineWriter::new(args.output, Look::of_stdout(true), Rows::Sockets);
    let mut out = io::stdout().lock();
    let mut bytes = Vec::new();
    for some in lines.chunks(BATCH_LINES) {
        for line in some {
            writer.write(line, &mut bytes);
        }
        match out.write_all(&bytes).and_then(|()| out.flush()) {
            // Whoever read along has had enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("can't write to stdout")?,
        }
        bytes.clear();
    }
    Ok(())
}

/// From a daemon where there is one, else from a tracer of our own.
fn lines(args: &List, runtime: &Runtime) -> anyhow::Result<Vec<Line>> {
    if args.direct {
        return runtime.block_on(direct(args));
    }
    let path = args.socket.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET));
    let netns = resolve(args.netns)?;
    let selection = Selection {
        filter: args.filter.clone(),
        netns: match netns {
            NetnsSelection::All => None,
            NetnsSelection::One(inode) => Some(Inode(inode)),
        },
    };
    runtime.block_on(async {
        match Events::list(path, &selection).await {
            Ok(events) => daemon(path, netns, events).await,
            Err(error) if args.socket.is_some() => Err(error.into()),
            Err(ConnectError::NotFound(_)) => direct(args).await,
            Err(ConnectError::NotServed(path)) => {
                warn(format_args!(
                    "nobody serves the socket {}; tracing directly",
                    path.display()
                ));
                direct(args).await
            }
            // Who may load programs needs no daemon; who may not is told how to reach it.
            Err(error @ (ConnectError::PermissionDenied(_) | ConnectError::Abandoned(_))) => {
                direct(args).await.map_err(|_| error.into())
            }
            Err(error) => Err(error.into()),
        }
    })
}

/// All that a daemon lists: what it could not end is no list.
async fn daemon(
    path: &Path,
    netns: NetnsSelection,
    mut events: Events,
) -> anyhow::Result<Vec<Line>> {
    let path = path.display();
    let traced = events.start().netns;
    if traced != netns {
        bail!(
            "the daemon at {path} traces only network namespace {traced}; `--netns {traced}` lists that one, \
             `--direct` works without the daemon"
        );
    }
    let mut lines = Vec::new();
    let broken = |error: StreamError| anyhow!("the daemon at {path} {error}");
    while let Some(more) = events.next().await.map_err(broken)? {
        lines.extend(more);
    }
    Ok(lines)
}

/// Traces until there is a list: a dump alone does not tell owners.
async fn direct(args: &List) -> anyhow::Result<Vec<Line>> {
    let netns = select(args.netns)?;
    let session = attach(netns, RingSize::default(), &args.without.features)?;
    let path = session.path();
    let options = tracer::Options {
        netns,
        reconcile_interval: RECONCILE_INTERVAL,
        // Nobody asks for the statistics.
        max_comms: 0,
    };
    let (tracer, thread) = Tracer::start(session, options).context("can't start the tracer")?;
    if !args.quiet {
        say(format_args!(
            "tracing directly ({path}), network namespaces: {netns}"
        ));
    }
    let start = Line::Start(start(Source::Direct, netns)?);
    let rows = tracer.list(Selection {
        filter: args.filter.clone(),
        netns: None,
    });
    let rows = rows.await?;
    tracer.stop();
    tokio::task::spawn_blocking(|| thread.join())
        .await?
        .map_err(|_| anyhow!("the tracer's thread failed"))?
        .context("can't read the ring")?;
    Ok(std::iter::once(start)
        .chain(rows.into_iter().map(Line::Socket))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ConnectionId, Endpoint, Family, TcpState};

    type Answer = oneshot::Receiver<Result<Vec<Listed>, NoList>>;

    fn ask(lists: &mut Lists, dumping: bool) -> (u64, Answer) {
        let (reply, answer) = oneshot::channel();
        (lists.ask(Selection::default(), reply, dumping), answer)
    }

    /// Whether there is an answer when a sweep has ended.
    fn swept(lists: &mut Lists, answer: &mut Answer) -> bool {
        for mut listing in lists.swept(0) {
            listing.part(std::iter::empty());
            listing.finish(false);
        }
        answer.try_recv().is_ok_and(|rows| rows.is_ok())
    }

    #[test]
    fn a_list_has_a_dump_and_then_a_sweep_of_its_own() {
        let mut lists = Lists::default();
        let (_, mut answer) = ask(&mut lists, false);
        // Those that are under way began too early.
        assert!(!lists.dumped());
        assert!(!swept(&mut lists, &mut answer));
        lists.dump_begins(1);
        lists.sweep_begins();
        assert!(!swept(&mut lists, &mut answer));
        assert!(lists.dumped(), "a sweep is due");
        assert!(!swept(&mut lists, &mut answer));
        lists.sweep_begins();
        assert!(swept(&mut lists, &mut answer));
    }

    #[test]
    fn the_first_dump_will_do_and_the_next_but_one_waits_for_a_second() {
        let mut lists = Lists::default();
        let (due_ns, mut answer) = ask(&mut lists, true);
        assert_eq!(due_ns, 0);
        assert!(lists.dumped());
        lists.sweep_begins();
        assert!(swept(&mut lists, &mut answer));
        let (due_ns, _) = ask(&mut lists, false);
        assert_eq!(due_ns, 0);
        lists.dump_begins(5);
        // That was nobody's.
        lists.dump_begins(9);
        let (due_ns, _) = ask(&mut lists, false);
        assert_eq!(due_ns, 5 + PAUSE_NS);
    }

    #[test]
    fn of_two_rows_of_one_connection_the_later_counts() {
        let row = |number, port, state| Listed {
            time_ns: 0,
            id: ConnectionId::Own(number),
            cookie: None,
            netns: None,
            family: Family::Ipv4,
            local: Endpoint {
                addr: None,
                port: Some(port),
            },
            remote: Endpoint::default(),
            state,
            since_ns: 0,
            age_ns: 0,
            age_exact: true,
            role: None,
            owner: None,
            uid: None,
            container: None,
            orphan: None,
            holders: None,
            recv_queue: None,
            send_queue: None,
        };
        let rows = settled(vec![
            row(1, 9, TcpState::FIN_WAIT2),
            row(2, 8, TcpState::ESTABLISHED),
            row(1, 9, TcpState::TIME_WAIT),
        ]);
        let told: Vec<_> = rows.iter().map(|row| (row.id, row.state)).collect();
        let expected = [(2, TcpState::ESTABLISHED), (1, TcpState::TIME_WAIT)];
        assert_eq!(
            told,
            expected.map(|(id, state)| (ConnectionId::Own(id), state))
        );
    }

    #[test]
    fn a_dump_that_fails_is_told() {
        let mut lists = Lists::default();
        let (_, mut answer) = ask(&mut lists, false);
        lists.dump_failed("no memory");
        let error = answer.try_recv().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "no snapshot of the sockets: no memory");
    }
}
