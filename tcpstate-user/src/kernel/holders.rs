//! The programs that tell who holds a socket, which a kernel may lack: the one behind accept, and the iterator over all
//! descriptors. Without them owners come later, or from `/proc`; nothing fails.

use std::{error::Error, fs::File, io};

use aya::{
    Btf, Ebpf,
    programs::{FExit, Iter, ProgramError},
};

use super::{capability::in_short, load::Path};

const ACCEPT: &str = "inet_csk_accept";
const SWEEP: &str = "sweep";

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

fn sweep_program(ebpf: &mut Ebpf) -> Result<&mut Iter, ProgramError> {
    let program = ebpf.program_mut(SWEEP);
    program
        .ok_or(ProgramError::UnexpectedProgramType)?
        .try_into()
}

fn short(result: Result<(), ProgramError>) -> Result<(), String> {
    result.map_err(|error| in_short(&error))
}
