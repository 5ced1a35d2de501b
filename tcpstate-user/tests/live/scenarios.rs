//! What happens to sockets, and what the kernel says of it: one test for each, IPv4 and IPv6.

use std::fs;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};

use crate::lab::{
    Lab, child, client, closed, listener, not_applicable, proc_states, unbound_client, until,
};
use crate::owners::{receive_fd, send_fd};
use crate::six;
use crate::sockets::{Pair, Tcp};
use crate::sys::{self, Fork, Neighbor};
use crate::without::WHOLE;

const FIN_WAIT2: u8 = 5;

/// Declares tests that run in a lab of their own.
macro_rules! in_labs {
    ($($name:ident: $scenario:path;)+) => {
        $(#[test]
        fn $name() {
            Lab::run(WHOLE, $scenario);
        })+
    };
}

in_labs! {
    nothing_happens: nothing;
    six_sequences: six::all;
    a_closed_port_refuses: six::closed_port;
    a_syn_that_is_never_answered_times_out: syn_dropped;
    a_host_that_is_not_there_is_unreachable: unreachable;
    a_connect_that_is_given_up_is_aborted: given_up;
    a_full_backlog_leaves_connects_in_syn_sent: full_backlog;
    a_listener_that_closes_resets_what_it_did_not_accept: listener_closed;
    only_the_client_closes: client_closes;
    the_server_closes_after_the_client: six::active_close;
    shutdown_of_writing_then_close: shut_write;
    shutdown_of_both_keeps_the_socket_until_the_peer_closes: shut_both;
    shutdown_of_reading_changes_nothing: shut_read;
    a_killed_servers_sockets_close: killed_server;
    of_two_holders_the_last_closes: two_holders;
    linger_0_resets: six::reset;
    data_left_unread_resets: unread_data;
    a_socket_connects_to_itself: six::self_connect;
    a_listener_opens_and_closes: six::listening;
    keepalive_finds_a_dead_link: keepalive;
    user_timeout_ends_a_connection: user_timeout;
    an_orphan_in_fin_wait2_vanishes_silently: fin_timeout;
    sockets_are_ended_from_outside: ended_from_outside;
    a_socket_is_connected_again: reconnect;
    ipv4_peers_of_a_dual_stack_socket_show_as_ipv4: dual_stack;
}

fn nothing(_: &mut Lab) {}

fn syn_dropped(lab: &mut Lab) {
    let addresses = [Ipv4Addr::new(192, 0, 2, 1).into(), sys::v6(1)];
    let network = sys::silent_network(&addresses).expect("a network of silence");
    sys::set_sysctl("net/ipv4/tcp_syn_retries", "1").expect("root");
    let sockets: Vec<Tcp> = [Ipv4Addr::new(192, 0, 2, 2).into(), sys::v6(2)]
        .into_iter()
        .map(|ip: IpAddr| {
            let socket = Tcp::new(ip);
            let before = Instant::now();
            socket.begin_connect(SocketAddr::new(ip, 80));
            assert!(before.elapsed() < Duration::from_secs(1));
            let dropped = client(
                socket.local(),
                SocketAddr::new(ip, 80),
                "CLOSE SYN_SENT CLOSE",
            );
            let (least, most) = (Duration::from_millis(2900), Duration::from_millis(4500));
            lab.expect([dropped.end("timeout").dwell(least, most)]);
            socket
        })
        .collect();
    for socket in &sockets {
        assert_eq!(socket.wait_for_error().kind(), io::ErrorKind::TimedOut);
    }
    drop(network);
}

/// The link is there, but nobody has the address.
fn unreachable(lab: &mut Lab) {
    let neighbor = wired();
    let sockets: Vec<Tcp> = [Ipv4Addr::new(192, 0, 2, 99).into(), sys::v6(99)]
        .into_iter()
        .zip(["ipv4", "ipv6"])
        .map(|(ip, family): (IpAddr, &str)| {
            let neigh = format!("net/{family}/neigh/wire0");
            sys::set_sysctl(&format!("{neigh}/mcast_solicit"), "1").expect("root");
            sys::set_sysctl(&format!("{neigh}/retrans_time_ms"), "100").expect("root");
            let to = SocketAddr::new(ip, 80);
            let socket = Tcp::new(ip);
            socket.begin_connect(to);
            let lost = client(socket.local(), to, "CLOSE SYN_SENT CLOSE");
            lab.expect([lost.end("unreachable")]);
            socket
        })
        .collect();
    for socket in &sockets {
        assert_eq!(
            socket.wait_for_error().kind(),
            io::ErrorKind::HostUnreachable
        );
    }
    drop(neighbor);
}

