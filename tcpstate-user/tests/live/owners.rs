//! Whose sockets are, as the daemon's gauges by process tell: those from before its start, and those whose holder changes
//! without an event.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, IntoRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::thread;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, sockopt,
};

use crate::daemon::{Daemon, in_namespace};
use crate::lab::until;
use crate::sockets::Tcp;
use crate::sys::{self, Fork};
use crate::tracer::product;
use crate::without::{WHOLE, knows_holders};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
const QUICK: [&str; 2] = ["--reconcile-interval", "200ms"];

/// How many sockets a process has in a state.
type Owned = BTreeMap<(String, String), u32>;

fn owned(sockets: &[(&str, &str, u32)]) -> Owned {
    let sockets = sockets.iter();
    sockets
        .map(|&(comm, state, count)| ((comm.to_owned(), state.to_owned()), count))
        .collect()
}

/// What the daemon says, without its own sockets.
fn told(daemon: &Daemon) -> Owned {
    let metrics = daemon.metrics();
    let of_series = |series: &str| {
        let labels = series.strip_prefix("tcpstate_process_sockets{comm=\"")?;
        let (comm, state) = labels.strip_suffix("\"}")?.split_once("\",state=\"")?;
        (comm != "tcpstate").then(|| (comm.to_owned(), state.to_owned()))
    };
    let all = metrics.0.iter();
    all.filter(|(_, count)| **count != 0.0)
        .filter_map(|(series, count)| Some((of_series(series)?, *count as u32)))
        .collect()
}

/// Waits until these processes have these sockets, and no others.
fn until_told(daemon: &Daemon, comms: &[&str], expected: &[(&str, &str, u32)]) {
    let expected = owned(expected);
    until(&format!("{expected:?}"), || {
        let mut told = told(daemon);
        told.retain(|(comm, _), _| comms.contains(&comm.as_str()));
        told == expected
    });
}

/// A process that has no sockets but these, and does nothing with them.
fn hold(name: &'static CStr, sockets: &[&Tcp]) -> Fork {
    let keep: Vec<BorrowedFd<'_>> = sockets.iter().map(|socket| socket.fd.as_fd()).collect();
    let process = Fork::new(&keep, || {
        let _ = rustix::thread::set_name(name);
        wait();
    });
    let process = process.expect("a process");
    until("it has its name", || comm_of(process.pid) == name);
    process
}

/// For ever.
fn wait() {
    loop {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    }
}

fn comm_of(pid: u32) -> CString {
    let mut comm = fs::read(format!("/proc/{pid}/comm")).expect("it lives");
    comm.pop();
    CString::new(comm).expect("no NUL")
}

