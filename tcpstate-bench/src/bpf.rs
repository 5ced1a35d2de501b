//! What the kernel says of eBPF programs, and the floor: a program that does nothing, on the tracepoint that is measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use anyhow::{Context, Result};
use aya::programs::{BtfTracePoint, loaded_programs};
use aya::sys::{Stats, enable_stats};
use aya::{Btf, Ebpf, EbpfLoader};
use object::write::{Object, Symbol, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
};

const TRACEPOINT: &str = "inet_sock_set_state";
const NAME: &str = "floor";

/// `r0 = 0; exit`.
const INSTRUCTIONS: [u8; 16] = [
    0xb7, 0, 0, 0, 0, 0, 0, 0, //
    0x95, 0, 0, 0, 0, 0, 0, 0,
];

/// The empty program, attached as long as it is there.
pub struct Floor(Ebpf);

impl Floor {
    pub fn attach() -> Result<Self> {
        let object = object_file().context("can't write the empty program")?;
        let mut ebpf = EbpfLoader::new()
            .load(&object)
            .context("can't load the empty program")?;
        let btf = Btf::from_sys_fs().context("the empty program needs the kernel's BTF")?;
        let program: &mut BtfTracePoint = ebpf
            .program_mut(NAME)
            .context("the empty program is not in its object")?
            .try_into()?;
        program
            .load(TRACEPOINT, &btf)
            .context("the kernel does not take the empty program")?;
        program.attach().context("can't attach the empty program")?;
        Ok(Self(ebpf))
    }

    /// The number of the program.
    pub fn programs(&self) -> Result<BTreeSet<u32>> {
        let program = self.0.program(NAME).context("the program is there")?;
        let program: &BtfTracePoint = program.try_into()?;
        Ok([program.info()?.id()].into())
    }
}

/// By hand: a tool chain for eBPF is more than two instructions need.
fn object_file() -> object::write::Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let license = object.add_section(Vec::new(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    let name = format!("tp_btf/{TRACEPOINT}").into_bytes();
    let section = object.add_section(Vec::new(), name, SectionKind::Text);
    let value = object.append_section_data(section, &INSTRUCTIONS, 8);
    object.add_symbol(Symbol {
        name: NAME.into(),
        value,
        size: INSTRUCTIONS.len() as u64,
        kind: SymbolKind::Text,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    object.write()
}

/// The kernel's statistics of programs, on as long as it is there, and however we end.
pub struct Measuring {
    _on: OwnedFd,
}

impl Measuring {
    pub fn begin() -> Result<Self> {
        let on = enable_stats(Stats::RunTime).context("the kernel has no BPF statistics")?;
        Ok(Self { _on: on })
    }
}

/// What programs did while it was measured: of each, by number, the time in ns, and how often it ran.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Runs(BTreeMap<u32, [u64; 2]>);

impl Runs {
    pub fn of(programs: &BTreeSet<u32>) -> Result<Self> {
        let mut runs = BTreeMap::new();
        for program in loaded_programs() {
            // One that is just being unloaded is not ours.
            let Ok(program) = program else { continue };
            if !programs.contains(&program.id()) {
                continue;
            }
            let fd = program.fd()?;
            let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            let info = fs::read_to_string(&path)?;
            let number =
                |name| number_in(&info, name).with_context(|| format!("{path}: no {name}"));
            runs.insert(program.id(), [number("run_time_ns")?, number("run_cnt")?]);
        }
        Ok(Self(runs))
    }

    pub fn since(mut self, before: &Self) -> Self {
        for (program, [time, count]) in &mut self.0 {
            let [time_before, count_before] = before.0.get(program).copied().unwrap_or_default();
            *time = time.saturating_sub(time_before);
            *count = count.saturating_sub(count_before);
        }
        self
    }

    /// Of all together.
    pub fn time_ns(&self) -> u64 {
        self.0.values().map(|[time, _]| time).sum()
    }

    /// Of the one that ran most often: it is that on the tracepoint.
    pub fn most(&self) -> u64 {
        self.0.values().map(|&[_, count]| count).max().unwrap_or(0)
    }
}

/// The programs that a process has, itself or by links.
pub fn programs_of(pid: u32) -> Result<BTreeSet<u32>> {
    let folder = format!("/proc/{pid}/fdinfo");
    let mut programs = BTreeSet::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("can't read {folder}"))? {
        // A descriptor may have been closed meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        programs.extend(number_in(&info, "prog_id").and_then(|id| u32::try_from(id).ok()));
    }
    Ok(programs)
}

fn number_in(fdinfo: &str, name: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key == name).then(|| value.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: &str =
        "pos:\t0\nprog_type:\t26\nprog_id:\t77\nrun_time_ns:\t5900\nrun_cnt:\t100\n";

    #[test]
    fn runs_are_those_since_then() {
        let before = Runs([(1, [100, 10])].into());
        let runs = Runs([(1, [400, 40]), (2, [50, 3])].into()).since(&before);
        assert_eq!((runs.time_ns(), runs.most()), (350, 30));
        assert_eq!(Runs::default().most(), 0);
    }

    #[test]
    fn figures_are_read_from_descriptors() {
        assert_eq!(number_in(PROGRAM, "prog_id"), Some(77));
        assert_eq!(number_in(PROGRAM, "run_time_ns"), Some(5900));
        assert_eq!(number_in("pos:\t0\n", "prog_id"), None);
    }

    #[test]
    fn the_empty_program_is_an_object_that_aya_reads() {
        let object = object_file().unwrap();
        let sections = [&b"license"[..], b"tp_btf/inet_sock_set_state", b"floor"];
        for name in sections {
            assert!(object.windows(name.len()).any(|it| it == name));
        }
        assert!(object.windows(16).any(|it| it == INSTRUCTIONS));
    }
}
