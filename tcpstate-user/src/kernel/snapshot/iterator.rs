//! Dumps by the kernel's iterator over TCP sockets (`iter/tcp`): its link, its files, and what their records say.
//!
//! The program is `sockets` in `tcpstate-ebpf`; it is loaded by `optional`.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::Arc;

use tcpstate_common::event::{AF_INET, AF_INET6};
use tcpstate_common::socket::FULL;
use tcpstate_common::{Socket, TcpState};
use zerocopy::{FromBytes as _, Immutable, IntoBytes};

use super::DumpError;
use crate::kernel::jiffy_ns;
use crate::model::{Endpoint, Family};
use crate::table::Record;

/// More than the kernel gives at once, which is 32 KiB (`bpf_seq_read`): no record is cut.
const READ_BYTES: usize = 64 << 10;

/// The loaded program's link; clones are the same one. Where the last is gone, it is too.
#[derive(Clone, Debug)]
pub struct SocketIterator {
    link: Arc<OwnedFd>,
}

impl SocketIterator {
    /// `program`: loaded. An own call, because aya's link ends with the first file that is made of it.
    pub(in crate::kernel) fn new(program: BorrowedFd<'_>) -> io::Result<Self> {
        /// `union bpf_attr` for the command.
        #[repr(C)]
        #[derive(IntoBytes, Immutable)]
        struct Attr {
            program: i32,
            target: u32,
            attach_type: u32,
            flags: u32,
        }
        const BPF_LINK_CREATE: libc::c_int = 28;
        const BPF_TRACE_ITER: u32 = 28;
        let attr = Attr {
            program: program.as_raw_fd(),
            target: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
        };
        let link = Arc::new(new_descriptor(BPF_LINK_CREATE, &attr)?);
        Ok(Self { link })
    }

    /// Over the sockets of the network namespace that the calling thread is in.
    fn open(&self) -> io::Result<File> {
        /// `union bpf_attr` for the command.
        #[repr(C)]
        #[derive(IntoBytes, Immutable)]
        struct Attr {
            link: i32,
            flags: u32,
        }
        const BPF_ITER_CREATE: libc::c_int = 33;
        let attr = Attr {
            link: self.link.as_fd().as_raw_fd(),
            flags: 0,
        };
        Ok(new_descriptor(BPF_ITER_CREATE, &attr)?.into())
    }

    /// Adds all sockets of the calling thread's network namespace, which has the inode `netns`.
    pub(super) fn dump(&self, records: &mut Vec<Record>, netns: u32) -> Result<(), DumpError> {
        let mut file = self.open()?;
        let mut buffer = vec![0; READ_BYTES];
        let reading = Reading {
            netns,
            jiffy_ns: jiffy_ns(),
        };
        loop {
            let len = match file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => len,
                // EAGAIN: the kernel has looked at a million sockets, and shown none.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            reading.add(&buffer[..len], records)?;
        }
    }
}

