//! How a transition lies in the ring: a part that each has, and parts that only some have. The length tells which are
//! there, for each part is as long as no sum of others.
//!
//! Most of an event's cost is the ring's memory, so nothing is written that only says nothing: half as much as the whole
//! [`SetState`] for a transition over IPv4 that nobody called for.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::event::{AF_INET, AF_INET6, COMM_LEN, FLAG_TASK, SetState};

/// What each has. Fields as in [`SetState`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Head {
    pub time_ns: u64,
    pub sk: u64,
    pub cookie: u64,
    pub netns: u32,
    pub uid: u32,
    pub lost: u32,
    pub sk_err: i32,
    /// Network order; says nothing where [`Addrs6`] is there.
    pub local_addr: [u8; 4],
    pub remote_addr: [u8; 4],
    pub local_port: u16,
    pub remote_port: u16,
    pub from: u8,
    pub to: u8,
    pub shutdown: u8,
    /// Without [`FLAG_TASK`]: that [`Caller`] is there says it.
    pub flags: u8,
}

/// The addresses of an AF_INET6 socket, which may be IPv4's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Addrs6 {
    pub local_addr: [u8; 16],
    pub remote_addr: [u8; 16],
}

/// The process whose call caused the transition.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Caller {
    pub start_ns: u64,
    pub cgroup_id: u64,
    pub comm: [u8; COMM_LEN],
    pub tgid: u32,
    /// Up to the next multiple of 8.
    pub pad: u32,
}

/// One part behind the other.
#[repr(C)]
pub struct With<A, B>(pub A, pub B);

const _: () = assert!(size_of::<Head>() == 56);
const _: () = assert!(size_of::<Addrs6>() == 32);
const _: () = assert!(size_of::<Caller>() == 40);
const _: () = assert!(size_of::<With<With<Head, Addrs6>, Caller>>() == SetState::LONGEST);

impl SetState {
    /// The longest of its records.
    pub const LONGEST: usize = 128;

    /// `None` where the length is that of no transition. Any bytes of a right length are one.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = Head::read_from_prefix(bytes).ok()?;
        let (addrs, rest) = if [0, size_of::<Caller>()].contains(&rest.len()) {
            (None, rest)
        } else {
            let (addrs, rest) = Addrs6::read_from_prefix(rest).ok()?;
            (Some(addrs), rest)
        };
        let caller = if rest.is_empty() {
            None
        } else {
            Some(Caller::read_from_bytes(rest).ok()?)
        };
        Some(Self::of(&head, addrs, caller))
    }

    fn of(head: &Head, addrs: Option<Addrs6>, caller: Option<Caller>) -> Self {
        let family = if addrs.is_some() { AF_INET6 } else { AF_INET };
        let addrs = addrs.unwrap_or_else(|| Addrs6 {
            local_addr: v4_mapped(head.local_addr),
            remote_addr: v4_mapped(head.remote_addr),
        });
        let task = if caller.is_some() { FLAG_TASK } else { 0 };
        let caller = caller.unwrap_or(Caller {
            start_ns: 0,
            cgroup_id: 0,
            comm: [0; COMM_LEN],
            tgid: 0,
            pad: 0,
        });
        Self {
            time_ns: head.time_ns,
            sk: head.sk,
            cookie: head.cookie,
            start_ns: caller.start_ns,
            cgroup_id: caller.cgroup_id,
            netns: head.netns,
            tgid: caller.tgid,
            uid: head.uid,
            sk_err: head.sk_err,
            local_addr: addrs.local_addr,
            remote_addr: addrs.remote_addr,
            comm: caller.comm,
            local_port: head.local_port,
            remote_port: head.remote_port,
            lost: head.lost,
            family,
            from: head.from,
            to: head.to,
            shutdown: head.shutdown,
            flags: head.flags & !FLAG_TASK | task,
        }
    }

    /// Its record, as the kernel side writes it; `room` for it. For recordings and for what is made up: the kernel side
    /// writes the parts.
    #[must_use]
    pub fn encode<'a>(&self, room: &'a mut [u8; Self::LONGEST]) -> &'a [u8] {
        let v6 = self.family == AF_INET6;
        let v4 = |[.., a, b, c, d]: [u8; 16]| if v6 { [0; 4] } else { [a, b, c, d] };
        let head = Head {
            time_ns: self.time_ns,
            sk: self.sk,
            cookie: self.cookie,
            netns: self.netns,
            uid: self.uid,
            lost: self.lost,
            sk_err: self.sk_err,
            local_addr: v4(self.local_addr),
            remote_addr: v4(self.remote_addr),
            local_port: self.local_port,
            remote_port: self.remote_port,
            from: self.from,
            to: self.to,
            shutdown: self.shutdown,
            flags: self.flags & !FLAG_TASK,
        };
        let addrs = Addrs6 {
            local_addr: self.local_addr,
            remote_addr: self.remote_addr,
        };
        let caller = Caller {
            start_ns: self.start_ns,
            cgroup_id: self.cgroup_id,
            comm: self.comm,
            tgid: self.tgid,
            pad: 0,
        };
        let mut len = 0;
        let mut put = |part: &[u8]| {
            room[len..len + part.len()].copy_from_slice(part);
            len += part.len();
        };
        put(head.as_bytes());
        if v6 {
            put(addrs.as_bytes());
        }
        if self.has(FLAG_TASK) {
            put(caller.as_bytes());
        }
        &room[..len]
    }
}

/// An address of IPv4 behind `::ffff:`.
#[must_use]
pub fn v4_mapped(addr: [u8; 4]) -> [u8; 16] {
    let mut mapped = [0; 16];
    mapped[10..12].fill(0xff);
    mapped[12..].copy_from_slice(&addr);
    mapped
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;
    use crate::event::{BadRecord, Event};

    fn event(family: u16, flags: u8) -> SetState {
        SetState {
            time_ns: 1 << 60,
            sk: 2,
            cookie: 3,
            netns: 4,
            uid: 5,
            sk_err: 104,
            local_addr: v4_mapped([127, 0, 0, 1]),
            remote_addr: v4_mapped([127, 0, 0, 2]),
            local_port: 6,
            remote_port: 7,
            lost: u32::MAX,
            family,
            from: 8,
            to: 9,
            shutdown: 3,
            flags,
            ..SetState::new_zeroed()
        }
    }

    fn called(event: SetState) -> SetState {
        SetState {
            start_ns: 10,
            cgroup_id: 11,
            tgid: 12,
            comm: *b"a name of 15 by\0",
            flags: event.flags | FLAG_TASK,
            ..event
        }
    }

    #[test]
    fn what_is_encoded_is_decoded_and_no_longer_than_it_must_be() {
        let [v4, v6] = [event(AF_INET, 0x17), event(AF_INET6, 0xe7)];
        let v6 = SetState {
            remote_addr: [0xfe; 16],
            ..v6
        };
        for (event, len) in [(v4, 56), (v6, 88), (called(v4), 96), (called(v6), 128)] {
            let mut room = [0; SetState::LONGEST];
            let record = event.encode(&mut room);
            assert_eq!(record.len(), len);
            assert_eq!(Event::decode(record), Ok(Event::SetState(event)));
        }
    }

    #[test]
    fn other_lengths_are_no_records() {
        let bytes = [0; 256];
        let known = [32, 56, 64, 88, 96, 128];
        for len in (0..=bytes.len()).filter(|len| !known.contains(len)) {
            assert_eq!(Event::decode(&bytes[..len]), Err(BadRecord { len }));
        }
    }
}
