//! Dumps of sockets by the kernel's iterator, compared with those by inet_diag and with /proc.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::fchown;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, Shutdown};
use rustix::time::{ClockId, clock_getres};
use tcpstate_user::kernel::snapshot::{self, SocketIterator};
use tcpstate_user::kernel::{Netns, Options, RingSize, Session};
use tcpstate_user::model::view::Feature;
use tcpstate_user::model::{Endpoint, NetnsSelection, TcpState};
use tcpstate_user::table::{Record, StateMask};

use crate::daemon::{Daemon, in_namespace};
use crate::lab::until;
use crate::list::{Seen, proc_sockets};
use crate::sockets::{Pair, Tcp};

/// Nobody's.
const UID: u32 = 4711;

fn session(inode: u32) -> Session {
    let options = Options {
        netns: Netns::Inode(inode),
        ring_size: RingSize::default(),
        // Elsewhere it is not used.
        without: vec![Feature::SocketCookie],
    };
    Session::start(&options).expect("the program loads")
}

fn dump(inode: u32, states: StateMask, iterator: Option<&SocketIterator>) -> Vec<Record> {
    let one = NetnsSelection::One(inode);
    let snapshot = snapshot::take(one, states, HashSet::default(), iterator.cloned());
    snapshot.expect("a dump").records
}

