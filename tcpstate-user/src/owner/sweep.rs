//! Which processes hold which sockets, of all processes at one time: by the kernel's iterator where there is one, else
//! from `/proc`.
//!
//! Takes milliseconds to seconds, so not for a thread that has other work.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::num::NonZero;
use std::path::Path;

use rustc_hash::{FxHashMap, FxHashSet};
use zerocopy::{FromZeros, IntoBytes as _};

use super::comm::comm_of;
use super::lookup::start_ns_of;
use super::{Containers, in_initial_pid_namespace};
use crate::model::{Comm, Process};
use crate::table::{Held, Holder, Identity, Record};

/// What a sweep found.
#[derive(Debug, Default)]
pub struct Swept {
    pub holders: Vec<Holder>,
    /// Network namespaces, by inode, with pids of who holds a socket there: they may lead to one that no dump has found.
    pub leads: FxHashSet<(u32, u32)>,
}

/// `file`: the iterator's, as [`Session::begin_sweep`](crate::kernel::Session::begin_sweep) gives it. It runs only where
/// sockets have cookies. `jiffy_ns`: how long a jiffy is.
///
/// # Errors
/// Where it can't be read to its end.
pub fn by_iterator(file: File, jiffy_ns: u64) -> io::Result<Swept> {
    let (holders, leads) = read(BufReader::with_capacity(READ_LEN, file), jiffy_ns)?;
    Ok(Swept {
        holders: holders.list(),
        leads,
    })
}

/// As much as the kernel gives at once (`bpf_iter`'s buffer of 8 pages), so that it is copied but once.
const READ_LEN: usize = 32 * 1024;

/// The holders, and the leads, that the iterator's records tell.
pub(super) fn read(
    mut records: impl BufRead,
    jiffy_ns: u64,
) -> io::Result<(Holders, FxHashSet<(u32, u32)>)> {
    let mut holders = Holders::default();
    let mut leads = FxHashSet::default();
    let mut last = None;
    while !records.fill_buf()?.is_empty() {
        let mut found = tcpstate_common::Holder::new_zeroed();
        records.read_exact(found.as_mut_bytes()).map_err(|error| {
            let expected = size_of::<tcpstate_common::Holder>();
            io::Error::new(
                error.kind(),
                format!("no whole record of {expected} bytes in the sweep: {error}"),
            )
        })?;
        let whose = (found.tgid, found.start_ns, found.netns);
        // The descriptors of a process come together, but where its threads have tables of their own.
        let at = match last {
            Some((at, same)) if same == whose => at,
            _ => {
                leads.insert((found.netns, found.tgid));
                holders.of(Process {
                    pid: found.tgid,
                    start_ns: found.start_ns,
                    comm: Some(Comm::from_kernel(found.comm)),
                })
            }
        };
        last = Some((at, whose));
        holders.found[at].sockets.push(Held {
            socket: found.cookie,
            quiet_ns: NonZero::new(quiet_jiffies(&found) * jiffy_ns),
        });
    }
    Ok((holders, leads))
}

/// Whole ones that went by since the last ACK; 0 where none is known, or it is too long ago to be told from one to come.
fn quiet_jiffies(found: &tcpstate_common::Holder) -> u64 {
    let jiffies = found.now_jiffies.wrapping_sub(found.acked_jiffies);
    match u64::try_from(jiffies.cast_signed()) {
        Ok(jiffies) if found.acked_jiffies != 0 => jiffies.saturating_sub(1),
        _ => 0,
    }
}

/// By the descriptors in `/proc`, for sockets that `dump` shows, as a table with that identity knows them. Processes that
/// may not be looked into (that takes CAP_SYS_PTRACE) are left out.
///
/// # Errors
/// Where there is no `/proc`, or its pids are not those of the initial pid namespace.
pub fn by_proc(dump: &[Record], identity: Identity) -> io::Result<Swept> {
    if !in_initial_pid_namespace() {
        return Err(io::Error::other(
            "tcpstate is not in the initial pid namespace, so /proc tells other pids",
        ));
    }
    let keys: FxHashMap<u32, u64> = dump
        .iter()
        .filter(|record| record.inode != 0)
        .filter_map(|record| Some((record.inode, identity.key(record)?)))
        .collect();
    let mut holders = Holders::default();
    for entry in fs::read_dir("/proc")? {
        let folder = entry?.path();
        let pid = folder
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        if let Some(pid) = pid {
            // It may have gone, or not be ours to look into.
            let _ = descriptors(pid, &folder, &keys, &mut holders);
        }
    }
    Ok(Swept {
        holders: holders.list(),
        leads: FxHashSet::default(),
    })
}

fn descriptors(
    pid: u32,
    folder: &Path,
    keys: &FxHashMap<u32, u64>,
    holders: &mut Holders,
) -> io::Result<()> {
    let mut held: Vec<Held> = Vec::new();
    for entry in fs::read_dir(folder.join("fd"))? {
        // A descriptor that was closed since is no reason to miss the others.
        let Ok(target) = entry.and_then(|entry| fs::read_link(entry.path())) else {
            continue;
        };
        let socket = inode(&target).and_then(|inode| keys.get(&inode));
        held.extend(socket.map(|&socket| Held {
            socket,
            quiet_ns: None,
        }));
    }
    if held.is_empty() {
        return Ok(());
    }
    let comm = comm_of(pid);
    let process = Process {
        pid,
        // Last: what was read before can't be a later process' then, but for one of the same tick.
        start_ns: start_ns_of(folder).ok_or(io::ErrorKind::NotFound)?,
        comm: (comm[0] != 0).then(|| Comm::from_kernel(comm)),
    };
    let at = holders.of(process);
    holders.found[at].sockets.extend(held);
    Ok(())
}

