//! What the tests do to the kernel with its own system calls, so that they run from an initramfs that has no
//! other program: network namespaces, interfaces, sysctls, mounts, ending sockets.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use rustix::process::{
    Pid, Resource, Rlimit, WaitId, WaitIdOptions, WaitIdStatus, getrlimit, setrlimit, waitid,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves the calling thread into a network namespace of its own, with loopback up, and gives its inode.
pub fn new_namespace() -> io::Result<u32> {
    // SAFETY: a thread alone may have another network namespace; no descriptors are unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    // Our addresses are valid at once; there is nobody who could have them too.
    for interface in ["all", "default"] {
        set_sysctl(&format!("net/ipv6/conf/{interface}/accept_dad"), "0")?;
    }
    set_up("lo", true)?;
    Ok(rustix::fs::stat("/proc/thread-self/ns/net")?.st_ino as u32)
}

/// Moves the calling thread into a mount namespace of its own.
pub fn own_mounts() -> io::Result<()> {
    // SAFETY: this thread gets its own idea of the root and current folders; it changes neither.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", private)?)
}

/// Puts an empty folder with that mode in the place of the folder; in a mount namespace of one's own.
pub fn hide(folder: &str, mode: &CStr) -> io::Result<()> {
    Ok(mount("tmpfs", folder, "tmpfs", MountFlags::empty(), mode)?)
}

/// Has tracefs in sight of the calling thread, in a mount namespace of its own if it must.
pub fn mount_tracefs() -> io::Result<()> {
    let target = "/sys/kernel/tracing";
    if fs::exists(format!("{target}/events"))? {
        return Ok(());
    }
    own_mounts()?;
    mount("tracefs", target, "tracefs", MountFlags::empty(), None)?;
    Ok(())
}

/// Of the calling thread's network namespace.
pub fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/{name}"), value)
        .map_err(|error| io::Error::new(error.kind(), format!("sysctl {name}: {error}")))
}

pub fn set_up(interface: &str, up: bool) -> io::Result<()> {
    let mut request = interface_request(interface);
    if up {
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    }
    interface_ioctl(AddressFamily::INET, libc::SIOCSIFFLAGS, &request)
}

/// Waits until sockets can have it: an IPv6 address waits for its link, and for work that the kernel puts off.
pub fn wait_for_address(address: IpAddr) -> io::Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match UdpSocket::bind((address, 0)) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > end => {
                let text = format!("{address} does not become valid: {error}");
                return Err(io::Error::new(error.kind(), text));
            }
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// With a prefix of 24 bits, or 64; valid once the link is there.
pub fn add_address(interface: &str, address: IpAddr) -> io::Result<()> {
    match address {
        IpAddr::V4(v4) => {
            let mut request = interface_request(interface);
            request.ifr_ifru.ifru_addr = sockaddr(v4);
            interface_ioctl(AddressFamily::INET, libc::SIOCSIFADDR, &request)?;
            request.ifr_ifru.ifru_netmask = sockaddr(Ipv4Addr::new(255, 255, 255, 0));
            interface_ioctl(AddressFamily::INET, libc::SIOCSIFNETMASK, &request)
        }
        IpAddr::V6(v6) => {
            /// `struct in6_ifreq`.
            #[repr(C)]
            struct Request {
                address: [u8; 16],
                prefix: u32,
                index: i32,
            }
            let socket = socket(AddressFamily::INET6, SocketType::DGRAM)?;
            let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
            let request = Request {
                address: v6.octets(),
                prefix: 64,
                index: index as i32,
            };
            // SAFETY: on an AF_INET6 socket SIOCSIFADDR takes a pointer to an `in6_ifreq`, which lives through
            // the call.
            check(unsafe {
                libc::ioctl(
                    socket.as_raw_fd(),
                    libc::SIOCSIFADDR as libc::Ioctl,
                    &request,
                )
            })
        }
    }
}

