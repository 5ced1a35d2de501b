//! How what the tracer knows leaves it: the formats of a stream's lines, HTTP, the log.
//!
//! Owns no decision about what is shown; that is the filter's and the table's.

pub mod check;
pub mod client;
mod csv;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
pub mod http;
mod json;
pub mod log;
mod parse;
pub mod process;
pub mod prometheus;
mod text;
mod time;

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use parse::acts;
pub use parse::{ParseError, parse_line};
pub use text::Look;

use crate::model::{Line, named};

/// The version of the JSON lines' shape.
const SCHEMA: u32 = 1;

named! {
    pub enum Format ("output format") {
        Text = "text",
        Wide = "wide",
        Json = "json",
        Csv = "csv",
    }
}

/// Writes the lines of one stream in one format, and numbers them.
pub struct LineWriter {
    /// Number of the next line.
    seq: u64,
    format: Formatter,
}

enum Formatter {
    Text(text::Text),
    Json(json::Json),
    Csv(csv::Csv),
}

/// What the lines are about, beside those that every stream has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    Transitions,
    Sockets,
}

impl LineWriter {
    /// `look` matters to `text` and `wide` only.
    #[must_use]
    pub fn new(format: Format, look: Look, rows: Rows) -> Self {
        let format = match format {
            Format::Text => Formatter::Text(text::Text::new(look, false, rows)),
            Format::Wide => Formatter::Text(text::Text::new(look, true, rows)),
            Format::Json => Formatter::Json(json::Json::default()),
            Format::Csv => Formatter::Csv(csv::Csv::new(rows)),
        };
        Self { seq: 0, format }
    }

    /// JSON lines, as the daemon streams them.
    #[must_use]
    pub fn json() -> Self {
        Self {
            seq: 0,
            format: Formatter::Json(json::Json::default()),
        }
    }

    /// Appends the line to `out`; for the start of a stream, what the format begins with.
    pub fn write(&mut self, line: &Line, out: &mut Vec<u8>) {
        let seq = self.seq;
        self.seq += 1;
        match &mut self.format {
            Formatter::Text(text) => text.write(line, out),
            Formatter::Json(json) => json.write(seq, line, out),
            Formatter::Csv(csv) => csv.write(seq, line, out),
        }
    }
}

#[cfg(test)]
mod tests;
