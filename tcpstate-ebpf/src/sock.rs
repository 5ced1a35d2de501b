//! The socket of a transition, read field by field; what the fields mean is the kernel's and the user side's.

use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_probe_read_kernel, bpf_skc_to_tcp_sock};
use tcpstate_common::{TcpState, event::AF_INET};

use crate::maps::{offset, switch};

pub const IPPROTO_TCP: u16 = 6;

/// `enum sock_flags`: bit numbers in `sk_flags`.
const SOCK_DEAD: u32 = 0;
const SOCK_DONE: u32 = 1;

/// A `struct sock *` that the verifier knows by its BTF type: it lets fields be loaded directly, and a load from an
/// address that is not mapped gives 0 instead of a fault.
#[derive(Clone, Copy)]
pub struct Sock(*const u8);

/// A `struct tcp_sock *`, known to the verifier as that.
#[derive(Clone, Copy)]
pub struct TcpSock(*const u8);

/// Loads the field of that name in [`Offsets`](tcpstate_common::config::Offsets) from a struct at a pointer with BTF type.
macro_rules! load {
    ($base:expr, $($field:tt)+) => {{
        let offset = offset!($($field)+);
        // SAFETY: the offset is the field's in the struct that the base points to, by the kernel's own BTF, and the
        // type has the field's size. The verifier refuses the program where a load leaves the struct.
        unsafe { load_at($base, offset) }
    }};
}

/// As [`load!`], by a copy through a helper: the verifier need not know what the base points to. 0 where that fails.
macro_rules! copy {
    ($base:expr, $($field:tt)+) => {{
        let from = $base.wrapping_add(offset!($($field)+)).cast();
        // SAFETY: the helper checks the address and fails on one that is not mapped.
        unsafe { bpf_probe_read_kernel(from) }.unwrap_or_default()
    }};
}

/// # Safety
/// A `T` must be there to be read.
#[inline(always)]
unsafe fn load_at<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: the caller's promise.
    unsafe { base.add(offset).cast::<T>().read() }
}

impl Sock {
    /// `sk` is the tracepoint's first argument.
    #[inline(always)]
    pub const fn new(sk: *const u8) -> Self {
        Self(sk)
    }

    /// That of a `struct socket *` known by its BTF type. Not null, but for a socket that is being made or released:
    /// then loads from it give 0.
    #[inline(always)]
    pub fn of_socket(socket: *const u8) -> Self {
        Self(load!(socket, socket_sk))
    }

    #[inline(always)]
    pub const fn as_ptr(self) -> *const u8 {
        self.0
    }

    #[inline(always)]
    pub fn is_tcp(self) -> bool {
        let protocol: u16 = load!(self.0, sk_protocol);
        protocol == IPPROTO_TCP
    }

    #[inline(always)]
    pub fn state(self) -> TcpState {
        TcpState::from_kernel(load!(self.0, list.sk_state))
    }

    #[inline(always)]
    pub fn family(self) -> u16 {
        load!(self.0, sk_family)
    }

    /// Inode of the network namespace; `None` where that one is not to be traced.
    #[inline(always)]
    pub fn selected_netns(self) -> Option<u32> {
        selected_netns(load!(self.0, sk_net))
    }

    /// The cookie, which the kernel makes where there is none yet: the helper takes three times as long as to look. 5.12+
    #[inline(always)]
    pub fn cookie(self) -> u64 {
        match self.stored_cookie() {
            // SAFETY: the argument is a socket by its BTF type, which is all that the helper asks for.
            0 => unsafe { bpf_get_socket_cookie(self.0.cast_mut().cast()) },
            cookie => cookie,
        }
    }

    /// The cookie as it is stored: 0 until something asked the kernel for it.
    #[inline(always)]
    pub fn stored_cookie(self) -> u64 {
        load!(self.0, sk_cookie)
    }

    #[inline(always)]
    pub fn uid(self) -> u32 {
        load!(self.0, sk_uid)
    }

    #[inline(always)]
    pub fn err(self) -> i32 {
        load!(self.0, sk_err)
    }

    #[inline(always)]
    pub fn shutdown(self) -> u8 {
        load!(self.0, sk_shutdown)
    }

    #[inline(always)]
    pub fn flags(self) -> SockFlags {
        SockFlags(load!(self.0, sk_flags))
    }

    /// Local port while the socket holds one, in host order.
    #[inline(always)]
    pub fn num(self) -> u16 {
        load!(self.0, sk_num)
    }

    #[inline(always)]
    pub fn remote_port(self) -> u16 {
        u16::from_be(load!(self.0, sk_dport))
    }

    /// Of an AF_INET socket, in network order: its own, and the other end's.
    #[inline(always)]
    pub fn addrs4(self) -> [[u8; 4]; 2] {
        let local: u32 = load!(self.0, sk_rcv_saddr);
        let remote: u32 = load!(self.0, sk_daddr);
        [zerocopy::transmute!(local), zerocopy::transmute!(remote)]
    }

    #[inline(always)]
    pub fn local_addr(self, family: u16) -> [u8; 16] {
        if family == AF_INET {
            v4_mapped(load!(self.0, sk_rcv_saddr))
        } else {
            let words: [u64; 2] = load!(self.0, sk_v6_rcv_saddr);
            zerocopy::transmute!(words)
        }
    }

