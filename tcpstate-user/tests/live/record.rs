//! The kernel's events as the product's kernel side hands them on: none missing, and, where asked, kept as a fixture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use tcpstate_common::{Event, SetState, TcpState};
use tcpstate_user::kernel::{Netns, Options, RingSize, Session};

use crate::lab::{Lab, until};
use crate::six;
use crate::without::WHOLE;

/// Names the file to keep the events in.
const RECORD: &str = "TCPSTATE_RECORD";

/// Runs the six sequences under a session of our own and compares what came with what the kernel counted.
#[test]
fn every_event_arrives() {
    Lab::run(WHOLE, |lab| {
        let options = Options {
            netns: Netns::Inode(lab.inode),
            ring_size: RingSize::default(),
            without: Vec::new(),
        };
        let mut session = Session::start(&options).expect("a second program on the tracepoint");
        six::all(lab);
        let mut events: Vec<SetState> = Vec::new();
        until("no socket is on its way to another state", || {
            let sink = |record: Result<Event, _>| {
                if let Event::SetState(event) = record.expect("a right length") {
                    events.push(event);
                }
            };
            session.drain(sink, usize::MAX);
            let newest: BTreeMap<u64, TcpState> =
                events.iter().map(|event| (event.sk, event.to())).collect();
            let passing = [TcpState::SYN_RECV, TcpState::FIN_WAIT1, TcpState::LAST_ACK];
            !newest.values().any(|state| passing.contains(state))
        });
        let counters = session.counters().expect("the kernel's counters");
        let counted: u64 = counters.transitions.iter().flatten().sum();
        assert_eq!((events.len() as u64, counters.ring_full), (counted, 0));
        assert!(counted > 40, "only {counted} transitions of six sequences");
        if let Some(file) = std::env::var_os(RECORD) {
            let fixture = fixture(&events, session.cookies());
            fs::write(file, fixture).expect("the fixture can be written");
        }
    });
}

/// Text: what the events mean depends on, then a record in hexadecimal a line. Addresses of the kernel's memory are
/// replaced by numbers of the same kind, for they are nobody's business.
fn fixture(events: &[SetState], cookies: bool) -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    let release = release.split(['-', '+', '\n']).next().unwrap_or_default();
    let identity = if cookies { "cookie" } else { "address" };
    let mut text = format!("kernel {release}\nidentity {identity}\n");
    let mut addresses = BTreeMap::new();
    for event in events {
        let next = 0xffff_8880_0000_0000 + 4096 * addresses.len() as u64;
        let sk = *addresses.entry(event.sk).or_insert(next);
        let mut room = [0; SetState::LONGEST];
        for byte in (SetState { sk, ..*event }).encode(&mut room) {
            write!(text, "{byte:02x}").expect("memory");
        }
        text.push('\n');
    }
    text
}
