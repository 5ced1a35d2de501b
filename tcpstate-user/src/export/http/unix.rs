//! The daemon's Unix socket as a file: who may use it, whose it is when it exists already, and its end.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;

use super::serve::BACKLOG;

/// Where the daemon serves, and its clients look, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/tcpstate/tcpstate.sock";

/// Whoever is in it may watch without privileges of their own.
const GROUP: &str = "tcpstate";
const MODE: Mode = Mode::from_raw_mode(0o660);
const DIR_MODE: u32 = 0o755;

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(
        "socket {} is served by another tcpstate daemon; stop it, or choose another path with --socket",
        .0.display()
    )]
    Served(PathBuf),
    #[error("{} exists and is no socket; remove it, or choose another path with --socket", .0.display())]
    NotASocket(PathBuf),
    #[error("socket path {} is too long; expected 107 bytes at most", .0.display())]
    TooLong(PathBuf),
    #[error("no folder for the socket {}; create it, or choose another path with --socket", .0.display())]
    NoFolder(PathBuf),
    #[error(
        "no right to make the socket {}: its folder must be writable; run as root, or choose another path with --socket",
        .0.display()
    )]
    Denied(PathBuf),
    #[error("can't serve the socket {}: {error}; another path can be chosen with --socket", .path.display())]
    Io { path: PathBuf, error: io::Error },
}

impl BindError {
    fn of(path: &Path, error: io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied(path),
            _ => Self::Io { path, error },
        }
    }
}

/// A bound socket; its file goes when this goes.
pub struct UnixSocket {
    listener: UnixListener,
    file: SocketFile,
}

impl UnixSocket {
    /// Takes the place of a socket that nobody serves. Must be called within a runtime.
    ///
    /// # Errors
    /// The path is another's, or can't be used.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |error| BindError::of(path, error);
        let addr = SocketAddrUnix::new(path).map_err(|errno| match errno {
            Errno::NAMETOOLONG => BindError::TooLong(path.to_owned()),
            errno => failed(errno.into()),
        })?;
        if path == Path::new(DEFAULT_SOCKET)
            && let Some(folder) = path.parent()
            && !folder.exists()
        {
            fs::create_dir_all(folder).map_err(failed)?;
            // Whatever the umask: members of the group must get to the socket.
            let mode = fs::Permissions::from_mode(DIR_MODE);
            fs::set_permissions(folder, mode).map_err(failed)?;
        }
        remove_stale(path)?;

        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|errno| failed(errno.into()))?;
        rustix::net::bind(&socket, &addr).map_err(|errno| match errno {
            Errno::NOENT => BindError::NoFolder(path.to_owned()),
            errno => failed(errno.into()),
        })?;
        let file = SocketFile::of(path).map_err(failed)?;
        // Who may connect is settled before anyone can: nobody is accepted before listen.
        give_to_group(path);
        rustix::fs::chmod(path, MODE).map_err(|errno| failed(errno.into()))?;
        rustix::net::listen(&socket, BACKLOG as i32).map_err(|errno| failed(errno.into()))?;
        let listener = UnixListener::from_std(socket.into()).map_err(failed)?;
        Ok(Self { listener, file })
    }

    pub(super) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

/// Our file, as long as it is ours.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity(path)?,
        })
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket can't be removed");
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |error| BindError::of(path, error);
    let file = match fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !file.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(BindError::Served(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// A daemon that may not, or a host without the group, leaves the socket to its own group.
fn give_to_group(path: &Path) {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let Some(gid) = gid_of(GROUP, &groups) else {
        tracing::debug!("no group {GROUP}: only this user and root can use the socket");
        return;
    };
    if let Err(errno) = rustix::fs::chown(path, None, Some(Gid::from_raw(gid))) {
        let path = path.display();
        tracing::warn!(%path, error = %io::Error::from(errno), "the socket can't be given to the group {GROUP}");
    }
}

pub(super) fn gid_of(group: &str, groups: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_by_its_whole_name() {
        let groups = "root:x:0:\ntcpstate2:x:7:\ntcpstate:x:992:alice,bob\n";
        assert_eq!(gid_of("tcpstate", groups), Some(992));
        assert_eq!(gid_of("tcp", groups), None);
    }

    #[tokio::test]
    async fn the_file_is_for_its_owner_and_group_and_goes_with_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = UnixSocket::bind(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_that_became_anothers_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = UnixSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let other = UnixSocket::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
        drop(other);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_dead_daemons_socket_is_replaced_and_a_live_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let live = UnixSocket::bind(&path).unwrap();
        let error = UnixSocket::bind(&path).err().unwrap().to_string();
        assert_eq!(
            error,
            format!(
                "socket {} is served by another tcpstate daemon; stop it, or choose another path with --socket",
                path.display()
            )
        );
        drop(live);
    }

    #[tokio::test]
    async fn paths_that_can_not_be_used_say_why() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let missing = folder.path().join("no/s");
        let long = folder.path().join("x".repeat(120));
        for (path, problem) in [
            (&file, "exists and is no socket"),
            (&missing, "no folder for the socket"),
            (&long, "is too long; expected 107 bytes at most"),
        ] {
            let error = UnixSocket::bind(path).err().unwrap().to_string();
            assert!(error.contains(problem), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
        assert!(file.exists());
    }
}
