//! The daemon's stream, from its first line on.

use std::cell::RefCell;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::daemon::{Daemon, LOOPBACK, in_namespace, storm};
use crate::sockets::connect_to_nobody;

/// At a time.
const READERS: usize = 4;

/// Also where the tracer is at work on other events when a reader comes.
#[test]
fn what_happens_after_the_first_line_is_told() {
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        let over = AtomicBool::new(false);
        let told: usize = thread::scope(|scope| {
            let readers = (0..READERS).map(|_| scope.spawn(|| readers_until(&over, &daemon)));
            let readers: Vec<_> = readers.collect();
            // Threads of this namespace, before this one is pinned.
            storm(Duration::from_secs(6));
            over.store(true, Ordering::Relaxed);
            let told = readers.into_iter().map(|reader| reader.join());
            told.map(|told| told.expect("each was told")).sum()
        });
        println!("{told} readers");
        assert!(told > 4 * READERS, "only {told} readers in the time");
    });
}

/// One after the other; how many.
fn readers_until(over: &AtomicBool, daemon: &Daemon) -> usize {
    let nobody = SocketAddr::new(LOOPBACK, 9);
    let mut told = 0;
    while !over.load(Ordering::Relaxed) {
        let stream = daemon.events("?rport=9");
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).expect("a timeout");
        let lines = BufReader::new(stream).lines();
        let seen = RefCell::new(Vec::new());
        let lines = lines.map(|line| {
            line.unwrap_or_else(|error| panic!("{error}, after {told} readers and {seen:?}"))
        });
        let lines = lines.inspect(|line| seen.borrow_mut().push(line.clone()));
        let mut lines = lines.filter_map(|line| serde_json::from_str::<Value>(&line).ok());
        let start = lines.next().expect("a first line");
        assert_eq!(start["type"], "start");
        let port = connect_to_nobody(nobody);
        // What the kernel did not show, or the ring had no room for, is told as missing.
        let first = lines.find(|line| line["local_port"] == port || line["type"] == "lost");
        let first = first.expect("a line");
        if first["type"] == "lost" {
            println!("{first}");
            continue;
        }
        if first["to"] != "SYN_SENT" {
            // The kernel's count of what it skipped is read a little later.
            let lost = lines.find(|line| line["type"] == "lost");
            println!("{first} came first, and then {lost:?}");
            continue;
        }
        told += 1;
    }
    told
}
