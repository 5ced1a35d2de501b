use std::collections::BTreeSet;

use clap::{Command, FromArgMatches as _};
use proptest::prelude::*;

use super::*;
use crate::model::{Comm, ConnectionId, Endpoint, Evidence, Owner, OwnerSource, Process, TcpState};

/// Everything is known of it.
fn known() -> Transition {
    Transition {
        time_ns: 0,
        id: ConnectionId::Own(1),
        cookie: None,
        netns: Some(4_026_531_840),
        family: Family::Ipv4,
        local: Endpoint {
            addr: Some([10, 0, 0, 5].into()),
            port: Some(8080),
        },
        remote: Endpoint {
            addr: Some([192, 0, 2, 7].into()),
            port: Some(55000),
        },
        from: TcpState::ESTABLISHED,
        to: TcpState::CLOSE_WAIT,
        dwell_ns: Some(10_000_000),
        evidence: Evidence::Tracepoint,
        role: Some(Role::Passive),
        owner: Some(Owner {
            process: Process {
                pid: 4388,
                start_ns: 1,
                comm: Some(Comm::from_bytes(b"java")),
            },
            source: OwnerSource::Listener,
        }),
        uid: Some(0),
        container: Some("8f3c1d".into()),
        end: None,
    }
}

/// Nothing is known of it but its states and its family.
fn unknown() -> Transition {
    Transition {
        netns: None,
        local: Endpoint::default(),
        remote: Endpoint::default(),
        dwell_ns: None,
        role: None,
        owner: None,
        uid: None,
        container: None,
        ..known()
    }
}

fn command() -> Command {
    Filter::augment_args(Command::new("watch"))
}

fn filter(args: &str) -> Filter {
    let args = std::iter::once("watch").chain(args.split_ascii_whitespace());
    let matches = command().try_get_matches_from(args).unwrap();
    Filter::from_arg_matches(&matches).unwrap()
}

#[test]
fn each_filter_matches_what_it_says() {
    for args in [
        "",
        "-s close-wait",
        "-s estab",
        "--state LISTEN,CLOSE_WAIT",
        "-s listen -s close-wait",
        "--from ESTAB",
        "--to CLOSE_WAIT",
        "-P 8080",
        "-P 55000",
        "-P 1-80,8000-8999",
        "-L 8080",
        "-D 55000",
        "-a 10.0.0.0/8",
        "-a 192.0.2.7",
        "--laddr 10.0.0.5",
        "--raddr 192.0.2.0/24",
        "-4",
        "-4 -6",
        "-p 1,4388",
        "--comm j*",
        "--container 8f3c",
        "--owner known",
        "--role passive",
        "--min-dwell 10ms",
        "-s close-wait -L 8080 --comm java --min-dwell 1ms",
    ] {
        assert!(filter(args).matches(&known()), "{args}");
    }
    for args in [
        "-s listen",
        "--from CLOSE_WAIT",
        "--to ESTAB",
        "-P 80",
        "-L 55000",
        "-D 8080",
        "-a 10.0.0.6",
        "--laddr 192.0.2.7",
        "--raddr 10.0.0.5",
        "-6",
        "-p 4389",
        "--comm j",
        "--container f3c1",
        "--owner none",
        "--role active",
        "--min-dwell 11ms",
        "-s close-wait -L 8081",
    ] {
        assert!(!filter(args).matches(&known()), "{args}");
    }
}

#[test]
fn what_is_unknown_matches_no_filter_on_it() {
    for args in [
        "-P 1-65535",
        "-L 1-65535",
        "-D 1-65535",
        "-a 0.0.0.0/0,::/0",
        "--laddr 0.0.0.0/0",
        "--raddr 0.0.0.0/0",
        "-p 4388",
        "--comm *",
        "--container 8",
        "--owner known",
        "--role active",
        "--role passive",
        "--min-dwell 0s",
    ] {
        assert!(!filter(args).matches(&unknown()), "{args}");
    }
    for args in ["", "-4", "--owner none", "-s estab"] {
        assert!(filter(args).matches(&unknown()), "{args}");
    }
    let here = Subscription {
        netns: Some(Inode(4_026_531_840)),
        ..Subscription::default()
    };
    assert!(here.matches(&known()));
    assert!(!here.matches(&unknown()));
}

fn listed() -> Listed {
    let known = known();
    Listed {
        time_ns: 0,
        id: known.id,
        cookie: known.cookie,
        netns: known.netns,
        family: known.family,
        local: known.local,
        remote: known.remote,
        state: TcpState::CLOSE_WAIT,
        since_ns: 0,
        age_ns: 60_000_000_000,
        age_exact: false,
        role: known.role,
        owner: known.owner,
        uid: known.uid,
        container: known.container,
        orphan: Some(false),
        holders: None,
        recv_queue: None,
        send_queue: None,
    }
}

fn list_filter(args: &str) -> ListFilter {
    let args = std::iter::once("list").chain(args.split_ascii_whitespace());
    let command = ListFilter::augment_args(Command::new("list"));
    ListFilter::from_arg_matches(&command.try_get_matches_from(args).unwrap()).unwrap()
}

