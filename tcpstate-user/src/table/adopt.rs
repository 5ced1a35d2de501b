//! Brings together what events and dumps have shown of one socket, and ends what has its place.

use tcpstate_common::{SetState, TcpState};

use super::apply::{cookie, ends};
use super::{Change, Correction, Discard, Dwell, Identity, Place, Table};
use crate::model::Evidence;

impl Table {
    /// Makes room for the event's socket: the end of what has its key was lost.
    pub(super) fn vacate(
        &mut self,
        event: &SetState,
        time_ns: u64,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        self.end_was_lost(self.event_key(event), time_ns, sink);
    }

    fn end_was_lost(&mut self, key: u64, time_ns: u64, sink: &mut impl FnMut(&Change<'_>)) {
        let Some(stale) = self.full.remove(key) else {
            return;
        };
        self.corrections.count(Correction::Event);
        self.generations.closed(stale.socket.id);
        sink(&Change {
            time_ns,
            socket: &stale.socket,
            kernel: None,
            shown: None,
            dwell: Dwell::Unknown(Discard::Lost),
            evidence: Evidence::Inferred,
            end: None,
            before: Some(Place::of(&stale.socket)),
            after: None,
        });
    }

    /// Where the address is the key: what the table has there may be another socket, or elsewhere.
    pub(super) fn adopt(&mut self, event: &SetState, sink: &mut impl FnMut(&Change<'_>)) {
        match self.identity {
            Identity::Cookie => {}
            Identity::Address => {
                let (_, local, remote) = ends(event);
                let known = self.full.get(event.sk);
                let is_another = known.is_some_and(|known| {
                    let socket = &known.socket;
                    socket.is_another(cookie(event), event.from(), local, remote)
                });
                if is_another {
                    self.end_was_lost(event.sk, event.time_ns, sink);
                }
            }
            Identity::Ends => self.adopt_by_ends(event),
        }
    }

    /// A dump found it, and told no address. It may be another that is alike.
    fn adopt_by_ends(&mut self, event: &SetState) {
        if self.full.contains(event.sk) {
            return;
        }
        let (_, mut local, remote) = ends(event);
        if event.from() == TcpState::SYN_SENT {
            local.port = None;
        }
        let ends = self.identity.tuple(None, local, remote);
        let found = self.full.with_ends(ends);
        let found = found
            .filter(|(_, full)| full.event_ns == 0)
            .map(|(key, _)| key);
        let found = found.min();
        if let Some(full) = found.and_then(|key| self.full.remove(key)) {
            self.full.insert(event.sk, full);
        }
    }
}
