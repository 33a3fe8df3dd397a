//! Everything that can go wrong, as one enum split by who must act on it.
//!
//! Knows no gRPC codes: `grpc/status` alone picks them. Invariant: no variant holds a secret or a parameter's value.

use std::time::Duration;

use super::session::SessionState;
use super::transaction::Verdict;
use crate::random::random;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The request is wrong: the caller must change it. Nothing ran.
    #[error("{field}: {problem}")]
    Invalid {
        /// The request's field, "parameters[0].value".
        field: String,
        /// What is wrong with it, and what to do instead.
        problem: String,
    },
    /// The caller does not say who it is, or not so that it can be believed.
    #[error("{0}")]
    Unauthenticated(String),
    /// The caller may not do that.
    #[error("{0}")]
    Forbidden(String),
    /// The token names no session, or another principal's.
    #[error("no such session: begin one with BeginSession")]
    SessionUnknown,
    /// The session is over; nothing ran.
    #[error("session ended: {0}")]
    SessionEnded(EndReason),
    /// The broker takes no new sessions.
    #[error("the broker is draining: begin the session on another replica")]
    Draining,
    /// A limit was met.
    #[error("{0}")]
    Exhausted(Exhausted),
    /// No connection to PostgreSQL; nothing ran.
    #[error("engine {engine} is unreachable: {cause}")]
    Unreachable {
        /// The engine's name.
        engine: String,
        /// What opening or using the connection said.
        cause: String,
    },
    /// PostgreSQL refused the statement or the connection.
    #[error("{0}")]
    Database(Box<PgError>),
    /// The tables under a prepared statement have changed in mid-transaction; a fresh transaction prepares it anew.
    #[error("{0}")]
    StalePlan(Box<PgError>),
    /// A time limit stopped the statement; PostgreSQL has confirmed that it stopped.
    #[error("statement stopped after {}: {bound} ran out", humantime::format_duration(*.after))]
    DeadlineExceeded {
        /// The limit that won.
        bound: Bound,
        /// How long the statement was allowed.
        after: Duration,
    },
    /// Cancel was called.
    #[error("cancelled: the statement was stopped by a call of Cancel")]
    Cancelled,
    /// Cancel was called, and there is no statement to stop.
    #[error("no statement runs in this session")]
    NothingToCancel,
    /// Cancel was called, and PostgreSQL could not be asked.
    #[error("the statement runs on, within its time limits: PostgreSQL could not be asked to stop it: {0}")]
    CancelUndelivered(String),
    /// A stream was to keep the session, and another does.
    #[error("another stream of this session is open")]
    AlreadyAttached,
    /// A call was sent behind one that failed, perhaps without knowing.
    #[error("nothing was done, as a call before has failed: roll back, or say resume")]
    PipelineAborted,
    /// The caller went away before its call was through.
    #[error("the caller left before the call was through: its statement was stopped")]
    CallerLeft,
    /// A numbered call came out of turn.
    #[error("seq {given} skips a number: the session's next call is {expected}")]
    SeqGap {
        /// The number it had.
        given: u64,
        /// The number it should have had.
        expected: u64,
    },
    /// A numbered call was repeated, and its answer is not kept.
    #[error("the answer to call {0} is not kept: it ran, and is not the last, or its answer was too large")]
    SeqAnswerGone(u64),
    /// A statement's row count is not what was expected of it.
    #[error("the statement counted {count} rows where {expected} were expected: the transaction was rolled back")]
    ExpectationFailed {
        /// What it counted.
        count: u64,
        /// What was expected, "exactly 1".
        expected: String,
    },
    /// The statement ran, but its result holds what this broker cannot carry.
    #[error("the statement ran, but its result cannot be returned: {0}")]
    Unreturnable(String),
    /// COMMIT of a failed transaction: PostgreSQL rolled it back.
    #[error("nothing was committed: a statement had failed, so PostgreSQL rolled the transaction back")]
    CommitRolledBack,
    /// The answer to COMMIT was lost.
    #[error("the commit's outcome is unknown: the connection was lost before PostgreSQL answered; call ResolveCommit")]
    CommitUnknown,
    /// Who the caller is cannot be found out now, whatever it shows.
    #[error("{0}")]
    IdentityUnavailable(String),
    /// A defect of ours. The log has what is known of it, under this name.
    #[error("internal error: the operator finds it in the log as trace_id {trace_id}")]
    Internal {
        /// 128 random bits.
        trace_id: String,
    },
}

