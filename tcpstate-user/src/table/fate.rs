//! What a →CLOSE of the kernel meant: gone, or living on as a timewait socket; and why the connection ended.
//!
//! Facts as of 5.10 to 6.18, net/ipv4/tcp.c, tcp_input.c, tcp_timer.c and tcp_minisocks.c.

use tcpstate_common::TcpState;
use tcpstate_common::event::{
    FLAG_DEAD, FLAG_DONE, FLAG_NO_LINGER, FLAG_SOCKET_READ, RCV_SHUTDOWN, SEND_SHUTDOWN, SetState,
};

use crate::model::End;

/// What becomes of a socket at its →CLOSE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Gone,
    /// A timewait socket in TIME_WAIT takes its place.
    TimeWait,
    /// A timewait socket takes its place, which the kernel goes on calling FIN_WAIT2.
    Orphan,
    /// A timewait socket may have taken its place: only a dump can tell.
    Undecided,
}

pub(super) fn fate(event: &SetState) -> Fate {
    let from = event.from();
    if from != TcpState::FIN_WAIT2 && from != TcpState::CLOSING {
        return Fate::Gone;
    }
    if !event.has(FLAG_SOCKET_READ) {
        return Fate::Undecided;
    }
    if event.sk_err != 0 {
        return Fate::Gone;
    }
    if from == TcpState::CLOSING || event.has(FLAG_DONE) {
        // tcp_fin() and tcp_rcv_state_process() have called tcp_time_wait(TCP_TIME_WAIT).
        return Fate::TimeWait;
    }
    // __tcp_close() orphans the socket before it calls tcp_time_wait(TCP_FIN_WAIT2), but closes it without
    // that where data was left unread, where SO_LINGER is 0, and where TCP_LINGER2 is negative.
    if event.has(FLAG_DEAD) && !event.has(FLAG_NO_LINGER) {
        Fate::Orphan
    } else {
        Fate::Gone
    }
}

/// Why a connection that goes to CLOSE or TIME_WAIT with this event ended.
pub(super) fn end(event: &SetState) -> End {
    let from = event.from();
    if !event.has(FLAG_SOCKET_READ) {
        return End::Unknown;
    }
    match event.sk_err {
        0 => {}
        // tcp_rcv_state_process() calls tcp_reset() itself where data comes after both directions were shut, and then
        // it is we who send the reset: the fields are the same.
        libc::ECONNRESET
            if event.shutdown & RCV_SHUTDOWN != 0
                && matches!(from, TcpState::FIN_WAIT1 | TcpState::FIN_WAIT2) =>
        {
            return End::Unknown;
        }
        // tcp_reset(): EPIPE in CLOSE_WAIT, ECONNREFUSED in SYN_SENT, else ECONNRESET.
        libc::ECONNRESET | libc::EPIPE => return End::ResetReceived,
        libc::ECONNREFUSED => return End::Refused,
        libc::ETIMEDOUT => return End::Timeout,
        // tcp_v4_err() and tcp_v6_err() by way of icmp_err_convert, or tcp_write_err() with the soft error.
        libc::EHOSTUNREACH
        | libc::ENETUNREACH
        | libc::EHOSTDOWN
        | libc::ENETDOWN
        | libc::ENONET
        | libc::ENOPROTOOPT => return End::Unreachable,
        // tcp_abort(): `ss -K`. Before the handshake's end nothing is sent.
        libc::ECONNABORTED if from == TcpState::SYN_SENT => return End::Aborted,
        libc::ECONNABORTED => return End::ResetSent,
        _ => return End::Unknown,
    }
    match from {
        // Closed by its owner; else tcp_v4_connect() itself failed, for want of a port or a route.
        TcpState::SYN_SENT if event.shutdown & SEND_SHUTDOWN != 0 => End::Aborted,
        TcpState::SYN_SENT => End::Unknown,
        TcpState::LAST_ACK => End::RemoteClose,
        TcpState::CLOSING => End::SimultaneousClose,
        TcpState::FIN_WAIT2 if event.has(FLAG_DONE) => End::LocalClose,
        // Without an error the closing side did it: unread data, SO_LINGER 0, disconnect, a listener closed
        // over sockets not accepted, or memory pressure (tcp_out_of_resources). All of them send a reset.
        TcpState::ESTABLISHED
        | TcpState::CLOSE_WAIT
        | TcpState::FIN_WAIT1
        | TcpState::FIN_WAIT2
        | TcpState::SYN_RECV => End::ResetSent,
        _ => End::Unknown,
    }
}
