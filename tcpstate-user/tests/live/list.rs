//! `tcpstate list` and the ages of sockets, against what the kernel says in /proc and the test's own clock.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::net::Shutdown;
use serde_json::Value;

use crate::daemon::{Daemon, in_namespace};
use crate::judge::kernel;
use crate::lab::{proc_states, until};
use crate::sockets::{Pair, Tcp};
use crate::tracer::product;

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// By the kernel's numbers.
pub const STATES: [&str; 12] = [
    "",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
];

/// State, both ends, and how much waits to be read.
pub type Seen = (String, String, String, u64);

/// What /proc shows of the calling thread's namespace.
pub fn proc_sockets() -> BTreeSet<Seen> {
    let mut seen = BTreeSet::new();
    for name in ["tcp", "tcp6"] {
        let table = fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        for line in table.expect("/proc is mounted").lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let state = usize::from_str_radix(fields[3], 16).expect("hex");
            let (_, received) = fields[4].split_once(':').expect("two queues");
            let listens = STATES[state] == "LISTEN";
            seen.insert((
                STATES[state].to_owned(),
                proc_end(fields[1]),
                if listens {
                    "-".to_owned()
                } else {
                    proc_end(fields[2])
                },
                u64::from_str_radix(received, 16).expect("hex"),
            ));
        }
    }
    seen
}

/// Words of an address in the machine's order, and a port.
pub fn proc_end(text: &str) -> String {
    let (addr, port) = text.split_once(':').expect("a port");
    let words = addr.as_bytes().chunks(8).map(|word| {
        let word = str::from_utf8(word).expect("ASCII");
        u32::from_str_radix(word, 16).expect("hex").to_ne_bytes()
    });
    let bytes = words.collect::<Vec<_>>().concat();
    let addr = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(v4) => IpAddr::from(v4),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes.as_slice()).expect("16 bytes")),
    };
    let port = u16::from_str_radix(port, 16).expect("hex");
    SocketAddr::new(addr.to_canonical(), port).to_string()
}

fn list(arguments: &[&str]) -> Vec<Value> {
    let output = Command::new(product())
        .args(["list", "--netns", "self", "-o", "json"])
        .args(arguments)
        .output()
        .expect("the product starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    let direct = arguments.contains(&"--direct");
    assert_eq!(said.lines().count(), usize::from(direct), "{said}");
    assert_eq!(said.starts_with("tracing directly ("), direct, "{said}");
    rows(&output)
}

fn rows(output: &Output) -> Vec<Value> {
    let text = str::from_utf8(&output.stdout).expect("UTF-8");
    let mut lines = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    let start: Value = lines.next().expect("a first line");
    assert_eq!(start["type"], "start");
    let rows: Vec<Value> = lines.collect();
    assert!(rows.iter().all(|row| row["type"] == "socket"), "{text}");
    rows
}

fn listed(rows: &[Value]) -> BTreeSet<Seen> {
    let end = |row: &Value, which: &str| {
        let Some(addr) = row[format!("{which}_addr")].as_str() else {
            return "-".to_owned();
        };
        let port = row[format!("{which}_port")].as_u64().unwrap_or(0);
        SocketAddr::new(addr.parse().expect("an address"), port as u16).to_string()
    };
    let seen = rows.iter().map(|row| {
        (
            row["state"].as_str().expect("a state").to_owned(),
            end(row, "local"),
            end(row, "remote"),
            // What is no full socket has no queue.
            row["recv_queue"].as_u64().unwrap_or(0),
        )
    });
    seen.collect()
}

fn of_port<'a>(rows: &'a [Value], state: &str, port: u16) -> &'a Value {
    let mut rows = rows.iter();
    rows.find(|row| row["state"] == state && row["local_port"] == port)
        .unwrap_or_else(|| panic!("no {state} of port {port}"))
}

