//! Dumps of real sockets in namespaces of the tests' own, compared with /proc/net/tcp and tcp6; and the parser
//! under damaged bytes.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustc_hash::FxHashSet;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::diag::{PATIENCE, open, receive};
use super::parse::{Message, Request, messages};
use super::{DumpError, boot_time_ns, take};
use crate::kernel::netns;
use crate::model::{Endpoint, Family, NetnsSelection, TcpState};
use crate::table::{Record, StateMask};

/// Runs `work` on a thread in a new network namespace with loopback up, and gives it the inode.
fn in_namespace(work: impl FnOnce(u32) + Send + 'static) {
    thread::spawn(move || {
        new_namespace().expect("network namespaces need root");
        set_up("lo").expect("loopback goes up");
        work(netns::own().expect("/proc"));
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn new_namespace() -> io::Result<()> {
    // SAFETY: a thread alone may have another network namespace; no descriptors are unshared.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is integers and arrays, for which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn interface_ioctl(number: libc::c_ulong, request: &libc::ifreq) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all the requests used here take a pointer to an `ifreq`, which lives through the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), number as libc::Ioctl, request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_up(name: &str) -> io::Result<()> {
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    interface_ioctl(libc::SIOCSIFFLAGS, &request)
}

/// An interface that nobody answers behind, with 192.0.2.1/24; packets written to the file come in by it.
fn silent_network() -> io::Result<File> {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = interface_request("silent");
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF takes a pointer to an `ifreq`, which lives through the call.
    if unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let address = |octets: [u8; 4]| {
        let mut address = [0; 14];
        address[2..6].copy_from_slice(&octets.map(|octet| octet as libc::c_char));
        libc::sockaddr {
            sa_family: libc::AF_INET as u16,
            sa_data: address,
        }
    };
    request.ifr_ifru.ifru_addr = address([192, 0, 2, 1]);
    interface_ioctl(libc::SIOCSIFADDR, &request)?;
    request.ifr_ifru.ifru_netmask = address([255, 255, 255, 0]);
    interface_ioctl(libc::SIOCSIFNETMASK, &request)?;
    set_up("silent")?;
    Ok(tun)
}

/// A SYN from 192.0.2.2:4444 to 192.0.2.1.
fn syn(port: u16) -> Vec<u8> {
    fn checksum(parts: &[&[u8]]) -> [u8; 2] {
        let words = parts.iter().flat_map(|part| part.chunks(2));
        let sum: u32 = words
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        (!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes()
    }
    let (from, to) = ([192, 0, 2, 2], [192, 0, 2, 1]);
    let mut ip = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    ip.extend(from);
    ip.extend(to);
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum);
    let mut tcp = Vec::new();
    tcp.extend(4444_u16.to_be_bytes());
    tcp.extend(port.to_be_bytes());
    tcp.extend([0, 0, 0, 7, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let sum = checksum(&[&from, &to, &[0, 6, 0, 20], &tcp]);
    tcp[16..18].copy_from_slice(&sum);
    [ip, tcp].concat()
}

/// What both the dump and /proc/net/tcp say of a socket; a timewait socket or a request has neither uid nor
/// inode in /proc.
type Line = (IpAddr, u16, Option<IpAddr>, u16, u8, Option<u32>, u32);

fn line(record: &Record) -> Line {
    let number = match record.state {
        TcpState::NEW_SYN_RECV => TcpState::SYN_RECV,
        state => state,
    };
    let Endpoint {
        addr: Some(local_addr),
        port: Some(local_port),
    } = record.local
    else {
        panic!("a socket without a local end: {record:?}");
    };
    (
        local_addr,
        local_port,
        record.remote.addr,
        record.remote.port.unwrap_or(0),
        number.number(),
        record.uid,
        record.inode,
    )
}

fn oracle() -> BTreeSet<Line> {
    let mut lines = BTreeSet::new();
    for path in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        for text in fs::read_to_string(path).expect(path).lines().skip(1) {
            let fields: Vec<&str> = text.split_whitespace().collect();
            let (local_addr, local_port) = oracle_end(fields[1]);
            let (remote_addr, remote_port) = oracle_end(fields[2]);
            let state = u8::from_str_radix(fields[3], 16).expect("state");
            // Timer 3 is a timewait socket's; nothing here is in SYN_RECV but requests.
            let mini = fields[5].starts_with("03:") || state == 3;
            lines.insert((
                local_addr,
                local_port,
                (state != 10).then_some(remote_addr),
                remote_port,
                state,
                (!mini).then(|| fields[7].parse().expect("uid")),
                fields[9].parse().expect("inode"),
            ));
        }
    }
    lines
}

fn oracle_end(text: &str) -> (IpAddr, u16) {
    let (address, port) = text.split_once(':').expect("address:port");
    let words: Vec<[u8; 4]> = (0..address.len() / 8)
        .map(|word| {
            u32::from_str_radix(&address[word * 8..][..8], 16)
                .expect("hex")
                .to_ne_bytes()
        })
        .collect();
    let address = match words.as_slice() {
        [v4] => Ipv4Addr::from(*v4).into(),
        v6 => Ipv6Addr::from(<[u8; 16]>::try_from(v6.concat()).expect("16 bytes")).to_canonical(),
    };
    (address, u16::from_str_radix(port, 16).expect("hex port"))
}

/// Takes a snapshot and /proc until they agree: their reading is not atomic, and states still move.
fn agreed(inode: u32) -> Vec<Record> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let snapshot = take(
            NetnsSelection::One(inode),
            StateMask::ALL,
            FxHashSet::default(),
            None,
        )
        .expect("a snapshot");
        assert_eq!(snapshot.netns, [inode]);
        assert_eq!(snapshot.unreachable, []);
        let dumped: BTreeSet<Line> = snapshot.records.iter().map(line).collect();
        let expected = oracle();
        if dumped == expected {
            assert_eq!(dumped.len(), snapshot.records.len(), "no socket twice");
            return snapshot.records;
        }
        assert!(
            Instant::now() < end,
            "dump {dumped:#?}\n/proc {expected:#?}"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

fn states(records: &[Record]) -> BTreeSet<(TcpState, bool)> {
    records
        .iter()
        .map(|record| (record.state, record.expires_ns.is_some()))
        .collect()
}

fn accepted(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    (client, server)
}

#[test]
fn a_dump_says_what_proc_says_for_each_state() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        in_namespace(move |inode| {
            let listener = TcpListener::bind(address).expect("bind");
            let established = accepted(&listener);
            let unaccepted = TcpStream::connect(listener.local_addr().expect("bound"));
            // The client's end is an orphan in FIN_WAIT2, the server's in CLOSE_WAIT.
            let (orphan, close_wait) = accepted(&listener);
            drop(orphan);
            let (time_wait, last) = accepted(&listener);
            drop(time_wait);
            thread::sleep(Duration::from_millis(20));
            drop(last);

            let records = agreed(inode);
            assert_eq!(
                states(&records),
                BTreeSet::from([
                    (TcpState::LISTEN, false),
                    (TcpState::ESTABLISHED, false),
                    (TcpState::CLOSE_WAIT, false),
                    (TcpState::FIN_WAIT2, true),
                    (TcpState::TIME_WAIT, true),
                ])
            );
            for record in &records {
                assert_ne!(record.cookie, Some(0));
                assert_eq!(record.netns, inode);
                let (earliest, latest) = record.read_ns;
                assert!(earliest < latest && latest <= boot_time_ns(), "{record:?}");
                if let Some(left) = record.expires_ns {
                    assert!((50_000_000_000..=60_000_000_000).contains(&left), "{left}");
                }
            }
            let cookies: BTreeSet<_> = records.iter().map(|record| record.cookie).collect();
            assert_eq!(cookies.len(), records.len());
            drop((established, unaccepted, close_wait));
        });
    }
}

#[test]
fn dual_stack_sockets_show_ipv4_peers_as_ipv4() {
    in_namespace(|inode| {
        let listener = TcpListener::bind("[::]:0").expect("bind");
        let port = listener.local_addr().expect("bound").port();
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connect");
        let server = listener.accept().expect("accept");

        let records = agreed(inode);
        let of = |state| records.iter().filter(move |record| record.state == state);
        let listening = of(TcpState::LISTEN).next().expect("the listener");
        assert_eq!(listening.family, Family::Ipv6);
        assert_eq!(listening.local.addr, Some(Ipv6Addr::UNSPECIFIED.into()));
        assert_eq!(listening.remote, Endpoint::default());
        assert_eq!(of(TcpState::ESTABLISHED).count(), 2);
        for record in of(TcpState::ESTABLISHED) {
            assert_eq!(record.family, Family::Ipv4);
            assert_eq!(record.local.addr, Some(Ipv4Addr::LOCALHOST.into()));
            assert_eq!(record.remote.addr, Some(Ipv4Addr::LOCALHOST.into()));
        }
        drop((client, server));
    });
}

#[test]
fn a_half_open_request_is_not_a_full_syn_recv_socket() {
    in_namespace(|inode| {
        let mut network = silent_network().expect("/dev/net/tun");
        let listener = TcpListener::bind("192.0.2.1:0").expect("bind");
        let port = listener.local_addr().expect("bound").port();
        network.write_all(&syn(port)).expect("a packet goes in");

        let records = agreed(inode);
        let request = records
            .iter()
            .find(|record| record.state == TcpState::NEW_SYN_RECV)
            .expect("the request");
        assert_eq!(
            request.remote,
            Endpoint {
                addr: Some(Ipv4Addr::new(192, 0, 2, 2).into()),
                port: Some(4444)
            }
        );
        assert_eq!((request.uid, request.inode), (None, 0));
        let left = request.expires_ns.expect("its timer");
        assert!(left <= 1_000_000_000, "{left}");

        // Asked for alone, each of the two kinds comes alone.
        let only = |state| {
            let mask = StateMask::of(&[state]);
            take(NetnsSelection::One(inode), mask, FxHashSet::default(), None)
                .expect("a snapshot")
                .records
        };
        assert_eq!(only(TcpState::SYN_RECV), []);
        assert_eq!(only(TcpState::NEW_SYN_RECV).len(), 1);
    });
}

#[test]
fn a_mask_chooses_the_states() {
    in_namespace(|inode| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let pair = accepted(&listener);
        let mask = StateMask::of(&[TcpState::LISTEN]);
        let snapshot =
            take(NetnsSelection::One(inode), mask, FxHashSet::default(), None).expect("a snapshot");
        assert_eq!(snapshot.states, mask);
        assert_eq!(
            states(&snapshot.records),
            BTreeSet::from([(TcpState::LISTEN, false)])
        );
        drop(pair);
    });
}

#[test]
fn all_namespaces_are_entered_and_the_caller_stays_where_it_is() {
    // A process, because the search looks at the main threads of processes.
    let mut command = Command::new("sleep");
    command.arg("30");
    // SAFETY: between fork and exec only one system call is made.
    unsafe { command.pre_exec(new_namespace) };
    let mut holder = command.spawn().expect("sleep, in a namespace of its own");
    let path = format!("/proc/{}/ns/net", holder.id());
    let inode = u32::try_from(rustix::fs::stat(&path).expect("alive").st_ino).expect("inode");

    let listener = thread::spawn(move || {
        netns::find(inode).expect("found").enter().expect("root");
        set_up("lo").expect("loopback goes up");
        TcpListener::bind("127.0.0.1:0").expect("bind")
    });
    let listener = listener.join().expect("no panic");
    let port = listener.local_addr().expect("bound").port();

    let home = netns::own().expect("/proc");
    let snapshot = take(
        NetnsSelection::All,
        StateMask::ALL,
        FxHashSet::default(),
        None,
    )
    .expect("a snapshot");
    assert_eq!(netns::own().expect("/proc"), home);
    assert_ne!(home, inode);
    assert!(snapshot.netns.contains(&home) && snapshot.netns.contains(&inode));
    let found: Vec<&Record> = snapshot
        .records
        .iter()
        .filter(|record| record.netns == inode)
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].local.port, Some(port));
    assert!(
        found[0].read_ns.0 >= snapshot.started_ns && found[0].read_ns.1 <= snapshot.finished_ns
    );

    holder.kill().expect("ours");
    holder.wait().expect("ours");
}

