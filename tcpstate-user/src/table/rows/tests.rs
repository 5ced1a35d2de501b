use std::net::Ipv4Addr;

use tcpstate_common::SetState;
use tcpstate_common::event::{AF_INET, FLAG_SOCKET_READ};
use zerocopy::FromZeros as _;

use super::*;
use crate::model::{Endpoint, Family};
use crate::table::{Identity, Merge, Record, Snapshot, StateMask};

const MS: u64 = 1_000_000;
const NETNS: u32 = 4_026_531_840;

fn apply(table: &mut Table, time_ms: u64, cookie: u16, from: TcpState, to: TcpState) {
    let mut addr = [0; 16];
    addr[10..].copy_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
    let event = SetState {
        time_ns: time_ms * MS,
        sk: u64::from(cookie),
        cookie: cookie.into(),
        netns: NETNS,
        local_addr: addr,
        remote_addr: addr,
        local_port: cookie,
        remote_port: 80,
        family: AF_INET,
        from: from.number(),
        to: to.number(),
        flags: FLAG_SOCKET_READ,
        ..SetState::new_zeroed()
    };
    table
        .apply(&event, None, |_| {})
        .expect("it has what it should");
}

fn record(time_ms: u64, cookie: u16, state: TcpState, inode: u32) -> Record {
    let end = |port| Endpoint {
        addr: Some(Ipv4Addr::LOCALHOST.into()),
        port: Some(port),
    };
    Record {
        cookie: Some(cookie.into()),
        address: None,
        netns: NETNS,
        family: Family::Ipv4,
        local: end(cookie),
        remote: end(80),
        state,
        uid: None,
        inode,
        recv_queue: 7,
        send_queue: 9,
        expires_ns: None,
        read_ns: (time_ms * MS, time_ms * MS),
    }
}

fn reconcile(table: &mut Table, time_ms: u64, records: Vec<Record>) {
    let snapshot = Snapshot {
        records,
        netns: vec![NETNS],
        started_ns: time_ms * MS,
        finished_ns: time_ms * MS,
        states: StateMask::ALL,
        whole_host: true,
        ..Snapshot::default()
    };
    table.snapshot_begins();
    let mut merge = Merge::new(snapshot);
    while table.merge(&mut merge, 1, |_| {}).is_none() {}
}

/// The only one, at 10 s; Unix time is a second ahead.
fn row(table: &Table) -> Listed {
    let (mut rows, mut walk) = (Vec::new(), Walk::default());
    while !walk.is_done() {
        rows.extend(table.rows(&mut walk, 1, 10_000 * MS, 1_000_000_000));
    }
    assert_eq!(rows.len(), 1);
    rows.remove(0)
}

fn queues(row: &Listed) -> (Option<u32>, Option<u32>) {
    (row.recv_queue, row.send_queue)
}

#[test]
fn an_age_is_exact_where_the_entry_was_seen_and_nothing_lost_since() {
    let mut table = Table::new(Identity::Cookie);
    apply(&mut table, 3_000, 1, TcpState::CLOSE, TcpState::SYN_SENT);
    let seen = row(&table);
    assert_eq!((seen.age_ns, seen.age_exact), (7_000 * MS, true));
    assert_eq!((seen.time_ns, seen.since_ns), (11_000 * MS, 4_000 * MS));
    table.events_lost(5_000 * MS);
    let lost = row(&table);
    assert_eq!((lost.age_ns, lost.age_exact), (7_000 * MS, false));

    let mut table = Table::new(Identity::Cookie);
    reconcile(
        &mut table,
        4_000,
        vec![record(4_000, 1, TcpState::ESTABLISHED, 5)],
    );
    let found = row(&table);
    assert_eq!((found.age_ns, found.age_exact), (6_000 * MS, false));
}

#[test]
fn a_timewait_sockets_timer_dates_its_entry() {
    let mut table = Table::new(Identity::Cookie);
    let time_wait = Record {
        // Of 60 s.
        expires_ns: Some(58_000 * MS),
        ..record(4_000, 1, TcpState::TIME_WAIT, 0)
    };
    reconcile(&mut table, 4_000, vec![time_wait]);
    let row = row(&table);
    assert_eq!((row.age_ns, row.age_exact), (8_000 * MS, false));
    assert_eq!(queues(&row), (None, None));
    assert_eq!(row.orphan, Some(false));
}

#[test]
fn queues_are_of_the_state_that_the_dump_read() {
    let mut table = Table::new(Identity::Cookie);
    apply(&mut table, 0, 1, TcpState::CLOSE, TcpState::SYN_SENT);
    assert_eq!(queues(&row(&table)), (None, None));
    reconcile(
        &mut table,
        4_000,
        vec![record(4_000, 1, TcpState::SYN_SENT, 5)],
    );
    assert_eq!(queues(&row(&table)), (Some(7), Some(9)));
    apply(
        &mut table,
        5_000,
        1,
        TcpState::SYN_SENT,
        TcpState::ESTABLISHED,
    );
    assert_eq!(queues(&row(&table)), (None, None));
    // Read before the kernel stored the new state.
    let early = record(5_001, 1, TcpState::SYN_SENT, 5);
    reconcile(&mut table, 5_001, vec![early]);
    assert_eq!(queues(&row(&table)), (None, None));
}

#[test]
fn an_orphan_has_been_closed_and_goes_on() {
    let of = |state, inode, expires_ns| {
        let mut table = Table::new(Identity::Cookie);
        let record = Record {
            expires_ns,
            ..record(4_000, 1, state, inode)
        };
        reconcile(&mut table, 4_000, vec![record]);
        row(&table).orphan
    };
    assert_eq!(of(TcpState::FIN_WAIT1, 0, None), Some(true));
    assert_eq!(of(TcpState::LAST_ACK, 0, None), Some(true));
    assert_eq!(of(TcpState::FIN_WAIT2, 0, Some(MS)), Some(true));
    // Half closed.
    assert_eq!(of(TcpState::FIN_WAIT2, 5, None), Some(false));
    // Not accepted yet.
    assert_eq!(of(TcpState::CLOSE_WAIT, 0, None), Some(false));

    let mut table = Table::new(Identity::Cookie);
    apply(&mut table, 0, 1, TcpState::ESTABLISHED, TcpState::FIN_WAIT1);
    assert_eq!(row(&table).orphan, None);
}

/// Its timewait socket took its place between two parts.
#[test]
fn a_walk_never_misses_what_changes_its_kind() {
    let mut table = Table::new(Identity::Cookie);
    for cookie in 1..4 {
        apply(
            &mut table,
            1,
            cookie,
            TcpState::FIN_WAIT1,
            TcpState::FIN_WAIT2,
        );
    }
    let (mut rows, mut walk) = (Vec::new(), Walk::default());
    for cookie in 1..4 {
        let part = table.rows(&mut walk, 1, 10_000 * MS, 0);
        rows.extend(part.map(|row| (row.cookie, row.state)));
        // From CLOSING, which needs no flag.
        apply(&mut table, 2, cookie, TcpState::CLOSING, TcpState::CLOSE);
    }
    while !walk.is_done() {
        let part = table.rows(&mut walk, 1, 10_000 * MS, 0);
        rows.extend(part.map(|row| (row.cookie, row.state)));
    }
    for cookie in 1..4 {
        let last = rows.iter().rfind(|(its, _)| *its == Some(cookie));
        assert_eq!(last.map(|(_, state)| *state), Some(TcpState::TIME_WAIT));
    }
}
