//! The programs behind `inet_csk_accept`: which process took a connection from its listener.
//!
//! fexit, so only where the kernel lets such programs load. The result stands behind the arguments, of which there are
//! four up to 6.9 and two later: a program for each, since one that branches is refused before 7.2 (LLVM merges the
//! loads). The loader picks one by the kernel's BTF.

use aya_ebpf::{macros::fexit, programs::FExitContext};
use tcpstate_common::Accept;

use crate::{
    emit,
    process::{Direct, Probe, Process, ReadTask},
    set_state::now,
    sock::Sock,
};

/// 5.12–6.9
#[fexit(function = "inet_csk_accept")]
pub fn accept_of_four(ctx: FExitContext) {
    accepted::<Direct>(ctx.arg(4), Sock::cookie);
}

/// 6.10+
#[fexit(function = "inet_csk_accept")]
pub fn accept_of_two(ctx: FExitContext) {
    accepted::<Direct>(ctx.arg(2), Sock::cookie);
}

/// Below 5.12, where tracing programs can't ask for the cookie.
#[fexit(function = "inet_csk_accept")]
pub fn accept_no_cookie(ctx: FExitContext) {
    accepted::<Probe>(ctx.arg(4), Sock::stored_cookie);
}

#[inline(always)]
fn accepted<R: ReadTask>(sk: *const u8, cookie: impl FnOnce(Sock) -> u64) {
    if sk.is_null() {
        return;
    }
    let sk = Sock::new(sk);
    if !sk.is_tcp() || sk.selected_netns().is_none() {
        return;
    }
    // A kernel thread (NFS, SMB) accepts for itself, but is no process.
    let Some(process) = Process::current::<R>() else {
        return;
    };
    emit::accept(|lost| Accept {
        time_ns: now(),
        sk: sk.as_ptr() as u64,
        cookie: cookie(sk),
        start_ns: process.start_ns,
        cgroup_id: process.cgroup_id,
        tgid: process.tgid,
        lost,
        comm: zerocopy::transmute!(process.comm),
    });
}
