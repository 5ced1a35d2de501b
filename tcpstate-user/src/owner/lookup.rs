//! Which container a process runs in, from `/proc`, remembered.
//!
//! Reads at most once for each cgroup, or for each process where the cgroup doesn't settle it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::container::Cgroups;

/// Answers kept. When they are that many all are forgotten: the busy ones are back at once.
const CAPACITY: usize = 4096;

/// Id of the root of the cgroup v2 hierarchy: all processes that no one moved, so it says nothing of one. On
/// hosts that run containers by cgroup v1 alone every process is in it.
const ROOT_CGROUP: u64 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    /// The kernel never gives a cgroup's id twice in one boot (`kernfs_root.ino_idr`, with a generation).
    Cgroup(u64),
    Process {
        pid: u32,
        start_ns: u64,
    },
}

/// Containers of processes; answers from memory where it can.
#[derive(Debug)]
pub struct Containers {
    proc: PathBuf,
    /// Where the cgroup v2 hierarchy is mounted, if it is.
    unified: Option<PathBuf>,
    known: FxHashMap<Key, Option<Arc<str>>>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cgroup(id) => write!(f, "cgroup {id}"),
            Self::Process { pid, start_ns } => write!(f, "process {pid} started {start_ns}"),
        }
    }
}

impl Default for Containers {
    fn default() -> Self {
        Self::new()
    }
}

impl Containers {
    #[must_use]
    pub fn new() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self::with_roots(Path::new("/proc"), unified_mount(&mounts))
    }

    fn with_roots(proc: &Path, unified: Option<PathBuf>) -> Self {
        Self {
            proc: proc.to_owned(),
            unified,
            known: FxHashMap::default(),
        }
    }

    /// Where the whole cgroup v2 hierarchy is mounted.
    #[must_use]
    pub fn cgroup_v2(&self) -> Option<&Path> {
        self.unified.as_deref()
    }

    /// Full id of the container of the process `pid` that started at `start_ns` (`CLOCK_BOOTTIME`) and was in
    /// the cgroup v2 group `cgroup_id`; `None` if it is in none, or that can't be known any more.
    ///
    /// `pid` is taken in the pid namespace of `/proc`; another process that has it there started at another
    /// time, but for one within the same clock tick (10 ms), which only a full turn of the pids could give.
    pub fn container(&mut self, pid: u32, start_ns: u64, cgroup_id: u64) -> Option<Arc<str>> {
        let process = Key::Process { pid, start_ns };
        let cgroup = (cgroup_id > ROOT_CGROUP).then_some(Key::Cgroup(cgroup_id));
        let known = cgroup
            .and_then(|cgroup| self.known.get(&cgroup))
            .or_else(|| self.known.get(&process));
        if let Some(container) = known {
            return container.clone();
        }

        let (settled_by_cgroup, container) = self.read(pid, start_ns, cgroup_id);
        let key = cgroup.filter(|_| settled_by_cgroup).unwrap_or(process);
        if self.known.len() >= CAPACITY {
            self.known.clear();
        }
        self.known.insert(key, container.clone());
        container
    }

    /// The container, and whether it is that of everybody in the cgroup.
    fn read(&self, pid: u32, start_ns: u64, cgroup_id: u64) -> (bool, Option<Arc<str>>) {
        let folder = self.proc.join(pid.to_string());
        let Ok(text) = fs::read(folder.join("cgroup")) else {
            return (false, None);
        };
        let text = String::from_utf8_lossy(&text);
        // After reading, so that the text can't be a later process'.
        if !started_at(&folder, start_ns) {
            return (false, None);
        }
        let cgroups = Cgroups::parse(&text);
        // It may have moved since the event.
        let is_there = cgroups
            .unified_path
            .is_some_and(|path| self.unified_id(path) == Some(cgroup_id));
        let settled = is_there && (cgroups.unified.is_some() || !cgroups.has_legacy);
        (settled, cgroups.container().map(Arc::from))
    }

    /// The id of a cgroup is the inode number of its folder (`kernfs_ino`, on 64-bit).
    fn unified_id(&self, path: &str) -> Option<u64> {
        use std::os::unix::fs::MetadataExt as _;
        let folder = self.unified.as_ref()?.join(path.trim_start_matches('/'));
        Some(fs::metadata(folder).ok()?.ino())
    }
}

