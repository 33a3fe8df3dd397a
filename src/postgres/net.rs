//! Where a PostgreSQL server listens, and the plain stream to it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

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

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}
