//! What the daemon itself uses: the `process_*` metrics, read at each scrape.
//!
//! The prometheus crate's own collector counts CPU time in whole seconds.

use std::io;

use procfs::process::Process;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// What can't be read is `None`, and absent from the page.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct ProcessMetrics {
    pub cpu_seconds: f64,
    pub resident_bytes: Option<u64>,
    /// Unix time, seconds.
    pub start_time_seconds: Option<f64>,
    pub open_fds: Option<u64>,
    /// The limit that applies, which the process may raise up to the hard one.
    pub max_fds: Option<u64>,
}

/// Reads [`ProcessMetrics`] of this process.
#[derive(Clone, Copy, Debug)]
pub struct ProcessReader {
    /// Read once: computed from two clocks, it would otherwise move with each adjustment of one of them, and
    /// seem a restart.
    start_time_seconds: Option<f64>,
}

impl ProcessReader {
    #[must_use]
    pub fn new() -> Self {
        let ticks = Process::myself().and_then(|process| process.stat());
        Self {
            start_time_seconds: ticks.ok().map(|stat| {
                let since_boot = stat.starttime as f64 / procfs::ticks_per_second() as f64;
                let boot = seconds(ClockId::Realtime) - seconds(ClockId::Boottime);
                boot + since_boot
            }),
        }
    }

    #[must_use]
    pub fn read(&self) -> ProcessMetrics {
        let memory = Process::myself().and_then(|process| process.statm());
        ProcessMetrics {
            cpu_seconds: seconds(ClockId::ProcessCPUTime),
            resident_bytes: memory
                .ok()
                .map(|memory| memory.resident * procfs::page_size()),
            start_time_seconds: self.start_time_seconds,
            open_fds: open_fds().ok(),
            max_fds: getrlimit(Resource::Nofile).current,
        }
    }
}

impl Default for ProcessReader {
    fn default() -> Self {
        Self::new()
    }
}

fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Not procfs' `fd_count`, which counts `.` and `..` on kernels before 6.2.
fn open_fds() -> io::Result<u64> {
    let listed = std::fs::read_dir("/proc/self/fd")?.count() as u64;
    // The one that lists is itself among them.
    Ok(listed - 1)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn figures_are_those_of_this_process() {
        let reader = ProcessReader::new();
        let before = reader.read();
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix = unix.expect("a clock after 1970").as_secs_f64();
        let started = before.start_time_seconds.expect("a start time");
        assert!(
            started <= unix && started > unix - 3600.0,
            "{started} {unix}"
        );

        // Something to see: CPU time with fractions, memory, descriptors.
        let memory = std::hint::black_box(vec![1_u8; 32 << 20]);
        let files: Vec<File> = (0..50)
            .map(|_| File::open("/dev/null").expect("opens"))
            .collect();
        let until = Instant::now() + Duration::from_millis(30);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        let after = reader.read();
        let used = after.cpu_seconds - before.cpu_seconds;
        assert!(used > 0.001 && used.fract() > 0.0, "{used}");
        let grown = after.resident_bytes.expect("memory") - before.resident_bytes.expect("memory");
        assert!(grown > 16 << 20, "{grown}");
        // Other tests of this binary open and close some meanwhile.
        let opened = after.open_fds.expect("fds") as i64 - before.open_fds.expect("fds") as i64;
        assert!((25..=75).contains(&opened), "{opened}");
        assert!(after.max_fds.expect("a limit") >= after.open_fds.expect("fds"));
        assert_eq!(after.start_time_seconds, before.start_time_seconds);
        drop((memory, files));
    }
}
