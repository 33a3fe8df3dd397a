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

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use super::connection::PIPELINE_MAX;
use crate::broker::engine::{Lost, TransactionStatus};
use crate::broker::error::PgError;
use crate::broker::statement::{NOTICES_MAX, WireFormat};

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

/// How a request is changed.
#[derive(Debug, Default)]
pub(super) struct Bind {
    /// The formats in which its Bind asks for results; `None`: all in binary, as the driver does.
    pub(super) formats: Option<Arc<[WireFormat]>>,
    pub(super) sync: Sync,
}

/// What becomes of the Sync behind a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Sync {
    /// It goes.
    #[default]
    Goes,
    /// It does not go: the request shares that of the next one, which must follow before its answer is waited for.
    Joins,
    /// It does not go, but counts: that of a COPY. PostgreSQL would pass over it while it takes the data, but not when the
    /// COPY fails at once: the driver, which sends another behind the data, could not tell the answers apart.
    Waits,
    /// It goes, and has been counted: that behind the data.
    IsCounted,
}

impl Bind {
    fn is_changed(&self) -> bool {
        self.formats.is_some() || self.sync != Sync::Goes
    }
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

/// What the driver is told that PostgreSQL has not said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// That it is ready for the next request.
    Ready,
    /// That the transaction is aborted, once for each request that was passed over.
    Aborted(u32),
}

impl Told {
    const NOTHING: Self = Self::Aborted(0);

    fn write(self, to: &mut BytesMut) {
        const READY: &[u8] = b"Z\0\0\0\x05T";
        const READY_FAILED: &[u8] = b"Z\0\0\0\x05E";
        /// As PostgreSQL says it.
        const ABORTED: &[u8] = b"SERROR\0VERROR\0C25P02\0\
            Mcurrent transaction is aborted, commands ignored until end of transaction block\0\0";
        match self {
            Self::Ready => to.put_slice(READY),
            Self::Aborted(times) => {
                for _ in 0..times {
                    to.put_u8(b'E');
                    to.put_u32(u32::try_from(ABORTED.len() + 4).unwrap_or_default());
                    to.put_slice(ABORTED);
                    to.put_slice(READY_FAILED);
                }
            }
        }
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

/// The messages that come, in a stream that arrives in arbitrary pieces. Of each body only the beginning is kept; rows
/// that are too large are taken out.
#[derive(Default)]
struct Incoming {
    header: Header,
    /// How much of the body is still to come, once the header is whole.
    left: Option<usize>,
    /// The body's beginning, where it is of interest.
    kept: Vec<u8>,
    /// The message is taken out.
    taken_out: bool,
    /// How many bytes of the header are held back: it may be a row's, to be taken out.
    held: usize,
    /// What the driver is to be told, and behind how many of the bytes that are passed on.
    told: Vec<(usize, Told)>,
}

impl Incoming {
    /// The longest tag PostgreSQL makes is 64 bytes.
    const KEPT_MAX: usize = 64;

    /// Whether the message is a row, of a result or of a COPY.
    fn is_row(&self) -> bool {
        matches!(self.header.tag(), b'D' | b'd')
    }

    /// What is held back, to be looked at again with what comes next.
    fn held(&self) -> &[u8] {
        &self.header.bytes[..self.held]
    }

    /// Puts by what is passed on, with what the driver is to be told.
    fn put(&mut self, passed: &[u8], to: &mut BytesMut) {
        let mut put = 0;
        for (at, told) in self.told.drain(..) {
            to.extend_from_slice(&passed[put..at]);
            told.write(to);
            put = at;
        }
        to.extend_from_slice(&passed[put..]);
    }

    /// Looks at what has come, with what was held back before it, and moves what is to be passed on to its beginning.
    /// Returns how much that is.
    fn pass(&mut self, news: &mut [u8], wire: &Wire) -> usize {
        if std::mem::take(&mut self.held) > 0 {
            self.header.filled = 0;
        }
        let (mut at, mut passed) = (0, 0);
        loop {
            let begin = at;
            match self.left {
                None => {
                    let filled_before = self.header.filled;
                    let mut rest = news.get(at..).unwrap_or_default();
                    let is_whole = self.header.fill(&mut rest);
                    at = news.len() - rest.len();
                    if is_whole {
                        self.left = Some(self.header.body());
                        self.taken_out = self.is_row() && self.header.body() > wire.row_bytes_max();
                        self.kept.clear();
                    } else if filled_before == 0 && self.header.filled > 0 && self.is_row() {
                        self.held = self.header.filled;
                        return passed;
                    }
                }
                Some(left) => {
                    at += left.min(news.len() - at);
                    let now = &news[begin..at];
                    if !self.is_row() {
                        self.kept.extend(now.iter().take(Self::KEPT_MAX - self.kept.len()));
                    }
                    self.left = Some(left - now.len());
                }
            }
            if !self.taken_out {
                news.copy_within(begin..at, passed);
                passed += at - begin;
            }
            if self.left == Some(0) {
                if std::mem::take(&mut self.taken_out) {
                    wire.row_taken_out();
                } else {
                    let told = wire.received(self.header.tag(), &self.kept);
                    if told != Told::NOTHING {
                        self.told.push((passed, told));
                    }
                }
                self.left = None;
                self.header = Header::default();
            } else if at == news.len() {
                return passed;
            }
        }
    }
}

/// The messages that go. Some Binds are changed: the driver asks for binary results only.
struct Outgoing {
    header: Header,
    /// How much of the header has gone.
    header_out: usize,
    /// How much of the body is still to go, once the header is whole.
    left: Option<usize>,
    /// The formats that a Bind on its way is to ask for.
    formats: Option<Arc<[WireFormat]>>,
    /// What becomes of the next Sync.
    sync: Sync,
    /// The end of that Bind, which does not go.
    tail: Vec<u8>,
    /// What was changed and has not been written yet.
    changed: BytesMut,
}

/// Whether messages go as they are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    AsItIs,
    Changed,
}

impl Outgoing {
    /// How a Bind of the driver's ends: one format for all columns, the binary one.
    const ALL_BINARY: [u8; 4] = [0, 1, 0, 1];

