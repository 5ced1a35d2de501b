//! The host's network namespaces: finding them, and entering one.
//!
//! What is done inside them is the caller's. A namespace is found by the main thread of a process that is in
//! it, or by a bind mount of it (`ip netns add`, container runtimes) in our mount namespace. One that is held
//! only by another thread, an open descriptor or a socket is not found.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error(
        "no network namespace {inode} found on this host; `lsns -t net` lists them{}",
        .unreadable.as_ref().map(|reason| format!(" (not readable: {reason})")).unwrap_or_default()
    )]
    NotFound {
        inode: u32,
        /// What could not be searched.
        unreadable: Option<String>,
    },
    #[error(
        "all network namespaces need CAP_SYS_ADMIN, which is missing; `--netns self` traces only this one"
    )]
    AllNeedsSysAdmin,
    #[error("can't {what}: {source}")]
    Io {
        what: &'static str,
        source: io::Error,
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
    /// Processes and mounts whose namespace could not be read (another's process needs CAP_SYS_PTRACE): how
    /// many, and the first with the reason.
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

/// Every namespace of the host that can be found.
///
/// # Errors
/// [`NetnsError::AllNeedsSysAdmin`] without the right to enter them; or `/proc` can't be read.
pub fn all() -> Result<Found, NetnsError> {
    let sys_admin = caps::has_cap(
        None,
        caps::CapSet::Effective,
        caps::Capability::CAP_SYS_ADMIN,
    )
    .map_err(|error| NetnsError::Io {
        what: "read the capabilities of this thread",
        source: io::Error::other(error),
    })?;
    if !sys_admin {
        return Err(NetnsError::AllNeedsSysAdmin);
    }
    search(|_| true)
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
            more => format!("{more} namespaces, the first: {first}"),
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
    let proc = fs::read_dir("/proc").map_err(|source| NetnsError::Io {
        what: "list the processes in /proc",
        source,
    })?;
    for entry in proc {
        let entry = entry.map_err(|source| NetnsError::Io {
            what: "list the processes in /proc",
            source,
        })?;
        let name = entry.file_name();
        if name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            paths.push(entry.path().join("ns/net"));
        }
    }
    let mounts = fs::read("/proc/self/mountinfo").map_err(|source| NetnsError::Io {
        what: "read /proc/self/mountinfo",
        source,
    })?;
    paths.extend(mounted(&mounts));
    Ok(paths)
}

/// Mount points of network namespaces in a `/proc/PID/mountinfo`.
fn mounted(mountinfo: &[u8]) -> Vec<PathBuf> {
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

    use super::{NetnsError, all, find, mounted, own};

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
    fn all_of_them_need_a_capability_that_the_error_names() {
        std::thread::spawn(|| {
            caps::drop(
                None,
                caps::CapSet::Effective,
                caps::Capability::CAP_SYS_ADMIN,
            )
            .expect("dropping is always allowed");
            let error = all().expect_err("without the capability");
            assert!(matches!(error, NetnsError::AllNeedsSysAdmin));
            assert!(error.to_string().contains("--netns self"), "{error}");
        })
        .join()
        .expect("no panic");
    }
}
