//! The name of a process, where the kernel side could not know it: without BTF, in a thread that is not the leader.

use std::fs;

use tcpstate_common::event::COMM_LEN;

use crate::model::Comm;

/// The name of the thread-group leader; empty if the process is gone.
///
/// Without BTF its start is not known either, so a pid that was used again since the event can't be told: call it
/// within moments.
#[must_use]
pub fn comm_of(pid: u32) -> [u8; COMM_LEN] {
    let mut comm = [0; COMM_LEN];
    if let Ok(read) = fs::read(format!("/proc/{pid}/comm")) {
        let name = Comm::from_bytes(read.strip_suffix(b"\n").unwrap_or(&read));
        let name = name.as_bytes();
        comm[..name.len()].copy_from_slice(name);
    }
    comm
}

#[cfg(test)]
mod tests {
    use super::comm_of;

    #[test]
    fn our_own_name_is_found_and_nobodys_is_empty() {
        let own = std::fs::read("/proc/self/comm").expect("/proc is mounted");
        let comm = comm_of(std::process::id());
        let own = own.strip_suffix(b"\n").expect("a line");
        assert_eq!(&comm[..own.len()], own);
        // Above the largest pid there can be.
        assert_eq!(comm_of(1 << 23), [0; 16]);
    }
}
