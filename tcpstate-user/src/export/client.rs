//! The other end of what the daemon streams: what `tcpstate watch` and `tcpstate list` read when a daemon runs.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::{ParseError, parse_line};
use crate::filter::{Selection, Subscription};
use crate::model::Line;

/// For connecting and the head of the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than any line is long.
const LONGEST_LINE: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no daemon's socket at {}; start `tcpstate daemon`, or leave out --socket", .0.display())]
    NotFound(PathBuf),
    #[error("nobody serves the socket {}; start `tcpstate daemon`, or leave out --socket", .0.display())]
    NotServed(PathBuf),
    #[error(
        "permission denied on the socket {}; join the group that `ls -l` shows for it, or run as root",
        .0.display()
    )]
    PermissionDenied(PathBuf),
    /// In the daemon's words.
    #[error("the daemon refuses: {0}")]
    Refused(String),
    #[error("what serves the socket {} is no tcpstate daemon: {problem}", .path.display())]
    NoDaemon { path: PathBuf, problem: String },
    #[error("can't read from the socket {}: {error}", .path.display())]
    Io { path: PathBuf, error: io::Error },
}

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("the connection to the daemon broke: {0}")]
    Broken(#[from] hyper::Error),
    #[error("the daemon sent what can't be read: {0}")]
    Line(#[from] ParseError),
    #[error("the daemon sent a line of more than {LONGEST_LINE} bytes")]
    TooLong,
    #[error("the daemon sent a line that is no text")]
    NoText,
}

/// A stream that the daemon sends.
pub struct Events {
    body: Incoming,
    /// The beginning of a line whose end has not come.
    rest: Vec<u8>,
    /// The task that reads and writes the connection: ends with this.
    _driver: JoinSet<()>,
}

impl Events {
    /// # Errors
    /// No daemon, none that one may talk to, or none that wants to.
    pub async fn connect(path: &Path, subscription: &Subscription) -> Result<Self, ConnectError> {
        Self::open(path, &format!("/v1/events?{}", subscription.to_query())).await
    }

    /// The sockets that exist now: a stream that ends.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn list(path: &Path, selection: &Selection) -> Result<Self, ConnectError> {
        Self::open(path, &format!("/v1/sockets?{}", selection.to_query())).await
    }

    async fn open(path: &Path, target: &str) -> Result<Self, ConnectError> {
        let asked = tokio::time::timeout(PATIENCE, Self::ask(path, target));
        asked.await.unwrap_or_else(|_| {
            Err(ConnectError::NoDaemon {
                path: path.to_owned(),
                problem: format!("no answer within {} s", PATIENCE.as_secs()),
            })
        })
    }

    async fn ask(path: &Path, target: &str) -> Result<Self, ConnectError> {
        let no_daemon = |error: hyper::Error| ConnectError::NoDaemon {
            path: path.to_owned(),
            problem: error.to_string(),
        };
        let socket = UnixStream::connect(path)
            .await
            .map_err(|error| unconnected(path, error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket))
            .await
            .map_err(no_daemon)?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // What goes wrong shows in the answer or its body.
            let _ = connection.await;
        });
        let request = Request::get(target)
            .header(header::HOST, "localhost")
            .body(Empty::<Bytes>::new())
            .expect("a query is a valid part of a path");
        let response = sender.send_request(request).await.map_err(no_daemon)?;
        let (head, body) = response.into_parts();
        let events = Self {
            body,
            rest: Vec::new(),
            _driver: driver,
        };
        if head.status == StatusCode::OK {
            return Ok(events);
        }
        Err(events.refusal(head.status, path).await)
    }

    async fn refusal(mut self, status: StatusCode, path: &Path) -> ConnectError {
        let said = Limited::new(&mut self.body, LONGEST_LINE).collect().await;
        let said = said.map(|said| said.to_bytes()).unwrap_or_default();
        let line = String::from_utf8_lossy(&said);
        let line = line.lines().next().unwrap_or_default();
        if line.is_empty() || status == StatusCode::NOT_FOUND {
            return ConnectError::NoDaemon {
                path: path.to_owned(),
                problem: format!("it answers {status}"),
            };
        }
        ConnectError::Refused(line.escape_debug().to_string())
    }

    /// The next lines, at least one; `None` when the daemon ended the stream. May be cancelled without loss.
    ///
    /// # Errors
    /// The connection broke, or a line can't be read.
    pub async fn next(&mut self) -> Result<Option<Vec<Line>>, StreamError> {
        loop {
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            let Ok(data) = frame?.into_data() else {
                continue;
            };
            let lines = self.lines(&data)?;
            if !lines.is_empty() {
                return Ok(Some(lines));
            }
        }
    }

    fn lines(&mut self, data: &[u8]) -> Result<Vec<Line>, StreamError> {
        self.rest.extend_from_slice(data);
        let whole = match self.rest.iter().rposition(|&byte| byte == b'\n') {
            Some(end) => {
                let rest = self.rest.split_off(end + 1);
                std::mem::replace(&mut self.rest, rest)
            }
            None => Vec::new(),
        };
        if self.rest.len() > LONGEST_LINE {
            return Err(StreamError::TooLong);
        }
        let text = std::str::from_utf8(&whole).map_err(|_| StreamError::NoText)?;
        let mut lines = Vec::new();
        for line in text.lines() {
            lines.extend(parse_line(line)?.map(|(_, line)| line));
        }
        Ok(lines)
    }
}

fn unconnected(path: &Path, error: io::Error) -> ConnectError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => ConnectError::NotFound(path),
        io::ErrorKind::ConnectionRefused => ConnectError::NotServed(path),
        io::ErrorKind::PermissionDenied => ConnectError::PermissionDenied(path),
        _ => ConnectError::Io { path, error },
    }
}
