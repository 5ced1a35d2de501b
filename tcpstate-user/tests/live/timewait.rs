//! What becomes of a connection after its →CLOSE: told at once where the kernel's functions can be followed, by dumps
//! and timers elsewhere.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::daemon::{Daemon, LOOPBACK, in_namespace};
use crate::lab::{proc_states, until};
use crate::sockets::Tcp;
use crate::sys;
use crate::without::WHOLE;

/// Debian's kernels, which the lab boots, load fentry programs; 5.10 has no cookie to follow timewait sockets by.
fn must_follow() -> Option<bool> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    release
        .trim()
        .ends_with("-amd64")
        .then(|| !release.starts_with("5.10."))
}

fn events(daemon: &Daemon) -> impl Iterator<Item = Value> + use<> {
    let stream = daemon.events("");
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a timeout");
    let lines = BufReader::new(stream).lines();
    let lines = lines.map(|line| line.expect("a line in time"));
    lines
        .skip_while(|line| !line.starts_with('{'))
        .map(|line| serde_json::from_str(&line).expect("JSON"))
}

/// The lines of the socket with this local end, until one of them leads to `last`.
fn lines(events: &mut impl Iterator<Item = Value>, local: SocketAddr, last: &str) -> Vec<Value> {
    let mut told = Vec::new();
    for line in events {
        if line["local_port"] == local.port() && line["role"] == "active" {
            let over = line["to"] == last;
            told.push(line);
            if over {
                return told;
            }
        }
    }
    panic!("the stream ended before {local} came to {last}: {told:?}");
}

fn ms(value: &Value) -> f64 {
    value.as_f64().expect("a dwell") / 1e6
}

#[test]
fn what_follows_a_close_is_told() {
    is_followed(WHOLE);
}

pub fn is_followed(without: &'static str) {
    in_namespace(move |_| {
        sys::set_sysctl("net/ipv4/tcp_fin_timeout", "2").expect("a sysctl");
        let daemon = Daemon::without(without, &["--reconcile-interval", "1s"]);
        let feature = "time_wait_fentry";
        let follows = daemon.metrics().uses(feature);
        if let Some(must) = must_follow().filter(|_| without == WHOLE) {
            assert_eq!(follows, must, "{feature}");
        }
        let mut events = events(&daemon);
        let listener = Tcp::listening(LOOPBACK, 8);

        // Orphaned, and its peer closes 300 ms later.
        let (client, server) = (Tcp::connected(listener.local()), listener.accept());
        let closed = client.local();
        drop(client);
        server.peek();
        let orphaned = Instant::now();
        thread::sleep(Duration::from_millis(300));
        drop(server);
        let told = lines(&mut events, closed, "TIME_WAIT");
        let last = told.last().expect("one");
        assert_eq!(last["from"], "FIN_WAIT2", "{last}");
        assert_eq!(last["end"], "local_close", "{last}");
        if follows {
            assert_eq!(last["evidence"], "fentry", "{last}");
            let most = orphaned.elapsed().as_secs_f64() * 1e3;
            let dwell = ms(&last["dwell_ns"]);
            assert!(
                (250.0..=most).contains(&dwell),
                "{dwell} of at most {most} ms: {last}"
            );
        } else {
            assert_eq!(last["evidence"], "snapshot", "{last}");
            assert!(last["dwell_ns"].is_null(), "{last}");
        }

        // Orphaned, and its peer never closes.
        let (client, server) = (Tcp::connected(listener.local()), listener.accept());
        let closed = client.local();
        drop(client);
        let told = lines(&mut events, closed, "CLOSE");
        let last = told.last().expect("one");
        assert_eq!(last["from"], "FIN_WAIT2", "{last}");
        assert_eq!(last["end"], "local_close", "{last}");
        if follows {
            assert_eq!(last["evidence"], "fentry", "{last}");
            let dwell = ms(&last["dwell_ns"]);
            // The wheel of timers is coarse, and late by an eighth.
            assert!((1900.0..4000.0).contains(&dwell), "{dwell} ms: {last}");
        }
        drop(server);

        // Closed by one, then the other; the ends are used again at once by a socket that asks for that.
        let (client, server) = (Tcp::connected(listener.local()), listener.accept());
        let closed = client.local();
        client.shutdown(rustix::net::Shutdown::Write);
        server.peek();
        drop(server);
        client.peek();
        drop(client);
        let told = lines(&mut events, closed, "TIME_WAIT");
        let last = told.last().expect("one");
        assert_eq!(last["from"], "FIN_WAIT2", "{last}");
        let evidence = if follows { "fentry" } else { "inferred" };
        assert_eq!(last["evidence"], evidence, "{last}");
        let metrics = daemon.metrics();
        assert_eq!(metrics.state("time_wait"), 2.0);
        assert_eq!(metrics.sum("tcpstate_corrections_total"), 0.0);
    });
}

/// The kernel then closes at once, though it begins as for TIME_WAIT, which is all that events tell.
#[test]
fn time_wait_without_room_is_not_counted() {
    in_namespace(|_| {
        let limit = "net/ipv4/tcp_max_tw_buckets";
        sys::set_sysctl(limit, "0").expect("a sysctl");
        let daemon = Daemon::start(&["--reconcile-interval", "1h"]);
        let listener = Tcp::listening(LOOPBACK, 8);
        let mut closed = Vec::new();
        // Closed while a descriptor is there, and as an orphan.
        for orphan in [false, true, false, true] {
            let (client, server) = (Tcp::connected(listener.local()), listener.accept());
            closed.push(client.local().port());
            client.shutdown(rustix::net::Shutdown::Write);
            server.peek();
            if orphan {
                drop(client);
            }
            drop(server);
        }
        until("the kernel has nothing of them", || {
            closed.iter().all(|&port| proc_states(port).is_empty())
        });
        let ended = Instant::now();
        let states = ["fin_wait2", "time_wait", "last_ack", "established"];
        // A scrape has it as of a second ago at most, and what was never there is gone when two dumps have lacked it.
        let right = || {
            let metrics = daemon.metrics();
            states.map(|state| metrics.state(state)) == [0.0; 4]
        };
        until("nothing is told of them", right);
        let took = ended.elapsed();
        assert!(took < Duration::from_secs(4), "told for {took:?}");
        let metrics = daemon.metrics();
        // It listens too.
        assert_eq!(metrics.state("listen"), 2.0);
        assert_eq!(metrics.sum("tcpstate_corrections_total"), 0.0);
    });
}
