//! Where a PostgreSQL server listens, and the plain stream to it.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio_util::either::Either;

use super::options::ConnectOptions;

/// A byte stream to a server.
pub(super) type Stream = Either<TcpStream, UnixStream>;

/// Where to look for a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A name or an address, for certificates too.
    Tcp {
        /// The name.
        name: String,
        /// Where it is, when the name is not to be resolved.
        address: Option<IpAddr>,
        /// The port.
        port: u16,
    },
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
            Self::Tcp { address: Some(address), .. } => address.is_loopback(),
            Self::Tcp { name, .. } => name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback()),
        }
    }

    /// The same host at one of its addresses.
    pub(super) fn at(&self, found: IpAddr) -> Self {
        match self {
            Self::Tcp { name, port, .. } => Self::Tcp { name: name.clone(), address: Some(found), port: *port },
            Self::Unix(path) => Self::Unix(path.clone()),
        }
    }

    /// Where it is, once that is known, as [`Address`] shows it.
    pub(super) fn address(&self) -> Option<String> {
        match self {
            Self::Tcp { address, port, .. } => {
                address.map(|address| Address::Tcp(SocketAddr::new(address, *port)).to_string())
            }
            Self::Unix(path) => Some(Address::Unix(path.clone()).to_string()),
        }
    }

    /// The name that a certificate must have.
    pub(super) fn certificate_name(&self) -> &str {
        match self {
            Self::Tcp { name, .. } => name,
            // No certificate names a path; libpq does not encrypt on a Unix socket either.
            Self::Unix(_) => "localhost",
        }
    }

    /// Connects to the first of the host's addresses that answers.
    pub(super) async fn connect(&self, options: &ConnectOptions) -> io::Result<(Address, Stream)> {
        let stream = match self {
            Self::Tcp { address: Some(address), port, .. } => TcpStream::connect((*address, *port)).await?,
            Self::Tcp { name, address: None, port } => TcpStream::connect((name.as_str(), *port)).await?,
            Self::Unix(path) => {
                return Ok((Address::Unix(path.clone()), Either::Right(UnixStream::connect(path).await?)));
            }
        };
        prepare(&stream, options)?;
        Ok((Address::Tcp(stream.peer_addr()?), Either::Left(stream)))
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

/// Sets a TCP connection's options.
fn prepare(stream: &TcpStream, options: &ConnectOptions) -> io::Result<()> {
    let ConnectOptions { keepalives, tcp_user_timeout, .. } = options;
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    match keepalives {
        None => socket.set_keepalive(false)?,
        Some(keepalives) => {
            let times = TcpKeepalive::new().with_time(keepalives.idle).with_interval(keepalives.interval);
            socket.set_tcp_keepalive(&times.with_retries(keepalives.retries))?;
        }
    }
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(*tcp_user_timeout)?;
    #[cfg(not(target_os = "linux"))]
    let _ = tcp_user_timeout;
    Ok(())
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { name, port, .. } if name.contains(':') => write!(f, "[{name}]:{port}"),
            Self::Tcp { name, port, .. } => write!(f, "{name}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A stream that comes back when whoever was given it is done with it.
pub(super) struct Lent<S: Unpin> {
    stream: Option<S>,
    back: Option<oneshot::Sender<S>>,
}

impl<S: Unpin> Lent<S> {
    pub(super) fn new(stream: S) -> (Self, oneshot::Receiver<S>) {
        let (back, returned) = oneshot::channel();
        (Self { stream: Some(stream), back: Some(back) }, returned)
    }

    fn stream(&mut self) -> Pin<&mut S> {
        Pin::new(self.stream.as_mut().expect("it is there until it is dropped"))
    }
}

impl<S: Unpin> Drop for Lent<S> {
    fn drop(&mut self) {
        if let (Some(stream), Some(back)) = (self.stream.take(), self.back.take()) {
            // Nobody waits for it any more: then it is closed.
            let _ = back.send(stream);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lent<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream().poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Lent<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().stream().poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::TcpListener;

    use super::super::options::{
        ChannelBinding, ConnectOptions, Keepalives, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs, Tls,
    };
    use super::*;

    #[tokio::test]
    async fn tcp_options_reach_the_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = Host::Tcp {
            name: "not.resolved.test".into(),
            address: Some("127.0.0.1".parse().unwrap()),
            port: listener.local_addr().unwrap().port(),
        };
        let second = Duration::from_secs(1);
        let mut options = ConnectOptions {
            hosts: vec![host.clone()],
            user: String::new(),
            password: None,
            database: String::new(),
            application_name: String::new(),
            connect_timeout: second,
            keepalives: Some(Keepalives { idle: 7 * second, interval: 3 * second, retries: 5 }),
            tcp_user_timeout: Some(11 * second),
            target_session_attrs: TargetSessionAttrs::Any,
            load_balance_hosts: LoadBalanceHosts::Disable,
            channel_binding: ChannelBinding::Prefer,
            tls: Tls { mode: SslMode::Disable, root_cert: None, identity: None, negotiation: SslNegotiation::Postgres },
            settings: std::collections::BTreeMap::new(),
            nets: None,
        };
        let (_, Either::Left(stream)) = host.connect(&options).await.unwrap() else { panic!("not over TCP") };
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap() && stream.nodelay().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), 7 * second);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), 3 * second);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 5);
        #[cfg(target_os = "linux")]
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(11 * second));
        options.keepalives = None;
        let (_, Either::Left(stream)) = host.connect(&options).await.unwrap() else { panic!("not over TCP") };
        assert!(!SockRef::from(&stream).keepalive().unwrap());
    }
}