fn given_up(lab: &mut Lab) {
    let addresses = [Ipv4Addr::new(192, 0, 2, 1).into(), sys::v6(1)];
    let network = sys::silent_network(&addresses).expect("a network of silence");
    for ip in [Ipv4Addr::new(192, 0, 2, 2).into(), sys::v6(2)] {
        let to = SocketAddr::new(ip, 80);
        let socket = Tcp::new(ip);
        socket.begin_connect(to);
        lab.expect([client(socket.local(), to, "CLOSE SYN_SENT CLOSE").end("aborted")]);
    }
    lab.keep(network);
}

fn full_backlog(lab: &mut Lab) {
    for ip in lab.addresses() {
        let socket = Tcp::listening(ip, 0);
        let far = socket.local();
        let first = Tcp::connected(far);
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            client(first.local(), far, "CLOSE SYN_SENT ESTABLISHED"),
            child(far, first.local(), "LISTEN SYN_RECV ESTABLISHED"),
        ]);
        for _ in 0..2 {
            let waiting = Tcp::new(ip);
            waiting.begin_connect(far);
            // Its only event comes before it has a port.
            lab.expect([unbound_client(far, "CLOSE SYN_SENT")]);
            lab.keep(waiting);
        }
        lab.keep((socket, first));
    }
}

fn listener_closed(lab: &mut Lab) {
    for ip in lab.addresses() {
        let socket = Tcp::listening(ip, 8);
        let far = socket.local();
        let connected = Tcp::connected(far);
        let near = connected.local();
        drop(socket);
        lab.expect([
            listener(far, "CLOSE LISTEN CLOSE"),
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE").end("reset_sent"),
            client(near, far, "CLOSE SYN_SENT ESTABLISHED CLOSE").end("reset_received"),
        ]);
        lab.keep(connected);
    }
}

fn client_closes(lab: &mut Lab) {
    for ip in lab.addresses() {
        let socket = Tcp::listening(ip, 8);
        let far = socket.local();
        let connecting = Instant::now();
        let connected = Tcp::connected(far);
        let near = connected.local();
        let server = socket.accept();
        let established = Instant::now();
        thread::sleep(Duration::from_millis(50));
        let least = established.elapsed();
        drop(connected);
        assert_eq!(server.peek(), 0, "the client's FIN");
        let most = connecting.elapsed();
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            client(
                near,
                far,
                "CLOSE SYN_SENT ESTABLISHED FIN_WAIT1 FIN_WAIT2 CLOSE",
            ),
            // Its last dwell is that in ESTABLISHED.
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE_WAIT").dwell(least, most),
        ]);
        // The ACK of its FIN may be delayed.
        lab.wait_for(near, "CLOSE");
        // It goes on where no event can be seen.
        assert!(proc_states(near.port()).contains(&FIN_WAIT2));
        lab.keep((socket, server));
    }
}

fn shut_write(lab: &mut Lab) {
    for ip in lab.addresses() {
        let pair = Pair::new(ip);
        let (near, far) = (pair.near, pair.far);
        pair.client.shutdown(Shutdown::Write);
        lab.wait_for(near, "FIN_WAIT2");
        drop(pair.client);
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            client(
                near,
                far,
                "CLOSE SYN_SENT ESTABLISHED FIN_WAIT1 FIN_WAIT2 FIN_WAIT2 CLOSE",
            ),
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE_WAIT"),
        ]);
        lab.keep((pair.listener, pair.server));
    }
}

fn shut_both(lab: &mut Lab) {
    for ip in lab.addresses() {
        let pair = Pair::new(ip);
        let (near, far) = (pair.near, pair.far);
        pair.client.shutdown(Shutdown::Both);
        lab.wait_for(near, "FIN_WAIT2");
        lab.settle();
        drop(pair.server);
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            client(
                near,
                far,
                "CLOSE SYN_SENT ESTABLISHED FIN_WAIT1 FIN_WAIT2 CLOSE",
            )
            .end("local_close"),
            child(
                far,
                near,
                "LISTEN SYN_RECV ESTABLISHED CLOSE_WAIT LAST_ACK CLOSE",
            )
            .end("remote_close"),
        ]);
        lab.keep((pair.listener, pair.client));
    }
}

fn shut_read(lab: &mut Lab) {
    for ip in lab.addresses() {
        let pair = Pair::new(ip);
        pair.client.shutdown(Shutdown::Read);
        lab.expect([
            listener(pair.far, "CLOSE LISTEN"),
            client(pair.near, pair.far, "CLOSE SYN_SENT ESTABLISHED"),
            child(pair.far, pair.near, "LISTEN SYN_RECV ESTABLISHED"),
        ]);
        lab.keep(pair);
    }
}

