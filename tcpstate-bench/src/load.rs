//! The load: loopback connections, made and ended as fast as one thread on one processor can, or at a rate. It counts what
//! it made, and so what every tool must have been told.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, Shutdown, SocketFlags, SocketType, ipproto, sockopt};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::ground;

/// Connections between two looks at the clock.
const BATCH: u64 = 16;

/// Waking up takes about as long; what is slept too long is made up for by the next connections.
const SHORTEST_SLEEP: Duration = Duration::from_micros(100);

pub const NO_SIX: &str = "this host has no IPv6";

/// Is told a client's port.
pub type Closing<'a> = &'a mut (dyn FnMut(u16) + Send);

/// How a connection ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// The client resets it: CLOSE, SYN_SENT, ESTABLISHED, CLOSE, and LISTEN, SYN_RECV, ESTABLISHED, CLOSE.
    Reset,
    /// The client closes, then the server: by FIN_WAIT1 and FIN_WAIT2 there, CLOSE_WAIT and LAST_ACK here.
    Full,
}

impl Close {
    /// Of both ends.
    pub const fn transitions(self) -> u64 {
        match self {
            Self::Reset => 6,
            Self::Full => 10,
        }
    }
}

/// One kind of load.
#[derive(Clone, Copy)]
pub struct Load {
    pub name: &'static str,
    pub close: Close,
    /// Whether each second connection is one of IPv6, or each.
    pub six: Six,
    /// Each on a processor of its own.
    pub threads: usize,
    /// In all, a second; else as fast as it goes.
    pub rate: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Six {
    None,
    Half,
    All,
}

/// What a load made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Made {
    pub connections: u64,
    pub transitions: u64,
    pub seconds: f64,
    /// Of processors, taken by the threads that made them, and by the kernel for them.
    pub worked: f64,
}

impl Made {
    pub fn rate(self) -> f64 {
        self.connections as f64 / self.seconds
    }

    /// Connections for each second of work: what it takes a thread, however often it has to wait for its processor.
    pub fn rate_of_work(self) -> f64 {
        self.connections as f64 / self.worked
    }
}

/// A socket; dropping it closes it.
pub struct Tcp(OwnedFd);

impl Tcp {
    fn new(ip: IpAddr) -> Result<Self, Errno> {
        let family = match ip {
            IpAddr::V4(_) => AddressFamily::INET,
            IpAddr::V6(_) => AddressFamily::INET6,
        };
        let (stream, tcp) = (SocketType::STREAM, Some(ipproto::TCP));
        rustix::net::socket_with(family, stream, SocketFlags::CLOEXEC, tcp).map(Self)
    }

    fn listening(ip: IpAddr) -> Result<Self, Errno> {
        let socket = Self::new(ip)?;
        rustix::net::bind(&socket.0, &SocketAddr::new(ip, 0))?;
        rustix::net::listen(&socket.0, 64)?;
        Ok(socket)
    }

    fn local(&self) -> Result<SocketAddr, Errno> {
        rustix::net::getsockname(&self.0)?.try_into()
    }

