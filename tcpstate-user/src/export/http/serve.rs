//! Takes connections and keeps them in bounds: how many, how long a request may take to arrive, how long a reader may
//! not read, how long the end may take.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;

use super::places::{Place, Places};
use super::watched::Watched;
use super::{Backend, UnixSocket, local, public};

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time: over all TCP addresses, and as many on the Unix socket, so that neither can shut out
    /// the other. For a further one, the one gives way that has waited longest for its request, or does not read its
    /// answer; and where all places are taken, an answer is its connection's last.
    pub connections: usize,
    /// From when a request may begin to the end of its header; ends an idle connection too.
    pub header: Duration,
    /// Without room for one more byte.
    pub write: Duration,
    /// For answers in progress when the daemon ends.
    pub shutdown: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            header: Duration::from_secs(10),
            write: Duration::from_secs(30),
            shutdown: Duration::from_secs(2),
        }
    }
}

/// Bytes that a connection may hold for a reader that is behind, beside the kernel's socket buffer.
const WRITE_BUFFER: usize = 64 << 10;

/// Connections that may wait to be taken: on TCP one that finds no room tries again after a second, on a Unix socket it
/// is refused. The kernel takes `net.core.somaxconn` of it at most, which is as many.
pub(super) const BACKLOG: u32 = 4096;

pub struct Listeners {
    pub tcp: Vec<TcpListener>,
    pub unix: Option<UnixSocket>,
}

/// `[::]` takes IPv4 too; where the kernel has no IPv6, it is all of IPv4. Must be called within a runtime.
///
/// # Errors
/// The address can't be had; the line names it and what would help.
pub fn bind_tcp(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = match listen(addr) {
        Err(error)
            if addr.ip().is_unspecified()
                && error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error()) =>
        {
            listen((Ipv4Addr::UNSPECIFIED, addr.port()).into())
        }
        bound => bound,
    };
    bound.map_err(|error| {
        let help = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "the port is taken; stop what listens there, as `ss -tlnp` shows it, or choose another with \
                 --web.listen-address"
            }
            io::ErrorKind::AddrNotAvailable => "this host has no such address",
            io::ErrorKind::PermissionDenied => {
                "ports below 1024 take CAP_NET_BIND_SERVICE; choose another with --web.listen-address"
            }
            _ => return anyhow::anyhow!("can't listen on {addr}: {error}"),
        };
        anyhow::anyhow!("can't listen on {addr}: {help}")
    })
}

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // As after any daemon's end some of its connections are in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Serves until `shutdown`, then lets answers end within the limit. Streams end when the backend ends them.
pub async fn serve<B: Backend>(
    listeners: Listeners,
    backend: Arc<B>,
    telemetry_path: &str,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) {
    let (stop, stopped) = watch::channel(false);
    let mut accepting = JoinSet::new();
    let public = public(Arc::clone(&backend), telemetry_path);
    let places = Places::new(limits.connections);
    for listener in listeners.tcp {
        let (router, places) = (public.clone(), Arc::clone(&places));
        accepting.spawn(accept(listener, router, places, limits, stopped.clone()));
    }
    let socket_file = listeners.unix.map(|socket| {
        let (listener, file) = socket.into_parts();
        let places = Places::new(limits.connections);
        let router = local(backend, telemetry_path);
        accepting.spawn(accept(listener, router, places, limits, stopped));
        file
    });
    shutdown.await;
    // First the file, so that nobody finds a daemon that does not answer.
    drop(socket_file);
    stop.send_replace(true);
    while accepting.join_next().await.is_some() {}
}

/// Ends when told to, after its connections; those that take too long are cut.
async fn accept<L: Listener<Io: Unpin>>(
    mut listener: L,
    router: Router,
    places: Arc<Places>,
    limits: Limits,
    stopped: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            let (io, _) = listener.accept().await;
            (io, places.take().await)
        };
        let (io, place) = tokio::select! {
            accepted = accepted => accepted,
            () = stop(stopped.clone()) => break,
        };
        connections.spawn(converse(io, place, router.clone(), limits, stopped.clone()));
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.shutdown, ended).await.is_err() {
        connections.shutdown().await;
    }
}

async fn stop(mut stopped: watch::Receiver<bool>) {
    // An error means that nobody is left who could say it: the same.
    let _ = stopped.wait_for(|&stopped| stopped).await;
}

async fn converse<I>(
    io: I,
    place: Arc<Place>,
    router: Router,
    limits: Limits,
    stopped: watch::Receiver<bool>,
) where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let mut io = TimeoutStream::new(Watched::new(io, Arc::clone(&place)));
    io.set_write_timeout(Some(limits.write));
    let answered = Arc::clone(&place);
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |request| {
        let answering = answered.answers();
        let answer = router.call(request);
        async move {
            let mut answer = answer.await?;
            if answering.place().is_scarce() {
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, Infallible>(answer.map(|body| answering.with(body)))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header)
        .max_buf_size(WRITE_BUFFER)
        .serve_connection(TokioIo::new(Box::pin(io)), service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        // Its request may have come just now.
        biased;
        ended = connection.as_mut() => ended,
        () = place.left() => return,
        () = stop(stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}
