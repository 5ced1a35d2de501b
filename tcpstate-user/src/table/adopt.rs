//! Brings together what events and dumps have shown of one socket, and ends what has its place.

use tcpstate_common::{SetState, TcpState};

use super::apply::{cookie, ends};
use super::{Change, Correction, Discard, Dwell, Identity, Place, Table};
use crate::model::Evidence;

impl Table {
    /// Makes room for the event's socket: the end of what has its key, or its cookie, was lost.
    pub(super) fn vacate(
        &mut self,
        event: &SetState,
        time_ns: u64,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        self.end_was_lost(self.event_key(event), time_ns, sink);
        if let Some(key) = self.holder(event.cookie) {
            self.end_was_lost(key, time_ns, sink);
        }
    }

    /// What has the cookie of an event's socket. Who only seemed to have it loses it.
    fn holder(&mut self, cookie: u64) -> Option<u64> {
        let key = self.full.with_cookie(cookie)?;
        let guessed = self.full.change(key, |full| full.guess.take().is_some())?;
        (!guessed).then_some(key)
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

    /// Where the address is the key: what a dump found gets it from its first event.
    pub(super) fn adopt(&mut self, event: &SetState, sink: &mut impl FnMut(&Change<'_>)) {
        match self.identity {
            Identity::Cookie => {}
            // The dump that found it had the kernel make a cookie.
            Identity::Address => self.adopt_by_cookie(event, sink),
            Identity::AddressWithoutNetns => self.adopt_by_ends(event),
        }
    }

    fn adopt_by_cookie(&mut self, event: &SetState, sink: &mut impl FnMut(&Change<'_>)) {
        let Some(its) = cookie(event) else {
            return;
        };
        let is_another = |cookie| cookie != its;
        let known = self.full.get(event.sk);
        if known.is_some_and(|known| known.socket.cookie.is_some_and(is_another)) {
            self.end_was_lost(event.sk, event.time_ns, sink);
        }
        let holder = self.full.with_cookie(its);
        let Some(holder) = holder.filter(|&holder| holder != event.sk) else {
            return;
        };
        let guessed = self
            .full
            .get(holder)
            .is_some_and(|full| full.guess.is_some());
        match self.full.get(event.sk).map(|known| known.guess) {
            // A dump showed two that are alike, and they were taken for each other.
            Some(Some(guess)) => {
                self.full.change(event.sk, |full| full.guess = None);
                self.rename(holder, guess);
            }
            Some(None) if guessed => {
                self.full.change(holder, |full| full.guess = None);
            }
            // A dump showed it, and did not meet its events.
            Some(None) => self.end_was_lost(holder, event.time_ns, sink),
            None if guessed => {
                // The record was not the holder's; one of those that were found beside it is.
                let beside = self.full.found_beside(holder);
                let beside = beside.and_then(|key| Some((key, self.full.get(key)?.cookie()?)));
                if let Some((beside, _)) = beside {
                    self.rekey(beside, event.sk);
                    self.rename(event.sk, its);
                }
                let guess = beside.map(|(_, cookie)| cookie);
                self.full.change(holder, |full| full.guess = guess);
            }
            None => self.rekey(holder, event.sk),
        }
    }

    /// It may be another that is alike.
    fn adopt_by_ends(&mut self, event: &SetState) {
        let (_, mut local, remote) = ends(event);
        if event.from() == TcpState::SYN_SENT {
            local.port = None;
        }
        if let Some(found) = self.full.found((None, local, remote))
            && !self.full.contains(event.sk)
        {
            self.rekey(found, event.sk);
        }
    }

    fn rekey(&mut self, from: u64, to: u64) {
        if let Some(full) = self.full.remove(from) {
            self.full.insert(to, full);
        }
    }

    /// It had the cookie of one that is alike.
    fn rename(&mut self, key: u64, cookie: u64) {
        self.full.change(key, |full| {
            full.dumped = None;
            if full.guess.is_some() {
                full.guess = Some(cookie);
            } else {
                full.socket.cookie = Some(cookie);
                if full.socket.state == TcpState::SYN_SENT {
                    // So was the port.
                    full.socket.local.port = None;
                }
            }
        });
    }
}
