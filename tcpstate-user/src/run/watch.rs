//! `tcpstate watch`: one stream, from a running daemon or from a tracer of its own, to stdout.

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::clock::unix_now_ns;
use super::streams::Batch;
use super::tracer::{self, Tracer};
use super::{attach, resolve, runtime, say, select, start, warn};
use crate::cli::Watch;
use crate::export::client::{self, ConnectError, Events, StreamError};
use crate::export::http::DEFAULT_SOCKET;
use crate::export::{LineWriter, Look, Rows, log};
use crate::filter::{Inode, Subscription};
use crate::model::{Line, NetnsSelection, Source};

/// How often the table is compared with the kernel's sockets.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(30);

/// How long a reader of stdout that stands still may hold up the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long after an event its line may come from a daemon.
const DELAY: Duration = Duration::from_millis(100);

/// How long a daemon's last lines may take: a full queue of them is read in well under a second.
const LAST_LINES: Duration = Duration::from_secs(5);

/// A pipe takes up to 4 KiB whole or not at all: with this and a line more we know what it took.
const CHUNK: usize = 3 << 10;

/// Where lines come from.
enum Feed {
    Daemon {
        events: Box<Events>,
        path: String,
    },
    Direct {
        tracer: Tracer,
        thread: thread::JoinHandle<io::Result<()>>,
        first: Option<Batch>,
        batches: mpsc::Receiver<Batch>,
    },
}

/// Transitions that are on their way to stdout.
type Pending = Arc<AtomicU64>;