pub fn killed_server(lab: &mut Lab) {
    for ip in lab.addresses() {
        let (from_server, to_client) = sys::pipe().expect("a pipe");
        let (from_client, to_server) = sys::pipe().expect("a pipe");
        let unbound = Tcp::bound(ip);
        let far = unbound.local();
        let keep = [to_client.as_fd(), from_client.as_fd(), unbound.fd.as_fd()];
        let server = Fork::new(&keep, || {
            // Not before it is the only one that holds the socket: a sweep would find the other, who was there first.
            let _ = rustix::io::read(&from_client, &mut [0]);
            let listening = rustix::net::listen(&unbound.fd, 8).is_ok();
            let _ = rustix::io::write(&to_client, &[u8::from(listening)]);
            let accepted = rustix::net::accept(&unbound.fd);
            let _ = rustix::io::write(&to_client, &[u8::from(accepted.is_ok())]);
            loop {
                thread::sleep(Duration::from_secs(60));
            }
        })
        .expect("a process");
        drop((to_client, from_client, unbound));
        drop(to_server);
        let mut reports = fs::File::from(from_server);
        let mut report = [0];
        reports.read_exact(&mut report).expect("the server lives");
        assert_eq!(report, [1], "it listens");
        let connected = Tcp::connected(far);
        let near = connected.local();
        reports.read_exact(&mut report).expect("the server lives");
        assert_eq!(report, [1], "it accepted");

        let pid = server.pid;
        drop(server);
        assert_eq!(connected.peek(), 0, "the server's FIN");
        lab.expect([
            listener(far, "CLOSE LISTEN CLOSE").pid(pid),
            child(
                far,
                near,
                "LISTEN SYN_RECV ESTABLISHED FIN_WAIT1 FIN_WAIT2 CLOSE",
            )
            .pid(pid),
            client(near, far, "CLOSE SYN_SENT ESTABLISHED CLOSE_WAIT"),
        ]);
        lab.keep(connected);
    }
}

fn two_holders(lab: &mut Lab) {
    for ip in lab.addresses() {
        let (until_told, tell) = sys::pipe().expect("a pipe");
        let (there, here) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("a socket pair");
        // It is there before the sockets: else it had them all for an instant, in which a sweep could meet it.
        let holder = Fork::new(&[until_told.as_fd(), here.as_fd()], || {
            let _socket = receive_fd(&here);
            let _ = rustix::io::read(&until_told, &mut [0]);
        })
        .expect("a process");
        let pair = Pair::new(ip);
        let (near, far) = (pair.near, pair.far);
        send_fd(&there, pair.client.fd.as_fd()).expect("it listens");
        drop(pair.client);
        lab.settle();
        assert_eq!(
            proc_states(near.port()),
            [1],
            "the other holder keeps it ESTABLISHED"
        );
        drop(tell);
        lab.wait_for(near, "CLOSE");
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            // The owner is the one that connected, until a sweep finds that only the other holds it.
            client(
                near,
                far,
                "CLOSE SYN_SENT ESTABLISHED FIN_WAIT1 FIN_WAIT2 CLOSE",
            )
            .heir(holder.pid),
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE_WAIT"),
        ]);
        lab.keep((pair.listener, pair.server, holder));
    }
}

fn unread_data(lab: &mut Lab) {
    for ip in lab.addresses() {
        let pair = Pair::new(ip);
        let (near, far) = (pair.near, pair.far);
        pair.server.send();
        assert_eq!(pair.client.peek(), 1);
        drop(pair.client);
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            client(near, far, "CLOSE SYN_SENT ESTABLISHED CLOSE").end("reset_sent"),
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE").end("reset_received"),
        ]);
        lab.keep((pair.listener, pair.server));
    }
}

/// A neighbor that has 192.0.2.2 and 2001:db8::2.
fn wired() -> Neighbor {
    Neighbor::new(
        [Ipv4Addr::new(192, 0, 2, 1).into(), sys::v6(1)],
        [Ipv4Addr::new(192, 0, 2, 2).into(), sys::v6(2)],
    )
    .expect("a veth pair")
}

/// Connections to a neighbor, one of each family, with the listener that took each; what runs there is not
/// traced.
fn connections(neighbor: &Neighbor) -> Vec<(Tcp, Tcp)> {
    [Ipv4Addr::new(192, 0, 2, 2).into(), sys::v6(2)]
        .into_iter()
        .map(|ip| {
            // A socket stays in the namespace that it was made in.
            let far = neighbor.run(move || Tcp::listening(ip, 8));
            (Tcp::connected(far.local()), far)
        })
        .collect()
}

fn keepalive(lab: &mut Lab) {
    let neighbor = wired();
    let connections = connections(&neighbor);
    for (socket, _) in &connections {
        socket.keepalive();
    }
    neighbor.run(|| sys::set_up("wire1", false)).expect("root");
    for (socket, far) in connections {
        assert_eq!(socket.wait_for_error().kind(), io::ErrorKind::TimedOut);
        let (least, most) = (Duration::from_millis(1900), Duration::from_millis(4000));
        let dead = client(
            socket.local(),
            far.local(),
            "CLOSE SYN_SENT ESTABLISHED CLOSE",
        );
        lab.expect([dead.end("timeout").dwell(least, most)]);
    }
}

