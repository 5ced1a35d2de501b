//! Properties of what is read of processes, for [`crate::fuzz`].

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::BufReader;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::container::Cgroups;
use super::lookup::{start_ns, unified_mount};
use super::sweep::{inode, read};
use crate::fuzz::shown;

/// The iterator's records say the same however they are cut, and each descriptor is somebody's.
pub fn sweep(bytes: &[u8]) {
    const JIFFY_NS: u64 = 4_000_000;
    const RECORD: usize = size_of::<tcpstate_common::Holder>();
    let whole = read(bytes, JIFFY_NS);
    let in_pieces = read(BufReader::with_capacity(7, bytes), JIFFY_NS);
    assert_eq!(whole.is_ok(), bytes.len().is_multiple_of(RECORD));
    match (whole, in_pieces) {
        (Ok((holders, leads)), Ok(again)) => {
            assert_eq!((&holders.found, &leads), (&again.0.found, &again.1));
            let processes = holders.found.iter().map(|holder| holder.process);
            let different: BTreeSet<_> = processes.map(|it| (it.pid, it.start_ns)).collect();
            assert_eq!(different.len(), holders.found.len());
            let sockets = holders.found.iter().map(|holder| holder.sockets.len());
            assert_eq!(sockets.sum::<usize>(), bytes.len() / RECORD);
            assert!(leads.len() <= bytes.len() / RECORD);
        }
        (Err(error), Err(_)) => shown(&error.to_string(), 0),
        _ => panic!("the pieces say something else than the whole"),
    }
}

/// `cgroup`, `stat`, `mountinfo`, and what a descriptor's link leads to.
pub(crate) fn files(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Some(container) = Cgroups::parse(&text).container() {
        assert_eq!(container.len(), 64);
        assert!(container.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
    if let Some(mount) = unified_mount(&text) {
        assert!(text.contains(mount.to_str().expect("it is of the text")));
    }
    if let Some(inode) = inode(Path::new(OsStr::from_bytes(bytes))) {
        assert!(text.contains(&inode.to_string()));
    }
    if let Some(start_ns) = start_ns(bytes) {
        assert!(start_ns.is_multiple_of(1_000_000));
    }
}
