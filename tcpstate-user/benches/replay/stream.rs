//! The records of a host on which connections come and go, as the kernel side makes them: always the same ones.

use std::collections::VecDeque;

use tcpstate_common::event::{
    AF_INET, AF_INET6, FLAG_DEAD, FLAG_DONE, FLAG_SOCKET_READ, FLAG_TASK, RCV_SHUTDOWN,
    SEND_SHUTDOWN, TIMEWAIT_BEGINS, TIMEWAIT_ENDS,
};
use tcpstate_common::{Accept, SetState, TcpState, TimeWait};
use tcpstate_user::model::view::{StateCounts, gauge_index};
use zerocopy::{FromZeros as _, IntoBytes as _};

pub struct Stream {
    bytes: Vec<u8>,
    /// Where each record ends in `bytes`.
    ends: Vec<usize>,
    pub transitions: u64,
    /// The sockets that are there at its end.
    pub left: StateCounts,
}

impl Stream {
    /// Of so many transitions, where so many sockets are open at a time, and a tenth as many more in TIME_WAIT or so.
    pub fn new(open: usize, transitions: u64) -> Self {
        let mut host = Host::new();
        while host.stream.transitions < transitions {
            host.step(open);
        }
        host.end()
    }

    pub fn records(&self) -> impl Iterator<Item = &[u8]> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins
            .zip(&self.ends)
            .map(|(from, &to)| &self.bytes[from..to])
    }
}

/// Xorshift: not 0, and not 0 after it.
pub const fn next(mut random: u64) -> u64 {
    random ^= random << 13;
    random ^= random >> 7;
    random ^ random << 17
}

const PROCESSES: u64 = 48;
const NAMES: u64 = 16;
const LISTENERS: u64 = 8;
const STEP_NS: u64 = 1_000_000;
const TIME_WAIT_NS: u64 = 60_000_000_000;

#[derive(Clone, Copy)]
struct Socket {
    cookie: u64,
    process: u64,
    state: TcpState,
}

struct Host {
    stream: Stream,
    random: u64,
    now_ns: u64,
    cookies: u64,
    open: Vec<Socket>,
    /// When each ends.
    timewait: VecDeque<(u64, Socket)>,
}

impl Host {
    fn new() -> Self {
        let mut host = Self {
            stream: Stream {
                bytes: Vec::new(),
                ends: Vec::new(),
                transitions: 0,
                left: StateCounts::default(),
            },
            random: 0x5eed,
            now_ns: 1,
            cookies: 0,
            open: Vec::new(),
            timewait: VecDeque::new(),
        };
        for process in 0..LISTENERS {
            let socket = host.socket(process, TcpState::CLOSE);
            host.set(socket, TcpState::LISTEN, FLAG_TASK, |_| {});
        }
        host
    }

    /// Something happens to one socket.
    fn step(&mut self, open: usize) {
        self.now_ns += STEP_NS;
        if let Some((_, ended)) = self
            .timewait
            .pop_front_if(|(ends_ns, _)| *ends_ns <= self.now_ns)
        {
            self.time_wait(ended, TIMEWAIT_ENDS, TcpState::CLOSE);
        }
        if self.open.len() < open {
            let process = self.below(PROCESSES);
            let opened = if process < LISTENERS {
                let child = self.socket(process, TcpState::LISTEN);
                self.set(child, TcpState::SYN_RECV, 0, |_| {})
            } else {
                let client = self.socket(process, TcpState::CLOSE);
                self.set(client, TcpState::SYN_SENT, FLAG_TASK, |event| {
                    event.local_port = 0;
                })
            };
            self.open.push(opened);
            return;
        }
        let at = self.below(self.open.len() as u64) as usize;
        let socket = self.open[at];
        match self.moved(socket) {
            Some(moved) => self.open[at] = moved,
            None => {
                self.open.swap_remove(at);
            }
        }
    }

