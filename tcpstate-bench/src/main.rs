//! `tcpstate-bench`: what tcpstate and its peers cost, each measured from outside, in one run. `cargo xtask bench` builds and
//! starts it.
//!
//! A crate of its own: it needs aya for the empty program that all are compared with, which xtask is to be built without, and
//! a release build and tests of its own, which the live tests' program has not. It uses nothing of the product but its program.
//! Arrows: main → what measures (rounds, crowd, memory, stream, scrape) → tools → bpf, process, load; and main → page, chart →
//! bars → figures → spread, which are pure.

mod bars;
mod bpf;
mod chart;
mod crowd;
mod figures;
mod ground;
mod held;
mod http;
mod lines;
mod load;
mod memory;
mod page;
mod process;
mod rounds;
mod scrape;
mod spread;
mod stream;
#[cfg(test)]
mod tests;
mod tools;
mod words;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use figures::{Absent, Replay, Results};
use load::Loads;
use tools::{Place, Tool};

/// Measures what tcpstate and its peers cost.
#[derive(Parser)]
enum Command {
    /// Measure, print the page, and write it with the figures and the chart
    Run {
        /// The program `tcpstate`
        #[arg(long)]
        product: PathBuf,
        /// Folder to write to
        #[arg(long)]
        output: PathBuf,
        /// After one that does not count
        #[arg(long, default_value_t = 9)]
        rounds: usize,
        /// A program that replays a stream through the product's table, and prints how quickly
        #[arg(long)]
        replay: Option<PathBuf>,
        /// Seconds of the stream into a pipe
        #[arg(long, default_value_t = 10)]
        stream: u64,
    },
    /// Write page and chart anew from figures in this folder
    Page { folder: PathBuf },
    /// Hold sockets, as the lines of standard input say
    #[command(hide = true)]
    Hold,
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Run {
            product,
            output,
            rounds,
            replay,
            stream,
        } => {
            let wanted = Wanted {
                rounds,
                replay,
                stream: Duration::from_secs(stream),
            };
            run(product, &output, &wanted)
        }
        Command::Page { folder } => write_page(&folder),
        Command::Hold => held::hold(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tcpstate-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Wanted {
    rounds: usize,
    replay: Option<PathBuf>,
    stream: Duration,
}

fn run(product: PathBuf, output: &Path, wanted: &Wanted) -> Result<()> {
    fs::create_dir_all(output)?;
    // Another network namespace does not show all of it.
    let machine = ground::machine()?;
    ground::enter()?;
    ground::descriptors();
    let mut place = Place {
        product,
        folder: tempfile::tempdir()?,
        loads: Loads::new()?,
    };
    let mut results = Results {
        date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
        machine,
        versions: tools::versions(&place.product),
        lacks: lacks(&place)?,
        rounds: wanted.rounds,
        ..Results::default()
    };
    measure(&mut place, wanted, &mut results, &|results| {
        let json = serde_json::to_string(results)?;
        Ok(fs::write(output.join("performance.json"), json + "\n")?)
    })?;
    write_page(output)?;
    println!("{}", page::page(&results));
    Ok(())
}

/// `keep`: is given what there is after each part, so that a failure takes no more than its own.
fn measure(
    place: &mut Place,
    wanted: &Wanted,
    results: &mut Results,
    keep: &dyn Fn(&Results) -> Result<()>,
) -> Result<()> {
    let (rounds, absent) = (wanted.rounds, &mut results.absent);
    let loads = rounds::loads(&place.loads, absent);
    let (load, _) = loads[0];
    results.loads = loads.iter().map(|(load, _)| load.name.to_owned()).collect();
    results.tools = rounds::measure(place, &loads, rounds, absent)?;
    keep(results)?;

    place.renew()?;
    results.crowd = Some(crowd::measure(place, &load, rounds, &mut results.absent)?);
    keep(results)?;

    eprintln!("memory");
    place.renew()?;
    results.memory = Some(memory::measure(place)?);
    keep(results)?;

    eprintln!("delays");
    place.renew()?;
    let writing: Vec<Tool> = Tool::WRITING
        .into_iter()
        .filter(|&tool| results.tool(tool).is_some())
        .collect();
    for &tool in &writing {
        match stream::delay(tool, place, &load) {
            Ok(delay) => results.delays.push(delay),
            Err(error) => results.absent.push(absent_peer(tool, "its delay", error)?),
        }
    }
    keep(results)?;

    eprintln!("starts");
    for tool in std::iter::once(Tool::Daemon).chain(writing) {
        match stream::start(tool, place, &load, rounds) {
            Ok(start) => results.starts.push(start),
            Err(error) => results.absent.push(absent_peer(tool, "its start", error)?),
        }
    }
    keep(results)?;

    eprintln!("the stream, the page");
    place.renew()?;
    results.pipe = Some(stream::pipe(place, wanted.stream)?);
    keep(results)?;
    place.renew()?;
    results.page = Some(scrape::measure(place, &load, rounds)?);
    if let Some(program) = &wanted.replay {
        results.replays = replays(program)?;
    }
    results.machine.load_after = ground::load();
    keep(results)
}

/// # Errors
/// It is no peer: the product must work.
fn absent_peer(tool: Tool, what: &str, error: anyhow::Error) -> Result<Absent> {
    match tool.program() {
        Some(_) => Ok(rounds::gone(&format!("{}, {what}", tool.name()), 0, &error)),
        None => Err(error.context(tool.name())),
    }
}

fn replays(program: &Path) -> Result<Vec<Replay>> {
    eprintln!("the replay");
    let output = std::process::Command::new(program).output();
    let output = output.with_context(|| format!("can't start {}", program.display()))?;
    let replays = lines::replays(&String::from_utf8(output.stdout)?);
    ensure!(
        output.status.success() && !replays.is_empty(),
        "{} printed no replays, and ended with {}",
        program.display(),
        output.status
    );
    Ok(replays)
}

/// Which features of the kernel's the daemon does without.
fn lacks(place: &Place) -> Result<Vec<String>> {
    let daemon = place.daemon()?;
    let metrics = place.metrics()?;
    daemon.end()?;
    let missing = metrics
        .series("tcpstate_kernel_feature")
        .filter(|(_, in_use)| *in_use == 0.0)
        .filter_map(|(labels, _)| Some(labels.split('"').nth(1)?.to_owned()));
    Ok(missing.collect())
}

fn write_page(folder: &Path) -> Result<()> {
    let path = folder.join("performance.json");
    let json =
        fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
    let results: Results = serde_json::from_str(&json)
        .with_context(|| format!("{} holds no figures", path.display()))?;
    fs::write(folder.join("performance.md"), page::page(&results))?;
    fs::write(folder.join("performance.svg"), chart::chart(&results))?;
    Ok(())
}
