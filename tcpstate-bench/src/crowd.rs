//! Who looks at all sockets about each second, beside many of them: node_exporter, `ss`, and the daemon, which is scraped as often.

use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::figures::{Absent, Crowd, Poll, Poller};
use crate::held::Held;
use crate::http;
use crate::load::Load;
use crate::process::{Process, time_of_children};
use crate::rounds::{gone, order};
use crate::tools::{LISTEN, Place, program};

const SOCKETS: u64 = 50_000;
/// The daemon has the kernel list sockets for a scrape if its last list is a second old: so old it is at each look.
const EACH: Duration = Duration::from_millis(1100);
/// Looks in a round; the first comes in the middle of its time.
const LOOKS: u32 = 3;
const NODE_EXPORTER: (&str, &str) = ("prometheus-node-exporter", "prometheus-node-exporter");
const NODE_LISTEN: &str = "127.0.0.1:9100";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Nobody,
    Daemon,
    NodeExporter,
    Ss,
}

impl Who {
    const ALL: [Self; 4] = [Self::Nobody, Self::Daemon, Self::NodeExporter, Self::Ss];

    const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Daemon => "`tcpstate daemon`, scraped each 1.1 s",
            Self::NodeExporter => "node_exporter `tcpstat`, scraped each 1.1 s",
            Self::Ss => "`ss -tanp`, each 1.1 s",
        }
    }
}

/// `absent`: takes those who can't be had.
pub fn measure(
    place: &Place,
    load: &Load,
    rounds: usize,
    absent: &mut Vec<Absent>,
) -> Result<Crowd> {
    let mut held = Held::default();
    held.grow_to(SOCKETS)?;
    let mut pollers = Who::ALL.map(|who| Poller {
        name: who.name().to_owned(),
        rounds: Vec::new(),
    });
    let mut without = Vec::new();
    for number in 0..=rounds {
        eprintln!("round {number} of {rounds}, beside {SOCKETS} sockets");
        for index in order(Who::ALL.len(), number) {
            let (who, rounds) = (Who::ALL[index], &mut pollers[index].rounds);
            if without.contains(&who) {
                continue;
            }
            match poll(who, place, load) {
                Ok(_) if number == 0 => {}
                Ok(poll) => rounds.push(poll),
                Err(error) if matches!(who, Who::NodeExporter | Who::Ss) => {
                    absent.push(gone(who.name(), rounds.len(), &error));
                    without.push(who);
                }
                Err(error) => return Err(error.context(who.name())),
            }
        }
    }
    Ok(Crowd {
        sockets: held.sockets(),
        pollers: pollers
            .into_iter()
            .filter(|it| !it.rounds.is_empty())
            .collect(),
    })
}

fn poll(who: Who, place: &Place, load: &Load) -> Result<Poll> {
    let process = match who {
        Who::Nobody | Who::Ss => None,
        Who::Daemon => Some(place.daemon()?),
        Who::NodeExporter => Some(node_exporter()?),
    };
    let ss = program("ss", "iproute2");
    let look = || -> Result<()> {
        match who {
            Who::Nobody => {}
            Who::Daemon => drop(http::get_tcp(LISTEN, "/metrics")?),
            Who::NodeExporter => {
                let page = http::get_tcp(NODE_LISTEN, "/metrics")?;
                if !page.contains("\nnode_tcp_connection_states{") {
                    bail!("node_exporter's page has no node_tcp_connection_states");
                }
            }
            Who::Ss => {
                let ss = ss.as_ref().map_err(|error| anyhow!("{error:#}"))?;
                let mut ss = Command::new(ss);
                ss.arg("-tanp").stdout(File::create("/dev/null")?);
                Process::start(&mut ss)?.done()?;
            }
        }
        Ok(())
    };
    // What comes first may take longer.
    look()?;
    thread::sleep(EACH / 2);
    let cpu = || match &process {
        Some(process) => process.cpu().map(Some),
        None if who == Who::Ss => Ok(Some(time_of_children()?)),
        None => Ok(None),
    };
    let before = cpu()?;
    let over = AtomicBool::new(false);
    let begun = Instant::now();
    let (made, looks) = thread::scope(|scope| {
        let looking = scope.spawn(|| -> Result<Vec<f64>> {
            let mut looks = Vec::new();
            if who == Who::Nobody {
                return Ok(looks);
            }
            loop {
                let next = begun + EACH / 2 + EACH * looks.len() as u32;
                while Instant::now() < next && !over.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(5));
                }
                if over.load(Ordering::Relaxed) {
                    return Ok(looks);
                }
                let now = Instant::now();
                look()?;
                looks.push(now.elapsed().as_secs_f64());
            }
        });
        let made = place.loads.run(load, EACH * LOOKS);
        over.store(true, Ordering::Relaxed);
        let looks = looking.join().map_err(|_| anyhow!("a thread failed"))?;
        anyhow::Ok((made?, looks?))
    })?;
    // A look may last longer than the load.
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = before.zip(cpu()?).map(|(before, after)| after - before);
    if let Some(process) = process {
        process.end()?;
    }
    Ok(Poll {
        made,
        cpu: cpu.map(|cpu| cpu.as_secs_f64() / seconds),
        looks,
    })
}

/// With nothing but the collector that is compared.
fn node_exporter() -> Result<Process> {
    let (name, package) = NODE_EXPORTER;
    let path = program(name, package)
        .or_else(|error| program("node_exporter", package).map_err(|_| error))?;
    let mut command = Command::new(path);
    command
        .args([
            "--collector.disable-defaults",
            "--collector.tcpstat",
            "--web.listen-address",
            NODE_LISTEN,
        ])
        .stderr(Stdio::null());
    let mut process = Process::start(&mut command)?;
    let over = Instant::now() + Duration::from_secs(10);
    while http::get_tcp(NODE_LISTEN, "/").is_err() {
        process.check()?;
        if Instant::now() > over {
            bail!("node_exporter does not answer at {NODE_LISTEN}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    process.settle().context("node_exporter")?;
    Ok(process)
}
