//! docs/performance.md: the page of a run, all of it from its figures. Written by no other hand; what was tried, and what did
//! not pay, stands in `tried.md`.

use crate::bars::{Verdict, bars};
use crate::figures::{Absent, Crowd, Growth, Results, ToldInAll};
use crate::load::Made;
use crate::process::Memory;
use crate::spread::{Spread, quantile};
use crate::tools::Tool;
use crate::words::{Table, grouped, or_dash};

const HEAD: &str = "\
# Performance

What tcpstate costs, and what its peers cost, measured in one run on one machine. `cargo xtask bench --peers --long --write` repeats it \
as root, on any Linux host with BTF, and writes this page, [the figures of each round](performance.json) and the chart. Without \
`--write` the page lies in `target/bench` and on your screen. The figures are this machine's: compare within the page, not \
between machines.

![Connections a second, and time in the kernel, by tool](performance.svg)

";

const HOW: &str = "
## How it was measured

- **Load.** Our own: connections over the loopback of a network namespace of its own, opened and ended as fast as one thread \
goes, pinned to the last processor (or a thread on each). What is reset gives 6 transitions at its two ends, what both ends close \
gives 10. The load counts what it made, and every tool's lines or counts are compared with that. `tcp_max_tw_buckets` is 5,000 in \
that namespace, so that ports don't run out: most full closes make no TIME_WAIT. Each part has a namespace of its own, with none \
left over from the part before.
- **Missing** is what the load made, less what was told of it. Lines are counted if they are of the load's ports, and not found by a \
dump only. The daemon's count is of what reached it, not what its kernel side counted: its connections, as many of all transitions \
as of the connections made, or, where no program tells more than transitions, its records, if these are fewer. What the kernel hides from every eBPF program ([principles.md](principles.md), known drift) is \
missing too, and no tool can say so.
- **Rounds.** In each round every tool once, alone, one after the other, in another order each time, so that each comes right after \
each other about equally often; the first round does not count. Ratios are of the same round, `untraced, again` shows what the machine itself is worth. Figures are medians, with the quartiles \
in parentheses: half of all rounds lie between them. The replay's are the least and the most.
- **Time in the kernel** is what the kernel's BPF statistics say (as with `kernel.bpf_stats_enabled=1`), on only for an interval of \
their own. Of a tool with one program it is the time for each of its runs; of several programs it is all their time, divided by \
the load's transitions. It holds what measuring adds, the same for all.
- **Processor time beside open sockets** is for each second until the last look has ended. A scrape each 1.1 s has the daemon ask \
the kernel for sockets each time: it does so if the last answer is a second old.
- **Processor time** is user and system time of the tool's process, until it has caught up after the load. The daemon is not \
scraped meanwhile.
- **Memory** is `RssAnon`, `RssFile` and `RssShmem` of `/proc/PID/status`, which newer kernels count in batches: some 0.1 MB for \
each processor may be missing.
- **Delay** goes from the moment before the client closes to the moment in which the line that tells it was read from a pipe, at \
1,000 connections a second.
- tcpstate sees only that namespace (`--netns self`), so that it can be compared with the load exactly; all else is as by default. \
The peers see the whole host: what others do there counts among what they told. What the kernel skipped is told of the whole \
host too.
- bpftrace's histogram: how long sockets were in the state that they leave, by state, kept in the kernel. `printf`: ports, states, pid \
and name. The programs are in `tcpstate-bench/src/tools.rs`.
";

pub fn page(results: &Results) -> String {
    measured(results) + "\n" + include_str!("tried.md")
}

/// Without what was tried.
pub fn measured(results: &Results) -> String {
    let mut page = HEAD.to_owned();
    page += &machine(results);
    page += &bars_table(results);
    page += &rates(results);
    page += &costs(results);
    page += &results.crowd.as_ref().map_or(String::new(), crowd);
    page += &results.memory.as_ref().map_or(String::new(), memory);
    page += &delays(results);
    page += &starts(results);
    page += HOW;
    if !results.absent.is_empty() {
        page += "\n## Not measured\n\n";
        for Absent { what, why } in &results.absent {
            page += &format!("- {what}: {why}\n");
        }
    }
    page
}

