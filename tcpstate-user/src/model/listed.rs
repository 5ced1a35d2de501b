//! A socket that exists, with all that a list says of it.

use std::sync::Arc;

use tcpstate_common::TcpState;

use super::{ConnectionId, Endpoint, Family, Owner, Role};

/// Times are Unix times in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// When the list was made.
    pub time_ns: u64,
    pub id: ConnectionId,
    pub cookie: Option<u64>,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    pub family: Family,
    pub local: Endpoint,
    pub remote: Endpoint,
    pub state: TcpState,
    /// Since when it has been in that state, or has been known to be.
    pub since_ns: u64,
    /// The same as a length of time: a lower bound.
    pub age_ns: u64,
    /// The entry into the state was seen.
    pub age_exact: bool,
    pub role: Option<Role>,
    pub owner: Option<Owner>,
    /// The socket's own uid.
    pub uid: Option<u32>,
    /// Full id of the owner's container.
    pub container: Option<Arc<str>>,
    /// No descriptor stands for it any more, and the kernel goes on by itself.
    pub orphan: Option<bool>,
    /// How many processes held it when that was last looked at.
    pub holders: Option<u32>,
    /// Bytes that were received and not read; of a listener, connections that wait for accept.
    pub recv_queue: Option<u32>,
    /// Bytes that were sent and not acknowledged; of a listener, how many connections may wait.
    pub send_queue: Option<u32>,
}

impl Listed {
    /// The order of a list: listeners first, as `ss` has them, then by port and address, the local ones first.
    pub fn sort(rows: &mut [Self]) {
        rows.sort_unstable_by_key(|row| {
            (
                row.state != TcpState::LISTEN,
                (row.local.port, row.local.addr),
                (row.remote.addr, row.remote.port),
                (row.netns, row.id),
            )
        });
    }
}
