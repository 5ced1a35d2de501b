//! `tcpstate-bench`: what tcpstate and its peers cost, each measured from outside, in one run. `cargo xtask bench` builds and
//! starts it.
//!
//! A crate of its own: it needs aya for the empty program that all are compared with, which xtask is to be built without, and
//! a release build and tests of its own, which the live tests' program has not. It uses nothing of the product but its program.
//! Arrows: main → what measures (rounds, crowd, memory, stream, scrape) → tools → bpf, process, load; and main → page, chart →
//! bars → figures, which are pure.

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
mod stream;
#[cfg(test)]
mod tests;
mod tools;
mod words;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;

use figures::{Machine, Results};
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
            stream,
        } => run(product, &output, rounds, Duration::from_secs(stream)),
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

fn run(product: PathBuf, output: &Path, rounds: usize, stream: Duration) -> Result<()> {
    fs::create_dir_all(output)?;
    // Another network namespace does not show all of it.
    let machine = ground::machine();
    ground::enter()?;
    ground::descriptors();
    let place = Place {
        product,
        folder: tempfile::tempdir()?,
        loads: Loads::new()?,
    };
    let results = measure(&place, machine, rounds, stream)?;
    let json = serde_json::to_string(&results)?;
    fs::write(output.join("performance.json"), json + "\n")?;
    write_page(output)?;
    println!("{}", page::page(&results));
    Ok(())
}

fn measure(
    place: &Place,
    mut machine: Machine,
    rounds: usize,
    stream: Duration,
) -> Result<Results> {
    let (load, _) = rounds::loads()[0];
    let lacks = lacks(place)?;
    let mut absent = Vec::new();
    let tools = rounds::measure(place, rounds, &mut absent)?;
    let crowd = crowd::measure(place, &load, rounds, &mut absent)?;
    eprintln!("memory");
    let memory = memory::measure(place)?;
    eprintln!("delays");
    let there = |tool: &Tool| tools.iter().any(|measured| measured.tool == *tool);
    let writing = Tool::WRITING.into_iter().filter(there);
    let delays: Result<Vec<_>> = writing
        .clone()
        .map(|tool| stream::delay(tool, place, &load).context(tool.name()))
        .collect();
    eprintln!("starts");
    let starts: Result<Vec<_>> = std::iter::once(Tool::Daemon)
        .chain(writing)
        .map(|tool| stream::start(tool, place, &load, rounds).context(tool.name()))
        .collect();
    eprintln!("the stream, the page");
    let pipe = stream::pipe(place, &load, stream)?;
    let page = scrape::measure(place, rounds)?;
    machine.load_after = ground::load();
    Ok(Results {
        date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
        machine,
        versions: tools::versions(&place.product),
        lacks,
        rounds,
        loads: rounds::loads().map(|(load, _)| load.name.to_owned()).into(),
        tools,
        absent,
        crowd: Some(crowd),
        memory: Some(memory),
        delays: delays?,
        starts: starts?,
        pipe: Some(pipe),
        page: Some(page),
    })
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
