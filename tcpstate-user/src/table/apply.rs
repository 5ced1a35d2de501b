//! The door for events.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZero;
use std::sync::Arc;

use tcpstate_common::SetState;
use tcpstate_common::TcpState;
use tcpstate_common::event::{AF_INET, FLAG_DEAD, FLAG_SOCKET_READ, FLAG_TASK, SEND_SHUTDOWN};

use super::fate::{Fate, end, fate};
use super::owners::Shared;
use super::reconcile::{gone_change, mini_end};
use super::timewait::fate_of;
use super::{
    Change, Correction, Discard, Dwell, Full, Identity, Mini, Owned, Place, Socket, Stay, Table,
    Tuple,
};
use crate::model::{
    Comm, ConnectionId, Endpoint, Evidence, Family, Owner, OwnerSource, Process, Role,
};

/// `TCP_TIMEWAIT_LEN`, include/net/tcp.h: the same in every kernel.
pub(super) const TIME_WAIT_NS: u64 = 60_000_000_000;

/// Why an event was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It has no cookie where each should have one: it can't be told which socket's it is.
    NoCookie,
    /// The socket is not in the table, and there is no room for it.
    Full,
}

impl Table {
    /// Takes one event, in the order of the ring, and tells what changed.
    ///
    /// `container`: that of the event's process, where it has one.
    ///
    /// # Errors
    /// [`Refused`]; of that event nothing is told.
    pub fn apply(
        &mut self,
        event: &SetState,
        container: Option<&Arc<str>>,
        mut sink: impl FnMut(&Change<'_>),
    ) -> Result<(), Refused> {
        if self.identity == Identity::Cookie && event.cookie == 0 {
            return Err(Refused::NoCookie);
        }
        self.newest_ns = self.newest_ns.max(event.time_ns);
        let (from, to) = (event.from(), event.to());
        let waiting = match self.children.is_empty() {
            // From 6.18 on there are none.
            true => None,
            false => self.children.remove(&event.sk),
        };
        if from == TcpState::LISTEN && to == TcpState::SYN_RECV {
            if let Some(first) = waiting {
                self.lone_child(&first, &mut sink);
            }
            if event.remote_port != 0 {
                return self.child(event, event, &mut sink);
            }
            if !self.has_room(netns(event), event.time_ns) {
                return Err(Refused::Full);
            }
            self.children.insert(event.sk, *event);
            return Ok(());
        }
        if let Some(first) = waiting {
            if from == TcpState::SYN_RECV {
                // Its place is free now.
                self.child(&first, event, &mut sink)?;
            } else {
                self.lone_child(&first, &mut sink);
            }
        }
        self.step(event, container, &mut sink)
    }

    /// Gives up waiting for the second event of accepted sockets whose first is older than `before_ns`: it
    /// was lost.
    pub fn flush_children(&mut self, before_ns: u64, mut sink: impl FnMut(&Change<'_>)) {
        let late: Vec<SetState> = self
            .children
            .extract_if(|_, first| first.time_ns < before_ns)
            .map(|(_, first)| first)
            .collect();
        for first in &late {
            self.lone_child(first, &mut sink);
        }
        self.owners.flush(before_ns);
    }

    /// An accepted socket's first event whose second was lost. It shows what the kernel said; the table does
    /// not take the socket in, for whose cookie it carries is not known.
    fn lone_child(&mut self, first: &SetState, sink: &mut impl FnMut(&Change<'_>)) {
        let id = self.new_id(None);
        let mut socket = new_socket(first, id, None);
        socket.remote = Endpoint::default();
        socket.role = Some(Role::Passive);
        socket.owned = self.listener_of(first, &socket);
        sink(&child_change(first, &socket, None, None));
    }

    /// An accepted socket, by its first event and the one that tells who it is.
    fn child(
        &mut self,
        first: &SetState,
        second: &SetState,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Result<(), Refused> {
        let cookie = cookie(second);
        let id = self.new_id(cookie);
        let mut socket = new_socket(second, id, cookie);
        socket.state = TcpState::SYN_RECV;
        socket.role = Some(Role::Passive);
        let accepted = self
            .owners
            .accepted_early(self.event_key(second), first.time_ns);
        let (accepted_ns, accepted) = accepted.unzip();
        socket.owned = accepted.or_else(|| self.listener_of(first, &socket));
        let ends = self.tuple(&socket);
        let before = self.take_request(ends, socket.cookie);
        if let Some(closed) = &mut self.closed {
            closed.mini(ends, first.time_ns);
        }
        self.vacate(second, first.time_ns, sink);
        self.reused(ends, first.time_ns, sink);
        if !self.has_room(socket.netns(), first.time_ns) {
            return Err(Refused::Full);
        }
        sink(&child_change(
            first,
            &socket,
            before,
            Some(Place::of(&socket)),
        ));
        let stay = Stay {
            since_ns: first.time_ns,
            seen: true,
        };
        let full = Full {
            begun_ns: first.time_ns,
            accepted_ns: accepted_ns.unwrap_or(0),
            ..Full::new(socket, stay, first.time_ns)
        };
        self.full.insert(self.event_key(second), full);
        Ok(())
    }

    /// Takes out the half-open request that became the child with these ends, and gave it its cookie; where it was counted.
    fn take_request(&mut self, ends: Tuple, cookie: Option<NonZero<u64>>) -> Option<Place> {
        let key = self.mini_of(TcpState::NEW_SYN_RECV, ends, cookie)?;
        let request = self.mini.get(key)?;
        if request.socket.state != TcpState::NEW_SYN_RECV {
            return None;
        }
        let request = self.mini.remove(key)?;
        Some(Place::of(&request.socket))
    }

    /// Who listens for the socket that `first` is the first event of.
    fn listener_of(&mut self, first: &SetState, child: &Socket) -> Option<Arc<Owned>> {
        // Up to 6.12 the event carries the listener's cookie.
        let keyed = self.identity == Identity::Cookie;
        let named = self.full.get(first.cookie).filter(|_| keyed);
        match named.map(|full| &full.socket) {
            Some(socket) if socket.state == TcpState::LISTEN => {
                let listener = socket.owned.as_ref()?;
                Some(self.owners.shared.as_listener(listener))
            }
            _ => self.listening(child),
        }
    }

    pub(super) const fn event_key(&self, event: &SetState) -> u64 {
        match self.identity {
            Identity::Cookie => event.cookie,
            Identity::Address | Identity::Ends => event.sk,
        }
    }

    /// Any event but an accepted socket's first.
    fn step(
        &mut self,
        event: &SetState,
        container: Option<&Arc<str>>,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Result<(), Refused> {
        let (from, to) = (event.from(), event.to());
        let key = self.event_key(event);
        let opening = from == TcpState::CLOSE;
        let known = if opening {
            self.vacate(event, event.time_ns, sink);
            None
        } else {
            self.adopt(event, sink);
            self.full.place(key)
        };
        let new = known.is_none();
        let place = match known {
            Some(place) => place,
            None => {
                self.make_room(event, sink)?;
                self.take_in(key, event)
            }
        };
        let lost_until_ns = self.lost_until_ns;
        let since_ns = if opening { event.time_ns } else { 0 };
        let accepted = self.owners.accepted_early(key, since_ns);
        let stepped = self.full.change_at(place, |full| {
            let before = (!new).then(|| Place::of(&full.socket));
            let fits = full.socket.state == from;
            let dwell = if opening || from == to {
                Dwell::None
            } else if fits {
                full.stay.dwell(event.time_ns, lost_until_ns)
            } else {
                Dwell::Unknown(Discard::Mismatch)
            };
            full.event_ns = event.time_ns;
            full.missed = false;
            update(&mut full.socket, event);
            if let Some((accepted_ns, owned)) = accepted {
                full.accepted_ns = accepted_ns;
                full.socket.owned = Some(owned);
            }
            own(&mut full.socket, event, container, &mut self.owners.shared);
            if from != to && to != TcpState::CLOSE {
                full.socket.state = to;
                full.stay = Stay {
                    since_ns: event.time_ns,
                    seen: true,
                };
                full.dumped = None;
            }
            (before, dwell)
        });
        let Some((before, dwell)) = stepped else {
            return Ok(());
        };
        if dwell == Dwell::Unknown(Discard::Mismatch) {
            self.corrections.count(Correction::Event);
        }
        // The first event of a child, which told of it else, was lost or refused.
        let lone = new && from == TcpState::SYN_RECV;
        let mut before = before;
        if (lone || from == TcpState::SYN_SENT)
            && to != TcpState::CLOSE
            && let Some(full) = self.full.at(place)
        {
            // Its port is known now.
            let (ends, cookie) = (self.tuple(&full.socket), full.socket.cookie);
            if lone {
                before = self.take_request(ends, cookie);
            }
            self.reused(ends, event.time_ns, sink);
        }
        if to == TcpState::CLOSE && from != to {
            if let Some(full) = self.full.remove_at(place) {
                self.close(event, full, dwell, before, sink);
            }
            return Ok(());
        }
        let Some(full) = self.full.at(place) else {
            return Ok(());
        };
        if to == TcpState::ESTABLISHED {
            self.owners.established(&full.socket);
        }
        sink(&Change {
            time_ns: event.time_ns,
            socket: &full.socket,
            kernel: Some((from, to)),
            // The same state twice: shutdown() and then close(), or a disconnect of what is closed.
            shown: (from != to).then_some((from, to)),
            dwell,
            evidence: Evidence::Tracepoint,
            end: None,
            before,
            after: (to != TcpState::CLOSE).then(|| Place::of(&full.socket)),
        });
        if to == TcpState::CLOSE {
            self.full.remove_at(place);
        }
        Ok(())
    }

    /// For a socket that the table does not know. One that is refused ends what was there before all the same, and a dump
    /// that is being read does not bring it back when it has closed.
    fn make_room(
        &mut self,
        event: &SetState,
        sink: &mut impl FnMut(&Change<'_>),
    ) -> Result<(), Refused> {
        if self.len() < self.most {
            return Ok(());
        }
        let (_, local, remote) = ends(event);
        let netns = netns(event);
        let ends = self.identity.tuple(netns, local, remote);
        let opens = [TcpState::SYN_SENT, TcpState::SYN_RECV].contains(&event.from());
        if opens && event.to() != TcpState::CLOSE {
            self.reused(ends, event.time_ns, sink);
        }
        if event.to() == TcpState::CLOSE {
            self.note_close(event, ends);
        }
        match self.has_room(netns, event.time_ns) {
            true => Ok(()),
            false => Err(Refused::Full),
        }
    }

    /// A dump that is being read may show the full socket still.
    fn note_close(&mut self, event: &SetState, ends: Tuple) {
        let key = self.event_key(event);
        if let Some(closed) = &mut self.closed {
            match self.identity {
                Identity::Cookie | Identity::Address => closed.full(key, event.time_ns),
                Identity::Ends => closed.full_by_ends(ends, event.time_ns),
            }
        }
    }

    /// The rest of a step into CLOSE.
    fn close(
        &mut self,
        event: &SetState,
        full: Full,
        dwell: Dwell,
        before: Option<Place>,
        sink: &mut impl FnMut(&Change<'_>),
    ) {
        let from = event.from();
        let Full {
            mut socket,
            stay,
            timewait,
            ..
        } = full;
        if !event.has(FLAG_DEAD) {
            self.generations.closed(socket.id);
        }
        socket.holders = None;
        let fate = timewait.map_or_else(|| fate(event), fate_of);
        socket.state = match fate {
            Fate::Gone => TcpState::CLOSE,
            Fate::TimeWait => TcpState::TIME_WAIT,
            Fate::Orphan | Fate::Undecided => from,
        };
        let stays = socket.state == from;
        let gone = fate == Fate::Gone;
        let ended = !stays && from != TcpState::LISTEN;
        sink(&Change {
            time_ns: event.time_ns,
            socket: &socket,
            kernel: Some((from, TcpState::CLOSE)),
            shown: (!stays).then_some((from, socket.state)),
            dwell,
            evidence: if gone {
                Evidence::Tracepoint
            } else if timewait.is_some() {
                Evidence::Fentry
            } else {
                Evidence::Inferred
            },
            end: ended.then(|| end(event)),
            before,
            after: (!gone).then(|| Place::of(&socket)),
        });
        // Also where a minisocket takes its place.
        self.note_close(event, self.tuple(&socket));
        if gone {
            return;
        }
        let mini = Mini {
            stay: if stays {
                stay
            } else {
                Stay {
                    since_ns: event.time_ns,
                    seen: true,
                }
            },
            expires_ns: (!stays).then_some(event.time_ns.saturating_add(TIME_WAIT_NS)),
            seen: 0,
            missed: false,
            event_ns: event.time_ns,
            socket,
        };
        self.insert_mini(mini);
    }

    /// A socket whose beginning was not seen, or that begins with this event. Gives its place.
    fn take_in(&mut self, key: u64, event: &SetState) -> u32 {
        let cookie = cookie(event);
        let mut socket = new_socket(event, self.new_id(cookie), cookie);
        socket.state = event.from();
        let stay = Stay {
            since_ns: event.time_ns,
            seen: false,
        };
        let mut full = Full::new(socket, stay, event.time_ns);
        if event.from() == TcpState::CLOSE {
            full.begun_ns = event.time_ns;
        } else {
            self.correct_lack(Correction::Event);
        }
        self.full.insert(key, full)
    }

    /// A socket has these ends now: the timewait socket that had them before was taken out of its way, without a word
    /// (`tcp_twsk_unique` for a connect, `TCP_TW_SYN` for a SYN). Two sockets can't have the same ends in one namespace.
    fn reused(&mut self, ends: Tuple, time_ns: u64, sink: &mut impl FnMut(&Change<'_>)) {
        if self.identity == Identity::Ends {
            return;
        }
        if let Some(closed) = &mut self.closed {
            closed.mini(ends, time_ns);
        }
        let timewait = self.mini.with_ends(false, ends, |_| true);
        let Some(Mini { mut socket, .. }) = timewait.and_then(|key| self.mini.remove(key)) else {
            return;
        };
        let before = Place::of(&socket);
        socket.state = TcpState::CLOSE;
        sink(&Change {
            evidence: Evidence::Inferred,
            ..gone_change(time_ns, &socket, before, mini_end(before.state))
        });
    }
}

/// Where each event should have one, that of the socket; else where the kernel has made one.
pub(super) const fn cookie(event: &SetState) -> Option<NonZero<u64>> {
    NonZero::new(event.cookie)
}

/// What the gauges and streams are told of an accepted socket's first event.
fn child_change<'a>(
    first: &SetState,
    socket: &'a Socket,
    before: Option<Place>,
    after: Option<Place>,
) -> Change<'a> {
    Change {
        time_ns: first.time_ns,
        socket,
        kernel: Some((TcpState::LISTEN, TcpState::SYN_RECV)),
        shown: Some((TcpState::NEW_SYN_RECV, TcpState::SYN_RECV)),
        // The listener's stay has not ended, and no event shows when the request began.
        dwell: Dwell::None,
        evidence: Evidence::Tracepoint,
        end: None,
        before,
        after,
    }
}

fn new_socket(event: &SetState, id: ConnectionId, cookie: Option<NonZero<u64>>) -> Socket {
    let (family, local, remote) = ends(event);
    let from = event.from();
    Socket {
        id,
        cookie,
        netns: NonZero::new(event.netns),
        family,
        local,
        remote,
        state: from,
        // SYN_SENT is entered by connect() only; SYN_RECV also by a simultaneous open.
        role: (from == TcpState::SYN_SENT).then_some(Role::Active),
        owned: None,
        uid: uid(event),
        holders: None,
        established: !matches!(
            from,
            TcpState::CLOSE | TcpState::LISTEN | TcpState::SYN_SENT | TcpState::SYN_RECV
        ),
    }
}

/// Brings the socket up to what the event tells of it.
fn update(socket: &mut Socket, event: &SetState) {
    let (from, to) = (event.from(), event.to());
    socket.uid = uid(event);
    socket.cookie = cookie(event).or(socket.cookie);
    // A port that is 0 has been given back already.
    socket.local.port = port(event.local_port).or(socket.local.port);
    if from == TcpState::CLOSE && to == TcpState::SYN_SENT {
        socket.role = Some(Role::Active);
    }
    if from == TcpState::SYN_SENT && to != TcpState::CLOSE {
        let (_, local, _) = ends(event);
        socket.local.addr = local.addr;
    }
    if to == TcpState::ESTABLISHED {
        socket.established = true;
    }
}

/// Whose the socket is, where the event's process made the call that caused it.
fn own(socket: &mut Socket, event: &SetState, container: Option<&Arc<str>>, shared: &mut Shared) {
    let from = event.from();
    let source = match (from, event.to()) {
        (TcpState::CLOSE, TcpState::SYN_SENT) => OwnerSource::Connect,
        (TcpState::CLOSE, TcpState::LISTEN) => OwnerSource::Listen,
        _ => OwnerSource::Closer,
    };
    if source == OwnerSource::Closer {
        let known = socket
            .owner()
            .is_some_and(|owner| owner.source != OwnerSource::Listener);
        // `ss -K` of a listener runs in the task of `ss`, and unlike close sets no mask.
        let aborted = from == TcpState::LISTEN && event.shutdown & SEND_SHUTDOWN == 0;
        if known || aborted || !event.has(FLAG_TASK) {
            return;
        }
    }
    socket.owned = event.has(FLAG_TASK).then(|| {
        shared.share(Owned {
            owner: Owner {
                process: Process {
                    pid: event.tgid,
                    start_ns: event.start_ns,
                    comm: comm(event),
                },
                source,
            },
            container: container.cloned(),
        })
    });
}

/// Family and both ends as the contract writes them. A listener has no remote end.
pub(super) fn ends(event: &SetState) -> (Family, Endpoint, Endpoint) {
    let local = addr(event.local_addr);
    let remote = addr(event.remote_addr);
    let v4 = event.family == AF_INET || remote.is_ipv4();
    let (from, to) = (event.from(), event.to());
    // LISTEN→SYN_RECV is an accepted socket's.
    let listens = (from == TcpState::LISTEN && to != TcpState::SYN_RECV) || to == TcpState::LISTEN;
    let endpoint = |addr: IpAddr, number: u16| Endpoint {
        addr: (listens || !addr.is_unspecified()).then_some(addr),
        port: port(number),
    };
    (
        if v4 { Family::Ipv4 } else { Family::Ipv6 },
        endpoint(local, event.local_port),
        if listens {
            Endpoint::default()
        } else {
            endpoint(remote, event.remote_port)
        },
    )
}

/// Inode; none where the kernel side can't read it.
fn netns(event: &SetState) -> Option<u32> {
    (event.netns != 0).then_some(event.netns)
}

/// Without BTF the kernel side knows the name of a thread, not of its process: then it gives none.
fn comm(event: &SetState) -> Option<Comm> {
    let comm = Comm::from_kernel(event.comm);
    (event.has(FLAG_SOCKET_READ) || comm != Comm::default()).then_some(comm)
}

fn port(number: u16) -> Option<u16> {
    (number != 0).then_some(number)
}

fn uid(event: &SetState) -> Option<u32> {
    (event.uid != u32::MAX).then_some(event.uid)
}

fn addr(bytes: [u8; 16]) -> IpAddr {
    const MAPPED: u128 = 0xffff;
    let bits = u128::from_be_bytes(bytes);
    if bits >> 32 == MAPPED {
        Ipv4Addr::from(bits as u32).into()
    } else {
        Ipv6Addr::from(bits).into()
    }
}
