//! A daemon's memory while sockets become more: idle, with 10,000 and 100,000 of them, and just past each doubling of its
//! table between.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::figures::{DOUBLED, Growth};
use crate::held::Held;
use crate::process::{Memory, Process};
use crate::tools::Place;

/// Opened at once, so that the daemon keeps up.
const STEP: u64 = 2_000;
const ROUND_NUMBERS: [u64; 2] = [10_000, 100_000];
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
                peak = daemon.memory_but_ring()?.anonymous.max(peak);
                thread::sleep(SAMPLE);
            }
            anyhow::Ok(peak)
        });
        let grown = grow(&daemon);
        over.store(true, Ordering::Relaxed);
        let peak = peak.join().map_err(|_| anyhow!("a thread failed"))?;
        let (idle, settled) = grown?;
        Ok(Growth {
            idle,
            settled,
            peak: peak?,
        })
    })
}

fn grow(daemon: &Process) -> Result<(Memory, Vec<(u64, Memory)>)> {
    let idle = least(daemon)?;
    let mut held = Held::default();
    let mut settled = Vec::new();
    let mut measured = [&ROUND_NUMBERS[..], &DOUBLED].concat();
    measured.sort_unstable();
    for sockets in measured {
        while held.sockets() < sockets {
            held.grow_to(sockets.min(held.sockets() + STEP))?;
            thread::sleep(TOLD);
        }
        settled.push((held.sockets(), least(daemon)?));
    }
    Ok((idle, settled))
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
