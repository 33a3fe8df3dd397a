//! What the driver sends, as PostgreSQL is to see it.

use std::io;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};

use super::{Header, Wire};
use crate::broker::statement::WireFormat;

/// How a request is changed.
#[derive(Debug, Default)]
pub(in crate::postgres) struct Bind {
    /// The formats in which its Bind asks for results; `None`: all in binary, as the driver does.
    pub(in crate::postgres) formats: Option<Arc<[WireFormat]>>,
    pub(in crate::postgres) sync: Sync,
}

/// What becomes of the Sync behind a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::postgres) enum Sync {
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
    pub(super) fn is_changed(&self) -> bool {
        self.formats.is_some() || self.sync != Sync::Goes
    }
}

/// The messages that go. Some Binds are changed: the driver asks for binary results only.
pub(super) struct Outgoing {
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
    pub(super) changed: BytesMut,
}

/// Whether messages go as they are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    AsItIs,
    Changed,
}

impl Outgoing {
    /// How a Bind of the driver's ends: one format for all columns, the binary one.
    pub(super) const ALL_BINARY: [u8; 4] = [0, 1, 0, 1];

    pub(super) fn new() -> Self {
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
    pub(super) fn is_changing(&self) -> bool {
        self.formats.is_some() || matches!(self.sync, Sync::Joins | Sync::Waits) || self.header.filled > self.header_out
    }

    /// Follows what goes, and with [`Pass::Changed`] puts it by as it is to go.
    pub(super) fn pass(&mut self, mut bytes: &[u8], wire: &Wire, pass: Pass) -> io::Result<()> {
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
