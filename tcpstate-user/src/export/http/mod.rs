//! What the daemon serves over HTTP, on TCP and on its Unix socket: which paths there are, and what they answer.
//!
//! Addresses and process names leave through the Unix socket only: on TCP there is no `/v1`. What the answers are made
//! of comes from a [`Backend`]; how connections are kept in bounds is `serve`'s.

#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod landing;
mod lines;
mod places;
mod serve;
mod unix;
mod watched;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use tokio::sync::mpsc;

pub use serve::{Limits, Listeners, bind_tcp, serve};
pub use unix::{BindError, DEFAULT_SOCKET, UnixSocket};

use crate::export::prometheus;
use crate::filter::{Selection, Subscription};
use crate::model::{Line, Start};

/// What the answers are made of.
pub trait Backend: Send + Sync + 'static {
    /// The metrics page, in the Prometheus text format.
    ///
    /// # Errors
    /// There is none now.
    fn metrics(&self) -> impl Future<Output = Result<Bytes, Refusal>> + Send;

    /// The first snapshot is merged.
    fn is_ready(&self) -> bool;

    /// # Errors
    /// The stream can't be had; the reader is told why.
    fn subscribe(
        &self,
        subscription: Subscription,
    ) -> impl Future<Output = Result<Subscribed, Refusal>> + Send;

    /// The sockets that exist now, as a stream that ends.
    ///
    /// # Errors
    /// The list can't be had; the reader is told why.
    fn list(
        &self,
        selection: Selection,
    ) -> impl Future<Output = Result<Subscribed, Refusal>> + Send;
}

/// A stream for one reader.
pub struct Subscribed {
    pub start: Start,
    /// What it asked for, and what it lost. The stream ends when the sender is dropped; the receiver is dropped when
    /// the reader has gone.
    pub batches: mpsc::Receiver<Vec<Line>>,
}

/// Why there is no answer; one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It asks for what can't be: 400.
    Bad(String),
    /// Not now: 503.
    Busy(String),
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, line) = match self {
            Self::Bad(line) => (StatusCode::BAD_REQUEST, line),
            Self::Busy(line) => (StatusCode::SERVICE_UNAVAILABLE, line),
        };
        (status, line + "\n").into_response()
    }
}

/// What TCP serves.
fn public<B: Backend>(backend: Arc<B>, telemetry_path: &str) -> Router {
    with_refusals(public_paths(telemetry_path)).with_state(backend)
}

/// What the Unix socket serves.
fn local<B: Backend>(backend: Arc<B>, telemetry_path: &str) -> Router {
    let paths = public_paths(telemetry_path)
        .route("/v1/events", get(events::<B>))
        .route("/v1/sockets", get(sockets::<B>));
    with_refusals(paths).with_state(backend)
}

fn public_paths<B: Backend>(telemetry_path: &str) -> Router<Arc<B>> {
    let landing = Html(landing::page(telemetry_path));
    Router::new()
        .route(telemetry_path, get(metrics::<B>))
        .route("/", get(async || landing))
        .route("/-/healthy", get(async || "healthy\n"))
        .route("/-/ready", get(ready::<B>))
}

/// What can't be asked for is answered with a line too.
fn with_refusals<B: Backend>(paths: Router<Arc<B>>) -> Router<Arc<B>> {
    let no_path = "no such path; / shows what there is\n";
    let no_method = "only GET and HEAD are answered\n";
    paths
        .fallback(async move || (StatusCode::NOT_FOUND, no_path))
        .method_not_allowed_fallback(async move || (StatusCode::METHOD_NOT_ALLOWED, no_method))
}

async fn metrics<B: Backend>(State(backend): State<Arc<B>>) -> Result<Response, Refusal> {
    let page = backend.metrics().await?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], page).into_response())
}

async fn ready<B: Backend>(State(backend): State<Arc<B>>) -> (StatusCode, &'static str) {
    if backend.is_ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "not ready: the first snapshot is not merged yet\n",
        )
    }
}

async fn events<B: Backend>(
    State(backend): State<Arc<B>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let subscription = Subscription::from_query(query.as_deref().unwrap_or_default())
        .map_err(|error| Refusal::Bad(error.to_string()))?;
    Ok(lines(backend.subscribe(subscription).await?))
}

async fn sockets<B: Backend>(
    State(backend): State<Arc<B>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let selection = Selection::from_query(query.as_deref().unwrap_or_default())
        .map_err(|error| Refusal::Bad(error.to_string()))?;
    Ok(lines(backend.list(selection).await?))
}

fn lines(subscribed: Subscribed) -> Response {
    let lines = lines::Lines::new(subscribed);
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (kind, Body::new(lines)).into_response()
}

#[cfg(test)]
mod tests;
