//! The iterator over all descriptors of all processes: which of them hold TCP sockets.
//!
//! Runs only while the user side reads its file. Its records go into that file, not into the ring.
//!
//! Of the time that 100,000 sockets take (6.18), a third is the kernel's way from file to file, and most of the rest is
//! waiting for memory: `struct socket` and `struct sock` are in no cache. Records of 8 or 16 bytes instead of 40, or the
//! stored cookie instead of the helper's, made it no faster that could be measured; a table of known sockets, told without
//! a look at them, leaves two thirds. The last ACK costs a quarter more, so it is read only where it is asked for.

use core::{ffi::c_void, mem::size_of};

use aya_ebpf::{
    bindings::{file, seq_file},
    helpers::{bpf_jiffies64, bpf_seq_write, bpf_sock_from_file},
};
use tcpstate_common::Holder;

use crate::{
    maps::ACKS,
    process::{Direct, Leader},
    sock::Sock,
};

/// `struct bpf_iter__task_file`. 5.8+
#[repr(C)]
pub struct TaskFile {
    meta: *const Meta,
    task: *const u8,
    fd: u32,
    file: *mut file,
}

/// `struct bpf_iter_meta`
#[repr(C)]
struct Meta {
    seq: *mut seq_file,
}

/// 5.12+, for the cookie (`bpf_sock_from_file` is 5.11's).
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn sweep(ctx: *const TaskFile) -> i32 {
    // SAFETY: the kernel passes such a struct; the verifier knows its type and that of what its pointers lead to.
    let (meta, task, file) = unsafe { ((*ctx).meta, (*ctx).task, (*ctx).file) };
    // So it is once more after the last descriptor.
    if task.is_null() || file.is_null() {
        return 0;
    }
    // SAFETY: the helper takes any file, and gives null for one that is no socket.
    let socket = unsafe { bpf_sock_from_file(file) };
    if socket.is_null() {
        return 0;
    }
    let sk = Sock::of_socket(socket.cast_const().cast());
    if !sk.is_tcp() {
        return 0;
    }
    let Some(netns) = sk.selected_netns() else {
        return 0;
    };
    let Some(leader) = Leader::of::<Direct>(task) else {
        return 0;
    };
    let (acked_jiffies, now_jiffies) = match ACKS.get(0) {
        None | Some(0) => (0, 0),
        Some(_) => acked(sk),
    };
    let holder = Holder {
        cookie: sk.cookie(),
        start_ns: leader.start_ns,
        tgid: leader.tgid,
        netns,
        comm: zerocopy::transmute!(leader.comm),
        now_jiffies,
        acked_jiffies,
    };
    // SAFETY: `seq` is the iterator's own, and the record is as long as is said. Where the file's buffer is full the
    // helper fails, and the kernel shows this descriptor again.
    unsafe {
        bpf_seq_write(
            (*meta).seq,
            (&raw const holder).cast::<c_void>(),
            size_of::<Holder>() as u32,
        );
    }
    0
}

/// The jiffies of the last ACK, and of now.
#[inline(always)]
fn acked(sk: Sock) -> (u32, u32) {
    let Some(tcp) = sk.tcp() else {
        return (0, 0);
    };
    // Before the present one: an ACK that comes meanwhile would look later than that.
    let acked_jiffies = tcp.acked_jiffies();
    // SAFETY: takes no arguments.
    (acked_jiffies, unsafe { bpf_jiffies64() } as u32)
}