    fn new() -> Self {
        // The startup message is the only one without a tag.
        let header = Header { bytes: [0; 5], filled: 1 };
        Self {
            header,
            header_out: 1,
            left: None,
            formats: None,
            sync: Sync::Goes,
            tail: Vec::new(),
            changed: BytesMut::new(),
        }
    }

    /// Whether what comes next continues what has been changed.
    fn is_changing(&self) -> bool {
        self.formats.is_some() || matches!(self.sync, Sync::Joins | Sync::Waits) || self.header.filled > self.header_out
    }

    /// Follows what goes, and with [`Pass::Changed`] puts it by as it is to go.
    fn pass(&mut self, mut bytes: &[u8], wire: &Wire, pass: Pass) -> io::Result<()> {
        loop {
            match self.left {
                None => {
                    let is_whole = self.header.fill(&mut bytes);
                    if pass == Pass::AsItIs {
                        self.header_out = self.header.filled;
                    }
                    if !is_whole {
                        return Ok(());
                    }
                    self.begin(wire, pass);
                }
                Some(left) => {
                    let (now, rest) = bytes.split_at(bytes.len().min(left));
                    if pass == Pass::Changed {
                        let tail = if self.formats.is_some() { Self::ALL_BINARY.len() } else { 0 };
                        let (plain, tail) = now.split_at(now.len().min(left.saturating_sub(tail)));
                        self.changed.extend_from_slice(plain);
                        self.tail.extend_from_slice(tail);
                    }
                    self.left = Some(left - now.len());
                    bytes = rest;
                }
            }
            if self.left == Some(0) {
                self.end(wire)?;
            } else if bytes.is_empty() {
                return Ok(());
            }
        }
    }

    /// Its header is whole.
    fn begin(&mut self, wire: &Wire, pass: Pass) {
        self.left = Some(self.header.body());
        if self.header.tag() == b'B' {
            Bind { formats: self.formats, sync: self.sync } = wire.next_bind();
        }
        if self.header.tag() == b'S' && matches!(self.sync, Sync::Joins | Sync::Waits) {
            return;
        }
        let mut header = self.header.bytes;
        if let Some(formats) = &self.formats {
            // One format more for each column but one.
            let longer = u32::try_from(2 * formats.len()).unwrap_or(u32::MAX).wrapping_sub(2);
            let [_, length @ ..] = header;
            let length = u32::from_be_bytes(length).wrapping_add(longer).to_be_bytes();
            header[1..].copy_from_slice(&length);
        }
        if pass == Pass::Changed {
            self.changed.extend_from_slice(&header[self.header_out..]);
        }
    }