fn user_timeout(lab: &mut Lab) {
    let neighbor = wired();
    let connections = connections(&neighbor);
    neighbor.run(|| sys::set_up("wire1", false)).expect("root");
    for (socket, _) in &connections {
        socket.user_timeout(Duration::from_millis(500));
        socket.send();
    }
    for (socket, far) in connections {
        assert_eq!(socket.wait_for_error().kind(), io::ErrorKind::TimedOut);
        let (least, most) = (Duration::from_millis(450), Duration::from_millis(3000));
        let dead = client(
            socket.local(),
            far.local(),
            "CLOSE SYN_SENT ESTABLISHED CLOSE",
        );
        lab.expect([dead.end("timeout").dwell(least, most)]);
    }
}

fn fin_timeout(lab: &mut Lab) {
    sys::set_sysctl("net/ipv4/tcp_fin_timeout", "2").expect("root");
    for ip in lab.addresses() {
        let pair = Pair::new(ip);
        let (near, far) = (pair.near, pair.far);
        drop(pair.client);
        lab.wait_for(near, "CLOSE");
        assert!(proc_states(near.port()).contains(&FIN_WAIT2));
        until("the orphan is gone", || {
            !proc_states(near.port()).contains(&FIN_WAIT2)
        });
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            client(
                near,
                far,
                "CLOSE SYN_SENT ESTABLISHED FIN_WAIT1 FIN_WAIT2 CLOSE",
            ),
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE_WAIT"),
        ]);
        lab.keep((pair.listener, pair.server));
    }
}

fn ended_from_outside(lab: &mut Lab) {
    for ip in lab.addresses() {
        let pair = Pair::new(ip);
        let (near, far) = (pair.near, pair.far);
        if let Err(error) = sys::destroy(near, Some(far)) {
            // Only a kernel without it may refuse.
            assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "{error}");
            assert!(
                !has_inet_diag_destroy(),
                "the kernel has CONFIG_INET_DIAG_DESTROY"
            );
            not_applicable("the kernel has no CONFIG_INET_DIAG_DESTROY");
            lab.expect([
                listener(far, "CLOSE LISTEN"),
                client(near, far, "CLOSE SYN_SENT ESTABLISHED"),
                child(far, near, "LISTEN SYN_RECV ESTABLISHED"),
            ]);
            lab.keep(pair);
            continue;
        }
        sys::destroy(far, None).expect("as for the other");
        lab.expect([
            listener(far, "CLOSE LISTEN CLOSE"),
            // tcp_abort() closes a listener twice.
            closed(far),
            client(near, far, "CLOSE SYN_SENT ESTABLISHED CLOSE").end("reset_sent"),
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE").end("reset_received"),
        ]);
        lab.keep(pair);
    }
}

/// By the kernel's own configuration, in /proc or beside its image.
fn has_inet_diag_destroy() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc");
    let path = format!("/boot/config-{}", release.trim());
    let config = fs::read_to_string(&path).unwrap_or_else(|error| {
        panic!("{path}, which would prove that SOCK_DESTROY may be missing: {error}")
    });
    config.contains("\nCONFIG_INET_DIAG_DESTROY=y")
}

fn reconnect(lab: &mut Lab) {
    for ip in lab.addresses() {
        let pair = Pair::new(ip);
        let (near, far) = (pair.near, pair.far);
        pair.client.disconnect();
        pair.client.connect(far).expect("connect again");
        let again = pair.client.local();
        let second = pair.listener.accept();
        let established = "LISTEN SYN_RECV ESTABLISHED";
        lab.expect([
            listener(far, "CLOSE LISTEN"),
            client(near, far, "CLOSE SYN_SENT ESTABLISHED CLOSE").end("reset_sent"),
            child(far, near, "LISTEN SYN_RECV ESTABLISHED CLOSE").end("reset_received"),
            client(again, far, "CLOSE SYN_SENT ESTABLISHED"),
            child(far, again, established),
        ]);
        lab.expect_same_socket(near, again);
        lab.keep((pair, second));
    }
}

fn dual_stack(lab: &mut Lab) {
    let socket = Tcp::listening(Ipv6Addr::UNSPECIFIED.into(), 8);
    let far = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), socket.local().port());
    let connected = Tcp::connected(far);
    let near = connected.local();
    let server = socket.accept();
    lab.expect([
        listener(socket.local(), "CLOSE LISTEN"),
        client(near, far, "CLOSE SYN_SENT ESTABLISHED"),
        child(far, near, "LISTEN SYN_RECV ESTABLISHED"),
    ]);
    lab.keep((socket, connected, server));
}
