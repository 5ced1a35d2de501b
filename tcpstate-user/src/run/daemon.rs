//! `tcpstate daemon`: a tracer, and what serves it over HTTP and on the Unix socket.

use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

use super::clock;
use super::list::{MOST_LISTS, batches};
use super::memory;
use super::pages::Pages;
use super::tracer::{self, Tracer};
use super::{attach, runtime, say, select, start};
use crate::config::DaemonConfig;
use crate::export::http::{self, Backend, Limits, Listeners, Refusal, Subscribed, UnixSocket};
use crate::export::log;
use crate::filter::{Inode, Selection, Subscription, covered};
use crate::model::view::Feature;
use crate::model::{NetnsSelection, Source, Start};

pub fn run(config: &DaemonConfig, without: &[Feature]) -> anyhow::Result<()> {
    log::init(config.log_level, config.log_format)?;
    // Two: a page that takes long must not hold up the streams.
    runtime(2)?.block_on(serve(config, without))
}

async fn serve(config: &DaemonConfig, without: &[Feature]) -> anyhow::Result<()> {
    // What is likeliest to be refused comes first: nothing is attached then.
    let netns = select(config.netns)?;
    let mut tcp = Vec::new();
    for &addr in &config.listen {
        tcp.push(http::bind_tcp(addr)?);
    }
    let unix = UnixSocket::bind(&config.socket)?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't wait for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("can't wait for signals")?;

    let session = attach(netns, config.ring_size, without)?;
    let path = session.path();
    let options = tracer::Options {
        netns,
        reconcile_interval: config.reconcile_interval,
        max_comms: config.max_comms.get(),
    };
    let (tracer, thread) = Tracer::start(session, options).context("can't start the tracer")?;
    for listener in &tcp {
        if let Ok(addr) = listener.local_addr() {
            tracing::info!("metrics at http://{addr}{}", config.telemetry_path);
        }
    }
    say(format_args!(
        "tracing directly ({path}), network namespaces: {netns}; served at {}",
        config.socket.display()
    ));

    let served = Served {
        tracer: tracer.clone(),
        pages: Pages::new(tracer.clone()),
        start: start(Source::Daemon, netns)?,
        list_places: Arc::new(Semaphore::new(MOST_LISTS)),
    };
    tokio::spawn(memory::keep_giving_back());
    let listeners = Listeners {
        tcp,
        unix: Some(unix),
    };
    let mut failed = false;
    let shutdown = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            () = tracer.stopped() => failed = true,
        }
        // The streams end with it.
        tracer.stop();
    };
    http::serve(
        listeners,
        Arc::new(served),
        &config.telemetry_path,
        Limits::default(),
        shutdown,
    )
    .await;
    tokio::task::spawn_blocking(|| thread.join())
        .await?
        .map_err(|_| anyhow::anyhow!("the tracer's thread failed"))?
        .context("can't read the ring")?;
    anyhow::ensure!(!failed, "the tracer ended by itself");
    Ok(())
}

/// What HTTP answers with.
struct Served {
    tracer: Tracer,
    pages: Pages,
    /// As of the daemon's start.
    start: Start,
    list_places: Arc<Semaphore>,
}

impl Served {
    /// The first line of what covers `asked`.
    fn start(&self, asked: Option<Inode>) -> Result<Start, Refusal> {
        let netns = covered(asked, self.tracer.netns());
        if let (NetnsSelection::One(traced), NetnsSelection::One(asked)) =
            (self.tracer.netns(), netns)
            && traced != asked
        {
            return Err(Refusal::Bad(format!(
                "network namespace {asked} is not traced: this daemon traces only {traced}"
            )));
        }
        Ok(Start {
            time_ns: clock::unix_now_ns(),
            netns,
            ..self.start.clone()
        })
    }
}

impl Backend for Served {
    async fn metrics(&self) -> Result<Bytes, Refusal> {
        self.pages.page().await
    }

    fn is_ready(&self) -> bool {
        self.tracer.ready()
    }

    async fn subscribe(&self, subscription: Subscription) -> Result<Subscribed, Refusal> {
        let start = self.start(subscription.netns)?;
        let batches = self.tracer.subscribe(subscription).await;
        Ok(Subscribed {
            start,
            batches: batches.map_err(|error| Refusal::Busy(error.to_string()))?,
        })
    }

    async fn list(&self, selection: Selection) -> Result<Subscribed, Refusal> {
        let place = Arc::clone(&self.list_places).try_acquire_owned();
        let place = place.map_err(|_| {
            Refusal::Busy(format!(
                "{MOST_LISTS} lists are being read, which is all there may be; try again in a moment"
            ))
        })?;
        let start = self.start(selection.netns)?;
        let rows = self.tracer.list(selection).await;
        let rows = rows.map_err(|error| Refusal::Busy(error.to_string()))?;
        Ok(Subscribed {
            start,
            batches: batches(rows, place),
        })
    }
}
