//! TCP sockets by system calls, one each, so that a test says exactly what the kernel is to do.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, IntoRawFd as _, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, ipproto, sockopt,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sys::{self, Fork};

/// One socket; dropping it closes it.
pub struct Tcp {
    pub fd: OwnedFd,
}

impl Tcp {
    /// Of the family of `ip`.
    pub fn new(ip: IpAddr) -> Self {
        let family = if ip.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let fd = rustix::net::socket_with(
            family,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            Some(ipproto::TCP),
        );
        Self {
            fd: fd.expect("a socket"),
        }
    }

    /// On a port that the kernel chooses.
    pub fn bound(ip: IpAddr) -> Self {
        let socket = Self::new(ip);
        rustix::net::bind(&socket.fd, &SocketAddr::new(ip, 0)).expect("bind");
        socket
    }

    pub fn listening(ip: IpAddr, backlog: i32) -> Self {
        let socket = Self::bound(ip);
        rustix::net::listen(&socket.fd, backlog).expect("listen");
        socket
    }

    /// With whoever else listens there by SO_REUSEPORT.
    pub fn sharing(at: SocketAddr) -> Self {
        let socket = Self::new(at.ip());
        sockopt::set_socket_reuseport(&socket.fd, true).expect("SO_REUSEPORT");
        rustix::net::bind(&socket.fd, &at).expect("bind");
        rustix::net::listen(&socket.fd, 8).expect("listen");
        socket
    }

    pub fn connected(to: SocketAddr) -> Self {
        let socket = Self::new(to.ip());
        socket.connect(to).expect("connect");
        socket
    }

    pub fn connect(&self, to: SocketAddr) -> io::Result<()> {
        Ok(rustix::net::connect(&self.fd, &to)?)
    }

    /// Sends the SYN and returns.
    pub fn begin_connect(&self, to: SocketAddr) {
        rustix::io::ioctl_fionbio(&self.fd, true).expect("non-blocking");
        assert_eq!(
            rustix::net::connect(&self.fd, &to),
            Err(rustix::io::Errno::INPROGRESS)
        );
    }

    /// Waits until a connect that was begun has ended, or the connection has, and gives the error.
    pub fn wait_for_error(&self) -> io::Error {
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        let mut watched = [PollFd::new(&self.fd, PollFlags::empty())];
        let ready = rustix::io::retry_on_intr(|| poll(&mut watched, Some(&limit))).expect("poll");
        assert_eq!(ready, 1, "nothing happened to the socket in 20 s");
        let error = sockopt::socket_error(&self.fd).expect("SO_ERROR");
        error.expect_err("it failed").into()
    }

    /// Back to being unconnected.
    pub fn disconnect(&self) {
        rustix::net::connect_unspec(&self.fd).expect("connect to AF_UNSPEC");
    }