    /// What becomes of it; `None` where it is gone, or in TIME_WAIT.
    fn moved(&mut self, socket: Socket) -> Option<Socket> {
        let choice = self.below(32);
        let read = |shutdown| move |event: &mut SetState| event.shutdown = shutdown;
        let fails = |errno: i32| move |event: &mut SetState| event.sk_err = errno;
        Some(match socket.state {
            TcpState::SYN_SENT if choice == 0 => {
                self.set(socket, TcpState::CLOSE, 0, fails(libc::ECONNREFUSED));
                return None;
            }
            TcpState::SYN_SENT => self.set(socket, TcpState::ESTABLISHED, 0, |_| {}),
            TcpState::SYN_RECV => {
                let established = self.set(socket, TcpState::ESTABLISHED, 0, |_| {});
                self.accept(socket);
                established
            }
            TcpState::ESTABLISHED => match choice {
                0 => {
                    self.set(socket, TcpState::CLOSE, 0, fails(libc::ECONNRESET));
                    return None;
                }
                1 => {
                    self.set(socket, TcpState::CLOSE, FLAG_TASK | FLAG_DEAD, |_| {});
                    return None;
                }
                2..17 => self.set(
                    socket,
                    TcpState::FIN_WAIT1,
                    FLAG_TASK,
                    read(SEND_SHUTDOWN | RCV_SHUTDOWN),
                ),
                _ => self.set(socket, TcpState::CLOSE_WAIT, FLAG_DONE, read(RCV_SHUTDOWN)),
            },
            TcpState::FIN_WAIT1 => self.set(socket, TcpState::FIN_WAIT2, FLAG_DEAD, |_| {}),
            TcpState::FIN_WAIT2 => {
                self.time_wait(socket, TIMEWAIT_BEGINS, TcpState::TIME_WAIT);
                self.set(socket, TcpState::CLOSE, FLAG_DEAD | FLAG_DONE, |_| {});
                let ends_ns = self.now_ns + TIME_WAIT_NS;
                self.timewait.push_back((ends_ns, socket));
                return None;
            }
            TcpState::CLOSE_WAIT => self.set(
                socket,
                TcpState::LAST_ACK,
                FLAG_TASK | FLAG_DONE,
                read(SEND_SHUTDOWN | RCV_SHUTDOWN),
            ),
            _ => {
                self.set(socket, TcpState::CLOSE, FLAG_DEAD | FLAG_DONE, |_| {});
                return None;
            }
        })
    }

    fn socket(&mut self, process: u64, state: TcpState) -> Socket {
        self.cookies += 1;
        Socket {
            cookie: self.cookies,
            process,
            state,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random = next(self.random);
        (self.random >> 16) % bound
    }

    fn push(&mut self, record: &[u8]) {
        self.stream.bytes.extend(record);
        self.stream.ends.push(self.stream.bytes.len());
    }

    /// A transition, told, and the socket after it.
    fn set(
        &mut self,
        socket: Socket,
        to: TcpState,
        flags: u8,
        more: impl FnOnce(&mut SetState),
    ) -> Socket {
        let Socket {
            cookie, process, ..
        } = socket;
        let listens = process < LISTENERS;
        // Every fourth is IPv6.
        let addr = |host: u64| {
            let host = host.to_be_bytes();
            let mut addr = [0; 16];
            if cookie % 4 == 0 {
                addr[0] = 0xfd;
            } else {
                addr[10..12].fill(0xff);
            }
            addr[12..].copy_from_slice(&host[4..]);
            addr
        };
        // Unique among those that are open at a time.
        let (near, far) = (addr(0x0a00_0001), addr(0x0b00_0000 + cookie / 0x8000));
        let port = 0x8000 + (cookie % 0x8000) as u16;
        let listener = 1000 + process as u16;
        let mut event = SetState {
            time_ns: self.now_ns,
            sk: 0xffff_8880_0000_0000 + cookie * 0x940,
            cookie,
            netns: 4_026_531_840 + (process % 4) as u32,
            uid: process as u32,
            local_addr: near,
            remote_addr: far,
            local_port: if listens { listener } else { port },
            remote_port: if listens { port } else { 443 },
            family: if cookie % 4 == 0 { AF_INET6 } else { AF_INET },
            from: socket.state.number(),
            to: to.number(),
            flags: flags | FLAG_SOCKET_READ,
            ..SetState::new_zeroed()
        };
        if to == TcpState::LISTEN {
            (event.remote_addr, event.remote_port) = ([0; 16], 0);
        }
        if flags & FLAG_TASK != 0 {
            event.tgid = pid(process);
            event.start_ns = process + 1;
            event.comm = comm(process);
        }
        more(&mut event);
        self.push(event.encode(&mut [0; SetState::LONGEST]));
        self.stream.transitions += 1;
        Socket {
            state: to,
            ..socket
        }
    }

    fn accept(&mut self, socket: Socket) {
        let accept = Accept {
            time_ns: self.now_ns,
            sk: 0,
            cookie: socket.cookie,
            start_ns: socket.process + 1,
            tgid: pid(socket.process),
            comm: comm(socket.process),
            ..Accept::new_zeroed()
        };
        self.push(accept.as_bytes());
    }

    fn time_wait(&mut self, socket: Socket, what: u8, state: TcpState) {
        let step = TimeWait {
            time_ns: self.now_ns,
            cookie: socket.cookie,
            what,
            state: state.number(),
            ..TimeWait::new_zeroed()
        };
        self.push(step.as_bytes());
    }

    fn end(mut self) -> Stream {
        let mut count = |state, sockets| {
            let at = gauge_index(state).expect("no socket is left in CLOSE");
            self.stream.left[at] += sockets;
        };
        count(TcpState::LISTEN, LISTENERS);
        count(TcpState::TIME_WAIT, self.timewait.len() as u64);
        for socket in &self.open {
            count(socket.state, 1);
        }
        self.stream
    }
}

const fn pid(process: u64) -> u32 {
    process as u32 + 1000
}

fn comm(process: u64) -> [u8; 16] {
    let mut comm = [0; 16];
    let name = format!("name-{}", process % NAMES);
    comm[..name.len()].copy_from_slice(name.as_bytes());
    comm
}
