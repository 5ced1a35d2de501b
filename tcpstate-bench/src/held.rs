//! Many sockets that stay open, held by processes of our own: one alone may not have as many descriptors everywhere. Also
//! what such a process does, by the hidden command `hold`.

use std::fs;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::net::Ipv4Addr;
use std::process::{ChildStdin, ChildStdout, Command};

use anyhow::{Context, Result, bail};

use crate::ground;
use crate::load::{Close, Listener, Tcp};
use crate::process::Process;

/// Of a process, beside its sockets.
const OTHERS: u64 = 64;
/// Each listener's clients have ports of their own.
const LARGEST: u64 = 20_000;
/// Connections that come and go under each name.
const UNDER_A_NAME: u64 = 16;

/// Sockets that are open as long as it is there.
#[derive(Default)]
pub struct Held {
    holders: Vec<Holder>,
    connections: u64,
}

pub struct Holder {
    _process: Process,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    /// How many connections it can still hold.
    room: u64,
}

impl Held {
    /// Two for each connection.
    pub const fn sockets(&self) -> u64 {
        2 * self.connections
    }

    /// Opens more, until there are so many.
    pub fn grow_to(&mut self, sockets: u64) -> Result<()> {
        while self.sockets() < sockets {
            if self.holders.last().is_none_or(|holder| holder.room == 0) {
                self.holders.push(Holder::start()?);
            }
            let wanted = (sockets - self.sockets()) / 2;
            let holder = self.holders.last_mut().context("one was just started")?;
            let more = wanted.clamp(1, holder.room);
            holder.ask(&format!("open {more}"))?;
            holder.room -= more;
            self.connections += more;
        }
        Ok(())
    }
}

impl Holder {
    pub fn start() -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        let (process, input, output) = Process::talking(command.arg("hold"))?;
        let descriptors = ground::descriptors().min(LARGEST);
        let room = descriptors.saturating_sub(OTHERS) / 2;
        if room == 0 {
            bail!("a process may have {descriptors} descriptors here: too few to hold connections");
        }
        Ok(Self {
            _process: process,
            input,
            output: BufReader::new(output).lines(),
            room,
        })
    }

    /// Has connections made and ended by a process with as many names, one after the other.
    pub fn under_names(&mut self, names: u64) -> Result<()> {
        self.ask(&format!("names {names}"))
    }

    fn ask(&mut self, what: &str) -> Result<()> {
        writeln!(self.input, "{what}")?;
        match self.output.next() {
            Some(Ok(answer)) if answer == "done" => Ok(()),
            _ => bail!("a process that was to {what} failed"),
        }
    }
}

/// Does what the lines of stdin say, until they end.
pub fn hold() -> Result<()> {
    ground::descriptors();
    let listener = Listener::new(Ipv4Addr::LOCALHOST.into())?;
    let mut kept: Vec<(Tcp, Tcp)> = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let (what, number) = line.split_once(' ').context("a line without a number")?;
        let number: u64 = number.parse()?;
        match what {
            "open" => {
                for _ in 0..number {
                    let pair = listener.pair();
                    kept.push(pair.with_context(|| format!("after {} connections", kept.len()))?);
                }
            }
            "names" => {
                for name in 0..number {
                    // The process', which is the main thread's: that is this one.
                    fs::write("/proc/self/comm", format!("bench {name}"))?;
                    for close in [Close::Reset, Close::Full] {
                        for _ in 0..UNDER_A_NAME {
                            listener.connection(close, None)?;
                        }
                    }
                    kept.push(listener.pair()?);
                }
            }
            other => bail!("nobody knows how to {other}"),
        }
        println!("done");
    }
    Ok(())
}
