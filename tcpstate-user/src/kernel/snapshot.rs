//! Dumps of the kernel's TCP sockets, namespace by namespace.
//!
//! Owns the order of namespaces and which of two ways is gone: by the kernel's `iterator` over sockets, or by inet_diag
//! (`diag`; what its messages say is `parse`'s). What a snapshot means for the table is the table's.

mod diag;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod iterator;
mod parse;

use std::io;
use std::thread;

use rustc_hash::FxHashSet;
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use self::diag::{RECEIVE_BYTES, TRIES};
pub use self::iterator::SocketIterator;
use super::netns::{self, Lead, Namespace, NetnsError};
use crate::model::NetnsSelection;
use crate::table::{Snapshot, StateMask, Unreachable};

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
    #[error("malformed records: {0}")]
    Records(#[from] iterator::Malformed),
}

/// Lists the TCP sockets that are in one of `states`, in the selected namespaces; `leads` help to find all of them.
///
/// Works on a thread of its own and waits for it. With [`NetnsSelection::All`] a namespace that can't be read is
/// reported in the snapshot, and none of its sockets are there; with one, that is an error. CLOSE can't be
/// asked for: closed sockets are in none of the kernel's tables.
///
/// `iterator`: by it, where there is one and every state is asked for. It has the program look at each socket, where
/// inet_diag passes over those that are not wanted.
///
/// # Errors
/// The selection can't be had, or a thread.
pub fn take(
    selection: NetnsSelection,
    states: StateMask,
    leads: FxHashSet<Lead>,
    iterator: Option<SocketIterator>,
) -> Result<Snapshot, SnapshotError> {
    let iterator = iterator.filter(|_| states == StateMask::ALL);
    thread::Builder::new()
        .name("snapshot".to_owned())
        .spawn(move || take_here(selection, states, &leads, iterator.as_ref()))
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
    iterator: Option<&SocketIterator>,
) -> Result<Snapshot, SnapshotError> {
    let mut snapshot = Snapshot {
        states,
        started_ns: boot_time_ns(),
        ..Snapshot::default()
    };
    match selection {
        NetnsSelection::One(inode) => {
            let namespace = netns::find(inode)?;
            dump_into(&mut snapshot, &namespace, iterator)
                .map_err(|error| SnapshotError::Dump { inode, error })?;
        }
        NetnsSelection::All => {
            snapshot.whole_host = true;
            let found = netns::all(leads)?;
            for namespace in found.namespaces {
                if let Err(error) = dump_into(&mut snapshot, &namespace, iterator) {
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
fn dump_into(
    snapshot: &mut Snapshot,
    namespace: &Namespace,
    iterator: Option<&SocketIterator>,
) -> Result<(), DumpError> {
    namespace.enter()?;
    let (states, inode) = (snapshot.states, namespace.inode());
    let before = snapshot.records.len();
    let records = &mut snapshot.records;
    let dumped = match iterator {
        Some(iterator) => iterator.dump(records, inode),
        None => diag::dump(records, states, inode),
    };
    match dumped {
        Ok(()) => snapshot.netns.push(inode),
        Err(_) => snapshot.records.truncate(before),
    }
    dumped
}

fn boot_time_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // The clock starts at 0 with the kernel.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[cfg(test)]
mod tests;
