//! `tcpstate watch`: one stream, from a running daemon or from a tracer of its own, to stdout.

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::streams::Batch;
use super::tracer::{self, Tracer};
use super::{attach, select, start};
use crate::cli::Watch;
use crate::export::{LineWriter, Look};
use crate::filter::Subscription;
use crate::model::{Line, Source};

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
    // This thread writes, and may have to wait for its reader; signals and the lines' source must not.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let Feed {
        mut lines,
        end,
        ended,
    } = direct(args, &runtime)?;
    runtime.spawn(ask_for_end(end, args.duration()));
    let mut writer = LineWriter::new(args.output, Look::of_stdout(args.utc));
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

/// Waits for a signal or the time to be over, and asks for the end; a second signal does not wait for a reader that
/// stands still, and nor does time.
async fn ask_for_end(end: oneshot::Sender<()>, duration: Option<Duration>) {
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        // The default action of the signals is left, which ends us as well.
        return std::future::pending().await;
    };
    let over = async {
        match duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        () = over => {}
    }
    // It may have ended by itself meanwhile.
    let _ = end.send(());
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
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
    let subscription = Subscription {
        filter: args.filter.clone(),
        raw: args.raw,
        netns: None,
    };
    let mut stream = runtime.block_on(tracer.subscribe(subscription))?;
    if !args.quiet {
        eprintln!("tracing directly ({path}), network namespaces: {netns}");
    }
    let first = vec![Line::Start(start(Source::Direct, netns)?)];
    let (sender, lines) = mpsc::channel(1);
    let (end, asked) = oneshot::channel();
    let ended = runtime.spawn(async move {
        let ending = tracer.clone();
        let mut asked = std::pin::pin!(async move {
            // Dropped without a word means the same.
            let _ = asked.await;
            ending.stop();
            std::future::pending::<()>().await;
        });
        let mut next = Some(first);
        while let Some(batch) = next {
            if sender.send(batch).await.is_err() {
                break;
            }
            next = tokio::select! {
                () = &mut asked => None,
                next = stream.recv() => next,
            };
        }
        tracer.stop();
        drop(stream);
        tokio::task::spawn_blocking(|| thread.join())
            .await?
            .map_err(|_| anyhow::anyhow!("the tracer's thread failed"))
    });
    Ok(Feed { lines, end, ended })
}