    #[inline(always)]
    pub fn remote_addr(self, family: u16) -> [u8; 16] {
        if family == AF_INET {
            v4_mapped(load!(self.0, sk_daddr))
        } else {
            let words: [u64; 2] = load!(self.0, sk_v6_daddr);
            zerocopy::transmute!(words)
        }
    }

    /// Of a timewait socket: the state that it stands for, and the jiffy that it ends at. By copies, since the helper that
    /// would give the verifier its type, and that for requests, know `tcp_prot` and `tcpv6_prot` only; MPTCP has sockets
    /// with another one.
    #[inline(always)]
    pub fn time_wait(self) -> (TcpState, u64) {
        let substate = copy!(self.0, tw_substate);
        (
            TcpState::from_kernel(substate),
            copy!(self.0, list.tw_expires),
        )
    }

    /// Of a request: the jiffy of its next retransmission.
    #[inline(always)]
    pub fn request_expires(self) -> u64 {
        copy!(self.0, list.rsk_expires)
    }

    /// The same socket as the struct that its TCP fields are in: past the end of `struct sock` the verifier wants
    /// to know that they are there. `None` never for TCP; costs a helper call, so only where it is needed. 5.9+
    #[inline(always)]
    pub fn tcp(self) -> Option<TcpSock> {
        // SAFETY: the argument is a socket by its BTF type, which is all that the helper asks for.
        let tcp = unsafe { bpf_skc_to_tcp_sock(self.0.cast_mut().cast()) };
        (!tcp.is_null()).then_some(TcpSock(tcp.cast_const().cast()))
    }
}

impl TcpSock {
    /// The local port as it stands in headers; outlives [`Sock::num`], which is cleared before →CLOSE.
    #[inline(always)]
    pub fn sport(self) -> u16 {
        u16::from_be(load!(self.0, inet_sport))
    }

    #[inline(always)]
    pub fn linger2(self) -> i32 {
        load!(self.0, tcp_linger2)
    }

    /// The jiffy, modulo 2³², of the last ACK that it received.
    #[inline(always)]
    pub fn acked_jiffies(self) -> u32 {
        load!(self.0, tcp_rcv_tstamp)
    }

    /// As [`Sock::uid`].
    #[inline(always)]
    pub fn uid(self) -> u32 {
        load!(self.0, sk_uid)
    }

    /// Inode of the socket's file; 0 where it has none (`sock_i_ino`).
    #[inline(always)]
    pub fn inode(self) -> u32 {
        let socket: *const u8 = load!(self.0, list.sk_socket);
        if socket.is_null() {
            return 0;
        }
        // It stands behind the socket, where the verifier lets nobody look.
        let inode: u64 = copy!(socket, list.socket_ino);
        inode as u32
    }

    /// Connections that wait to be accepted, and how many may.
    #[inline(always)]
    pub fn backlog(self) -> (u32, u32) {
        (
            load!(self.0, list.sk_ack_backlog),
            load!(self.0, list.sk_max_ack_backlog),
        )
    }

    /// Bytes received and not read, sent and not acknowledged (`tcp_diag_get_info`).
    #[inline(always)]
    pub fn queues(self) -> (u32, u32) {
        let received: u32 = load!(self.0, list.tcp_rcv_nxt);
        let read: u32 = load!(self.0, list.tcp_copied_seq);
        let sent: u32 = load!(self.0, list.tcp_write_seq);
        let acknowledged: u32 = load!(self.0, list.tcp_snd_una);
        let unread = received.wrapping_sub(read);
        // A FIN that was read counts as one more read than received.
        let unread = if unread.cast_signed() < 0 { 0 } else { unread };
        (unread, sent.wrapping_sub(acknowledged))
    }
}

/// A `struct inet_timewait_sock *`, known to the verifier as that.
#[derive(Clone, Copy)]
pub struct TimeWaitSock(*const u8);

impl TimeWaitSock {
    /// `tw` is an argument of the traced function.
    #[inline(always)]
    pub const fn new(tw: *const u8) -> Self {
        Self(tw)
    }

    /// As it is stored.
    #[inline(always)]
    pub fn cookie(self) -> u64 {
        load!(self.0, tw_cookie)
    }

    /// TIME_WAIT, or FIN_WAIT2.
    #[inline(always)]
    pub fn substate(self) -> u8 {
        load!(self.0, tw_substate)
    }

    /// As [`Sock::selected_netns`].
    #[inline(always)]
    pub fn selected_netns(self) -> Option<u32> {
        selected_netns(load!(self.0, tw_net))
    }
}

/// `net`: a `struct net *`, known to the verifier as that.
#[inline(always)]
fn selected_netns(net: *const u8) -> Option<u32> {
    let netns = load!(net, net_inum);
    let only = switch!(netns);
    (only == 0 || netns == only).then_some(netns)
}

/// `sk_flags`.
#[derive(Clone, Copy)]
pub struct SockFlags(u64);

impl SockFlags {
    /// No descriptor leads to the socket any more.
    #[inline(always)]
    pub const fn dead(self) -> bool {
        self.0 & (1 << SOCK_DEAD) != 0
    }

    /// A FIN was received.
    #[inline(always)]
    pub const fn done(self) -> bool {
        self.0 & (1 << SOCK_DONE) != 0
    }
}

/// `addr`, in network order, behind `::ffff:`.
#[inline(always)]
fn v4_mapped(addr: u32) -> [u8; 16] {
    let words = [0, (0xffff << 32 | u64::from(u32::from_be(addr))).to_be()];
    zerocopy::transmute!(words)
}