/// Whether `folder`, in `/proc`, is that of the process that started then.
pub(super) fn started_at(folder: &Path, start_ns: u64) -> bool {
    // `do_task_stat` rounds down (`nsec_to_clock_t`).
    let tick = ns_per_tick();
    start_ns_of(folder) == Some(start_ns / tick * tick)
}

/// When the process in this folder of `/proc` started: `CLOCK_BOOTTIME` nanoseconds, rounded down to a tick.
pub(super) fn start_ns_of(folder: &Path) -> Option<u64> {
    start_ns(&fs::read(folder.join("stat")).ok()?)
}

/// By the text of its `stat`.
pub(super) fn start_ns(stat: &[u8]) -> Option<u64> {
    start_ticks(stat)?.checked_mul(ns_per_tick())
}

fn ns_per_tick() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)
}

/// Field 22 of `/proc/PID/stat`. The name in field 2 may hold blanks and brackets.
fn start_ticks(stat: &[u8]) -> Option<u64> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Where a `/proc/PID/mountinfo` says that the whole cgroup v2 hierarchy is mounted.
pub(super) fn unified_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, mount_point) = (fields.next()?, fields.next()?);
        (kind.starts_with("cgroup2 ") && root == "/").then(|| PathBuf::from(mount_point))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::process::{Child, Command};

    use super::*;

    const ID: &str = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970";

    /// A `/proc` and a cgroup v2 hierarchy of files.
    struct Host {
        folder: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            Self { folder }
        }

        fn containers(&self) -> Containers {
            let root = self.folder.path();
            Containers::with_roots(&root.join("proc"), Some(root.join("cgroup")))
        }

        /// The process started 12.34 s after the boot.
        fn process(&self, pid: u32, cgroup: &str) {
            let folder = self.folder.path().join("proc").join(pid.to_string());
            fs::create_dir_all(&folder).expect("writable");
            fs::write(folder.join("cgroup"), cgroup).expect("writable");
            let stat =
                format!("{pid} (a) b) S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 1234 8 9");
            fs::write(folder.join("stat"), stat).expect("writable");
        }

        fn cgroup(&self, path: &str) -> u64 {
            let folder = self.folder.path().join("cgroup").join(path);
            fs::create_dir_all(&folder).expect("writable");
            fs::metadata(folder).expect("made").ino()
        }

        fn forget(&self, pid: u32) {
            let folder = self.folder.path().join("proc").join(pid.to_string());
            fs::remove_dir_all(folder).expect("made");
        }
    }

    const START_NS: u64 = 12_345_678_901;

    #[test]
    fn one_reading_serves_a_whole_cgroup() {
        let host = Host::new();
        let cgroup = host.cgroup(&format!("docker/{ID}"));
        host.process(7, &format!("0::/docker/{ID}\n"));
        let mut containers = host.containers();
        assert_eq!(
            containers.container(7, START_NS, cgroup).as_deref(),
            Some(ID)
        );
        host.forget(7);
        assert_eq!(containers.container(8, 5, cgroup).as_deref(), Some(ID));
    }

    #[test]
    fn another_process_under_the_same_pid_is_not_asked() {
        let host = Host::new();
        let cgroup = host.cgroup(&format!("docker/{ID}"));
        host.process(7, &format!("0::/docker/{ID}\n"));
        let mut containers = host.containers();
        assert_eq!(containers.container(7, START_NS - 10_000_000, cgroup), None);
        assert_eq!(containers.container(7, START_NS + 10_000_000, cgroup), None);
        // That settled nothing for the cgroup.
        assert_eq!(
            containers.container(7, START_NS, cgroup).as_deref(),
            Some(ID)
        );
    }

    #[test]
    fn a_process_that_moved_says_nothing_of_the_cgroup_that_it_left() {
        let host = Host::new();
        host.cgroup(&format!("docker/{ID}"));
        let left = host.cgroup("system.slice");
        host.process(7, &format!("0::/docker/{ID}\n"));
        host.process(8, "0::/system.slice\n");
        let mut containers = host.containers();
        assert_eq!(containers.container(7, START_NS, left).as_deref(), Some(ID));
        assert_eq!(containers.container(8, START_NS, left), None);
    }

    #[test]
    fn where_version_1_tells_containers_apart_each_process_is_read() {
        let host = Host::new();
        let cgroup = host.cgroup("system.slice/containerd.service");
        let unified = "0::/system.slice/containerd.service\n";
        host.process(7, &format!("4:pids:/docker/{ID}\n{unified}"));
        host.process(8, &format!("4:pids:/system.slice\n{unified}"));
        let mut containers = host.containers();
        assert_eq!(
            containers.container(7, START_NS, cgroup).as_deref(),
            Some(ID)
        );
        assert_eq!(containers.container(8, START_NS, cgroup), None);
        assert_eq!(
            containers.container(7, START_NS, ROOT_CGROUP).as_deref(),
            Some(ID)
        );
    }

    #[test]
    fn a_start_that_no_clock_shows_is_none() {
        let stat = |ticks: u64| format!("7 (a) S{}{ticks}", " 0 ".repeat(18));
        assert_eq!(start_ns(stat(1234).as_bytes()), Some(12_340_000_000));
        assert_eq!(start_ns(stat(u64::MAX).as_bytes()), None);
    }

    #[test]
    fn memory_is_bounded() {
        let host = Host::new();
        let mut containers = host.containers();
        for pid in 0..3 * CAPACITY as u32 {
            assert_eq!(containers.container(pid, 1, 0), None);
            assert!(containers.known.len() <= CAPACITY);
        }
    }

    #[test]
    fn the_mount_of_the_whole_hierarchy_is_found() {
        let mountinfo = "\
29 23 0:26 /docker/1 /sys/fs/cgroup/part ro - cgroup2 cgroup2 rw
30 23 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
31 23 0:26 / /sys/fs/cgroup rw shared:9 master:1 - cgroup2 cgroup2 rw,nsdelegate
";
        assert_eq!(unified_mount(mountinfo), Some("/sys/fs/cgroup".into()));
        assert_eq!(unified_mount("nothing"), None);
    }

    /// A real process in a real cgroup whose name is a container's; both go with the value.
    struct Contained {
        folder: PathBuf,
        process: Child,
    }

    impl Contained {
        fn start() -> Self {
            let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc");
            let root = unified_mount(&mounts).expect("cgroup v2 is mounted");
            let folder = root.join(format!("tcpstate-test-{}-{ID}.scope", std::process::id()));
            fs::create_dir(&folder).expect("making a cgroup needs root");
            let process = Command::new("sleep").arg("30").spawn().expect("sleep");
            fs::write(folder.join("cgroup.procs"), process.id().to_string()).expect("moved");
            Self { folder, process }
        }
    }

    impl Drop for Contained {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
            let _ = fs::remove_dir(&self.folder);
        }
    }

    #[test]
    fn the_kernels_own_files_are_understood() {
        let contained = Contained::start();
        let pid = contained.process.id();
        let cgroup = fs::metadata(&contained.folder).expect("made").ino();
        let mut containers = Containers::new();
        let start_ns = start_ns_of(Path::new(&format!("/proc/{pid}"))).expect("alive");

        assert_eq!(
            containers.container(pid, start_ns, cgroup).as_deref(),
            Some(ID)
        );
        assert!(containers.known.contains_key(&Key::Cgroup(cgroup)));
        assert_eq!(
            containers
                .container(pid, start_ns + 1, ROOT_CGROUP)
                .as_deref(),
            Some(ID)
        );
        assert_eq!(containers.container(pid, 0, ROOT_CGROUP), None);
    }
}
