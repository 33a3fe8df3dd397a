//! Watches the messages on a connection, for what the driver does not tell: the transaction status of each
//! ReadyForQuery, the full command tags, and whether PostgreSQL still owes an answer.
//!
//! Knows message headers, never their meaning to the driver. Invariant: the watcher sees every byte before the driver
//! does, so once the driver has answered, [`Wire`] knows at least as much.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use super::connection::PIPELINE_MAX;
use crate::broker::engine::{Lost, TransactionStatus};
use crate::broker::error::PgError;
use crate::broker::statement::NOTICES_MAX;

/// The most tags kept between two looks: a pipeline of statements brings one each.
const TAGS_MAX: usize = 2 * PIPELINE_MAX;

/// What has been seen on one connection.
#[derive(Debug)]
pub(super) struct Wire {
    seen: Mutex<Seen>,
    /// Notified when PostgreSQL is ready again and when the connection is lost. One task waits at a time.
    changed: Notify,
}

#[derive(Debug)]
struct Seen {
    /// Requests sent that end with a ReadyForQuery not yet received.
    owed: u32,
    status: TransactionStatus,
    tags: VecDeque<String>,
    notices: Vec<PgError>,
    backend_pid: Option<i32>,
    /// Prepared statements the server has confirmed, less those it has closed.
    prepared: i64,
    /// Requests that ended because somebody cancelled them.
    cancelled: u32,
    lost: Option<Lost>,
}

impl Wire {
    /// For a connection about to start: its startup is owed the first ReadyForQuery.
    pub(super) fn new() -> Arc<Self> {
        let seen = Seen {
            owed: 1,
            status: TransactionStatus::Idle,
            tags: VecDeque::new(),
            notices: Vec::new(),
            backend_pid: None,
            prepared: 0,
            cancelled: 0,
            lost: None,
        };
        Arc::new(Self { seen: Mutex::new(seen), changed: Notify::new() })
    }

    /// Forgets the notices, so that the next ones are the next request's.
    pub(super) fn forget_notices(&self) {
        self.lock().notices.clear();
    }

    /// Forgets the tags, so that the next ones are the next request's.
    pub(super) fn forget_tags(&self) {
        self.lock().tags.clear();
    }

    /// The next command tag since [`Self::forget_tags`], in the order of the requests.
    pub(super) fn next_tag(&self) -> Option<String> {
        self.lock().tags.pop_front()
    }

    /// The notices since [`Self::forget_notices`].
    pub(super) fn take_notices(&self) -> Vec<PgError> {
        std::mem::take(&mut self.lock().notices)
    }

    /// How many prepared statements the driver has on the server.
    pub(super) fn prepared(&self) -> i64 {
        self.lock().prepared
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
                    None if seen.owed == 0 => return Ok(seen.status),
                    None => {}
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
        let mut seen = self.lock();
        if seen.notices.len() < NOTICES_MAX {
            seen.notices.push(notice);
        }
    }

    fn sent(&self, tag: u8) {
        // Query, Sync and FunctionCall each end with one ReadyForQuery.
        if matches!(tag, b'Q' | b'S' | b'F') {
            self.lock().owed += 1;
        }
    }

