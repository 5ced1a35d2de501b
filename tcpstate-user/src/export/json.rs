//! Lines as JSON, one object each. A hot path: written field by field into the caller's buffer.

use std::fmt::Display;
use std::io::Write as _;

use super::SCHEMA;
use super::time::Utc;
use crate::model::{Endpoint, Line, Listed, Loss, Named, Owner, Start, Transition};

#[derive(Default)]
pub struct Json {
    time: Utc,
}

impl Json {
    pub fn write(&mut self, seq: u64, line: &Line, out: &mut Vec<u8>) {
        match line {
            Line::Start(start) => self.start(seq, start, out),
            Line::Transition(transition) => self.transition(seq, transition, out),
            Line::Socket(row) => self.socket(seq, row, out),
            Line::Lost(loss) => self.loss(seq, loss, out),
        }
        out.extend_from_slice(b"}\n");
    }

    fn head(&mut self, kind: &str, seq: u64, time_ns: u64, out: &mut Vec<u8>) {
        put(
            out,
            format_args!(r#"{{"type":"{kind}","schema":{SCHEMA},"seq":{seq},"time":""#),
        );
        self.time.write(time_ns, out);
        out.push(b'"');
    }

    fn start(&mut self, seq: u64, start: &Start, out: &mut Vec<u8>) {
        self.head("start", seq, start.time_ns, out);
        text(out, "host", Some(&start.host));
        text(out, "boot_id", Some(&start.boot_id));
        text(out, "version", Some(&start.version));
        plain(out, "source", Some(start.source.name()));
        plain(out, "netns", Some(start.netns));
    }

    fn transition(&mut self, seq: u64, t: &Transition, out: &mut Vec<u8>) {
        self.head("transition", seq, t.time_ns, out);
        plain(out, "id", Some(t.id));
        plain(out, "cookie", t.cookie);
        number(out, "netns", t.netns);
        plain(out, "family", Some(t.family.name()));
        endpoint(out, "local_addr", "local_port", t.local);
        endpoint(out, "remote_addr", "remote_port", t.remote);
        plain(out, "from", Some(t.from));
        plain(out, "to", Some(t.to));
        number(out, "dwell_ns", t.dwell_ns);
        plain(out, "evidence", Some(t.evidence.name()));
        plain(out, "role", t.role.map(Named::name));
        owner(out, t.owner, t.uid, t.container.as_deref());
        plain(out, "end", t.end.map(Named::name));
    }

    fn socket(&mut self, seq: u64, row: &Listed, out: &mut Vec<u8>) {
        self.head("socket", seq, row.time_ns, out);
        plain(out, "id", Some(row.id));
        plain(out, "cookie", row.cookie);
        number(out, "netns", row.netns);
        plain(out, "family", Some(row.family.name()));
        endpoint(out, "local_addr", "local_port", row.local);
        endpoint(out, "remote_addr", "remote_port", row.remote);
        plain(out, "state", Some(row.state));
        put(out, r#","since":""#);
        self.time.write(row.since_ns, out);
        out.push(b'"');
        number(out, "age_ns", Some(row.age_ns));
        number(out, "age_exact", Some(row.age_exact));
        plain(out, "role", row.role.map(Named::name));
        owner(out, row.owner, row.uid, row.container.as_deref());
        number(out, "orphan", row.orphan);
        number(out, "holders", row.holders);
        number(out, "recv_queue", row.recv_queue);
        number(out, "send_queue", row.send_queue);
    }

    fn loss(&mut self, seq: u64, loss: &Loss, out: &mut Vec<u8>) {
        self.head("lost", seq, loss.time_ns, out);
        number(out, "count", Some(loss.count));
        plain(out, "reason", Some(loss.reason.name()));
    }
}

fn owner(out: &mut Vec<u8>, owner: Option<Owner>, uid: Option<u32>, container: Option<&str>) {
    let process = owner.map(|owner| owner.process);
    let comm = process.and_then(|process| process.comm);
    number(out, "pid", process.map(|process| process.pid));
    text(out, "comm", comm.map(|comm| comm.to_string()));
    number(out, "uid", uid);
    text(out, "container", container);
    let source = owner.map_or("none", |owner| owner.source.name());
    plain(out, "owner_source", Some(source));
}

fn endpoint(out: &mut Vec<u8>, addr: &str, port: &str, endpoint: Endpoint) {
    plain(out, addr, endpoint.addr);
    number(out, port, endpoint.port);
}

fn put(out: &mut Vec<u8>, value: impl Display) {
    write!(out, "{value}").expect("a Vec takes everything");
}

fn name(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

fn number(out: &mut Vec<u8>, field: &str, value: Option<impl Display>) {
    name(out, field);
    match value {
        Some(value) => put(out, value),
        None => null(out),
    }
}

/// A string that holds nothing to escape.
fn plain(out: &mut Vec<u8>, field: &str, value: Option<impl Display>) {
    name(out, field);
    match value {
        Some(value) => {
            out.push(b'"');
            put(out, value);
            out.push(b'"');
        }
        None => null(out),
    }
}

fn text(out: &mut Vec<u8>, field: &str, value: Option<impl AsRef<str>>) {
    name(out, field);
    match value {
        Some(value) => {
            serde_json::to_writer(out, value.as_ref()).expect("a Vec takes every string");
        }
        None => null(out),
    }
}

fn null(out: &mut Vec<u8>) {
    out.extend_from_slice(b"null");
}