    /// Waits for the end of the connection, by FIN or reset.
    fn wait_for_end(&self) -> Result<(), Errno> {
        match rustix::net::recv(&self.0, &mut [0; 1][..], RecvFlags::empty()) {
            Ok(_) | Err(Errno::CONNRESET) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Somebody to connect to.
pub struct Listener {
    socket: Tcp,
    pub address: SocketAddr,
}

impl Listener {
    pub fn new(ip: IpAddr) -> Result<Self> {
        let socket = Tcp::listening(ip).context("can't listen")?;
        let address = socket.local().context("a listener without an address")?;
        Ok(Self { socket, address })
    }

    /// Both ends of a new connection.
    pub fn pair(&self) -> Result<(Tcp, Tcp), Errno> {
        let client = Tcp::new(self.address.ip())?;
        rustix::net::connect(&client.0, &self.address)?;
        let server = rustix::net::accept_with(&self.socket.0, SocketFlags::CLOEXEC)?;
        Ok((client, Tcp(server)))
    }

    /// Makes a connection and ends it. `closing` is called before its client closes it, if it takes its port.
    pub fn connection(&self, close: Close, closing: Option<Closing<'_>>) -> Result<(), Errno> {
        let (client, server) = self.pair()?;
        if let Some(closing) = closing {
            closing(client.local()?.port());
        }
        match close {
            Close::Reset => {
                sockopt::set_socket_linger(&client.0, Some(Duration::ZERO))?;
                drop(client);
                // A server that closes before the reset came would go by FIN_WAIT1.
                server.wait_for_end()
            }
            Close::Full => {
                rustix::net::shutdown(&client.0, Shutdown::Write)?;
                server.wait_for_end()?;
                drop(server);
                client.wait_for_end()
            }
        }
    }
}

/// The listeners of all loads. They stay, so that their ports tell which lines are of a load.
pub struct Loads {
    /// For each thread its processor, and a listener of each family that this host has.
    threads: Vec<(usize, Listener, Option<Listener>)>,
    pub ports: Vec<u16>,
}

impl Loads {
    pub fn new() -> Result<Self> {
        let thread = |cpu| {
            let four = Listener::new(Ipv4Addr::LOCALHOST.into())?;
            Ok((cpu, four, Listener::new(Ipv6Addr::LOCALHOST.into()).ok()))
        };
        // The last processors first: interrupts mostly go to the first.
        let processors = ground::processors()?.into_iter().rev();
        let threads: Vec<_> = processors.map(thread).collect::<Result<_>>()?;
        let listeners = threads
            .iter()
            .flat_map(|(_, four, six)| [Some(four), six.as_ref()]);
        let ports = listeners
            .flatten()
            .map(|listener| listener.address.port())
            .collect();
        Ok(Self { threads, ports })
    }

    /// As many as there are processors.
    pub fn most_threads(&self) -> usize {
        self.threads.len()
    }

    pub fn has(&self, port: u16) -> bool {
        self.ports.contains(&port)
    }

    /// Whether this host has what the load needs.
    pub fn can(&self, load: &Load) -> bool {
        let mut threads = self.threads.iter();
        load.six == Six::None || threads.all(|(_, _, six)| six.is_some())
    }

    pub fn run(&self, load: &Load, time: Duration) -> Result<Made> {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..load.threads)
                .map(|number| scope.spawn(move || self.work(load, number, time, None)))
                .collect();
            let mut all = Made::default();
            for worker in workers {
                let made = joined(worker.join())?;
                all.connections += made.connections;
                all.transitions += made.transitions;
                all.seconds = all.seconds.max(made.seconds);
                all.worked += made.worked;
            }
            Ok(all)
        })
    }

    /// By one thread; `closing` is told the client's port just before it closes.
    pub fn run_telling(&self, load: &Load, time: Duration, closing: Closing<'_>) -> Result<Made> {
        assert_eq!(load.threads, 1, "one thread tells");
        thread::scope(|scope| {
            let worker = scope.spawn(|| self.work(load, 0, time, Some(closing)));
            joined(worker.join())
        })
    }

    fn work(
        &self,
        load: &Load,
        number: usize,
        time: Duration,
        mut closing: Option<Closing<'_>>,
    ) -> Result<Made> {
        let (processor, four, six) = &self.threads[number];
        let mut cpu = CpuSet::new();
        cpu.set(*processor);
        sched_setaffinity(None, &cpu).context("can't pin a thread")?;
        let share = load.rate.map(|rate| rate as f64 / load.threads as f64);
        let (begun, before) = (Instant::now(), worked()?);
        let mut connections = 0;
        while begun.elapsed() < time {
            for _ in 0..BATCH {
                let listener = match load.six {
                    Six::None => four,
                    Six::Half if connections % 2 == 0 => four,
                    Six::Half | Six::All => six.as_ref().context(NO_SIX)?,
                };
                let closing = closing
                    .as_mut()
                    .map(|closing| &mut **closing as Closing<'_>);
                let made = listener.connection(load.close, closing);
                made.with_context(|| format!("connection {connections} of {}", load.name))?;
                connections += 1;
                if share.is_some() {
                    break;
                }
            }
            if let Some(rate) = share {
                let due = begun + Duration::from_secs_f64(connections as f64 / rate);
                let left = due.saturating_duration_since(Instant::now());
                if left > SHORTEST_SLEEP {
                    thread::sleep(left);
                }
            }
        }
        Ok(Made {
            connections,
            transitions: connections * load.close.transitions(),
            seconds: begun.elapsed().as_secs_f64(),
            worked: (worked()? - before).as_secs_f64(),
        })
    }
}

/// By this thread.
fn worked() -> Result<Duration> {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).context("a thread's time is negative")
}

fn joined<T>(result: thread::Result<Result<T>>) -> Result<T> {
    result.map_err(|_| anyhow!("a thread of the load failed"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_ipv6_runs_the_other_loads() {
        let four = Listener::new(Ipv4Addr::LOCALHOST.into()).unwrap();
        let loads = Loads {
            ports: vec![four.address.port()],
            threads: vec![(0, four, None)],
        };
        let load = |six| Load {
            name: "a load",
            close: Close::Reset,
            six,
            threads: 1,
            rate: None,
        };
        let can = [Six::None, Six::Half, Six::All].map(|six| loads.can(&load(six)));
        assert_eq!(can, [true, false, false]);
        assert!(loads.has(loads.ports[0]));
    }
}
