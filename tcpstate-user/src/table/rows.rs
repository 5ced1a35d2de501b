//! What the table holds, as it is read: the rows of a list, and the stays that have not ended.

use std::num::NonZero;

use tcpstate_common::TcpState;

use super::full::Dumped;
use super::{Full, Mini, Place, Socket, Stay, Table};
use crate::model::Listed;

/// How far a walk over the table has come that is made in parts: what stays there meanwhile is met once. A socket in whose
/// place a timewait socket comes meanwhile can be met as both, and is the latter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk(At);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// These first: most that change their kind become minisockets. A request that becomes a child meanwhile is met as
    /// neither, if it was not yet: its connection is younger than the walk.
    Full(usize),
    Mini(usize),
    End,
}

impl Default for At {
    fn default() -> Self {
        Self::Full(0)
    }
}

impl Walk {
    #[must_use]
    pub fn is_done(self) -> bool {
        self.0 == At::End
    }
}

impl Table {
    /// The sockets of the next part of a walk: `most` at most, in no order.
    ///
    /// `boot_to_unix_ns`: what to add to `CLOCK_BOOTTIME` for Unix time.
    pub fn rows(
        &self,
        walk: &mut Walk,
        most: usize,
        now_ns: u64,
        boot_to_unix_ns: i64,
    ) -> impl Iterator<Item = Listed> {
        let row = move |socket: &Socket, stay: Stay, dumped: Option<Dumped>, orphan| Listed {
            time_ns: now_ns.saturating_add_signed(boot_to_unix_ns),
            id: socket.id,
            cookie: socket.cookie.map(NonZero::get),
            netns: socket.netns(),
            family: socket.family,
            local: socket.local,
            remote: socket.remote,
            state: socket.state,
            since_ns: stay.since_ns.saturating_add_signed(boot_to_unix_ns),
            age_ns: now_ns.saturating_sub(stay.since_ns),
            // Across a loss it may have been closed and connected again.
            age_exact: stay.seen && stay.since_ns > self.lost_until_ns,
            role: socket.role,
            owner: socket.owner(),
            uid: socket.uid,
            container: socket.container().cloned(),
            orphan,
            holders: socket.holders.map(NonZero::get),
            recv_queue: dumped.map(|dumped| dumped.recv_queue),
            send_queue: dumped.map(|dumped| dumped.send_queue),
        };
        let (full, mini) = self.part(walk, most);
        let full = full.map(move |full| {
            let orphan = is_orphan(full.socket.state, full.dumped);
            row(&full.socket, full.stay, full.dumped, orphan)
        });
        let mini = mini.map(move |mini| {
            let orphan = mini.socket.state == TcpState::FIN_WAIT2;
            row(&mini.socket, mini.stay, None, Some(orphan))
        });
        full.chain(mini)
    }

    /// The same of where each socket counts, and since when.
    pub fn stays(&self, walk: &mut Walk, most: usize) -> impl Iterator<Item = (Place, u64)> {
        let (full, mini) = self.part(walk, most);
        let full = full.map(|full| (&full.socket, full.stay));
        let mini = mini.map(|mini| (&mini.socket, mini.stay));
        full.chain(mini)
            .map(|(socket, stay)| (Place::of(socket), stay.since_ns))
    }

    fn part(
        &self,
        walk: &mut Walk,
        most: usize,
    ) -> (impl Iterator<Item = &Full>, impl Iterator<Item = &Mini>) {
        let (mut full, mut mini) = (None, None);
        walk.0 = match walk.0 {
            At::Full(from) => {
                let (part, next) = self.full.part(from, most);
                full = Some(part.map(|(_, full)| full));
                next.map_or(At::Mini(0), At::Full)
            }
            At::Mini(from) => {
                let (part, next) = self.mini.part(from, most);
                mini = Some(part.map(|(_, mini)| mini));
                next.map_or(At::End, At::Mini)
            }
            At::End => At::End,
        };
        (full.into_iter().flatten(), mini.into_iter().flatten())
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
