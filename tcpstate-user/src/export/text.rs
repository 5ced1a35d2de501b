//! Lines for people: a table with fixed columns that IPv4 never leaves.

use std::fmt::{self, Display, Write as _};
use std::net::IpAddr;

use anstyle::{AnsiColor, Style};
use jiff::tz::TimeZone;

use super::Rows;
use super::time::OfDay;
use crate::model::{Comm, End, Endpoint, Line, Listed, Loss, Named, TcpState, Transition};

/// What the reader's terminal and wishes decide.
#[derive(Clone, Debug)]
pub struct Look {
    pub color: bool,
    /// For the time of day.
    pub zone: TimeZone,
}

impl Look {
    /// For standard output: colours on a terminal, unless `NO_COLOR` is set; local time, unless `utc`.
    #[must_use]
    pub fn of_stdout(utc: bool) -> Self {
        let choice = anstream::AutoStream::choice(&std::io::stdout());
        Self {
            color: choice != anstream::ColorChoice::Never,
            zone: if utc {
                TimeZone::UTC
            } else {
                TimeZone::system()
            },
        }
    }
}

const HEADER: Style = Style::new().bold();
const TIME: Style = Style::new().dimmed();
const LOSS: Style = AnsiColor::Red.on_default().bold().invert();
const TROUBLE: Style = AnsiColor::Red.on_default();
const QUIET: Style = Style::new();

pub struct Text {
    time: OfDay,
    color: bool,
    wide: bool,
    rows: Rows,
    /// The row being written.
    row: String,
    clock: Vec<u8>,
}

#[derive(Clone, Copy)]
enum Align {
    Left(usize),
    Right(usize),
}

const PID: Align = Align::Right(7);
const COMM: Align = Align::Left(15);
/// `255.255.255.255:65535`.
const ENDPOINT: Align = Align::Left(21);
/// `NEW_SYN_RECV`.
const STATE: Align = Align::Left(12);
/// Megabytes.
const QUEUE: Align = Align::Right(7);
const AGE: Align = Align::Right(7);
const HOLDERS: Align = Align::Right(7);
const ORPHAN: Align = Align::Left(6);
/// `ESTABLISHED -> CLOSE_WAIT`.
const STATES: Align = Align::Left(25);
const DWELL: Align = Align::Right(6);
/// `simultaneous_close`.
const END: Align = Align::Left(18);
const NETNS: Align = Align::Right(10);
const ID: Align = Align::Left(10);
const UID: Align = Align::Right(5);
const ROLE: Align = Align::Left(7);
const OWNER: Align = Align::Left(8);
const EVIDENCE: Align = Align::Left(10);
const CONTAINER: Align = Align::Left(0);

/// The first eight are shown where not all are.
const TRANSITIONS: [(Align, &str); 15] = [
    (Align::Left(12), "TIME"),
    (PID, "PID"),
    (COMM, "COMM"),
    (ENDPOINT, "LOCAL"),
    (ENDPOINT, "REMOTE"),
    (STATES, "TRANSITION"),
    (DWELL, "DWELL"),
    (END, "END"),
    (NETNS, "NETNS"),
    (ID, "ID"),
    (UID, "UID"),
    (ROLE, "ROLE"),
    (OWNER, "OWNER"),
    (EVIDENCE, "EVIDENCE"),
    (CONTAINER, "CONTAINER"),
];

/// The same.
const SOCKETS: [(Align, &str); 16] = [
    (STATE, "STATE"),
    (QUEUE, "RECV-Q"),
    (QUEUE, "SEND-Q"),
    (ENDPOINT, "LOCAL"),
    (ENDPOINT, "REMOTE"),
    (AGE, "AGE"),
    (PID, "PID"),
    (COMM, "COMM"),
    (NETNS, "NETNS"),
    (ID, "ID"),
    (UID, "UID"),
    (ROLE, "ROLE"),
    (OWNER, "OWNER"),
    (HOLDERS, "HOLDERS"),
    (ORPHAN, "ORPHAN"),
    (CONTAINER, "CONTAINER"),
];

impl Text {
    pub fn new(look: Look, wide: bool, rows: Rows) -> Self {
        Self {
            time: OfDay::new(look.zone),
            color: look.color,
            wide,
            rows,
            row: String::new(),
            clock: Vec::new(),
        }
    }

    pub fn write(&mut self, line: &Line, out: &mut Vec<u8>) {
        self.row.clear();
        match line {
            Line::Start(_) => self.header(),
            Line::Transition(transition) => self.transition(transition),
            Line::Socket(row) => self.socket(row),
            Line::Lost(loss) => self.loss(loss),
        }
        out.extend_from_slice(self.row.trim_end().as_bytes());
        out.push(b'\n');
    }

