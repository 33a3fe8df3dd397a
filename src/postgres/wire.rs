//! Watches the messages on a connection, for what the driver does not tell: the transaction status of each
//! ReadyForQuery, the full command tags, and whether PostgreSQL still owes an answer; and changes some of them, for what
//! the driver does not do: a Bind asks for results in text where there is no reading their binary form, a row that is too
//! large never gets into memory, and requests that belong together share one Sync.
//!
//! Requests that share a Sync are answered in one write, and behind one that fails PostgreSQL passes over the rest. The
//! driver, which sends a Sync with each and waits for as many ReadyForQuery, is told what it would hear if they had gone:
//! that all is well so far, or that the transaction is aborted.
//!
//! Knows message headers, never their meaning to the driver. Invariant: the watcher sees every byte before the driver
//! does, so once the driver has answered, [`Wire`] knows at least as much.

mod incoming;
mod outgoing;

use incoming::{Incoming, Told};
pub(super) use outgoing::{Bind, Sync};
use outgoing::{Outgoing, Pass};

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use super::connection::PIPELINE_MAX;
use crate::broker::engine::{Lost, TransactionStatus};
use crate::broker::error::PgError;
use crate::broker::statement::NOTICES_MAX;

/// The most tags kept between two looks: a pipeline of statements brings one each.
const TAGS_MAX: usize = 2 * PIPELINE_MAX;

/// How much room for changed messages is kept.
const CHANGED_KEPT_BYTES: usize = 64 * 1024;

/// What has been seen on one connection.
#[derive(Debug)]
pub(super) struct Wire {
    seen: Mutex<Seen>,
    /// Notified when PostgreSQL is ready again, when a request fails and when the connection is lost. One task waits at a
    /// time.
    changed: Notify,
    /// Notified when there is a notice.
    noticed: Notify,
    /// How many Binds to come are not to ask for all binary.
    changed_binds: AtomicUsize,
    /// Rows that are larger are taken out.
    row_bytes_max: AtomicUsize,
    /// How many bytes have come.
    bytes_received: AtomicU64,
}

#[derive(Debug)]
struct Seen {
    /// The ReadyForQuery to come, each with how many requests share its Sync but for the last.
    owed: VecDeque<u32>,
    /// Requests sent since the last Sync.
    joined: u32,
    /// How many of those that share the next ReadyForQuery have been answered.
    answered: u32,
    status: TransactionStatus,
    tags: VecDeque<Tag>,
    /// Whether a row of the result on its way was taken out.
    row_taken_out: bool,
    notices: Vec<PgError>,
    backend_pid: Option<i32>,
    /// Prepared statements the server has confirmed, less those it has closed.
    prepared: i64,
    /// Text travels in another encoding than UTF-8.
    other_encoding: bool,
    /// Requests that failed.
    failures: u32,
    /// Those that ended because somebody cancelled them.
    cancelled: u32,
    /// How Binds to come are changed.
    binds: VecDeque<Bind>,
    lost: Option<Lost>,
}

/// How a result ended.
#[derive(Debug)]
struct Tag {
    text: String,
    /// Whether a row of it was taken out.
    row_taken_out: bool,
}

impl Wire {
    /// For a connection about to start: its startup is owed the first ReadyForQuery.
    pub(super) fn new() -> Arc<Self> {
        let seen = Seen {
            owed: VecDeque::from([0]),
            joined: 0,
            answered: 0,
            status: TransactionStatus::Idle,
            tags: VecDeque::new(),
            row_taken_out: false,
            notices: Vec::new(),
            backend_pid: None,
            prepared: 0,
            other_encoding: false,
            failures: 0,
            cancelled: 0,
            binds: VecDeque::new(),
            lost: None,
        };
        Arc::new(Self {
            seen: Mutex::new(seen),
            changed: Notify::new(),
            noticed: Notify::new(),
            changed_binds: AtomicUsize::new(0),
            row_bytes_max: AtomicUsize::new(usize::MAX),
            bytes_received: AtomicU64::new(0),
        })
    }

    /// How many bytes have come.
    pub(super) fn bytes_received(&self) -> u64 {
        self.bytes_received.load(Ordering::Relaxed)
    }

