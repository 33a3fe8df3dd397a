//! What is told of a transaction as it goes: its span, the spans of what PostgreSQL does for it, and what becomes metrics.
//!
//! A call's span is the parent of what it has done; the transaction's has the pauses between calls. Invariant: without a
//! span of the call's there is none of ours, and nothing is spent on any.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::field::Empty;
use tracing::{Span, info, info_span};

use super::engine::{SavepointAction, StatementError, Work};
use super::observer::{Discard, Event, Observer, TRACE, TracePlace};
use super::session::Session;
use super::statement::Statement;
use super::transaction::Verdict;
use crate::names::attribute;

/// The shortest pause that a transaction's span tells of.
const PAUSE_MIN: Duration = Duration::from_millis(1);

/// The most of a statement's text that a span holds: many spans may wait for a collector.
const TEXT_BYTES_MAX: usize = 4096;

/// A transaction's record, from when its connection was asked for.
pub(super) struct Record {
    session: Arc<Session>,
    span: Span,
    began: Instant,
    idle: Duration,
    /// When it had its connection no more.
    over: Option<Instant>,
}

/// Something that PostgreSQL is doing.
pub(super) struct Operation {
    name: &'static str,
    span: Span,
    began: Instant,
}

/// Begins a span, or ends it: it lasts until it is last left.
fn touch(span: &Span) {
    span.in_scope(|| ());
}

impl Operation {
    /// Where it stands in its trace.
    pub(super) fn place(&self, observer: &dyn Observer) -> Option<TracePlace> {
        if self.span.is_disabled() { None } else { self.span.in_scope(|| observer.here()) }
    }
}

impl Record {
    /// Of a transaction that begins, with the call of that span.
    pub(super) fn begin(session: Arc<Session>, call: &Span) -> Self {
        let span = if call.is_disabled() {
            Span::none()
        } else {
            info_span!(
                target: TRACE, parent: call, "transaction", { attribute::ENGINE } = session.engine().name(),
                { attribute::SESSION_ID } = %session.id(), { attribute::OUTCOME } = Empty, { attribute::IDLE_RATIO } = Empty
            )
        };
        session.link(&span);
        // From here on what happens in it is bounded, and nothing is kept of one that is not to be.
        touch(&span);
        Self { session, span, began: Instant::now(), idle: Duration::ZERO, over: None }
    }

    fn tell(&self, event: Event<'_>) {
        self.session.observer().observe(event);
    }

    /// It has its connection, and begins.
    pub(super) fn connected(&mut self) {
        let waited = self.began.elapsed();
        self.tell(Event::ConnectionTaken { engine: self.session.engine().name(), waited });
        self.began = Instant::now();
    }

    /// It has done nothing since then.
    pub(super) fn paused(&mut self, since: Instant) {
        let pause = since.elapsed();
        self.idle += pause;
        if pause >= PAUSE_MIN {
            let pause = pause.as_secs_f64();
            info!(target: TRACE, parent: &self.span, message = "idle in transaction", { attribute::PAUSE } = pause);
        }
    }

    /// PostgreSQL begins to do a call's work.
    pub(super) fn working(&self, call: &Span, work: &Work) -> Operation {
        match work {
            Work::Statements(statements, _) => match &**statements {
                [statement] => self.running(call, statement.operation(), Some(statement)),
                several => {
                    let operation = self.running(call, "BATCH", None);
                    operation.span.record(attribute::DB_BATCH_SIZE, several.len());
                    operation
                }
            },
            Work::Stream(stream, _) => self.running(call, stream.0.operation(), Some(&stream.0)),
            Work::CopyIn(..) | Work::CopyOut(..) => self.running(call, "COPY", None),
            Work::Savepoint(action, _) => {
                let name = match action {
                    SavepointAction::Create => "SAVEPOINT",
                    SavepointAction::Release => "RELEASE",
                    SavepointAction::RollBackTo => "ROLLBACK TO",
                };
                self.running(call, name, None)
            }
        }
    }

    /// PostgreSQL begins to commit for a call.
    pub(super) fn committing(&self, call: &Span) -> Operation {
        self.running(call, "COMMIT", None)
    }

