//! Lines as they come: how long after its transition a line can be read, how soon after its start a program writes the
//! first, and whether a stream of all that one processor can make is whole.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::figures::{Delay, Pipe, Start, percentiles};
use crate::lines::Format;
use crate::load::{Load, Made};
use crate::process::Process;
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
    wait_for_line(output, format, place)?;
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
    let process = Process::start(command.stderr(Stdio::null()))?;
    let mut stream = loop {
        match UnixStream::connect(place.socket()) {
            Ok(stream) => break stream,
            Err(error) if begun.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    };
    write!(stream, "GET /v1/events HTTP/1.0\r\n\r\n")?;
    wait_for_line(stream, Format::Watch, place)?;
    let took = begun.elapsed();
    process.end()?;
    Ok(took.as_secs_f64())
}

fn wait_for_line(from: impl Read, format: Format, place: &Place) -> Result<()> {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let ends = format.read(&String::from_utf8_lossy(&line));
        if ends.is_some_and(|ends| ends.is_of(&place.loads)) {
            return Ok(());
        }
        line.clear();
    }
    bail!("it ended before it wrote a line")
}

/// At 200,000 transitions a second, into a pipe whose reader counts and discards.
pub fn pipe(place: &Place, load: &Load, time: Duration) -> Result<Pipe> {
    let (mut process, output) = piped(Tool::Watch, place)?;
    let reading = thread::spawn(move || count(output));
    wait_until_it_sees(&mut process)?;
    process.settle()?;
    let load = Load {
        rate: Some(STREAM.div_ceil(load.close.transitions())),
        ..*load
    };
    let made: Made = place.loads.run(&load, time)?;
    process.settle()?;
    process.end()?;
    let [lines, lost, bytes] = reading.join().map_err(|_| anyhow!("a thread failed"))??;
    Ok(Pipe {
        wanted: STREAM,
        made,
        lines,
        lost,
        bytes,
    })
}

/// Lines of transitions, transitions that are told to be lost, bytes.
fn count(from: impl Read) -> Result<[u64; 3]> {
    let mut lines = BufReader::with_capacity(1 << 16, from);
    let [mut transitions, mut lost, mut bytes] = [0; 3];
    let mut line = Vec::new();
    loop {
        let read = lines.read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok([transitions, lost, bytes]);
        }
        bytes += read as u64;
        if line.starts_with(br#"{"type":"transition""#) {
            transitions += 1;
        } else {
            lost += Format::Watch.lost(&String::from_utf8_lossy(&line));
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &[u8] = b"1 80 1 7 9 x\n80 1 1 8 9 x\n2 80 1 7 9 x\n3 80 1 7";

    /// Gives it in pieces of three bytes.
    struct Slow(&'static [u8]);

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
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
    fn what_is_lost_is_counted_beside_lines() {
        let text = br#"{"type":"start","schema":1}
{"type":"transition","schema":1}
{"type":"lost","schema":1,"count":5,"reason":"ring_full"}
{"type":"transition","schema":1}
"#;
        assert_eq!(count(&text[..]).unwrap(), [2, 5, text.len() as u64]);
    }
}
