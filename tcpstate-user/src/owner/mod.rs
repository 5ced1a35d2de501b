//! What is known of a process beyond what the kernel's record says: the container it runs in, its name where the
//! record lacks it or it has changed, and the sockets that it holds.

mod comm;
mod container;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod lookup;
mod sweep;

pub use comm::{comm_of, names};
pub use lookup::Containers;
pub use sweep::{Swept, by_iterator, by_proc};

use std::fs;
use std::os::unix::fs::MetadataExt as _;

/// Whether pids are here what they are in records: in another pid namespace than the initial one they may be other
/// processes', and most processes are not seen.
#[must_use]
pub fn in_initial_pid_namespace() -> bool {
    /// `PROC_PID_INIT_INO`, include/linux/proc_ns.h: fixed since 3.8.
    const INITIAL: u64 = 0xeffffffc;
    fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == INITIAL)
}
