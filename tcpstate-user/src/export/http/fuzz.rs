//! Properties of what is asked over HTTP, for [`crate::fuzz`].

use std::pin::pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};

use axum::http::{Request, Uri};
use http_body_util::BodyExt as _;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;

use super::*;
use crate::export::parse_line;
use crate::fuzz::shown;
use crate::model::{NetnsSelection, Source};

/// Whatever is asked for is answered, with a line where it can't be had; and over TCP nothing of sockets is.
pub fn http(target: &[u8]) {
    static PUBLIC: LazyLock<Router> =
        LazyLock::new(|| public(Arc::new(Fake { is_public: true }), "/metrics"));
    static LOCAL: LazyLock<Router> =
        LazyLock::new(|| local(Arc::new(Fake { is_public: false }), "/metrics"));
    let Ok(uri) = Uri::try_from(target) else {
        return;
    };
    for router in [&PUBLIC, &LOCAL] {
        let (status, body) = ask(router, uri.clone());
        match status {
            StatusCode::OK if uri.path().starts_with("/v1/") => {
                let line = body.strip_suffix('\n').expect("a whole line");
                let (_, line) = parse_line(line).expect("JSON").expect("a start");
                assert_eq!(line, Line::Start(start()));
            }
            StatusCode::OK => assert!(!body.is_empty()),
            StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND => {
                let line = body.strip_suffix('\n').expect("a whole line");
                shown(line, target.len());
            }
            other => panic!("{other}: {body}"),
        }
    }
}

/// Checks that the metrics can be had under this path.
pub(crate) fn serves(telemetry_path: &str) {
    let uri = Uri::try_from(telemetry_path).expect("a path");
    let router = local(Arc::new(Fake { is_public: false }), telemetry_path);
    assert_eq!(ask(&router, uri), (StatusCode::OK, "up 1\n".to_owned()));
}

/// `/etc/group`.
pub(crate) fn groups(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Some(gid) = unix::gid_of("tcpstate", &text) {
        assert!(text.contains(&gid.to_string()));
    }
}

fn ask(router: &Router, target: Uri) -> (StatusCode, String) {
    let request = Request::get(target).body(Body::empty());
    let service = TowerToHyperService::new(router.clone());
    let response = at_once(service.call(request.expect("a request")));
    let (head, body) = response.expect("an answer").into_parts();
    let body = at_once(body.collect()).expect("a whole body").to_bytes();
    let body = String::from_utf8(body.to_vec()).expect("text");
    (head.status, body)
}

/// Nothing here waits for anything.
fn at_once<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("an answer that does not come"),
    }
}

struct Fake {
    is_public: bool,
}

impl Fake {
    /// A stream that ends.
    fn stream(&self) -> Result<Subscribed, Refusal> {
        assert!(!self.is_public, "sockets are told over TCP");
        let (_, batches) = mpsc::channel(1);
        Ok(Subscribed {
            start: start(),
            batches,
        })
    }
}

impl Backend for Fake {
    async fn metrics(&self) -> Result<Bytes, Refusal> {
        Ok(Bytes::from_static(b"up 1\n"))
    }

    fn is_ready(&self) -> bool {
        true
    }

    async fn subscribe(&self, _: Subscription) -> Result<Subscribed, Refusal> {
        self.stream()
    }

    async fn list(&self, _: Selection) -> Result<Subscribed, Refusal> {
        self.stream()
    }
}

/// Of a stream from nobody.
pub(super) fn start() -> Start {
    Start {
        time_ns: 1,
        host: "h".to_owned(),
        boot_id: "b".to_owned(),
        version: "v".to_owned(),
        source: Source::Daemon,
        netns: NetnsSelection::All,
    }
}