fn machine(results: &Results) -> String {
    let machine = &results.machine;
    let load = |load: Option<f64>| or_dash(load.map(|load| format!("{load:.2}")));
    let mut text = format!(
        "Measured {}: Linux {}, {} processors ({}{}), clocksource {}, bpf_jit_enable {}, load average {} before and {} after; {} \
         rounds.\n",
        results.date,
        or_dash(machine.kernel.as_ref()),
        machine.processors,
        or_dash(machine.model.as_ref()),
        match machine.hypervisor {
            Some(true) => ", virtual",
            _ => "",
        },
        or_dash(machine.clocksource.as_ref()),
        or_dash(machine.jit.as_ref()),
        load(machine.load_before),
        load(machine.load_after),
        results.rounds,
    );
    text += &format!("Spectre v2: {}.\n", or_dash(machine.spectre_v2.as_ref()));
    let versions: Vec<&str> = results
        .versions
        .iter()
        .map(|(_, said)| said.as_str())
        .collect();
    text += &format!("Versions: {}.\n", versions.join("; "));
    if !results.lacks.is_empty() {
        text += &format!(
            "This kernel lacks, or refuses, {}: what these add is not in the figures.\n",
            results.lacks.join(", ")
        );
    }
    text
}

fn bars_table(results: &Results) -> String {
    let mut table = Table::new(&["what", "bar", "measured", "met"]);
    for bar in bars(results) {
        let met = match bar.verdict {
            Verdict::Met => "yes".to_owned(),
            Verdict::NotMet => "**no**".to_owned(),
            Verdict::Said => "said".to_owned(),
            Verdict::Unknown(why) => format!("not told: {why}"),
        };
        table.row([bar.what.to_owned(), bar.bar.to_owned(), bar.measured, met]);
    }
    format!("\n## What we hold ourselves to\n\n{}", table.text())
}

fn rates(results: &Results) -> String {
    format!(
        "\n## Connections a second\n\nBy the clock: what a tool takes from a host, its own work on the processors included.\n\n{}\n\
         For each second of processor time that the load itself took, with all that the kernel does in its calls: what a tool \
         makes these calls dearer, whatever else the machine does.\n\n{}",
        rate_table(results, Made::rate, "a second"),
        rate_table(results, Made::rate_of_work, "a second of work"),
    )
}

fn rate_table(results: &Results, rate: fn(Made) -> f64, unit: &str) -> String {
    let loads: Vec<&str> = results.loads.iter().map(String::as_str).collect();
    let mut table = Table::new(&[&["against untraced"][..], &loads].concat());
    let Some(untraced) = results.tool(Tool::Untraced) else {
        return String::new();
    };
    for measured in &results.tools {
        let cell = |load| match measured.tool {
            Tool::Untraced => or_dash(
                measured
                    .rate(load, rate)
                    .map(|rate| format!("{} {unit}", grouped(rate.median as u64))),
            ),
            _ => or_dash(
                measured
                    .rate_against(untraced, load, rate)
                    .map(|ratio| format!("{ratio:.3}")),
            ),
        };
        let cells = (0..loads.len()).map(cell);
        table.row(std::iter::once(measured.tool.name().to_owned()).chain(cells));
    }
    table.text()
}

fn costs(results: &Results) -> String {
    let mut table = Table::new(&[
        "tool",
        "in the kernel, ns a transition",
        "against the empty program",
        "processor, s a million transitions",
        "missing",
        "said to be lost",
        "anonymous memory after the load, MB",
        "resident in all, MB",
    ]);
    let floor = results.tool(Tool::Floor);
    for measured in &results.tools {
        if matches!(measured.tool, Tool::Untraced | Tool::UntracedAgain) {
            continue;
        }
        let shown = |spread: Option<Spread>, digits: usize| {
            or_dash(spread.map(|spread| format!("{spread:.digits$}")))
        };
        let told = measured.told();
        table.row([
            measured.tool.name().to_owned(),
            shown(measured.kernel_ns(), 0),
            shown(floor.and_then(|floor| measured.kernel_against(floor)), 2),
            shown(measured.cpu(), 2),
            or_dash(told.map(missing)),
            or_dash(told.map(|told| grouped(told.said_lost))),
            shown(measured.memory(|memory| memory.anonymous), 1),
            shown(measured.memory(|memory| memory.resident()), 1),
        ]);
    }
    let rounds = results.tools.iter().flat_map(|it| &it.rounds);
    let foreign = rounds.filter_map(|round| round.foreign).reduce(f64::max);
    let foreign = foreign.map_or(String::new(), |foreign| {
        format!(
            "\nTo the load's transitions, by which the time of tools with several programs is divided, others of this host added {:.2} % \
             at most.\n",
            foreign * 100.0
        )
    });
    format!("\n## What a transition costs\n\n{}{foreign}", table.text())
}