/// More than the peer takes, which does not read: neither data nor FIN can go on.
fn fill(socket: &Tcp) {
    let data = vec![0; 1 << 16];
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let end = Instant::now() + Duration::from_secs(20);
    // The window opens a little more while the first data arrives.
    for _ in 0..3 {
        while rustix::net::send(&socket.fd, &data, flags).is_ok() {
            assert!(Instant::now() < end, "the peer takes any amount");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// A listener that leaves a connection half-open until data comes.
fn deferring(ip: IpAddr) -> Tcp {
    let listener = Tcp::listening(ip, 8);
    let seconds: libc::c_int = 30;
    // SAFETY: the option is an int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            listener.fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    assert_eq!(result, 0, "TCP_DEFER_ACCEPT");
    listener
}

/// Sockets in each state that lasts, to be kept.
fn sockets(ip: IpAddr) -> Vec<Tcp> {
    let mut kept = Vec::new();
    let mut pair = || {
        let Pair {
            listener,
            client,
            server,
            ..
        } = Pair::new(ip);
        kept.push(listener);
        (client, server)
    };
    let (unread, reader) = pair();
    unread.send();
    reader.peek();

    let (filled, filler) = pair();
    fill(&filler);

    let (fin_wait_1, slow) = pair();
    fill(&fin_wait_1);
    drop(fin_wait_1);

    let (fin_wait_2, last_ack) = pair();
    fin_wait_2.shutdown(Shutdown::Write);
    last_ack.peek();
    fill(&last_ack);
    drop(last_ack);

    let (orphan, close_wait) = pair();
    drop(orphan);
    close_wait.peek();

    let (time_wait, closed) = pair();
    time_wait.shutdown(Shutdown::Write);
    closed.peek();
    drop(closed);
    time_wait.peek();
    drop(time_wait);

    let full = Tcp::listening(ip, 0);
    fchown(&full.fd, Some(UID), None).expect("fchown");
    let unaccepted = Tcp::connected(full.local());
    let syn_sent = Tcp::new(ip);
    syn_sent.begin_connect(full.local());

    let listener = deferring(ip);
    let half_open = Tcp::connected(listener.local());

    kept.extend([unread, reader, filled, filler, slow, fin_wait_2, close_wait]);
    kept.extend([full, unaccepted, syn_sent, listener, half_open]);
    kept
}

/// What is in [`sockets`], with whether it has a timer of its own.
const STATES: [(TcpState, bool); 10] = [
    (TcpState::ESTABLISHED, false),
    (TcpState::SYN_SENT, false),
    (TcpState::FIN_WAIT1, false),
    (TcpState::FIN_WAIT2, false),
    (TcpState::FIN_WAIT2, true),
    (TcpState::TIME_WAIT, true),
    (TcpState::CLOSE_WAIT, false),
    (TcpState::LAST_ACK, false),
    (TcpState::LISTEN, false),
    (TcpState::NEW_SYN_RECV, true),
];

/// As /proc shows it.
fn seen(record: &Record) -> Seen {
    let end = |end: Endpoint| match end.addr {
        Some(addr) => SocketAddr::new(addr, end.port.unwrap_or(0)).to_string(),
        None => "-".to_owned(),
    };
    let state = match record.state {
        TcpState::NEW_SYN_RECV => TcpState::SYN_RECV,
        state => state,
    };
    (
        state.to_string(),
        end(record.local),
        end(record.remote),
        record.recv_queue.into(),
    )
}

/// What differs between what the two say of a socket.
fn difference(by_iterator: &Record, by_inet_diag: &Record) -> Option<String> {
    let tick = Duration::try_from(clock_getres(ClockId::MonotonicCoarse)).expect("not negative");
    let plain = |record: &Record| Record {
        address: None,
        read_ns: (0, 0),
        expires_ns: record.expires_ns.map(|_| 0),
        // Up to 6.16 inet_diag gives 0 where there is no file.
        uid: record.uid.filter(|_| record.inode != 0),
        ..*record
    };
    let (a, b) = (plain(by_iterator), plain(by_inet_diag));
    if a != b {
        return Some(format!("{a:?}\n{b:?}"));
    }
    let (a, b) = (by_iterator.expires_ns?, by_inet_diag.expires_ns?);
    let slack = 2 * tick.as_nanos() as u64 + 1_000_000;
    let ends = by_iterator.read_ns.0 + a;
    let (earliest, latest) = by_inet_diag.read_ns;
    let within = earliest + b - slack..=latest + b + slack;
    (!within.contains(&ends)).then(|| {
        format!(
            "{} ends at {ends}, which is not in {within:?}",
            by_iterator.state
        )
    })
}

/// The iterator's dump, or how it differs from inet_diag's and from /proc.
fn agreed(inode: u32, iterator: &SocketIterator) -> Result<Vec<Record>, String> {
    let by_inet_diag = dump(inode, StateMask::ALL, None);
    let records = dump(inode, StateMask::ALL, Some(iterator));
    let by_cookie: BTreeMap<u64, &Record> = records
        .iter()
        .filter_map(|record| Some((record.cookie?, record)))
        .collect();
    if by_cookie.len() != records.len() || records.len() != by_inet_diag.len() {
        return Err(format!(
            "{} cookies of {} sockets, where inet_diag has {}",
            by_cookie.len(),
            records.len(),
            by_inet_diag.len()
        ));
    }
    for other in &by_inet_diag {
        let Some(record) = other.cookie.and_then(|its| by_cookie.get(&its)) else {
            return Err(format!("{other:?} is missing"));
        };
        if let Some(difference) = difference(record, other) {
            return Err(difference);
        }
    }
    let (seen, in_proc) = (records.iter().map(seen).collect(), proc_sockets());
    if BTreeSet::<Seen>::ne(&seen, &in_proc) {
        return Err(format!("{seen:#?}, where /proc has {in_proc:#?}"));
    }
    Ok(records)
}

#[test]
fn dumps_by_the_iterator_are_those_by_inet_diag() {
    in_namespace(|inode| {
        let session = session(inode);
        let iterator = session.sockets().expect("the kernel has the iterator");
        let mut kept = sockets(Ipv4Addr::LOCALHOST.into());
        kept.extend(sockets(Ipv6Addr::LOCALHOST.into()));
        let dual = Tcp::listening(Ipv6Addr::UNSPECIFIED.into(), 8);
        let far = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), dual.local().port());
        let mapped = Tcp::connected(far);
        kept.extend([dual.accept(), mapped, dual]);

        let end = Instant::now() + Duration::from_secs(20);
        let records = loop {
            // They are not read at one time, and some still move.
            match agreed(inode, iterator) {
                Ok(records) => break records,
                Err(difference) => assert!(Instant::now() < end, "{difference}"),
            }
            thread::sleep(Duration::from_millis(20));
        };

        for family in [4, 6] {
            let of_it = records.iter().filter(|record| {
                let v4 = record.local.addr.is_some_and(|addr| addr.is_ipv4());
                v4 == (family == 4)
            });
            let states = of_it.map(|record| (record.state, record.expires_ns.is_some()));
            assert_eq!(states.collect::<BTreeSet<_>>(), BTreeSet::from(STATES));
        }
        let address = |record: &Record| record.address.expect("the iterator tells it");
        let addresses: BTreeSet<u64> = records.iter().map(address).collect();
        assert_eq!(addresses.len(), records.len());
        // In the kernel's half.
        assert!(addresses.iter().all(|address| address >> 63 == 1));
        for record in &records {
            assert_eq!(
                (record.netns, record.uid.is_none()),
                (inode, record.expires_ns.is_some())
            );
            assert_eq!(record.read_ns.0, record.read_ns.1);
        }
        // The listener, and its child that nobody has accepted.
        let ours = records.iter().filter(|record| record.uid == Some(UID));
        let mut ours: Vec<_> = ours
            .map(|record| (record.state, record.inode != 0))
            .collect();
        ours.sort_unstable();
        let [child, listener] = [(TcpState::ESTABLISHED, false), (TcpState::LISTEN, true)];
        assert_eq!(ours, [child, child, listener, listener]);
        let queued = |state| {
            records
                .iter()
                .filter(move |record| record.state == state && record.send_queue > 0)
        };
        for state in [
            TcpState::ESTABLISHED,
            TcpState::FIN_WAIT1,
            TcpState::LAST_ACK,
        ] {
            assert_eq!(queued(state).count(), 2, "{state}");
        }
        drop(kept);
    });
}

/// Memory that is not there: who touches it waits until it is filled.
struct Absent {
    faults: OwnedFd,
    at: usize,
}

const PAGE: usize = 4096;

impl Absent {
    fn page() -> Self {
        // SAFETY: makes a descriptor, and takes no pointers.
        let faults =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        assert!(faults >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: it is new, and nobody else's.
        let faults = unsafe { OwnedFd::from_raw_fd(faults as i32) };
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping, where there is none.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, access, kind, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let absent = Self {
            faults,
            at: at as usize,
        };
        // struct uffdio_api, struct uffdio_register.
        absent.ioctl(0xc018_aa3f, &mut [0xaa, 0, 0]);
        absent.ioctl(0xc020_aa00, &mut [absent.at as u64, PAGE as u64, 1, 0]);
        absent
    }

    /// Somebody waits for it.
    fn is_missed(&self) -> bool {
        let mut faults = [PollFd::new(&self.faults, PollFlags::IN)];
        poll(&mut faults, Some(&Timespec::default())).expect("it can be polled") == 1
    }

    fn fill(&self) {
        let page = [7_u8; PAGE];
        // struct uffdio_copy.
        self.ioctl(
            0xc028_aa03,
            &mut [self.at as u64, page.as_ptr() as u64, PAGE as u64, 0, 0],
        );
    }

    /// `argument`: as long as the request's number says.
    fn ioctl(&self, request: u32, argument: &mut [u64]) {
        assert_eq!(request as usize >> 16 & 0x3fff, size_of_val(argument));
        // SAFETY: each of the requests reads and writes a struct of these words, which lives through the call.
        let result = unsafe {
            libc::ioctl(
                self.faults.as_raw_fd(),
                request as libc::Ioctl,
                argument.as_mut_ptr(),
            )
        };
        assert_eq!(result, 0, "{request:x}: {}", io::Error::last_os_error());
    }
}

/// A process has its socket locked while it waits for the memory that it sends from. From 5.15 on the kernel's iterator
/// would wait for that, and nothing could end it.
#[test]
fn a_socket_that_stays_locked_holds_up_no_dump() {
    in_namespace(|_| {
        let pair = Pair::new(Ipv4Addr::LOCALHOST.into());
        let (absent, client) = (Absent::page(), pair.client.fd.as_raw_fd());
        let at = absent.at;
        // SAFETY: the memory is mapped until the process ends.
        let send = move || unsafe { libc::send(client, at as *const libc::c_void, PAGE, 0) };
        let sender = thread::spawn(send);
        until("the sender waits", || absent.is_missed());
        // Ready after a dump.
        let daemon = Daemon::start(&[]);
        assert_eq!(daemon.metrics().state("established"), 2.0);
        assert!(!sender.is_finished());
        absent.fill();
        assert_eq!(sender.join().expect("no panic"), PAGE as isize);
    });
}
