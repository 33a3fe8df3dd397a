//! A connection that can be spoken over, and who is at its other end.
//!
//! Knows when calls are open, and not what they are. Invariants: bytes alone keep no connection, only a call does; while a
//! call is open, its connection is not closed from here.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::debug;

/// What a client sends before all else: "PRI * HTTP/2.0", two lines' ends, "SM", two more (RFC 9113, section 3.4).
const PREFACE_BYTES: usize = 24;

/// Who is at the other end, known to whoever serves the calls of a connection.
#[derive(Debug)]
pub struct Peer {
    address: Option<SocketAddr>,
    certificate: Option<CertificateDer<'static>>,
    activity: Mutex<Activity>,
}

/// What goes on over a connection.
#[derive(Debug, Clone, Copy)]
enum Activity {
    /// No call is open. Left by a call that begins.
    Idle { since: Instant },
    /// So many calls are open. Left when the last one is over.
    Calls(NonZeroUsize),
}

impl Peer {
    pub(super) fn new(address: Option<SocketAddr>, certificate: Option<CertificateDer<'static>>) -> Self {
        Self { address, certificate, activity: Mutex::new(Activity::Idle { since: Instant::now() }) }
    }

    /// The client's own certificate, if it showed one; it was verified then.
    pub fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.certificate.as_ref()
    }

    /// Where it is; `None` over a Unix socket.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// A call has begun. It lasts until the answer is dropped, and the connection is not idle meanwhile.
    pub fn begin_call(self: &Arc<Self>) -> OpenCall {
        self.change(|activity| match activity {
            Activity::Idle { since: _ } => Activity::Calls(NonZeroUsize::MIN),
            Activity::Calls(open) => Activity::Calls(open.saturating_add(1)),
        });
        OpenCall(self.clone())
    }

    fn end_call(&self) {
        let now = Instant::now();
        self.change(|activity| match activity {
            Activity::Idle { since } => Activity::Idle { since },
            Activity::Calls(open) => {
                NonZeroUsize::new(open.get() - 1).map_or(Activity::Idle { since: now }, Activity::Calls)
            }
        });
    }

    fn change(&self, change: impl FnOnce(Activity) -> Activity) {
        let mut activity = self.activity.lock().unwrap_or_else(PoisonError::into_inner);
        *activity = change(*activity);
    }

    fn activity(&self) -> Activity {
        *self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is open; over when dropped.
#[derive(Debug)]
#[must_use = "the call is over when this is dropped"]
pub struct OpenCall(Arc<Peer>);

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.end_call();
    }
}

/// Whatever carries bytes.
trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// How long a connection may be of no use, and its place among the connections there may be.
pub(super) struct Terms {
    pub(super) preface_deadline: Instant,
    pub(super) idle_timeout: Duration,
    pub(super) end: Instant,
    pub(super) place: OwnedSemaphorePermit,
}

/// A connection. A read finds its end when it has shown no HTTP/2 preface in time, has been idle for too long, or is too
/// old; a write fails then, also of a peer that takes nothing.
pub struct Connection {
    transport: Box<dyn Transport>,
    peer: Arc<Peer>,
    stage: Stage,
    /// Never later than the stage may be over. Calls do not move it: when it goes off, what happened since is looked
    /// at.
    timer: Pin<Box<Sleep>>,
    idle_timeout: Duration,
    /// When it is closed whatever goes on over it.
    end: Instant,
    _place: OwnedSemaphorePermit,
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    /// The preface has not come but for so many bytes. Left when it has, or when the timer goes off.
    Preface { missing: usize },
    /// Calls may come. Left when none has for the idle timeout.
    Open,
    /// Nothing is read any more.
    Closed,
}

impl Connection {
    pub(super) fn new<T>(transport: T, peer: Peer, terms: Terms) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Terms { preface_deadline, idle_timeout, end, place } = terms;
        Self {
            transport: Box::new(transport),
            peer: Arc::new(peer),
            stage: Stage::Preface { missing: PREFACE_BYTES },
            timer: Box::pin(sleep_until(preface_deadline)),
            idle_timeout,
            end,
            _place: place,
        }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Arc<Peer> {
        self.peer.clone()
    }

    /// Ready when the connection's time is over.
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.stage {
                Stage::Closed => return Poll::Ready(()),
                Stage::Preface { missing } => {
                    ready!(self.timer.as_mut().poll(cx));
                    debug!(address = ?self.peer.address, missing, "connection closed: no preface in time");
                    self.stage = Stage::Closed;
                }
                Stage::Open => {
                    ready!(self.timer.as_mut().poll(cx));
                    let now = Instant::now();
                    match self.peer.activity() {
                        _ if now >= self.end => {
                            debug!(address = ?self.peer.address, "connection closed: too old");
                            self.stage = Stage::Closed;
                        }
                        Activity::Calls(_) => self.look_again(now + self.idle_timeout),
                        Activity::Idle { since } if since + self.idle_timeout > now => {
                            self.look_again(since + self.idle_timeout);
                        }
                        Activity::Idle { since: _ } => {
                            debug!(address = ?self.peer.address, "connection closed: idle");
                            self.stage = Stage::Closed;
                        }
                    }
                }
            }
        }
    }

    fn look_again(&mut self, at: Instant) {
        self.timer.as_mut().reset(at.min(self.end));
    }

    /// An error when the connection's time is over.
    fn check_open(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.poll_closed(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }

    /// Notes that so many bytes came.
    fn note_read(&mut self, bytes: usize) {
        if let Stage::Preface { missing } = self.stage {
            let missing = missing.saturating_sub(bytes);
            if missing > 0 {
                self.stage = Stage::Preface { missing };
            } else {
                self.stage = Stage::Open;
                self.look_again(Instant::now() + self.idle_timeout);
            }
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("peer", &self.peer).field("stage", &self.stage).finish_non_exhaustive()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Looked at first: what always has something to say is read for ever otherwise.
        if this.poll_closed(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.transport).poll_read(cx, buf))?;
        this.note_read(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check_open(cx)?;
        Pin::new(&mut this.transport).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let is_over = this.poll_closed(cx).is_ready();
        match Pin::new(&mut this.transport).poll_flush(cx) {
            Poll::Pending if is_over => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            // Also of one whose time is over, so that it can be closed in order.
            flushed => flushed,
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().transport).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check_open(cx)?;
        Pin::new(&mut this.transport).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }
}