#[test]
fn a_namespace_that_may_not_be_entered_is_an_error_that_names_the_capability() {
    let mut command = Command::new("sleep");
    command.arg("30");
    // SAFETY: between fork and exec only one system call is made.
    unsafe { command.pre_exec(new_namespace) };
    let mut holder = command.spawn().expect("sleep, in a namespace of its own");
    let path = format!("/proc/{}/ns/net", holder.id());
    let inode = u32::try_from(rustix::fs::stat(&path).expect("alive").st_ino).expect("inode");

    // Threads inherit it, the one of the snapshot too.
    let message = thread::spawn(move || {
        let capability = caps::Capability::CAP_SYS_ADMIN;
        caps::drop(None, caps::CapSet::Effective, capability).expect("dropping is allowed");
        take(
            NetnsSelection::One(inode),
            StateMask::ALL,
            FxHashSet::default(),
            None,
        )
        .expect_err("may not enter")
        .to_string()
    });
    assert_eq!(
        message.join().expect("no panic"),
        format!(
            "can't list the sockets of network namespace {inode}: entering it needs CAP_SYS_ADMIN, \
             which is missing"
        )
    );
    holder.kill().expect("ours");
    holder.wait().expect("ours");
}

/// One real batch: the answers to a dump of a listener and a connection.
fn real_batch() -> Vec<u8> {
    thread::spawn(|| {
        new_namespace().expect("network namespaces need root");
        set_up("lo").expect("loopback goes up");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let pair = accepted(&listener);
        let socket = open(PATIENCE).expect("netlink");
        let request = Request::new(StateMask::ALL);
        rustix::net::send(&socket, request.as_bytes(), rustix::net::SendFlags::empty())
            .expect("send");
        let mut buffer = vec![0; 8192];
        let len = receive(&socket, &mut buffer).expect("an answer");
        drop(pair);
        buffer.truncate(len);
        buffer
    })
    .join()
    .expect("no panic")
}

