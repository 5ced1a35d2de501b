//! The streams that read along: what each wants to see goes into its own bounded queue; what finds no room is
//! counted, and the reader is told.

use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::filter::Subscription;
use crate::model::{Line, Loss, LossReason};
use crate::table::Change;

/// Lines that go to a reader together.
pub type Batch = Vec<Line>;

/// A queue holds this many batches of up to [`BATCH_LINES`] lines: some 16 MB, and a third of a second at 200,000
/// lines a second.
const QUEUE_BATCHES: usize = 64;
const BATCH_LINES: usize = 1024;

/// Each costs the tracer's thread its filter and its lines, and up to a full queue of memory.
pub const MOST_STREAMS: usize = 16;

/// How long the last lines may take to find room.
const FINISH: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Streams {
    streams: Vec<Stream>,
    /// Over all streams, those that ended too.
    dropped: u64,
}

pub struct Stream {
    subscription: Subscription,
    /// Free again when the stream is gone.
    _place: OwnedSemaphorePermit,
    /// What happened before is not this reader's; `CLOCK_BOOTTIME`, nanoseconds.
    since_ns: u64,
    queue: mpsc::Sender<Batch>,
    batch: Batch,
    /// Lines that found no room and have not been told of.
    dropped: u64,
    /// Unix time of the last of them.
    dropped_ns: u64,
}

impl Streams {
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    pub fn add(&mut self, stream: Stream) {
        self.streams.push(stream);
    }

    pub fn push(&mut self, change: &Change<'_>, boot_to_unix_ns: i64) {
        for stream in &mut self.streams {
            if change.time_ns >= stream.since_ns
                && let Some(transition) = change.line(stream.subscription.raw, boot_to_unix_ns)
                && stream.subscription.matches(&transition)
            {
                stream.batch.push(Line::Transition(transition));
                if stream.batch.len() >= BATCH_LINES {
                    self.dropped += stream.send();
                }
            }
        }
    }

    /// Every reader is told of a loss: whether the events would have passed its filters nobody knows.
    pub fn lost(&mut self, loss: Loss) {
        for stream in &mut self.streams {
            stream.lost(loss);
        }
    }

    /// Hands on what has gathered, and forgets readers that are gone.
    pub fn flush(&mut self) {
        for stream in &mut self.streams {
            self.dropped += stream.send();
        }
        self.streams.retain(|stream| !stream.queue.is_closed());
    }

    /// Hands on the last lines, and ends the streams.
    pub async fn finish(self) {
        for mut stream in self.streams {
            let batch = stream.take_batch();
            if !batch.is_empty() {
                // A reader that does not read even now learns from the stream's end.
                let _ = stream.queue.send_timeout(batch, FINISH).await;
            }
        }
    }
}

impl Stream {
    /// A stream of what happens from `since_ns` on, and where its reader finds it.
    pub fn new(
        subscription: Subscription,
        since_ns: u64,
        place: OwnedSemaphorePermit,
    ) -> (Self, mpsc::Receiver<Batch>) {
        let (queue, batches) = mpsc::channel(QUEUE_BATCHES);
        let stream = Self {
            subscription,
            _place: place,
            since_ns,
            queue,
            batch: Vec::new(),
            dropped: 0,
            dropped_ns: 0,
        };
        (stream, batches)
    }

    /// Losses in a row with one reason are one, so that a reader that stands still costs no more and more.
    fn lost(&mut self, loss: Loss) {
        let behind = self.batch.iter_mut().rev().map_while(|line| match line {
            Line::Lost(loss) => Some(loss),
            Line::Start(_) | Line::Transition(_) | Line::Socket(_) => None,
        });
        match behind.into_iter().find(|known| known.reason == loss.reason) {
            Some(known) => known.count += loss.count,
            None => self.batch.push(Line::Lost(loss)),
        }
    }

    fn take_batch(&mut self) -> Batch {
        let mut batch = std::mem::take(&mut self.batch);
        if self.dropped > 0 {
            let loss = Loss {
                time_ns: self.dropped_ns,
                count: std::mem::take(&mut self.dropped),
                reason: LossReason::SlowReader,
            };
            batch.insert(0, Line::Lost(loss));
        }
        batch
    }

    /// Gives how many lines found no room.
    fn send(&mut self) -> u64 {
        if self.batch.is_empty() && self.dropped == 0 {
            return 0;
        }
        // Nobody else sends: room that is there now stays, but for a reader that goes away.
        match self.queue.capacity() {
            1.. => {
                let batch = self.take_batch();
                let _ = self.queue.try_send(batch);
                0
            }
            // There is room here still.
            0 if self.batch.len() < BATCH_LINES => 0,
            0 => {
                let before = self.batch.len();
                let dropped_ns = &mut self.dropped_ns;
                // Other losses are kept for when there is room: they are few.
                self.batch.retain(|line| match line {
                    Line::Transition(transition) => {
                        *dropped_ns = transition.time_ns;
                        false
                    }
                    Line::Start(_) | Line::Socket(_) | Line::Lost(_) => true,
                });
                let dropped = (before - self.batch.len()) as u64;
                self.dropped += dropped;
                dropped
            }
        }
    }
}
