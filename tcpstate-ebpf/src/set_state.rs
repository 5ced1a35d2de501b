//! The programs on `sock:inet_sock_set_state`, and the record that each makes of a call.
//!
//! The tracepoint fires in `tcp_set_state` and its like before the new state is stored, and after the socket was
//! unhashed and gave its port back where the new state is CLOSE.

use aya_ebpf::{
    EbpfContext as _,
    helpers::bpf_ktime_get_boot_ns,
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use tcpstate_common::{
    TcpState,
    event::{AF_INET6, FLAG_DEAD, FLAG_DONE, FLAG_NO_LINGER, FLAG_SOCKET_READ},
    tracepoint::InetSockSetState,
    wire::{Addrs6, Head},
};

use crate::{
    emit::count,
    process::{Direct, Probe, Process, ReadTask, by_call, by_call_on},
    sock::{IPPROTO_TCP, Sock},
};

/// A line for aya-log, in builds that are for debugging.
macro_rules! log {
    ($ctx:expr, $from:expr, $to:expr) => {
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!($ctx, "state {} to {}", $from, $to);
    };
}

/// With BTF, 5.12+.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn set_state(ctx: BtfTracePointContext) {
    typed::<Direct>(&ctx, Sock::cookie);
}

/// With BTF, below 5.12: tracing programs can't ask for the cookie there, only see whether someone else did.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn set_state_no_cookie(ctx: BtfTracePointContext) {
    typed::<Probe>(&ctx, Sock::stored_cookie);
}

/// Without BTF: no more than the tracepoint's record holds.
#[tracepoint(category = "sock", name = "inet_sock_set_state")]
pub fn set_state_classic(ctx: TracePointContext) -> u32 {
    classic(&ctx);
    0
}

#[inline(always)]
fn typed<R: ReadTask>(ctx: &BtfTracePointContext, cookie: impl Fn(Sock) -> u64) {
    // TP_PROTO(const struct sock *sk, const int oldstate, const int newstate)
    let sk = Sock::new(ctx.arg(0));
    let (from, to): (u32, u32) = (ctx.arg(1), ctx.arg(2));
    if !sk.is_tcp() {
        return;
    }
    let Some(netns) = sk.selected_netns() else {
        return;
    };
    log!(ctx, from, to);

    let Some(counted) = count(from, to) else {
        return;
    };
    let [from, to] = [from as u8, to as u8];
    let (old, new) = (TcpState::from_kernel(from), TcpState::from_kernel(to));
    let (sk_err, shutdown, flags) = (sk.err(), sk.shutdown(), sk.flags());
    let caller = if by_call_on(old, new, sk_err, shutdown, flags.dead()) {
        Process::current::<R>()
    } else {
        None
    };
    let head = |lost, [local_addr, remote_addr]: [[u8; 4]; 2]| {
        // The port that the socket holds: at CLOSE→SYN_SENT it may have none yet, where a reused socket's header still
        // shows the old one; before →CLOSE it gave it back, and only the header shows it.
        let (local_port, linger2) = match if new == TcpState::CLOSE {
            sk.tcp()
        } else {
            None
        } {
            None => (sk.num(), 0),
            Some(tcp) if old == TcpState::FIN_WAIT2 => (tcp.sport(), tcp.linger2()),
            Some(tcp) => (tcp.sport(), 0),
        };
        Head {
            time_ns: now(),
            sk: sk.as_ptr() as u64,
            cookie: cookie(sk),
            netns,
            uid: sk.uid(),
            lost,
            sk_err,
            local_addr,
            remote_addr,
            local_port,
            remote_port: sk.remote_port(),
            from,
            to,
            shutdown,
            flags: FLAG_SOCKET_READ
                | if linger2 < 0 { FLAG_NO_LINGER } else { 0 }
                | if flags.dead() { FLAG_DEAD } else { 0 }
                | if flags.done() { FLAG_DONE } else { 0 },
        }
    };
    let addrs6 = || Addrs6 {
        local_addr: sk.local_addr(AF_INET6),
        remote_addr: sk.remote_addr(AF_INET6),
    };
    counted.send(sk.family(), caller, || sk.addrs4(), addrs6, head);
}

#[inline(always)]
fn classic(ctx: &TracePointContext) {
    let record = ctx.as_ptr().cast_const().cast::<InetSockSetState>();
    macro_rules! field {
        ($($field:tt)+) => {
            // SAFETY: the record is as long as the struct: the kernel refuses to attach a program that reads past its
            // end, and the loader compared the fields with tracefs' `format`.
            unsafe { (&raw const (*record).$($field)+).read() }
        };
    }
    if field!(protocol) != IPPROTO_TCP {
        return;
    }
    let (from, to) = (field!(oldstate) as u32, field!(newstate) as u32);
    log!(ctx, from, to);

    let Some(counted) = count(from, to) else {
        return;
    };
    let [from, to] = [from as u8, to as u8];
    let (old, new) = (TcpState::from_kernel(from), TcpState::from_kernel(to));
    let caller = by_call(old, new).then(Process::current_without_btf);
    let head = |lost, [local_addr, remote_addr]: [[u8; 4]; 2]| Head {
        time_ns: now(),
        sk: field!(skaddr),
        cookie: 0,
        netns: 0,
        uid: u32::MAX,
        lost,
        sk_err: 0,
        local_addr,
        remote_addr,
        // A reused socket still shows its old port here, and nothing tells it from a new one.
        local_port: if new == TcpState::SYN_SENT {
            0
        } else {
            field!(sport)
        },
        remote_port: field!(dport),
        from,
        to,
        shutdown: 0,
        flags: 0,
    };
    let addrs6 = || Addrs6 {
        local_addr: zerocopy::transmute!([field!(saddr_v6[0]), field!(saddr_v6[1])]),
        remote_addr: zerocopy::transmute!([field!(daddr_v6[0]), field!(daddr_v6[1])]),
    };
    let addrs4 = || [field!(saddr), field!(daddr)];
    counted.send(field!(family), caller, addrs4, addrs6, head);
}

/// `CLOCK_BOOTTIME`: goes on while the machine sleeps, and is what processes' start times are in. 5.8+
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes no arguments; in every program type that has the helper a call is sound.
    unsafe { bpf_ktime_get_boot_ns() }
}