fn records(batch: &[u8]) -> Result<Vec<Record>, super::parse::Malformed> {
    let mut records = Vec::new();
    for message in messages(batch) {
        if let (Message::Socket(found), _) = message? {
            records.extend(found.record(StateMask::ALL, 1, (0, 0)));
        }
    }
    Ok(records)
}

#[test]
fn damaged_answers_are_errors_or_other_records_and_never_a_panic() {
    let batch = real_batch();
    let whole = records(&batch).expect("the kernel's own");
    assert_eq!(whole.len(), 3);

    for len in 0..batch.len() {
        // Cut between messages, what is left is whole.
        if let Ok(part) = records(&batch[..len]) {
            assert_eq!(part, whole[..part.len()]);
        }
    }
    let config = ProptestConfig::with_cases(2000);
    let places = prop::collection::vec((0..batch.len(), any::<u8>()), 1..8);
    proptest!(config, |(changes in places, len in 0..=batch.len())| {
        let mut damaged = batch.clone();
        for (at, byte) in changes {
            damaged[at] = byte;
        }
        let seen = messages(&damaged[..len]).count();
        prop_assert!(seen <= len / 16 + 1);
        let _ = records(&damaged[..len]);
    });
    proptest!(|(bytes in prop::collection::vec(any::<u8>(), 0..512))| {
        let _ = records(&bytes);
    });
}

/// The kernel makes one for each socket that it lists; 0 would be everybody's.
#[test]
fn a_socket_without_a_cookie_has_none() {
    let mut batch = real_batch();
    // Behind the header, what stands before the id, both ports, both addresses and the interface.
    let cookie = 16 + 4 + 4 + 32 + 4;
    assert!(
        records(&batch).expect("the kernel's own")[0]
            .cookie
            .is_some()
    );
    batch[cookie..cookie + 8].fill(0);
    assert_eq!(records(&batch).expect("as before")[0].cookie, None);
}

/// Nothing was asked, so nothing comes.
#[test]
fn a_kernel_that_does_not_answer_is_not_waited_for() {
    let (done, answered) = mpsc::channel();
    thread::spawn(move || {
        let socket = open(Duration::from_millis(20)).unwrap();
        let _ = done.send(receive(&socket, &mut [0; 64]));
    });
    let answer = answered.recv_timeout(Duration::from_secs(10));
    let answer = answer.expect("it ends by itself");
    assert!(matches!(answer, Err(DumpError::NoAnswer)), "{answer:?}");
}
