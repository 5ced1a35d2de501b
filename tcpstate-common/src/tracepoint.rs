//! The record of the classic tracepoint `sock:inet_sock_set_state`, for kernels without BTF.

use core::mem::{offset_of, size_of};

/// As the kernel lays it out since 5.6 (`include/trace/events/sock.h`); the loader compares with tracefs' `format`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct InetSockSetState {
    /// What each tracepoint begins with; programs can't read it.
    pub common: u64,
    pub skaddr: u64,
    pub oldstate: i32,
    pub newstate: i32,
    /// Ports in host byte order.
    pub sport: u16,
    pub dport: u16,
    pub family: u16,
    pub protocol: u16,
    pub saddr: [u8; 4],
    pub daddr: [u8; 4],
    /// v4-mapped for AF_INET. Words, since the program copies words.
    pub saddr_v6: [u64; 2],
    pub daddr_v6: [u64; 2],
}

const _: () = assert!(size_of::<InetSockSetState>() == 72);
const _: () = assert!(offset_of!(InetSockSetState, daddr_v6) == 56);
