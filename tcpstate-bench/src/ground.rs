//! Where it is measured: a network namespace of our own, tracefs in sight, and what machine this is.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use rustix::thread::{CpuSet, UnshareFlags, sched_getaffinity, unshare_unsafe};

use crate::figures::Machine;

/// Moves this thread, and all that it will start, into namespaces of their own.
pub fn enter() -> Result<()> {
    if !geteuid().is_root() {
        bail!("not root: loading eBPF and making a network namespace need it");
    }
    // SAFETY: no other thread runs yet; namespaces hold nothing that this program keeps pointers to.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("can't make a mount namespace")?;
    see_tracefs();
    network()
}

/// Moves this thread, and all that it will start, into a network where nothing is left of earlier loads.
pub fn network() -> Result<()> {
    // SAFETY: a network namespace holds no memory, and no descriptor of ours goes with the old one.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.context("can't make a network namespace")?;
    loopback_up().context("can't set up loopback")?;
    // Both are of this namespace alone. Ports for connections a minute long, and no end of TIME_WAIT.
    for (name, value) in [
        ("ip_local_port_range", "10000 64999"),
        ("tcp_max_tw_buckets", "5000"),
    ] {
        fs::write(format!("/proc/sys/net/ipv4/{name}"), value)
            .with_context(|| format!("can't set net.ipv4.{name} to {value}"))?;
    }
    Ok(())
}

/// The classic tracepoints of the peers are found there; older bpftrace looks below debugfs. A peer that needs what this host
/// has not says so itself.
fn see_tracefs() {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    if let Err(error) = mount_change("/", private) {
        eprintln!("nothing is mounted, for mounts can't be made private: {error}");
        return;
    }
    for (kind, target, witness) in [
        ("tracefs", "/sys/kernel/tracing", "events"),
        ("debugfs", "/sys/kernel/debug", "tracing/events"),
    ] {
        if Path::new(target).join(witness).exists() {
            continue;
        }
        if let Err(error) = mount(kind, target, kind, MountFlags::empty(), None) {
            eprintln!("{kind} can't be mounted at {target}: {error}");
        }
    }
}

/// Sets IFF_UP on interface 1, by netlink.
fn loopback_up() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const UP: u32 = libc::IFF_UP as u32;
    const LOOPBACK: u32 = 1;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    // struct nlmsghdr, then struct ifinfomsg.
    let request = [
        &32_u32.to_ne_bytes()[..],
        &RTM_NEWLINK.to_ne_bytes(),
        &flags.to_ne_bytes(),
        &[0; 8],
        &[0; 4],
        &LOOPBACK.to_ne_bytes(),
        &UP.to_ne_bytes(),
        &UP.to_ne_bytes(),
    ]
    .concat();
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::connect(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
    rustix::net::send(&socket, &request, SendFlags::empty())?;
    let mut answer = [0; 256];
    rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty())?;
    // struct nlmsgerr follows the header; 0 is the acknowledgement.
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Raises the limit of files as far as it goes, and tells how many a process may have.
pub fn descriptors() -> u64 {
    const ENOUGH: u64 = 200_000;
    let limit = getrlimit(Resource::Nofile);
    let allowed = limit.maximum.unwrap_or(ENOUGH);
    for most in [allowed.max(ENOUGH), allowed] {
        let raised = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        // Without CAP_SYS_RESOURCE the hard limit is as far as it goes.
        if setrlimit(Resource::Nofile, raised).is_ok() {
            return most;
        }
    }
    limit.current.unwrap_or(ENOUGH)
}

/// Those that this process may use.
pub fn processors() -> Result<Vec<usize>> {
    let may = sched_getaffinity(None).context("can't tell the processors")?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|&cpu| may.is_set(cpu))
        .collect())
}

pub fn load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// Without the load at the end, which is not yet known.
pub fn machine() -> Result<Machine> {
    let read = |path: &str| Some(fs::read_to_string(path).ok()?.trim().to_owned());
    let cpus = read("/proc/cpuinfo").unwrap_or_default();
    let of_cpu = |name: &str| {
        let line = cpus.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    Ok(Machine {
        kernel: read("/proc/sys/kernel/osrelease"),
        processors: processors()?.len(),
        model: of_cpu("model name"),
        hypervisor: of_cpu("flags").map(|flags| flags.split(' ').any(|it| it == "hypervisor")),
        clocksource: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        jit: read("/proc/sys/net/core/bpf_jit_enable"),
        spectre_v2: read("/sys/devices/system/cpu/vulnerabilities/spectre_v2"),
        load_before: load(),
        load_after: None,
    })
}
