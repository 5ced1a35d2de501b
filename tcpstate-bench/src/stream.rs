//! Lines as they come: how long after its transition a line can be read, how soon after its start a program writes the
//! first, and whether a fast stream is whole.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::figures::{Delay, Pipe, Start};
use crate::lines::Format;
use crate::load::{Close, Load, Loads, Six};
use crate::process::Process;
use crate::spread::percentiles;
use crate::tools::{Place, Tool, wait_until_it_sees};

/// Connections a second while delays are measured: enough that who fills a buffer before writing does so soon.
const GENTLE: u64 = 1_000;
const DELAYS: Duration = Duration::from_secs(4);
/// Of transitions, a second.
const STREAM: u64 = 200_000;
const PATIENCE: Duration = Duration::from_secs(30);

fn gentle(load: &Load) -> Load {
    Load {
        rate: Some(GENTLE),
        ..*load
    }
}

/// A tool whose lines come through a pipe.
fn piped(tool: Tool, place: &Place) -> Result<(Process, std::process::ChildStdout)> {
    let mut command = tool.command(place)?.context("it is a program")?;
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = Process::start(&mut command)?;
    let output = process.take_output().context("its output is a pipe")?;
    Ok((process, output))
}

pub fn delay(tool: Tool, place: &Place, load: &Load) -> Result<Delay> {
    let format = tool.format().context("it writes lines")?;
    let (mut process, output) = piped(tool, place)?;
    let reading = thread::spawn(move || closes(output, format));
    wait_until_it_sees(&mut process)?;
    process.settle()?;
    let mut closed: HashMap<u16, VecDeque<Instant>> = HashMap::new();
    let made = place
        .loads
        .run_telling(&gentle(load), DELAYS, &mut |port| {
            closed.entry(port).or_default().push_back(Instant::now());
        })?;
    process.settle()?;
    process.end()?;
    let lines = reading.join().map_err(|_| anyhow!("a thread failed"))?;
    let seconds: Vec<f64> = lines?
        .into_iter()
        .filter_map(|(port, read)| {
            let closed = closed.get_mut(&port)?.pop_front()?;
            Some(read.saturating_duration_since(closed).as_secs_f64())
        })
        .collect();
    Ok(Delay {
        tool,
        connections: made.connections,
        told: seconds.len() as u64,
        percentiles: percentiles(seconds),
    })
}

/// Local ports of the sockets that lines say have closed, and when the lines were read.
fn closes(mut from: impl Read, format: Format) -> Result<Vec<(u16, Instant)>> {
    let mut buffer = vec![0; 1 << 16];
    let mut rest = Vec::new();
    let mut closes = Vec::new();
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(closes);
        }
        let now = Instant::now();
        rest.extend_from_slice(&buffer[..read]);
        let whole = rest
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |at| at + 1);
        let text = String::from_utf8_lossy(&rest[..whole]);
        let ends = text.lines().filter_map(|line| format.read(line));
        closes.extend(ends.filter(|it| it.closed).map(|it| (it.local, now)));
        rest.drain(..whole);
    }
}

/// While connections come and go: from the program's start to the first line of one of them.
pub fn start(tool: Tool, place: &Place, load: &Load, rounds: usize) -> Result<Start> {
    let over = AtomicBool::new(false);
    let seconds = thread::scope(|scope| {
        let making = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                place.loads.run(&gentle(load), Duration::from_millis(20))?;
            }
            anyhow::Ok(())
        });
        // The first one reads its files from the disk.
        let all: Result<Vec<f64>> = (0..=rounds).map(|_| first_line(tool, place)).collect();
        over.store(true, Ordering::Relaxed);
        making.join().map_err(|_| anyhow!("a thread failed"))??;
        all
    })?;
    Ok(Start {
        name: tool.name().to_owned(),
        seconds: seconds[1..].to_vec(),
    })
}

fn first_line(tool: Tool, place: &Place) -> Result<f64> {
    let begun = Instant::now();
    if tool == Tool::Daemon {
        return first_line_of_daemon(place, begun);
    }
    let (process, output) = piped(tool, place)?;
    let format = tool.format().context("it writes lines")?;
    wait_for_line(output, format, place, begun)?;
    let took = begun.elapsed();
    // It has nobody to read its last lines.
    drop(process);
    Ok(took.as_secs_f64())
}

/// By a reader who asks for its stream as soon as it can be asked.
fn first_line_of_daemon(place: &Place, begun: Instant) -> Result<f64> {
    let mut command = Tool::Daemon
        .command(place)?
        .context("the daemon's command")?;
    let _ = fs::remove_file(place.socket());
    let mut process = Process::start(command.stderr(Stdio::null()))?;
    let mut stream = loop {
        match UnixStream::connect(place.socket()) {
            Ok(stream) => break stream,
            Err(error) if begun.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => {
                process.check()?;
                thread::sleep(Duration::from_millis(1));
            }
        }
    };
    write!(stream, "GET /v1/events HTTP/1.0\r\n\r\n")?;
    wait_for_line(stream, Format::Watch, place, begun)?;
    let took = begun.elapsed();
    process.end()?;
    Ok(took.as_secs_f64())
}

