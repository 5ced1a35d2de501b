use super::*;

fn error<T: FromStr<Err = ValueError>>(text: &str) -> String {
    match text.parse::<T>() {
        Ok(_) => panic!("{text} was taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn states_are_taken_in_every_common_spelling() {
    let spellings = [
        (TcpState::ESTABLISHED, "ESTABLISHED estab Estab established"),
        (TcpState::SYN_SENT, "SYN_SENT syn-sent SYN-SENT synsent"),
        (
            TcpState::SYN_RECV,
            "SYN_RECV syn-recv syn-rcv SYN_RCVD SYN-RECEIVED",
        ),
        (
            TcpState::FIN_WAIT1,
            "FIN_WAIT1 FIN-WAIT-1 fin-wait-1 fin_wait1 FIN_WAIT_1",
        ),
        (
            TcpState::FIN_WAIT2,
            "FIN_WAIT2 FIN-WAIT-2 fin-wait-2 fin_wait2",
        ),
        (
            TcpState::TIME_WAIT,
            "TIME_WAIT TIME-WAIT time-wait timewait",
        ),
        (
            TcpState::CLOSE,
            "CLOSE close closed CLOSED UNCONN unconnected",
        ),
        (
            TcpState::CLOSE_WAIT,
            "CLOSE_WAIT close-wait CLOSE-WAIT closewait",
        ),
        (TcpState::LAST_ACK, "LAST_ACK last-ack LAST-ACK"),
        (TcpState::LISTEN, "LISTEN listen listening LISTENING"),
        (TcpState::CLOSING, "CLOSING closing"),
        (TcpState::NEW_SYN_RECV, "NEW_SYN_RECV new-syn-recv"),
    ];
    for (state, spellings) in spellings {
        for spelling in spellings.split(' ') {
            assert_eq!(spelling.parse(), Ok(State(state)), "{spelling}");
        }
        assert_eq!(State(state).to_string().parse(), Ok(State(state)));
    }
    assert_eq!(
        error::<State>("CLOSE_WIAT"),
        "`CLOSE_WIAT` is no TCP state; known, in any case: ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, \
         FIN_WAIT2, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING, NEW_SYN_RECV"
    );
}

#[test]
fn syn_recv_stands_for_both_of_its_kinds() {
    assert!(State(TcpState::SYN_RECV).matches(TcpState::NEW_SYN_RECV));
    assert!(!State(TcpState::NEW_SYN_RECV).matches(TcpState::SYN_RECV));
}

#[test]
fn ports_are_single_or_ranges() {
    let ports: Ports = "8000-8999".parse().unwrap();
    assert!(ports.matches(8000) && ports.matches(8999));
    assert!(!ports.matches(7999) && !ports.matches(9000));
    assert_eq!("443".parse::<Ports>().unwrap().to_string(), "443");
    for bad in ["", "0", "65536", "http", "80-", "-80", "1-2-3", "+"] {
        assert_eq!(
            error::<Ports>(bad),
            format!("`{bad}` is no port; expected 1 to 65535, or a range such as 8000-8999")
        );
    }
    assert_eq!(
        error::<Ports>("90-80"),
        "`90-80` is no range of ports, as 90 is above 80; try 80-90"
    );
}

#[test]
fn addresses_are_hosts_or_networks_and_mapped_ones_are_ipv4() {
    let matches = |pattern: &str, addr: &str| {
        pattern
            .parse::<Network>()
            .unwrap()
            .matches(addr.parse().unwrap())
    };
    assert!(matches("10.0.0.0/8", "10.255.0.1"));
    assert!(matches("10.1.2.3/8", "10.255.0.1"));
    assert!(!matches("10.0.0.0/8", "11.0.0.1"));
    assert!(matches("::1", "::1"));
    assert!(!matches("::/0", "10.0.0.1"));
    assert!(matches("::ffff:10.0.0.1", "10.0.0.1"));
    assert!(matches("::ffff:10.0.0.0/104", "10.9.9.9"));
    for (text, shown) in [("10.1.2.3/8", "10.0.0.0/8"), ("10.1.2.3/32", "10.1.2.3")] {
        assert_eq!(text.parse::<Network>().unwrap().to_string(), shown);
    }
    for bad in [
        "",
        "10.0.0",
        "10.0.0.0/33",
        "localhost",
        "10.0.0.0/",
        "[::1]",
    ] {
        assert_eq!(
            error::<Network>(bad),
            format!(
                "`{bad}` is no address; expected an IP address or network such as 10.0.0.5, 10.0.0.0/8 \
                 or fd00::/8"
            )
        );
    }
    assert_eq!(
        error::<Network>("fe80::1%eth0"),
        "`fe80::1%eth0` is an address with a zone; leave out what follows the %"
    );
}

#[test]
fn globs_match_the_bytes_of_a_name() {
    let matches = |glob: &str, name: &[u8]| {
        glob.parse::<Glob>()
            .unwrap()
            .matches(&Comm::from_bytes(name))
    };
    assert!(matches("nginx", b"nginx"));
    assert!(!matches("nginx", b"nginx2"));
    assert!(!matches("nginx", b"ngin"));
    assert!(matches("php-fpm*", b"php-fpm8.2"));
    assert!(matches("*", b""));
    assert!(matches("*a*b", b"xaxbxab"));
    assert!(!matches("*a*b", b"xaxbxac"));
    assert!(matches("p?thon*", b"python3"));
    assert!(!matches("?", b""));
    assert!(matches("bad?", b"bad\xff"));
}

#[test]
fn the_other_values_say_what_they_expect() {
    for (error, expected) in [
        (
            error::<Pid>("nginx"),
            "`nginx` is no process id; expected a number above 0 (--comm takes names)",
        ),
        (
            error::<Pid>("0"),
            "`0` is no process id; expected a number above 0 (--comm takes names)",
        ),
        (
            error::<ContainerPrefix>("a b"),
            "`a b` is no container id; expected its beginning, as `docker ps` or `crictl ps` prints it",
        ),
        (
            error::<Span>("10"),
            "`10` is no duration; expected a number and its unit, such as 10ms, 1.5s or 2h",
        ),
        (
            error::<Netns>("host"),
            "`host` is no network namespace; expected all, self or an inode, as `lsns -t net` prints it",
        ),
        (
            error::<Glob>(""),
            "`` is no name; expected a command name or a pattern such as 'php-fpm*'",
        ),
    ] {
        assert_eq!(error, expected);
    }
}
