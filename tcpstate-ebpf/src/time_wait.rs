//! The programs that follow timewait sockets, which the tracepoint never shows: fentry, so only where the kernel lets
//! such programs load. 5.12+, for their sake who match them by the cookie.

use aya_ebpf::{macros::fentry, programs::FEntryContext};
use tcpstate_common::{
    TcpState, TimeWait,
    event::{TIMEWAIT_BEGINS, TIMEWAIT_ENDS, TIMEWAIT_SET_AGAIN},
};

use crate::{
    emit,
    set_state::now,
    sock::{Sock, TimeWaitSock},
};

/// `tcp_time_wait(sk, state, timeo)`: →CLOSE follows at once. The timewait socket comes between, unless there is no
/// memory for it or there are too many.
#[fentry(function = "tcp_time_wait")]
pub fn time_wait_begins(ctx: FEntryContext) {
    let sk = Sock::new(ctx.arg(0));
    let state: i32 = ctx.arg(1);
    if let Some(netns) = sk.selected_netns() {
        send(TIMEWAIT_BEGINS, sk.cookie(), netns, state as u8);
    }
}

/// `__inet_twsk_schedule(tw, timeo, rearm)`
#[fentry(function = "__inet_twsk_schedule")]
pub fn time_wait_set_again(ctx: FEntryContext) {
    let tw = TimeWaitSock::new(ctx.arg(0));
    let again: u64 = ctx.arg(2);
    // A `bool` in a register: the rest of it may be anything.
    if again as u8 == 0 || tw.substate() != TcpState::TIME_WAIT.number() {
        return;
    }
    if let Some(netns) = tw.selected_netns() {
        send(TIMEWAIT_SET_AGAIN, tw.cookie(), netns, tw.substate());
    }
}

/// `tcp_twsk_destructor(sk)`, for a timewait socket that nothing refers to any more: its time is over, its peer reset it,
/// its ends are used again, or somebody ended it. `inet_twsk_free`, which calls it, is inlined in some kernels (seen on
/// 7.2).
#[fentry(function = "tcp_twsk_destructor")]
pub fn time_wait_ends(ctx: FEntryContext) {
    // By its type a full socket: what both kinds have in common (`sock_common`) is all that may be read of it.
    let sk = Sock::new(ctx.arg(0));
    if let Some(netns) = sk.selected_netns() {
        send(
            TIMEWAIT_ENDS,
            sk.stored_cookie(),
            netns,
            TcpState::CLOSE.number(),
        );
    }
}

#[inline(always)]
fn send(what: u8, cookie: u64, netns: u32, state: u8) {
    // Its socket was closed before we came, and no dump has shown it since: nobody knows it.
    if cookie == 0 {
        return;
    }
    emit::time_wait(|lost| TimeWait {
        time_ns: now(),
        cookie,
        netns,
        lost,
        what,
        state,
        pad: [0; 6],
    });
}
