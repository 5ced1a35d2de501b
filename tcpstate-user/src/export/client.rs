//! The other end of what the daemon streams: what `tcpstate watch` and `tcpstate list` read when a daemon runs.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::{ParseError, parse_line};
use crate::filter::{Selection, Span, Subscription};
use crate::model::{Line, Start};

/// How long a daemon may take until its stream begins, where nobody is in a greater hurry.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// More than any line is long.
const LONGEST_LINE: usize = 64 << 10;

/// Each is a whole line.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no daemon's socket at {}; start `tcpstate daemon`, or leave out --socket", .0.display())]
    NotFound(PathBuf),
    #[error("nobody serves the socket {}; start `tcpstate daemon`, or leave out --socket", .0.display())]
    NotServed(PathBuf),
    #[error("{} is no socket; expected the one that `tcpstate daemon` serves", .0.display())]
    NotASocket(PathBuf),
    #[error(
        "permission denied on the socket {}; join the group that `ls -l` shows for it, or run as root",
        .0.display()
    )]
    PermissionDenied(PathBuf),
    #[error(
        "nobody seems to serve the socket {}, on which permission is denied; start `tcpstate daemon`, or run as root",
        .0.display()
    )]
    Abandoned(PathBuf),
    #[error(
        "the daemon at {} does not answer within {}; `--direct` traces without it",
        .path.display(), Span(*.patience)
    )]
    NoAnswer { path: PathBuf, patience: Duration },
    #[error(
        "the filters make a request of {0} bytes; expected less than 65,535; `--direct` takes longer ones"
    )]
    TooLong(usize),
    /// In the daemon's words.
    #[error("the daemon refuses: {0}")]
    Refused(String),
    #[error("what serves the socket {} is no tcpstate daemon: {problem}", .path.display())]
    NoDaemon { path: PathBuf, problem: String },
    #[error("can't read from the socket {}: {error}", .path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// What the daemon did.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("went away in mid-stream")]
    Broken,
    #[error("sent what can't be read: {0}")]
    Line(ParseError),
    #[error("sent a line of more than {LONGEST_LINE} bytes")]
    TooLong,
    #[error("sent a line that is no text")]
    NoText,
}

/// A stream that the daemon sends.
pub struct Events {
    start: Start,
    /// The lines that came first, from the start on.
    first: Option<Vec<Line>>,
    body: Body,
}

struct Body {
    incoming: Incoming,
    lines: Lines,
    /// The task that reads and writes the connection: ends with this.
    _driver: JoinSet<()>,
}

impl Events {
    /// # Errors
    /// No daemon, none that one may talk to, or none that wants to.
    pub async fn connect(
        path: &Path,
        subscription: &Subscription,
        patience: Duration,
    ) -> Result<Self, ConnectError> {
        let target = format!("/v1/events?{}", subscription.to_query());
        Self::open(path, &target, patience).await
    }

    /// The sockets that exist now: a stream that ends.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn list(path: &Path, selection: &Selection) -> Result<Self, ConnectError> {
        let target = format!("/v1/sockets?{}", selection.to_query());
        Self::open(path, &target, PATIENCE).await
    }

    async fn open(path: &Path, target: &str, patience: Duration) -> Result<Self, ConnectError> {
        let asked = tokio::time::timeout(patience, Self::ask(path, target));
        asked.await.unwrap_or_else(|_| {
            let path = path.to_owned();
            Err(ConnectError::NoAnswer { path, patience })
        })
    }

    async fn ask(path: &Path, target: &str) -> Result<Self, ConnectError> {
        let no_daemon = |problem: String| ConnectError::NoDaemon {
            path: path.to_owned(),
            problem,
        };
        let no_http = |error: hyper::Error| {
            let problem = if error.is_parse() {
                "it does not speak HTTP"
            } else {
                "it ends the connection"
            };
            no_daemon(problem.to_owned())
        };
        let socket = UnixStream::connect(path)
            .await
            .map_err(|error| unconnected(path, error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket))
            .await
            .map_err(no_http)?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // What goes wrong shows in the answer or its body.
            let _ = connection.await;
        });
        let request = Request::get(target)
            .header(header::HOST, "localhost")
            .body(Empty::<Bytes>::new())
            // A query is a valid part of a path; `http` takes less than 64 KiB of both.
            .map_err(|_| ConnectError::TooLong(target.len()))?;
        let response = sender.send_request(request).await.map_err(no_http)?;
        let (head, incoming) = response.into_parts();
        let mut body = Body {
            incoming,
            lines: Lines::default(),
            _driver: driver,
        };
        if head.status != StatusCode::OK {
            return Err(body.refusal(head.status, path).await);
        }
        let first = body.next().await;
        let first = first.map_err(|error| no_daemon(format!("it {error}")))?;
        match first.as_deref() {
            Some([Line::Start(start), ..]) => Ok(Self {
                start: start.clone(),
                first,
                body,
            }),
            _ => Err(no_daemon(
                "its stream does not begin as one does".to_owned(),
            )),
        }
    }

    /// What the stream is of.
    #[must_use]
    pub const fn start(&self) -> &Start {
        &self.start
    }

    /// The next lines, at least one; `None` when the daemon ended the stream. May be cancelled without loss.
    ///
    /// # Errors
    /// The connection broke, or a line can't be read.
    pub async fn next(&mut self) -> Result<Option<Vec<Line>>, StreamError> {
        match self.first.take() {
            Some(first) => Ok(Some(first)),
            None => self.body.next().await,
        }
    }
}

