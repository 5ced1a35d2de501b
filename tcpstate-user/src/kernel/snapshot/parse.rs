//! Netlink messages of inet_diag: the request's bytes, and what an answer's bytes say.
//!
//! No I/O. Own, because netlink-packet-sock-diag 0.5 drops the time that a timewait socket has left, and
//! allocates for attributes that nobody reads here. Layouts: `linux/netlink.h`, `linux/inet_diag.h`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::io::Errno;
use tcpstate_common::TcpState;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::model::{Endpoint, Family};
use crate::table::{Record, StateMask};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The older of inet_diag's two requests, and its answers: the only one that takes both families in one go through the
/// kernel's tables (`inet_diag_dump_compat`).
const TCPDIAG_GETSOCK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Attribute with `sk_shutdown`.
const INET_DIAG_SHUTDOWN: u16 = 8;
/// The two upper bits of an attribute's type are flags.
const NLA_TYPE_MASK: u16 = 0x3fff;
/// Messages and attributes start at multiples of this.
const ALIGN: usize = 4;

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Header {
    len: [u8; 4],
    kind: [u8; 2],
    flags: [u8; 2],
    sequence: [u8; 4],
    port: [u8; 4],
}

/// `struct inet_diag_sockid`.
#[repr(C)]
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct SocketId {
    /// Network order, as the addresses are.
    local_port: [u8; 2],
    remote_port: [u8; 2],
    local_addr: [u8; 16],
    remote_addr: [u8; 16],
    interface: [u8; 4],
    /// The lower half first (`sock_diag_save_cookie`).
    cookie: [[u8; 4]; 2],
}

/// `struct inet_diag_msg`; attributes follow.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct DiagMessage {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: SocketId,
    expires_ms: [u8; 4],
    receive_queue: [u8; 4],
    send_queue: [u8; 4],
    uid: [u8; 4],
    inode: [u8; 4],
}

const _: () = assert!(size_of::<Header>() == 16);
const _: () = assert!(size_of::<SocketId>() == 48);
const _: () = assert!(size_of::<DiagMessage>() == 72);

/// `struct nlmsghdr` and `struct inet_diag_req`, asking for a dump.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
pub(super) struct Request {
    header: Header,
    /// Of a single socket, and so are the lengths of prefixes.
    family: u8,
    prefixes: [u8; 2],
    extensions: u8,
    id: SocketId,
    states: [u8; 4],
    tables: [u8; 4],
}

impl Request {
    pub(super) fn new(states: StateMask) -> Self {
        let mut bits = states.bits();
        if states.contains(TcpState::NEW_SYN_RECV) {
            // `inet_diag_dump_icsk` gives requests to whoever asks for SYN_RECV, and to nobody else.
            bits |= 1 << TcpState::SYN_RECV.number();
        }
        Self {
            header: Header {
                len: (size_of::<Self>() as u32).to_ne_bytes(),
                kind: TCPDIAG_GETSOCK.to_ne_bytes(),
                flags: (NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes(),
                sequence: [0; 4],
                port: [0; 4],
            },
            family: 0,
            prefixes: [0; 2],
            extensions: 0,
            id: SocketId::default(),
            states: bits.to_ne_bytes(),
            tables: [0; 4],
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        IntoBytes::as_bytes(self)
    }
}

/// Why bytes are not what inet_diag sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    what: &'static str,
    /// Offset of the message in its batch.
    at: usize,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in the message at byte {}", self.what, self.at)
    }
}

impl std::error::Error for Malformed {}

pub(super) enum Message<'a> {
    Socket(Found<'a>),
    /// The dump is over, perhaps because it failed.
    Done(Option<Errno>),
    Failed(Errno),
    Other,
}

/// The messages of a batch, each with whether the dump is marked inconsistent; ends at the first malformed one.
pub(super) fn messages(
    batch: &[u8],
) -> impl Iterator<Item = Result<(Message<'_>, bool), Malformed>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = batch.get(at..).filter(|rest| !rest.is_empty())?;
        let start = at;
        let message = message(rest);
        at = match &message {
            Ok((.., len)) => start + len.next_multiple_of(ALIGN),
            Err(_) => batch.len(),
        };
        Some(
            message
                .map(|(message, interrupted, _)| (message, interrupted))
                .map_err(|what| Malformed { what, at: start }),
        )
    })
}

