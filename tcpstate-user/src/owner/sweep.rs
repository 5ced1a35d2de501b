//! Which processes hold which sockets, of all processes at one time: by the kernel's iterator where there is one, else
//! from `/proc`.
//!
//! Takes milliseconds to seconds, so not for a thread that has other work.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use rustc_hash::{FxHashMap, FxHashSet};
use zerocopy::FromBytes as _;

use super::comm::comm_of;
use super::lookup::start_ns_of;
use super::{Containers, in_initial_pid_namespace};
use crate::model::{Comm, Process};
use crate::table::{Holder, Identity, Record};

/// What a sweep found.
#[derive(Debug, Default)]
pub struct Swept {
    pub holders: Vec<Holder>,
    /// Network namespaces, by inode, with pids of who holds a socket there: they may lead to one that no dump has found.
    pub leads: FxHashSet<(u32, u32)>,
}

/// `file`: the iterator's, as [`Session::begin_sweep`](crate::kernel::Session::begin_sweep) gives it. It runs only where
/// sockets have cookies.
///
/// # Errors
/// Where it can't be read to its end.
pub fn by_iterator(mut file: File) -> io::Result<Swept> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let mut holders = Holders::default();
    let mut leads = FxHashSet::default();
    let mut rest = bytes.as_slice();
    while let Ok((found, after)) = tcpstate_common::Holder::read_from_prefix(rest) {
        rest = after;
        let process = Process {
            pid: found.tgid,
            start_ns: found.start_ns,
            comm: Some(Comm::from_kernel(found.comm)),
        };
        holders.add(process, found.cookie);
        leads.insert((found.netns, found.tgid));
    }
    if !rest.is_empty() {
        return Err(io::Error::other(format!(
            "the sweep ends in the middle of a record: {} bytes too many",
            rest.len()
        )));
    }
    Ok(Swept {
        holders: holders.list(),
        leads,
    })
}

/// By the descriptors in `/proc`, for sockets that `dump` shows, as a table with that identity knows them. Processes that may not be looked into (that takes
/// CAP_SYS_PTRACE) are left out.
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
    let mut held = Vec::new();
    for entry in fs::read_dir(folder.join("fd"))? {
        // A descriptor that was closed since is no reason to miss the others.
        let Ok(target) = entry.and_then(|entry| fs::read_link(entry.path())) else {
            continue;
        };
        held.extend(inode(&target).and_then(|inode| keys.get(&inode)));
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
    for key in held {
        holders.add(process, key);
    }
    Ok(())
}

/// That of `socket:[4711]`.
fn inode(target: &Path) -> Option<u32> {
    let number = target
        .to_str()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?;
    number.parse().ok()
}

/// By process; a socket once for each, however many descriptors it has.
#[derive(Default)]
struct Holders(FxHashMap<(u32, u64), (Process, FxHashSet<u64>)>);

impl Holders {
    fn add(&mut self, process: Process, socket: u64) {
        let (_, sockets) = self
            .0
            .entry((process.pid, process.start_ns))
            .or_insert_with(|| (process, FxHashSet::default()));
        sockets.insert(socket);
    }

    fn list(self) -> Vec<Holder> {
        let mut containers = Containers::new();
        let holders = self.0.into_values();
        holders
            .map(|(process, sockets)| Holder {
                process,
                container: containers.container(process.pid, process.start_ns, 0),
                sockets: sockets.into_iter().collect(),
            })
            .collect()
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

    #[test]
    fn two_descriptors_of_one_socket_are_one_holder() {
        let process = Process {
            pid: 7,
            start_ns: 1,
            comm: None,
        };
        let mut holders = Holders::default();
        holders.add(process, 11);
        holders.add(process, 11);
        holders.add(process, 12);
        let mut list = holders.list();
        assert_eq!(list.len(), 1);
        list[0].sockets.sort_unstable();
        assert_eq!(list[0].sockets, [11, 12]);
    }
}
