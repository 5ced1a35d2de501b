//! Where a struct's fields lie in the running kernel, and how many arguments a function has, from its BTF. No more of
//! BTF than that.
//!
//! Rust has no CO-RE, and aya gives no member offsets. The bytes come from the kernel, but are not trusted: each read
//! is within bounds or an error.

use std::fs;

use tcpstate_common::config::{ListOffsets, Offsets};

/// The running kernel's BTF.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Anonymous members and typedefs within each other, at most; the kernel has about five.
const MAX_DEPTH: u32 = 32;
/// Types and members looked at to find one field, at most: bounds the work on a malformed file.
const MAX_STEPS: u32 = 100_000;

#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("cannot read {VMLINUX}: {0}")]
    Read(std::io::Error),
    #[error("the kernel's BTF is malformed at byte {0}")]
    Malformed(usize),
    #[error("the kernel's BTF has type kind {0}, which this version does not know")]
    Kind(u32),
    #[error("the kernel's BTF has no struct {0}")]
    NoStruct(String),
    #[error("the kernel's BTF has no field {0}")]
    NoField(String),
    #[error("the kernel was built without {option}, which tcpstate needs")]
    Option { option: &'static str },
    #[error("the kernel's {0} is a bit field, which can't be addressed")]
    BitField(String),
    #[error("the kernel's {field} has {found} bytes where {expected} were expected")]
    Size {
        field: String,
        found: u32,
        expected: u32,
    },
}

use BtfError::Malformed;

/// What the eBPF programs need to know of the kernel that runs them.
#[derive(Debug)]
pub struct Layout {
    pub offsets: Offsets,
    /// Whether `offsets` has those in `list`; else why not.
    pub list: Result<(), String>,
    /// Of `inet_csk_accept`; `None` where there is no such function to attach to.
    pub accept_arguments: Option<usize>,
}

impl Layout {
    #[must_use]
    pub fn without_btf() -> Self {
        Self {
            offsets: Offsets::default(),
            list: Err("it needs BTF".to_owned()),
            accept_arguments: None,
        }
    }
}

/// Reads the running kernel's BTF.
///
/// # Errors
/// Where there is no BTF, or it is not as expected.
pub fn layout() -> Result<Layout, BtfError> {
    let bytes = fs::read(VMLINUX).map_err(BtfError::Read)?;
    layout_in(&Btf::parse(&bytes)?)
}

pub(crate) fn layout_in(btf: &Btf<'_>) -> Result<Layout, BtfError> {
    let mut offsets = offsets_in(btf)?;
    let list = list_offsets_in(btf).map(|found| offsets.list = found);
    Ok(Layout {
        offsets,
        list: list.map_err(|error| error.to_string()),
        accept_arguments: btf.arguments("inet_csk_accept")?,
    })
}

fn offsets_in(btf: &Btf<'_>) -> Result<Offsets, BtfError> {
    let sock = btf.structure("sock")?;
    let tcp_sock = btf.structure("tcp_sock")?;
    let net = btf.structure("net")?;
    let task = btf.structure("task_struct")?;
    let without = |option| {
        move |error| match error {
            BtfError::NoField(_) => BtfError::Option { option },
            other => other,
        }
    };
    let (ipv6, namespaces) = (without("CONFIG_IPV6"), without("CONFIG_NET_NS"));
    let timewait = btf.structure("inet_timewait_sock")?;
    let socket = btf.structure("socket")?;
    Ok(Offsets {
        sk_family: sock.offset("__sk_common.skc_family", 2)?,
        sk_num: sock.offset("__sk_common.skc_num", 2)?,
        sk_dport: sock.offset("__sk_common.skc_dport", 2)?,
        sk_rcv_saddr: sock.offset("__sk_common.skc_rcv_saddr", 4)?,
        sk_daddr: sock.offset("__sk_common.skc_daddr", 4)?,
        sk_v6_rcv_saddr: sock
            .offset("__sk_common.skc_v6_rcv_saddr", 16)
            .map_err(ipv6)?,
        sk_v6_daddr: sock.offset("__sk_common.skc_v6_daddr", 16).map_err(ipv6)?,
        sk_net: sock
            .offset("__sk_common.skc_net.net", 8)
            .map_err(namespaces)?,
        sk_flags: sock.offset("__sk_common.skc_flags", 8)?,
        sk_cookie: sock.offset("__sk_common.skc_cookie", 8)?,
        sk_err: sock.offset("sk_err", 4)?,
        sk_uid: sock.offset("sk_uid", 4)?,
        sk_protocol: sock.offset("sk_protocol", 2)?,
        sk_shutdown: sock.offset("sk_shutdown", 1)?,
        inet_sport: tcp_sock.offset("inet_conn.icsk_inet.inet_sport", 2)?,
        tcp_linger2: tcp_sock.offset("linger2", 4)?,
        tcp_rcv_tstamp: tcp_sock.offset("rcv_tstamp", 4)?,
        net_inum: net.offset("ns.inum", 4)?,
        task_flags: task.offset("flags", 4)?,
        task_tgid: task.offset("tgid", 4)?,
        task_group_leader: task.offset("group_leader", 8)?,
        task_comm: task.offset("comm", 16)?,
        task_start_boottime: task.offset("start_boottime", 8)?,
        tw_cookie: timewait.offset("__tw_common.skc_cookie", 8)?,
        tw_net: timewait.offset("__tw_common.skc_net.net", 8)?,
        tw_substate: timewait.offset("tw_substate", 1)?,
        socket_sk: socket.offset("sk", 8)?,
        list: ListOffsets::default(),
    })
}