/// Sends until the peer, who does not read, has no room.
pub fn fill(socket: &Tcp) {
    rustix::io::ioctl_fionbio(&socket.fd, true).expect("non-blocking");
    let data = [0; 1 << 16];
    let mut full = 0;
    while full < 3 {
        match rustix::net::send(&socket.fd, &data, SendFlags::NOSIGNAL) {
            Ok(_) => full = 0,
            Err(_) => {
                full += 1;
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// A SYN from somebody who will not answer, as the network's interface takes it in.
fn syn(from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let sum = |bytes: &[u8]| {
        let words = bytes.chunks_exact(2);
        let mut sum: u32 = words
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        (!(sum as u16)).to_be_bytes()
    };
    let ends = [from.octets(), to.octets()].concat();
    // Version, length, …, TTL, TCP; then the checksum and the ends.
    let mut ip = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    ip.extend(&ends);
    let check = sum(&ip);
    ip[10..12].copy_from_slice(&check);
    let mut tcp = [&4711_u16.to_be_bytes()[..], &port.to_be_bytes()].concat();
    // Sequence and acknowledgment, five words, SYN, the window, checksum, no urgent data.
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0x20, 0, 0, 0, 0, 0]);
    let check = sum(&[&ends[..], &[0, 6, 0, 20], &tcp].concat());
    tcp[16..18].copy_from_slice(&check);
    [ip, tcp].concat()
}

/// By state, of the calling thread's namespace.
fn proc_sockets() -> BTreeMap<String, u32> {
    const STATES: [&str; 11] = [
        "established",
        "syn_sent",
        "syn_recv",
        "fin_wait1",
        "fin_wait2",
        "time_wait",
        "close",
        "close_wait",
        "last_ack",
        "listen",
        "closing",
    ];
    let mut counts = BTreeMap::new();
    for file in ["tcp", "tcp6"] {
        let path = format!("/proc/thread-self/net/{file}");
        let table = fs::read_to_string(path).expect("/proc is mounted");
        for line in table.lines().skip(1) {
            let number = line.split_whitespace().nth(3).expect("a state");
            let number = usize::from_str_radix(number, 16).expect("hexadecimal");
            *counts.entry(STATES[number - 1].to_owned()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn sockets_from_before_the_start_have_their_owners() {
    from_before_the_start(WHOLE);
}

/// In every state that can be reached without a packet filter, held by processes that opened none of them.
pub fn from_before_the_start(without: &'static str) {
    in_namespace(move |_| {
        let silent = [Ipv4Addr::new(192, 0, 2, 1).into(), sys::v6(1)];
        let mut network = sys::silent_network(&silent).expect("a network of silence");
        let nobody = Ipv4Addr::new(192, 0, 2, 2);
        let mut holders = Vec::new();
        for (ip, nobody) in [(V4, nobody.into()), (V6, sys::v6(2))] {
            let listener = Tcp::listening(ip, 16);
            let pair = || (Tcp::connected(listener.local()), listener.accept());
            let shut = |socket: &Tcp| socket.shutdown(Shutdown::Write);

            let (client, server) = pair();
            holders.push(hold(c"est-client", &[&client]));
            holders.push(hold(c"est-server", &[&server]));

            let (client, server) = pair();
            fill(&client);
            shut(&client);
            holders.push(hold(c"fin-wait1", &[&client]));
            holders.push(hold(c"est-server", &[&server]));

            let (client, server) = pair();
            shut(&client);
            server.peek();
            holders.push(hold(c"fin-wait2", &[&client]));
            holders.push(hold(c"close-wait", &[&server]));

            // An orphan.
            let (client, server) = pair();
            drop(client);
            server.peek();
            holders.push(hold(c"close-wait", &[&server]));

            let (client, server) = pair();
            shut(&client);
            server.peek();
            fill(&server);
            shut(&server);
            holders.push(hold(c"fin-wait2", &[&client]));
            holders.push(hold(c"last-ack", &[&server]));

            let (client, server) = pair();
            fill(&client);
            shut(&client);
            shut(&server);
            holders.push(hold(c"closing", &[&client]));
            holders.push(hold(c"fin-wait2", &[&server]));

            let (client, server) = pair();
            drop(client);
            server.peek();
            drop(server);

            let opening = Tcp::new(ip);
            opening.begin_connect(SocketAddr::new(nobody, 80));
            holders.push(hold(c"syn-sent", &[&opening]));

            let unaccepted = Tcp::connected(listener.local());
            holders.push(hold(c"est-client", &[&unaccepted]));
            holders.push(hold(c"listen", &[&listener]));
        }
        let IpAddr::V4(ours) = silent[0] else {
            unreachable!("the first is")
        };
        let listener = Tcp::listening(ours.into(), 1);
        let packet = syn(nobody, ours, listener.local().port());
        network.write_all(&packet).expect("a packet");
        holders.push(hold(c"listen", &[&listener]));
        drop(listener);

        let daemon = Daemon::without(without, &[]);
        let metrics = daemon.metrics();
        for (state, count) in proc_sockets() {
            assert_eq!(metrics.state(&state), f64::from(count), "{state}");
        }
        if !knows_holders(without) {
            // What no event told of has no owner.
            let owners: BTreeSet<String> =
                told(&daemon).into_keys().map(|(comm, _)| comm).collect();
            assert_eq!(owners, BTreeSet::from(["<none>".to_owned()]));
            return;
        }
        assert_eq!(
            told(&daemon),
            owned(&[
                ("est-client", "established", 4),
                // What nobody has accepted is who listens to accept.
                ("listen", "established", 2),
                ("est-server", "established", 4),
                ("fin-wait1", "fin_wait1", 2),
                ("fin-wait2", "fin_wait2", 6),
                ("<none>", "fin_wait2", 2),
                ("close-wait", "close_wait", 4),
                ("last-ack", "last_ack", 2),
                ("closing", "closing", 2),
                ("<none>", "time_wait", 2),
                ("syn-sent", "syn_sent", 2),
                ("<none>", "syn_recv", 1),
                ("listen", "listen", 3),
            ])
        );
        drop(network);
    });
}

pub fn send_fd(through: &OwnedFd, fd: BorrowedFd<'_>) -> Option<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    ancillary
        .push(SendAncillaryMessage::ScmRights(&fds))
        .then_some(())?;
    let data = [std::io::IoSlice::new(b"!")];
    rustix::net::sendmsg(through, &data, &mut ancillary, SendFlags::empty()).ok()?;
    Some(())
}

pub fn receive_fd(through: &OwnedFd) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [std::io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(through, &mut data, &mut ancillary, RecvFlags::empty()).ok()?;
    let message = ancillary.drain().next()?;
    let RecvAncillaryMessage::ScmRights(mut fds) = message else {
        return None;
    };
    fds.next()
}

/// Of both the older one counts while both hold it, whoever opened it.
#[test]
fn a_socket_passed_to_another_process_is_that_ones() {
    for older_receives in [false, true] {
        in_namespace(move |_| {
            let daemon = Daemon::start(&QUICK);
            let listener = Tcp::listening(V4, 8);
            let address = listener.local();
            let (there, here) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )
            .expect("a socket pair");
            let (waits, go) = sys::pipe().expect("a pipe");
            let (waits_to_end, end) = sys::pipe().expect("a pipe");
            let sender = || {
                let keep = [there.as_fd(), waits.as_fd(), waits_to_end.as_fd()];
                let process = Fork::new(&keep, || {
                    let _ = rustix::thread::set_name(c"sender");
                    let socket = Tcp::connected(address);
                    let _ = rustix::io::read(&waits, &mut [0]);
                    let _ = send_fd(&there, socket.fd.as_fd());
                    let _ = rustix::io::read(&waits_to_end, &mut [0]);
                });
                process.expect("a process")
            };
            let receiver = || {
                let process = Fork::new(&[here.as_fd()], || {
                    let _ = rustix::thread::set_name(c"receiver");
                    let _socket = receive_fd(&here);
                    wait();
                });
                // The kernel tells starts apart by less than a tick; `/proc` does not.
                thread::sleep(Duration::from_millis(20));
                process.expect("a process")
            };
            let early = older_receives.then(receiver);
            let _sender = sender();
            let comms = ["sender", "receiver"];
            until_told(&daemon, &comms, &[("sender", "established", 1)]);
            let _receiver = early.unwrap_or_else(receiver);
            drop(go);
            if older_receives {
                until_told(&daemon, &comms, &[("receiver", "established", 1)]);
            }
            drop(end);
            until_told(&daemon, &comms, &[("receiver", "established", 1)]);
        });
    }
}

/// By closing its descriptor, or by its end.
#[test]
fn a_socket_that_a_parent_leaves_is_its_childs() {
    for ends in [false, true] {
        in_namespace(move |_| {
            let daemon = Daemon::start(&QUICK);
            let listener = Tcp::listening(V4, 8);
            let address = listener.local();
            let (waits, go) = sys::pipe().expect("a pipe");
            let (waits_to_end, end) = sys::pipe().expect("a pipe");
            let parent = Fork::new(&[waits.as_fd(), waits_to_end.as_fd()], || {
                let _ = rustix::thread::set_name(c"parent");
                let socket = Tcp::connected(address);
                let child = Fork::new(&[socket.fd.as_fd(), waits_to_end.as_fd()], || {
                    let _ = rustix::thread::set_name(c"child");
                    let _ = rustix::io::read(&waits_to_end, &mut [0]);
                });
                let _ = rustix::io::read(&waits, &mut [0]);
                // It lives on.
                std::mem::forget(child);
                drop(socket);
                if !ends {
                    wait();
                }
            });
            let _parent = parent.expect("a process");
            let comms = ["parent", "child"];
            until_told(&daemon, &comms, &[("parent", "established", 1)]);
            drop(go);
            until_told(&daemon, &comms, &[("child", "established", 1)]);
            drop(end);
        });
    }
}

#[test]
fn a_program_that_is_executed_has_the_sockets_under_its_name() {
    in_namespace(|inode| {
        let daemon = Daemon::start(&QUICK);
        let listener = Tcp::listening(V4, 8);
        let address = listener.local();
        // The one other program that there is; it says nothing of other ports.
        let text = |text: &str| CString::new(text).expect("no NUL");
        let product = CString::new(product().as_os_str().as_bytes()).expect("no NUL");
        let arguments = ["watch", "--direct", "-q", "--port", "1", "--netns"].map(text);
        let inode = text(&inode.to_string());
        let mut pointers = vec![c"another-name".as_ptr()];
        pointers.extend(arguments.iter().map(|argument| argument.as_ptr()));
        pointers.extend([inode.as_ptr(), std::ptr::null()]);
        // A link gives the process its name.
        let folder = tempfile::TempDir::new().expect("a folder");
        let link = folder.path().join("another-name");
        std::os::unix::fs::symlink(product.to_str().expect("text"), &link).expect("a link");
        let link = CString::new(link.as_os_str().as_bytes()).expect("no NUL");
        let (waits, go) = sys::pipe().expect("a pipe");
        let process = Fork::new(&[waits.as_fd()], || {
            let _ = rustix::thread::set_name(c"before");
            let socket = Tcp::connected(address);
            let _ = rustix::io::fcntl_setfd(&socket.fd, rustix::io::FdFlags::empty());
            let _ = rustix::io::read(&waits, &mut [0]);
            // SAFETY: path and arguments end with NUL, the list with null; all live through the call.
            unsafe { libc::execv(link.as_ptr(), pointers.as_ptr()) };
        });
        let _process = process.expect("a process");
        let comms = ["before", "another-name"];
        until_told(&daemon, &comms, &[("before", "established", 1)]);
        drop(go);
        until_told(&daemon, &comms, &[("another-name", "established", 1)]);
    });
}

#[test]
fn a_threads_sockets_are_its_processs() {
    in_namespace(|_| {
        let daemon = Daemon::start(&QUICK);
        let opened = thread::Builder::new().name("only-a-thread".to_owned());
        let opened = opened.spawn(|| {
            let listener = Tcp::listening(V4, 8);
            let client = Tcp::connected(listener.local());
            let server = listener.accept();
            (listener, client, server)
        });
        let _opened = opened.expect("a thread").join().expect("no panic");
        let process = comm_of(std::process::id());
        let process = process.to_str().expect("text");
        assert_ne!(process, "only-a-thread");
        let all = [(process, "established", 2), (process, "listen", 1)];
        until("they are the process's", || told(&daemon) == owned(&all));
    });
}

/// Which of the listeners gets a connection no event tells.
#[test]
fn connections_of_a_shared_port_are_who_accepted_them() {
    const CLIENTS: usize = 40;
    in_namespace(|_| {
        let daemon = Daemon::start(&QUICK);
        let (told_by_servers, tell) = sys::pipe().expect("a pipe");
        let address = SocketAddr::new(V4, 9000);
        let server = |name: &'static CStr, sign: u8| {
            // Both listen before the first connect.
            let listener = Tcp::new(V4);
            sockopt::set_socket_reuseport(&listener.fd, true).expect("SO_REUSEPORT");
            rustix::net::bind(&listener.fd, &address).expect("bind");
            let process = Fork::new(&[listener.fd.as_fd(), tell.as_fd()], || {
                let _ = rustix::thread::set_name(name);
                let _ = rustix::net::listen(&listener.fd, 64);
                let _ = rustix::io::write(&tell, b"+");
                loop {
                    let _ = listener.accept().fd.into_raw_fd();
                    let _ = rustix::io::write(&tell, &[sign]);
                }
            });
            process.expect("a process")
        };
        let read = |count: usize| -> Vec<u8> {
            let byte = || {
                let mut byte = [0];
                let read = rustix::io::read(&told_by_servers, &mut byte);
                assert_eq!(read, Ok(1));
                byte[0]
            };
            (0..count).map(|_| byte()).collect()
        };
        let _servers = [server(c"server-a", b'a'), server(c"server-b", b'b')];
        assert_eq!(read(2), b"++");
        let clients: Vec<Tcp> = (0..CLIENTS).map(|_| Tcp::connected(address)).collect();
        let accepted = read(CLIENTS);
        let by = |sign: u8| accepted.iter().filter(|by| **by == sign).count() as u32;
        let (a, b) = (by(b'a'), by(b'b'));
        assert!(a > 0 && b > 0, "one server got all");
        let all = [
            ("server-a", "established", a),
            ("server-a", "listen", 1),
            ("server-b", "established", b),
            ("server-b", "listen", 1),
        ];
        until_told(&daemon, &["server-a", "server-b"], &all);
        drop(clients);
    });
}
