//! A socket as the iterator over all of them (`iter/tcp`) shows it: what its file gives, one after the other.
//!
//! Integers and arrays only, no hidden bytes, as in [`crate::event`].

use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `kind` of [`Socket`]: a full socket.
pub const FULL: u8 = 0;
/// A timewait socket, whose `state` is the one that it stands for; or a half-open request.
pub const MINI: u8 = 1;

/// Fields in host byte order unless they say otherwise.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Socket {
    /// Not after the rest was read: `CLOCK_BOOTTIME`, nanoseconds.
    pub time_ns: u64,
    /// Address of the `struct sock_common`.
    pub sk: u64,
    /// The kernel's socket cookie; 0 where nothing has asked for it.
    pub cookie: u64,
    /// v6 as it is, v4 in the last four of 16 bytes behind `::ffff:` (network order).
    pub local_addr: [u8; 16],
    pub remote_addr: [u8; 16],
    /// `sk_uid`, in the initial user namespace; 0 of what is [`MINI`].
    pub uid: u32,
    /// Of the socket's file; 0 where it has none.
    pub inode: u32,
    /// As inet_diag has them: received and not read, or connections that wait; sent and not acknowledged, or how many
    /// may wait. 0 of what is [`MINI`].
    pub recv_queue: u32,
    pub send_queue: u32,
    /// Until the timer of what is [`MINI`], in jiffies; 0 where it is late.
    pub expires_jiffies: u32,
    pub local_port: u16,
    pub remote_port: u16,
    /// The kernel's number.
    pub state: u8,
    pub kind: u8,
    /// The socket's own: AF_INET6 also where it talks to a v4 peer.
    pub family: u16,
    /// Up to the next multiple of 8.
    pub pad: [u8; 4],
}

const _: () = assert!(size_of::<Socket>() == 88);
const _: () = assert!(offset_of!(Socket, uid) == 56);
const _: () = assert!(offset_of!(Socket, state) == 80);
