//! The door for what the kernel's own functions tell of timewait sockets, where they can be followed.

use tcpstate_common::event::{TIMEWAIT_BEGINS, TIMEWAIT_ENDS, TIMEWAIT_SET_AGAIN};
use tcpstate_common::{TcpState, TimeWait};

use super::apply::TIME_WAIT_NS;
use super::fate::Fate;
use super::reconcile::{gone_change, mini_end};
use super::{Change, Mini, Place, Stay, Table, is_request};
use crate::model::Evidence;

impl Table {
    /// Takes a step of a timewait socket, in the order of the ring.
    pub fn time_wait(&mut self, event: &TimeWait, mut sink: impl FnMut(&Change<'_>)) {
        self.newest_ns = self.newest_ns.max(event.time_ns);
        match event.what {
            TIMEWAIT_BEGINS => {
                // An unknown socket is not worth a word: its →CLOSE comes at once.
                self.full.change(event.cookie, |full| {
                    full.timewait = Some(TcpState::from_kernel(event.state));
                });
            }
            TIMEWAIT_SET_AGAIN => self.set_again(event, &mut sink),
            TIMEWAIT_ENDS => self.ends(event, &mut sink),
            _ => {}
        }
    }

    /// An orphan in FIN_WAIT2 got its peer's FIN; or what is in TIME_WAIT stays so for its full time once more.
    fn set_again(&mut self, event: &TimeWait, sink: &mut impl FnMut(&Change<'_>)) {
        let Some(mini) = self.mini.get_mut(event.cookie) else {
            return self.before_close(event);
        };
        mini.expires_ns = Some(event.time_ns.saturating_add(TIME_WAIT_NS));
        mini.event_ns = event.time_ns;
        let before = Place::of(&mini.socket);
        if before.state != TcpState::FIN_WAIT2 {
            return;
        }
        let dwell = mini.stay.dwell(event.time_ns, self.lost_until_ns);
        mini.socket.state = TcpState::TIME_WAIT;
        mini.stay = Stay {
            since_ns: event.time_ns,
            seen: true,
        };
        sink(&Change {
            time_ns: event.time_ns,
            socket: &mini.socket,
            kernel: None,
            shown: Some((before.state, TcpState::TIME_WAIT)),
            dwell,
            evidence: Evidence::Fentry,
            end: Some(mini_end(before.state)),
            before: Some(before),
            after: Some(Place::of(&mini.socket)),
        });
    }

    fn ends(&mut self, event: &TimeWait, sink: &mut impl FnMut(&Change<'_>)) {
        // Also of one that only the dump has shown.
        if let Some(closed) = &mut self.closed {
            closed.timewait(event.cookie, event.time_ns);
        }
        let Some(Mini {
            mut socket, stay, ..
        }) = self
            .mini
            .get(event.cookie)
            .is_some_and(|mini| !is_request(mini.socket.state))
            .then(|| self.mini.remove(event.cookie))
            .flatten()
        else {
            return self.before_close(event);
        };
        let before = Place::of(&socket);
        socket.state = TcpState::CLOSE;
        sink(&Change {
            dwell: stay.dwell(event.time_ns, self.lost_until_ns),
            evidence: Evidence::Fentry,
            ..gone_change(event.time_ns, &socket, before, mini_end(before.state))
        });
    }
}

impl Table {
    /// The kernel shows the timewait socket to other CPUs before it closes the full one: a step can be told before the
    /// →CLOSE that it follows.
    fn before_close(&mut self, event: &TimeWait) {
        self.full.change(event.cookie, |full| {
            if full.timewait.is_some() {
                full.timewait = Some(TcpState::from_kernel(event.state));
            }
        });
    }
}

/// What becomes of a socket at its →CLOSE by what the kernel did just before.
pub(super) fn fate_of(state: TcpState) -> Fate {
    match state {
        TcpState::TIME_WAIT => Fate::TimeWait,
        TcpState::FIN_WAIT2 => Fate::Orphan,
        // It is over already.
        TcpState::CLOSE => Fate::Gone,
        _ => Fate::Undecided,
    }
}
