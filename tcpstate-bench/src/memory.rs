//! A daemon's memory while sockets become more: idle, with 10,000 and 100,000 of them, and at each step between, so that
//! what a table takes just past a doubling can't hide.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::figures::Growth;
use crate::held::Held;
use crate::process::{Memory, Process};
use crate::tools::Place;

const STEP: u64 = 2_000;
const MOST: u64 = 120_000;
/// Where it is waited for what is free to go back.
const SETTLED: [u64; 2] = [10_000, 100_000];
/// The daemon gives back what is free each 10 s.
const GIVEN_BACK: Duration = Duration::from_secs(12);
/// The daemon looks into its ring each 25 ms at least.
const TOLD: Duration = Duration::from_millis(80);
const SAMPLE: Duration = Duration::from_millis(3);

pub fn measure(place: &Place) -> Result<Growth> {
    let daemon = place.daemon()?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let peak = scope.spawn(|| {
            let mut peak = 0;
            while !over.load(Ordering::Relaxed) {
                peak = daemon.memory()?.anonymous.max(peak);
                thread::sleep(SAMPLE);
            }
            anyhow::Ok(peak)
        });
        let grown = grow(&daemon);
        over.store(true, Ordering::Relaxed);
        let peak = peak.join().map_err(|_| anyhow!("a thread failed"))?;
        let (idle, steps, settled) = grown?;
        Ok(Growth {
            idle,
            steps,
            settled,
            peak: peak?,
        })
    })
}

type Steps = Vec<(u64, Memory)>;

fn grow(daemon: &Process) -> Result<(Memory, Steps, Steps)> {
    let idle = least(daemon)?;
    let mut held = Held::default();
    let (mut steps, mut settled) = (Vec::new(), Vec::new());
    for sockets in (STEP..=MOST).step_by(STEP as usize) {
        held.grow_to(sockets)?;
        thread::sleep(TOLD);
        steps.push((held.sockets(), daemon.memory()?));
        if SETTLED.contains(&sockets) {
            settled.push((held.sockets(), least(daemon)?));
        }
    }
    Ok((idle, steps, settled))
}

/// What it has when what is free has gone back, and no dump is just being read.
fn least(daemon: &Process) -> Result<Memory> {
    let over = Instant::now() + GIVEN_BACK;
    let mut least = daemon.memory()?;
    while Instant::now() < over {
        thread::sleep(TOLD);
        let now = daemon.memory()?;
        if now.anonymous < least.anonymous {
            least = now;
        }
    }
    Ok(least)
}
