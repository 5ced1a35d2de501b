//! Clients that misbehave, and many at once: scrapes stay quick, the ring is drained, memory is bounded.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::daemon::{Daemon, in_namespace, storm};
use crate::lab::until;
use crate::sys::Fork;

const DAEMON: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10975);
const REQUEST: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// How long a scrape takes, from the connect to the last byte.
fn scrape() -> Duration {
    let begun = Instant::now();
    let mut connection = TcpStream::connect(DAEMON).expect("connected");
    let request = b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n";
    connection.write_all(request).expect("sent");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("an answer");
    if answer.is_empty() {
        println!("DROPPED after {:?}", begun.elapsed());
        return begun.elapsed();
    }
    assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
    assert!(answer.contains("\ntcpstate_sockets{state=\"listen\"} "));
    begun.elapsed()
}

/// Of one a tenth of a second: the median, and the slowest.
fn scrapes(count: usize) -> [Duration; 2] {
    let mut all: Vec<Duration> = (0..count)
        .map(|_| {
            thread::sleep(Duration::from_millis(100));
            scrape()
        })
        .collect();
    all.sort();
    [all[count / 2], all[count - 1]]
}

/// A connection that sends what it can of that, and reads nothing.
struct Silent<'a> {
    connection: TcpStream,
    text: &'a [u8],
    at: usize,
}

impl<'a> Silent<'a> {
    fn new(text: &'a [u8]) -> Self {
        let connection = TcpStream::connect(DAEMON).expect("connected");
        connection.set_nonblocking(true).expect("a socket");
        Self {
            connection,
            text,
            at: 0,
        }
    }

    /// Up to so many bytes more; false where the daemon has ended the connection.
    fn send(&mut self, most: usize) -> bool {
        let rest = &self.text[self.at..];
        match self.connection.write(&rest[..most.min(rest.len())]) {
            Ok(sent) => {
                self.at = (self.at + sent) % self.text.len();
                true
            }
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }
}

/// So many clients until `over`, each at it again after the pause; who was dropped comes again within a second.
fn besiege(clients: usize, text: &[u8], most: usize, pause: Duration, over: &AtomicBool) {
    let mut silent: Vec<Silent<'_>> = Vec::new();
    let mut next = Instant::now();
    while !over.load(Ordering::Relaxed) {
        silent.retain_mut(|client| client.send(most));
        if Instant::now() >= next {
            silent.extend((silent.len()..clients).map(|_| Silent::new(text)));
            next = Instant::now() + Duration::from_secs(1);
        }
        thread::sleep(pause);
    }
}

#[test]
fn try_pipelining() {
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        println!("page {} bytes", daemon.get("/metrics").1.len());
        println!("alone {:?}", scrapes(20));
        let over = AtomicBool::new(false);
        let requests = REQUEST.repeat(1000);
        thread::scope(|scope| {
            scope.spawn(|| {
                besiege(300, &requests, usize::MAX, Duration::from_millis(50), &over);
            });
            thread::sleep(Duration::from_millis(100));
            println!("pipelining {:?}", scrapes(20));
            println!("pipelining {:?}", scrapes(20));
            over.store(true, Ordering::Relaxed);
        });
        let metrics = daemon.metrics();
        println!("rss {}", metrics.get("process_resident_memory_bytes"));
    });
}
