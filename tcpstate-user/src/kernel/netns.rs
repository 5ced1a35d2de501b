//! The host's network namespaces: finding them, and entering one.
//!
//! What is done inside them is the caller's. A namespace is found by the main thread of a process that is in
//! it, by a bind mount of it (`ip netns add`, container runtimes) in our mount namespace, or by another thread
//! of a process that is known to own a socket there. One that only descriptors or sockets hold is not found: to
//! ask a socket for its namespace (SIOCGSKNS) we would have to share it (`pidfd_getfd`), and where its process
//! closes it just then, the close is ours, with all that it waits for (SO_LINGER).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::thread;

use rustc_hash::FxHashSet;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::capability;

/// Threads that are looked at in one search at most, each some microseconds' work: a process that leads nowhere may
/// have any number.
const MOST_THREADS: usize = 10_000;

/// A network namespace, by inode, and a process that owns a socket in it, by its pid in ours.
pub type Lead = (u32, u32);

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error(
        "no network namespace {inode} found on this host; `lsns -t net` lists them{}",
        .unreadable.as_ref().map(|reason| {
            format!("; processes that could not be looked at, which CAP_SYS_PTRACE allows: {reason}")
        }).unwrap_or_default()
    )]
    NotFound {
        inode: u32,
        /// What could not be searched.
        unreadable: Option<String>,
    },
    #[error("can't trace network namespace {inode}: {error}; `--netns self` traces only this one")]
    Enter { inode: u32, error: io::Error },
    #[error(
        "no right to trace all network namespaces: {0} missing; run as root, or give the program these capabilities; \
         `--netns self`, which is only this one, takes neither CAP_SYS_ADMIN nor CAP_SYS_PTRACE"
    )]
    Capabilities(String),
    #[error("can't {what}: {error}")]
    Io {
        what: &'static str,
        error: io::Error,
    },
}

/// A network namespace, kept alive by an open descriptor.
#[derive(Debug)]
pub struct Namespace {
    inode: u32,
    file: File,
}

/// What a search found.
#[derive(Debug)]
pub struct Found {
    /// By inode, each once.
    pub namespaces: Vec<Namespace>,
    /// Processes and mounts whose namespace could not be read: how many, and the first with the reason.
    pub unreadable: Option<String>,
}

impl Namespace {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = inode_of(&rustix::fs::fstat(&file)?)?;
        Ok(Self { inode, file })
    }

    #[must_use]
    pub const fn inode(&self) -> u32 {
        self.inode
    }

    /// Moves the calling thread into the namespace; nothing to do, and nothing needed, if it is there already.
    ///
    /// Call it on a thread of your own that ends with its work: never on a runtime's worker, which would take
    /// other work along.
    ///
    /// # Errors
    /// The kernel's refusal; `setns` needs CAP_SYS_ADMIN.
    pub fn enter(&self) -> io::Result<()> {
        if own()? == self.inode {
            return Ok(());
        }
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(
            |errno| match errno {
                Errno::PERM => io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "entering it needs CAP_SYS_ADMIN, which is missing",
                ),
                _ => errno.into(),
            },
        )
    }
}

/// Inode of the calling thread's namespace.
///
/// # Errors
/// Where `/proc` is missing.
pub fn own() -> io::Result<u32> {
    inode_of(&rustix::fs::stat("/proc/thread-self/ns/net")?)
}

/// Moves the calling thread into a new namespace of its own, with loopback up, and gives its inode. It ends with the
/// thread and those that it starts.
///
/// # Errors
/// The kernel's refusal; it needs CAP_SYS_ADMIN. The thread is where it was then, unless loopback can't be had.
pub fn enter_new() -> io::Result<u32> {
    // SAFETY: a thread alone may have another network namespace; no descriptors are unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    // SAFETY: `ifreq` is integers and arrays, for which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l', b'o'].map(|byte| byte as libc::c_char));
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: SIOCSIFFLAGS takes a pointer to an `ifreq`, which lives through the call.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as libc::Ioctl,
            &raw const request,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    own()
}

