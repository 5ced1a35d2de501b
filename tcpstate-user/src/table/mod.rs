//! The table of sockets: turns the kernel's events and dumps into what happened, and says how it knows.
//!
//! Pure: time comes in with the events, and nothing here knows where they came from.

mod snapshot;
mod socket;

pub use snapshot::{Record, Snapshot, StateMask, Unreachable};
pub use socket::{Change, Discard, Dwell, Place, Socket};
