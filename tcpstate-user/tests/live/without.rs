//! The truth tests where the product does without what the kernel has, as it must on kernels that lack it. Each test stands
//! where it is done with all that the kernel has; here is only what is done without.

use crate::lab::Lab;
use crate::{attribution, check, daemon, model, owners, six, timewait};

/// Features, as `--without` takes them: none.
pub const WHOLE: &str = "";
/// The classic tracepoint, as without BTF.
pub const CLASSIC: &str = "tp_btf";
/// Sockets are known by their addresses, as below 5.12.
pub const NO_COOKIE: &str = "socket_cookie";
/// By their ends, though BTF is there.
pub const NO_ADDRESS: &str = "socket_cookie,tcp_iter";
/// Nothing but the cookie: what a process does besides is found by dumps and in `/proc`.
pub const COOKIE_ALONE: &str = "accept_fexit,time_wait_fentry,task_file_iter";

pub fn flags(without: &str) -> Vec<&str> {
    match without {
        WHOLE => Vec::new(),
        features => vec!["--without", features],
    }
}

/// Where dumps are joined with events by ends alone, there are no sweeps: some owners are not known.
pub fn knows_holders(without: &str) -> bool {
    ![CLASSIC, NO_ADDRESS].contains(&without)
}

/// Tests of one set of features each.
macro_rules! without {
    ($($set:ident($features:ident) { $($test:ident: $run:expr;)+ })+) => {
        $(mod $set {
            use super::*;

            $(#[test]
            fn $test() {
                let run = $run;
                run($features);
            })+
        })+
    };
}

without! {
    btf(CLASSIC) {
        check_proves_it: check::features;
        six_sequences: |without| Lab::run(without, six::all);
        attribution_of_a_prefork_servers_connections: attribution::prefork_server;
        random_sockets_are_the_kernels: model::few;
    }

    cookies(NO_COOKIE) {
        check_proves_it: check::features;
        six_sequences: |without| Lab::run(without, six::all);
        sockets_that_are_alike_are_counted: daemon::sockets_that_are_alike;
        sockets_from_before_the_start_have_their_owners: owners::from_before_the_start;
        attribution_of_a_prefork_servers_connections: attribution::prefork_server;
        what_follows_a_close_is_told: timewait::is_followed;
        random_sockets_are_the_kernels: model::few;
    }

    cookies_and_addresses(NO_ADDRESS) {
        check_proves_it: check::features;
        six_sequences: |without| Lab::run(without, six::all);
        sockets_that_are_alike_are_counted: daemon::sockets_that_are_alike;
        sockets_from_before_the_start_are_counted: owners::from_before_the_start;
        attribution_of_a_prefork_servers_connections: attribution::prefork_server;
        what_follows_a_close_is_told: timewait::is_followed;
        random_sockets_are_the_kernels: model::few;
    }

    all_but_cookies(COOKIE_ALONE) {
        check_proves_it: check::features;
        six_sequences: |without| Lab::run(without, six::all);
        sockets_from_before_the_start_have_their_owners: owners::from_before_the_start;
        attribution_of_a_prefork_servers_connections: attribution::prefork_server;
        what_follows_a_close_is_told: timewait::is_followed;
        random_sockets_are_the_kernels: model::few;
    }
}