    /// Forgets the notices, so that the next ones are the next request's.
    pub(super) fn forget_notices(&self) {
        self.lock().notices.clear();
    }

    /// Forgets the tags, so that the next ones are the next request's.
    pub(super) fn forget_tags(&self) {
        let mut seen = self.lock();
        seen.tags.clear();
        seen.row_taken_out = false;
    }

    /// The next command tag since [`Self::forget_tags`], in the order of the requests.
    pub(super) fn next_tag(&self) -> Option<String> {
        self.lock().tags.pop_front().map(|tag| tag.text)
    }

    /// The notices since [`Self::forget_notices`].
    pub(super) fn take_notices(&self) -> Vec<PgError> {
        std::mem::take(&mut self.lock().notices)
    }

    /// How many prepared statements the driver has on the server.
    pub(super) fn prepared(&self) -> i64 {
        self.lock().prepared
    }

    /// Whether text travels in another encoding than UTF-8.
    pub(super) fn has_other_encoding(&self) -> bool {
        self.lock().other_encoding
    }

    /// How many requests have failed.
    pub(super) fn failures(&self) -> u32 {
        self.lock().failures
    }

    /// How many requests have ended because somebody cancelled them.
    pub(super) fn cancelled(&self) -> u32 {
        self.lock().cancelled
    }

    /// The transaction status PostgreSQL last reported.
    pub(super) fn status(&self) -> TransactionStatus {
        self.lock().status
    }

    /// The backend's process id, once the server has told it.
    pub(super) fn backend_pid(&self) -> Option<i32> {
        self.lock().backend_pid
    }

    /// Waits until PostgreSQL has answered everything sent, and tells the transaction status.
    pub(super) async fn settled(&self) -> Result<TransactionStatus, Lost> {
        loop {
            {
                let seen = self.lock();
                match &seen.lost {
                    Some(lost) => return Err(lost.clone()),
                    None if seen.owed.is_empty() && seen.joined == 0 => return Ok(seen.status),
                    None => {}
                }
            }
            self.changed.notified().await;
        }
    }

    /// Waits until another request has failed, or the connection is lost.
    pub(super) async fn failed_after(&self, failures: u32) {
        loop {
            {
                let seen = self.lock();
                if seen.failures != failures || seen.lost.is_some() {
                    return;
                }
            }
            self.changed.notified().await;
        }
    }

