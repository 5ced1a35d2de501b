//! Names of processes from `/proc`: where the kernel side could not know it (without BTF, in a thread that is not the
//! leader), and as they are now.

use std::fs;
use std::path::{Path, PathBuf};

use rustc_hash::{FxHashMap, FxHashSet};
use tcpstate_common::event::COMM_LEN;

use super::lookup::started_at;
use crate::model::{Comm, ProcessId};

/// The name of the thread-group leader; empty if the process is gone.
///
/// Without BTF its start is not known either, so a pid that was used again since the event can't be told: call it
/// within moments.
#[must_use]
pub fn comm_of(pid: u32) -> [u8; COMM_LEN] {
    let mut comm = [0; COMM_LEN];
    if let Some(name) = read(Path::new(&format!("/proc/{pid}"))) {
        let name = name.as_bytes();
        comm[..name.len()].copy_from_slice(name);
    }
    comm
}

/// The names that these processes have now; who is gone is missing. Two files are read for each.
#[must_use]
pub fn names(processes: &FxHashSet<ProcessId>) -> FxHashMap<ProcessId, Comm> {
    let now = |&(pid, start_ns): &ProcessId| {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let name = read(&folder)?;
        // After reading, so that it can't be a later process'.
        started_at(&folder, start_ns).then_some(((pid, start_ns), name))
    };
    processes.iter().filter_map(now).collect()
}

fn read(folder: &Path) -> Option<Comm> {
    let read = fs::read(folder.join("comm")).ok()?;
    let name = read.strip_suffix(b"\n").unwrap_or(&read);
    Some(Comm::from_bytes(name))
}

#[cfg(test)]
mod tests {
    use super::{FxHashSet, comm_of, names};
    use crate::owner::lookup::start_ns_of;

    #[test]
    fn our_own_name_is_found_and_nobodys_is_empty() {
        let own = std::fs::read("/proc/self/comm").expect("/proc is mounted");
        let comm = comm_of(std::process::id());
        let own = own.strip_suffix(b"\n").expect("a line");
        assert_eq!(&comm[..own.len()], own);
        // Above the largest pid there can be.
        assert_eq!(comm_of(1 << 23), [0; 16]);
    }

    #[test]
    fn a_name_is_that_of_the_process_that_started_then() {
        let pid = std::process::id();
        let start_ns = start_ns_of(std::path::Path::new(&format!("/proc/{pid}"))).expect("we live");
        let asked = [(pid, start_ns), (pid, start_ns + 10_000_000), (1 << 23, 1)];
        let found = names(&FxHashSet::from_iter(asked));
        let own = std::fs::read_to_string("/proc/self/comm").expect("/proc is mounted");
        let found: Vec<_> = found
            .iter()
            .map(|(id, name)| (*id, name.to_string()))
            .collect();
        assert_eq!(found, [((pid, start_ns), own.trim_end().to_owned())]);
    }
}
