//! Names that processes give themselves: labels and terminals stay whole, and series stay few.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::net::SocketAddr;
use std::process::Command;

use crate::daemon::{Daemon, LOOPBACK, in_namespace};
use crate::lab::until;
use crate::sockets::{Tcp, connect_to_nobody};
use crate::sys::Fork;
use crate::tracer::product;

/// 15 bytes at most, as the kernel keeps them.
const NASTY: [&CStr; 5] = [
    c"a\nb\"} 1\n#",
    c"\x1b[2J\x1b]0;x\x07",
    c"back\\slash\\n",
    c"\xff\xfe\xc3(\xa0\xa1",
    c"<other>",
];

fn rename(name: &CStr) {
    // SAFETY: the kernel reads a name that lives through the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// A process of that name that listens.
fn listens(name: &'static CStr) -> Fork {
    let process = Fork::new(&[], || {
        rename(name);
        let _listener = Tcp::listening(LOOPBACK, 1);
        loop {
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        }
    });
    process.expect("a process")
}

/// A line with labels is `name{label="value",…} number`, where a value has nothing that ends it, nor what moves a cursor.
fn labels(line: &str) -> Vec<(&str, String)> {
    let (_, rest) = line.split_once('{').expect("labels");
    let mut labels = Vec::new();
    let mut rest = rest;
    loop {
        let (label, value) = rest.split_once("=\"").expect("a label");
        let mut text = String::new();
        let mut chars = value.char_indices();
        let end = loop {
            match chars.next().expect("an end") {
                (at, '"') => break at,
                (_, '\\') => text.push(match chars.next().expect("an escape").1 {
                    'n' => '\n',
                    other @ ('"' | '\\') => other,
                    other => panic!("\\{other} in {line}"),
                }),
                (_, other) => text.push(other),
            }
        };
        labels.push((label, text));
        match value[end + 1..].split_at(1) {
            (",", more) => rest = more,
            ("}", number) => {
                number.trim().parse::<f64>().expect("a number");
                return labels;
            }
            _ => panic!("{line}"),
        }
    }
}

fn comms(page: &str) -> BTreeSet<String> {
    assert!(!page.chars().any(|char| char.is_control() && char != '\n'));
    let lines = page.lines().filter(|line| line.contains("comm=\""));
    let labels = lines.flat_map(labels);
    labels
        .filter(|(label, _)| *label == "comm")
        .map(|(_, value)| value)
        .collect()
}

#[test]
fn nasty_names_break_no_label_and_no_terminal() {
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        let _processes = NASTY.map(listens);
        until("all listen", || daemon.metrics().state("listen") == 6.0);
        let told = comms(&daemon.get("/metrics").1);
        for expected in [
            "a\\nb\"} 1\\n#",
            "\\u{1b}[2J\\u{1b}]0;x\\u{7}",
            "back\\\\slash\\\\n",
            "\\xff\\xfe\\xc3(\\xa0\\xa1",
            "_other>",
        ] {
            assert!(told.contains(expected), "no {expected} in {told:?}");
        }
        for output in ["text", "wide", "json", "csv"] {
            let listed = Command::new(product())
                .args(["list", "-s", "listen", "--netns", "self", "-o", output])
                .arg("--socket")
                .arg(&daemon.socket)
                .output()
                .expect("the product starts");
            let text = String::from_utf8(listed.stdout).expect("UTF-8");
            assert!(!text.chars().any(|char| char.is_control() && char != '\n'));
            // Neither does a name make a line of its own: 6 sockets and a first line.
            assert_eq!(text.lines().count(), 7, "{text}");
        }
    });
}

/// By one process that renames itself before each connect.
#[test]
fn ten_thousand_names_have_a_hundred_places() {
    const NAMES: u32 = 10_000;
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        let size = || daemon.get("/metrics").1.lines().count();
        let resident = || daemon.metrics().get("process_resident_memory_bytes");
        let before = resident();
        let process = Fork::new(&[], || {
            for number in 0..NAMES {
                let mut name = *b"renamed 00000\0";
                let mut rest = number;
                for digit in name[8..13].iter_mut().rev() {
                    *digit += (rest % 10) as u8;
                    rest /= 10;
                }
                rename(CStr::from_bytes_with_nul(&name).expect("one zero"));
                connect_to_nobody(SocketAddr::new(LOOPBACK, 9));
            }
        });
        let process = process.expect("a process");
        let failures = || daemon.metrics().sum("tcpstate_connect_failures_total");
        until("it has connected with each name", || {
            process.ended().is_some()
        });
        until("all are counted", || failures() == f64::from(NAMES));
        let page = daemon.get("/metrics").1;
        let told = comms(&page);
        // The places, what has no owner, and the rest.
        assert!(told.len() <= 102, "{} names", told.len());
        let other = "tcpstate_connect_failures_total{comm=\"<other>\",reason=\"refused\"}";
        let other = daemon.metrics().get(other);
        assert!(other >= f64::from(NAMES - 100), "{other}");
        assert!(daemon.metrics().get("tcpstate_comm_overflow_total") > 0.0);
        println!(
            "{NAMES} names: {} as labels, {} lines, {:.1} MiB more",
            told.len(),
            size(),
            (resident() - before) / f64::from(1 << 20)
        );
    });
}