/// Apart, since without them no more than the iterator over sockets is lost.
fn list_offsets_in(btf: &Btf<'_>) -> Result<ListOffsets, BtfError> {
    let sock = btf.structure("sock")?;
    let tcp_sock = btf.structure("tcp_sock")?;
    let timewait = btf.structure("inet_timewait_sock")?;
    let request = btf.structure("request_sock")?;
    let allocated = btf.structure("socket_alloc")?;
    Ok(ListOffsets {
        sk_state: sock.offset("__sk_common.skc_state", 1)?,
        sk_socket: sock.offset("sk_socket", 8)?,
        sk_ack_backlog: sock.offset("sk_ack_backlog", 4)?,
        sk_max_ack_backlog: sock.offset("sk_max_ack_backlog", 4)?,
        tcp_rcv_nxt: tcp_sock.offset("rcv_nxt", 4)?,
        tcp_copied_seq: tcp_sock.offset("copied_seq", 4)?,
        tcp_write_seq: tcp_sock.offset("write_seq", 4)?,
        tcp_snd_una: tcp_sock.offset("snd_una", 4)?,
        tw_expires: timewait.offset("tw_timer.expires", 8)?,
        rsk_expires: request.offset("rsk_timer.expires", 8)?,
        socket_ino: allocated.offset("vfs_inode.i_ino", 8)?,
    })
}

const MAGIC: u16 = 0xeb9f;
const TYPE_LEN: usize = 12;
const MEMBER_LEN: usize = 12;

mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FWD: u32 = 7;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNC: u32 = 12;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const FLOAT: u32 = 16;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// A BTF file with its types found.
pub struct Btf<'a> {
    bytes: &'a [u8],
    /// Where each type begins in `bytes`; the type of id 1 is the first.
    types: Vec<u32>,
    /// Where the strings are in `bytes`.
    strings: std::ops::Range<usize>,
}

/// `struct btf_type`.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    info: u32,
    /// The size, or the id of the type that this one refers to.
    size_or_type: u32,
}

impl Type {
    const fn kind(self) -> u32 {
        self.info >> 24 & 0x1f
    }

    const fn vlen(self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Whether the members' offsets carry the size of bit fields.
    const fn kind_flag(self) -> bool {
        self.info >> 31 != 0
    }

    /// What follows the type itself, in bytes.
    const fn tail(self) -> Result<usize, BtfError> {
        Ok(match self.kind() {
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * self.vlen(),
            kind::ENUM | kind::FUNC_PROTO => 8 * self.vlen(),
            kind::PTR
            | kind::FWD
            | kind::TYPEDEF
            | kind::VOLATILE
            | kind::CONST
            | kind::RESTRICT
            | kind::FUNC
            | kind::FLOAT
            | kind::TYPE_TAG => 0,
            unknown => return Err(BtfError::Kind(unknown)),
        })
    }
}

impl<'a> Btf<'a> {
    /// # Errors
    /// Where the bytes are not BTF in this machine's byte order.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        if u16_at(bytes, 0)? != MAGIC {
            return Err(Malformed(0));
        }
        let header_len = u32_at(bytes, 4)? as usize;
        let section = |at: usize| {
            let start = header_len
                .checked_add(u32_at(bytes, at)? as usize)
                .ok_or(Malformed(at))?;
            let end = start
                .checked_add(u32_at(bytes, at + 4)? as usize)
                .ok_or(Malformed(at))?;
            bytes
                .get(start..end)
                .map(|_| start..end)
                .ok_or(Malformed(at))
        };
        let (type_section, strings) = (section(8)?, section(16)?);

