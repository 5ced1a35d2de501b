use proptest::prelude::*;

use super::*;

/// Builds a BTF file.
#[derive(Default)]
struct Blob {
    types: Vec<u8>,
    count: u32,
    strings: Vec<u8>,
}

impl Blob {
    fn name(&mut self, name: &str) -> u32 {
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        if name.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(name.bytes());
        self.strings.push(0);
        at
    }

    fn words(&mut self, words: &[u32]) {
        self.types
            .extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    }

    /// A type with what follows it; gives its id.
    fn ty(&mut self, name: &str, info: u32, size_or_type: u32, tail: &[u32]) -> u32 {
        let name = self.name(name);
        self.words(&[name, info, size_or_type]);
        self.words(tail);
        self.count += 1;
        self.count
    }

    fn int(&mut self, name: &str, size: u32) -> u32 {
        self.ty(name, kind::INT << 24, size, &[size * 8])
    }

    fn of(&mut self, kind: u32, name: &str, id: u32) -> u32 {
        self.ty(name, kind << 24, id, &[])
    }

    fn array(&mut self, id: u32, index: u32, len: u32) -> u32 {
        self.ty("", kind::ARRAY << 24, 0, &[id, index, len])
    }

    /// A struct or union of (name, type, offset in bits, bits of a bit field).
    fn record(
        &mut self,
        kind: u32,
        name: &str,
        size: u32,
        members: &[(&str, u32, u32, u32)],
    ) -> u32 {
        let flag = u32::from(members.iter().any(|member| member.3 != 0)) << 31;
        let tail: Vec<u32> = members
            .iter()
            .flat_map(|&(name, id, bits, field)| [self.name(name), id, field << 24 | bits])
            .collect();
        self.ty(name, flag | kind << 24 | members.len() as u32, size, &tail)
    }

    fn bytes(&self) -> Vec<u8> {
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        for word in [24, 0, types, types, strings] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(&self.types);
        bytes.extend(&self.strings);
        bytes
    }
}

/// ```c
/// struct net { long pad; struct { unsigned inum; } ns; };
/// typedef struct { struct net *net; } possible_net_t;
/// struct sock {
///     union { long pair; struct { unsigned daddr; const unsigned rcv_saddr; }; };
///     possible_net_t skc_net;
///     char comm[16];
///     unsigned char low : 4, high : 4;
///     unsigned short num;
/// };
/// ```
fn sock() -> Vec<u8> {
    let mut blob = Blob::default();
    let (long, unsigned, short, byte) = (
        blob.int("long", 8),
        blob.int("unsigned", 4),
        blob.int("short", 2),
        blob.int("char", 1),
    );
    // Declared before defined: not to be taken for the struct.
    blob.of(kind::FWD, "net", 0);
    let ns = blob.record(kind::STRUCT, "", 4, &[("inum", unsigned, 0, 0)]);
    let net = blob.record(
        kind::STRUCT,
        "net",
        16,
        &[("pad", long, 0, 0), ("ns", ns, 64, 0)],
    );
    let net_ptr = blob.of(kind::PTR, "", net);
    let possible = blob.record(kind::STRUCT, "", 8, &[("net", net_ptr, 0, 0)]);
    let possible = blob.of(kind::TYPEDEF, "possible_net_t", possible);
    let constant = blob.of(kind::CONST, "", unsigned);
    let pair = blob.record(
        kind::STRUCT,
        "",
        8,
        &[("daddr", unsigned, 0, 0), ("rcv_saddr", constant, 32, 0)],
    );
    let addrs = blob.record(
        kind::UNION,
        "",
        8,
        &[("pair", long, 0, 0), ("", pair, 0, 0)],
    );
    let comm = blob.array(byte, unsigned, 16);
    blob.record(
        kind::STRUCT,
        "sock",
        40,
        &[
            ("", addrs, 0, 0),
            ("skc_net", possible, 64, 0),
            ("comm", comm, 128, 0),
            ("low", byte, 256, 4),
            ("high", byte, 260, 4),
            ("num", short, 272, 0),
        ],
    );
    blob.bytes()
}

fn offset(bytes: &[u8], name: &str, path: &str, size: u32) -> Result<u32, String> {
    Btf::parse(bytes)
        .and_then(|btf| btf.structure(name)?.offset(path, size))
        .map_err(|error| error.to_string())
}

