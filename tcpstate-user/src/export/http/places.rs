//! The places for connections. When all are taken, the connection that has done nothing for longest gives way, and each
//! answer is its connection's last, so that nobody is kept out by connections that ask for nothing, or for one page after
//! the other. Who asks, and reads, is not dropped: not before what it sent was looked at, and not while its answer goes out.

use std::collections::BTreeMap;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body::{Frame, SizeHint};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

/// A connection that did nothing for so long can give way, whatever it is about. Who waits for a place may wait as long.
const PATIENCE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    idle: Mutex<Idle>,
    /// There is one more that is idle.
    more: Notify,
    said: AtomicBool,
}

/// Connections that it is the other side's turn in; who did something last comes last.
#[derive(Debug, Default)]
struct Idle {
    newest: u64,
    by_age: BTreeMap<u64, Turn>,
    /// A connection that waits for its request can give way at once where more than so many did something after it.
    crowd: usize,
}

#[derive(Debug)]
struct Turn {
    since: Instant,
    doing: Doing,
    leave: Arc<Notify>,
}

/// Which connection can give way.
enum Leaves {
    Now(Arc<Notify>),
    /// None before that, if nothing changes.
    At(Instant),
    None,
}

impl Idle {
    /// Gives its ticket; 0 is nobody's.
    fn add(&mut self, doing: Doing, leave: &Arc<Notify>, now: Instant) -> u64 {
        self.newest += 1;
        let turn = Turn {
            since: now,
            doing,
            leave: Arc::clone(leave),
        };
        self.by_age.insert(self.newest, turn);
        self.newest
    }

    /// Takes out the one that leaves.
    fn leaves(&mut self, now: Instant) -> Leaves {
        let mut younger = self.by_age.len();
        let leaves = self.by_age.iter().find(|(_, turn)| {
            younger -= 1;
            let crowded = turn.doing == Doing::Waits && younger > self.crowd;
            crowded || turn.since + PATIENCE <= now
        });
        if let Some((&ticket, _)) = leaves
            && let Some(turn) = self.by_age.remove(&ticket)
        {
            return Leaves::Now(turn.leave);
        }
        let oldest = self.by_age.values().next();
        oldest.map_or(Leaves::None, |turn| Leaves::At(turn.since + PATIENCE))
    }
}

impl Places {
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Arc::new(Semaphore::new(count)),
            idle: Mutex::new(Idle {
                crowd: count / 4,
                ..Idle::default()
            }),
            more: Notify::new(),
            said: AtomicBool::new(false),
        })
    }

    /// A place for a new connection; waits while requests are answered on all others.
    pub(super) async fn take(self: &Arc<Self>) -> Arc<Place> {
        // In one queue all the time: another address' listener may get the place that was made for this one.
        let mut free = pin!(Arc::clone(&self.free).acquire_owned());
        let permit = loop {
            tokio::select! {
                biased;
                permit = &mut free => break permit,
                () = self.make_room() => {}
            }
            if let Ok(permit) = timeout(PATIENCE, &mut free).await {
                break permit;
            }
        };
        Arc::new(Place {
            places: Arc::clone(self),
            leave: Arc::default(),
            now: Mutex::new(Now {
                doing: Doing::New,
                ticket: 0,
            }),
            _permit: permit.expect("nobody closes the semaphore"),
        })
    }

    /// Has a connection end that can give way, once there is one.
    async fn make_room(&self) {
        loop {
            let leaves = self.idle().leaves(Instant::now());
            match leaves {
                Leaves::Now(leave) => {
                    leave.notify_one();
                    if !self.said.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            "all connections that may be are there: for each more, the one is dropped that has waited \
                             longest for its request, or not read its answer (said once)"
                        );
                    }
                    return;
                }
                Leaves::At(time) => tokio::select! {
                    () = self.more.notified() => {}
                    () = sleep_until(time) => {}
                },
                Leaves::None => self.more.notified().await,
            }
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a connection is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// What it sent was not looked at yet.
    New,
    /// For a request, or for the rest of one.
    Waits,
    Answered,
    /// It has to read the rest of its answer.
    Reads,
    /// It was told to.
    Leaves,
}

