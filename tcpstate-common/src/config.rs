//! What the loader tells the eBPF programs before they load: read-only globals, constants to the verifier.

use core::mem::size_of;

use zerocopy::{Immutable, IntoBytes};

/// Global of type [`Offsets`].
pub const OFFSETS: &str = "OFFSETS";
/// Global of type [`Switches`].
pub const SWITCHES: &str = "SWITCHES";

/// Byte offsets of fields, taken from the running kernel's BTF; unused without BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
pub struct Offsets {
    /// In `struct sock`, with all that is nested in it.
    pub sk_family: u32,
    pub sk_num: u32,
    pub sk_dport: u32,
    pub sk_rcv_saddr: u32,
    pub sk_daddr: u32,
    pub sk_v6_rcv_saddr: u32,
    pub sk_v6_daddr: u32,
    pub sk_net: u32,
    pub sk_flags: u32,
    pub sk_cookie: u32,
    pub sk_err: u32,
    pub sk_uid: u32,
    pub sk_protocol: u32,
    pub sk_shutdown: u32,
    /// In `struct tcp_sock`, with the `struct inet_sock` in it.
    pub inet_sport: u32,
    pub tcp_linger2: u32,
    pub tcp_rcv_tstamp: u32,
    /// In `struct net`: `ns.inum`.
    pub net_inum: u32,
    /// In `struct task_struct`.
    pub task_flags: u32,
    pub task_tgid: u32,
    pub task_group_leader: u32,
    pub task_comm: u32,
    pub task_start_boottime: u32,
    /// In `struct inet_timewait_sock`.
    pub tw_cookie: u32,
    pub tw_net: u32,
    pub tw_substate: u32,
    /// In `struct socket`: `sk`.
    pub socket_sk: u32,
    pub list: ListOffsets,
}

/// Those that only the iterator over all sockets needs; unused where it can't be had.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
pub struct ListOffsets {
    /// In `struct sock`.
    pub sk_state: u32,
    pub sk_socket: u32,
    pub sk_ack_backlog: u32,
    pub sk_max_ack_backlog: u32,
    /// In `struct tcp_sock`.
    pub tcp_rcv_nxt: u32,
    pub tcp_copied_seq: u32,
    pub tcp_write_seq: u32,
    pub tcp_snd_una: u32,
    /// In `struct inet_timewait_sock`: `tw_timer.expires`.
    pub tw_expires: u32,
    /// In `struct request_sock`: `rsk_timer.expires`.
    pub rsk_expires: u32,
    /// In `struct socket_alloc`, which begins with the `struct socket`: `vfs_inode.i_ino`.
    pub socket_ino: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
pub struct Switches {
    /// Trace only this network namespace (inode); 0: all.
    pub netns: u32,
    /// Wake the reader when this many bytes wait in the ring; below that its own tick finds them.
    pub wake_bytes: u32,
}

const _: () = assert!(size_of::<Offsets>() == 38 * 4);
const _: () = assert!(size_of::<Switches>() == 8);
