//! The metrics page, made for all that wait for it: however many ask, one is made at a time.

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::tracer::Tracer;
use crate::export::http::Refusal;
use crate::export::process::ProcessReader;
use crate::export::prometheus;

type Page = Result<Bytes, Refusal>;

/// That wait in the queue; more wait for a place there, and leave nothing if they give up.
const ASKS: usize = 64;

/// Who asks while a page is made gets the next one, for what happened meanwhile is not in this one.
#[derive(Clone)]
pub struct Pages(mpsc::Sender<oneshot::Sender<Page>>);

impl Pages {
    /// Must be called within a runtime; ends with the last handle.
    pub fn new(tracer: Tracer) -> Self {
        let process = ProcessReader::new();
        Self::made_by(move || {
            let tracer = tracer.clone();
            async move { make(&tracer, process).await }
        })
    }

    fn made_by<F>(make: impl Fn() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Page> + Send + 'static,
    {
        let (asks, mut asked) = mpsc::channel(ASKS);
        tokio::spawn(async move {
            let mut waiting: Vec<oneshot::Sender<Page>> = Vec::new();
            while asked.recv_many(&mut waiting, ASKS).await > 0 {
                // A task of its own, so that a panic costs one page. Its message is on stderr then.
                let page = tokio::spawn(make()).await;
                let page = page
                    .unwrap_or_else(|_| Err(Refusal::Busy("making the page panicked".to_owned())));
                for reply in waiting.drain(..) {
                    // Who asked may have given up.
                    let _ = reply.send(page.clone());
                }
            }
        });
        Self(asks)
    }

    /// Of what happened up to now.
    pub async fn page(&self) -> Page {
        let stopped = |_| Refusal::Busy("the daemon is ending".to_owned());
        let (reply, page) = oneshot::channel();
        self.0.send(reply).await.map_err(|_| stopped(()))?;
        page.await.unwrap_or_else(|_| Err(stopped(())))
    }
}

async fn make(tracer: &Tracer, process: ProcessReader) -> Page {
    let view = tracer.view().await;
    let view = view.map_err(|error| Refusal::Busy(error.to_string()))?;
    let build = prometheus::BuildInfo {
        version: env!("CARGO_PKG_VERSION"),
        revision: env!("TCPSTATE_REVISION"),
        netns: tracer.netns(),
    };
    prometheus::page(&view, &process.read(), &build)
        .map(Bytes::from)
        .map_err(|error| Refusal::Busy(format!("the page can't be made: {error}")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::Semaphore;
    use tokio::task::yield_now;

    use super::*;

    #[tokio::test]
    async fn who_asks_while_a_page_is_made_shares_the_next() {
        let (begun, finish) = (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(0)));
        let (counted, may) = (Arc::clone(&begun), Arc::clone(&finish));
        let pages = Pages::made_by(move || {
            let number = counted.fetch_add(1, Ordering::Relaxed) + 1;
            let may = Arc::clone(&may);
            async move {
                may.acquire().await.expect("open").forget();
                Ok(Bytes::from(number.to_string()))
            }
        });
        let ask = || {
            let pages = pages.clone();
            tokio::spawn(async move { pages.page().await.unwrap() })
        };
        let first = ask();
        while begun.load(Ordering::Relaxed) == 0 {
            yield_now().await;
        }
        let others = [ask(), ask(), ask()];
        yield_now().await;
        finish.add_permits(1);
        assert_eq!(first.await.unwrap(), "1");
        finish.add_permits(1);
        for other in others {
            assert_eq!(other.await.unwrap(), "2");
        }
        assert_eq!(begun.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_panic_costs_one_page() {
        let begun = AtomicU64::new(0);
        let pages = Pages::made_by(move || {
            let number = begun.fetch_add(1, Ordering::Relaxed);
            async move {
                assert!(number > 0, "the first can't be made");
                Ok(Bytes::new())
            }
        });
        assert!(matches!(pages.page().await, Err(Refusal::Busy(_))));
        assert_eq!(pages.page().await.unwrap(), Bytes::new());
    }
}
