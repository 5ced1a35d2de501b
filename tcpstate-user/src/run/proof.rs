//! The live proof of `check`: loopback connections of our own, and whether all that happens to them is told, in order and
//! with their owner.

use std::io::{self, Read as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use rustix::net::{Shutdown, shutdown, sockopt};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::attach;
use super::streams::Batch;
use super::tracer::{self, Tracer};
use crate::filter::{Filter, Subscription};
use crate::kernel::{Path, RingSize, Session, StartError, netns};
use crate::model::check::{Actor, Proof};
use crate::model::view::Feature;
use crate::model::{Line, LossReason, Named as _, NetnsSelection, Transition};
use crate::owner::in_initial_pid_namespace;

/// How long connections and what is told of them may take; on the classic tracepoint a dump must show TIME_WAIT.
const PATIENCE: Duration = Duration::from_secs(10);

const RECONCILE_INTERVAL: Duration = Duration::from_millis(500);

/// What a dump shows is dated by the kernel's timers, whose ticks are up to 10 ms long, and a stream has nothing that is
/// dated before its beginning.
const BEFORE: Duration = Duration::from_millis(50);

/// Where the kernel skipped the program, and said so, another try says more.
const TRIES: usize = 3;

/// How tracing began, and what came of it.
pub struct Performed {
    pub path: Path,
    pub features: Vec<(Feature, Result<(), String>)>,
    pub proof: Proof,
}

/// On a thread of its own, which goes into a network namespace of its own if it may.
///
/// # Errors
/// Tracing does not start.
pub fn perform(without: Vec<Feature>) -> anyhow::Result<Performed> {
    thread::Builder::new()
        .name("proof".to_owned())
        .spawn(move || perform_here(&without))
        .context("can't start a thread")?
        .join()
        .map_err(|_| anyhow!("the proof's thread failed"))?
}

fn perform_here(without: &[Feature]) -> anyhow::Result<Performed> {
    let own_namespace = netns::enter_new();
    let inode = match own_namespace {
        Ok(inode) => inode,
        Err(_) => netns::own().context("can't tell the own network namespace")?,
    };
    let attach =
        |netns| attach(netns, RingSize::default(), without).map(|session| (netns, session));
    let attached = attach(NetnsSelection::One(inode));
    let (netns, session) = attached.or_else(|error| match error.downcast_ref() {
        Some(StartError::NetnsUnknown) => attach(NetnsSelection::All),
        _ => Err(error),
    })?;
    let features = session.features();
    Ok(Performed {
        path: session.path(),
        features: features
            .map(|(feature, in_use)| (feature, in_use.map_err(str::to_owned)))
            .collect(),
        proof: match prove(session, netns) {
            Ok((pid, actors)) => Proof::Done {
                own_namespace: own_namespace.is_ok(),
                pid,
                actors,
            },
            Err(error) => Proof::Undecided(format!("{error:#}")),
        },
    })
}

type Told = Vec<(Actor, Result<(), String>)>;

fn prove(session: Session, netns: NetnsSelection) -> anyhow::Result<(Option<u32>, Told)> {
    // In another pid namespace nobody can tell us the pid that the kernel knows us by.
    let pid = in_initial_pid_namespace().then(std::process::id);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .context("can't start the runtime")?;
    let options = tracer::Options {
        netns,
        reconcile_interval: RECONCILE_INTERVAL,
        // Nobody asks for the statistics.
        max_comms: 0,
    };
    let (tracer, thread) = Tracer::start(session, options).context("can't start the tracer")?;
    let mut batches = runtime.block_on(tracer.subscribe(Subscription {
        filter: Filter::default(),
        raw: false,
        netns: None,
    }))?;
    thread::sleep(BEFORE);
    let mut tries = 0;
    let told = loop {
        tries += 1;
        let ends = within(PATIENCE, connections).context("no loopback connection")?;
        let (told, skipped) = collect(&runtime, &mut batches, &ends, pid);
        if !skipped || tries == TRIES || told.iter().all(|(_, told)| told.is_ok()) {
            break told;
        }
    };
    tracer.stop();
    drop(batches);
    let ended = thread
        .join()
        .map_err(|_| anyhow!("the tracer's thread failed"))?;
    ended.context("can't read the ring")?;
    Ok((pid, told))
}

/// Who has which end.
struct Ends {
    listener: SocketAddr,
    closing: SocketAddr,
    resetting: SocketAddr,
}

/// Has it done by a thread that may hang.
fn within<T: Send + 'static>(
    time: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (done, result) = channel();
    thread::Builder::new().spawn(move || {
        // Nobody may wait any more.
        let _ = done.send(work());
    })?;
    match result.recv_timeout(time) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("a thread failed")),
    }
}

