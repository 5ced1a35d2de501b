//! The metrics page where it is longest: with as many names of processes as get series of their own. How long one takes, and
//! whether events are lost meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::figures::{BesideLoad, Page};
use crate::held::Holder;
use crate::http;
use crate::lines::told_by_daemon;
use crate::load::Load;
use crate::process::Process;
use crate::tools::Place;

/// More than the 100 that have places.
const NAMES: u64 = 130;
const AT_ONCE: u64 = 8;
/// Scrapes beside the load.
const BESIDE: Duration = Duration::from_secs(2);
/// A scrape makes a snapshot if the last is a second old.
const FRESH: Duration = Duration::from_millis(900);

/// `load`: runs beside pages, after these were timed without.
pub fn measure(place: &Place, load: &Load, rounds: usize) -> Result<Page> {
    let mut daemon = place.daemon()?;
    let mut holder = Holder::start()?;
    holder.under_names(NAMES)?;
    thread::sleep(Duration::from_secs(1));
    let scrape = || http::get_unix(&place.socket(), "/metrics");
    let timed = || -> Result<f64> {
        let begun = Instant::now();
        scrape()?;
        Ok(begun.elapsed().as_secs_f64())
    };
    let page = scrape()?;
    let mut result = Page {
        bytes: page.len() as u64,
        alone: Vec::new(),
        at_once: AT_ONCE,
        slowest: Vec::new(),
        cpu_alone: Vec::new(),
        cpu_at_once: Vec::new(),
        beside_load: None,
    };
    let mut fresh = Instant::now();
    while result.alone.len() < rounds {
        if fresh.elapsed() > FRESH / 2 {
            // With the snapshot; it does not count.
            thread::sleep(FRESH);
            scrape()?;
            fresh = Instant::now();
        }
        let before = daemon.cpu()?;
        result.alone.push(timed()?);
        let between = daemon.cpu()?;
        let slowest = thread::scope(|scope| {
            let all: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(timed)).collect();
            let mut slowest: f64 = 0.0;
            for one in all {
                let took = one.join().map_err(|_| anyhow!("a thread failed"))?;
                slowest = slowest.max(took?);
            }
            anyhow::Ok(slowest)
        });
        result.slowest.push(slowest?);
        let after = daemon.cpu()?;
        result.cpu_alone.push((between - before).as_secs_f64());
        result.cpu_at_once.push((after - between).as_secs_f64());
    }
    result.beside_load = Some(beside_load(place, load, &mut daemon)?);
    daemon.end().context("the daemon")?;
    Ok(result)
}

/// One page after the other.
fn beside_load(place: &Place, load: &Load, daemon: &mut Process) -> Result<BesideLoad> {
    let before = place.metrics()?;
    let over = AtomicBool::new(false);
    let (made, pages) = thread::scope(|scope| {
        let scraping = scope.spawn(|| -> Result<u64> {
            let mut pages = 0;
            while !over.load(Ordering::Relaxed) {
                http::get_unix(&place.socket(), "/metrics")?;
                pages += 1;
            }
            Ok(pages)
        });
        let made = place.loads.run(load, BESIDE);
        over.store(true, Ordering::Relaxed);
        let pages = scraping.join().map_err(|_| anyhow!("a thread failed"))?;
        anyhow::Ok((made?, pages?))
    })?;
    daemon.settle()?;
    let after = place.metrics()?;
    let told = told_by_daemon(made.transitions, made.connections, &before, &after);
    Ok(BesideLoad { pages, told })
}
