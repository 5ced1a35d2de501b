//! Six sequences that every kernel and every way of attaching must tell right.

use crate::lab::{Lab, child, client, listener, unbound_client};
use crate::scenarios;
use crate::sockets::{Pair, Tcp, connect_to_nobody};
use std::net::SocketAddr;

pub fn all(lab: &mut Lab) {
    closed_port(lab);
    active_close(lab);
    reset(lab);
    listening(lab);
    self_connect(lab);
    scenarios::killed_server(lab);
}

pub fn closed_port(lab: &mut Lab) {
    for ip in lab.addresses() {
        let nobody = SocketAddr::new(ip, 9);
        connect_to_nobody(nobody);
        let to = Tcp::new(ip);
        to.connect(nobody).expect_err("nobody listens");
        let refused = unbound_client(nobody, "CLOSE SYN_SENT CLOSE").end("refused");
        lab.expect([refused.clone(), refused]);
    }
}

/// The client closes, then the server.
pub fn active_close(lab: &mut Lab) {
    for ip in lab.addresses() {
        let Pair {
            listener: listening,
            client: active,
            server,
            near,
            far,
        } = Pair::new(ip);
        drop(active);
        lab.wait_for(near, "CLOSE");
        drop(server);
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            // The orphan lives on in FIN_WAIT2 and ends in TIME_WAIT, which no event tells.
            client(
                near,
                far,
                "CLOSE SYN_SENT ESTABLISHED FIN_WAIT1 FIN_WAIT2 CLOSE",
            ),
            child(
                far,
                near,
                "LISTEN SYN_RECV ESTABLISHED CLOSE_WAIT LAST_ACK CLOSE",
            )
            .end("remote_close"),
        ]);
        lab.keep(listening);
    }
}

pub fn reset(lab: &mut Lab) {
    for ip in lab.addresses() {
        let Pair {
            listener: listening,
            client: active,
            server,
            near,
            far,
        } = Pair::new(ip);
        active.reset_on_close();
        drop(active);
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            client(near, far, "CLOSE SYN_SENT ESTABLISHED CLOSE").end("reset_sent"),
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE").end("reset_received"),
        ]);
        lab.keep((listening, server));
    }
}

pub fn listening(lab: &mut Lab) {
    for ip in lab.addresses() {
        let socket = Tcp::listening(ip, 8);
        lab.expect([listener(socket.local(), "CLOSE LISTEN CLOSE")]);
    }
}

/// The simplest simultaneous open, and simultaneous close.
pub fn self_connect(lab: &mut Lab) {
    for ip in lab.addresses() {
        let socket = Tcp::bound(ip);
        let address = socket.local();
        socket.connect(address).expect("connect to itself");
        let states = "CLOSE SYN_SENT SYN_RECV ESTABLISHED FIN_WAIT1 CLOSING CLOSE";
        lab.expect([client(address, address, states).end("simultaneous_close")]);
    }
}