fn of_state<'a>(rows: &'a [Value], state: &str) -> &'a Value {
    let mut of_it = rows.iter().filter(|row| row["state"] == state);
    let row = of_it.next().unwrap_or_else(|| panic!("no {state}"));
    assert!(of_it.next().is_none(), "more than one {state}");
    row
}

fn unix_ns() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970").as_nanos()
}

#[test]
fn a_list_is_what_the_kernel_has_directly_and_from_the_daemon() {
    in_namespace(|_| {
        let v6 = Pair::new(V6);
        // Leaked by its server, with data that nobody reads; the client is an orphan.
        let leaked = Pair::new(V4);
        leaked.client.send();
        leaked.server.peek();
        drop(leaked.client);
        until("the client is an orphan", || {
            proc_states(leaked.near.port()) == [5]
        });
        let closed = Pair::new(V4);
        closed.client.shutdown(Shutdown::Write);
        closed.server.peek();
        drop((closed.server, closed.client));
        // One that nobody accepts.
        let waiting = Tcp::connected(closed.far);
        until("it waits for accept", || {
            let waits = |(state, local, _, queue): &Seen| {
                state == "LISTEN" && *local == closed.far.to_string() && *queue == 1
            };
            proc_sockets().iter().any(waits)
        });

        let direct = list(&["--direct"]);
        assert_eq!(listed(&direct), proc_sockets());
        let listener = of_port(&direct, "LISTEN", closed.far.port());
        assert_eq!(
            (&listener["recv_queue"], &listener["send_queue"]),
            (&1.into(), &8.into())
        );
        assert_eq!(of_state(&direct, "FIN_WAIT2")["orphan"], true);
        let time_wait = of_state(&direct, "TIME_WAIT");
        assert_eq!(time_wait["recv_queue"], Value::Null);
        let leak = of_state(&direct, "CLOSE_WAIT");
        assert_eq!(leak["pid"], std::process::id());
        assert_eq!(leak["owner_source"], "sweep");
        assert_eq!(leak["holders"], 1);
        assert_eq!(leak["age_exact"], false);
        let established = of_port(&direct, "ESTABLISHED", v6.near.port());
        assert_eq!(established["family"], "ipv6");
        let order = |row: &Value| (row["state"] != "LISTEN", row["local_port"].as_u64());
        assert!(direct.is_sorted_by_key(order));

        let daemon = Daemon::start(&[]);
        let socket = daemon.socket.to_str().expect("UTF-8");
        let served = list(&["--socket", socket]);
        assert_eq!(listed(&served), proc_sockets());
        assert_eq!(listed(&served), listed(&list(&["--direct"])));
        // New sockets, and at once.
        let new = Pair::new(V4);
        new.client.send();
        new.server.peek();
        let twice = (0..2).map(|_| {
            // The second waits for a dump of its own.
            list(&[
                "--socket",
                socket,
                "-s",
                "estab",
                "-L",
                &new.far.port().to_string(),
            ])
        });
        for rows in twice {
            let row = of_state(&rows, "ESTABLISHED");
            assert_eq!(
                (&row["recv_queue"], &row["age_exact"]),
                (&4.into(), &true.into())
            );
            assert_eq!(row["pid"], std::process::id());
        }
        drop(waiting);
    });
}

