//! What crosses the border between the eBPF programs and the user side: records, states, globals, counters.
//!
//! Nothing here allocates, reads a clock or knows aya.

#![no_std]

pub mod config;
pub mod counters;
pub mod event;
pub mod socket;
pub mod state;
pub mod tracepoint;
pub mod wire;

pub use event::{Accept, Event, Holder, SetState, TimeWait};
pub use socket::Socket;
pub use state::TcpState;
