//! Who is measured: the product's two ways, and its peers; how each is started, when it is ready, and what it told.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::bpf::{Floor, Measuring, Runs, programs_of};
use crate::figures::Told;
use crate::ground;
use crate::http::{self, Metrics};
use crate::lines::{self, Format};
use crate::load::{Listener, Loads, Made};
use crate::process::Process;

/// bpftrace compiles its program first.
const PATIENCE: Duration = Duration::from_secs(30);
pub const LISTEN: &str = "127.0.0.1:10975";

/// How long sockets have been in the states that they leave, in the kernel: what bpftrace does best.
const HISTOGRAM: &str = "\
tracepoint:sock:inet_sock_set_state /args->protocol == 6/ {
  $since = @since[args->skaddr];
  if ($since) { @dwell_us[args->oldstate] = hist((nsecs - $since) / 1000); }
  if (args->newstate == 7) { delete(@since[args->skaddr]); } else { @since[args->skaddr] = nsecs; }
}
END { clear(@since); }";

const PRINTF: &str = "\
tracepoint:sock:inet_sock_set_state /args->protocol == 6/ {
  printf(\"%d %d %d %d %d %s\\n\", args->sport, args->dport, args->oldstate, args->newstate, pid, comm);
}";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tool {
    Untraced,
    /// What the machine itself is worth from one interval to the next.
    UntracedAgain,
    Floor,
    Daemon,
    Watch,
    Tcpstates,
    Histogram,
    Printf,
}

impl Tool {
    pub const ALL: [Self; 8] = [
        Self::Untraced,
        Self::UntracedAgain,
        Self::Floor,
        Self::Daemon,
        Self::Watch,
        Self::Tcpstates,
        Self::Histogram,
        Self::Printf,
    ];
    /// Those whose lines can be read as they come.
    pub const WRITING: [Self; 3] = [Self::Watch, Self::Tcpstates, Self::Printf];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Untraced => "untraced",
            Self::UntracedAgain => "untraced, again",
            Self::Floor => "empty eBPF program",
            Self::Daemon => "`tcpstate daemon`",
            Self::Watch => "`tcpstate watch -o json`",
            Self::Tcpstates => "`tcpstates` (libbpf-tools)",
            Self::Histogram => "bpftrace, histogram in the kernel",
            Self::Printf => "bpftrace, `printf`",
        }
    }

    /// Its program's name, and Debian's package.
    pub const fn program(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Tcpstates => Some(("tcpstates", "libbpf-tools")),
            Self::Histogram | Self::Printf => Some(("bpftrace", "bpftrace")),
            _ => None,
        }
    }

    pub const fn format(self) -> Option<Format> {
        match self {
            Self::Watch => Some(Format::Watch),
            Self::Tcpstates => Some(Format::Tcpstates),
            Self::Printf => Some(Format::Printf),
            _ => None,
        }
    }

    /// Its command; `None` of what is no program.
    pub fn command(self, place: &Place) -> Result<Option<Command>> {
        let peer = |arguments: &[&str]| {
            let (name, package) = self.program().context("it is a peer")?;
            let mut command = Command::new(program(name, package)?);
            command.args(arguments);
            anyhow::Ok(Some(command))
        };
        match self {
            Self::Untraced | Self::UntracedAgain | Self::Floor => Ok(None),
            Self::Daemon => {
                let mut command = Command::new(&place.product);
                command
                    .args(["daemon", "--netns", "self", "--web.listen-address", LISTEN])
                    .arg("--socket")
                    .arg(place.socket());
                Ok(Some(command))
            }
            Self::Watch => {
                let mut command = Command::new(&place.product);
                command.args(["watch", "--direct", "--netns", "self", "-o", "json"]);
                Ok(Some(command))
            }
            Self::Tcpstates => peer(&[]),
            Self::Histogram => peer(&["-f", "json", "-e", HISTOGRAM]),
            Self::Printf => peer(&["-e", PRINTF]),
        }
    }
}

/// Where a program lies; also where a user's PATH lacks the folders of root's.
pub fn program(name: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    which::which_in(name, Some(path), "/")
        .with_context(|| format!("there is no {name}; Debian's package {package} has it"))
}

/// What all measurements share.
pub struct Place {
    pub product: PathBuf,
    /// For what programs write; gone at the end.
    pub folder: tempfile::TempDir,
    pub loads: Loads,
}

impl Place {
    /// Without what earlier parts left behind, such as TIME_WAIT.
    pub fn renew(&mut self) -> Result<()> {
        ground::network()?;
        self.loads = Loads::new()?;
        Ok(())
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::of(&http::get_unix(&self.socket(), "/metrics")?)
    }

    /// A daemon that has found what there was before it.
    pub fn daemon(&self) -> Result<Process> {
        let mut command = Tool::Daemon
            .command(self)?
            .context("the daemon's command")?;
        // From an earlier one.
        let _ = fs::remove_file(self.socket());
        let mut daemon = Process::start(command.stderr(Stdio::null()))?;
        let over = Instant::now() + PATIENCE;
        while http::get_unix(&self.socket(), "/-/ready").is_err() {
            daemon.check()?;
            if Instant::now() > over {
                bail!("the daemon does not become ready");
            }
            thread::sleep(Duration::from_millis(5));
        }
        daemon.settle()?;
        Ok(daemon)
    }
}

