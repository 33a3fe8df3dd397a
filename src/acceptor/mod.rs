//! Where connections come from: addresses that are listened on, encryption, and an end to what is of no use.
//!
//! Knows bytes, TLS and time; nothing of calls but that they begin and end, and nothing of HTTP/2 but how long its
//! preface is. Invariants: a slow or silent peer delays nobody else; whatever a peer does, listening goes on.

mod connection;
mod tls;

pub use connection::{Connection, OpenCall, Peer};
pub use tls::{ClientTrust, Clients, Tls};

use std::fmt;
use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, SelectAll, Stream, StreamExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixSocket, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, error, warn};

use crate::seldom::Seldom;

use connection::Terms;
use tls::Encryption;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// HOST:PORT; port 0 takes a free one.
    Tcp(String),
    /// A Unix socket's path.
    Unix(PathBuf),
}

/// A text is no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051, or unix:/PATH")]
pub struct AddressError;

impl Address {
    /// Whether programs on this machine only can connect.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(address) => match address.parse::<SocketAddr>() {
                Ok(address) => address.ip().is_loopback(),
                Err(_) => address.rsplit_once(':').is_some_and(|(host, _port)| host.eq_ignore_ascii_case("localhost")),
            },
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(AddressError) };
        }
        let (host, port) = text.rsplit_once(':').ok_or(AddressError)?;
        let odd = |c: char| c.is_whitespace() || matches!(c, ':' | '/' | '[' | ']');
        let names_a_host = !host.is_empty() && !host.contains(odd) && port.parse::<u16>().is_ok();
        if names_a_host || text.parse::<SocketAddr>().is_ok() { Ok(Self::Tcp(text.into())) } else { Err(AddressError) }
    }
}

/// As it is read.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// How long calls may go on over a connection that is too old: as long as a session lives, and its Attach stream.
const AGE_GRACE: Duration = Duration::from_mins(30);

/// How many connections there may be, and how long they may be of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time, those in the handshake among them. One beyond is closed at once.
    pub connections_max: usize,
    /// From the accept to the last byte of the HTTP/2 preface, TLS included.
    pub handshake_timeout: Duration,
    /// How long a connection may stay without a call; not zero.
    pub idle_timeout: Duration,
    /// How old a connection gets before its peer is to be asked to make another. Half an hour later it is closed.
    pub age_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // A connection takes a file descriptor and, with TLS and HTTP/2, some fifty kilobytes: half a gibibyte in
            // all, and far more clients than a broker has sessions to lend to at once.
            connections_max: 10_000,
            // Three lost packets and their retransmissions, and a client that computes slowly; no more for who only
            // holds a place.
            handshake_timeout: Duration::from_secs(10),
            // Pools of clients keep what they use every few minutes; shorter than the 15 minutes after which many a
            // network on the way forgets a silent connection.
            idle_timeout: Duration::from_mins(10),
            // Who a peer is was proven at the beginning: so it is proven again, and replicas that came later get their part.
            age_max: Duration::from_hours(1),
        }
    }
}

/// Has its addresses, and accepts nobody yet.
#[derive(Debug)]
pub struct Acceptor {
    sockets: Vec<Socket>,
    encryption: Option<Arc<Encryption>>,
    limits: Limits,
}