    /// PostgreSQL begins to roll back: for a call, or because the session has ended.
    pub(super) fn rolling_back(&self, call: Option<&Span>) -> Operation {
        let operation = self.running(call.unwrap_or(&self.span), "ROLLBACK", None);
        if call.is_none() {
            self.session.link(&operation.span);
            if let Some(reason) = self.session.end_reason() {
                operation.span.record(attribute::END_REASON, reason.name());
            }
        }
        operation
    }

    fn running(&self, parent: &Span, name: &'static str, statement: Option<&Statement>) -> Operation {
        let began = Instant::now();
        if parent.is_disabled() {
            return Operation { name, span: Span::none(), began };
        }
        let engine = self.session.engine().info();
        let summary = statement.map_or_else(|| name.to_owned(), Statement::summary);
        let span = info_span!(
            target: TRACE, parent: parent, "operation", otel.name = %summary, otel.kind = "client",
            otel.status_code = Empty, { attribute::DB_SYSTEM } = "postgresql",
            { attribute::DB_NAMESPACE } = %engine.database, { attribute::DB_OPERATION } = name,
            { attribute::DB_SUMMARY } = %summary, { attribute::ENGINE } = %engine.name, { attribute::DB_TEXT } = Empty,
            { attribute::DB_BATCH_SIZE } = Empty, { attribute::DB_STATUS } = Empty, { attribute::ERROR_TYPE } = Empty,
            { attribute::END_REASON } = Empty
        );
        if let Some(statement) = statement
            && self.session.observer().shows_sql()
        {
            let sql = statement.sql();
            span.record(attribute::DB_TEXT, &sql[..sql.floor_char_boundary(TEXT_BYTES_MAX)]);
        }
        Operation { name, span, began }
    }

    /// PostgreSQL has done it, or failed to.
    pub(super) fn worked(&self, operation: Operation, failed: Option<&StatementError>) {
        self.done(operation, failed.map(error_type));
    }

    /// The same, for what fails with an SQLSTATE or a word.
    pub(super) fn done(&self, operation: Operation, error: Option<&str>) {
        let Operation { name, span, began } = operation;
        touch(&span);
        if let Some(error) = error {
            span.record("otel.status_code", "ERROR");
            span.record(attribute::ERROR_TYPE, error);
            if error.len() == SQLSTATE_LENGTH {
                span.record(attribute::DB_STATUS, error);
            }
        }
        self.tell(Event::Operation { engine: self.session.engine().name(), name, took: began.elapsed(), error });
    }

    /// A statement was stopped, since when that was asked.
    pub(super) fn cancelled(&self, since: Instant) {
        self.tell(Event::Cancelled { engine: self.session.engine().name(), took: since.elapsed() });
    }

    /// What became of a commit whose answer was lost.
    pub(super) fn resolved(&self, verdict: &Verdict) {
        self.tell(Event::CommitResolved { engine: self.session.engine().name(), verdict });
    }

    /// The transaction is over, if it has begun.
    pub(super) fn ended(&self, verdict: Option<&Verdict>) {
        let Some(verdict) = verdict else { return };
        let lasted = self.over.unwrap_or_else(Instant::now) - self.began;
        let idle_ratio = if lasted.is_zero() { 0.0 } else { self.idle.div_duration_f64(lasted).min(1.0) };
        self.span.record(attribute::OUTCOME, verdict.name());
        self.span.record(attribute::IDLE_RATIO, idle_ratio);
        touch(&self.span);
        self.tell(Event::TransactionEnded { engine: self.session.engine().name(), verdict, lasted, idle_ratio });
    }

    /// Its connection is back, or gone.
    pub(super) fn returned(&mut self, discarded: Option<Discard>) {
        let over = *self.over.insert(Instant::now());
        let used = over - self.began;
        self.tell(Event::ConnectionReturned { engine: self.session.engine().name(), used, discarded });
    }
}

/// The length of an SQLSTATE; no word below has it.
const SQLSTATE_LENGTH: usize = 5;

/// What kind of failure it is.
fn error_type(error: &StatementError) -> &str {
    match error {
        StatementError::Failed(error) | StatementError::StalePlan(error) => &error.sqlstate,
        StatementError::Refused(_) => "refused",
        StatementError::GivenUp(_) => "given_up",
        StatementError::LostBeforeBegin(_) | StatementError::Lost(_) => "connection_lost",
    }
}
