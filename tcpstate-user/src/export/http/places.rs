//! The places for connections. When all are taken, one gives way: the connection that has waited longest for its
//! request, else the one that has taken longest to read its answer, so that nobody is kept out by connections that ask
//! for nothing, or read nothing.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body::{Frame, SizeHint};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

/// A reader that takes nothing for so long may have to give way; the packets of one that reads come more often.
const STALLED: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    idle: Mutex<Idle>,
    /// There is one more that could give way.
    more: Notify,
    said: AtomicBool,
}

/// Connections that could give way; who began last comes last.
#[derive(Debug, Default)]
struct Idle {
    next: u64,
    /// They wait for the whole of a request's header.
    waiting: BTreeMap<u64, Arc<Notify>>,
    /// Their readers don't take what is answered, since then.
    stalled: BTreeMap<u64, (Instant, Arc<Notify>)>,
}

impl Idle {
    /// Whose turn it is; else, when to look again if nothing changes before.
    fn pop(&mut self, now: Instant) -> Result<Arc<Notify>, Option<Instant>> {
        if let Some((_, leave)) = self.waiting.pop_first() {
            return Ok(leave);
        }
        let longest = self.stalled.first_entry().ok_or(None)?;
        match longest.get().0 + STALLED {
            due if due > now => Err(Some(due)),
            _ => Ok(longest.remove().1),
        }
    }
}

impl Places {
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Arc::new(Semaphore::new(count)),
            idle: Mutex::default(),
            more: Notify::new(),
            said: AtomicBool::new(false),
        })
    }

    /// A place for a new connection; waits while requests are answered on all others.
    pub(super) async fn take(self: &Arc<Self>) -> Arc<Place> {
        let free = || Arc::clone(&self.free).acquire_owned();
        let permit = match Arc::clone(&self.free).try_acquire_owned() {
            Ok(permit) => Ok(permit),
            Err(_) => tokio::select! {
                biased;
                permit = free() => permit,
                () = self.make_room() => free().await,
            },
        };
        let place = Arc::new(Place {
            places: Arc::clone(self),
            leave: Arc::default(),
            standing: Mutex::default(),
            _permit: permit.expect("nobody closes the semaphore"),
        });
        place.becomes(|_| {});
        place
    }

    /// Has a connection end, once there is one that can.
    async fn make_room(&self) {
        loop {
            let found = self.idle().pop(Instant::now());
            match found {
                Ok(leave) => {
                    leave.notify_one();
                    break;
                }
                Err(None) => self.more.notified().await,
                Err(Some(due)) => tokio::select! {
                    () = self.more.notified() => {}
                    () = sleep_until(due) => {}
                },
            }
        }
        if !self.said.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "all connections that may be are there: for each more, the one is dropped that has waited longest for \
                 its request, or has not read its answer (said once)"
            );
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place; free again when this and all its [`Answer`]s are dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    leave: Arc<Notify>,
    standing: Mutex<Standing>,
    _permit: OwnedSemaphorePermit,
}

/// What a connection is at, and its key among those that could give way, the last that it had.
#[derive(Debug, Default)]
struct Standing {
    answers: bool,
    stalls: bool,
    ticket: u64,
}

impl Place {
    /// Until the connection has to end in favour of another.
    pub(super) async fn left(&self) {
        self.leave.notified().await;
    }

    /// A request is there: it waits for none until the answer is dropped.
    pub(super) fn answers(self: &Arc<Self>) -> Answering {
        self.becomes(|standing| standing.answers = true);
        Answering(Arc::clone(self))
    }

    /// The reader takes nothing, or takes something again.
    pub(super) fn stalls(&self, stalls: bool) {
        self.becomes(|standing| standing.stalls = stalls);
    }

    fn becomes(&self, change: impl FnOnce(&mut Standing)) {
        let mut standing = self.standing();
        let mut idle = self.places.idle();
        idle.waiting.remove(&standing.ticket);
        idle.stalled.remove(&standing.ticket);
        change(&mut standing);
        standing.ticket = idle.next;
        idle.next += 1;
        let leave = Arc::clone(&self.leave);
        match *standing {
            Standing { answers: false, .. } => drop(idle.waiting.insert(standing.ticket, leave)),
            Standing { stalls: true, .. } => {
                let stalled = (Instant::now(), leave);
                idle.stalled.insert(standing.ticket, stalled);
            }
            Standing { .. } => return,
        }
        drop(idle);
        self.places.more.notify_one();
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ticket = self.standing().ticket;
        let mut idle = self.places.idle();
        idle.waiting.remove(&ticket);
        idle.stalled.remove(&ticket);
    }
}

/// While it lives, its connection does not wait for a request.
pub(super) struct Answering(Arc<Place>);

impl Answering {
    pub(super) fn with(self, body: Body) -> Answer {
        Answer {
            body,
            _answering: self,
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.becomes(|standing| standing.answers = false);
    }
}

/// The body of an answer.
pub(super) struct Answer {
    body: Body,
    _answering: Answering,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