fn missing(told: ToldInAll) -> String {
    let expected = grouped(told.expected);
    let mut text = match told.missing {
        0 => format!("0 of {expected}"),
        missing => format!(
            "{} of {expected} ({:.2} %)",
            grouped(missing),
            100.0 * missing as f64 / told.expected as f64
        ),
    };
    if told.of_others > 0 {
        text += &format!(", and {} of others", grouped(told.of_others));
    }
    text
}

fn crowd(crowd: &Crowd) -> String {
    let mut table = Table::new(&[
        "who looks",
        "connections a second, against nobody",
        "processor, of one",
        "looks a round",
        "a look, ms",
    ]);
    let Some(nobody) = crowd.pollers.first() else {
        return String::new();
    };
    for poller in &crowd.pollers {
        let both = poller.rounds.iter().zip(&nobody.rounds);
        let ratios: Vec<f64> = both
            .map(|(ours, theirs)| ours.made.rate() / theirs.made.rate())
            .collect();
        let cpu: Option<Vec<f64>> = poller.rounds.iter().map(|round| round.cpu).collect();
        let looks: Vec<f64> = poller
            .rounds
            .iter()
            .flat_map(|round| &round.looks)
            .map(|seconds| seconds * 1e3)
            .collect();
        table.row([
            poller.name.clone(),
            or_dash(Spread::of(&ratios).map(|ratio| format!("{ratio:.3}"))),
            or_dash(
                cpu.and_then(|cpu| Spread::of(&cpu))
                    .map(|cpu| format!("{cpu:.3}")),
            ),
            match looks.is_empty() {
                true => or_dash(None::<u8>),
                false => format!("{:.1}", looks.len() as f64 / poller.rounds.len() as f64),
            },
            or_dash(Spread::of(&looks).map(|look| format!("{look:.0}"))),
        ]);
    }
    format!(
        "\n## Beside {} open sockets\n\nThe first load, with those who look at all sockets about each second.\n\n{}",
        grouped(crowd.sockets),
        table.text()
    )
}

fn memory(growth: &Growth) -> String {
    let mut table = Table::new(&[
        "sockets",
        "anonymous, MB",
        "a socket, B",
        "of files, MB",
        "shared, MB",
        "of these two the ring, MB",
    ]);
    let megabytes = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
    let mut row = |sockets: &str, memory: Memory, each: Option<f64>| {
        table.row([
            sockets.to_owned(),
            megabytes(memory.anonymous),
            or_dash(each.map(|each| format!("{each:.0}"))),
            megabytes(memory.file),
            megabytes(memory.shared),
            or_dash(memory.ring.map(megabytes)),
        ]);
    };
    row("none (idle)", growth.idle, None);
    for &(sockets, memory) in &growth.settled {
        let grown = memory.anonymous.saturating_sub(growth.idle.anonymous);
        row(
            &grouped(sockets),
            memory,
            Some(grown as f64 / sockets as f64),
        );
    }
    format!(
        "\n## The daemon's memory\n\nThe least within twelve seconds after the sockets were opened: what is free goes back within ten. The ring's pages are \
         mapped twice, and count twice. The most anonymous memory that was seen, by looking each 3 ms, was {} MB.\n\n{}",
        megabytes(growth.peak),
        table.text()
    )
}

fn delays(results: &Results) -> String {
    if results.delays.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[
        "tool",
        "p50, ms",
        "p99, ms",
        "the most, ms",
        "lines of connections",
    ]);
    for delay in &results.delays {
        let at = |share| {
            or_dash(
                quantile(&delay.percentiles, share).map(|seconds| format!("{:.1}", seconds * 1e3)),
            )
        };
        table.row([
            delay.tool.name().to_owned(),
            at(0.5),
            at(0.99),
            at(1.0),
            format!("{} of {}", grouped(delay.told), grouped(delay.connections)),
        ]);
    }
    format!("\n## From a transition to its line\n\n{}", table.text())
}

fn starts(results: &Results) -> String {
    if results.starts.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["tool", "ms"]);
    for start in &results.starts {
        let spread = Spread::of(&start.seconds).map(|spread| spread.map(|it| it * 1e3));
        table.row([
            start.name.clone(),
            or_dash(spread.map(|spread| format!("{spread:.0}"))),
        ]);
    }
    format!("\n## From the start to the first line\n\n{}", table.text())
}
