//! A program that is measured: started, looked at from outside, and ended. It does not outlive us, however we end.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, kill_process, pidfd_open, set_parent_process_death_signal,
};
use serde::{Deserialize, Serialize};

/// Until a program that stands still counts as done: it may look for work only now and then.
const QUIET: Duration = Duration::from_millis(150);
/// Of a processor, within that time: what a daemon that has nothing to do takes.
const IDLE: Duration = Duration::from_millis(3);
/// What a tool has not told by then is missing.
const CATCH_UP: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Process {
    name: String,
    child: Child,
}

/// Resident, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Its own.
    pub anonymous: u64,
    /// Of files, as of the program itself.
    pub file: u64,
    /// Shared, as with the kernel.
    pub shared: u64,
    /// Of these the maps of eBPF programs: a ring, each page of which is mapped twice.
    #[serde(default)]
    pub ring: Option<u64>,
}

impl Memory {
    pub const fn resident(self) -> u64 {
        self.anonymous + self.file + self.shared
    }
}

impl Process {
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        // SAFETY: the function makes one system call, between fork and exec, and touches no memory of other threads.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("can't start {name}"))?;
        Ok(Self { name, child })
    }

    /// With pipes for its input and output.
    pub fn talking(command: &mut Command) -> Result<(Self, ChildStdin, ChildStdout)> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't start {name}"))?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let process = Self { name, child };
        Ok((process, input.expect("piped"), output.expect("piped")))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn take_output(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// # Errors
    /// It has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}", self.name);
        }
        Ok(())
    }

    /// User and system time of all its threads, also of those that have ended.
    pub fn cpu(&self) -> Result<Duration> {
        let mut clock = 0;
        // SAFETY: it writes the number of a clock to the place that is ours.
        let found = unsafe { libc::clock_getcpuclockid(self.pid() as i32, &raw mut clock) };
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: it writes a time to the place that is ours.
        if found != 0 || unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
            bail!("{} has no clock any more", self.name);
        }
        Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }

    pub fn memory(&self) -> Result<Memory> {
        let mappings = fs::read_to_string(format!("/proc/{}/smaps", self.pid()));
        Ok(Memory {
            ring: mappings.ok().map(|mappings| ring_of(&mappings)),
            ..self.memory_but_ring()?
        })
    }

    /// Which is told without a look at each page, and so can be asked often.
    pub fn memory_but_ring(&self) -> Result<Memory> {
        let path = format!("/proc/{}/status", self.pid());
        let status = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
        memory_of(&status).with_context(|| format!("{path} tells no memory"))
    }

    /// Waits until it has caught up with what it was told, if it does so soon: where others keep it busy, it does not.
    pub fn settle(&mut self) -> Result<()> {
        let over = Instant::now() + CATCH_UP;
        while Instant::now() < over {
            let before = self.cpu()?;
            thread::sleep(QUIET);
            if self.cpu()? - before < IDLE {
                break;
            }
            self.check()?;
        }
        Ok(())
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// It failed, or does not end; it is killed then.
    pub fn done(mut self) -> Result<()> {
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        let patience = Timespec::try_from(PATIENCE)?;
        if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience))? == 0 {
            bail!("{} does not end in {} s", self.name, PATIENCE.as_secs());
        }
        let status = self.child.wait()?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }

    /// Asks it to end, as by Ctrl-C, and waits.
    ///
    /// # Errors
    /// It does not end; it is killed then.
    pub fn end(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::INT)?;
        let over = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > over {
                bail!("{} does not end by SIGINT", self.name);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn memory_of(status: &str) -> Option<Memory> {
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kilobytes * 1024)
    };
    Some(Memory {
        anonymous: bytes("RssAnon:")?,
        file: bytes("RssFile:")?,
        shared: bytes("RssShmem:")?,
        ring: None,
    })
}

/// Resident of those mappings that are an eBPF map's.
fn ring_of(smaps: &str) -> u64 {
    let (mut is_map, mut kilobytes) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if is_map => {
                kilobytes += words
                    .next()
                    .and_then(|number| number.parse().ok())
                    .unwrap_or(0);
            }
            Some(name) if name.ends_with(':') => {}
            // Where a mapping begins.
            _ => is_map = line.ends_with("anon_inode:bpf-map"),
        }
    }
    kilobytes * 1024
}

/// Time that children of ours took which have ended and been waited for, in ticks of the kernel's: for programs that are
/// started again and again.
pub fn time_of_children() -> io::Result<Duration> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let ticks = ticks_of_children(&stat).ok_or(io::ErrorKind::InvalidData)?;
    let second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64(ticks as f64 / second as f64))
}

fn ticks_of_children(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(13);
    let [user, system] = [fields.next()?, fields.next()?].map(|field| field.parse::<u64>());
    Some(user.ok()? + system.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_where_it_is_told() {
        let status = "Name:\tx\nVmRSS:\t 900 kB\nRssAnon:\t     100 kB\nRssFile:\t 700 kB\nRssShmem:\t 100 kB\n";
        let memory = memory_of(status).unwrap();
        assert_eq!(memory.anonymous, 100 * 1024);
        assert_eq!(memory.file, 700 * 1024);
        assert_eq!(memory.shared, 100 * 1024);
        // A kernel thread has none.
        assert_eq!(memory_of("Name:\tkthreadd\n"), None);
    }

    #[test]
    fn the_ring_is_told_apart() {
        let smaps = "7f00-7f10 rw-s 00000000 00:0e 1046   anon_inode:bpf-map\nSize: 4 kB\nRss:  4 kB\nPss:  4 kB\n\
                     7f10-7f20 r--s 00001000 00:0e 1046   anon_inode:bpf-map\nRss:  8196 kB\nVmFlags: rd sh\n\
                     7f20-7f30 rw-p 00000000 00:00 0\nRss:   900 kB\n";
        assert_eq!(ring_of(smaps), 8200 * 1024);
    }

    #[test]
    fn ticks_are_those_of_children() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194304 1 2 3 4 500 600 70 8 20 0 1 0 99 1 1\n";
        assert_eq!(ticks_of_children(stat), Some(78));
        assert_eq!(ticks_of_children("7 (a) S 1"), None);
    }

    #[test]
    fn who_ends_by_itself_is_waited_for() {
        let shell = |what: &str| Process::start(Command::new("sh").args(["-c", what])).unwrap();
        shell("exit 0").done().unwrap();
        assert!(shell("exit 3").done().is_err());
    }

    #[test]
    fn time_is_that_of_the_process() {
        let endless = ["-c", "while :; do :; done"];
        let process = Process::start(Command::new("sh").args(endless)).unwrap();
        let over = Instant::now() + PATIENCE;
        while process.cpu().unwrap() < Duration::from_millis(1) {
            assert!(Instant::now() < over, "it takes no time");
        }
        // How much it is at first the kernel does not tell: it counts pages in batches.
        process.memory().unwrap();
    }
}
