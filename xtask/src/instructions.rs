//! A guard of speed that other work on the machine does not move: callgrind counts the instructions that the replay of a
//! fixed stream takes, and these must be those of a figure in the repository.
//!
//! The replay is `tcpstate-user/benches/replay`. It is built as one static file by the pinned tool chain, so that what is
//! counted is the same on each machine.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{build, host};

const FIGURE: &str = "tcpstate-user/benches/replay/instructions";
/// Function of the replay: what makes the stream does not count.
const COUNTED: &str = "replay::replay";
const PERCENT: u64 = 3;

pub fn check() -> Result<()> {
    let file = host::root().join(FIGURE);
    let text = fs::read_to_string(&file).with_context(|| format!("can't read {FIGURE}"))?;
    let expected = figure(&text).with_context(|| format!("{FIGURE} has no figure"))?;
    let counted = count()?;
    println!("{counted} instructions, {expected} in {FIGURE}");
    if counted.abs_diff(expected) > expected * PERCENT / 100 {
        bail!(
            "the replay takes {counted} instructions, and {expected} within {PERCENT}% were expected: if that is meant, \
             write the figure into {FIGURE} and the reason into the commit"
        );
    }
    Ok(())
}

fn count() -> Result<u64> {
    let replay = build::static_replay()?;
    let profile = host::target().join("replay.callgrind");
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--quiet", "--collect-atstart=no"])
        .arg(format!("--toggle-collect={COUNTED}"))
        .arg(format!("--callgrind-out-file={}", profile.display()))
        .arg(&replay)
        .arg("once");
    host::output(&mut command)?;
    let text = fs::read_to_string(&profile)
        .with_context(|| format!("can't read {}", profile.display()))?;
    total(&text).with_context(|| format!("callgrind counted nothing of {COUNTED}"))
}

/// The first line that is no comment.
fn figure(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.next()?.trim().parse().ok()
}

/// Of a profile as callgrind writes it.
fn total(profile: &str) -> Option<u64> {
    let total = profile
        .lines()
        .find_map(|line| line.strip_prefix("summary:"))?;
    total.trim().parse().ok().filter(|&count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read() {
        assert_eq!(figure("# Raised: why.\n12345\n"), Some(12345));
        assert_eq!(figure("# 12345\n"), None);
        assert_eq!(total("events: Ir\nsummary: 67\n\nfn=(1) x\n"), Some(67));
        assert_eq!(total("events: Ir\nsummary: 0\n"), None);
    }

    #[test]
    fn the_repository_has_a_figure() {
        let text = fs::read_to_string(host::root().join(FIGURE)).unwrap();
        assert!(figure(&text).is_some());
    }
}
