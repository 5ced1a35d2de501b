//! The iterator over all TCP sockets of a network namespace: what a dump says of each.
//!
//! Runs only while the user side reads its file, which its records go into. From 5.15 the kernel has a full socket locked
//! meanwhile (`bpf_iter_tcp_seq_show`), so that no transition is half done; before it holds the lock of the bucket.

use core::{ffi::c_void, mem::size_of};

use aya_ebpf::{
    bindings::seq_file,
    helpers::{bpf_jiffies64, bpf_seq_write},
};
use tcpstate_common::{
    Socket, TcpState,
    socket::{FULL, MINI},
};

use crate::{set_state::now, sock::Sock};

/// `struct bpf_iter__tcp`. 5.9+
#[repr(C)]
pub struct Tcp {
    meta: *const Meta,
    sk_common: *const u8,
}

/// `struct bpf_iter_meta`
#[repr(C)]
struct Meta {
    seq: *mut seq_file,
}

/// Where sockets have no cookies of the kernel's own (`optional` on the user side says why only there).
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn sockets(ctx: *const Tcp) -> i32 {
    list(ctx);
    0
}

#[inline(always)]
fn list(ctx: *const Tcp) {
    // SAFETY: the kernel passes such a struct; the verifier knows its type and that of what its pointers lead to.
    let (meta, sk) = unsafe { ((*ctx).meta, (*ctx).sk_common) };
    // So it is once more after the last socket.
    if sk.is_null() {
        return;
    }
    let time_ns = now();
    // A `struct sock_common`: what timewait sockets and requests have too.
    let sk = Sock::new(sk);
    let family = sk.family();
    let mut socket = Socket {
        time_ns,
        sk: sk.as_ptr() as u64,
        cookie: sk.stored_cookie(),
        local_addr: sk.local_addr(family),
        remote_addr: sk.remote_addr(family),
        uid: 0,
        inode: 0,
        recv_queue: 0,
        send_queue: 0,
        expires_jiffies: 0,
        local_port: sk.num(),
        remote_port: sk.remote_port(),
        state: 0,
        kind: MINI,
        family,
        pad: [0; 4],
    };
    let state = match sk.state() {
        TcpState::TIME_WAIT => {
            let (substate, expires) = sk.time_wait();
            socket.expires_jiffies = until(expires);
            substate
        }
        TcpState::NEW_SYN_RECV => {
            socket.expires_jiffies = until(sk.request_expires());
            TcpState::NEW_SYN_RECV
        }
        state => {
            // Of another protocol (MPTCP has its own for connections).
            let Some(tcp) = sk.tcp() else {
                return;
            };
            socket.kind = FULL;
            socket.uid = tcp.uid();
            socket.inode = tcp.inode();
            (socket.recv_queue, socket.send_queue) = if state == TcpState::LISTEN {
                tcp.backlog()
            } else {
                tcp.queues()
            };
            state
        }
    };
    socket.state = state.number();
    // SAFETY: `seq` is the iterator's own, and the record is as long as is said. Where the file's buffer is full the
    // helper fails, and the kernel shows this socket again.
    unsafe {
        bpf_seq_write(
            (*meta).seq,
            (&raw const socket).cast::<c_void>(),
            size_of::<Socket>() as u32,
        );
    }
}

/// Jiffies from now on; 0 where it is over.
#[inline(always)]
fn until(expires: u64) -> u32 {
    // SAFETY: takes no arguments; in every program type that has the helper a call is sound.
    let left = expires.wrapping_sub(unsafe { bpf_jiffies64() });
    if left.cast_signed() < 0 {
        0
    } else {
        left as u32
    }
}
