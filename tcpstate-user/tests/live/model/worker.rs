//! A process that makes the system calls on sockets that it is told, one after the other: so a test says which process
//! does what, and when.

use std::ffi::CString;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, IntoRawFd as _, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, ipproto, sockopt};

use crate::lab::until;
use crate::owners::{receive_fd, send_fd};
use crate::sys::Fork;

/// Of a connect that is waited for; then it goes on without.
const CONNECT_LIMIT: Duration = Duration::from_millis(100);
/// Of an answer: no call blocks for longer than a connect.
const PATIENCE: Duration = Duration::from_secs(20);

pub type Name = [u8; 16];

/// Descriptors are the worker's.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    /// A new socket, bound there if told so.
    Open {
        at: SocketAddr,
        binds: bool,
        shares: bool,
    },
    /// Nothing; the answer has its ends.
    Name {
        fd: i32,
    },
    /// `defers`: a connection comes only when its client has sent something, or after a second or more.
    Listen {
        fd: i32,
        backlog: i32,
        defers: bool,
    },
    Connect {
        fd: i32,
        to: SocketAddr,
        waits: bool,
    },
    /// Connects with the first data, by TCP Fast Open.
    ConnectSending {
        fd: i32,
        to: SocketAddr,
    },
    Disconnect {
        fd: i32,
    },
    Accept {
        fd: i32,
    },
    Send {
        fd: i32,
    },
    /// Sends until nothing more is taken.
    Fill {
        fd: i32,
    },
    Shutdown {
        fd: i32,
        how: How,
    },
    /// A close will reset the connection, or wait that long for its end.
    Linger {
        fd: i32,
        seconds: u64,
    },
    Close {
        fd: i32,
    },
    /// Sends the descriptor after the answer.
    Give {
        fd: i32,
    },
    /// A descriptor follows.
    Take,
    /// A descriptor follows: the child's end of its own line.
    Fork {
        name: Name,
    },
}

#[derive(Clone, Copy, Debug)]
pub enum How {
    Read,
    Write,
    Both,
}

/// What the call gave: a descriptor, a pid or 0; or its error. The ends are those of the socket afterwards.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub result: Result<i32, i32>,
    pub local: Option<SocketAddr>,
    pub remote: Option<SocketAddr>,
}

pub struct Worker {
    pub pid: u32,
    /// `None` where it is another worker's child.
    process: Option<Fork>,
    line: OwnedFd,
}

impl Worker {
    /// In the calling thread's network namespace.
    pub fn new(name: Name) -> Self {
        let (line, there) = pair();
        let process = Fork::new(&[there.as_fd()], || work(&there, &name)).expect("a process");
        Self {
            pid: process.pid,
            process: Some(process),
            line,
        }
    }

    /// A child, which holds what it holds.
    pub fn fork(&self, name: Name) -> Self {
        let (line, there) = pair();
        send(&self.line, &Call::Fork { name });
        send_fd(&self.line, there.as_fd()).expect("it listens");
        let pid = self.answer().result.expect("it may fork");
        let child = Self {
            pid: pid as u32,
            process: None,
            line,
        };
        // That it has its name.
        child.answer();
        child
    }

    pub fn call(&self, call: Call) -> Answer {
        send(&self.line, &call);
        self.answer()
    }

    /// Passes a descriptor; gives what it is there.
    pub fn pass(&self, fd: i32, to: &Self) -> i32 {
        assert_eq!(self.call(Call::Give { fd }).result, Ok(0));
        let passed = receive_fd(&self.line).expect("a descriptor");
        send(&to.line, &Call::Take);
        send_fd(&to.line, passed.as_fd()).expect("it listens");
        to.answer().result.expect("it takes descriptors")
    }

    fn answer(&self) -> Answer {
        receive(&self.line).unwrap_or_else(|| panic!("no answer of process {}", self.pid))
    }

    /// Kills it, and waits until its descriptors are closed.
    pub fn kill(self) {
        if self.process.is_none() {
            // SAFETY: no memory is involved; the pid is that of a child of our child, which lives or was not waited for.
            unsafe { libc::kill(self.pid as i32, libc::SIGKILL) };
            until("a worker has ended", || has_ended(self.pid));
        }
    }
}