#[derive(Debug)]
struct Now {
    doing: Doing,
    /// Where it is among the idle ones, or was.
    ticket: u64,
}

/// A connection's, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    leave: Arc<Notify>,
    now: Mutex<Now>,
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
        self.goes(&[Doing::New, Doing::Waits, Doing::Reads], Doing::Answered);
        Answering(Arc::clone(self))
    }

    /// All that has come was read, and is no whole request.
    pub(super) fn nothing_to_read(&self) {
        self.goes(&[Doing::New], Doing::Waits);
    }

    /// Some bytes of the answer were taken by the kernel.
    pub(super) fn wrote(&self) {
        self.goes(&[Doing::Reads], Doing::Reads);
    }

    /// All were.
    pub(super) fn flushed(&self) {
        self.goes(&[Doing::Reads], Doing::Waits);
    }

    /// Only from one of these.
    fn goes(&self, from: &[Doing], to: Doing) {
        let mut now = self.now();
        if !from.contains(&now.doing) {
            return;
        }
        let was_idle = now.doing.is_idle();
        now.doing = to;
        let mut idle = self.places.idle();
        if was_idle && idle.by_age.remove(&now.ticket).is_none() {
            now.doing = Doing::Leaves;
        } else if to.is_idle() {
            now.ticket = idle.add(to, &self.leave, Instant::now());
            drop(idle);
            self.places.more.notify_one();
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Doing {
    const fn is_idle(self) -> bool {
        matches!(self, Self::Waits | Self::Reads)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ticket = self.now().ticket;
        self.places.idle().by_age.remove(&ticket);
    }
}

/// While it lives, its connection is not idle.
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
        self.0.goes(&[Doing::Answered], Doing::Reads);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// With a crowd of one; what each does, and for how many milliseconds. Who leaves, by place, or how long to wait.
    fn leaves(turns: &[(Doing, u64)]) -> (Option<usize>, Option<u64>) {
        let now = Instant::now() + Duration::from_secs(1);
        let mut idle = Idle {
            crowd: 1,
            ..Idle::default()
        };
        let places: Vec<Arc<Notify>> = turns.iter().map(|_| Arc::default()).collect();
        for ((doing, ms), leave) in turns.iter().zip(&places) {
            idle.add(*doing, leave, now - Duration::from_millis(*ms));
        }
        match idle.leaves(now) {
            Leaves::Now(leave) => {
                assert_eq!(idle.by_age.len(), turns.len() - 1);
                let place = places.iter().position(|it| Arc::ptr_eq(it, &leave));
                (place, None)
            }
            Leaves::At(time) => (None, Some((time - now).as_millis() as u64)),
            Leaves::None => (None, None),
        }
    }

    #[test]
    fn who_did_nothing_for_longest_leaves_and_nobody_too_soon() {
        use Doing::{Reads, Waits};
        assert_eq!(leaves(&[]), (None, None));
        assert_eq!(leaves(&[(Waits, 100), (Waits, 99)]), (Some(0), None));
        assert_eq!(leaves(&[(Reads, 100), (Waits, 99)]), (Some(0), None));
        assert_eq!(leaves(&[(Waits, 99), (Reads, 98)]), (None, Some(1)));
        // In a crowd at once, but not with a part of an answer.
        let crowd = [(Waits, 3), (Waits, 2), (Waits, 1)];
        assert_eq!(leaves(&crowd), (Some(0), None));
        assert_eq!(
            leaves(&[(Reads, 3), (Waits, 2), (Waits, 1)]),
            (None, Some(97))
        );
        let behind = [(Reads, 4), (Waits, 3), (Waits, 2), (Waits, 1)];
        assert_eq!(leaves(&behind), (Some(1), None));
    }
}
