//! The words of the domain, as types: what the table produces and every output shows.
//!
//! Owns no behaviour beyond naming and reading these values; no clock, no I/O.

pub mod check;
mod comm;
mod end;
mod listed;
mod name;
mod transition;
pub mod view;

pub use comm::Comm;
pub use end::End;
pub use listed::Listed;
pub(crate) use name::named;
pub use name::{Named, UnknownName};
pub use transition::{
    ConnectionId, Endpoint, Evidence, Family, Line, Loss, LossReason, NetnsSelection, Owner,
    OwnerSource, Process, ProcessId, Role, Source, Start, Transition,
};

pub use tcpstate_common::TcpState;