impl Error {
    /// A defect of ours, which is logged.
    pub fn internal(what: &str) -> Self {
        let trace_id = format!("{:032x}", u128::from_be_bytes(random()));
        tracing::error!(trace_id, "{what}");
        Self::Internal { trace_id }
    }

    /// A request's field is wrong.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }
}

/// A limit that was met, and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Exhausted {
    /// The broker's sessions.
    #[error("the broker holds its maximum of {0} sessions")]
    Sessions(usize),
    /// The broker's calls.
    #[error("the broker has its maximum of {0} calls at work")]
    Calls(usize),
    /// What is on its way to the broker, in mebibytes.
    #[error("the broker receives its maximum of {0} MiB of requests at a time")]
    Requests(usize),
    /// The caller's sessions.
    #[error("the principal has its maximum of {0} sessions")]
    PrincipalSessions(usize),
    /// The caller's transactions.
    #[error("the principal has its maximum of {0} open transactions")]
    PrincipalTransactions(usize),
    /// The caller's calls.
    #[error("the principal has its maximum of {0} calls at work")]
    PrincipalCalls(usize),
    /// The caller's listeners.
    #[error("the principal has its maximum of {0} listeners")]
    PrincipalListeners(usize),
    /// The rate of the caller's calls.
    #[error("the principal calls more often than its {0} times a second")]
    PrincipalCallRate(u32),
    /// Calls waiting on one session.
    #[error("the session has its maximum of {0} calls waiting")]
    SessionQueue(u32),
    /// The wait for a connection.
    #[error("no connection came free within {}", humantime::format_duration(*.0))]
    PoolWait(Duration),
    /// Callers waiting for a connection.
    #[error("{0} callers wait for a connection already")]
    PoolQueue(usize),
    /// Combinations of connection options in use.
    #[error("{0} combinations of connection options are in use already")]
    SubPools(usize),
    /// An engine's listeners.
    #[error("the engine has its maximum of {0} listeners")]
    Listeners(usize),
    /// A result's rows.
    #[error("the result has more than {0} rows: narrow it, for example with LIMIT")]
    ResultRows(u64),
    /// A result's size.
    #[error("the result is larger than {0} bytes: narrow it, for example with LIMIT")]
    ResultBytes(usize),
    /// One value's size.
    #[error("the result has a value of more than {0} bytes: ask for a part of it, for example with substring()")]
    ValueBytes(usize),
}

/// Which time limit bounds a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The call's gRPC deadline.
    GrpcDeadline,
    /// `ExecuteRequest.timeout`.
    Request,
    /// That of the statement's class.
    Class,
    /// The session's own, asked for by its options.
    StatementTimeout,
    /// The profile's.
    Profile,
    /// What the transaction had left.
    TransactionTimeout,
}

