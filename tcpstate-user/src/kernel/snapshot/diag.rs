//! Dumps by inet_diag: the netlink conversation. What a message says is `parse`'s.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::parse::{self, Message, Request};
use super::{DumpError, boot_time_ns};
use crate::table::{Record, StateMask};

/// The kernel fills messages of up to 32 KiB once it has seen that the reader has room for them
/// (`netlink_recvmsg`, `netlink_dump`); larger ones it never makes, unless one socket alone needs more.
pub(super) const RECEIVE_BYTES: usize = 64 << 10;

/// Each receive call has the kernel make one batch, of milliseconds' work.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How often a dump that the kernel called inconsistent is tried in all.
pub(super) const TRIES: usize = 3;

/// Adds the sockets of the calling thread's network namespace, which has the inode `netns`.
pub(super) fn dump(
    records: &mut Vec<Record>,
    states: StateMask,
    netns: u32,
) -> Result<(), DumpError> {
    let before = records.len();
    for _ in 0..TRIES {
        if dump_once(records, states, netns)? {
            return Ok(());
        }
        records.truncate(before);
    }
    Err(DumpError::Interrupted)
}

/// False where the kernel says that its tables changed so that the dump can't be trusted.
fn dump_once(records: &mut Vec<Record>, states: StateMask, netns: u32) -> Result<bool, DumpError> {
    let socket = open(PATIENCE)?;
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut consistent = true;

    // The kernel makes the next batch before it leaves a call, not when it is asked for it: the first while it
    // takes the request (`netlink_dump_start`), each other at the end of the receive call before its own
    // (`netlink_recvmsg`). So a batch is as old as the call before the one that returned it.
    let mut call_start = boot_time_ns();
    let request = Request::new(states);
    rustix::net::send(&socket, request.as_bytes(), SendFlags::empty())?;
    let mut call_end = boot_time_ns();
    loop {
        let read_ns = (call_start, call_end);
        call_start = call_end;
        let len = receive(&socket, &mut buffer)?;
        call_end = boot_time_ns();

        for message in parse::messages(&buffer[..len]) {
            let (message, interrupted) = message?;
            consistent &= !interrupted;
            match message {
                Message::Socket(found) => records.extend(found.record(states, netns, read_ns)),
                Message::Done(None) => return Ok(consistent),
                // Without inet_diag, and without tcp_diag.
                Message::Failed(Errno::OPNOTSUPP | Errno::NOENT)
                | Message::Done(Some(Errno::NOENT)) => return Err(DumpError::NoDiag),
                Message::Failed(errno) | Message::Done(Some(errno)) => {
                    return Err(DumpError::Refused(errno));
                }
                Message::Other => {}
            }
        }
    }
}

/// Connected to the kernel, so that nothing else can send to it. No call waits for longer than `patience`.
pub(super) fn open(patience: Duration) -> Result<OwnedFd, DumpError> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(SOCK_DIAG),
    )?;
    rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(patience))?;
    Ok(socket)
}

pub(super) fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<usize, DumpError> {
    let room = buffer.len();
    let received =
        rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut *buffer, RecvFlags::TRUNC));
    let (_, len) = received.map_err(|errno| match errno {
        Errno::AGAIN => DumpError::NoAnswer,
        errno => errno.into(),
    })?;
    if len > room {
        return Err(DumpError::Truncated { len });
    }
    Ok(len)
}