        let mut btf = Self {
            bytes,
            types: Vec::new(),
            strings,
        };
        let mut at = type_section.start;
        while at < type_section.end {
            btf.types
                .push(u32::try_from(at).map_err(|_| Malformed(at))?);
            at += TYPE_LEN + btf.type_at(at)?.tail()?;
        }
        if at == type_section.end {
            Ok(btf)
        } else {
            Err(Malformed(at))
        }
    }

    /// The first struct of that name.
    ///
    /// # Errors
    /// Where there is none.
    pub fn structure(&self, name: &str) -> Result<Struct<'_>, BtfError> {
        for &at in &self.types {
            let found = self.type_at(at as usize)?;
            if found.kind() == kind::STRUCT && self.string(found.name)? == name.as_bytes() {
                return Ok(Struct {
                    btf: self,
                    name: name.to_owned(),
                    ty: found,
                });
            }
        }
        Err(BtfError::NoStruct(name.to_owned()))
    }

    /// How many arguments the function of that name has.
    ///
    /// # Errors
    /// Where the BTF is malformed.
    pub fn arguments(&self, name: &str) -> Result<Option<usize>, BtfError> {
        for &at in &self.types {
            let found = self.type_at(at as usize)?;
            if found.kind() == kind::FUNC && self.string(found.name)? == name.as_bytes() {
                let proto = self.type_by_id(found.size_or_type)?;
                return Ok(proto
                    .filter(|proto| proto.kind() == kind::FUNC_PROTO)
                    .map(Type::vlen));
            }
        }
        Ok(None)
    }

    fn type_at(&self, at: usize) -> Result<Type, BtfError> {
        Ok(Type {
            at,
            name: u32_at(self.bytes, at)?,
            info: u32_at(self.bytes, at + 4)?,
            size_or_type: u32_at(self.bytes, at + 8)?,
        })
    }

    /// The type of that id, or `None` for 0: void.
    fn type_by_id(&self, id: u32) -> Result<Option<Type>, BtfError> {
        let Some(index) = id.checked_sub(1) else {
            return Ok(None);
        };
        let at = *self
            .types
            .get(index as usize)
            .ok_or(Malformed(self.bytes.len()))?;
        self.type_at(at as usize).map(Some)
    }

    /// As [`Btf::type_by_id`], behind typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Result<Option<Type>, BtfError> {
        for _ in 0..MAX_DEPTH {
            match self.type_by_id(id)? {
                Some(ty)
                    if matches!(
                        ty.kind(),
                        kind::TYPEDEF
                            | kind::VOLATILE
                            | kind::CONST
                            | kind::RESTRICT
                            | kind::TYPE_TAG
                    ) =>
                {
                    id = ty.size_or_type;
                }
                end => return Ok(end),
            }
        }
        Err(Malformed(self.bytes.len()))
    }

    /// Size of a variable of that type, or `None` where it has none.
    fn size(&self, id: u32) -> Result<Option<u32>, BtfError> {
        let mut count = 1_u32;
        let mut id = id;
        for _ in 0..MAX_DEPTH {
            let Some(ty) = self.resolve(id)? else {
                return Ok(None);
            };
            let one = match ty.kind() {
                kind::INT
                | kind::STRUCT
                | kind::UNION
                | kind::ENUM
                | kind::ENUM64
                | kind::FLOAT => ty.size_or_type,
                kind::PTR => 8,
                kind::ARRAY => {
                    id = u32_at(self.bytes, ty.at + TYPE_LEN)?;
                    let len = u32_at(self.bytes, ty.at + TYPE_LEN + 8)?;
                    count = count.checked_mul(len).ok_or(Malformed(ty.at))?;
                    continue;
                }
                _ => return Ok(None),
            };
            return count.checked_mul(one).map(Some).ok_or(Malformed(ty.at));
        }
        Err(Malformed(self.bytes.len()))
    }

    fn string(&self, offset: u32) -> Result<&'a [u8], BtfError> {
        let start = self
            .strings
            .start
            .checked_add(offset as usize)
            .ok_or(Malformed(self.strings.end))?;
        let rest = self
            .bytes
            .get(start..self.strings.end)
            .ok_or(Malformed(start))?;
        let len = rest
            .iter()
            .position(|&byte| byte == 0)
            .ok_or(Malformed(start))?;
        Ok(&rest[..len])
    }
}