#[test]
fn a_list_is_filtered_by_the_state_that_is_and_by_age() {
    for args in [
        "",
        "-s close-wait",
        "--min-age 1m",
        "--min-age 60s -L 8080 --comm j* --role passive -4",
    ] {
        assert!(list_filter(args).matches(&listed()), "{args}");
        let selection = Selection {
            filter: list_filter(args),
            netns: Some(Inode(4_026_531_840)),
        };
        let query = selection.to_query();
        assert_eq!(Selection::from_query(&query).as_ref(), Ok(&selection));
        assert!(selection.matches(&listed()), "{args}");
        let elsewhere = Selection {
            netns: Some(Inode(1)),
            ..selection
        };
        assert!(!elsewhere.matches(&listed()), "{args}");
    }
    for args in [
        "-s estab",
        "--min-age 61s",
        "-L 55000",
        "--owner none",
        "-6",
    ] {
        assert!(!list_filter(args).matches(&listed()), "{args}");
    }
}

#[test]
fn a_half_open_request_is_syn_recv() {
    let transition = Transition {
        from: TcpState::NEW_SYN_RECV,
        to: TcpState::SYN_RECV,
        ..known()
    };
    assert!(filter("--from syn_recv").matches(&transition));
    assert!(filter("--from new_syn_recv").matches(&transition));
    assert!(!filter("--to new_syn_recv").matches(&transition));
}

#[test]
fn flags_and_query_parameters_have_the_same_names() {
    let flags: BTreeSet<String> = command()
        .get_arguments()
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .collect();
    let parameters: BTreeSet<String> = Filter::default()
        .fields()
        .into_iter()
        .map(|(name, _)| name.to_owned())
        .collect();
    assert_eq!(flags, parameters);
}

#[test]
fn a_query_says_what_is_wrong_with_it() {
    for (query, error) in [
        (
            "sate=LISTEN",
            "unknown parameter `sate`; known: state, port, lport, rport, addr, laddr, raddr, ipv4, ipv6, pid, comm, \
             container, owner, role, from, to, min-dwell, raw, netns",
        ),
        (
            "port=80,http",
            "port: `http` is no port; expected 1 to 65535, or a range such as 8000-8999",
        ),
        ("owner=me", "owner: unknown owner `me`; known: none, known"),
        ("raw=maybe", "raw: `maybe` is neither true nor false"),
        ("netns=1&netns=2", "netns: given twice; expected one value"),
        (
            "netns=all",
            "netns: `all` is no network namespace; expected its inode, as `lsns -t net` prints it",
        ),
        (
            "comm=",
            "comm: `` is no name; expected a command name or a pattern such as 'php-fpm*'",
        ),
    ] {
        assert_eq!(
            Subscription::from_query(query),
            Err(ValueError(error.to_owned())),
            "{query}"
        );
    }
    let bare = Subscription::from_query("raw&ipv4=true&state=estab&state=listen").unwrap();
    assert!(bare.raw);
    assert_eq!(bare.filter, filter("-4 -s estab,listen"));
}

fn values<T>(text: impl Strategy<Value = String> + 'static) -> impl Strategy<Value = Vec<T>>
where
    T: FromStr<Err = ValueError> + std::fmt::Debug + 'static,
{
    let value = text.prop_filter_map("no such value", |text| text.parse().ok());
    prop::collection::vec(value, 0..3)
}

prop_compose! {
    fn subscriptions()(
        (state, from, to) in (values("[a-z]{0,1}[A-Z_]{4,11}|LISTEN|syn-recv|estab"), values("CLOSE|CLOSING"), values("SYN_SENT")),
        (port, lport, rport) in (values("[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?"), values("[1-9]{1,4}"), values("80|443")),
        (addr, laddr, raddr) in (
            values("[1-9]{1,2}\\.[0-9]\\.0\\.1(/[0-9])?"),
            values("fd00::[1-9a-f]{1,4}(/[1-9][0-9])?"),
            values("::ffff:10\\.0\\.0\\.[0-9](/1[0-2][0-9])?"),
        ),
        (ipv4, ipv6, raw) in any::<(bool, bool, bool)>(),
        (pid, comm, container) in (values("[1-9][0-9]{0,6}"), values("[^,\\x00]{1,15}"), values("[0-9a-f]{1,64}")),
        owner in prop::option::of(prop::sample::select(<Ownership as crate::model::Named>::ALL)),
        role in prop::option::of(prop::sample::select(<Role as crate::model::Named>::ALL)),
        min_dwell in prop::option::of(any::<u32>().prop_flat_map(|secs| (Just(secs), 0..1_000_000_000u32))
            .prop_map(|(secs, nanos)| Span(std::time::Duration::new(secs.into(), nanos)))),
        netns in prop::option::of((1..u32::MAX).prop_map(Inode)),
    ) -> Subscription {
        Subscription {
            filter: Filter {
                socket: SocketFilter {
                    state, port, lport, rport, addr, laddr, raddr, ipv4, ipv6, pid, comm, container, owner, role,
                },
                from, to, min_dwell,
            },
            raw,
            netns,
        }
    }
}

proptest! {
    #[test]
    fn a_query_says_the_same_as_the_flags(subscription in subscriptions()) {
        let query = subscription.to_query();
        prop_assert_eq!(Subscription::from_query(&query), Ok(subscription), "{}", query);
    }

    #[test]
    fn any_query_is_read_or_refused_in_one_line(query in ".{0,60}") {
        if let Err(error) = Subscription::from_query(&query) {
            prop_assert_eq!(error.to_string().lines().count(), 1, "{:?}", error);
        }
    }
}