impl Acceptor {
    /// Takes the ports and makes the Unix sockets; reads the certificates. With `tls`, TCP is encrypted, and Unix
    /// sockets are not.
    ///
    /// # Errors
    /// What is wrong with an address or with a file of `tls`, naming it; there must be an address.
    pub async fn bind(addresses: &[Address], tls: Option<Tls>, limits: Limits) -> io::Result<Self> {
        if addresses.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no address to listen on: name at least one"));
        }
        let encryption = tls.map(|tls| Encryption::read(tls, Instant::now())).transpose()?.map(Arc::new);
        let mut sockets = Vec::with_capacity(addresses.len());
        for address in addresses {
            let socket = Socket::bind(address).await;
            sockets.push(
                socket.map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))?,
            );
        }
        Ok(Self { sockets, encryption, limits })
    }

    /// The limits of its connections.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Where it listens, in the order given, with the ports that were taken.
    pub fn addresses(&self) -> Vec<Address> {
        self.sockets.iter().map(Socket::address).collect()
    }

    /// The connections, each as soon as it can be spoken over: accepted, and encrypted if it is to be. Never ends;
    /// dropped, it listens no more and breaks handshakes off.
    ///
    /// # Cancel safety
    /// A connection that nobody took is handed out the next time.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Connection>> + Send + 'static {
        let Self { sockets, encryption, limits } = self;
        let incoming = Incoming {
            accepted: sockets.into_iter().map(accept_forever).collect(),
            handshakes: JoinSet::new(),
            places: Arc::new(Semaphore::new(limits.connections_max.min(Semaphore::MAX_PERMITS))),
            encryption,
            limits,
            refused: Seldom::default(),
        };
        stream::unfold(incoming, |mut incoming| async move { Some((Ok(incoming.ready().await), incoming)) })
    }
}

/// What is listened on.
#[derive(Debug)]
enum Socket {
    Tcp(TcpListener, SocketAddr),
    Unix(UnixListener, SocketFile),
}

/// What was accepted.
enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Socket {
    async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address).await?;
                let address = listener.local_addr()?;
                Ok(Self::Tcp(listener, address))
            }
            Address::Unix(path) => {
                let (listener, file) = bind_unix(path).await?;
                Ok(Self::Unix(listener, file))
            }
        }
    }

    fn address(&self) -> Address {
        match self {
            Self::Tcp(_, address) => Address::Tcp(address.to_string()),
            Self::Unix(_, file) => Address::Unix(file.path.clone()),
        }
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener, _) => {
                let (stream, address) = listener.accept().await?;
                // A call is a small write that waits for its answer: it must not wait for more to send. Where this
                // fails the peer is gone, which the first read will tell.
                let _ = stream.set_nodelay(true);
                Ok(Accepted::Tcp(stream, address))
            }
            Self::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0)),
        }
    }
}

async fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    /// Whoever is of the file's group may connect.
    const MODE: u32 = 0o660;
    /// As many as tokio lets wait on TCP.
    const BACKLOG: u32 = 1024;

    remove_stale(path).await?;
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    let file = SocketFile::of(path)?;
    // Nobody can connect before `listen`, so nobody does whom the mode keeps out.
    fs::set_permissions(path, Permissions::from_mode(MODE))?;
    Ok((socket.listen(BACKLOG)?, file))
}

/// Removes a socket that nobody listens on any more.
async fn remove_stale(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.file_type().is_socket() {
        let problem = "what is there is no socket: remove it or choose another path";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, problem));
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there: stop it first")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
    }
}

