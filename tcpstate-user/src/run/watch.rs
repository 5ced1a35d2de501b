//! `tcpstate watch`: one stream, from a running daemon or from a tracer of its own, to stdout.

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::streams::Batch;
use super::tracer::{self, Tracer};
use super::{attach, resolve, say, select, start};
use crate::cli::Watch;
use crate::export::client::{ConnectError, Events};
use crate::export::http::DEFAULT_SOCKET;
use crate::export::log::{self, LogFormat, LogLevel};
use crate::export::{LineWriter, Look, Rows};
use crate::filter::{Inode, Subscription};
use crate::model::{Line, NetnsSelection, Source};

/// How often the table is compared with the kernel's sockets.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(30);

/// How long a reader of stdout that stands still may hold up the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// Lines that come from somewhere, and how to have that end.
struct Feed {
    /// Ends behind the last line.
    lines: mpsc::Receiver<Batch>,
    /// Asks for the end.
    end: oneshot::Sender<()>,
    /// Why it ended.
    ended: tokio::task::JoinHandle<anyhow::Result<()>>,
}

pub fn run(args: &Watch) -> anyhow::Result<()> {
    log::init(LogLevel::Warn, LogFormat::Text)?;
    // This thread writes, and may have to wait for its reader; signals and the lines' source must not.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    // Before anybody is told that we trace, and may tell us to end.
    let signals = {
        let _entered = runtime.enter();
        Signals {
            interrupt: signal(SignalKind::interrupt()).context("can't wait for signals")?,
            terminate: signal(SignalKind::terminate()).context("can't wait for signals")?,
        }
    };
    let Feed {
        mut lines,
        end,
        ended,
    } = open(args, &runtime)?;
    runtime.spawn(ask_for_end(end, signals, args.duration()));
    let mut writer = LineWriter::new(args.output, Look::of_stdout(args.utc), Rows::Transitions);
    match print(
        &mut lines,
        &mut writer,
        args.count,
        &mut io::stdout().lock(),
    ) {
        // Whoever read along has had enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed.context("can't write to stdout")?,
    }
    drop(lines);
    runtime
        .block_on(ended)
        .context("the stream's task failed")?
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
async fn ask_for_end(end: oneshot::Sender<()>, mut signals: Signals, duration: Option<Duration>) {
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
    // Still here: stdout takes no more. What we attached goes with the process.
    std::process::exit(0);
}

/// Writes lines until they end or `count` transitions are written.
fn print(
    lines: &mut mpsc::Receiver<Batch>,
    writer: &mut LineWriter,
    count: Option<NonZeroU64>,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut left = count.map_or(u64::MAX, NonZeroU64::get);
    let mut bytes = Vec::new();
    while let Some(batch) = lines.blocking_recv() {
        for line in &batch {
            writer.write(line, &mut bytes);
            if matches!(line, Line::Transition(_)) {
                left -= 1;
                if left == 0 {
                    break;
                }
            }
        }
        out.write_all(&bytes)?;
        out.flush()?;
        bytes.clear();
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// A daemon's stream where there is a daemon, else that of a tracer of our own.
fn open(args: &Watch, runtime: &Runtime) -> anyhow::Result<Feed> {
    if args.direct {
        return direct(args, runtime);
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
    match runtime.block_on(Events::connect(path, &subscription)) {
        Ok(events) => daemon(args, path, netns, events, runtime),
        Err(error) if args.socket.is_some() => Err(error.into()),
        Err(ConnectError::NotFound(_)) => direct(args, runtime),
        Err(ConnectError::NotServed(path)) => {
            say(format_args!(
                "warning: nobody serves the socket {}; tracing directly",
                path.display()
            ));
            direct(args, runtime)
        }
        // Who may load programs needs no daemon; who may not is told how to reach it.
        Err(error @ ConnectError::PermissionDenied(_)) => {
            direct(args, runtime).map_err(|_| error.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Passes on what a daemon sends.
fn daemon(
    args: &Watch,
    path: &Path,
    netns: NetnsSelection,
    mut events: Events,
    runtime: &Runtime,
) -> anyhow::Result<Feed> {
    let path = path.display().to_string();
    let first = runtime.block_on(events.next())?;
    match first.as_deref() {
        Some([Line::Start(start), ..]) if start.netns == netns => {}
        Some([Line::Start(start), ..]) => bail!(
            "the daemon at {path} traces only network namespace {0}; `--netns {0}` watches that one, `--direct` traces \
             without the daemon",
            start.netns
        ),
        _ => bail!("the stream of {path} does not begin as a tcpstate daemon's does"),
    }
    if !args.quiet {
        say(format_args!(
            "tracing by the daemon at {path}, network namespaces: {netns}"
        ));
    }
    let (sender, lines) = mpsc::channel(1);
    let (end, mut asked) = oneshot::channel();
    let ended = runtime.spawn(async move {
        let mut next = first;
        while let Some(batch) = next {
            if sender.send(batch).await.is_err() {
                return Ok(());
            }
            next = tokio::select! {
                _ = &mut asked => return Ok(()),
                () = sender.closed() => return Ok(()),
                next = events.next() => next?,
            };
        }
        bail!("the daemon at {path} ended the stream")
    });
    Ok(Feed { lines, end, ended })
}

/// Traces on its own.
fn direct(args: &Watch, runtime: &Runtime) -> anyhow::Result<Feed> {
    let netns = select(args.netns)?;
    let session = attach(netns, args.ring_size(), args.attach)?;
    let path = session.path();
    let options = tracer::Options {
        netns,
        reconcile_interval: RECONCILE_INTERVAL,
        // Nobody asks for the statistics.
        max_comms: 0,
    };
    let (tracer, thread) = Tracer::start(session, options).context("can't start the tracer")?;
    let mut batches = tracer.subscribe(Subscription {
        filter: args.filter.clone(),
        raw: args.raw,
        netns: None,
    })?;
    let first = vec![Line::Start(start(Source::Direct, netns)?)];
    if !args.quiet {
        say(format_args!(
            "tracing directly ({path}), network namespaces: {netns}"
        ));
    }
    let (sender, lines) = mpsc::channel(1);
    let (end, mut asked) = oneshot::channel();
    let ended = runtime.spawn(async move {
        let mut next = Some(first);
        let mut stopping = false;
        while let Some(batch) = next {
            if sender.send(batch).await.is_err() {
                break;
            }
            next = tokio::select! {
                // What was in the ring still comes.
                _ = &mut asked, if !stopping => {
                    stopping = true;
                    tracer.stop();
                    batches.recv().await
                }
                () = sender.closed() => None,
                next = batches.recv() => next,
            };
        }
        tracer.stop();
        drop(batches);
        tokio::task::spawn_blocking(|| thread.join())
            .await?
            .map_err(|_| anyhow::anyhow!("the tracer's thread failed"))?
            .context("can't read the ring")
    });
    Ok(Feed { lines, end, ended })
}
