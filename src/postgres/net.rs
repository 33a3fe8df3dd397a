//! Where a PostgreSQL server listens, and the plain stream to it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

/// A byte stream to a server.
pub(super) type Stream = Either<TcpStream, UnixStream>;

/// Where to look for a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A name or an address, and a port.
    Tcp(String, u16),
    /// A Unix socket's path.
    Unix(PathBuf),
}

/// Where a server was found.
#[derive(Debug, Clone)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Host {
    /// Whether nothing can listen in between.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(host, _) => {
                host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
            }
        }
    }

    /// Connects to the first of the host's addresses that answers.
    pub(super) async fn connect(&self) -> io::Result<(Address, Stream)> {
        match self {
            Self::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                notice_dead_peers(&stream)?;
                Ok((Address::Tcp(stream.peer_addr()?), Either::Left(stream)))
            }
            Self::Unix(path) => Ok((Address::Unix(path.clone()), Either::Right(UnixStream::connect(path).await?))),
        }
    }
}

impl Address {
    /// Connects to the same server once more.
    pub(super) async fn connect(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(address) => Ok(Either::Left(TcpStream::connect(address).await?)),
            Self::Unix(path) => Ok(Either::Right(UnixStream::connect(path).await?)),
        }
    }
}

/// Makes a peer that has vanished an error: after 25 s of silence, or 30 s of data not acknowledged. Without, an answer
/// to COMMIT would be waited for as long as the kernel keeps trying, a quarter of an hour and more.
fn notice_dead_peers(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5));
    socket.set_tcp_keepalive(&keepalive.with_retries(3))?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(Duration::from_secs(30)))?;
    Ok(())
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}