    fn header(&mut self) {
        let columns: &[_] = match self.rows {
            Rows::Transitions => &TRANSITIONS,
            Rows::Sockets => &SOCKETS,
        };
        let shown = if self.wide { columns.len() } else { 8 };
        self.style(HEADER);
        for (align, name) in &columns[..shown] {
            self.cell(*align, name);
        }
        // Before the reset, which is no white space.
        self.row.truncate(self.row.trim_end().len());
        self.reset(HEADER);
    }

    fn transition(&mut self, t: &Transition) {
        let process = t.owner.map(|owner| owner.process);
        self.clock(t.time_ns);
        self.cell(PID, known(process.map(|process| process.pid)));
        self.cell(
            COMM,
            known(process.and_then(|process| process.comm.map(Name))),
        );
        self.cell(ENDPOINT, At(t.local));
        self.cell(ENDPOINT, At(t.remote));
        self.styled(
            state_style(t.to),
            STATES,
            format_args!("{} -> {}", t.from, t.to),
        );
        self.cell(DWELL, known(t.dwell_ns.map(Dwell)));
        let end_style = t.end.map_or(QUIET, end_style);
        self.styled(end_style, END, t.end.map_or("", Named::name));
        if self.wide {
            self.cell(NETNS, known(t.netns));
            self.cell(ID, t.id);
            self.cell(UID, known(t.uid));
            self.cell(ROLE, known(t.role));
            self.cell(OWNER, t.owner.map_or("none", |owner| owner.source.name()));
            self.cell(EVIDENCE, t.evidence);
            self.cell(CONTAINER, known(t.container.as_deref()));
        }
    }

    fn socket(&mut self, row: &Listed) {
        let process = row.owner.map(|owner| owner.process);
        self.styled(state_style(row.state), STATE, row.state);
        self.cell(QUEUE, known(row.recv_queue));
        self.cell(QUEUE, known(row.send_queue));
        self.cell(ENDPOINT, At(row.local));
        self.cell(ENDPOINT, At(row.remote));
        let least = if row.age_exact { "" } else { ">" };
        self.cell(AGE, format_args!("{least}{}", Dwell(row.age_ns)));
        self.cell(PID, known(process.map(|process| process.pid)));
        self.cell(COMM, known(process.and_then(|process| process.comm)));
        if self.wide {
            self.cell(NETNS, known(row.netns));
            self.cell(ID, row.id);
            self.cell(UID, known(row.uid));
            self.cell(ROLE, known(row.role));
            self.cell(OWNER, row.owner.map_or("none", |owner| owner.source.name()));
            self.cell(HOLDERS, known(row.holders));
            let orphan = row.orphan.map(|orphan| if orphan { "yes" } else { "no" });
            self.cell(ORPHAN, known(orphan));
            self.cell(CONTAINER, known(row.container.as_deref()));
        }
    }

    fn loss(&mut self, loss: &Loss) {
        self.clock(loss.time_ns);
        let events = if loss.count == 1 { "event" } else { "events" };
        let (count, reason) = (loss.count, loss.reason.name());
        let text = format_args!("-- {count} {events} lost: {reason} --");
        self.styled(LOSS, Align::Left(0), text);
    }

    fn clock(&mut self, time_ns: u64) {
        self.clock.clear();
        self.time.write(time_ns, &mut self.clock);
        let clock = String::from_utf8_lossy(&self.clock).into_owned();
        self.styled(TIME, Align::Left(0), clock);
    }

    /// The colour ends before the padding, so that a row's trailing space can be cut.
    fn styled(&mut self, style: Style, align: Align, value: impl Display) {
        if !self.color || style == QUIET {
            return self.cell(align, value);
        }
        self.style(style);
        let begin = self.row.len();
        put(&mut self.row, value);
        let width = self.row[begin..].chars().count();
        self.reset(style);
        let Align::Left(column) = align else {
            unreachable!("only columns aligned to the left are coloured");
        };
        self.pad(column.saturating_sub(width) + 1);
    }

    fn cell(&mut self, align: Align, value: impl Display) {
        let begin = self.row.len();
        put(&mut self.row, value);
        let width = self.row[begin..].chars().count();
        match align {
            Align::Left(column) => self.pad(column.saturating_sub(width)),
            Align::Right(column) => {
                let missing = column.saturating_sub(width);
                self.row.insert_str(begin, &" ".repeat(missing));
            }
        }
        self.pad(1);
    }