fn message(bytes: &[u8]) -> Result<(Message<'_>, bool, usize), &'static str> {
    let (header, _) = Header::ref_from_prefix(bytes).map_err(|_| "header cut short")?;
    let len = u32::from_ne_bytes(header.len) as usize;
    let payload = bytes
        .get(size_of::<Header>()..len)
        .ok_or("length out of bounds")?;
    let interrupted = u16::from_ne_bytes(header.flags) & NLM_F_DUMP_INTR != 0;
    let message = match u16::from_ne_bytes(header.kind) {
        TCPDIAG_GETSOCK => Message::Socket(Found::parse(payload)?),
        // A negative errno, or 0.
        NLMSG_DONE => Message::Done(errno(payload)?),
        NLMSG_ERROR => errno(payload)?.map_or(Message::Other, Message::Failed),
        _ => Message::Other,
    };
    Ok((message, interrupted, len))
}

fn errno(payload: &[u8]) -> Result<Option<Errno>, &'static str> {
    let (number, _) = <[u8; 4]>::read_from_prefix(payload).map_err(|_| "error number cut short")?;
    match i32::from_ne_bytes(number) {
        0 => Ok(None),
        number => match number.checked_neg() {
            Some(number @ 1..4096) => Ok(Some(Errno::from_raw_os_error(number))),
            _ => Err("impossible error number"),
        },
    }
}

/// A socket in a dump.
pub(super) struct Found<'a> {
    message: &'a DiagMessage,
    /// A full socket, not a timewait socket or a request.
    full: bool,
}

impl<'a> Found<'a> {
    fn parse(payload: &'a [u8]) -> Result<Self, &'static str> {
        let (message, attributes) =
            DiagMessage::ref_from_prefix(payload).map_err(|_| "socket cut short")?;
        if !matches!(message.family, AF_INET | AF_INET6) {
            return Err("a family that is neither AF_INET nor AF_INET6");
        }
        Ok(Self {
            message,
            full: has_shutdown(attributes)?,
        })
    }

    /// `None` for a socket that got another state between being chosen and being read.
    pub(super) fn record(
        &self,
        states: StateMask,
        netns: u32,
        read_ns: (u64, u64),
    ) -> Option<Record> {
        let message = self.message;
        let state = match TcpState::from_kernel(message.state) {
            // inet_diag calls both SYN_RECV (`inet_req_diag_fill`).
            TcpState::SYN_RECV if !self.full => TcpState::NEW_SYN_RECV,
            TcpState::CLOSE => return None,
            state => state,
        };
        if !states.contains(state) {
            return None;
        }
        let local_addr = address(message.family, message.id.local_addr);
        let remote_addr = address(message.family, message.id.remote_addr);
        let listens = state == TcpState::LISTEN;
        let telling = if listens { local_addr } else { remote_addr };
        Some(Record {
            // The kernel makes one for each socket that it lists.
            cookie: Some(cookie(message.id.cookie)).filter(|&cookie| cookie != 0),
            address: None,
            netns,
            family: match telling {
                IpAddr::V4(_) => Family::Ipv4,
                IpAddr::V6(_) => Family::Ipv6,
            },
            local: endpoint(local_addr, message.id.local_port),
            remote: if listens {
                Endpoint::default()
            } else {
                endpoint(remote_addr, message.id.remote_port)
            },
            state,
            uid: self.full.then(|| u32::from_ne_bytes(message.uid)),
            inode: u32::from_ne_bytes(message.inode),
            recv_queue: u32::from_ne_bytes(message.receive_queue),
            send_queue: u32::from_ne_bytes(message.send_queue),
            expires_ns: (!self.full)
                .then(|| u64::from(u32::from_ne_bytes(message.expires_ms)) * 1_000_000),
            read_ns,
        })
    }
}

/// `inet_diag_msg_attrs_fill` gives every full socket this attribute, and the fillers of timewait sockets and
/// requests never do. Neither the timer nor the inode tells: a full SYN_RECV socket retransmits too, and has
/// no inode before it is accepted.
fn has_shutdown(mut attributes: &[u8]) -> Result<bool, &'static str> {
    while let Some((head, _)) = attributes.split_at_checked(ALIGN) {
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if len < ALIGN || len > attributes.len() {
            return Err("an attribute's length out of bounds");
        }
        if u16::from_ne_bytes([head[2], head[3]]) & NLA_TYPE_MASK == INET_DIAG_SHUTDOWN {
            return Ok(true);
        }
        attributes = attributes
            .get(len.next_multiple_of(ALIGN)..)
            .unwrap_or_default();
    }
    Ok(false)
}

fn cookie([low, high]: [[u8; 4]; 2]) -> u64 {
    u64::from(u32::from_ne_bytes(high)) << 32 | u64::from(u32::from_ne_bytes(low))
}

fn address(family: u8, bytes: [u8; 16]) -> IpAddr {
    if family == AF_INET {
        let [a, b, c, d, ..] = bytes;
        Ipv4Addr::new(a, b, c, d).into()
    } else {
        Ipv6Addr::from(bytes).to_canonical()
    }
}

fn endpoint(addr: IpAddr, port: [u8; 2]) -> Endpoint {
    let port = u16::from_be_bytes(port);
    Endpoint {
        addr: Some(addr),
        port: (port != 0).then_some(port),
    }
}
