//! The port to whoever watches: what happens is told here, in the domain's words, and becomes metrics and spans elsewhere.
//!
//! Knows no OpenTelemetry; spans are `tracing`'s. Invariant: nothing told here holds SQL, a parameter's value or a token,
//! and nobody who is told may wait.

use std::fmt;
use std::time::Duration;

use tracing::Span;

use super::error::EndReason;
use super::transaction::Verdict;

/// The target of spans, and of what happens in them. What has it is for traces alone.
pub const TRACE: &str = "trace";

/// Watches a broker.
pub trait Observer: fmt::Debug + Send + Sync {
    /// Something has happened.
    fn observe(&self, event: Event<'_>);

    /// Begins the span of a call, in the trace that its headers name.
    fn call(&self, method: &'static str, header: &dyn Fn(&str) -> Option<String>) -> Span;

    /// Where the current span stands in its trace, if it is part of one that is kept.
    fn here(&self) -> Option<TracePlace>;

    /// Links a span to where another stood.
    fn link(&self, span: &Span, place: TracePlace);

    /// Whether spans are to hold the text of statements.
    fn shows_sql(&self) -> bool;
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nobody;

impl Observer for Nobody {
    fn observe(&self, _: Event<'_>) {}

    fn call(&self, _: &'static str, _: &dyn Fn(&str) -> Option<String>) -> Span {
        Span::none()
    }

    fn here(&self) -> Option<TracePlace> {
        None
    }

    fn link(&self, _: &Span, _: TracePlace) {}

    fn shows_sql(&self) -> bool {
        false
    }
}

/// A span's place in a trace, as W3C Trace Context has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TracePlace {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The span.
    pub span_id: [u8; 8],
}

/// As a `traceparent` of a trace that is kept.
impl fmt::Display for TracePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trace_id, span_id) = (u128::from_be_bytes(self.trace_id), u64::from_be_bytes(self.span_id));
        write!(f, "00-{trace_id:032x}-{span_id:016x}-01")
    }
}

/// What happens. Engines are told by their names.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A call was answered, or left.
    CallEnded {
        /// What was called: `sessionbroker.v1.SessionService/Execute`.
        method: &'static str,
        /// The status, by its name.
        status: &'static str,
        /// What it failed with: one of the broker's reasons, or the status where there is none.
        error: Option<&'a str>,
        /// How long it took, to the end of its answer.
        took: Duration,
    },
    /// An engine's PostgreSQL was asked whether it answers.
    EngineProbed {
        /// The engine.
        engine: &'a str,
        /// Whether it does.
        reachable: bool,
    },
    /// A session was granted.
    SessionBegan {
        /// Its engine.
        engine: &'a str,
    },
    /// A session ended.
    SessionEnded {
        /// Its engine.
        engine: &'a str,
        /// Why.
        reason: EndReason,
    },
    /// A session ended because its time was over, so long after that.
    SessionReaped {
        /// How late.
        late: Duration,
    },
    /// A session's time was over, and the reaper has only counted it.
    SessionSpared,
    /// A call renewed a lease of which so much was left.
    LeaseRenewed {
        /// What was left.
        remaining: Duration,
    },
    /// PostgreSQL did something, or failed to.
    Operation {
        /// The engine.
        engine: &'a str,
        /// Its name: `SELECT`, `COMMIT` ...
        name: &'static str,
        /// How long it took.
        took: Duration,
        /// What it failed with: an SQLSTATE, or a word.
        error: Option<&'a str>,
    },
    /// A statement was stopped.
    Cancelled {
        /// The engine.
        engine: &'a str,
        /// How long that took.
        took: Duration,
    },
    /// A transaction is over.
    TransactionEnded {
        /// The engine.
        engine: &'a str,
        /// What became of it.
        verdict: &'a Verdict,
        /// How long it was open.
        lasted: Duration,
        /// The part of that in which it did nothing, from 0 to 1.
        idle_ratio: f64,
    },
    /// A commit's answer was lost, and its outcome looked into.
    CommitResolved {
        /// The engine.
        engine: &'a str,
        /// What was found.
        verdict: &'a Verdict,
    },
    /// A transaction was given a connection.
    ConnectionTaken {
        /// The engine.
        engine: &'a str,
        /// How long it waited.
        waited: Duration,
    },
    /// A transaction got no connection in time, or could not even wait for one.
    ConnectionDenied {
        /// The engine.
        engine: &'a str,
    },
    /// A connection was given back, or closed instead.
    ConnectionReturned {
        /// The engine.
        engine: &'a str,
        /// For how long it was in use, its reset included.
        used: Duration,
        /// Why it was closed.
        discarded: Option<Discard>,
    },
}

/// Why a connection is not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// The engine uses none twice, or not after what this one ran.
    Policy,
    /// It could not be proven clean.
    Unclean,
    /// It was lost, or in the middle of something.
    Lost,
}