fn has_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| &rest[..1]);
    matches!(state, None | Some("Z" | "X"))
}

/// Messages stay whole.
fn pair() -> (OwnedFd, OwnedFd) {
    let kind = SocketType::SEQPACKET;
    let pair = rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let (here, there) = pair.expect("a socket pair");
    let limit = Some(PATIENCE);
    sockopt::set_socket_timeout(&here, sockopt::Timeout::Recv, limit).expect("a limit");
    (here, there)
}

fn send<T: Copy>(line: &OwnedFd, message: &T) {
    let from = std::ptr::from_ref(message).cast();
    // SAFETY: the kernel reads the value, which lives through the call.
    let sent = unsafe { libc::send(line.as_raw_fd(), from, size_of::<T>(), libc::MSG_NOSIGNAL) };
    assert_eq!(
        sent,
        size_of::<T>() as isize,
        "{}",
        io::Error::last_os_error()
    );
}

/// `None` where nobody is at the other end, or time ran out.
fn receive<T: Copy>(line: &OwnedFd) -> Option<T> {
    let mut message = MaybeUninit::<T>::uninit();
    let to = message.as_mut_ptr().cast();
    // SAFETY: there is room for a value.
    let received = unsafe { libc::recv(line.as_raw_fd(), to, size_of::<T>(), 0) };
    // SAFETY: both ends are the same program in two processes; what came whole was such a value in the other.
    (received == size_of::<T>() as isize).then(|| unsafe { message.assume_init() })
}

/// What a worker does. No memory may be allocated here: it was forked where other threads may hold any lock.
fn work(line: &OwnedFd, name: &Name) {
    rename(name);
    // Its children are waited for by nobody.
    // SAFETY: no handler is set.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    while let Some(call) = receive::<Call>(line) {
        match call {
            Call::Fork { name } => {
                let Some(end) = receive_fd(line) else { return };
                // SAFETY: the child goes on as a worker, with no thread but this one, as its parent.
                match unsafe { libc::fork() } {
                    0 => {
                        // The line of the parent, which the child leaves to that.
                        // SAFETY: nothing uses the number any more: `work` does not return to who owns it.
                        unsafe { libc::close(line.as_raw_fd()) };
                        send(&end, &answer(Ok(0)));
                        work(&end, &name);
                        // SAFETY: ends the process at once.
                        unsafe { libc::_exit(0) };
                    }
                    pid => send(line, &answer(Ok(pid))),
                }
            }
            Call::Give { fd } => {
                send(line, &answer(Ok(0)));
                // SAFETY: the test names descriptors that it knows to be open.
                let _ = send_fd(line, unsafe { BorrowedFd::borrow_raw(fd) });
            }
            Call::Take => {
                let Some(fd) = receive_fd(line) else { return };
                send(line, &answer(Ok(fd.into_raw_fd())));
            }
            call => {
                let result = make(call);
                let of = match call {
                    Call::Open { .. } | Call::Accept { .. } => result.ok(),
                    Call::Listen { fd, .. }
                    | Call::Connect { fd, .. }
                    | Call::ConnectSending { fd, .. }
                    | Call::Name { fd } => Some(fd),
                    _ => None,
                };
                let mut answer = answer(result.map_err(rustix::io::Errno::raw_os_error));
                if let Some(fd) = of {
                    // SAFETY: open, as above.
                    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                    let address = |any| SocketAddr::try_from(any).ok().map(canonical);
                    answer.local = rustix::net::getsockname(fd).ok().and_then(address);
                    let remote = rustix::net::getpeername(fd).ok().flatten();
                    answer.remote = remote.and_then(address);
                }
                send(line, &answer);
            }
        }
    }
}