pub fn run(args: &Watch) -> anyhow::Result<()> {
    log::init_warnings()?;
    // This thread writes, and may have to wait for its reader; signals and the lines' source must not.
    let runtime = runtime(1)?;
    // Before anybody is told that we trace, and may tell us to end.
    let mut signals = {
        let _entered = runtime.enter();
        Signals {
            interrupt: signal(SignalKind::interrupt()).context("can't wait for signals")?,
            terminate: signal(SignalKind::terminate()).context("can't wait for signals")?,
        }
    };
    let Some(feed) = open(args, &runtime, &mut signals)? else {
        return Ok(());
    };
    let pending = Pending::default();
    let (sender, mut lines) = mpsc::channel(1);
    let (end, asked) = oneshot::channel();
    let (settle, settled) = oneshot::channel();
    let fed = runtime.spawn(feed.run(sender, asked, settle, Arc::clone(&pending)));
    let ending = ask_for_end(end, settled, signals, args.duration(), Arc::clone(&pending));
    runtime.spawn(ending);
    let mut writer = LineWriter::new(args.output, Look::of_stdout(args.utc), Rows::Transitions);
    match print(
        &mut lines,
        &mut writer,
        args.count,
        &pending,
        &mut io::stdout().lock(),
    ) {
        // Whoever read along has had enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed.context("can't write to stdout")?,
    }
    drop(lines);
    runtime.block_on(fed).context("the stream's task failed")?
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    async fn any(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Waits for a signal or the time to be over, and asks for the end; a second signal does not wait for a reader that
/// stands still, and nor does time.
async fn ask_for_end(
    end: oneshot::Sender<()>,
    settled: oneshot::Receiver<()>,
    mut signals: Signals,
    duration: Option<Duration>,
    pending: Pending,
) {
    let over = async {
        match duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = signals.any() => {}
        () = over => {}
    }
    // It may have ended by itself meanwhile.
    let _ = end.send(());
    tokio::select! {
        () = signals.any() => {}
        () = tokio::time::sleep(PATIENCE) => {}
    }
    // Only then all of them are counted; an error means that they were before.
    let _ = settled.await;
    // Still here: stdout takes no more. What we attached goes with the process.
    let missing = pending.load(Ordering::Relaxed);
    if missing > 0 {
        let transitions = if missing == 1 {
            "transition"
        } else {
            "transitions"
        };
        warn(format_args!(
            "stdout was not read in time; its end lacks {missing} {transitions}"
        ));
    }
    std::process::exit(0);
}

/// How many transitions the line tells of, or tells the loss of.
const fn weight(line: &Line) -> u64 {
    match line {
        Line::Start(_) | Line::Socket(_) => 0,
        Line::Transition(_) => 1,
        Line::Lost(loss) => loss.count,
    }
}

/// Writes lines until they end or `count` transitions are written.
fn print(
    lines: &mut mpsc::Receiver<Batch>,
    writer: &mut LineWriter,
    count: Option<NonZeroU64>,
    pending: &AtomicU64,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut left = count.map_or(u64::MAX, NonZeroU64::get);
    let mut bytes = Vec::new();
    let mut weighs = 0;
    let mut flush = |bytes: &mut Vec<u8>, weighs: &mut u64| {
        out.write_all(bytes)?;
        out.flush()?;
        bytes.clear();
        pending.fetch_sub(std::mem::take(weighs), Ordering::Relaxed);
        io::Result::Ok(())
    };
    while left > 0
        && let Some(batch) = lines.blocking_recv()
    {
        for line in &batch {
            writer.write(line, &mut bytes);
            weighs += weight(line);
            if matches!(line, Line::Transition(_)) {
                left -= 1;
            }
            if left == 0 {
                break;
            }
            if bytes.len() >= CHUNK {
                flush(&mut bytes, &mut weighs)?;
            }
        }
        flush(&mut bytes, &mut weighs)?;
    }
    Ok(())
}

/// A daemon's stream where there is a daemon, else that of a tracer of our own; `None` where a signal came first.
fn open(args: &Watch, runtime: &Runtime, signals: &mut Signals) -> anyhow::Result<Option<Feed>> {
    if args.direct {
        return direct(args, runtime).map(Some);
    }
    let path = args.socket.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET));
    let netns = resolve(args.netns)?;
    let subscription = Subscription {
        filter: args.filter.clone(),
        raw: args.raw,
        netns: match netns {
            NetnsSelection::All => None,
            NetnsSelection::One(inode) => Some(Inode(inode)),
        },
    };
    // Who has two seconds does not wait for five.
    let patience = args
        .duration()
        .map_or(client::PATIENCE, |duration| duration.min(client::PATIENCE));
    let connected = runtime.block_on(async {
        tokio::select! {
            connected = Events::connect(path, &subscription, patience) => Some(connected),
            () = signals.any() => None,
        }
    });
    let Some(connected) = connected else {
        return Ok(None);
    };
    let feed = match connected {
        Ok(events) => daemon(args, path, netns, events),
        Err(error) if args.socket.is_some() => Err(error.into()),
        Err(ConnectError::NotFound(_)) => direct(args, runtime),
        Err(ConnectError::NotServed(path)) => {
            warn(format_args!(
                "nobody serves the socket {}; tracing directly",
                path.display()
            ));
            direct(args, runtime)
        }
        // Who may load programs needs no daemon; who may not is told how to reach it.
        Err(error @ (ConnectError::PermissionDenied(_) | ConnectError::Abandoned(_))) => {
            direct(args, runtime).map_err(|_| error.into())
        }
        Err(error) => Err(error.into()),
    };
    feed.map(Some)
}

/// Passes on what a daemon sends.
fn daemon(
    args: &Watch,
    path: &Path,
    netns: NetnsSelection,
    events: Events,
) -> anyhow::Result<Feed> {
    let path = path.display().to_string();
    let traced = events.start().netns;
    if traced != netns {
        bail!(
            "the daemon at {path} traces only network namespace {traced}; `--netns {traced}` watches that one, \
             `--direct` traces without the daemon"
        );
    }
    if !args.quiet {
        say(format_args!(
            "tracing by the daemon at {path}, network namespaces: {netns}"
        ));
    }
    let events = Box::new(events);
    Ok(Feed::Daemon { events, path })
}

/// Traces on its own.
fn direct(args: &Watch, runtime: &Runtime) -> anyhow::Result<Feed> {
    let netns = select(args.netns)?;
    let session = attach(netns, args.ring_size, &args.without.features)?;
    let path = session.path();
    let options = tracer::Options {
        netns,
        reconcile_interval: RECONCILE_INTERVAL,
        // Nobody asks for the statistics.
        max_comms: 0,
    };
    let (tracer, thread) = Tracer::start(session, options).context("can't start the tracer")?;
    let batches = runtime.block_on(tracer.subscribe(Subscription {
        filter: args.filter.clone(),
        raw: args.raw,
        netns: None,
    }))?;
    let first = Some(vec![Line::Start(start(Source::Direct, netns)?)]);
    if !args.quiet {
        say(format_args!(
            "tracing directly ({path}), network namespaces: {netns}"
        ));
    }
    Ok(Feed::Direct {
        tracer,
        thread,
        first,
        batches,
    })
}