    /// Its body is through.
    fn end(&mut self, wire: &Wire) -> io::Result<()> {
        if let Some(formats) = self.formats.take() {
            if std::mem::take(&mut self.tail) != Self::ALL_BINARY {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a Bind does not end as the driver's do"));
            }
            self.changed.put_u16(u16::try_from(formats.len()).unwrap_or(u16::MAX));
            for format in &*formats {
                self.changed.put_u16(match format {
                    WireFormat::Text => 0,
                    WireFormat::Binary => 1,
                });
            }
        }
        match (self.header.tag(), self.sync) {
            (b'S', Sync::IsCounted) => self.sync = Sync::Goes,
            (b'S', Sync::Joins) => {
                wire.joined();
                self.sync = Sync::Goes;
            }
            (b'S', Sync::Waits) => {
                wire.sent(b'S');
                self.sync = Sync::IsCounted;
            }
            (tag, _) => wire.sent(tag),
        }
        self.left = None;
        self.header = Header::default();
        self.header_out = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag], length.to_be_bytes().as_slice(), body].concat()
    }

    /// What of these pieces, each read after what was held back, is passed on.
    fn read(wire: &Wire, pieces: &[&[u8]]) -> Vec<u8> {
        let mut incoming = Incoming::default();
        let mut passed = BytesMut::new();
        for piece in pieces {
            let mut news = [incoming.held(), piece].concat();
            let count = incoming.pass(&mut news, wire);
            incoming.put(&news[..count], &mut passed);
        }
        passed.to_vec()
    }

    /// What goes when the driver writes these pieces.
    fn write(wire: &Wire, outgoing: &mut Outgoing, pieces: &[&[u8]]) -> Vec<u8> {
        let mut written = Vec::new();
        for piece in pieces {
            if outgoing.is_changing() || wire.changes_binds() {
                outgoing.pass(piece, wire, Pass::Changed).unwrap();
                written.extend_from_slice(&outgoing.changed.split());
            } else {
                outgoing.pass(piece, wire, Pass::AsItIs).unwrap();
                written.extend_from_slice(piece);
            }
        }
        written
    }

    fn pieces<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        at.extend([0, stream.len()]);
        at.sort_unstable();
        at.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect()
    }

    #[test]
    fn the_startup_message_has_no_tag() {
        let (wire, startup) = (Wire::new(), message(0, b"user\0x\0\0"));
        let query = message(b'Q', b"x");
        let written = write(&wire, &mut Outgoing::new(), &[&startup[1..], &query]);
        assert_eq!((written, wire.lock().owed.len()), ([&startup[1..], &query].concat(), 2));
    }

    #[tokio::test]
    async fn a_wire_is_settled_when_every_request_has_its_ready_for_query() {
        let wire = Wire::new();
        wire.received(b'Z', b"I");
        wire.sent(b'Q');
        wire.sent(b'S');
        wire.received(b'C', b"BEGIN\0");
        wire.received(b'Z', b"T");
        wire.received(b'Z', b"E");
        assert_eq!(wire.settled().await, Ok(TransactionStatus::Failed));
        assert_eq!(wire.next_tag().as_deref(), Some("BEGIN"));
    }

    #[test]
    fn a_copy_has_one_sync_that_is_counted_when_it_begins() {
        let (wire, mut outgoing) = (Wire::new(), Outgoing::new());
        write(&wire, &mut outgoing, &[&message(0, b"\0")[1..]]);
        wire.received(b'Z', b"I");
        wire.expect(Bind { sync: Sync::Waits, ..Bind::default() });
        let begin = [message(b'B', &[0; 8]), message(b'E', b"\0\0\0\0\0"), message(b'S', b"")];
        let written = write(&wire, &mut outgoing, &[&begin.concat()]);
        assert_eq!((written, wire.lock().owed.len()), (begin[..2].concat(), 1));
        let end = [message(b'd', b"data"), message(b'c', b""), message(b'S', b"")].concat();
        assert_eq!((write(&wire, &mut outgoing, &[&end]), wire.lock().owed.len()), (end, 1));
        write(&wire, &mut outgoing, &[&message(b'S', b"")]);
        assert_eq!(wire.lock().owed.len(), 2);
    }

    #[test]
    fn a_cancelled_request_is_counted_by_its_sqlstate() {
        let wire = Wire::new();
        wire.received(b'E', b"SFEHLER\0VERROR\0C57014\0Mstopped\0");
        wire.received(b'E', b"SERROR\0VERROR\0C25P02\0MC57014\0");
        assert_eq!(wire.cancelled(), 1);
    }

    #[tokio::test]
    async fn rows_that_nobody_wants_do_not_get_through() {
        let wire = Wire::new();
        let (row, tag) = (message(b'D', b"row"), message(b'C', b"SELECT 1\0"));
        wire.without_rows(async { assert_eq!(read(&wire, &[&row, &tag]), tag) }).await;
        assert_eq!(read(&wire, &[&row, &tag]), [row, tag].concat());
    }

    #[tokio::test]
    async fn a_lost_connection_owes_nothing_any_more() {
        let wire = Wire::new();
        wire.lose("cut".into());
        assert_eq!(wire.settled().await, Err(Lost("cut".into())));
        assert_eq!(wire.lost().await, Lost("cut".into()));
    }

    proptest! {
        #[test]
        fn what_comes_is_passed_on_however_it_is_cut_but_for_rows_that_are_too_large(
            bodies in prop::collection::vec((prop_oneof![Just(b'D'), Just(b'd'), Just(b'C'), any::<u8>()], 0..100_usize), 0..8),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let wire = Wire::new();
            wire.take_out_rows(50);
            let messages: Vec<_> = bodies.iter().map(|(tag, length)| message(*tag, &vec![b'x'; *length])).collect();
            let passes = |(tag, length): &(u8, usize)| !matches!(tag, b'D' | b'd') || *length <= 50;
            let expected: Vec<u8> =
                bodies.iter().zip(&messages).filter(|(body, _)| passes(body)).flat_map(|(_, m)| m.clone()).collect();
            prop_assert_eq!(read(&wire, &pieces(&messages.concat(), &cuts)), expected);
            let taken_out = wire.lock().row_taken_out || wire.lock().tags.iter().any(|tag| tag.row_taken_out);
            prop_assert_eq!(taken_out, !bodies.iter().all(passes));
            let tags = bodies.iter().filter(|(tag, _)| *tag == b'C').count();
            prop_assert_eq!(wire.lock().tags.len(), tags);
        }

        #[test]
        fn a_bind_asks_for_its_formats_however_it_is_cut(
            binds in prop::collection::vec((0..4_usize, 0..20_usize), 1..5),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let wire = Wire::new();
            let mut outgoing = Outgoing::new();
            write(&wire, &mut outgoing, &[&message(0, b"\0")[1..]]);
            let (mut driver, mut expected) = (Vec::new(), Vec::new());
            for (columns, length) in binds {
                let formats = (columns > 0).then(|| vec![WireFormat::Text; columns].into());
                wire.expect(Bind { formats, ..Bind::default() });
                let start = vec![b'p'; length];
                driver.extend(message(b'B', &[&start[..], &Outgoing::ALL_BINARY].concat()));
                driver.extend(message(b'S', b""));
                let asked = match columns {
                    0 => Outgoing::ALL_BINARY.to_vec(),
                    columns => [&u16::try_from(columns).unwrap().to_be_bytes()[..], &vec![0; 2 * columns]].concat(),
                };
                expected.extend(message(b'B', &[start, asked].concat()));
                expected.extend(message(b'S', b""));
            }
            prop_assert_eq!(write(&wire, &mut outgoing, &pieces(&driver, &cuts)), expected);
            prop_assert!(!wire.changes_binds());
        }

        #[test]
        fn requests_that_share_a_sync_are_answered_as_if_each_had_its_own(
            count in 1..6_usize,
            failing in prop::option::of(0..6_usize),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let (wire, mut outgoing) = (Wire::new(), Outgoing::new());
            write(&wire, &mut outgoing, &[&message(0, b"\0")[1..]]);
            wire.received(b'Z', b"I");
            let request = [message(b'B', &[0; 8]), message(b'E', b"\0\0\0\0\0")].concat();
            let sync = message(b'S', b"");
            for index in 0..count {
                let sync = if index + 1 < count { Sync::Joins } else { Sync::Goes };
                wire.expect(Bind { sync, ..Bind::default() });
            }
            let driver = [request.clone(), sync.clone()].concat().repeat(count);
            let written = write(&wire, &mut outgoing, &pieces(&driver, &cuts));
            prop_assert_eq!(written, [request.repeat(count), sync].concat());
            prop_assert_eq!((wire.lock().owed.len(), wire.changes_binds()), (1, false));

            let failing = failing.filter(|failing| *failing < count);
            let answer = [message(b'2', b""), message(b'C', b"SELECT 0\0")].concat();
            let (error, ready) = (message(b'E', b"SERROR\0C22012\0\0"), |status| message(b'Z', &[status]));
            let mut aborted = BytesMut::new();
            Told::Aborted(1).write(&mut aborted);
            let (server, expected) = match failing {
                None => {
                    let server = [answer.repeat(count), ready(b'T')].concat();
                    (server, [answer, ready(b'T')].concat().repeat(count))
                }
                Some(failing) => {
                    let server = [answer.repeat(failing), error.clone(), ready(b'E')].concat();
                    let before = [answer, ready(b'T')].concat().repeat(failing);
                    (server, [before, error, ready(b'E'), aborted.repeat(count - 1 - failing)].concat())
                }
            };
            prop_assert_eq!(read(&wire, &pieces(&server, &cuts)), expected);
            prop_assert!(wire.lock().owed.is_empty());
        }

        #[test]
        fn hostile_bytes_are_looked_at_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            read(&Wire::new(), &[&bytes]);
        }
    }
}
