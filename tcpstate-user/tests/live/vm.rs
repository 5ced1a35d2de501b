//! What is tried first on other kernels, by the filter `vm::`: 5.10 and up, from a bare initramfs.

use crate::lab::{Attach, Lab};
use crate::{attribution, check, daemon, dumps, dwell, model, record, six, timewait};

#[test]
fn attaches_and_ends() {
    Lab::run(Attach::Best, |_| {});
}

#[test]
fn six_sequences() {
    Lab::run(Attach::Best, six::all);
}

#[test]
fn every_event_arrives() {
    record::six_sequences();
}

#[test]
fn check_tells_what_this_kernel_has() {
    check::features_of_this_kernel();
}

#[test]
fn sockets_that_are_alike_are_counted() {
    daemon::sockets_that_are_alike(&[]);
}

#[test]
fn runs_of_programs_are_told() {
    daemon::runs_of_programs_are_told();
}

#[test]
fn what_follows_a_close_is_told() {
    timewait::is_followed();
}

#[test]
fn attribution_of_a_prefork_servers_connections() {
    attribution::prefork_server();
}

#[test]
fn model_of_random_sockets() {
    model::few();
}

#[test]
fn dwell_is_between_the_clocks_readings() {
    dwell::is_between_the_clocks_readings();
}

#[test]
fn time_wait_without_room_is_not_counted() {
    timewait::has_no_room();
}

#[test]
fn dumps_by_the_iterator_are_those_by_inet_diag() {
    dumps::of_every_state();
}