/// Reads until a time: who writes nothing is waited for no longer.
struct Until<T> {
    from: T,
    end: Instant,
}

impl<T: AsFd + Read> Read for Until<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut readable = [PollFd::new(&self.from, PollFlags::IN)];
        if poll(&mut readable, Some(&left))? == 0 {
            return Err(io::Error::other("no line of the load came in time"));
        }
        self.from.read(buffer)
    }
}

fn wait_for_line(
    from: impl AsFd + Read,
    format: Format,
    place: &Place,
    begun: Instant,
) -> Result<()> {
    let end = begun + PATIENCE;
    let mut lines = BufReader::new(Until { from, end });
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        // Lines of others may come without end.
        if Instant::now() > end {
            bail!("no line of the load came in time");
        }
        let ends = format.read(&String::from_utf8_lossy(&line));
        if ends.is_some_and(|ends| ends.is_of(&place.loads)) {
            return Ok(());
        }
        line.clear();
    }
    bail!("it ended before it wrote a line")
}

/// At 200,000 transitions a second, into a pipe whose reader counts and discards. By all processors, and with full closes, whose
/// transitions are more: one thread of resets does not make as many.
pub fn pipe(place: &Place, time: Duration) -> Result<Pipe> {
    let close = Close::Full;
    let load = Load {
        name: "the stream",
        close,
        six: Six::None,
        threads: place.loads.most_threads(),
        rate: Some(STREAM.div_ceil(close.transitions())),
    };
    thread::scope(|scope| {
        let (mut process, output) = piped(Tool::Watch, place)?;
        let reading = scope.spawn(|| count(output, &place.loads));
        wait_until_it_sees(&mut process)?;
        process.settle()?;
        let made = place.loads.run(&load, time)?;
        process.settle()?;
        process.end()?;
        let [lines, lost] = reading.join().map_err(|_| anyhow!("a thread failed"))??;
        Ok(Pipe {
            wanted: STREAM,
            made,
            lines,
            lost,
        })
    })
}

/// Lines of the load's transitions, and how many are told to be lost.
fn count(from: impl Read, loads: &Loads) -> Result<[u64; 2]> {
    let mut lines = BufReader::with_capacity(1 << 16, from);
    let [mut transitions, mut lost] = [0; 2];
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        match Format::Watch.read(&text) {
            Some(ends) => transitions += u64::from(ends.is_of(loads)),
            None => lost += Format::Watch.lost(&text),
        }
        line.clear();
    }
    Ok([transitions, lost])
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &[u8] = b"1 80 1 7 9 x\n80 1 1 8 9 x\n2 80 1 7 9 x\n3 80 1 7";

    /// Gives it in pieces of three bytes.
    struct Slow(&'static [u8]);

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let (now, later) = self.0.split_at(self.0.len().min(3));
            self.0 = later;
            buffer[..now.len()].copy_from_slice(now);
            Ok(now.len())
        }
    }

    #[test]
    fn lines_may_come_in_pieces() {
        let ports = |from: &mut dyn Read| -> Vec<u16> {
            let closes = closes(from, Format::Printf).unwrap();
            closes.into_iter().map(|(port, _)| port).collect()
        };
        assert_eq!(ports(&mut Slow(LINES)), [1, 2]);
        assert_eq!(ports(&mut &LINES[..]), [1, 2]);
    }

    #[test]
    fn only_lines_of_the_load_are_counted() {
        let loads = Loads::new().unwrap();
        let ours = *loads.ports.first().unwrap();
        let line = |local: u16, evidence: &str| {
            format!(
                r#"{{"type":"transition","local_port":{local},"remote_port":null,"from":"LISTEN","to":"CLOSE","evidence":"{evidence}"}}"#
            )
        };
        let text = [
            r#"{"type":"start","schema":1}"#.to_owned(),
            line(ours, "tracepoint"),
            line(1, "tracepoint"),
            line(ours, "snapshot"),
            r#"{"type":"lost","schema":1,"count":5,"reason":"ring_full"}"#.to_owned(),
            line(ours, "inferred"),
        ]
        .join("\n");
        assert_eq!(count(text.as_bytes(), &loads).unwrap(), [2, 5]);
    }

    #[test]
    fn who_writes_nothing_is_not_waited_for() {
        let (silent, _writer) = UnixStream::pair().unwrap();
        let mut until = Until {
            from: silent,
            end: Instant::now() + Duration::from_millis(10),
        };
        assert!(until.read(&mut [0]).is_err());
    }
}
