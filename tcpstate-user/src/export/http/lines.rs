//! The body of a stream. It takes from its queue only what the connection has room for, so that a reader that stalls is
//! seen by the side that fills the queue, and counted there.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use tokio::sync::mpsc;

use super::Subscribed;
use crate::export::LineWriter;
use crate::model::Line;

/// Bytes after which a frame is handed to the connection.
const FRAME: usize = 32 << 10;

pub struct Lines {
    writer: LineWriter,
    /// Taken from the queue and not written yet.
    pending: std::vec::IntoIter<Line>,
    batches: mpsc::Receiver<Vec<Line>>,
}

impl Lines {
    pub fn new(subscribed: Subscribed) -> Self {
        Self {
            writer: LineWriter::json(),
            pending: vec![Line::Start(subscribed.start)].into_iter(),
            batches: subscribed.batches,
        }
    }
}

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        while this.pending.len() == 0 {
            match ready!(this.batches.poll_recv(cx)) {
                Some(batch) => this.pending = batch.into_iter(),
                None => return Poll::Ready(None),
            }
        }
        let mut frame = Vec::new();
        while frame.len() < FRAME
            && let Some(line) = this.pending.next()
        {
            this.writer.write(&line, &mut frame);
        }
        Poll::Ready(Some(Ok(Frame::data(frame.into()))))
    }
}