impl Body {
    async fn refusal(mut self, status: StatusCode, path: &Path) -> ConnectError {
        let said = Limited::new(&mut self.incoming, LONGEST_LINE)
            .collect()
            .await;
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

    async fn next(&mut self) -> Result<Option<Vec<Line>>, StreamError> {
        loop {
            let Some(frame) = self.incoming.frame().await else {
                return Ok(None);
            };
            let Ok(data) = frame.map_err(|_| StreamError::Broken)?.into_data() else {
                continue;
            };
            let lines = self.lines.add(&data)?;
            if !lines.is_empty() {
                return Ok(Some(lines));
            }
        }
    }
}

/// Puts lines together, however the bytes are cut.
#[derive(Default)]
pub(super) struct Lines {
    /// The beginning of a line whose end has not come.
    rest: Vec<u8>,
}

impl Lines {
    /// Those that end within `data`.
    pub(super) fn add(&mut self, data: &[u8]) -> Result<Vec<Line>, StreamError> {
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
            let parsed = parse_line(line).map_err(StreamError::Line)?;
            lines.extend(parsed.map(|(_, line)| line));
        }
        Ok(lines)
    }
}

fn unconnected(path: &Path, error: io::Error) -> ConnectError {
    let is_socket = || fs::metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => ConnectError::NotFound(path),
        // The kernel's answer for any file.
        io::ErrorKind::ConnectionRefused if !is_socket() => ConnectError::NotASocket(path),
        io::ErrorKind::ConnectionRefused => ConnectError::NotServed(path),
        io::ErrorKind::PermissionDenied if seems_served(&path) => {
            ConnectError::PermissionDenied(path)
        }
        io::ErrorKind::PermissionDenied => ConnectError::Abandoned(path),
        _ => ConnectError::Io { path, error },
    }
}

/// Whether somebody in this network namespace listens under that name. Another name of the same file is not known.
fn seems_served(path: &Path) -> bool {
    let sockets = fs::read("/proc/self/net/unix").unwrap_or_default();
    listening(&sockets).any(|name| name == path.as_os_str().as_bytes())
}

/// Names of the sockets that listen, in a `/proc/net/unix`.
pub(super) fn listening(sockets: &[u8]) -> impl Iterator<Item = &[u8]> {
    /// `__SO_ACCEPTCON`.
    const LISTENS: &[u8] = b"00010000";
    sockets.split(|&byte| byte == b'\n').filter_map(|line| {
        // Flags are the fourth field, the name is what follows the inode, the seventh.
        let name = line.iter().position(|&byte| byte == b'/')?;
        let mut fields = line[..name].split(|&byte| byte == b' ');
        (fields.nth(3)? == LISTENS).then_some(&line[name..])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_is_seen_in_proc() {
        let sockets = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            ffff8881: 00000002 00000000 00010000 0001 01 18234 /run/a b\n\
            ffff8882: 00000003 00000000 00000000 0001 03 18235 /run/connected\n\
            ffff8883: 00000002 00000000 00010000 0001 01 18236\n";
        assert_eq!(listening(sockets).collect::<Vec<_>>(), [b"/run/a b"]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(seems_served(&path));
        drop(listener);
        assert!(!seems_served(&path));
    }
}
