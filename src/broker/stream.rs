//! A result on its way to its caller, part by part, while PostgreSQL is still at it.
//!
//! Invariant: no more than a few parts are held at a time; a caller that does not take them makes PostgreSQL wait.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::error::PgError;
use super::statement::{Column, Rows};

/// Parts that have been made and not yet been taken: enough that neither side waits for the other, and half a mebibyte.
const PARTS_MAX: usize = 4;

/// A part of a result.
#[derive(Debug)]
pub enum Part {
    /// What it looks like. Comes first.
    Columns(Vec<Column>),
    /// Some rows, and the notices that came with them.
    Rows(Rows, Vec<PgError>),
    /// Some bytes of a COPY.
    Data(Bytes),
}

/// Where parts are put.
#[derive(Debug)]
pub struct Sink {
    parts: mpsc::Sender<Part>,
    /// Nobody wants any more of it.
    closed: CancellationToken,
    /// Something has been put in.
    begun: AtomicBool,
}

/// Nobody takes the parts any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

impl Sink {
    /// A sink, and where its parts come out.
    pub(super) fn new() -> (Self, mpsc::Receiver<Part>) {
        let (parts, taken) = mpsc::channel(PARTS_MAX);
        (Self { parts, closed: CancellationToken::new(), begun: AtomicBool::new(false) }, taken)
    }

    /// Puts a part in when there is room.
    ///
    /// # Errors
    /// [`Closed`].
    ///
    /// # Cancel safety
    /// A dropped future has not put the part in.
    pub async fn put(&self, part: Part) -> Result<(), Closed> {
        self.begun.store(true, Ordering::Relaxed);
        tokio::select! {
            biased;
            () = self.closed.cancelled() => Err(Closed),
            sent = self.parts.send(part) => sent.map_err(|_| Closed),
        }
    }

    /// Whether something has been put in, or was to be.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// Cancelled, it takes no more parts, and whoever waits for room stops waiting.
    pub(super) fn closing(&self) -> CancellationToken {
        self.closed.clone()
    }
}