    fn pad(&mut self, spaces: usize) {
        self.row.extend(std::iter::repeat_n(' ', spaces));
    }

    fn style(&mut self, style: Style) {
        if self.color {
            put(&mut self.row, style.render());
        }
    }

    fn reset(&mut self, style: Style) {
        if self.color {
            put(&mut self.row, style.render_reset());
        }
    }
}

fn put(row: &mut String, value: impl Display) {
    write!(row, "{value}").expect("a String takes everything");
}

/// What the eye should find: what may leak, what is well, what is over.
fn state_style(state: TcpState) -> Style {
    match state {
        TcpState::CLOSE_WAIT => AnsiColor::Yellow.on_default(),
        TcpState::ESTABLISHED => AnsiColor::Green.on_default(),
        TcpState::LISTEN => AnsiColor::Cyan.on_default(),
        TcpState::CLOSE | TcpState::TIME_WAIT => Style::new().dimmed(),
        _ => QUIET,
    }
}

fn end_style(end: End) -> Style {
    match end {
        End::ResetReceived
        | End::ResetSent
        | End::Refused
        | End::Timeout
        | End::Unreachable
        | End::Aborted => TROUBLE,
        End::LocalClose | End::RemoteClose | End::SimultaneousClose | End::Unknown => QUIET,
    }
}

fn known<T: Display>(value: Option<T>) -> impl Display {
    fmt::from_fn(move |f| match &value {
        Some(value) => value.fmt(f),
        None => f.write_str("-"),
    })
}

/// A process can take its name away; a blank would look like a fault of ours.
struct Name(Comm);

impl Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.as_bytes().is_empty() {
            return f.write_str("<empty>");
        }
        self.0.fmt(f)
    }
}

struct At(Endpoint);

impl Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.addr, self.0.port) {
            (None, None) => return f.write_str("-"),
            (Some(IpAddr::V6(v6)), _) => write!(f, "[{v6}]")?,
            (Some(IpAddr::V4(v4)), _) => write!(f, "{v4}")?,
            (None, Some(_)) => f.write_str("-")?,
        }
        write!(f, ":{}", known(self.0.port))
    }
}

/// Nanoseconds in at most six characters up to 100 days; cut off, never rounded up.
struct Dwell(u64);

impl Display for Dwell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const S: u64 = 1_000_000_000;
        let decimal = |f: &mut fmt::Formatter<'_>, unit: u64, name: &str| {
            let (whole, tenths) = (self.0 / unit, self.0 % unit * 10 / unit);
            if whole < 100 {
                write!(f, "{whole}.{tenths}{name}")
            } else {
                write!(f, "{whole}{name}")
            }
        };
        let seconds = self.0 / S;
        let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
        match self.0 {
            0..1_000 => write!(f, "{}ns", self.0),
            1_000..1_000_000 => write!(f, "{}µs", self.0 / 1_000),
            1_000_000..S => decimal(f, 1_000_000, "ms"),
            _ if seconds < 100 => decimal(f, S, "s"),
            _ if hours == 0 => write!(f, "{minutes}m{:02}s", seconds % 60),
            _ if days == 0 => write!(f, "{hours}h{:02}m", minutes % 60),
            _ => write!(f, "{days}d{:02}h", hours % 24),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Dwell, Name};
    use crate::model::Comm;

    #[test]
    fn a_name_is_never_blank() {
        let shown = |name| Name(Comm::from_bytes(name)).to_string();
        assert_eq!([shown(b""), shown(b"sshd")], ["<empty>", "sshd"]);
    }

    #[test]
    fn dwell_is_short_and_never_rounded_up() {
        for (ns, shown) in [
            (0, "0ns"),
            (999, "999ns"),
            (312_999, "312µs"),
            (999_999, "999µs"),
            (1_250_000, "1.2ms"),
            (99_999_999, "99.9ms"),
            (312_400_000, "312ms"),
            (999_999_999, "999ms"),
            (61_345_000_000, "61.3s"),
            (99_999_999_999, "99.9s"),
            (100_000_000_000, "1m40s"),
            (3_599_999_999_999, "59m59s"),
            (7_384_000_000_000, "2h03m"),
            (86_399_999_999_999, "23h59m"),
            (1_036_800_000_000_000, "12d00h"),
        ] {
            assert_eq!(Dwell(ns).to_string(), shown);
            assert!(shown.chars().count() <= 6, "{shown}");
        }
    }
}