/// Has been started, and sees transitions.
pub struct Running<'a> {
    tool: Tool,
    place: &'a Place,
    pub process: Option<Process>,
    floor: Option<Floor>,
    /// What the daemon had counted before.
    counted: Option<Metrics>,
    /// What it writes; files without a name, which go with us.
    output: File,
    errors: File,
}

impl<'a> Running<'a> {
    pub fn start(tool: Tool, place: &'a Place) -> Result<Self> {
        let mut running = Self {
            tool,
            place,
            process: None,
            floor: None,
            counted: None,
            output: tempfile::tempfile()?,
            errors: tempfile::tempfile()?,
        };
        match tool {
            Tool::Untraced | Tool::UntracedAgain => {}
            Tool::Floor => running.floor = Some(Floor::attach()?),
            Tool::Daemon => {
                running.process = Some(place.daemon()?);
                running.counted = Some(place.metrics()?);
            }
            Tool::Watch | Tool::Tcpstates | Tool::Histogram | Tool::Printf => {
                let mut command = tool.command(place)?.context("it is a program")?;
                command
                    .stdout(running.output.try_clone()?)
                    .stderr(running.errors.try_clone()?);
                let mut process = Process::start(&mut command)?;
                if let Err(error) = wait_until_it_sees(&mut process) {
                    let said = running.said()?;
                    return Err(error.context(format!("it said {said:?}")));
                }
                process.settle()?;
                running.process = Some(process);
            }
        }
        Ok(running)
    }

    /// Its eBPF programs; none of what has none.
    pub fn programs(&self) -> Result<BTreeSet<u32>> {
        match (&self.floor, &self.process) {
            (Some(floor), _) => floor.programs(),
            (None, Some(process)) => programs_of(process.pid()),
            (None, None) => Ok(BTreeSet::new()),
        }
    }

    /// Ends it, and reads what it told of these loads; `None` of what tells nothing.
    pub fn finish(mut self, made: &[Made]) -> Result<Option<Told>> {
        let after = match &self.counted {
            Some(_) => Some(self.place.metrics()?),
            None => None,
        };
        if let Some(process) = self.process.take() {
            match process.end() {
                // A peer that is busy with what others do; what it has not told is missing.
                Err(error) if self.tool.program().is_some() => eprintln!("{error:#}"),
                ended => ended?,
            }
        }
        let transitions = made.iter().map(|made| made.transitions).sum();
        let connections: u64 = made.iter().map(|made| made.connections).sum();
        if let Some((before, after)) = self.counted.as_ref().zip(after) {
            return Ok(Some(lines::told_by_daemon(
                transitions,
                connections,
                before,
                &after,
            )));
        }
        if self.tool == Tool::Histogram {
            // The first transition of either end has no state before it whose time could be told.
            let text = text_of(&mut self.output)?;
            return Ok(Some(Told {
                expected: transitions - 2 * connections,
                told: lines::counted_by_histogram(&text).context("no histogram was printed")?,
                said_lost: lines::said_lost(&text) + lines::said_lost(&self.said()?),
            }));
        }
        match self.tool.format() {
            Some(format) => self.told_by_lines(format, transitions).map(Some),
            None => Ok(None),
        }
    }

    fn told_by_lines(&mut self, format: Format, expected: u64) -> Result<Told> {
        let mut told = Told {
            expected,
            told: 0,
            said_lost: lines::said_lost(&self.said()?),
        };
        self.output.rewind()?;
        let mut output = BufReader::new(&self.output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            match format.read(&text) {
                Some(ends) => told.told += u64::from(ends.is_of(&self.place.loads)),
                None => told.said_lost += format.lost(&text),
            }
            line.clear();
        }
        Ok(told)
    }

    /// On standard error.
    fn said(&mut self) -> Result<String> {
        text_of(&mut self.errors)
    }
}

/// The program that wrote it has ended, for it has the same place in the file.
fn text_of(file: &mut File) -> Result<String> {
    let mut text = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Waits until a program of the process has run. A socket that listens and does so no more has it run; no load does that.
pub fn wait_until_it_sees(process: &mut Process) -> Result<()> {
    let _measuring = Measuring::begin()?;
    let over = Instant::now() + PATIENCE;
    loop {
        drop(Listener::new(Ipv4Addr::LOCALHOST.into())?);
        process.check()?;
        if Runs::of(&programs_of(process.pid())?)?.most() > 0 {
            return Ok(());
        }
        if Instant::now() > over {
            bail!(
                "none of its eBPF programs has run in {} s",
                PATIENCE.as_secs()
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// What programs say of their own version.
pub fn versions(product: &Path) -> Vec<(String, String)> {
    let asked: [(&str, &[&str]); 5] = [
        (
            "dpkg-query",
            &["-W", "-f", "libbpf-tools ${Version}", "libbpf-tools"],
        ),
        ("bpftrace", &["--version"]),
        ("prometheus-node-exporter", &["--version"]),
        ("ss", &["-V"]),
        ("tcpstate", &["--version"]),
    ];
    let said = asked.into_iter().filter_map(|(name, arguments)| {
        let path = match name {
            "tcpstate" => product.to_owned(),
            _ => program(name, name).ok()?,
        };
        let output = Command::new(path)
            .args(arguments)
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let line = text.lines().next()?.trim().to_owned();
        output.status.success().then(|| (name.to_owned(), line))
    });
    said.collect()
}