    pub fn accept(&self) -> Self {
        let fd = rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC).expect("accept");
        Self { fd }
    }

    pub fn local(&self) -> SocketAddr {
        address(rustix::net::getsockname(&self.fd).expect("a name"))
    }

    /// Its number; of a socket that others took the place of too (TIME_WAIT), where /proc shows those.
    pub fn state(&self) -> u8 {
        let mut info = [0_u8; 1];
        let mut len = 1;
        let (to, fd) = (info.as_mut_ptr().cast(), self.fd.as_raw_fd());
        // SAFETY: there is room for a byte, and the kernel writes no more: the first of `tcp_info` is the state.
        let got = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, to, &mut len) };
        assert_eq!(got, 0, "TCP_INFO: {}", io::Error::last_os_error());
        info[0]
    }

    pub fn shutdown(&self, how: Shutdown) {
        rustix::net::shutdown(&self.fd, how).expect("shutdown");
    }

    pub fn send(&self) {
        let sent = rustix::net::send(&self.fd, b"data", SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(4));
    }

    /// Waits for data, or for the end of it, and leaves it there.
    pub fn peek(&self) -> usize {
        let mut byte = [0];
        let (_, len) = rustix::net::recv(&self.fd, &mut byte, RecvFlags::PEEK).expect("peek");
        len
    }

    /// Closing resets the connection.
    pub fn reset_on_close(&self) {
        sockopt::set_socket_linger(&self.fd, Some(Duration::ZERO)).expect("SO_LINGER");
    }

    /// After a second of silence one probe a second, one in all.
    pub fn keepalive(&self) {
        let second = Duration::from_secs(1);
        sockopt::set_tcp_keepidle(&self.fd, second).expect("TCP_KEEPIDLE");
        sockopt::set_tcp_keepintvl(&self.fd, second).expect("TCP_KEEPINTVL");
        sockopt::set_tcp_keepcnt(&self.fd, 1).expect("TCP_KEEPCNT");
        sockopt::set_socket_keepalive(&self.fd, true).expect("SO_KEEPALIVE");
    }

    pub fn user_timeout(&self, limit: Duration) {
        let millis = u32::try_from(limit.as_millis()).expect("short");
        sockopt::set_tcp_user_timeout(&self.fd, millis).expect("TCP_USER_TIMEOUT");
    }
}

fn address(any: rustix::net::SocketAddrAny) -> SocketAddr {
    SocketAddr::try_from(any).expect("an internet address")
}

/// Connects to a port where nobody listens; gives the port that it had itself.
pub fn connect_to_nobody(to: SocketAddr) -> u16 {
    let socket = Tcp::bound(to.ip());
    let port = socket.local().port();
    let error = socket.connect(to).expect_err("nobody listens");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    port
}

/// Both ends of a connection, and where it came from.
pub struct Pair {
    pub listener: Tcp,
    pub client: Tcp,
    pub server: Tcp,
    /// Ends of the connection.
    pub near: SocketAddr,
    pub far: SocketAddr,
}

impl Pair {
    pub fn new(ip: IpAddr) -> Self {
        let listener = Tcp::listening(ip, 8);
        let far = listener.local();
        let client = Tcp::connected(far);
        let server = listener.accept();
        let near = client.local();
        Self {
            listener,
            client,
            server,
            near,
            far,
        }
    }
}

/// Pairs of processes that hold both ends of so many connections each; killed at the end.
pub fn held(pairs: usize, connections: usize) -> Vec<Fork> {
    let (ready, tell) = sys::pipe().expect("a pipe");
    let process = |keep: &[BorrowedFd<'_>], open: &dyn Fn() -> Tcp| {
        let process = Fork::new(&[keep, &[tell.as_fd()]].concat(), || {
            let enough = Some(connections as u64 + 64);
            let most = Rlimit {
                current: enough,
                maximum: enough,
            };
            setrlimit(Resource::Nofile, most).expect("root may");
            for _ in 0..connections {
                let _ = open().fd.into_raw_fd();
            }
            rustix::io::write(&tell, b"!").expect("somebody reads");
            loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            }
        });
        process.expect("a process")
    };
    let mut processes = Vec::new();
    for _ in 0..pairs {
        let listener = Tcp::listening(Ipv4Addr::LOCALHOST.into(), 64);
        let address = listener.local();
        processes.push(process(&[listener.fd.as_fd()], &|| listener.accept()));
        processes.push(process(&[], &|| Tcp::connected(address)));
    }
    let over = Instant::now() + Duration::from_secs(120);
    while rustix::io::ioctl_fionread(&ready).expect("a pipe") < processes.len() as u64 {
        let ended = processes.iter().any(|process| process.ended().is_some());
        let limit = getrlimit(Resource::Nofile);
        assert!(!ended, "a process could not open its sockets: {limit:?}");
        assert!(Instant::now() < over, "opening the sockets takes too long");
        thread::sleep(Duration::from_millis(5));
    }
    processes
}
