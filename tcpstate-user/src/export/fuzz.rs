//! Properties of what a daemon sends its clients, and of how lines are shown, for [`crate::fuzz`].

use jiff::tz::TimeZone;

use super::client::{Lines, listening};
use super::{Format, LineWriter, Look, Rows, parse_line};
use crate::fuzz::{is_harmless, shown};
use crate::model::{Line, Owner};

/// A stream says the same however it is cut (the first byte says where), and each of its lines can be shown.
pub fn stream(bytes: &[u8]) {
    let Some((&cut, bytes)) = bytes.split_first() else {
        return;
    };
    let (before, after) = bytes.split_at(usize::from(cut).min(bytes.len()));
    let whole = Lines::default().add(bytes);
    let mut lines = Lines::default();
    let in_pieces = lines
        .add(before)
        .and_then(|first| Ok([first, lines.add(after)?].concat()));
    match (whole, in_pieces) {
        (Ok(lines), Ok(again)) => {
            assert_eq!(lines, again);
            let ends = bytes.iter().filter(|&&byte| byte == b'\n').count();
            assert!(lines.len() <= ends);
            let mut writers = Writers::default();
            lines.iter().for_each(|line| writers.check(line));
        }
        (Err(error), Err(_)) => shown(&error.to_string(), bytes.len()),
        (whole, _) => panic!("in pieces not as the whole, which is {whole:?}"),
    }
}

/// A stream in each format.
pub(crate) struct Writers {
    people: [LineWriter; 2],
    csv: [LineWriter; 2],
    json: LineWriter,
}

impl Default for Writers {
    fn default() -> Self {
        let writer = |format| {
            move |rows| {
                let look = Look {
                    color: false,
                    zone: TimeZone::UTC,
                };
                LineWriter::new(format, look, rows)
            }
        };
        let rows = [Rows::Transitions, Rows::Sockets];
        Self {
            people: rows.map(writer(Format::Wide)),
            csv: rows.map(writer(Format::Csv)),
            json: LineWriter::json(),
        }
    }
}

impl Writers {
    /// What is written is harmless, and one line; JSON says all, and is read back.
    pub(crate) fn check(&mut self, line: &Line) {
        let rows = usize::from(matches!(line, Line::Socket(_)));
        for writer in [&mut self.people[rows], &mut self.csv[rows]] {
            let mut out = Vec::new();
            writer.write(line, &mut out);
            let text = std::str::from_utf8(&out).expect("text");
            for line in text.split_terminator('\n') {
                assert!(line.chars().all(is_harmless), "{line:?}");
            }
        }
        let mut out = Vec::new();
        self.json.write(line, &mut out);
        let text = std::str::from_utf8(&out).expect("text");
        let json = text.strip_suffix('\n').expect("a line's end");
        assert!(json.chars().all(is_harmless), "{json:?}");
        let read = parse_line(json).unwrap_or_else(|error| panic!("{error}: {json}"));
        let (_, read) = read.expect("a type that we write");
        assert_eq!(read, as_told(line.clone()));
    }
}

/// No line tells when a process started.
fn as_told(mut line: Line) -> Line {
    let owner: Option<&mut Owner> = match &mut line {
        Line::Transition(transition) => transition.owner.as_mut(),
        Line::Socket(row) => row.owner.as_mut(),
        Line::Start(_) | Line::Lost(_) => None,
    };
    if let Some(owner) = owner {
        owner.process.start_ns = 0;
    }
    line
}

/// `/proc/net/unix`: names are paths, each in a line.
pub(crate) fn unix_sockets(bytes: &[u8]) {
    for name in listening(bytes) {
        assert!(name.starts_with(b"/") && !name.contains(&b'\n'));
    }
}