fn sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    data[2..6].copy_from_slice(&address.octets().map(|octet| octet as libc::c_char));
    libc::sockaddr {
        sa_family: libc::AF_INET as u16,
        sa_data: data,
    }
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is integers and arrays, for which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn interface_ioctl(
    family: AddressFamily,
    number: libc::c_ulong,
    request: &libc::ifreq,
) -> io::Result<()> {
    let socket = socket(family, SocketType::DGRAM)?;
    // SAFETY: the requests used here take a pointer to an `ifreq`, which lives through the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), number as libc::Ioctl, request) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn socket(family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        family,
        kind,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// An interface with these addresses behind which nobody answers, as long as the file is open.
pub fn silent_network(addresses: &[IpAddr]) -> io::Result<File> {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;
    let mut request = interface_request("silent");
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF takes a pointer to an `ifreq`, which lives through the call.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &request) })?;
    set_up("silent", true)?;
    for &address in addresses {
        add_address("silent", address)?;
        wait_for_address(address)?;
    }
    Ok(tun)
}

/// A thread in another network namespace that is wired to the one of the thread that made it.
pub struct Neighbor {
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Neighbor {
    /// Here the interface is `wire0` with `ours`, there `wire1` with `theirs`; one address of each family.
    pub fn new(ours: [IpAddr; 2], theirs: [IpAddr; 2]) -> io::Result<Self> {
        let (jobs, todo) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, there) = mpsc::channel();
        thread::spawn(move || {
            let namespace = new_namespace().and_then(|_| File::open("/proc/thread-self/ns/net"));
            if ready.send(namespace).is_ok() {
                todo.into_iter().for_each(|job| job());
            }
        });
        let namespace = there.recv().map_err(io::Error::other)??;
        add_wire("wire0", "wire1", namespace.as_fd())?;
        let neighbor = Self { jobs };
        neighbor.run(move || {
            set_up("wire1", true)?;
            theirs.iter().try_for_each(|&ip| add_address("wire1", ip))
        })?;
        set_up("wire0", true)?;
        ours.iter().try_for_each(|&ip| add_address("wire0", ip))?;
        ours.into_iter().try_for_each(wait_for_address)?;
        neighbor.run(move || theirs.into_iter().try_for_each(wait_for_address))?;
        neighbor.run(move || ours.into_iter().try_for_each(reach))?;
        Ok(neighbor)
    }

    /// Runs it there, and waits.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || {
            let _ = done.send(job());
        });
        self.jobs.send(job).expect("the neighbor is there");
        result.recv().expect("the job did not panic")
    }
}

/// Waits until packets get there and back: a new link drops some at first, and a SYN that is lost costs seconds.
fn reach(address: IpAddr) -> io::Result<()> {
    match TcpStream::connect((address, 9)) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other(format!("{address} port 9 is taken"))),
    }
}