    /// Waits until the connection is lost.
    pub(super) async fn lost(&self) -> Lost {
        loop {
            if let Some(lost) = self.lock().lost.clone() {
                return lost;
            }
            self.changed.notified().await;
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lock().lost.is_some()
    }

    pub(super) fn lose(&self, cause: String) {
        self.lock().lost.get_or_insert(Lost(cause));
        self.changed.notify_one();
    }

    pub(super) fn notice(&self, notice: PgError) {
        {
            let mut seen = self.lock();
            if seen.notices.len() < NOTICES_MAX {
                seen.notices.push(notice);
            }
        }
        self.noticed.notify_one();
    }

    /// Waits until there are notices.
    pub(super) async fn noticed(&self) {
        while self.lock().notices.is_empty() {
            self.noticed.notified().await;
        }
    }

    /// Has the next Bind but those before changed. Said of each Bind of a statement of ours, right before the driver is
    /// asked to send it.
    pub(super) fn expect(&self, bind: Bind) {
        if bind.is_changed() {
            self.changed_binds.fetch_add(1, Ordering::SeqCst);
        }
        self.lock().binds.push_back(bind);
    }

    fn next_bind(&self) -> Bind {
        let bind = self.lock().binds.pop_front().unwrap_or_default();
        if bind.is_changed() {
            self.changed_binds.fetch_sub(1, Ordering::SeqCst);
        }
        bind
    }

    fn changes_binds(&self) -> bool {
        self.changed_binds.load(Ordering::SeqCst) > 0
    }

    /// Takes out rows that are larger than this, before the driver holds them in memory.
    pub(super) fn take_out_rows(&self, row_bytes_max: usize) {
        self.row_bytes_max.store(row_bytes_max, Ordering::SeqCst);
    }

    /// Waits for what runs to end, and takes out all rows until then: those that nobody wants cost next to nothing, however
    /// many are on their way.
    pub(super) async fn without_rows(&self, ending: impl Future<Output = ()>) {
        let row_bytes_max = self.row_bytes_max.swap(0, Ordering::SeqCst);
        ending.await;
        self.take_out_rows(row_bytes_max);
    }

    /// Whether a row was taken out of the result whose tag is the next.
    pub(super) fn has_taken_rows_out(&self) -> bool {
        let seen = self.lock();
        seen.tags.front().map_or(seen.row_taken_out, |tag| tag.row_taken_out)
    }

    fn row_bytes_max(&self) -> usize {
        self.row_bytes_max.load(Ordering::Relaxed)
    }

    fn row_taken_out(&self) {
        self.lock().row_taken_out = true;
    }

    fn sent(&self, tag: u8) {
        // Query, Sync and FunctionCall each end with one ReadyForQuery.
        if matches!(tag, b'Q' | b'S' | b'F') {
            let mut seen = self.lock();
            let joined = std::mem::take(&mut seen.joined);
            seen.owed.push_back(joined);
        }
    }

    /// A request was sent without its Sync.
    fn joined(&self) {
        self.lock().joined += 1;
    }

    /// Takes note of a message. Returns what the driver is to be told behind it.
    fn received(&self, tag: u8, body: &[u8]) -> Told {
        match (tag, body) {
            (b'K', [a, b, c, d, ..]) => self.lock().backend_pid = Some(i32::from_be_bytes([*a, *b, *c, *d])),
            (b'S', body) => {
                if let Some(encoding) = body.strip_prefix(b"client_encoding\0") {
                    self.lock().other_encoding = encoding != b"UTF8\0";
                }
            }
            (b'1', _) => self.lock().prepared += 1,
            (b'3', _) => self.lock().prepared -= 1,
            // The fields of an error begin with severity and SQLSTATE.
            (b'E', body) => {
                let mut seen = self.lock();
                seen.failures += 1;
                seen.cancelled += u32::from(body.split(|&byte| byte == 0).any(|field| field == b"C57014"));
                drop(seen);
                self.changed.notify_one();
            }
            (b'I', _) => return self.lock().answered(),
            (b'C', body) => {
                let mut seen = self.lock();
                let row_taken_out = std::mem::take(&mut seen.row_taken_out);
                if seen.tags.len() < TAGS_MAX {
                    let text = body.split(|&byte| byte == 0).next().unwrap_or_default();
                    let text = String::from_utf8_lossy(text).into_owned();
                    seen.tags.push_back(Tag { text, row_taken_out });
                }
                return seen.answered();
            }
            (b'Z', [status]) => {
                let mut seen = self.lock();
                let joined = seen.owed.pop_front().unwrap_or_default();
                let passed_over = joined - std::mem::take(&mut seen.answered).min(joined);
                seen.status = match status {
                    b'I' => TransactionStatus::Idle,
                    b'T' => TransactionStatus::Open,
                    _ => TransactionStatus::Failed,
                };
                drop(seen);
                self.changed.notify_one();
                return Told::Aborted(passed_over);
            }
            _ => {}
        }
        Told::NOTHING
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        // Nothing panics while it is held, so a poisoned lock holds sound facts.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    /// A request has been answered. Behind all but the last of those that share a Sync, the driver waits for more.
    fn answered(&mut self) -> Told {
        if self.answered == self.owed.front().copied().unwrap_or(self.joined) {
            return Told::NOTHING;
        }
        self.answered += 1;
        Told::Ready
    }
}

/// A stream whose messages are noted in a [`Wire`].
pub(super) struct Watched<S> {
    stream: S,
    wire: Arc<Wire>,
    incoming: Incoming,
    /// What is to be passed on before anything else is read.
    ready: BytesMut,
    outgoing: Outgoing,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, wire: Arc<Wire>) -> Self {
        Self { stream, wire, incoming: Incoming::default(), ready: BytesMut::new(), outgoing: Outgoing::new() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, wire, incoming, ready, .. } = self.get_mut();
        loop {
            if !ready.is_empty() {
                let now = ready.len().min(buf.remaining());
                buf.put_slice(&ready.split_to(now));
                return Poll::Ready(Ok(()));
            }
            if buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if incoming.held == 0 {
                let before = buf.filled().len();
                ready!(Pin::new(&mut *stream).poll_read(cx, buf))?;
                let news = buf.filled_mut().get_mut(before..).unwrap_or_default();
                let (came, passed) = (news.len(), incoming.pass(news, wire));
                wire.bytes_received.fetch_add(came as u64, Ordering::Relaxed);
                if !incoming.told.is_empty() {
                    incoming.put(news.get(..passed).unwrap_or_default(), ready);
                    buf.set_filled(before);
                    continue;
                }
                buf.set_filled(before + passed);
                // To pass nothing on of what came would mean the end.
                if passed > 0 || came == 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                // What is held back may need more room than there is.
                let mut room = [0; 64];
                let mut news = ReadBuf::new(&mut room);
                news.put_slice(incoming.held());
                ready!(Pin::new(&mut *stream).poll_read(cx, &mut news))?;
                let news = news.filled_mut();
                if news.len() == incoming.held {
                    // At the end of the stream it belongs to no whole message.
                    return Poll::Ready(Ok(()));
                }
                let passed = incoming.pass(news, wire);
                incoming.put(news.get(..passed).unwrap_or_default(), ready);
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> Watched<S> {
    /// Writes what was changed on its way.
    fn poll_changed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, outgoing, .. } = self;
        while !outgoing.changed.is_empty() {
            let count = ready!(Pin::new(&mut *stream).poll_write(cx, &outgoing.changed))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            outgoing.changed.advance(count);
        }
        // One large request is no reason to keep so much for good.
        if outgoing.changed.capacity() > CHANGED_KEPT_BYTES {
            outgoing.changed = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_changed(cx))?;
        let Self { stream, wire, outgoing, .. } = self.get_mut();
        if outgoing.is_changing() || wire.changes_binds() {
            outgoing.pass(buf, wire, Pass::Changed)?;
            return Poll::Ready(Ok(buf.len()));
        }
        let count = ready!(Pin::new(stream).poll_write(cx, buf))?;
        outgoing.pass(buf.get(..count).unwrap_or_default(), wire, Pass::AsItIs)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_changed(cx))?;
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_changed(cx))?;
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl<S: TlsStream + Unpin> TlsStream for Watched<S> {
    fn channel_binding(&self) -> ChannelBinding {
        self.stream.channel_binding()
    }
}

/// Begins TLS and watches what passes inside of it.
pub(super) struct WatchedTls<T> {
    pub(super) tls: T,
    pub(super) wire: Arc<Wire>,
}

impl<S, T> TlsConnect<S> for WatchedTls<T>
where
    T: TlsConnect<S>,
    T::Future: Send + 'static,
{
    type Stream = Watched<T::Stream>;
    type Error = T::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Stream, Self::Error>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        let Self { tls, wire } = self;
        let connecting = tls.connect(stream);
        Box::pin(async move { Ok(Watched::new(connecting.await?, wire)) })
    }
}

/// A message's header: a tag, absent in a startup message, and a length that counts itself.
#[derive(Default)]
struct Header {
    bytes: [u8; 5],
    filled: usize,
}

impl Header {
    /// Takes what it lacks from `bytes`, and says whether it is whole.
    fn fill(&mut self, bytes: &mut &[u8]) -> bool {
        let (now, rest) = bytes.split_at(bytes.len().min(self.bytes.len() - self.filled));
        for &byte in now {
            self.bytes[self.filled] = byte;
            self.filled += 1;
        }
        *bytes = rest;
        self.filled == self.bytes.len()
    }

    fn tag(&self) -> u8 {
        self.bytes[0]
    }

    /// How long the body is. A length below its own four bytes is the driver's to refuse.
    fn body(&self) -> usize {
        let [_, length @ ..] = self.bytes;
        (u32::from_be_bytes(length) as usize).saturating_sub(length.len())
    }
}

#[cfg(test)]
mod tests;