#[test]
fn a_leak_is_dated_while_it_lasts() {
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        let comm = fs::read_to_string("/proc/self/comm").expect("/proc is mounted");
        let labels = format!("comm=\"{}\",state=\"close_wait\"", comm.trim());
        let oldest = format!("tcpstate_process_oldest_state_entry_timestamp_seconds{{{labels}}}");
        let pair = Pair::new(V4);
        let before = unix_ns();
        drop(pair.client);
        until("the server is in CLOSE_WAIT", || {
            proc_states(pair.far.port()).contains(&8)
        });
        let after = unix_ns();
        // The ages are looked at once a second.
        let mut page = daemon.metrics();
        until("the leak is there", || {
            page = daemon.metrics();
            page.has(&oldest)
        });
        let entered = page.get(&oldest);
        let bounds = (before as f64 / 1e9 - 0.001)..=(after as f64 / 1e9 + 0.001);
        assert!(bounds.contains(&entered), "{entered} is not in {bounds:?}");
        let aged = format!("tcpstate_process_sockets_aged{{{labels},min_age=\"1m\"}}");
        assert_eq!(page.get(&aged), 0.0);

        let socket = daemon.socket.to_str().expect("UTF-8");
        let rows = list(&["--socket", socket, "-s", "close-wait"]);
        let leak = of_state(&rows, "CLOSE_WAIT");
        assert_eq!(leak["age_exact"], true);
        let listed = unix_ns();
        let age = u128::from(leak["age_ns"].as_u64().expect("an age"));
        assert!((1..=listed - before).contains(&age), "{age}");
        assert!(list(&["--socket", socket, "-s", "close-wait", "--min-age", "1h"]).is_empty());

        drop(pair.server);
        until("the leak is gone", || !daemon.metrics().has(&oldest));
    });
}

/// A sweep reads when they received their last ACK.
#[test]
fn idle_sockets_from_before_the_start_are_no_younger_than_their_silence() {
    const IDLE: Duration = Duration::from_secs(3);
    in_namespace(|_| {
        let begun = Instant::now();
        let [idle, leak, half] = [(); 3].map(|()| Pair::new(V4));
        drop(leak.client);
        half.client.shutdown(Shutdown::Write);
        let states = [
            (idle.near.port(), "ESTABLISHED", 1),
            (leak.far.port(), "CLOSE_WAIT", 8),
            (half.near.port(), "FIN_WAIT2", 5),
        ];
        for (port, state, number) in states {
            until(state, || proc_states(port).contains(&number));
        }
        let quiet = Instant::now();
        thread::sleep(IDLE);
        let least = quiet.elapsed();
        let rows = list(&["--direct"]);
        let most = begun.elapsed();
        // Else they are looked up in /proc, which does not tell.
        let swept = kernel() >= (5, 12);
        for (port, state, _) in states {
            let row = of_port(&rows, state, port);
            assert_eq!(row["age_exact"], false);
            let age = Duration::from_nanos(row["age_ns"].as_u64().expect("an age"));
            assert!(age <= most, "{state}: {age:?} of {most:?}");
            // Jiffies.
            let least = least.saturating_sub(Duration::from_millis(50));
            assert_eq!(age >= least, swept, "{state}: {age:?} of {least:?}");
        }
    });
}

#[test]
fn who_is_in_the_sockets_group_needs_no_privileges() {
    const NOBODY: u32 = 65534;
    const GROUP: u32 = 54321;
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        let folder = daemon.socket.parent().expect("a folder");
        let readable = || fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder, readable()).expect("chmod");
        chown(&daemon.socket, None, Some(GROUP)).expect("chown");
        // Where it was built, others may have no access.
        let program = folder.join("tcpstate");
        fs::copy(product(), &program).expect("a copy");
        fs::set_permissions(&program, readable()).expect("chmod");
        let list_as = |gid: u32| {
            Command::new(&program)
                .args(["list", "--netns", "self", "-o", "json", "--socket"])
                .arg(&daemon.socket)
                .gid(gid)
                .uid(NOBODY)
                .output()
                .expect("the product starts")
        };
        let member = list_as(GROUP);
        let said = String::from_utf8_lossy(&member.stderr);
        assert!(member.status.success(), "{said}");
        assert_eq!(listed(&rows(&member)), proc_sockets());
        let stranger = list_as(NOBODY);
        let said = String::from_utf8_lossy(&stranger.stderr);
        assert_eq!(stranger.status.code(), Some(1));
        assert!(
            said.starts_with("tcpstate: error: permission denied on the socket "),
            "{said}"
        );
        assert_eq!((stranger.stdout.len(), said.lines().count()), (0, 1));
    });
}