/// A `bpf(2)` command that makes a descriptor.
fn new_descriptor<A: IntoBytes + Immutable>(command: libc::c_int, attr: &A) -> io::Result<OwnedFd> {
    // SAFETY: both commands read `attr` within the size given, where there are no pointers.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<A>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made it for this call, closed at exec, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// What the records don't say themselves.
pub(super) struct Reading {
    pub(super) netns: u32,
    pub(super) jiffy_ns: u64,
}

impl Reading {
    /// `bytes`: whole records.
    pub(super) fn add(&self, bytes: &[u8], records: &mut Vec<Record>) -> Result<(), Malformed> {
        let mut rest = bytes;
        while let Ok((socket, after)) = Socket::read_from_prefix(rest) {
            rest = after;
            if matches!(socket.family, AF_INET | AF_INET6) {
                records.extend(self.record(&socket));
            } else {
                return Err(Malformed::Family(socket.family));
            }
        }
        match rest.len() {
            0 => Ok(()),
            len => Err(Malformed::CutShort(len)),
        }
    }

    /// `None` for a closed socket that the kernel's tables still have, and for one in a state that this version does not
    /// know.
    fn record(&self, socket: &Socket) -> Option<Record> {
        let state = TcpState::from_kernel(socket.state);
        if state == TcpState::CLOSE || state.name().is_none() {
            return None;
        }
        let full = socket.kind == FULL;
        let listens = state == TcpState::LISTEN;
        let address = |bytes| Ipv6Addr::from(bytes).to_canonical();
        let (local_addr, remote_addr) = (address(socket.local_addr), address(socket.remote_addr));
        let telling = if listens { local_addr } else { remote_addr };
        Some(Record {
            cookie: (socket.cookie != 0).then_some(socket.cookie),
            address: Some(socket.sk),
            netns: self.netns,
            family: match telling {
                IpAddr::V4(_) => Family::Ipv4,
                IpAddr::V6(_) => Family::Ipv6,
            },
            local: endpoint(local_addr, socket.local_port),
            remote: if listens {
                Endpoint::default()
            } else {
                endpoint(remote_addr, socket.remote_port)
            },
            state,
            uid: full.then_some(socket.uid),
            inode: socket.inode,
            recv_queue: socket.recv_queue,
            send_queue: socket.send_queue,
            expires_ns: (!full).then(|| u64::from(socket.expires_jiffies) * self.jiffy_ns),
            read_ns: (socket.time_ns, socket.time_ns),
        })
    }
}

fn endpoint(addr: IpAddr, port: u16) -> Endpoint {
    Endpoint {
        addr: Some(addr),
        port: (port != 0).then_some(port),
    }
}

/// Why bytes are not what the program writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("{0} bytes after the last whole record of {len}", len = size_of::<Socket>())]
    CutShort(usize),
    #[error("family {0}, which is neither AF_INET nor AF_INET6")]
    Family(u16),
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tcpstate_common::socket::MINI;
    use zerocopy::FromZeros as _;

    use super::*;

    const READING: Reading = Reading {
        netns: 7,
        jiffy_ns: 4_000_000,
    };

    fn v4(last: u8) -> [u8; 16] {
        Ipv4Addr::new(10, 0, 0, last).to_ipv6_mapped().octets()
    }

    fn socket(state: TcpState) -> Socket {
        Socket {
            time_ns: 5,
            sk: 0xffff_8880_0000_0000,
            cookie: 11,
            local_addr: v4(1),
            remote_addr: v4(2),
            uid: 1000,
            inode: 12,
            recv_queue: 3,
            send_queue: 4,
            local_port: 80,
            remote_port: 1024,
            state: state.number(),
            kind: FULL,
            family: AF_INET,
            ..Socket::new_zeroed()
        }
    }

    fn read(sockets: &[Socket]) -> Vec<Record> {
        let mut records = Vec::new();
        READING
            .add(sockets.as_bytes(), &mut records)
            .expect("whole records");
        records
    }

    #[test]
    fn a_full_socket_is_what_it_was() {
        let record = Record {
            cookie: Some(11),
            address: Some(0xffff_8880_0000_0000),
            netns: 7,
            family: Family::Ipv4,
            local: endpoint(Ipv4Addr::new(10, 0, 0, 1).into(), 80),
            remote: endpoint(Ipv4Addr::new(10, 0, 0, 2).into(), 1024),
            state: TcpState::ESTABLISHED,
            uid: Some(1000),
            inode: 12,
            recv_queue: 3,
            send_queue: 4,
            expires_ns: None,
            read_ns: (5, 5),
        };
        let established = socket(TcpState::ESTABLISHED);
        // The same, by a socket of the other family.
        let dual = Socket {
            family: AF_INET6,
            ..established
        };
        assert_eq!(read(&[established, dual]), [record, record]);
    }

    #[test]
    fn a_listener_has_the_family_of_its_own_address_and_no_remote_end() {
        let any = Socket {
            local_addr: [0; 16],
            remote_addr: [0; 16],
            remote_port: 0,
            family: AF_INET6,
            ..socket(TcpState::LISTEN)
        };
        let records = read(&[any, socket(TcpState::LISTEN)]);
        assert_eq!(records[0].local, endpoint(Ipv6Addr::UNSPECIFIED.into(), 80));
        let families = records.iter().map(|record| (record.family, record.remote));
        assert!(families.eq([
            (Family::Ipv6, Endpoint::default()),
            (Family::Ipv4, Endpoint::default())
        ]));
    }

    #[test]
    fn what_is_no_full_socket_has_a_timer_and_no_uid() {
        let mini = |state, expires_jiffies| Socket {
            kind: MINI,
            uid: 0,
            inode: 0,
            expires_jiffies,
            ..socket(state)
        };
        let records = read(&[
            mini(TcpState::FIN_WAIT2, 15_000),
            mini(TcpState::NEW_SYN_RECV, 0),
            socket(TcpState::FIN_WAIT2),
        ]);
        let told = records.iter().map(|it| (it.state, it.uid, it.expires_ns));
        assert!(told.eq([
            (TcpState::FIN_WAIT2, None, Some(60_000_000_000)),
            (TcpState::NEW_SYN_RECV, None, Some(0)),
            (TcpState::FIN_WAIT2, Some(1000), None),
        ]));
    }

    #[test]
    fn closed_sockets_and_unknown_states_are_left_out() {
        let bound_inactive = TcpState::from_kernel(13);
        let sockets = [TcpState::CLOSE, bound_inactive, TcpState::CLOSING].map(socket);
        let records = read(&sockets);
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].state, TcpState::CLOSING);
    }

    #[test]
    fn what_the_program_does_not_write_is_an_error() {
        let mut records = Vec::new();
        let one = socket(TcpState::CLOSING);
        let bytes = one.as_bytes();
        for len in 1..bytes.len() {
            let cut = [bytes, &bytes[..len]].concat();
            let error = READING.add(&cut, &mut records).expect_err("cut short");
            assert_eq!(error, Malformed::CutShort(len));
        }
        let other = Socket { family: 1, ..one };
        let error = READING.add(other.as_bytes(), &mut records);
        let error = error.expect_err("AF_UNIX").to_string();
        assert_eq!(error, "family 1, which is neither AF_INET nor AF_INET6");
    }

    #[test]
    fn a_jiffy_is_one_of_the_lengths_that_kernels_have() {
        // HZ of 1000, 300, 250 and 100.
        assert!([1_000_000, 3_333_333, 4_000_000, 10_000_000].contains(&jiffy_ns()));
    }
}
