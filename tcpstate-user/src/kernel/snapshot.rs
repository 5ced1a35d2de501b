//! Dumps of the kernel's TCP sockets by inet_diag, namespace by namespace.
//!
//! Owns the netlink conversation. What a message says is `parse`'s; what a snapshot means for the table is
//! the table's.

mod parse;

use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use rustc_hash::FxHashSet;
use rustix::io::Errno;
use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::time::{ClockId, clock_gettime};

use self::parse::{Message, Request};
use super::netns::{self, Lead, Namespace, NetnsError};
use crate::model::NetnsSelection;
use crate::table::{Record, Snapshot, StateMask, Unreachable};

/// The kernel fills messages of up to 32 KiB once it has seen that the reader has room for them
/// (`netlink_recvmsg`, `netlink_dump`); larger ones it never makes, unless one socket alone needs more.
const RECEIVE_BYTES: usize = 64 << 10;

/// Each receive call has the kernel make one batch, of milliseconds' work.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a dump that the kernel called inconsistent is tried in all.
const TRIES: usize = 3;

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("can't list the sockets of network namespace {inode}: {error}")]
    Dump { inode: u32, error: DumpError },
    #[error("the snapshot's thread panicked")]
    Panicked,
    #[error("can't start a thread for a snapshot: {0}")]
    Thread(io::Error),
}

/// Why the sockets of one namespace could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the kernel did not answer in time")]
    NoAnswer,
    #[error("netlink: {0}")]
    Netlink(#[from] Errno),
    #[error(
        "the kernel has no inet_diag for tcp (CONFIG_INET_TCP_DIAG, or the module tcp_diag is missing)"
    )]
    NoDiag,
    #[error("the kernel refused the dump: {0}")]
    Refused(Errno),
    #[error("the kernel could not give a consistent dump in {TRIES} tries")]
    Interrupted,
    #[error("a message of {len} bytes, more than the {RECEIVE_BYTES} there is room for")]
    Truncated { len: usize },
    #[error("malformed answer: {0}")]
    Malformed(#[from] parse::Malformed),
}

/// Lists the TCP sockets that are in one of `states`, in the selected namespaces; `leads` help to find all of them.
///
/// Works on a thread of its own and waits for it. With [`NetnsSelection::All`] a namespace that can't be read is
/// reported in the snapshot, and none of its sockets are there; with one, that is an error. CLOSE can't be
/// asked for: closed sockets are in none of the kernel's tables.
///
/// # Errors
/// The selection can't be had, or a thread.
pub fn take(
    selection: NetnsSelection,
    states: StateMask,
    leads: FxHashSet<Lead>,
) -> Result<Snapshot, SnapshotError> {
    thread::Builder::new()
        .name("snapshot".to_owned())
        .spawn(move || take_here(selection, states, &leads))
        .map_err(SnapshotError::Thread)?
        .join()
        // Its message is on stderr already.
        .unwrap_or(Err(SnapshotError::Panicked))
}

/// Leaves the calling thread in any of the namespaces.
fn take_here(
    selection: NetnsSelection,
    states: StateMask,
    leads: &FxHashSet<Lead>,
) -> Result<Snapshot, SnapshotError> {
    let mut snapshot = Snapshot {
        states,
        started_ns: boot_time_ns(),
        ..Snapshot::default()
    };
    match selection {
        NetnsSelection::One(inode) => {
            let namespace = netns::find(inode)?;
            dump_into(&mut snapshot, &namespace)
                .map_err(|error| SnapshotError::Dump { inode, error })?;
        }
        NetnsSelection::All => {
            snapshot.whole_host = true;
            let found = netns::all(leads)?;
            for namespace in found.namespaces {
                if let Err(error) = dump_into(&mut snapshot, &namespace) {
                    snapshot.unreachable.push(Unreachable {
                        netns: Some(namespace.inode()),
                        reason: error.to_string(),
                    });
                }
            }
            snapshot
                .unreachable
                .extend(found.unreadable.map(|reason| Unreachable {
                    netns: None,
                    reason,
                }));
        }
    }
    snapshot.finished_ns = boot_time_ns();
    Ok(snapshot)
}

/// Adds the whole of a namespace, or nothing.
fn dump_into(snapshot: &mut Snapshot, namespace: &Namespace) -> Result<(), DumpError> {
    namespace.enter()?;
    let before = snapshot.records.len();
    let dumped = [AddressFamily::INET, AddressFamily::INET6]
        .into_iter()
        .try_for_each(|family| {
            dump_family(
                &mut snapshot.records,
                family,
                snapshot.states,
                namespace.inode(),
            )
        });
    match dumped {
        Ok(()) => snapshot.netns.push(namespace.inode()),
        Err(_) => snapshot.records.truncate(before),
    }
    dumped
}

fn dump_family(
    records: &mut Vec<Record>,
    family: AddressFamily,
    states: StateMask,
    netns: u32,
) -> Result<(), DumpError> {
    let before = records.len();
    for _ in 0..TRIES {
        if dump_once(records, family, states, netns)? {
            return Ok(());
        }
        records.truncate(before);
    }
    Err(DumpError::Interrupted)
}

/// False where the kernel says that its tables changed so that the dump can't be trusted.
fn dump_once(
    records: &mut Vec<Record>,
    family: AddressFamily,
    states: StateMask,
    netns: u32,
) -> Result<bool, DumpError> {
    let socket = open(PATIENCE)?;
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut consistent = true;

    // The kernel makes the next batch before it leaves a call, not when it is asked for it: the first while it
    // takes the request (`netlink_dump_start`), each other at the end of the receive call before its own
    // (`netlink_recvmsg`). So a batch is as old as the call before the one that returned it.
    let mut call_start = boot_time_ns();
    let request = Request::new(family, states);
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
                Message::Failed(Errno::NOENT) | Message::Done(Some(Errno::NOENT)) => {
                    return Err(DumpError::NoDiag);
                }
                Message::Failed(errno) | Message::Done(Some(errno)) => {
                    return Err(DumpError::Refused(errno));
                }
                Message::Other => {}
            }
        }
    }
}

/// Connected to the kernel, so that nothing else can send to it. No call waits for longer than `patience`.
fn open(patience: Duration) -> Result<OwnedFd, DumpError> {
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

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<usize, DumpError> {
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

fn boot_time_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // The clock starts at 0 with the kernel.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[cfg(test)]
mod tests;
