//! What comes from PostgreSQL, as the driver is to see it.

use bytes::{BufMut, BytesMut};

use super::{Header, Wire};

/// What the driver is told that PostgreSQL has not said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// That it is ready for the next request.
    Ready,
    /// That the transaction is aborted, once for each request that was passed over.
    Aborted(u32),
}

impl Told {
    pub(super) const NOTHING: Self = Self::Aborted(0);

    pub(super) fn write(self, to: &mut BytesMut) {
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

/// The messages that come, in a stream that arrives in arbitrary pieces. Of each body only the beginning is kept; rows
/// that are too large are taken out.
#[derive(Default)]
pub(super) struct Incoming {
    header: Header,
    /// How much of the body is still to come, once the header is whole.
    left: Option<usize>,
    /// The body's beginning, where it is of interest.
    kept: Vec<u8>,
    /// The message is taken out.
    taken_out: bool,
    /// How many bytes of the header are held back: it may be a row's, to be taken out.
    pub(super) held: usize,
    /// What the driver is to be told, and behind how many of the bytes that are passed on.
    pub(super) told: Vec<(usize, Told)>,
}

impl Incoming {
    /// The longest tag PostgreSQL makes is 64 bytes.
    const KEPT_MAX: usize = 64;

    /// Whether the message is a row, of a result or of a COPY.
    fn is_row(&self) -> bool {
        matches!(self.header.tag(), b'D' | b'd')
    }

    /// What is held back, to be looked at again with what comes next.
    pub(super) fn held(&self) -> &[u8] {
        &self.header.bytes[..self.held]
    }

    /// Puts by what is passed on, with what the driver is to be told.
    pub(super) fn put(&mut self, passed: &[u8], to: &mut BytesMut) {
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
    pub(super) fn pass(&mut self, news: &mut [u8], wire: &Wire) -> usize {
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