/// A veth pair, the second of which lives in `namespace`.
fn add_wire(name: &str, peer: &str, namespace: BorrowedFd<'_>) -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_NET_NS_FD: u16 = 28;
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_INFO_DATA: u16 = 2;
    const VETH_INFO_PEER: u16 = 1;
    /// `struct ifinfomsg`.
    const NO_INTERFACE: [u8; 16] = [0; 16];

    let fd = namespace.as_raw_fd().to_ne_bytes();
    let peer = [
        &NO_INTERFACE[..],
        &attribute(IFLA_IFNAME, &[peer.as_bytes(), b"\0"].concat()),
        &attribute(IFLA_NET_NS_FD, &fd),
    ]
    .concat();
    let info = [
        attribute(IFLA_INFO_KIND, b"veth"),
        attribute(IFLA_INFO_DATA, &attribute(VETH_INFO_PEER, &peer)),
    ]
    .concat();
    let message = [
        &NO_INTERFACE[..],
        &attribute(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat()),
        &attribute(IFLA_LINKINFO, &info),
    ]
    .concat();
    let create = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    // Protocol 0 is NETLINK_ROUTE.
    netlink_request(None, RTM_NEWLINK, create, &message)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// What `ss -K` does: ends a socket of the calling thread's namespace. A listener has no remote end.
pub fn destroy(local: SocketAddr, remote: Option<SocketAddr>) -> io::Result<()> {
    const SOCK_DESTROY: u16 = 21;
    const IPPROTO_TCP: u8 = 6;
    let end = |address: SocketAddr| {
        let mut bytes = [0; 16];
        match address.ip() {
            IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => bytes = v6.octets(),
        }
        (address.port().to_be_bytes(), bytes)
    };
    let (local_port, local_addr) = end(local);
    let (remote_port, remote_addr) = remote.map_or(([0; 2], [0; 16]), end);
    let family = if local.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    // struct inet_diag_req_v2; no cookie is all ones (INET_DIAG_NOCOOKIE).
    let message = [
        &[family as u8, IPPROTO_TCP, 0, 0][..],
        &u32::MAX.to_ne_bytes(),
        &local_port,
        &remote_port,
        &local_addr,
        &remote_addr,
        &[0; 4],
        &[0xff; 8],
    ]
    .concat();
    netlink_request(Some(netlink::SOCK_DIAG), SOCK_DESTROY, 0, &message)
}

/// Sends one request and waits for the kernel's word on it.
fn netlink_request(
    protocol: Option<rustix::net::Protocol>,
    kind: u16,
    flags: u16,
    payload: &[u8],
) -> io::Result<()> {
    const NLMSG_ERROR: u16 = 2;
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        protocol,
    )?;
    rustix::net::connect(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
    let flags = flags | (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let message = [
        &((16 + payload.len()) as u32).to_ne_bytes()[..],
        &kind.to_ne_bytes(),
        &flags.to_ne_bytes(),
        &[0; 8],
        payload,
    ]
    .concat();
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0_u8; 8192];
    let (_, len) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    if len < 20 || kind != NLMSG_ERROR {
        return Err(io::Error::other(format!("an answer of kind {kind}")));
    }
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// A forked process of ours that does nothing but `work`, with no descriptors but `keep`; killed at the end.
pub struct Fork {
    pub pid: u32,
}

impl Fork {
    /// `work` runs where any lock may be held by a thread that is not there: it may only make system calls.
    pub fn new(keep: &[BorrowedFd<'_>], work: impl FnOnce()) -> io::Result<Self> {
        let mut keep: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).collect();
        keep.sort_unstable();
        // SAFETY: the child makes system calls only, until it ends without running anybody's destructors.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // The other tests' sockets would live on in this process.
                let mut first = 3;
                for fd in keep {
                    close_range(first, fd.wrapping_sub(1));
                    first = fd + 1;
                }
                close_range(first, u32::MAX);
                // What fails here must not go on as a copy of the test.
                let worked = catch_unwind(AssertUnwindSafe(work));
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(worked.is_err().into()) }
            }
            pid => Ok(Self { pid: pid as u32 }),
        }
    }

    /// How it ended; `None` while it lives.
    pub fn ended(&self) -> Option<WaitIdStatus> {
        let pid = Pid::from_raw(self.pid as i32).expect("a child's pid");
        // It is waited for when it is dropped.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(pid), look).expect("our child")
    }
}

/// Kills it; afterwards its descriptors are closed.
impl Drop for Fork {
    fn drop(&mut self) {
        // SAFETY: no memory is involved; the pid is that of our child, which nobody else waits for.
        unsafe { libc::kill(self.pid as i32, libc::SIGKILL) };
        // SAFETY: without a place for the status nothing is written.
        unsafe { libc::waitpid(self.pid as i32, std::ptr::null_mut(), 0) };
    }
}

fn close_range(first: u32, last: u32) {
    if first <= last {
        // SAFETY: in a forked child, whose descriptors are nobody's but its own.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Both ends close at exec; the first is for reading.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: there is room for the two descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: the two are new and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

pub const fn v6(last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last))
}

/// As many files as may be, which is more than the thousand of many a shell.
pub fn allow_descriptors() {
    const ENOUGH: u64 = 1 << 13;
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.map(|most| most.max(ENOUGH));
    let raised = Rlimit {
        current: most,
        maximum: most,
    };
    setrlimit(Resource::Nofile, raised).expect("a limit of 8,192 files");
}

/// What threads of a scope wait for is there also when the scope's body panics.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