    fn received(&self, tag: u8, body: &[u8]) {
        match (tag, body) {
            (b'K', [a, b, c, d, ..]) => self.lock().backend_pid = Some(i32::from_be_bytes([*a, *b, *c, *d])),
            (b'1', _) => self.lock().prepared += 1,
            (b'3', _) => self.lock().prepared -= 1,
            // The fields of an error begin with severity and SQLSTATE.
            (b'E', body) if body.split(|&byte| byte == 0).any(|field| field == b"C57014") => self.lock().cancelled += 1,
            (b'C', body) => {
                let mut seen = self.lock();
                if seen.tags.len() < TAGS_MAX {
                    let text = body.split(|&byte| byte == 0).next().unwrap_or_default();
                    seen.tags.push_back(String::from_utf8_lossy(text).into_owned());
                }
            }
            (b'Z', [status]) => {
                let mut seen = self.lock();
                seen.owed = seen.owed.saturating_sub(1);
                seen.status = match status {
                    b'I' => TransactionStatus::Idle,
                    b'T' => TransactionStatus::Open,
                    _ => TransactionStatus::Failed,
                };
                drop(seen);
                self.changed.notify_one();
            }
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        // Nothing panics while it is held, so a poisoned lock holds sound facts.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream whose messages are noted in a [`Wire`].
pub(super) struct Watched<S> {
    stream: S,
    wire: Arc<Wire>,
    read: Scanner,
    written: Scanner,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, wire: Arc<Wire>) -> Self {
        // The client's startup message is the only one without a tag.
        Self { stream, wire, read: Scanner::new(Header::TAGGED), written: Scanner::new(Header::STARTUP) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, wire, read, .. } = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(stream).poll_read(cx, buf))?;
        let news = buf.filled().get(before..).unwrap_or_default();
        read.feed(news, |tag, body| wire.received(tag, body));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { stream, wire, written, .. } = self.get_mut();
        let count = ready!(Pin::new(stream).poll_write(cx, buf))?;
        written.feed(buf.get(..count).unwrap_or_default(), |tag, _| wire.sent(tag));
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
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

/// Finds the messages in a stream that arrives in arbitrary pieces, keeping of each body only its beginning.
struct Scanner {
    header: Header,
    /// The tag and beginning of the body being read, and how many of its bytes are still to come.
    body: Option<(u8, Vec<u8>, usize)>,
}

/// A header being read: a tag, absent in a startup message, and a length that counts itself.
struct Header {
    bytes: [u8; 5],
    filled: usize,
}

impl Header {
    const TAGGED: Self = Self { bytes: [0; 5], filled: 0 };
    const STARTUP: Self = Self { bytes: [0; 5], filled: 1 };
}

impl Scanner {
    /// The longest tag PostgreSQL makes is 64 bytes.
    const KEPT_MAX: usize = 64;

    fn new(header: Header) -> Self {
        Self { header, body: None }
    }

    fn feed(&mut self, mut bytes: &[u8], mut message: impl FnMut(u8, &[u8])) {
        loop {
            if let Some((tag, kept, left)) = &mut self.body {
                let (now, rest) = bytes.split_at(bytes.len().min(*left));
                let keep = now.len().min(Self::KEPT_MAX - kept.len());
                kept.extend(now.iter().take(keep));
                *left -= now.len();
                bytes = rest;
                if *left > 0 {
                    return;
                }
                message(*tag, kept);
                self.body = None;
                self.header = Header::TAGGED;
            }
            let Header { bytes: header, filled } = &mut self.header;
            while *filled < header.len() {
                let Some((&byte, rest)) = bytes.split_first() else { return };
                header[*filled] = byte;
                *filled += 1;
                bytes = rest;
            }
            let [tag, length @ ..] = *header;
            // A length below its own four bytes is the driver's to refuse.
            let left = (u32::from_be_bytes(length) as usize).saturating_sub(length.len());
            self.body = Some((tag, Vec::new(), left));
        }
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

    fn scan(header: Header, pieces: &[&[u8]]) -> Vec<(u8, Vec<u8>)> {
        let mut scanner = Scanner::new(header);
        let mut found = Vec::new();
        for piece in pieces {
            scanner.feed(piece, |tag, body| found.push((tag, body.to_vec())));
        }
        found
    }

    #[test]
    fn the_startup_message_has_no_tag() {
        let startup = message(0, b"user\0x\0\0");
        let found = scan(Header::STARTUP, &[&startup[1..], &message(b'Q', b"x")]);
        assert_eq!(found.last(), Some(&(b'Q', b"x".to_vec())));
        assert_eq!(found.len(), 2);
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
    fn a_cancelled_request_is_counted_by_its_sqlstate() {
        let wire = Wire::new();
        wire.received(b'E', b"SFEHLER\0VERROR\0C57014\0Mstopped\0");
        wire.received(b'E', b"SERROR\0VERROR\0C25P02\0MC57014\0");
        assert_eq!(wire.cancelled(), 1);
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
        fn messages_are_found_however_the_stream_is_cut(
            bodies in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..100)), 0..8),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let stream: Vec<u8> = bodies.iter().flat_map(|(tag, body)| message(*tag, body)).collect();
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            at.extend([0, stream.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect();
            let expected: Vec<_> = bodies
                .into_iter()
                .map(|(tag, body)| (tag, body.into_iter().take(Scanner::KEPT_MAX).collect::<Vec<_>>()))
                .collect();
            prop_assert_eq!(scan(Header::TAGGED, &pieces), expected);
        }

        #[test]
        fn hostile_bytes_are_scanned_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let wire = Wire::new();
            Scanner::new(Header::TAGGED).feed(&bytes, |tag, body| wire.received(tag, body));
        }
    }
}