impl Feed {
    /// Passes lines on, from the first to those of the moment in which it is `asked` to end. `settled` when the last are
    /// on their way.
    async fn run(
        mut self,
        lines: mpsc::Sender<Batch>,
        mut asked: oneshot::Receiver<()>,
        settled: oneshot::Sender<()>,
        pending: Pending,
    ) -> anyhow::Result<()> {
        let count = |batch: &Batch| {
            let weighs = batch.iter().map(weight).sum();
            pending.fetch_add(weighs, Ordering::Relaxed);
        };
        let fed = loop {
            // Room before lines: none is in our hands when the end is asked for.
            let next = async {
                let room = lines.reserve().await.ok()?;
                let next = tokio::select! {
                    next = self.next() => next,
                    () = lines.closed() => return None,
                };
                Some((room, next))
            };
            tokio::select! {
                _ = &mut asked => {
                    let rest = self.rest().await;
                    count(&rest);
                    let _ = settled.send(());
                    // Where nobody takes them they are counted as pending.
                    let _ = lines.send(rest).await;
                    break Ok(());
                }
                next = next => match next {
                    None => break Ok(()),
                    Some((room, Ok(Some(batch)))) => {
                        count(&batch);
                        room.send(batch);
                    }
                    Some((_, Ok(None))) => break self.ended(),
                    Some((_, Err(error))) => break Err(error),
                },
            }
        };
        drop(lines);
        self.close().await?;
        fed
    }

    /// May be cancelled without loss.
    async fn next(&mut self) -> anyhow::Result<Option<Batch>> {
        match self {
            Self::Daemon { events, path } => {
                let next = events.next().await;
                next.map_err(|error: StreamError| anyhow!("the daemon at {path} {error}"))
            }
            Self::Direct { first, batches, .. } => match first.take() {
                Some(first) => Ok(Some(first)),
                None => Ok(batches.recv().await),
            },
        }
    }

    /// What happened up to now and has not been passed on.
    async fn rest(&mut self) -> Batch {
        let mut rest = Vec::new();
        match self {
            Self::Daemon { events, .. } => {
                let (now_ns, over) = (unix_now_ns(), Instant::now() + LAST_LINES);
                let until = || over.min(Instant::now() + DELAY);
                while let Ok(Ok(Some(batch))) = timeout_at(until(), events.next()).await {
                    let younger =
                        |line: &Line| matches!(line, Line::Transition(t) if t.time_ns > now_ns);
                    let end = batch.iter().position(younger);
                    rest.extend(batch.into_iter().take(end.unwrap_or(usize::MAX)));
                    if end.is_some() {
                        break;
                    }
                }
            }
            Self::Direct {
                tracer,
                first,
                batches,
                ..
            } => {
                tracer.stop();
                rest.extend(first.take().into_iter().flatten());
                while let Some(batch) = batches.recv().await {
                    rest.extend(batch);
                }
            }
        }
        rest
    }

    /// What it means that there are no more lines, although nobody asked for the end.
    fn ended(&self) -> anyhow::Result<()> {
        match self {
            Self::Daemon { path, .. } => bail!("the daemon at {path} ended the stream"),
            // Its thread says why.
            Self::Direct { .. } => Ok(()),
        }
    }

    async fn close(self) -> anyhow::Result<()> {
        let Self::Direct {
            tracer,
            thread,
            batches,
            ..
        } = self
        else {
            return Ok(());
        };
        tracer.stop();
        // Nobody reads the last lines, and the tracer need not wait for it.
        drop(batches);
        tokio::task::spawn_blocking(|| thread.join())
            .await?
            .map_err(|_| anyhow!("the tracer's thread failed"))?
            .context("can't read the ring")
    }
}
