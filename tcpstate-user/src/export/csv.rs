//! Lines as CSV: the fields of a transition in the order of the JSON, then those of a loss; or those of a socket.

use std::fmt::Display;

use ::csv::{Terminator, Writer, WriterBuilder};

use super::time::Utc;
use super::{Rows, SCHEMA};
use crate::model::{Line, Listed, Loss, Named, Owner, Transition};

const HEADER: [&str; 25] = [
    "type",
    "schema",
    "seq",
    "time",
    "id",
    "cookie",
    "netns",
    "family",
    "local_addr",
    "local_port",
    "remote_addr",
    "remote_port",
    "from",
    "to",
    "dwell_ns",
    "evidence",
    "role",
    "pid",
    "comm",
    "uid",
    "container",
    "owner_source",
    "end",
    "lost_count",
    "lost_reason",
];
const LIST_HEADER: [&str; 26] = [
    "type",
    "schema",
    "seq",
    "time",
    "id",
    "cookie",
    "netns",
    "family",
    "local_addr",
    "local_port",
    "remote_addr",
    "remote_port",
    "state",
    "since",
    "age_ns",
    "age_exact",
    "role",
    "pid",
    "comm",
    "uid",
    "container",
    "owner_source",
    "orphan",
    "holders",
    "recv_queue",
    "send_queue",
];

/// Those that only a loss has.
const LOSS_FIELDS: usize = 2;
/// Those that every row has.
const COMMON_FIELDS: usize = 4;

pub struct Csv {
    header: &'static [&'static str],
    time: Utc,
    /// The field being written.
    field: Vec<u8>,
}

impl Csv {
    pub fn new(rows: Rows) -> Self {
        Self {
            header: match rows {
                Rows::Transitions => &HEADER,
                Rows::Sockets => &LIST_HEADER,
            },
            time: Utc::default(),
            field: Vec::new(),
        }
    }

    pub fn write(&mut self, seq: u64, line: &Line, out: &mut Vec<u8>) {
        let rows = WriterBuilder::new()
            .terminator(Terminator::Any(b'\n'))
            .buffer_capacity(512)
            .from_writer(out);
        let mut row = Row { rows, csv: self };
        match line {
            Line::Start(_) => row.csv.header.iter().for_each(|name| row.put(Some(name))),
            Line::Transition(transition) => row.transition(seq, transition),
            Line::Socket(socket) => row.socket(seq, socket),
            Line::Lost(loss) => row.loss(seq, loss),
        }
        row.end();
    }
}

struct Row<'a> {
    rows: Writer<&'a mut Vec<u8>>,
    csv: &'a mut Csv,
}

impl Row<'_> {
    fn head(&mut self, kind: &str, seq: u64, time_ns: u64) {
        self.put(Some(kind));
        self.put(Some(SCHEMA));
        self.put(Some(seq));
        self.time(time_ns);
    }

    fn time(&mut self, time_ns: u64) {
        self.csv.field.clear();
        self.csv.time.write(time_ns, &mut self.csv.field);
        self.field();
    }

    fn transition(&mut self, seq: u64, t: &Transition) {
        self.head("transition", seq, t.time_ns);
        self.put(Some(t.id));
        self.put(t.cookie);
        self.put(t.netns);
        self.put(Some(t.family.name()));
        self.put(t.local.addr);
        self.put(t.local.port);
        self.put(t.remote.addr);
        self.put(t.remote.port);
        self.put(Some(t.from));
        self.put(Some(t.to));
        self.put(t.dwell_ns);
        self.put(Some(t.evidence.name()));
        self.put(t.role.map(Named::name));
        self.owner(t.owner, t.uid, t.container.as_deref());
        self.put(t.end.map(Named::name));
        self.empty(LOSS_FIELDS);
    }

    fn socket(&mut self, seq: u64, row: &Listed) {
        self.head("socket", seq, row.time_ns);
        self.put(Some(row.id));
        self.put(row.cookie);
        self.put(row.netns);
        self.put(Some(row.family.name()));
        self.put(row.local.addr);
        self.put(row.local.port);
        self.put(row.remote.addr);
        self.put(row.remote.port);
        self.put(Some(row.state));
        self.time(row.since_ns);
        self.put(Some(row.age_ns));
        self.put(Some(row.age_exact));
        self.put(row.role.map(Named::name));
        self.owner(row.owner, row.uid, row.container.as_deref());
        self.put(row.orphan);
        self.put(row.holders);
        self.put(row.recv_queue);
        self.put(row.send_queue);
    }

    fn owner(&mut self, owner: Option<Owner>, uid: Option<u32>, container: Option<&str>) {
        let process = owner.map(|owner| owner.process);
        self.put(process.map(|process| process.pid));
        self.put(process.and_then(|process| process.comm));
        self.put(uid);
        self.put(container);
        self.put(Some(owner.map_or("none", |owner| owner.source.name())));
    }

    fn loss(&mut self, seq: u64, loss: &Loss) {
        self.head("lost", seq, loss.time_ns);
        self.empty(HEADER.len() - COMMON_FIELDS - LOSS_FIELDS);
        self.put(Some(loss.count));
        self.put(Some(loss.reason.name()));
    }

    fn empty(&mut self, fields: usize) {
        (0..fields).for_each(|_| self.put(None::<&str>));
    }

    fn put(&mut self, value: Option<impl Display>) {
        use std::io::Write as _;
        self.csv.field.clear();
        if let Some(value) = value {
            write!(self.csv.field, "{value}").expect("a Vec takes everything");
        }
        self.field();
    }

    fn field(&mut self) {
        let written = self.rows.write_field(&self.csv.field);
        written.expect("a Vec takes everything");
    }

    fn end(mut self) {
        let written = self.rows.write_record(None::<&[u8]>);
        written.expect("every row has as many fields as the header");
    }
}
