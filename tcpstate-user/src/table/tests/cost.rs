//! What work on a table of 100,000 sockets costs, printed: in all, and the longest part that the ring has to wait for.

use std::time::{Duration, Instant};

use super::*;
use crate::model::Process;
use crate::stats::{AgeScan, Stats};

const SOCKETS: u64 = 100_000;
const PROCESSES: u32 = 200;
/// As the tracer does.
const PART: usize = 1024;

/// A dump of which so many percent are in TIME_WAIT.
fn many(time_ms: u64, time_wait: u64) -> Snapshot {
    let end = |ip: u32, port: u64| Endpoint {
        addr: Some(Ipv4Addr::from(ip).into()),
        port: u16::try_from(port).ok(),
    };
    let records = (1..=SOCKETS).map(|number| {
        let state = match number % 100 < time_wait {
            true => TIME_WAIT,
            false => ESTABLISHED,
        };
        Record {
            cookie: Some(number),
            local: end(0x7f00_0001, number % 60_000 + 1),
            remote: end(0x0a00_0000 + (number / 60_000) as u32, 443),
            netns: NETNS + (number % 4) as u32,
            ..record(time_ms, 1, state)
        }
    });
    Snapshot {
        netns: (0..4).map(|other| NETNS + other).collect(),
        ..dump(time_ms, time_ms, records.collect())
    }
}

/// `part` tells whether it was the last.
fn measure(what: &str, mut part: impl FnMut() -> bool) {
    let (mut all, mut longest) = (Duration::ZERO, Duration::ZERO);
    let mut done = false;
    while !done {
        let begun = Instant::now();
        done = part();
        let took = begun.elapsed();
        (all, longest) = (all + took, longest.max(took));
    }
    let [all, longest] = [all, longest].map(|time| time.as_secs_f64() * 1e3);
    println!("{what}: {all:.1} ms, longest part {longest:.2} ms");
}

#[test]
#[ignore = "measures"]
fn a_table_of_100_000_sockets() {
    let mut table = Table::new(Identity::Cookie);
    let dumps = [
        ("the first dump", 0),
        ("the same again", 0),
        ("a fifth has closed", 20),
        ("the same again", 20),
    ];
    for (time_ms, (what, time_wait)) in (1000..).step_by(1000).zip(dumps) {
        let mut merge = Merge::new(many(time_ms, time_wait));
        table.snapshot_begins();
        measure(what, || table.merge(&mut merge, PART, |_| {}).is_some());
        assert_eq!(table.len() as u64, SOCKETS);
    }
    let holders: Vec<Holder> = (0..PROCESSES)
        .map(|pid| Holder {
            process: Process {
                pid,
                start_ns: u64::from(pid) + 1,
                comm: Some(Comm::from_bytes(format!("p{pid}").as_bytes())),
            },
            container: None,
            sockets: (1..=SOCKETS)
                .filter(|number| number % u64::from(PROCESSES) == u64::from(pid))
                .map(|socket| Held {
                    socket,
                    quiet_ns: None,
                })
                .collect(),
        })
        .collect();
    let new = Comm::from_bytes(b"new");
    let names: FxHashMap<_, _> = (0..PROCESSES)
        .map(|pid| ((pid, u64::from(pid) + 1), new))
        .collect();
    for (what, names) in [("a sweep", FxHashMap::default()), ("one with names", names)] {
        let mut sweep = Sweep::new(Some(holders.clone()), names, (1, 1));
        measure(what, || table.sweep(&mut sweep, PART, 1, |_| {}));
    }
    let (mut scan, mut walk) = (AgeScan::new(9_000 * MS), Walk::default());
    let mut stats = Stats::new(100);
    measure("ages", || {
        scan.part(table.stays(&mut walk, PART));
        walk.is_done()
    });
    stats.age(scan, 0);
    let (mut rows, mut walk) = (Vec::with_capacity(table.len()), Walk::default());
    measure("rows", || {
        rows.extend(table.rows(&mut walk, PART, 9_000 * MS, 0));
        walk.is_done()
    });
    assert_eq!(rows.len() as u64, SOCKETS);
    let mut number = 0;
    measure("100,000 events", || {
        for _ in 0..8192.min(SOCKETS - number) {
            number += 1;
            let closing = with(event(9_001, 0, ESTABLISHED, CLOSE_WAIT), |event| {
                event.cookie = number * 7919 % SOCKETS + 1;
            });
            table.apply(&closing, None, |_| {}).expect("a cookie");
        }
        number == SOCKETS
    });
}

/// Of this process, in bytes: `RssAnon`, or `VmHWM`, the most that was resident.
fn memory_now(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(name, _)| *name == field).expect("the field");
    let kib: u64 = value
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    kib << 10
}

/// What each socket takes of memory, with all by which it is found. To be run alone, in a process that had none.
///
/// `owned`: each by a process of its own.
fn memory(identity: Identity, owned: bool) {
    const MOST: u64 = 1_000_000;
    const STEP: u64 = 1000;
    let before = memory_now("RssAnon");
    let most_before = memory_now("VmHWM");
    let mut table = Table::new(identity);
    let mut apply = |number: u64, from, to| {
        let event = with(event(1, 0, from, to), |event| {
            event.cookie = number;
            // As far apart as the kernel has them.
            event.sk = 0xffff_8880_0000_0000 + number * 0x940;
            event.local_port = (number % 60_000) as u16;
            event.remote_addr[12..].copy_from_slice(&(number as u32 / 60_000).to_be_bytes());
            if owned {
                event.flags |= FLAG_TASK;
                (event.tgid, event.start_ns) = (number as u32, number);
            }
        });
        table.apply(&event, None, |_| {}).expect("a cookie");
        table.len() as u64
    };
    let mut at = Vec::new();
    for number in 1..=MOST {
        apply(number, CLOSE, SYN_SENT);
        assert_eq!(apply(number, SYN_SENT, ESTABLISHED), number);
        if number % STEP == 0 {
            at.push((memory_now("RssAnon") - before, number));
        }
    }
    let each = |&(bytes, sockets): &(u64, u64)| bytes / sockets;
    let at_100_000 = &at[99];
    let worst = at[50..].iter().max_by_key(|it| each(it)).expect("some");
    let all = &at[at.len() - 1];
    let most = memory_now("VmHWM") - most_before;
    let mut left = MOST;
    for number in 1..=MOST {
        left = apply(number, ESTABLISHED, CLOSE);
    }
    assert_eq!(left, 0);
    let kept = memory_now("RssAnon") - before;
    println!(
        "100,000 sockets: {} bytes each; at worst, of more than 50,000, {} each, at {}; 1,000,000: {} MiB, {} each, and {} \
         MiB at most while they came; {} MiB are kept for others when they are closed",
        each(at_100_000),
        each(worst),
        worst.1,
        all.0 >> 20,
        each(all),
        most >> 20,
        kept >> 20,
    );
}

#[test]
#[ignore = "measures"]
fn memory_of_1_000_000_sockets_with_cookies() {
    memory(Identity::Cookie, false);
}

#[test]
#[ignore = "measures"]
fn memory_of_1_000_000_sockets_with_addresses() {
    memory(Identity::Address, false);
}

#[test]
#[ignore = "measures"]
fn memory_of_1_000_000_sockets_with_owners() {
    memory(Identity::Cookie, true);
}
