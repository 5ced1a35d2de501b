//! The ways of attaching that older kernels need, forced on the running one.

use crate::lab::{Attach, Lab};
use crate::six;

#[test]
fn six_sequences_without_cookies() {
    Lab::run(Attach::TpBtfNoCookie, six::all);
}

#[test]
fn six_sequences_by_the_classic_tracepoint() {
    Lab::run(Attach::Tracepoint, six::all);
}
