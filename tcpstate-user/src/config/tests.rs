use std::collections::BTreeSet;

use clap::{Command, FromArgMatches as _};

use super::*;

fn command() -> Command {
    Settings::augment_args(Command::new("daemon"))
}

fn flags(args: &str) -> Settings {
    let args = std::iter::once("daemon").chain(args.split_ascii_whitespace());
    let matches = command().try_get_matches_from(args).unwrap();
    Settings::from_arg_matches(&matches).unwrap()
}

fn error(text: &str) -> String {
    Settings::from_toml(text).unwrap_err().to_string()
}

const WHOLE: &str = r#"
    netns = 4026531840
    "web.listen-address" = [":9100", "[::1]:9101"]
    web.telemetry-path = "/m"
    socket = "/tmp/s"
    ring-size = "8MiB"
    reconcile-interval = "1m"
    max-comms = 5
    [log]
    level = "debug"
    format = "json"
"#;

#[test]
fn a_file_says_the_same_as_the_flags() {
    let file = Settings::from_toml(WHOLE).unwrap();
    let flags = flags(
        "--netns 4026531840 --web.listen-address :9100 --web.listen-address [::1]:9101 \
         --web.telemetry-path /m --socket /tmp/s --ring-size 8192KiB --reconcile-interval 60s \
         --max-comms 5 --log.level debug --log.format json",
    );
    assert_eq!(file, flags);
}

#[test]
fn flags_and_keys_have_the_same_names() {
    let flags: BTreeSet<String> = command()
        .get_arguments()
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .collect();
    let keys = Settings::default()
        .fields()
        .map(|(name, _)| name.to_owned());
    assert_eq!(flags, keys.into());
}

#[test]
fn the_command_line_wins_over_the_file_and_the_file_over_the_defaults() {
    let file = Settings::from_toml(WHOLE).unwrap();
    let args = "--web.listen-address 127.0.0.2:1 --max-comms 7 --log.level warn";
    let config = flags(args).or(file.clone()).with_defaults();
    assert_eq!(
        config,
        DaemonConfig {
            listen: vec!["127.0.0.2:1".parse().unwrap()],
            max_comms: 7.try_into().unwrap(),
            log_level: LogLevel::Warn,
            ..file.with_defaults()
        }
    );
}

/// The help says these.
#[test]
fn defaults_are_those_that_the_help_names() {
    let given = flags(
        "--netns all --web.listen-address 127.0.0.1:10975 --web.telemetry-path /metrics \
         --socket /run/tcpstate/tcpstate.sock --ring-size 4MiB --reconcile-interval 30s --max-comms 100 \
         --log.level info --log.format text",
    );
    assert_eq!(given.with_defaults(), Settings::default().with_defaults());
}

#[test]
fn no_address_is_every_address() {
    let all = flags("--web.listen-address :9100").with_defaults();
    assert_eq!(all.listen, ["[::]:9100".parse().unwrap()]);
}

#[test]
fn a_file_says_what_is_wrong_with_it() {
    for (text, problem) in [
        (
            "ring_size = 1",
            "unknown key `ring_size`; known: netns, web.listen-address, web.telemetry-path, socket, \
             ring-size, reconcile-interval, max-comms, log.level, log.format",
        ),
        (
            "[web]\nlisten = 1",
            "unknown key `web.listen`; known: netns, web.listen-address, web.telemetry-path, socket, \
             ring-size, reconcile-interval, max-comms, log.level, log.format",
        ),
        (
            "max-comms = \"5\"",
            "key `max-comms`: string given; expected an integer",
        ),
        (
            "max-comms = 0",
            "key `max-comms`: `0` is no number of names; expected 1 or more, such as 100",
        ),
        (
            "web.listen-address = [1]",
            "key `web.listen-address`: integer given; expected a string",
        ),
        (
            "web.listen-address = \"localhost:80\"",
            "key `web.listen-address`: `localhost:80` is no address to listen on; expected ADDR:PORT with a \
             numeric address, :PORT or [::1]:PORT",
        ),
        (
            "ring-size = 1.5",
            "key `ring-size`: float given; expected a string or an integer",
        ),
        (
            "ring-size = \"4MB\"",
            "key `ring-size`: `4MB` is no size; expected bytes, KiB or MiB, such as 4MiB",
        ),
        (
            "ring-size = 5000",
            "key `ring-size`: `5000` is no ring size; expected a power of two from 4096 (a page) to 1GiB; the \
             nearest are 4096 and 8192",
        ),
        (
            "web.listen-address = []",
            "key `web.listen-address`: an empty list given; expected one value or more",
        ),
        (
            "reconcile-interval = \"0s\"",
            "key `reconcile-interval`: `0s` is too short; expected more than zero, such as 10s",
        ),
        (
            "web.telemetry-path = \"/{x}\"",
            "key `web.telemetry-path`: `/{x}` is no path for the metrics; expected / and letters, digits or \
             -_.~, such as /metrics",
        ),
        (
            "web.telemetry-path = \"/-/ready\"",
            "key `web.telemetry-path`: `/-/ready` is taken by the daemon itself; try /metrics",
        ),
        (
            "log.level = \"loud\"",
            "key `log.level`: unknown log level `loud`; known: error, warn, info, debug, trace",
        ),
        (
            "\"log.level\" = \"info\"\nlog.level = \"info\"",
            "key `log.level`: given twice; expected one value",
        ),
    ] {
        assert_eq!(error(text), problem);
    }
    let syntax = error("netns = \"all\"\nmax-comms =");
    assert!(syntax.starts_with("not TOML: "), "{syntax}");
    assert!(syntax.ends_with(" (line 2)"), "{syntax}");
    assert_eq!(syntax.lines().count(), 1);
}