fn inode_of(stat: &rustix::fs::Stat) -> io::Result<u32> {
    // Namespaces are numbered by `unsigned int inum` (struct ns_common).
    u32::try_from(stat.st_ino).map_err(|_| io::Error::other("not a namespace"))
}

/// Every namespace of the host that can be found, also by `leads`.
///
/// # Errors
/// [`NetnsError::Capabilities`] without the right to find and enter them: all that are missing to trace there; or
/// `/proc` can't be read.
pub fn all(leads: &FxHashSet<Lead>) -> Result<Found, NetnsError> {
    if let Some(missing) = capability::missing_for_all_namespaces() {
        return Err(NetnsError::Capabilities(missing));
    }
    let mut found = search(|_| true)?;
    found.follow(leads);
    Ok(found)
}

/// The namespace with this inode.
///
/// # Errors
/// [`NetnsError::NotFound`]; or `/proc` can't be read.
pub fn find(inode: u32) -> Result<Namespace, NetnsError> {
    let mut found = search(|candidate| candidate == inode)?;
    found.namespaces.pop().ok_or(NetnsError::NotFound {
        inode,
        unreadable: found.unreadable,
    })
}

/// As [`find`], and it can be entered.
///
/// # Errors
/// As [`find`], and [`NetnsError::Enter`].
pub fn check(inode: u32) -> Result<(), NetnsError> {
    let namespace = find(inode)?;
    let entered = thread::Builder::new().spawn(move || namespace.enter());
    entered
        .and_then(|thread| thread.join().unwrap_or(Err(io::ErrorKind::Other.into())))
        .map_err(|error| NetnsError::Enter { inode, error })
}

impl Found {
    /// Adds namespaces that only threads of these processes are in.
    fn follow(&mut self, leads: &FxHashSet<Lead>) {
        let mut wanted: BTreeMap<u32, FxHashSet<u32>> = BTreeMap::new();
        for &(inode, pid) in leads {
            if !self.namespaces.iter().any(|found| found.inode == inode) {
                wanted.entry(pid).or_default().insert(inode);
            }
        }
        let threads = wanted.iter().flat_map(|(pid, inodes)| {
            let threads = fs::read_dir(format!("/proc/{pid}/task"));
            // It may have ended since it was seen to own a socket.
            let threads = threads.into_iter().flatten().flatten();
            threads.map(move |thread| (thread.path().join("ns/net"), inodes))
        });
        let mut added = FxHashSet::default();
        for (path, inodes) in threads.take(MOST_THREADS) {
            let is_news = |inode: &u32| inodes.contains(inode) && !added.contains(inode);
            let inode = rustix::fs::stat(&path)
                .ok()
                .and_then(|stat| inode_of(&stat).ok());
            if inode.as_ref().is_some_and(is_news)
                && let Ok(namespace) = Namespace::open(&path)
                && is_news(&namespace.inode)
            {
                added.insert(namespace.inode);
                self.namespaces.push(namespace);
            }
        }
    }
}

fn search(wanted: impl Fn(u32) -> bool) -> Result<Found, NetnsError> {
    let mut namespaces = BTreeMap::new();
    let mut failed = 0_usize;
    let mut first = None;
    for path in candidates()? {
        // Looking before opening: most processes share one namespace.
        let opened = rustix::fs::stat(&path)
            .map_err(io::Error::from)
            .and_then(|stat| inode_of(&stat))
            .and_then(|inode| {
                if namespaces.contains_key(&inode) || !wanted(inode) {
                    return Ok(None);
                }
                Namespace::open(&path).map(Some)
            });
        match opened {
            Ok(Some(namespace)) if wanted(namespace.inode) => {
                namespaces.entry(namespace.inode).or_insert(namespace);
            }
            Ok(_) => {}
            Err(error) if vanished(&error) => {}
            Err(error) => {
                failed += 1;
                first.get_or_insert_with(|| format!("{}: {error}", path.display()));
            }
        }
    }
    Ok(Found {
        namespaces: namespaces.into_values().collect(),
        unreadable: first.map(|first| match failed {
            1 => first,
            more => format!("{more} of them, the first {first}"),
        }),
    })
}

/// The process ended, or the mount went, since it was listed; or a zombie, which is in no namespace any more.
fn vanished(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::SRCH))
}