/// One connection is closed by both, one is reset. All sockets are gone afterwards, but for a TIME_WAIT.
fn connections() -> io::Result<Ends> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let connect = || {
        let client = TcpStream::connect(address)?;
        let near = client.local_addr()?;
        // Somebody else may connect as well.
        loop {
            let (server, from) = listener.accept()?;
            if from == near {
                return Ok::<_, io::Error>((client, server, near));
            }
        }
    };
    let (mut client, mut server, closing) = connect()?;
    // It keeps the socket, so that FIN_WAIT2 is nobody's orphan.
    shutdown(&client, Shutdown::Write)?;
    wait_for_end(&mut server);
    drop(server);
    wait_for_end(&mut client);
    drop(client);

    let (client, mut server, resetting) = connect()?;
    sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
    drop(client);
    wait_for_end(&mut server);
    Ok(Ends {
        listener: address,
        closing,
        resetting,
    })
}

/// No data comes: what comes is the end, or a reset.
fn wait_for_end(stream: &mut TcpStream) {
    let _ = stream.read(&mut [0]);
}

/// Takes lines until all is told, or time is over; and whether the kernel skipped the program meanwhile.
fn collect(
    runtime: &Runtime,
    batches: &mut mpsc::Receiver<Batch>,
    ends: &Ends,
    pid: Option<u32>,
) -> (Told, bool) {
    let end = Instant::now() + PATIENCE;
    let mut transitions = Vec::new();
    let mut skipped = false;
    loop {
        let told = judge(&transitions, ends, pid);
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || told.iter().all(|(_, told)| told.is_ok()) {
            return (told, skipped);
        }
        let next = runtime.block_on(async { tokio::time::timeout(left, batches.recv()).await });
        let Ok(Some(batch)) = next else {
            return (told, skipped);
        };
        for line in batch {
            match line {
                Line::Transition(transition) => transitions.push(transition),
                Line::Lost(loss) => skipped |= loss.reason == LossReason::Recursion,
                Line::Start(_) | Line::Socket(_) => {}
            }
        }
    }
}

fn judge(transitions: &[Transition], ends: &Ends, pid: Option<u32>) -> Told {
    let mut pid = pid;
    let actors = Actor::ALL.iter();
    actors
        .map(|&actor| {
            (
                actor,
                told_right(actor, &lines_of(actor, transitions, ends), &mut pid),
            )
        })
        .collect()
}

/// All that is told of the actor's socket: its first line may lack its ends.
fn lines_of<'a>(actor: Actor, transitions: &'a [Transition], ends: &Ends) -> Vec<&'a Transition> {
    let listener = ends.listener.port();
    let (local, remote) = match actor {
        Actor::Listener => (listener, None),
        Actor::ClosingClient => (ends.closing.port(), Some(listener)),
        Actor::ClosingServer => (listener, Some(ends.closing.port())),
        Actor::ResettingClient => (ends.resetting.port(), Some(listener)),
        Actor::ResetServer => (listener, Some(ends.resetting.port())),
    };
    let id = transitions
        .iter()
        .find(|line| line.local.port == Some(local) && line.remote.port == remote)
        .map(|line| line.id);
    let lines = transitions.iter();
    lines.filter(|line| Some(line.id) == id).collect()
}

