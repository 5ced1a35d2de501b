//! The programs that a kernel may lack or refuse: behind accept, on timewait sockets, and the iterators over all
//! descriptors and all sockets. Without them some of the truth comes later, or takes longer; nothing fails.

use std::{error::Error, fs::File, io, os::fd::AsFd as _};

use aya::{
    Btf, Ebpf,
    programs::{FEntry, FExit, Iter, ProgramError, fentry::FEntryLinkId},
};

use super::{capability::in_short, load::Path, snapshot::SocketIterator};

const ACCEPT: &str = "inet_csk_accept";
const SWEEP: &str = "sweep";
const SOCKETS: &str = "sockets";

/// Each with the function that it is attached to.
const TIME_WAIT: [(&str, &str); 3] = [
    ("time_wait_begins", "tcp_time_wait"),
    ("time_wait_set_again", "__inet_twsk_schedule"),
    ("time_wait_ends", "tcp_twsk_destructor"),
];

/// `arguments`: how many the function has.
///
/// # Errors
/// Why not, in a few words.
pub(super) fn attach_accept(
    ebpf: &mut Ebpf,
    path: Path,
    btf: Option<&Btf>,
    arguments: Option<usize>,
) -> Result<(), String> {
    let name = match (path, arguments) {
        (Path::TpBtf, Some(2)) => "accept_of_two",
        (Path::TpBtf, Some(4)) => "accept_of_four",
        (Path::TpBtfNoCookie, Some(4)) => "accept_no_cookie",
        (Path::TpBtf | Path::TpBtfNoCookie, Some(other)) => {
            return Err(format!("{ACCEPT} has {other} arguments in this kernel"));
        }
        (Path::TpBtf | Path::TpBtfNoCookie, None) => {
            return Err(format!("this kernel has no function {ACCEPT}"));
        }
        (Path::Tracepoint, _) => return Err("it needs BTF".to_owned()),
    };
    let mut attach = || {
        let btf = btf.ok_or(ProgramError::UnexpectedProgramType)?;
        let program = ebpf.program_mut(name);
        let program: &mut FExit = program
            .ok_or(ProgramError::UnexpectedProgramType)?
            .try_into()?;
        program.load(ACCEPT, btf)?;
        program.attach()?;
        Ok(())
    };
    short(attach())
}

/// All of [`TIME_WAIT`], or none: without the end of a stay its beginning is of little use.
///
/// # Errors
/// Why not, in a few words.
pub(super) fn attach_time_wait(
    ebpf: &mut Ebpf,
    path: Path,
    btf: Option<&Btf>,
) -> Result<(), String> {
    match path {
        Path::TpBtf => {}
        Path::TpBtfNoCookie => return Err("it needs the socket cookie (5.12)".to_owned()),
        Path::Tracepoint => return Err("it needs BTF".to_owned()),
    }
    let mut attached: Vec<(&str, FEntryLinkId)> = Vec::new();
    let mut attach = || {
        let btf = btf.ok_or(ProgramError::UnexpectedProgramType)?;
        for (name, function) in TIME_WAIT {
            let program = time_wait_program(ebpf, name)?;
            program.load(function, btf)?;
            attached.push((name, program.attach()?));
        }
        Ok(())
    };
    let result = short(attach());
    if result.is_err() {
        for (name, link) in attached {
            // What can't be detached goes with the session; its records do no harm.
            let _ = time_wait_program(ebpf, name).and_then(|program| program.detach(link));
        }
    }
    result
}

fn time_wait_program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut FEntry, ProgramError> {
    let program = ebpf.program_mut(name);
    program
        .ok_or(ProgramError::UnexpectedProgramType)?
        .try_into()
}

/// # Errors
/// Why not, in a few words.
pub(super) fn load_sweep(ebpf: &mut Ebpf, path: Path, btf: Option<&Btf>) -> Result<(), String> {
    match path {
        Path::TpBtf => {}
        Path::TpBtfNoCookie => return Err("it needs the socket cookie (5.12)".to_owned()),
        Path::Tracepoint => return Err("it needs BTF".to_owned()),
    }
    let mut load = || {
        let btf = btf.ok_or(ProgramError::UnexpectedProgramType)?;
        sweep_program(ebpf)?.load("task_file", btf)
    };
    short(load())
}

/// # Errors
/// The kernel's refusal; or it was not loaded.
pub(super) fn begin_sweep(ebpf: &mut Ebpf) -> io::Result<File> {
    let mut begin = || -> Result<File, Box<dyn Error + Send + Sync>> {
        let program = sweep_program(ebpf)?;
        // The file takes the link with it: each sweep has one of its own.
        let link = program.attach()?;
        Ok(program.take_link(link)?.into_file()?)
    };
    begin().map_err(io::Error::other)
}

/// `offsets`: whether the program has those that only it needs.
///
/// # Errors
/// Why not, in a few words.
pub(super) fn load_sockets(
    ebpf: &mut Ebpf,
    path: Path,
    btf: Option<&Btf>,
    offsets: Result<(), String>,
) -> Result<SocketIterator, String> {
    match path {
        // From 5.15 the kernel locks each socket for the iterator. A process keeps that lock while its call waits for memory
        // (of a file on a server that is gone, userfaultfd), and nothing ends the iterator's wait.
        Path::TpBtf => return Err("sockets have cookies".to_owned()),
        Path::TpBtfNoCookie => {}
        Path::Tracepoint => return Err("it needs BTF".to_owned()),
    }
    offsets?;
    let mut load = || {
        let btf = btf.ok_or(ProgramError::UnexpectedProgramType)?;
        let program = ebpf.program_mut(SOCKETS);
        let program: &mut Iter = program
            .ok_or(ProgramError::UnexpectedProgramType)?
            .try_into()?;
        program.load("tcp", btf)?;
        SocketIterator::new(program.fd()?.as_fd()).map_err(ProgramError::IOError)
    };
    short(load())
}

fn sweep_program(ebpf: &mut Ebpf) -> Result<&mut Iter, ProgramError> {
    let program = ebpf.program_mut(SWEEP);
    program
        .ok_or(ProgramError::UnexpectedProgramType)?
        .try_into()
}

fn short<T>(result: Result<T, ProgramError>) -> Result<T, String> {
    result.map_err(|error| in_short(&error))
}
