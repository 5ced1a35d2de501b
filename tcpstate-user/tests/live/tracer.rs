//! The product as a child process: its lines as they come, its end.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Generous: the emulated machines load eBPF slowly.
const PATIENCE: Duration = Duration::from_secs(60);

/// The product under test.
pub fn product() -> PathBuf {
    let path = match std::env::var_os("TCPSTATE_BIN") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(env!("CARGO_BIN_EXE_tcpstate")),
    };
    assert!(
        path.is_file(),
        "no product at {}: set TCPSTATE_BIN to the path of a `tcpstate` to test",
        path.display()
    );
    path
}

#[derive(Default)]
struct Output {
    lines: Vec<String>,
    over: bool,
}

/// Grows while the product writes.
#[derive(Clone, Default)]
struct Stream(Arc<(Mutex<Output>, Condvar)>);

impl Stream {
    fn follow(&self, from: impl Read + Send + 'static) -> JoinHandle<()> {
        let stream = self.clone();
        thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                stream.lock().lines.push(line);
                stream.0.1.notify_all();
            }
            stream.lock().over = true;
            stream.0.1.notify_all();
        })
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for lines that satisfy `enough`; false where the stream ended or time ran out before.
    fn wait(&self, patience: Duration, mut enough: impl FnMut(&[String]) -> bool) -> bool {
        let end = Instant::now() + patience;
        let mut output = self.lock();
        loop {
            if enough(&output.lines) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if output.over || left.is_zero() {
                return false;
            }
            output = self
                .0
                .1
                .wait_timeout(output, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A running `tcpstate watch`, attached; ended at the latest when it is dropped.
pub struct Tracer {
    /// Set when it is dropped, if it told of transitions that the kernel did not show it.
    skipped: Arc<AtomicBool>,
    child: Child,
    stdout: Stream,
    stderr: Stream,
    readers: Vec<JoinHandle<()>>,
}

impl Tracer {
    /// Starts the product in the calling thread's namespaces and waits until it says that it traces.
    pub fn start(arguments: &[&str], skipped: Arc<AtomicBool>) -> Self {
        // SAFETY: it asks a question of the kernel.
        let uid = unsafe { libc::geteuid() };
        assert_eq!(uid, 0, "the live tests load eBPF: run them as root");
        let mut child = Command::new(product())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the product starts");
        let (stdout, stderr) = (Stream::default(), Stream::default());
        let readers = vec![
            stdout.follow(child.stdout.take().expect("piped")),
            stderr.follow(child.stderr.take().expect("piped")),
        ];
        let tracer = Self {
            skipped,
            child,
            stdout,
            stderr,
            readers,
        };
        let attached = tracer.stderr.wait(PATIENCE, |lines| {
            lines.iter().any(|line| line.starts_with("tracing "))
        });
        assert!(
            attached,
            "the product did not say that it traces, but: {:?}",
            tracer.stderr.lock().lines
        );
        tracer
    }

    /// Waits for a line of stdout, as JSON, that satisfies `wanted`.
    pub fn wait_for(&self, what: &str, mut wanted: impl FnMut(&Value) -> bool) {
        let mut seen = 0;
        let found = self.stdout.wait(PATIENCE, |lines| {
            let new = &lines[seen..];
            seen = lines.len();
            new.iter().any(|line| wanted(&parse(line)))
        });
        assert!(
            found,
            "waited for {what}; the product wrote\n{}\nand said {:?}; its threads: {}",
            self.stdout.lock().lines.join("\n"),
            self.stderr.lock().lines,
            self.threads()
        );
    }

    /// What each of its threads has done and waits for.
    fn threads(&self) -> String {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let tasks = tasks.into_iter().flatten().flatten();
        let task = |folder: PathBuf| {
            let read = |name| fs::read_to_string(folder.join(name)).unwrap_or_default();
            let status = read("status");
            let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
            let switches: Vec<&str> = switches.collect();
            format!(
                "{} waits in {} after {switches:?}, system call {}",
                read("comm").trim(),
                read("wchan").trim(),
                read("syscall").trim()
            )
        };
        let told: Vec<String> = tasks.map(|entry| task(entry.path())).collect();
        told.join("; ")
    }

    /// Waits, but not for ever, until what it wrote is enough.
    pub fn wait_until(&self, patience: Duration, mut enough: impl FnMut(&[Value]) -> bool) {
        let mut parsed = Vec::new();
        self.stdout.wait(patience, |lines| {
            parsed.extend(lines[parsed.len()..].iter().map(|line| parse(line)));
            enough(&parsed)
        });
    }

    /// Asks it to end and gives how it did, what it wrote and what it said.
    pub fn stop(mut self) -> (ExitStatus, Vec<Value>, Vec<String>) {
        // SAFETY: no memory is involved; the pid is that of our child, which has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            assert!(Instant::now() < end, "SIGTERM did not end the product");
            thread::sleep(Duration::from_millis(5));
        };
        for reader in self.readers.drain(..) {
            reader.join().expect("no reader panics");
        }
        let lines = self
            .stdout
            .lock()
            .lines
            .iter()
            .map(|line| parse(line))
            .collect();
        let said = self.stderr.lock().lines.clone();
        (status, lines, said)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let told = |line: &String| line.contains("\"reason\":\"recursion\"");
        if self.stdout.lock().lines.iter().any(told) {
            self.skipped.store(true, Ordering::Relaxed);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in the line {line:?}"))
}
