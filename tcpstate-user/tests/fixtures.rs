//! The table against the events of five kernels, recorded by `cargo xtask vm --record` and by the live test
//! `record::every_event_arrives` on the sixth: the same sockets did the same things on each, so the table must say the same.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use tcpstate_common::Event;
use tcpstate_user::model::{ConnectionId, Named as _};
use tcpstate_user::table::{Dwell, Identity, Table};

/// What the table makes of a recording: for each socket its lines, and the gauges at the end.
fn told(recording: &str) -> String {
    let mut lines = recording.lines();
    let kernel = lines.next().expect("a first line");
    assert!(kernel.starts_with("kernel "), "{kernel}");
    let identity = match lines.next() {
        Some("identity cookie") => Identity::Cookie,
        Some("identity address") => Identity::Address,
        other => panic!("identity expected, not {other:?}"),
    };
    let mut table = Table::new(identity);
    let mut sockets: BTreeMap<String, String> = BTreeMap::new();
    let mut order: Vec<ConnectionId> = Vec::new();
    let mut gauges: BTreeMap<String, i64> = BTreeMap::new();
    for line in lines {
        let Ok(Event::SetState(event)) = Event::decode(&bytes(line)) else {
            panic!("no record of a transition: {line}");
        };
        let applied = table.apply(&event, None, |change| {
            for (place, step) in [(change.before, -1), (change.after, 1)] {
                if let Some(place) = place {
                    *gauges.entry(place.state.to_string()).or_default() += step;
                }
            }
            let id = change.socket.id;
            if !order.contains(&id) {
                order.push(id);
            }
            let number = order.iter().position(|known| *known == id);
            let socket = sockets
                .entry(format!("{:03}", number.unwrap_or_default()))
                .or_default();
            let state = |pair: Option<(_, _)>| match pair {
                Some((from, to)) => format!("{from}>{to}"),
                None => "-".to_owned(),
            };
            let owner = change
                .socket
                .owner()
                .map_or("none", |owner| owner.source.name());
            let dwell = match change.dwell {
                Dwell::Seen(_) => "timed",
                Dwell::Unknown(reason) => reason.name(),
                Dwell::None => "-",
            };
            writeln!(
                socket,
                "  {:?} {} kernel {} shown {} dwell {dwell} owner {owner} role {} end {}",
                change.socket.family,
                change.evidence.name(),
                state(change.kernel),
                state(change.shown),
                change.socket.role.map_or("-", |role| role.name()),
                change.end.map_or("-", |end| end.name()),
            )
            .expect("memory");
        });
        applied.expect("a cookie where each event has one");
    }
    // Sockets of different threads come in no order.
    let mut told: Vec<String> = sockets.into_values().collect();
    told.sort();
    gauges.retain(|_, count| *count != 0);
    told.push(format!(
        "left: {gauges:?}\ncorrections: {:?}\n",
        table.corrections()
    ));
    told.join("socket\n")
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks(2);
    digits
        .map(|pair| {
            let pair = std::str::from_utf8(pair).expect("text");
            u8::from_str_radix(pair, 16).expect("hexadecimal")
        })
        .collect()
}

#[test]
fn the_table_says_the_same_of_every_kernel() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut kernels = Vec::new();
    for series in ["5.10", "6.1", "6.12", "6.18", "7.2"] {
        let path = folder.join(format!("{series}.events"));
        let recording =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        kernels.push((series, told(&recording)));
    }
    let (_, newest) = kernels.last().expect("five kernels");
    insta::with_settings!({snapshot_path => "golden", prepend_module_to_snapshot => false}, {
        insta::assert_snapshot!("six_sequences", newest);
    });
    for (series, said) in &kernels {
        assert_eq!(said, newest, "what kernel {series} said");
    }
}