fn candidates() -> Result<Vec<PathBuf>, NetnsError> {
    let mut paths = vec![PathBuf::from("/proc/thread-self/ns/net")];
    let proc = fs::read_dir("/proc").map_err(|error| NetnsError::Io {
        what: "list the processes in /proc",
        error,
    })?;
    for entry in proc {
        let entry = entry.map_err(|error| NetnsError::Io {
            what: "list the processes in /proc",
            error,
        })?;
        let name = entry.file_name();
        if name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            paths.push(entry.path().join("ns/net"));
        }
    }
    let mounts = fs::read("/proc/self/mountinfo").map_err(|error| NetnsError::Io {
        what: "read /proc/self/mountinfo",
        error,
    })?;
    paths.extend(mounted(&mounts));
    Ok(paths)
}

/// Mount points of network namespaces in a `/proc/PID/mountinfo`.
pub(super) fn mounted(mountinfo: &[u8]) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStringExt as _;
    mountinfo
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b' ').skip(3);
            let (root, mount_point) = (fields.next()?, fields.next()?);
            // Optional fields end with a lone `-`; the file system's type follows.
            let fstype = fields.skip_while(|field| field != b"-").nth(1)?;
            (fstype == b"nsfs" && root.starts_with(b"net:["))
                .then(|| PathBuf::from(std::ffi::OsString::from_vec(unescape(mount_point))))
        })
        .collect()
}

/// Undoes the kernel's `mangle_path`: space, tab, newline and backslash are written as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        rest = tail;
        match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if *first == b'\\' => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => plain.push(*first),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{FxHashSet, NetnsError, all, find, mounted, own};

    #[test]
    fn mounts_of_network_namespaces_are_found_among_others() {
        let mountinfo = b"\
22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:4 net:[4026532291] /run/netns/blue rw shared:7 master:2 - nsfs nsfs rw
31 22 0:4 mnt:[4026532292] /run/snapd/ns/lxd.mnt rw - nsfs nsfs rw
32 22 0:4 net:[4026532293] /run/netns/a\\040b\\134c rw - nsfs nsfs rw
33 22 0:4 net:[1] /not/nsfs rw - tmpfs nsfs rw
34 22
";
        assert_eq!(
            mounted(mountinfo),
            [
                PathBuf::from("/run/netns/blue"),
                PathBuf::from("/run/netns/a b\\c")
            ]
        );
    }

    #[test]
    fn our_own_namespace_is_found_and_needs_no_move() {
        let inode = own().expect("/proc");
        let found = find(inode).expect("ours");
        assert_eq!(found.inode(), inode);
        found.enter().expect("we are there");
    }

    #[test]
    fn a_namespace_that_is_not_there_is_an_error_that_says_how_to_list_them() {
        let message = find(1).expect_err("inode 1 is no namespace").to_string();
        assert!(
            message
                .starts_with("no network namespace 1 found on this host; `lsns -t net` lists them"),
            "{message}"
        );
    }

    #[test]
    fn all_of_them_need_capabilities_that_the_error_names() {
        let without = |lacking: &'static [caps::Capability]| {
            let refused = std::thread::spawn(move || {
                for &capability in lacking {
                    caps::drop(None, caps::CapSet::Effective, capability).expect("allowed");
                }
                all(&FxHashSet::default())
            });
            refused.join().expect("no panic").map(drop)
        };
        for (lacking, named) in [
            (&[caps::Capability::CAP_SYS_ADMIN][..], "CAP_SYS_ADMIN"),
            (&[caps::Capability::CAP_SYS_PTRACE], "CAP_SYS_PTRACE"),
            (
                &[
                    caps::Capability::CAP_SYS_ADMIN,
                    caps::Capability::CAP_SYS_PTRACE,
                ],
                "CAP_SYS_ADMIN and CAP_SYS_PTRACE",
            ),
        ] {
            let error = without(lacking).expect_err("without the capability");
            assert!(matches!(error, NetnsError::Capabilities(_)));
            let error = error.to_string();
            assert!(error.contains(&format!("{named} missing;")), "{error}");
            assert!(error.contains("--netns self"), "{error}");
        }
    }
}