fn rename(name: &Name) {
    // SAFETY: the kernel reads up to 16 bytes of a name that ends with NUL.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

const fn answer(result: Result<i32, i32>) -> Answer {
    Answer {
        result,
        local: None,
        remote: None,
    }
}

fn make(call: Call) -> rustix::io::Result<i32> {
    // SAFETY: the test names descriptors that it knows to be open.
    let borrow = |fd| unsafe { BorrowedFd::borrow_raw(fd) };
    match call {
        Call::Open { at, binds, shares } => {
            let family = match at.ip() {
                IpAddr::V4(_) => AddressFamily::INET,
                IpAddr::V6(_) => AddressFamily::INET6,
            };
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd =
                rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
            sockopt::set_socket_reuseport(&fd, shares)?;
            if binds {
                rustix::net::bind(&fd, &at)?;
            }
            return Ok(fd.into_raw_fd());
        }
        Call::Listen {
            fd,
            backlog,
            defers,
        } => {
            let fd = borrow(fd);
            if defers {
                let second = Duration::from_secs(1);
                set_defer_accept(fd, second)?;
            }
            // For who asks by TCP Fast Open.
            set_fast_open(fd)?;
            rustix::net::listen(fd, backlog)?;
        }
        Call::Connect { fd, to, waits } => {
            let fd = borrow(fd);
            rustix::io::ioctl_fionbio(fd, !waits)?;
            sockopt::set_socket_timeout(fd, sockopt::Timeout::Send, Some(CONNECT_LIMIT))?;
            let connected = rustix::net::connect(fd, &to);
            rustix::io::ioctl_fionbio(fd, true)?;
            connected?;
        }
        Call::ConnectSending { fd, to } => {
            let flags = SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
            rustix::net::sendto(borrow(fd), b"data", flags | SendFlags::NOSIGNAL, &to)?;
        }
        Call::Disconnect { fd } => rustix::net::connect_unspec(borrow(fd))?,
        Call::Accept { fd } => {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            return Ok(rustix::net::accept_with(borrow(fd), flags)?.into_raw_fd());
        }
        Call::Send { fd } => {
            rustix::net::send(borrow(fd), b"data", SendFlags::NOSIGNAL)?;
        }
        Call::Fill { fd } => {
            let data = [0; 1 << 14];
            let flags = SendFlags::NOSIGNAL;
            while rustix::net::send(borrow(fd), &data, flags).is_ok() {}
        }
        Call::Shutdown { fd, how } => {
            let how = match how {
                How::Read => Shutdown::Read,
                How::Write => Shutdown::Write,
                How::Both => Shutdown::Both,
            };
            rustix::net::shutdown(borrow(fd), how)?;
        }
        Call::Linger { fd, seconds } => {
            let time = Duration::from_secs(seconds);
            sockopt::set_socket_linger(borrow(fd), Some(time))?;
        }
        // SAFETY: the test closes each descriptor once, and names it no more.
        Call::Close { fd } => unsafe { rustix::io::close(fd) },
        Call::Name { .. } | Call::Give { .. } | Call::Take | Call::Fork { .. } => {}
    }
    Ok(0)
}

fn set_defer_accept(fd: BorrowedFd<'_>, time: Duration) -> rustix::io::Result<()> {
    set_number(fd, libc::TCP_DEFER_ACCEPT, time.as_secs() as i32)
}

fn set_fast_open(fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
    set_number(fd, libc::TCP_FASTOPEN, 8)
}

fn set_number(fd: BorrowedFd<'_>, option: i32, value: i32) -> rustix::io::Result<()> {
    let len = size_of::<i32>() as u32;
    let from = (&raw const value).cast();
    // SAFETY: the kernel reads an integer that lives through the call.
    match unsafe { libc::setsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, option, from, len) } {
        0 => Ok(()),
        _ => Err(rustix::io::Errno::from_raw_os_error(
            io::Error::last_os_error().raw_os_error().unwrap_or(0),
        )),
    }
}

/// IPv4 peers of a dual-stack socket are written as IPv4.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

pub fn name(text: &str) -> Name {
    let text = CString::new(text).expect("no NUL");
    let mut name = [0; 16];
    name[..text.as_bytes().len()].copy_from_slice(text.as_bytes());
    name
}