/// `pid`: the owner; where it can't be known beforehand, who is the first to be told as such.
fn told_right(actor: Actor, lines: &[&Transition], pid: &mut Option<u32>) -> Result<(), String> {
    let mut told = lines.iter();
    for step in actor.course().windows(2) {
        let (from, to) = (step[0], step[1]);
        let Some(line) = told.next() else {
            return Err(format!("{from} -> {to} did not arrive"));
        };
        if (line.from, line.to) != (from, to) {
            return Err(format!(
                "{from} -> {to} is missing where {} -> {} arrived",
                line.from, line.to
            ));
        }
        let Some(owner) = line.owner else {
            return Err(format!("{from} -> {to} has no owner"));
        };
        let expected = *pid.get_or_insert(owner.process.pid);
        if owner.process.pid != expected {
            return Err(format!(
                "{from} -> {to} has the owner {}, not {expected}",
                owner.process.pid
            ));
        }
    }
    match told.next() {
        Some(line) => Err(format!("{} -> {} was not expected", line.from, line.to)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        ConnectionId, Endpoint, Evidence, Family, Owner, OwnerSource, Process, TcpState,
    };

    const PID: u32 = 77;

    fn ends() -> Ends {
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ends {
            listener: at(1000),
            closing: at(1001),
            resetting: at(1002),
        }
    }

    /// What a kernel tells of it all.
    fn all() -> Vec<Transition> {
        let ports = [
            (Actor::Listener, 1000, None),
            (Actor::ClosingClient, 1001, Some(1000)),
            (Actor::ClosingServer, 1000, Some(1001)),
            (Actor::ResettingClient, 1002, Some(1000)),
            (Actor::ResetServer, 1000, Some(1002)),
        ];
        let mut all = Vec::new();
        for (id, (actor, local, remote)) in (0..).zip(ports) {
            let end = |port: Option<u16>| Endpoint {
                addr: port.map(|_| Ipv4Addr::LOCALHOST.into()),
                port,
            };
            for step in actor.course().windows(2) {
                // The kernel chooses it later.
                let unbound = step[1] == TcpState::SYN_SENT;
                all.push(Transition {
                    time_ns: 0,
                    id: ConnectionId::Own(id),
                    cookie: None,
                    netns: None,
                    family: Family::Ipv4,
                    local: end((!unbound).then_some(local)),
                    remote: end(remote),
                    from: step[0],
                    to: step[1],
                    dwell_ns: None,
                    evidence: Evidence::Tracepoint,
                    role: None,
                    owner: Some(Owner {
                        process: Process {
                            pid: PID,
                            start_ns: 0,
                            comm: None,
                        },
                        source: OwnerSource::Connect,
                    }),
                    uid: None,
                    container: None,
                    end: None,
                });
            }
        }
        all
    }

    fn wrong(transitions: &[Transition], pid: Option<u32>) -> Vec<(Actor, String)> {
        let told = judge(transitions, &ends(), pid);
        assert_eq!(told.len(), Actor::ALL.len());
        let wrong = told.into_iter();
        wrong
            .filter_map(|(actor, told)| Some((actor, told.err()?)))
            .collect()
    }

    #[test]
    fn all_that_is_told_right_is_right() {
        assert_eq!(wrong(&all(), Some(PID)), []);
        assert_eq!(wrong(&all(), None), []);
    }

    #[test]
    fn a_line_that_lacks_is_named() {
        for index in 0..all().len() {
            let mut transitions = all();
            let lacks = transitions.remove(index);
            let step = format!("{} -> {}", lacks.from, lacks.to);
            let wrong = wrong(&transitions, Some(PID));
            assert_eq!(wrong.len(), 1, "{wrong:?}");
            assert!(wrong[0].1.starts_with(&step), "{step}: {wrong:?}");
        }
    }

    #[test]
    fn a_line_too_many_is_named() {
        let mut transitions = all();
        let again = transitions[2].clone();
        transitions.push(again);
        let text = "CLOSE -> SYN_SENT was not expected".to_owned();
        assert_eq!(
            wrong(&transitions, Some(PID)),
            [(Actor::ClosingClient, text)]
        );
    }

    #[test]
    fn an_owner_that_is_another_or_none_is_named() {
        let mut transitions = all();
        transitions[3].owner = None;
        let text = "SYN_SENT -> ESTABLISHED has no owner".to_owned();
        assert_eq!(wrong(&transitions, None), [(Actor::ClosingClient, text)]);

        let mut transitions = all();
        if let Some(owner) = &mut transitions[3].owner {
            owner.process.pid = 5;
        }
        let text = "SYN_SENT -> ESTABLISHED has the owner 5, not 77".to_owned();
        for pid in [Some(PID), None] {
            let wrong = wrong(&transitions, pid);
            assert_eq!(wrong, [(Actor::ClosingClient, text.clone())]);
        }
    }
}
