//! Properties of dumps, for [`crate::fuzz`].

use std::net::IpAddr;

use tcpstate_common::{Socket, TcpState};

use super::iterator::{Malformed, Reading};
use super::parse::{Message, messages};
use crate::fuzz::shown;
use crate::model::{Endpoint, Family};
use crate::table::{Record, StateMask};

const NETNS: u32 = 7;

/// A batch of netlink messages: no more of them than there are headers, and none after a malformed one.
pub fn diag(batch: &[u8]) {
    const HEADER: usize = 16;
    let (mut count, mut over) = (0, false);
    for message in messages(batch) {
        assert!(!over, "a message after a malformed one");
        count += 1;
        match message {
            Ok((Message::Socket(found), _)) => {
                let record = found.record(StateMask::ALL, NETNS, (1, 2));
                if let Some(record) = record {
                    assert_eq!((record.address, record.read_ns), (None, (1, 2)));
                    check(&record);
                }
                let listen = StateMask::of(&[TcpState::LISTEN]);
                let listener = found.record(listen, NETNS, (1, 2));
                assert_eq!(listener, record.filter(|it| it.state == TcpState::LISTEN));
            }
            Ok((Message::Done(_) | Message::Failed(_) | Message::Other, _)) => {}
            Err(malformed) => {
                shown(&malformed.to_string(), 0);
                over = true;
            }
        }
    }
    assert!(count <= batch.len().div_ceil(HEADER));
}

/// What the iterator over sockets gave: whole records, each of them one that was there.
pub fn sockets(bytes: &[u8]) {
    match records(bytes, NETNS) {
        (records, Ok(())) => {
            assert!(bytes.len().is_multiple_of(size_of::<Socket>()));
            assert!(records.len() <= bytes.len() / size_of::<Socket>());
            records.iter().for_each(check);
        }
        (records, Err(error)) => {
            records.iter().for_each(check);
            shown(&error.to_string(), 0);
            if let Malformed::CutShort(rest) = error {
                assert_eq!(rest, bytes.len() % size_of::<Socket>());
            }
        }
    }
}

/// Those before the first malformed one.
pub(crate) fn records(bytes: &[u8], netns: u32) -> (Vec<Record>, Result<(), Malformed>) {
    let reading = Reading {
        netns,
        jiffy_ns: 4_000_000,
    };
    let mut records = Vec::new();
    let read = reading.add(bytes, &mut records);
    (records, read)
}

/// What `Record` promises.
fn check(record: &Record) {
    assert_eq!(record.netns, NETNS);
    assert!(record.cookie != Some(0), "{record:?}");
    assert!(record.state != TcpState::CLOSE && record.state.name().is_some());
    assert_eq!(record.uid.is_some(), record.expires_ns.is_none());
    let ends = [record.local, record.remote];
    assert!(ends.iter().all(|end| end.port != Some(0)));
    let canonical = |addr: IpAddr| addr == addr.to_canonical();
    assert!(ends.iter().filter_map(|end| end.addr).all(canonical));
    let telling = if record.state == TcpState::LISTEN {
        assert_eq!(record.remote, Endpoint::default());
        record.local
    } else {
        record.remote
    };
    let ipv4 = telling.addr.expect("it is told").is_ipv4();
    assert_eq!(record.family == Family::Ipv4, ipv4);
}
