//! The places for connections. When all are taken, the connection that has waited longest for its request gives way,
//! and each answer is its connection's last, so that nobody is kept out by connections that ask for nothing, or for one
//! page after the other.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use http_body::{Frame, SizeHint};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    waiting: Mutex<Waiting>,
    /// There is one more that waits.
    more: Notify,
    said: AtomicBool,
}

/// Connections that wait for the whole of a request's header; who began last comes last.
#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    by_age: BTreeMap<u64, Arc<Notify>>,
}

impl Places {
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Arc::new(Semaphore::new(count)),
            waiting: Mutex::default(),
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
            ticket: Mutex::default(),
            _permit: permit.expect("nobody closes the semaphore"),
        });
        place.waits();
        place
    }

    /// Has the connection end that has waited longest, once there is one.
    async fn make_room(&self) {
        loop {
            let longest = self.waiting().by_age.pop_first();
            if let Some((_, leave)) = longest {
                leave.notify_one();
                if !self.said.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "all connections that may be are there: for each more, the one is dropped that has waited \
                         longest for its request (said once)"
                    );
                }
                return;
            }
            self.more.notified().await;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place; free again when this and all its [`Answer`]s are dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    leave: Arc<Notify>,
    /// Its key among those that wait, the last that it had.
    ticket: Mutex<u64>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// Until the connection has to end in favour of another.
    pub(super) async fn left(&self) {
        self.leave.notified().await;
    }

    /// Others may want it as soon as the answer is made.
    pub(super) fn is_scarce(&self) -> bool {
        self.places.free.available_permits() == 0
    }

    /// A request is there: it is safe until the answer is dropped.
    pub(super) fn answers(self: &Arc<Self>) -> Answering {
        self.stops_waiting();
        Answering(Arc::clone(self))
    }

    fn waits(&self) {
        let mut waiting = self.places.waiting();
        let ticket = waiting.next;
        waiting.next += 1;
        waiting.by_age.insert(ticket, Arc::clone(&self.leave));
        *self.ticket() = ticket;
        drop(waiting);
        self.places.more.notify_one();
    }

    fn stops_waiting(&self) {
        let mut waiting = self.places.waiting();
        waiting.by_age.remove(&self.ticket());
    }

    fn ticket(&self) -> MutexGuard<'_, u64> {
        self.ticket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.stops_waiting();
    }
}

/// While it lives, its connection does not wait for a request.
pub(super) struct Answering(Arc<Place>);

impl Answering {
    pub(super) fn place(&self) -> &Place {
        &self.0
    }

    pub(super) fn with(self, body: Body) -> Answer {
        Answer {
            body,
            _answering: self,
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.waits();
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