impl Bound {
    /// The stable name callers see.
    pub fn name(self) -> &'static str {
        match self {
            Self::GrpcDeadline => "grpc_deadline",
            Self::Request => "timeout",
            Self::Class => "class",
            Self::StatementTimeout => "statement_timeout",
            Self::Profile => "profile",
            Self::TransactionTimeout => "transaction_timeout",
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// Close was called.
    #[error("closed")]
    Closed,
    /// No call came within the lease.
    #[error("lease expired")]
    LeaseExpired,
    /// It reached its maximum age.
    #[error("maximum age reached")]
    MaxAge,
    /// It was kept for its idle limit, and not used.
    #[error("kept for its idle limit and not used")]
    IdleTimeout,
    /// Its transaction stayed open too long.
    #[error("transaction deadline passed")]
    TransactionDeadline,
    /// Its stream went away, and nobody came back.
    #[error("disconnected")]
    Disconnected,
    /// An operator ended it.
    #[error("terminated by an operator")]
    Terminated,
    /// The broker stopped.
    #[error("drained")]
    Drained,
    /// The connection to PostgreSQL was lost in mid-transaction.
    #[error("backend lost")]
    BackendLost,
}

impl EndReason {
    /// Its name in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "CLOSED",
            Self::LeaseExpired => "LEASE_EXPIRED",
            Self::MaxAge => "MAX_AGE",
            Self::IdleTimeout => "IDLE_TIMEOUT",
            Self::TransactionDeadline => "TRANSACTION_DEADLINE",
            Self::Disconnected => "DISCONNECTED",
            Self::Terminated => "TERMINATED",
            Self::Drained => "DRAINED",
            Self::BackendLost => "BACKEND_LOST",
        }
    }

    /// Whether the broker ended the session of its own accord.
    pub(super) fn is_reaping(self) -> bool {
        match self {
            Self::LeaseExpired
            | Self::MaxAge
            | Self::IdleTimeout
            | Self::TransactionDeadline
            | Self::Disconnected
            | Self::Drained => true,
            Self::Closed | Self::Terminated | Self::BackendLost => false,
        }
    }
}

/// An error or a notice, with every field PostgreSQL sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
#[error("{message} (SQLSTATE {sqlstate})")]
#[allow(missing_docs, reason = "the names are those of PostgreSQL's protocol documentation")]
pub struct PgError {
    pub severity: String,
    pub sqlstate: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    pub position: Option<u32>,
    pub internal_position: Option<u32>,
    pub internal_query: Option<String>,
    pub where_: Option<String>,
    pub schema: Option<String>,
    pub table: Option<String>,
    pub column: Option<String>,
    pub datatype: Option<String>,
    pub constraint: Option<String>,
    pub file: Option<String>,
    pub line: Option<u32>,
    pub routine: Option<String>,
}

impl PgError {
    /// The longest text of one field, and of all together: errors travel in headers, which gRPC clients limit to 8 KiB
    /// or so, and nobody reads more.
    const FIELD_BYTES_MAX: usize = 1024;
    const BYTES_MAX: usize = 3 * 1024;

    /// The same with its texts cut to their limits, what helps most kept longest.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        let mut left = Self::BYTES_MAX;
        let always = [&mut self.sqlstate, &mut self.severity, &mut self.message];
        let sometimes = [
            &mut self.constraint,
            &mut self.schema,
            &mut self.table,
            &mut self.column,
            &mut self.datatype,
            &mut self.detail,
            &mut self.hint,
            &mut self.where_,
            &mut self.internal_query,
            &mut self.routine,
            &mut self.file,
        ];
        for text in always.into_iter().chain(sometimes.into_iter().filter_map(Option::as_mut)) {
            text.truncate(text.floor_char_boundary(left.min(Self::FIELD_BYTES_MAX)));
            text.shrink_to_fit();
            left -= text.len();
        }
        self
    }

    /// How long all its texts are together.
    pub(super) fn text_bytes(&self) -> usize {
        let Self { severity, sqlstate, message, detail, hint, where_, internal_query, .. } = self;
        let always = severity.len() + sqlstate.len() + message.len();
        // The others are names.
        always + [detail, hint, where_, internal_query].into_iter().flatten().map(String::len).sum::<usize>()
    }
}

/// A failed call on a session: the error, and where it left the session.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// Why.
    pub error: Error,
    /// Where the session stands; `None` when there is none any more.
    pub state: Option<SessionState>,
    /// What became of the transaction, when the call tried to end it.
    pub verdict: Option<Verdict>,
    /// Which of the call's statements is to blame, from 0.
    pub index: Option<usize>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, state: None, verdict: None, index: None }
    }
}

impl From<EndReason> for Error {
    fn from(reason: EndReason) -> Self {
        Self::SessionEnded(reason)
    }
}
