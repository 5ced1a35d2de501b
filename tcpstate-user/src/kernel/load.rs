//! Loads and attaches the eBPF program that fits the kernel, and owns all of it: dropping the session detaches.

use std::{
    error::Error,
    fmt,
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd, BorrowedFd, RawFd},
};

use aya::{
    Btf, Ebpf, EbpfError, EbpfLoader,
    maps::{Array, Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{BtfTracePoint, ProgramError, TracePoint},
};
use tcpstate_common::{
    Event,
    config::{OFFSETS, SWITCHES, Switches},
    counters::LOST,
    event::BadRecord,
};
use zerocopy::IntoBytes as _;

use crate::model::{
    Named as _,
    view::{Feature, Program},
};

use super::{
    btf::{self, Layout},
    capability::{self, Attempt, StartError},
    info::{self, Block, Counters, ProgInfo, RunStats},
    optional,
    ring::{self, Drained, RingSize, WAKE_SHARE},
    snapshot::SocketIterator,
    tracepoint,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tcpstate-ebpf"));

/// How the program is attached; the kernel's age decides, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// `tp_btf` with the socket cookie. 5.12+, with BTF
    TpBtf,
    /// `tp_btf` where tracing programs can't ask for the cookie. 5.9+, with BTF
    TpBtfNoCookie,
    /// The classic tracepoint, whose record is all that is known. 5.8+, with tracefs
    Tracepoint,
}

impl Path {
    const fn name(self) -> &'static str {
        match self {
            Self::TpBtf => "tp_btf",
            Self::TpBtfNoCookie => "tp_btf_no_cookie",
            Self::Tracepoint => "tracepoint",
        }
    }

    /// The function in `tcpstate-ebpf`.
    const fn program(self) -> &'static str {
        match self {
            Self::TpBtf => "set_state",
            Self::TpBtfNoCookie => "set_state_no_cookie",
            Self::Tracepoint => "set_state_classic",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which network namespaces are traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netns {
    All,
    /// The one with this inode.
    Inode(u32),
}

#[derive(Clone, Debug)]
pub struct Options {
    pub netns: Netns,
    pub ring_size: RingSize,
    /// What the kernel is taken to lack.
    pub without: Vec<Feature>,
}

impl Options {
    /// # Errors
    /// It is not to be used.
    fn may_use(&self, feature: Feature) -> Result<(), String> {
        if self.without.contains(&feature) {
            return Err("tcpstate was told to do without".to_owned());
        }
        Ok(())
    }
}

/// A running trace. Nothing is pinned: with the session, or the process, all of it goes.
pub struct Session {
    path: Path,
    ring: RingBuf<MapData>,
    transitions: PerCpuArray<MapData, Block>,
    lost: Array<MapData, u64>,
    acks: Array<MapData, u32>,
    /// The programs and their links.
    ebpf: Ebpf,
    tp_btf: Result<(), String>,
    cookie: Result<(), String>,
    accept: Result<(), String>,
    sweep: Result<(), String>,
    time_wait: Result<(), String>,
    sockets: Result<SocketIterator, String>,
    #[cfg(feature = "ebpf-log")]
    log: aya_log::EbpfLogger<&'static dyn log::Log>,
}

impl Session {
    /// Loads and attaches. From its return on each transition is in the ring or counted as lost.
    ///
    /// # Errors
    /// [`StartError`]; nothing is attached then.
    pub fn start(options: &Options) -> Result<Self, StartError> {
        capability::lift_memlock();
        let candidates = if options.may_use(Feature::TpBtf).is_err() || !capability::has_btf() {
            &[Path::Tracepoint][..]
        } else if options.may_use(Feature::SocketCookie).is_err() {
            &[Path::TpBtfNoCookie][..]
        } else {
            &[Path::TpBtf, Path::TpBtfNoCookie]
        };
        let mut last_refusal = None;
        for &path in candidates {
            match Self::start_by(path, options) {
                // The verifier names a helper that it does not have no other way than it names a mistake.
                Err(error @ StartError::Verifier { .. }) => {
                    last_refusal = Some(error);
                }
                result => {
                    return result.map(|session| Self {
                        // Why a lesser way was taken.
                        cookie: last_refusal.map_or(session.cookie, |error| Err(error.to_string())),
                        ..session
                    });
                }
            }
        }
        Err(last_refusal.expect("there is a candidate, and it was refused"))
    }

    fn start_by(path: Path, options: &Options) -> Result<Self, StartError> {
        let ring_size = options.ring_size.bytes();
        let netns = match options.netns {
            Netns::All => 0,
            Netns::Inode(_) if path == Path::Tracepoint => return Err(StartError::NetnsUnknown),
            Netns::Inode(inode) => inode,
        };
        // Our own reading of BTF is over, and its memory free, before aya begins with its.
        let layout = match path {
            Path::TpBtf | Path::TpBtfNoCookie => btf::layout()?,
            Path::Tracepoint => {
                tracepoint::check()?;
                Layout::without_btf()
            }
        };
        let switches = Switches {
            netns,
            wake_bytes: ring_size / WAKE_SHARE,
        };

        let failed = |step| {
            move |error: &(dyn Error + 'static)| {
                Attempt {
                    step,
                    path,
                    ring_size,
                }
                .explain(error)
            }
        };
        let mut ebpf = EbpfLoader::new()
            .override_global(OFFSETS, layout.offsets.as_bytes(), true)
            .override_global(SWITCHES, switches.as_bytes(), true)
            .map_max_entries("RING", ring_size)
            .load(OBJECT)
            .map_err(|error| failed("create the maps")(&error))?;
        let btf = match path {
            Path::TpBtf | Path::TpBtfNoCookie => Some(
                Btf::from_sys_fs()
                    .map_err(EbpfError::from)
                    .map_err(|error| failed("read the kernel's BTF")(&error))?,
            ),
            Path::Tracepoint => None,
        };
        attach(&mut ebpf, path, btf.as_ref())
            .map_err(|error| failed("attach the program")(&error))?;
        let arguments = layout.accept_arguments;
        let accept = options
            .may_use(Feature::AcceptFexit)
            .and_then(|()| optional::attach_accept(&mut ebpf, path, btf.as_ref(), arguments));
        let time_wait = options
            .may_use(Feature::TimeWaitFentry)
            .and_then(|()| optional::attach_time_wait(&mut ebpf, path, btf.as_ref()));
        let sweep = options
            .may_use(Feature::TaskFileIter)
            .and_then(|()| optional::load_sweep(&mut ebpf, path, btf.as_ref()));
        let sockets = options
            .may_use(Feature::TcpIter)
            .and_then(|()| optional::load_sockets(&mut ebpf, path, btf.as_ref(), layout.list));
        let cookie = match path {
            Path::TpBtf | Path::TpBtfNoCookie => options.may_use(Feature::SocketCookie),
            Path::Tracepoint => Err("it needs BTF".to_owned()),
        };
        let tp_btf = match path {
            Path::TpBtf | Path::TpBtfNoCookie => Ok(()),
            Path::Tracepoint => options
                .may_use(Feature::TpBtf)
                .and_then(|()| Err("the kernel has no BTF".to_owned())),
        };
        drop(btf);
        let ring = take(&mut ebpf, "RING").map_err(|error| failed("map the ring")(&error))?;
        let opened = |error: MapError| failed("open the counters")(&error);
        let transitions = take(&mut ebpf, "COUNTERS").map_err(opened)?;
        let lost = take(&mut ebpf, LOST).map_err(opened)?;
        let acks = take(&mut ebpf, "ACKS").map_err(opened)?;
        #[cfg(feature = "ebpf-log")]
        let log = aya_log::EbpfLogger::init(&mut ebpf)
            .map_err(|error| failed("open the debug log")(&error))?;
        Ok(Self {
            path,
            ring,
            transitions,
            lost,
            acks,
            ebpf,
            tp_btf,
            cookie,
            accept,
            sweep,
            time_wait,
            sockets,
            #[cfg(feature = "ebpf-log")]
            log,
        })
    }

    #[must_use]
    pub const fn path(&self) -> Path {
        self.path
    }

    /// Whether each event carries the kernel's socket cookie (but for an accepted child's first one up to 6.12); else
    /// it is 0, or comes and goes as other programs ask the kernel for it, and is no identity.
    #[must_use]
    pub const fn cookies(&self) -> bool {
        matches!(self.path, Path::TpBtf)
    }

    /// Whether events tell who accepted a connection; else why not.
    ///
    /// # Errors
    /// The reason.
    pub fn accept(&self) -> Result<(), &str> {
        self.accept.as_ref().copied().map_err(String::as_str)
    }

    /// Whether events tell of timewait sockets; else why not.
    ///
    /// # Errors
    /// The reason.
    pub fn time_wait(&self) -> Result<(), &str> {
        self.time_wait.as_ref().copied().map_err(String::as_str)
    }

    /// Whether [`begin_sweep`](Self::begin_sweep) can be had; else why not.
    ///
    /// # Errors
    /// The reason.
    pub fn sweep(&self) -> Result<(), &str> {
        self.sweep.as_ref().copied().map_err(String::as_str)
    }

    /// To dump sockets with their addresses, where events have no cookie; else why it can't be had, or is not needed.
    ///
    /// # Errors
    /// The reason.
    pub fn sockets(&self) -> Result<&SocketIterator, &str> {
        self.sockets.as_ref().map_err(String::as_str)
    }

    /// What a kernel may lack: in use, or why not. Without what is not needed.
    pub fn features(&self) -> impl Iterator<Item = (Feature, Result<(), &str>)> {
        let needed = |feature: &Feature| *feature != Feature::TcpIter || !self.cookies();
        Feature::ALL.iter().copied().filter(needed).map(|feature| {
            let in_use = match feature {
                Feature::TpBtf => self.tp_btf.as_ref().copied().map_err(String::as_str),
                Feature::SocketCookie => self.cookie.as_ref().copied().map_err(String::as_str),
                Feature::AcceptFexit => self.accept(),
                Feature::TimeWaitFentry => self.time_wait(),
                Feature::TaskFileIter => self.sweep(),
                Feature::TcpIter => self.sockets().map(drop),
            };
            (feature, in_use)
        })
    }

    /// A file of [`Holder`](tcpstate_common::Holder)s: every process that has a descriptor of a TCP socket in the
    /// selected namespaces, as often as it has one. Reading it is the work, and may be done by another thread.
    ///
    /// `acks`: whether each socket's last one is told, as for no other sweep that is still read.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn begin_sweep(&mut self, acks: bool) -> io::Result<File> {
        self.acks
            .set(0, u32::from(acks), 0)
            .map_err(io::Error::other)?;
        optional::begin_sweep(&mut self.ebpf)
    }

    /// Hands the waiting records to `sink`, at most `budget` of them.
    pub fn drain(&mut self, sink: impl FnMut(Result<Event, BadRecord>), budget: usize) -> Drained {
        #[cfg(feature = "ebpf-log")]
        self.log.flush();
        ring::drain(&mut self.ring, sink, budget)
    }

    /// # Errors
    /// Where the kernel does not give them.
    pub fn counters(&self) -> io::Result<Counters> {
        info::counters(&self.transitions, &self.lost).map_err(io::Error::other)
    }

    /// Records for which the ring had no room; cheaper than all counters.
    ///
    /// # Errors
    /// Where the kernel does not give it.
    pub fn lost(&self) -> io::Result<u64> {
        self.lost.get(&0, 0).map_err(io::Error::other)
    }

    /// What the kernel did not show the programs, since they were running already on that CPU; `None` where the kernel
    /// does not count it (before 5.12).
    ///
    /// # Errors
    /// Where the kernel does not give it.
    pub fn recursion_misses(&self) -> io::Result<Option<u64>> {
        let mut sum = Some(0);
        for (_, fd) in self.loaded() {
            let missed = ProgInfo::of(fd)?.recursion_misses();
            sum = sum.zip(missed).map(|(sum, missed)| sum + missed);
        }
        Ok(sum)
    }

    /// Time spent in the programs that are loaded; empty where the kernel's BPF statistics are off.
    ///
    /// # Errors
    /// Where the kernel does not give them.
    pub fn run_stats(&self) -> io::Result<Vec<RunStats>> {
        let mut all: Vec<RunStats> = Vec::new();
        if !info::stats_enabled() {
            return Ok(all);
        }
        for (function, fd) in self.loaded() {
            let ProgInfo {
                run_time_ns,
                run_count,
                ..
            } = ProgInfo::of(fd)?;
            let unnamed =
                || io::Error::other(format!("nobody says what program {function} is for"));
            let program = Program::of(function).ok_or_else(unnamed)?;
            match all.iter_mut().find(|known| known.program == program) {
                Some(known) => {
                    known.run_time_ns += run_time_ns;
                    known.run_count += run_count;
                }
                None => all.push(RunStats {
                    program,
                    run_time_ns,
                    run_count,
                }),
            }
        }
        all.sort_unstable_by_key(|stats| stats.program as usize);
        Ok(all)
    }

    /// With the names of their functions in `tcpstate-ebpf`.
    fn loaded(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        let programs = self.ebpf.programs();
        // The others are not loaded.
        programs.filter_map(|(function, program)| Some((function, program.fd().ok()?.as_fd())))
    }
}

/// The ring's: readable when the kernel woke the reader.
impl AsRawFd for Session {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// `btf`: the kernel's; none for the classic tracepoint.
fn attach(ebpf: &mut Ebpf, path: Path, btf: Option<&Btf>) -> Result<(), EbpfError> {
    let program = ebpf
        .program_mut(path.program())
        .ok_or(ProgramError::UnexpectedProgramType)?;
    match btf {
        Some(btf) => {
            let program: &mut BtfTracePoint = program.try_into()?;
            program.load(tracepoint::NAME, btf)?;
            program.attach()?;
        }
        None => {
            let program: &mut TracePoint = program.try_into()?;
            program.load()?;
            program.attach(tracepoint::CATEGORY, tracepoint::NAME)?;
        }
    }
    Ok(())
}

fn take<M: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &str) -> Result<M, MapError> {
    let map = ebpf.take_map(name).ok_or_else(|| MapError::InvalidName {
        name: name.to_owned(),
    })?;
    M::try_from(map)
}