/// That of `socket:[4711]`.
pub(super) fn inode(target: &Path) -> Option<u32> {
    let number = target
        .to_str()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?;
    number.parse().ok()
}

#[derive(Default)]
pub(super) struct Holders {
    /// A socket as often as it was found.
    pub(super) found: Vec<Holder>,
    /// By pid and start: where a process is in `found`.
    places: FxHashMap<(u32, u64), usize>,
}

impl Holders {
    /// Where the process is in `found`.
    fn of(&mut self, process: Process) -> usize {
        let key = (process.pid, process.start_ns);
        *self.places.entry(key).or_insert_with(|| {
            self.found.push(Holder {
                process,
                container: None,
                sockets: Vec::new(),
            });
            self.found.len() - 1
        })
    }

    /// A socket once for each process, however many descriptors that has of it.
    fn list(mut self) -> Vec<Holder> {
        let mut containers = Containers::new();
        for Holder {
            process,
            container,
            sockets,
        } in &mut self.found
        {
            *container = containers.container(process.pid, process.start_ns, 0);
            sockets.sort_unstable_by_key(|held| held.socket);
            sockets.dedup_by_key(|held| held.socket);
        }
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_told_from_other_files() {
        assert_eq!(inode(Path::new("socket:[4711]")), Some(4711));
        assert_eq!(inode(Path::new("pipe:[4711]")), None);
        assert_eq!(inode(Path::new("socket:[4711")), None);
        assert_eq!(inode(Path::new("/tmp/socket:[1]")), None);
        assert_eq!(inode(Path::new("socket:[99999999999]")), None);
    }

    const JIFFY_NS: u64 = 4_000_000;

    fn process(pid: u32) -> Process {
        Process {
            pid,
            start_ns: 1,
            comm: Some(Comm::from_bytes(b"server")),
        }
    }

    /// What the kernel side writes of a descriptor.
    fn record(pid: u32, netns: u32, cookie: u64) -> Vec<u8> {
        let mut comm = [0; 16];
        comm[..6].copy_from_slice(b"server");
        let record = tcpstate_common::Holder {
            cookie,
            start_ns: 1,
            tgid: pid,
            netns,
            comm,
            now_jiffies: 1_000,
            acked_jiffies: 0,
        };
        record.as_bytes().to_vec()
    }

    fn holder(pid: u32, sockets: &[u64]) -> Holder {
        Holder {
            process: process(pid),
            container: None,
            sockets: sockets
                .iter()
                .map(|&socket| Held {
                    socket,
                    quiet_ns: None,
                })
                .collect(),
        }
    }

    #[test]
    fn a_process_is_one_holder_however_its_descriptors_come() {
        const NOBODY: u32 = u32::MAX;
        let records = [
            record(NOBODY, 7, 12),
            record(NOBODY, 7, 11),
            record(NOBODY - 1, 7, 11),
            // A thread with a table of its own, and a socket of another namespace.
            record(NOBODY, 7, 11),
            record(NOBODY, 8, 13),
        ];
        // However the bytes are cut.
        for capacity in [1, 48, 49, READ_LEN] {
            let read = read(
                BufReader::with_capacity(capacity, &*records.concat()),
                JIFFY_NS,
            );
            let (holders, leads) = read.expect("whole records");
            let expected = [holder(NOBODY, &[11, 12, 13]), holder(NOBODY - 1, &[11])];
            assert_eq!(holders.list(), expected);
            let expected = [(7, NOBODY), (8, NOBODY), (7, NOBODY - 1)];
            assert_eq!(leads, expected.into_iter().collect());
        }
    }

    #[test]
    fn jiffies_since_the_last_ack_are_whole_ones() {
        let quiet = |now_jiffies, acked_jiffies| {
            quiet_jiffies(&tcpstate_common::Holder {
                now_jiffies,
                acked_jiffies,
                ..FromZeros::new_zeroed()
            })
        };
        // The first may have been at its end, and the present one is at its beginning.
        assert_eq!(quiet(1_000, 10), 989);
        assert_eq!(quiet(1_000, 1_000), 0);
        assert_eq!(quiet(5, u32::MAX - 5), 10);
        // Not known.
        assert_eq!(quiet(1_000, 0), 0);
        // 24 days at 1,000 a second, or one that came meanwhile.
        assert_eq!(quiet(0x8000_0001, 1), 0);
        assert_eq!(quiet(1_000, 1_001), 0);
    }

    #[test]
    fn a_file_that_ends_within_a_record_is_an_error() {
        let bytes = [record(1, 7, 11), record(1, 7, 12)].concat();
        let read = read(&bytes[..bytes.len() - 1], JIFFY_NS);
        let error = read.map(drop).expect_err("a byte is missing");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
