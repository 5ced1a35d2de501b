//! What the table holds, as it is read: the rows of a list, and the stays that have not ended.

use tcpstate_common::TcpState;

use super::full::Dumped;
use super::{Place, Socket, Stay, Table};
use crate::model::Listed;

impl Table {
    /// Every socket, in no order.
    ///
    /// `boot_to_unix_ns`: what to add to `CLOCK_BOOTTIME` for Unix time.
    pub fn rows(&self, now_ns: u64, boot_to_unix_ns: i64) -> impl Iterator<Item = Listed> {
        let row = move |socket: &Socket, stay: Stay, dumped: Option<Dumped>, orphan| Listed {
            time_ns: now_ns.saturating_add_signed(boot_to_unix_ns),
            id: socket.id,
            cookie: socket.cookie,
            netns: socket.netns,
            family: socket.family,
            local: socket.local,
            remote: socket.remote,
            state: socket.state,
            since_ns: stay.since_ns.saturating_add_signed(boot_to_unix_ns),
            age_ns: now_ns.saturating_sub(stay.since_ns),
            // Across a loss it may have been closed and connected again.
            age_exact: stay.seen && stay.since_ns > self.lost_until_ns,
            role: socket.role,
            owner: socket.owner,
            uid: socket.uid,
            container: socket.container.clone(),
            orphan,
            holders: socket.holders,
            recv_queue: dumped.map(|dumped| dumped.recv_queue),
            send_queue: dumped.map(|dumped| dumped.send_queue),
        };
        let full = self.full.values().map(move |full| {
            let orphan = is_orphan(full.socket.state, full.dumped);
            row(&full.socket, full.stay, full.dumped, orphan)
        });
        let mini = self.mini.values().map(move |mini| {
            let orphan = mini.socket.state == TcpState::FIN_WAIT2;
            row(&mini.socket, mini.stay, None, Some(orphan))
        });
        full.chain(mini)
    }

    /// Where each socket counts, and since when; in no order.
    pub fn stays(&self) -> impl Iterator<Item = (Place, u64)> {
        let full = self.full.values().map(|full| (&full.socket, full.stay));
        let mini = self.mini.values().map(|mini| (&mini.socket, mini.stay));
        full.chain(mini)
            .map(|(socket, stay)| (Place::of(socket), stay.since_ns))
    }
}

/// Before these states, a socket without a descriptor is one that nobody accepted yet.
fn is_orphan(state: TcpState, dumped: Option<Dumped>) -> Option<bool> {
    match state {
        TcpState::FIN_WAIT1 | TcpState::FIN_WAIT2 | TcpState::CLOSING | TcpState::LAST_ACK => {
            dumped.map(|dumped| !dumped.has_file)
        }
        _ => Some(false),
    }
}

#[cfg(test)]
mod tests;