/// A Unix socket's file, removed when dropped.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Its device and number: what has taken its place since is not ours to remove.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Where it cannot be removed, the next to listen there finds it stale.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// All that is accepted on a socket. Never ends.
fn accept_forever(socket: Socket) -> BoxStream<'static, Accepted> {
    /// What cannot be accepted now, for want of file descriptors mostly, can be soon; until then, no busy loop.
    const PAUSE: Duration = Duration::from_millis(100);

    stream::unfold((socket, Seldom::default()), |(socket, mut failed)| async move {
        loop {
            match socket.accept().await {
                Ok(accepted) => return Some((accepted, (socket, failed))),
                Err(cause) => {
                    if let Some(times) = failed.count(Instant::now()) {
                        warn!(address = %socket.address(), times, %cause, "cannot accept connections");
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    })
    .boxed()
}

/// Accepts, admits and encrypts.
struct Incoming {
    accepted: SelectAll<BoxStream<'static, Accepted>>,
    /// Dropped, they are broken off.
    handshakes: JoinSet<Option<Connection>>,
    /// For the connections there may be.
    places: Arc<Semaphore>,
    encryption: Option<Arc<Encryption>>,
    limits: Limits,
    refused: Seldom,
}

impl Incoming {
    /// The next connection that can be spoken over.
    async fn ready(&mut self) -> Connection {
        loop {
            tokio::select! {
                Some(finished) = self.handshakes.join_next() => match finished {
                    Ok(Some(connection)) => return connection,
                    Ok(None) => {}
                    Err(panic) => error!(%panic, "handshake lost"),
                },
                accepted = self.accepted.next() => {
                    let accepted = accepted.expect("there is a socket, and none stops accepting");
                    if let Some(connection) = self.admit(accepted) {
                        return connection;
                    }
                }
            }
        }
    }

    /// Gives what was accepted a place. In plain text it is ready; else the handshake begins.
    fn admit(&mut self, accepted: Accepted) -> Option<Connection> {
        let now = Instant::now();
        let Limits { connections_max, handshake_timeout, idle_timeout, age_max } = self.limits;
        // In a queue, those who only hold places would hold up the others too.
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            if let Some(times) = self.refused.count(now) {
                warn!(times, connections_max, "connections refused: raise limits.connections_max or add replicas");
            }
            return None;
        };
        let end = now + age_max + AGE_GRACE;
        let terms = Terms { preface_deadline: now + handshake_timeout, idle_timeout, end, place };
        match (accepted, &self.encryption) {
            (Accepted::Unix(stream), _) => Some(Connection::new(stream, Peer::new(None, None), terms)),
            (Accepted::Tcp(stream, address), None) => {
                Some(Connection::new(stream, Peer::new(Some(address), None), terms))
            }
            (Accepted::Tcp(stream, address), Some(encryption)) => {
                self.handshakes.spawn(handshake(encryption.clone(), stream, address, terms));
                None
            }
        }
    }
}

/// Encrypts a connection, or drops it.
async fn handshake(
    encryption: Arc<Encryption>,
    stream: TcpStream,
    address: SocketAddr,
    terms: Terms,
) -> Option<Connection> {
    let encrypting = async move {
        let now = Instant::now();
        // It may read files.
        let config = spawn_blocking(move || encryption.current(now)).await?;
        TlsAcceptor::from(config).accept(stream).await
    };
    // Anybody can make these lines, at any rate: they are for who looks for the reason of a refusal.
    let stream = match timeout_at(terms.preface_deadline, encrypting).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(cause)) => {
            debug!(%address, %cause, "handshake failed");
            return None;
        }
        Err(_) => {
            debug!(%address, "handshake not finished in time");
            return None;
        }
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
    Some(Connection::new(stream, Peer::new(Some(address), certificate), terms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_printed_as_it_is_read() {
        for text in ["127.0.0.1:50051", "[::1]:0", "0.0.0.0:65535", "db.example:1", "unix:/run/broker.sock"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("unix:/run/b c".parse::<Address>(), Ok(Address::Unix("/run/b c".into())));
        assert_eq!("localhost:0".parse::<Address>(), Ok(Address::Tcp("localhost:0".into())));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let odd = ["", "x", "50051", ":50051", "host:", "host:x", "host:65536", "::1:50051", "[::1]", "a b:1"];
        for text in odd.into_iter().chain(["http://host:1", "unix:", "unix:run/broker.sock", "unix"]) {
            assert_eq!(text.parse::<Address>(), Err(AddressError), "{text}");
        }
    }

    #[test]
    fn loopback_and_unix_sockets_are_local() {
        let local = |text: &str| text.parse::<Address>().unwrap().is_local();
        for text in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/run/broker.sock"] {
            assert!(local(text), "{text}");
        }
        for text in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "127.0.0.1.example:1", "localhost.example:1"] {
            assert!(!local(text), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_happens_often_is_told_at_once_and_then_seldom_with_its_count() {
        let (mut seldom, start) = (Seldom::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let told = [0, 1, 9, 10, 30].map(|seconds| seldom.count(at(seconds)));
        assert_eq!(told, [Some(1), None, None, Some(3), Some(1)]);
    }
}
