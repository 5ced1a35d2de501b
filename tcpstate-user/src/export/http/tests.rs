//! The server over real sockets, with the crate's own client and with clients that misbehave.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::fuzz::start;
use super::*;
use crate::export::client::{ConnectError, Events};
use crate::model::{Loss, LossReason};

const SOON: Duration = Duration::from_secs(10);
/// Bytes; the kernel takes a twentieth of it for a Unix socket.
const LONG_PAGE: usize = 4 << 20;

#[derive(Default)]
struct Fake {
    ready: AtomicBool,
    /// In place of the short page.
    long_page: AtomicBool,
    /// Who subscribed, and the way to them.
    readers: Mutex<Vec<(Subscription, mpsc::Sender<Vec<Line>>)>>,
}

fn line(count: u64) -> Line {
    Line::Lost(Loss {
        time_ns: 1,
        count,
        reason: LossReason::SlowReader,
    })
}

impl Backend for Fake {
    async fn metrics(&self) -> Result<Bytes, Refusal> {
        Ok(if self.long_page.load(Ordering::Relaxed) {
            vec![b'#'; LONG_PAGE].into()
        } else {
            Bytes::from_static(b"up 1\n")
        })
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    async fn subscribe(&self, subscription: Subscription) -> Result<Subscribed, Refusal> {
        if subscription.netns.is_some() {
            return Err(Refusal::Bad("not that namespace".to_owned()));
        }
        let mut readers = self.readers.lock().unwrap();
        if readers.len() == 2 {
            return Err(Refusal::Busy("enough readers".to_owned()));
        }
        let (sender, batches) = mpsc::channel(1);
        readers.push((subscription, sender));
        Ok(Subscribed {
            start: start(),
            batches,
        })
    }

    /// A list of two batches.
    async fn list(&self, selection: Selection) -> Result<Subscribed, Refusal> {
        if selection.netns.is_some() {
            return Err(Refusal::Bad("not that namespace".to_owned()));
        }
        let (sender, batches) = mpsc::channel(2);
        for count in [1, 2] {
            sender.try_send(vec![line(count)]).unwrap();
        }
        Ok(Subscribed {
            start: start(),
            batches,
        })
    }
}

impl Fake {
    fn take_reader(&self) -> (Subscription, mpsc::Sender<Vec<Line>>) {
        self.readers.lock().unwrap().pop().unwrap()
    }
}

struct Served {
    backend: Arc<Fake>,
    addr: std::net::SocketAddr,
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<()>,
    _folder: TempDir,
}

impl Served {
    async fn new(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let tcp = bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = tcp.local_addr().unwrap();
        let listeners = Listeners {
            tcp: vec![tcp],
            unix: Some(UnixSocket::bind(&socket).unwrap()),
        };
        let backend = Arc::new(Fake::default());
        let (stop, stopped) = oneshot::channel();
        let served = Arc::clone(&backend);
        let server = tokio::spawn(async move {
            let stopped = async { stopped.await.unwrap_or(()) };
            serve(listeners, served, "/metrics", limits, stopped).await;
        });
        Self {
            backend,
            addr,
            socket,
            stop: Some(stop),
            server,
            _folder: folder,
        }
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    async fn get(&self, path: &str) -> String {
        ask(self.tcp().await, "GET", path).await
    }

    async fn get_local(&self, path: &str) -> String {
        let socket = UnixStream::connect(&self.socket).await.unwrap();
        ask(socket, "GET", path).await
    }

    async fn events(&self, query: &str) -> Result<Events, ConnectError> {
        let subscription = Subscription::from_query(query).unwrap();
        Events::connect(&self.socket, &subscription, SOON).await
    }
}

async fn ask(mut io: impl AsyncRead + AsyncWrite + Unpin, method: &str, path: &str) -> String {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = timeout(SOON, io.read_to_string(&mut answer)).await;
    read.expect("an answer in time").unwrap();
    answer
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or(answer)
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

#[tokio::test]
async fn paths_answer_on_both_sockets_but_events_only_on_the_unix_one() {
    let served = Served::new(Limits::default()).await;
    let metrics = served.get("/metrics").await;
    assert_eq!(body(&metrics), "up 1\n");
    assert!(metrics.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"));
    assert_eq!(body(&served.get_local("/metrics").await), "up 1\n");
    assert_eq!(body(&served.get("/-/healthy").await), "healthy\n");

    let not_ready = served.get("/-/ready").await;
    assert_eq!(status(&not_ready), "503");
    served.backend.ready.store(true, Ordering::Relaxed);
    assert_eq!(status(&served.get("/-/ready").await), "200");

    for path in ["/v1/events", "/metrics/", "/v1/sockets"] {
        let missing = served.get(path).await;
        let line = "no such path; / shows what there is\n";
        assert_eq!((status(&missing), body(&missing)), ("404", line), "{path}");
    }
    let posted = ask(served.tcp().await, "POST", "/metrics").await;
    let line = "only GET and HEAD are answered\n";
    assert_eq!((status(&posted), body(&posted)), ("405", line));
    let local = UnixStream::connect(&served.socket).await.unwrap();
    let posted = ask(local, "POST", "/v1/events").await;
    assert_eq!((status(&posted), body(&posted)), ("405", line));
    let head = ask(served.tcp().await, "HEAD", "/metrics").await;
    assert_eq!((status(&head), body(&head)), ("200", ""));
}

#[tokio::test]
async fn the_landing_page_links_to_what_is_there() {
    let served = Served::new(Limits::default()).await;
    let page = served.get("/").await;
    assert!(page.contains("content-type: text/html; charset=utf-8\r\n"));
    let mut links = 0;
    for link in body(&page).split("href=\"").skip(1) {
        let (path, _) = link.split_once('"').unwrap();
        assert_ne!(status(&served.get(path).await), "404", "{path}");
        links += 1;
    }
    assert_eq!(links, 3);
}

#[tokio::test]
async fn a_stream_begins_with_its_start_and_ends_with_the_backend() {
    let served = Served::new(Limits::default()).await;
    let mut events = served.events("state=LISTEN&raw=true").await.unwrap();
    let first = timeout(SOON, events.next()).await.unwrap().unwrap();
    assert_eq!(first, Some(vec![Line::Start(start())]));

    let (subscription, sender) = served.backend.take_reader();
    assert_eq!(
        subscription,
        Subscription::from_query("state=LISTEN&raw=true").unwrap()
    );
    let mut read = Vec::new();
    // More than one frame holds.
    let sent: Vec<_> = (0..2000).map(line).collect();
    sender.send(sent.clone()).await.unwrap();
    while read.len() < sent.len() {
        let more = timeout(SOON, events.next()).await.unwrap().unwrap();
        read.extend(more.expect("the stream goes on"));
    }
    assert_eq!(read, sent);
    drop(sender);
    assert_eq!(timeout(SOON, events.next()).await.unwrap().unwrap(), None);
}

#[tokio::test]
async fn curl_sees_json_lines() {
    let served = Served::new(Limits::default()).await;
    let backend = Arc::clone(&served.backend);
    let ending = tokio::spawn(async move {
        while backend.readers.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(backend.take_reader());
    });
    let answer = served.get_local("/v1/events").await;
    ending.await.unwrap();
    assert!(answer.contains("content-type: application/x-ndjson\r\n"));
    assert!(answer.contains(r#"{"type":"start","schema":1,"seq":0,"#));
}

#[tokio::test]
async fn a_stream_that_can_not_be_is_refused_in_one_line() {
    let served = Served::new(Limits::default()).await;
    let bad = served.get_local("/v1/events?port=http").await;
    assert_eq!(status(&bad), "400");
    assert_eq!(
        body(&bad),
        "port: `http` is no port; expected 1 to 65535, or a range such as 8000-8999\n"
    );
    let refused = served.events("netns=1").await.err().unwrap();
    assert_eq!(
        refused.to_string(),
        "the daemon refuses: not that namespace"
    );
    let _readers = (
        served.events("").await.unwrap(),
        served.events("").await.unwrap(),
    );
    let busy = served.get_local("/v1/events").await;
    assert_eq!((status(&busy), body(&busy)), ("503", "enough readers\n"));
}

#[tokio::test]
async fn a_list_ends_behind_its_last_line() {
    let served = Served::new(Limits::default()).await;
    let ask = async |query: &str| {
        let selection = Selection::from_query(query).unwrap();
        Events::list(&served.socket, &selection).await
    };
    let mut list = ask("state=listen&min-age=1m").await.unwrap();
    let mut lines = Vec::new();
    while let Some(more) = timeout(SOON, list.next()).await.unwrap().unwrap() {
        lines.extend(more);
    }
    assert_eq!(lines, [Line::Start(start()), line(1), line(2)]);
    let refused = ask("netns=1").await.err().unwrap();
    assert_eq!(
        refused.to_string(),
        "the daemon refuses: not that namespace"
    );
    let bad = served.get_local("/v1/sockets?min-dwell=1s").await;
    assert_eq!(status(&bad), "400");
    assert!(
        body(&bad).starts_with("unknown parameter `min-dwell`; known: state, port, "),
        "{bad}"
    );
}

#[tokio::test]
async fn a_reader_that_leaves_is_noticed_though_nothing_is_sent() {
    let served = Served::new(Limits::default()).await;
    let events = served.events("").await.unwrap();
    let (_, sender) = served.backend.take_reader();
    drop(events);
    timeout(SOON, sender.closed()).await.expect("noticed");
}

/// A reader that stalls fills what little may be buffered, is cut off, and its queue is closed.
#[tokio::test]
async fn a_stalled_reader_is_cut_off_and_costs_little() {
    let limits = Limits {
        write: Duration::from_millis(300),
        ..Limits::default()
    };
    let served = Served::new(limits).await;
    let mut socket = UnixStream::connect(&served.socket).await.unwrap();
    let request = b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n";
    socket.write_all(request).await.unwrap();
    let mut byte = [0];
    socket.read_exact(&mut byte).await.unwrap();

    let (_, sender) = served.backend.take_reader();
    let batch: Vec<_> = (0..100).map(line).collect();
    let mut batches = 0;
    let filled = async {
        while sender.send(batch.clone()).await.is_ok() {
            batches += 1
        }
    };
    timeout(SOON, filled).await.expect("cut off");
    // A batch is 11 kB here; the kernel takes up to some 400 kB for a Unix socket.
    assert!((1..100).contains(&batches), "{batches} batches were taken");
    drop(socket);
}

#[tokio::test]
async fn a_request_that_comes_a_byte_at_a_time_is_cut_off() {
    let limits = Limits {
        header: Duration::from_millis(300),
        ..Limits::default()
    };
    let served = Served::new(limits).await;
    let (mut read, mut write) = served.tcp().await.into_split();
    let dripping = tokio::spawn(async move {
        // A header that never ends, and is never wrong.
        let request = b"GET /metrics HTTP/1.1\r\nX: ";
        for byte in request.iter().chain(std::iter::repeat(&b'x')) {
            if write.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let mut answer = Vec::new();
    let cut = timeout(SOON, read.read_to_end(&mut answer)).await;
    dripping.abort();
    // A reset is as good an end.
    let _ = cut.expect("cut off");
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
    assert_eq!(body(&served.get("/metrics").await), "up 1\n");
}

#[tokio::test]
async fn who_waits_longest_for_a_request_gives_way() {
    let limits = Limits {
        connections: 3,
        header: Duration::from_secs(60),
        ..Limits::default()
    };
    let served = Served::new(limits).await;
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    // It came first, but has been answered since: the second waits longer.
    let (mut answered, mut idle) = (served.tcp().await, served.tcp().await);
    let mut answer = [0; 12];
    answered.write_all(request).await.unwrap();
    answered.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    let _last = served.tcp().await;
    // The answer's end comes to be known behind its last byte.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(body(&served.get("/metrics").await), "up 1\n");
    let ended = timeout(SOON, idle.read(&mut answer))
        .await
        .expect("cut off");
    assert!(matches!(ended, Ok(0) | Err(_)));
    answered.write_all(request).await.expect("it is open");
    let mut rest = vec![0; 1024];
    while !rest.ends_with(b"HTTP/1.1 200") {
        rest.push(timeout(SOON, answered.read_u8()).await.unwrap().unwrap());
    }
}

#[tokio::test]
async fn who_is_being_answered_does_not_give_way() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let served = Served::new(limits).await;
    let mut first = served.events("").await.unwrap();
    let _second = served.events("").await.unwrap();
    let mut third = pin!(served.get_local("/metrics"));
    let early = timeout(Duration::from_millis(300), &mut third).await;
    assert!(early.is_err(), "there is no place");
    // The other socket has its own.
    assert_eq!(body(&served.get("/metrics").await), "up 1\n");
    assert!(first.next().await.unwrap().is_some());
    // The connection of a stream that has ended waits for its next request.
    drop(served.backend.take_reader());
    assert_eq!(body(&third.await), "up 1\n");
}

/// Who asks for one page after the other makes room for others.
#[tokio::test]
async fn where_all_places_are_taken_an_answer_is_the_last() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let served = Served::new(limits).await;
    let requests = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(10);
    let answers = async |client: &mut TcpStream| {
        client.write_all(&requests).await.unwrap();
        let mut text = Vec::new();
        let read = timeout(Duration::from_millis(500), client.read_to_end(&mut text)).await;
        let pages = String::from_utf8(text).unwrap().matches("up 1\n").count();
        (pages, read.is_ok())
    };
    let mut alone = served.tcp().await;
    assert_eq!(answers(&mut alone).await, (10, false));
    let mut second = served.tcp().await;
    assert_eq!(answers(&mut second).await, (1, true));
    assert_eq!(answers(&mut alone).await, (10, false));
}

/// It keeps its place until it has its answer, though others want it, and one that does not read loses it.
#[tokio::test]
async fn who_reads_gets_the_whole_answer_and_who_does_not_gives_way() {
    let limits = Limits {
        connections: 1,
        ..Limits::default()
    };
    let served = Served::new(limits).await;
    served.backend.long_page.store(true, Ordering::Relaxed);
    let asked = async || {
        let mut client = UnixStream::connect(&served.socket).await.unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        client.write_all(request).await.unwrap();
        let mut answer = vec![0; 12];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, b"HTTP/1.1 200");
        (client, answer)
    };
    let (mut slow, mut answer) = asked().await;
    served.backend.long_page.store(false, Ordering::Relaxed);
    let begun = Instant::now();
    let other = async {
        assert_eq!(body(&served.get_local("/metrics").await), "up 1\n");
        begun.elapsed()
    };
    let slow = async {
        let mut part = vec![0; 1 << 16];
        loop {
            let more = slow.read(&mut part).await.unwrap();
            if more == 0 {
                break begun.elapsed();
            }
            answer.extend_from_slice(&part[..more]);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let (after, read) = tokio::join!(other, slow);
    assert_eq!(body(str::from_utf8(&answer).unwrap()).len(), LONG_PAGE);
    assert!(read > Duration::from_millis(300), "too quick: {read:?}");
    assert!(after < SOON);

    served.backend.long_page.store(true, Ordering::Relaxed);
    let (mut silent, _) = asked().await;
    served.backend.long_page.store(false, Ordering::Relaxed);
    assert_eq!(body(&served.get_local("/metrics").await), "up 1\n");
    let mut rest = Vec::new();
    // A reset is as good an end.
    let _ = silent.read_to_end(&mut rest).await;
    assert!(rest.len() < LONG_PAGE);
}

/// Clients that send a byte a second, and come again when they are dropped.
fn besiege<I, F>(clients: usize, connect: impl Fn() -> F + Clone + Send + 'static) -> JoinSet<()>
where
    I: AsyncWrite + Unpin + Send,
    F: Future<Output = std::io::Result<I>> + Send,
{
    let mut siege = JoinSet::new();
    for _ in 0..clients {
        let connect = connect.clone();
        siege.spawn(async move {
            loop {
                if let Ok(mut io) = connect().await {
                    while io.write_all(b"G").await.is_ok() {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
    }
    siege
}

/// The slowest of ten scrapes, in the best of five rounds: the machine has other things to do too.
async fn slowest<F: Future<Output = String>>(scrape: impl Fn() -> F) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let mut slowest = Duration::ZERO;
        for _ in 0..10 {
            let began = Instant::now();
            assert_eq!(body(&scrape().await), "up 1\n");
            slowest = slowest.max(began.elapsed());
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
        best = best.min(slowest);
    }
    best
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_ask_for_nothing_do_not_hold_up_a_scrape() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const CLIENTS: usize = 2000;
    let maximum = getrlimit(Resource::Nofile).maximum;
    assert!(maximum.is_none_or(|most| most >= 4096), "needs 4096 files");
    let limit = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, limit).expect("up to the hard limit");

    let served = Served::new(Limits::default()).await;
    let addr = served.addr;
    let siege = besiege(CLIENTS, move || TcpStream::connect(addr));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let tcp = slowest(|| served.get("/metrics")).await;
    drop(siege);

    let path = served.socket.clone();
    let siege = besiege(CLIENTS, move || UnixStream::connect(path.clone()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let unix = slowest(|| served.get_local("/metrics")).await;
    drop(siege);
    println!("under siege by {CLIENTS}: TCP {tcp:?}, Unix {unix:?}");
    assert!(
        tcp.max(unix) < Duration::from_secs(1),
        "TCP {tcp:?}, Unix {unix:?}"
    );
}

#[tokio::test]
async fn the_end_waits_for_no_idle_connection_and_not_long_for_a_stream() {
    let limits = Limits {
        shutdown: Duration::from_millis(300),
        ..Limits::default()
    };
    let mut served = Served::new(limits).await;
    let _idle = served.tcp().await;
    let mut events = served.events("").await.unwrap();
    assert!(events.next().await.unwrap().is_some());
    let began = Instant::now();
    served.stop.take().unwrap().send(()).unwrap();
    timeout(SOON, &mut served.server).await.unwrap().unwrap();
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert!(!served.socket.exists());
    // Its stream was cut, not ended.
    assert!(events.next().await.is_err());
    assert!(TcpStream::connect(served.addr).await.is_err());
}

#[tokio::test]
async fn an_ended_stream_is_not_waited_for() {
    let mut served = Served::new(Limits {
        shutdown: Duration::from_secs(60),
        ..Limits::default()
    })
    .await;
    let mut events = served.events("").await.unwrap();
    assert!(events.next().await.unwrap().is_some());
    drop(served.backend.take_reader());
    served.stop.take().unwrap().send(()).unwrap();
    timeout(SOON, &mut served.server).await.unwrap().unwrap();
    assert_eq!(events.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let served = Served::new(Limits::default()).await;
    let error = bind_tcp(served.addr).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "can't listen on {}: the port is taken; stop what listens there, as `ss -tlnp` shows it, or choose \
             another with --web.listen-address",
            served.addr
        )
    );
}

#[tokio::test]
async fn the_client_says_what_it_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let all = Subscription::default();
    let connect = || Events::connect(&path, &all, SOON);
    assert!(matches!(connect().await, Err(ConnectError::NotFound(_))));

    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(matches!(connect().await, Err(ConnectError::NotServed(_))));

    std::fs::remove_file(&path).unwrap();
    let other = tokio::net::UnixListener::bind(&path).unwrap();
    let answering = tokio::spawn(async move {
        let (mut io, _) = other.accept().await.unwrap();
        io.write_all(b"220 smtp ready\r\n").await.unwrap();
    });
    let error = connect().await.err().unwrap();
    answering.await.unwrap();
    assert!(matches!(error, ConnectError::NoDaemon { .. }), "{error}");
    assert_eq!(error.to_string().lines().count(), 1);
}

#[tokio::test]
async fn filters_that_no_request_can_carry_are_an_error() {
    let served = Served::new(Limits::default()).await;
    let with = |bytes| format!("comm={}", "x".repeat(bytes));
    assert!(served.events(&with(50_000)).await.is_ok());
    let error = served.events(&with(70_000)).await.err().unwrap();
    assert!(matches!(error, ConnectError::TooLong(_)), "{error}");
}