/// A struct found by name.
pub struct Struct<'a> {
    btf: &'a Btf<'a>,
    name: String,
    ty: Type,
}

/// A member found by name: its offset in bits in the struct that was asked.
struct Member {
    bits: u32,
    type_id: u32,
    bit_field: bool,
}

impl Struct<'_> {
    /// Offset in bytes of the field at a dotted path through nested structs; anonymous ones go unnamed, as in C.
    ///
    /// # Errors
    /// Where there is no such field, or it is a bit field, or has not `size` bytes.
    pub fn offset(&self, path: &str, size: u32) -> Result<u32, BtfError> {
        let full = || format!("{}.{path}", self.name);
        let mut steps = 0;
        let mut within = Some(self.ty);
        let mut bits = 0_u32;
        let mut last = None;
        for name in path.split('.') {
            let ty = within.ok_or_else(|| BtfError::NoField(full()))?;
            let member = self
                .member(ty, name.as_bytes(), MAX_DEPTH, &mut steps)?
                .ok_or_else(|| BtfError::NoField(full()))?;
            bits = bits.checked_add(member.bits).ok_or(Malformed(ty.at))?;
            within = self.btf.resolve(member.type_id)?;
            last = Some(member);
        }
        let member = last.ok_or_else(|| BtfError::NoField(full()))?;
        if member.bit_field || !bits.is_multiple_of(8) {
            return Err(BtfError::BitField(full()));
        }
        match self.btf.size(member.type_id)?.unwrap_or(0) {
            found if found == size => Ok(bits / 8),
            found => Err(BtfError::Size {
                field: full(),
                found,
                expected: size,
            }),
        }
    }

    /// The member of that name in `ty` or in what is anonymous in it.
    fn member(
        &self,
        ty: Type,
        name: &[u8],
        depth: u32,
        steps: &mut u32,
    ) -> Result<Option<Member>, BtfError> {
        if !matches!(ty.kind(), kind::STRUCT | kind::UNION) {
            return Ok(None);
        }
        let depth = depth.checked_sub(1).ok_or(Malformed(ty.at))?;
        for index in 0..ty.vlen() {
            *steps += 1;
            if *steps > MAX_STEPS {
                return Err(Malformed(ty.at));
            }
            let at = ty.at + TYPE_LEN + MEMBER_LEN * index;
            let (name_offset, type_id, place) = (
                u32_at(self.btf.bytes, at)?,
                u32_at(self.btf.bytes, at + 4)?,
                u32_at(self.btf.bytes, at + 8)?,
            );
            let (bits, bit_field) = if ty.kind_flag() {
                (place & 0x00ff_ffff, place >> 24 != 0)
            } else {
                (place, false)
            };
            let member_name = self.btf.string(name_offset)?;
            if member_name == name {
                return Ok(Some(Member {
                    bits,
                    type_id,
                    bit_field,
                }));
            }
            if member_name.is_empty()
                && let Some(inner) = self.btf.resolve(type_id)?
                && let Some(found) = self.member(inner, name, depth, steps)?
            {
                let bits = bits.checked_add(found.bits).ok_or(Malformed(at))?;
                return Ok(Some(Member { bits, ..found }));
            }
        }
        Ok(None)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, BtfError> {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|chunk| u16::from_ne_bytes(*chunk))
        .ok_or(Malformed(at))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|chunk| u32::from_ne_bytes(*chunk))
        .ok_or(Malformed(at))
}

#[cfg(test)]
mod tests;