#[test]
fn fields_are_found_through_anonymous_nested_and_renamed_types() {
    let bytes = sock();
    assert_eq!(offset(&bytes, "sock", "daddr", 4), Ok(0));
    assert_eq!(offset(&bytes, "sock", "rcv_saddr", 4), Ok(4));
    assert_eq!(offset(&bytes, "sock", "skc_net", 8), Ok(8));
    assert_eq!(offset(&bytes, "sock", "skc_net.net", 8), Ok(8));
    assert_eq!(offset(&bytes, "sock", "comm", 16), Ok(16));
    assert_eq!(offset(&bytes, "sock", "num", 2), Ok(34));
    assert_eq!(offset(&bytes, "net", "ns.inum", 4), Ok(8));
}

enum Shape<'a> {
    /// An array of bytes.
    Bytes(u32),
    Struct(&'a [(&'a str, Shape<'a>)]),
}

/// What is read of the kernel's structs.
const READ: &[(&str, Shape<'_>)] = {
    use Shape::{Bytes, Struct};
    &[
        (
            "sock",
            Struct(&[
                (
                    "__sk_common",
                    Struct(&[
                        ("skc_daddr", Bytes(4)),
                        ("skc_rcv_saddr", Bytes(4)),
                        ("skc_dport", Bytes(2)),
                        ("skc_num", Bytes(2)),
                        ("skc_family", Bytes(2)),
                        ("skc_state", Bytes(1)),
                        ("skc_net", Struct(&[("net", Bytes(8))])),
                        ("skc_v6_daddr", Bytes(16)),
                        ("skc_v6_rcv_saddr", Bytes(16)),
                        ("skc_cookie", Bytes(8)),
                        ("skc_flags", Bytes(8)),
                    ]),
                ),
                ("sk_err", Bytes(4)),
                ("sk_uid", Bytes(4)),
                ("sk_protocol", Bytes(2)),
                ("sk_shutdown", Bytes(1)),
                ("sk_socket", Bytes(8)),
                ("sk_ack_backlog", Bytes(4)),
                ("sk_max_ack_backlog", Bytes(4)),
            ]),
        ),
        (
            "tcp_sock",
            Struct(&[
                (
                    "inet_conn",
                    Struct(&[("icsk_inet", Struct(&[("inet_sport", Bytes(2))]))]),
                ),
                ("linger2", Bytes(4)),
                ("rcv_tstamp", Bytes(4)),
                ("rcv_nxt", Bytes(4)),
                ("copied_seq", Bytes(4)),
                ("write_seq", Bytes(4)),
                ("snd_una", Bytes(4)),
            ]),
        ),
        ("net", Struct(&[("ns", Struct(&[("inum", Bytes(4))]))])),
        ("socket", Struct(&[("sk", Bytes(8))])),
        (
            "socket_alloc",
            Struct(&[
                ("socket", Bytes(128)),
                ("vfs_inode", Struct(&[("i_ino", Bytes(8))])),
            ]),
        ),
        (
            "request_sock",
            Struct(&[("rsk_timer", Struct(&[("expires", Bytes(8))]))]),
        ),
        (
            "inet_timewait_sock",
            Struct(&[
                (
                    "__tw_common",
                    Struct(&[
                        ("skc_net", Struct(&[("net", Bytes(8))])),
                        ("skc_cookie", Bytes(8)),
                    ]),
                ),
                ("tw_substate", Bytes(1)),
                ("tw_timer", Struct(&[("expires", Bytes(8))])),
            ]),
        ),
        (
            "task_struct",
            Struct(&[
                ("flags", Bytes(4)),
                ("tgid", Bytes(4)),
                ("group_leader", Bytes(8)),
                ("comm", Bytes(16)),
                ("start_boottime", Bytes(8)),
            ]),
        ),
    ]
};

/// Adds the type, without fields of the names in `missing`; gives its id and size.
fn add(blob: &mut Blob, name: &str, shape: &Shape<'_>, missing: &[&str]) -> (u32, u32) {
    match shape {
        Shape::Bytes(len) => {
            let byte = blob.int("char", 1);
            (blob.array(byte, byte, *len), *len)
        }
        Shape::Struct(fields) => {
            let there = fields.iter().filter(|(name, _)| !missing.contains(name));
            let mut size = 0;
            let members: Vec<_> = there
                .map(|(field, shape)| {
                    let (id, len) = add(blob, "", shape, missing);
                    size += len;
                    (*field, id, (size - len) * 8, 0)
                })
                .collect();
            (blob.record(kind::STRUCT, name, size, &members), size)
        }
    }
}

/// As of a kernel whose structs lack these fields.
fn layout_without(missing: &[&str]) -> Result<Layout, String> {
    let mut blob = Blob::default();
    for (name, shape) in READ {
        add(&mut blob, name, shape, missing);
    }
    let bytes = blob.bytes();
    let found = Btf::parse(&bytes).and_then(|btf| layout_in(&btf));
    found.map_err(|error| error.to_string())
}

#[test]
fn what_only_the_list_of_sockets_needs_is_no_error() {
    let whole = layout_without(&[]).unwrap();
    assert_eq!(whole.list, Ok(()));
    assert_eq!(whole.offsets.list.socket_ino, 128);
    let without = layout_without(&["rsk_timer"]).unwrap();
    let reason = "the kernel's BTF has no field request_sock.rsk_timer.expires";
    assert_eq!(without.list, Err(reason.to_owned()));
    assert_eq!(without.offsets.list, ListOffsets::default());
    assert_eq!(without.offsets.sk_err, whole.offsets.sk_err);
}

#[test]
fn a_kernel_built_without_what_is_needed_is_told_the_option() {
    let whole = layout_without(&[]).unwrap().offsets;
    assert_eq!((whole.sk_net, whole.sk_err, whole.tcp_linger2), (15, 71, 2));
    let without = |missing: &[&str]| layout_without(missing).unwrap_err();
    let option = |option| format!("the kernel was built without {option}, which tcpstate needs");
    assert_eq!(without(&["net"]), option("CONFIG_NET_NS"));
    let v6 = ["skc_v6_daddr", "skc_v6_rcv_saddr"];
    assert_eq!(without(&v6), option("CONFIG_IPV6"));
    assert_eq!(
        without(&["sk_err"]),
        "the kernel's BTF has no field sock.sk_err"
    );
}

#[test]
fn what_cannot_be_loaded_is_refused_by_name() {
    let bytes = sock();
    let refused = |name, path, size| offset(&bytes, name, path, size).unwrap_err();
    assert_eq!(
        refused("task", "pid", 4),
        "the kernel's BTF has no struct task"
    );
    assert_eq!(
        refused("sock", "skc_net.gone", 8),
        "the kernel's BTF has no field sock.skc_net.gone"
    );
    // Through a pointer is another struct.
    assert_eq!(
        refused("sock", "skc_net.net.ns", 4),
        "the kernel's BTF has no field sock.skc_net.net.ns"
    );
    for field in ["low", "high"] {
        assert_eq!(
            refused("sock", field, 1),
            format!("the kernel's sock.{field} is a bit field, which can't be addressed")
        );
    }
    assert_eq!(
        refused("sock", "num", 4),
        "the kernel's sock.num has 2 bytes where 4 were expected"
    );
}

#[test]
fn a_struct_that_contains_itself_ends_in_an_error() {
    let mut blob = Blob::default();
    blob.record(
        kind::STRUCT,
        "loop",
        8,
        &[("", 1, 0, 0), ("", 1, 0, 0), ("", 1, 0, 0)],
    );
    blob.of(kind::TYPEDEF, "circle", 2);
    blob.record(kind::STRUCT, "round", 8, &[("member", 2, 0, 0)]);
    let bytes = blob.bytes();
    assert!(
        offset(&bytes, "loop", "x", 4)
            .unwrap_err()
            .contains("malformed")
    );
    assert!(
        offset(&bytes, "round", "member", 4)
            .unwrap_err()
            .contains("malformed")
    );
}

#[test]
fn other_files_are_refused() {
    for bytes in [&b""[..], b"\x7fELF", &[0x9f], &[0; 64]] {
        assert!(matches!(Btf::parse(bytes), Err(Malformed(_))));
    }
    let mut blob = Blob::default();
    blob.of(25, "new", 0);
    assert!(matches!(Btf::parse(&blob.bytes()), Err(BtfError::Kind(25))));
}

/// The beginning of `struct sock_common` has been the same from 3.x to 7.2.
#[test]
fn the_running_kernel_has_each_field() {
    let layout = layout().unwrap();
    assert!(matches!(layout.accept_arguments, Some(2 | 4)));
    assert_eq!(layout.list, Ok(()));
    let found = layout.offsets;
    let known = Offsets {
        sk_daddr: 0,
        sk_rcv_saddr: 4,
        sk_dport: 12,
        sk_num: 14,
        sk_family: 16,
        ..found
    };
    assert_eq!(found, known);
    assert!(found.tcp_rcv_tstamp > found.inet_sport);
    assert!(found.tcp_linger2 > found.inet_sport && found.inet_sport > found.sk_shutdown);
}

proptest! {
    /// Any damage gives an answer or an error, in bounded time.
    #[test]
    fn damaged_bytes_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        keep in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = sock();
        for (at, byte) in damage {
            *at.get_mut(&mut bytes) = byte;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        for (name, path, size) in [("sock", "rcv_saddr", 4), ("sock", "num", 2), ("net", "ns.inum", 4), ("net", "no", 1)] {
            let _ = offset(&bytes, name, path, size);
        }
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = offset(&bytes, "sock", "num", 2);
    }
}
