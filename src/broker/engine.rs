//! The port to PostgreSQL: what the domain needs of an engine and of a connection, and what it may rely on.
//!
//! Names no driver. Invariant: a dropped [`Connection`] is discarded; only [`Connection::release`] gives it back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::bulk::{CopyOptions, Source, Supply, Table};
use super::commit::{Cluster, ClusterXid, Resolution};
use super::connect::ConnectOverrides;
use super::error::{Error, Exhausted, PgError};
use super::notification::{ChannelName, ListenEvent};
use super::observer::{Discard, TracePlace};
use super::principal::Principal;
use super::statement::{ResultFormat, ResultLimits, ResultSet, Statement};
use super::stream::Sink;

/// A configured PostgreSQL target with its pool.
#[async_trait]
pub trait Engine: Debug + Send + Sync {
    /// The engine's configured name.
    fn name(&self) -> &str;

    /// What is behind the engine.
    fn info(&self) -> EngineInfo;

    /// Where idempotency keys are kept, if there is a table for them.
    fn idempotency_table(&self) -> Option<&IdempotencyTable>;

    /// Says what is wrong with options that a caller asks for.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    fn check(&self, overrides: &ConnectOverrides) -> Result<(), Error>;

    /// Takes a connection with these options out of the pool, opening one if need be. Bounded by the engine's own
    /// timeouts.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the pool whole.
    async fn checkout(
        &self,
        principal: &Principal,
        overrides: &Arc<ConnectOverrides>,
    ) -> Result<Box<dyn Connection>, CheckoutError>;

    /// Asks PostgreSQL what became of a transaction, on a connection out of the pool. `orphan` is the backend of a
    /// connection that is known to be lost: should it still wait there for the transaction's next statement, it is ended.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the pool whole.
    async fn resolve(
        &self,
        principal: &Principal,
        transaction: &ClusterXid,
        orphan: Option<i32>,
    ) -> Result<Resolution, CheckoutError>;

    /// Who holds what a backend on that host waits for, in the order of their process ids; nobody when it waits for no
    /// lock. Asked apart from the pool, which may be waiting as a whole.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    async fn blockers(&self, host: &str, backend_pid: i32) -> Result<Vec<Blocker>, CheckoutError>;

    /// Listens to these channels, apart from the pool. Returns when PostgreSQL has confirmed it. Bounded by the engine's
    /// own timeouts.
    ///
    /// # Cancel safety
    /// Dropping the future leaves no listener behind.
    async fn listen(&self, channels: BTreeSet<ChannelName>) -> Result<Box<dyn Notifications>, CheckoutError>;

    /// Proves that PostgreSQL answers, apart from the pool.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the pool whole.
    async fn probe(&self) -> Result<(), CheckoutError>;
}

/// What keeps idempotency keys in the database.
#[derive(Debug, Clone)]
pub struct IdempotencyTable {
    /// Given principal, key and fingerprint, counts one row when the key was free.
    pub claim: Statement,
    /// Given principal and key, returns fingerprint, answer, and xid8 as text.
    pub read: Statement,
    /// Given principal, key and answer, keeps the answer.
    pub keep: Statement,
}

/// What [`Engine::info`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineInfo {
    /// The engine's configured name.
    pub name: String,
    /// The database.
    pub database: String,
    /// The user.
    pub user: String,
    /// PostgreSQL's version; empty before the first connection.
    pub server_version: String,
    /// The pool as it is now.
    pub pool: PoolStatistics,
}

/// An engine's connections, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStatistics {
    /// Those kept open.
    pub size: usize,
    /// Those that may be opened beyond.
    pub overflow_max: usize,
    /// Open now.
    pub open: usize,
    /// Used by transactions now, or being opened for them.
    pub in_use: usize,
    /// Open and unused now.
    pub idle: usize,
    /// Callers that wait for one now.
    pub waiting: usize,
    /// Combinations of connection options.
    pub sub_pools: usize,
    /// Opened since the start.
    pub opened: u64,
    /// Attempts to open one that failed, since the start.
    pub login_failures: u64,
}

/// A backend that stands in a statement's way. What PostgreSQL does not show to the engine's user is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// Its process id; 0 for a prepared transaction.
    pub pid: i32,
    /// Its user.
    pub user: String,
    /// Its application_name.
    pub application_name: String,
    /// What it does, in PostgreSQL's words.
    pub state: String,
}

/// Why there is no connection. Nothing ran.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CheckoutError {
    /// All connections stayed in use for this long.
    #[error("no connection came free within {}", humantime::format_duration(*.0))]
    Wait(Duration),
    /// As many callers as may already wait for one.
    #[error("{0} callers wait for a connection already")]
    Queue(usize),
    /// As many combinations of options as may be are in use.
    #[error("{0} combinations of connection options are in use already")]
    SubPools(usize),
    /// As many listeners as there may be are there.
    #[error("the engine has its maximum of {0} listeners")]
    Listeners(usize),
    /// The server could not be reached, or broke off.
    #[error("{0}")]
    Unreachable(String),
    /// The server refused the login.
    #[error("{0}")]
    Refused(Box<PgError>),
}

impl CheckoutError {
    pub(super) fn into_error(self, engine: &str) -> Error {
        match self {
            Self::Wait(waited) => Error::Exhausted(Exhausted::PoolWait(waited)),
            Self::Queue(waiters) => Error::Exhausted(Exhausted::PoolQueue(waiters)),
            Self::SubPools(sub_pools) => Error::Exhausted(Exhausted::SubPools(sub_pools)),
            Self::Listeners(listeners) => Error::Exhausted(Exhausted::Listeners(listeners)),
            Self::Unreachable(cause) => Error::Unreachable { engine: engine.to_owned(), cause },
            Self::Refused(error) => Error::Database(error),
        }
    }
}

/// One PostgreSQL backend, owned by one transaction task.
#[async_trait]
pub trait Connection: Send {
    /// Where the server is.
    fn host(&self) -> Arc<str>;

    /// The backend's process id.
    fn backend_pid(&self) -> i32;

    /// A way to stop the running statement from outside.
    fn canceller(&self) -> Arc<dyn Canceller>;

    /// What PostgreSQL last said of the transaction.
    fn status(&self) -> TransactionStatus;

    /// Which cluster the server belongs to, if it has told.
    fn cluster(&self) -> Option<Cluster>;

    /// The transaction's xid8, once it has one. Whether it has is known for certain when [`Self::execute`] has succeeded.
    fn xid(&self) -> Option<u64>;

    /// Does the work to its end, in a transaction begun in the same round trip when `begin` is given: one result for each
    /// statement. On return PostgreSQL is ready for more, unless the connection is lost. `place` is where the work stands
    /// in a trace, which PostgreSQL may be told.
    ///
    /// # Cancel safety
    /// None: a dropped future leaves the connection in the middle of an answer. Drop the connection too.
    async fn execute(
        &mut self,
        begin: Option<&TransactionOptions>,
        work: &Work,
        limits: ResultLimits,
        place: Option<TracePlace>,
    ) -> Result<Vec<ResultSet>, Stopped>;

    /// Commits and tells the truth about it.
    ///
    /// # Cancel safety
    /// None: never drop this future.
    async fn commit(&mut self) -> CommitVerdict;

    /// Rolls back; on success PostgreSQL is idle.
    ///
    /// # Cancel safety
    /// None: a dropped future leaves the connection in the middle of an answer. Drop the connection too.
    async fn rollback(&mut self) -> Result<(), Lost>;

    /// Resolves when the connection is gone.
    ///
    /// # Cancel safety
    /// Safe to drop and call again.
    async fn lost(&mut self) -> Lost;

    /// Gives the connection back: proven idle, cleaned of all session state, both within a bound; closes it otherwise, and
    /// says why.
    ///
    /// # Cancel safety
    /// Dropping the future discards the connection.
    async fn release(self: Box<Self>) -> Option<Discard>;
}

/// What a listener is told. Dropped, it listens no more.
#[async_trait]
pub trait Notifications: Send {
    /// Waits for the next event; the first is [`ListenEvent::Listening`].
    ///
    /// # Cancel safety
    /// Dropping the future loses no event.
    async fn next(&mut self) -> ListenEvent;
}

/// Stops a connection's running statement.
#[async_trait]
pub trait Canceller: Send + Sync {
    /// How many bytes of answers have come. While they come, the server is not stuck.
    fn bytes_received(&self) -> u64;

    /// Asks the server to cancel. Returns when the server has dealt with the request, so that it cannot hit a later
    /// statement, or with why it could not be asked.
    ///
    /// # Cancel safety
    /// None: after a dropped future the request may still arrive. Drop the connection too.
    async fn cancel(&self) -> Result<(), NotCancelled>;
}

/// Why a statement was not cancelled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotCancelled {
    /// The server could not be reached; no request is on its way.
    #[error("{0}")]
    Unsent(String),
    /// Nobody knows whether a request is on its way: the connection cannot be used again.
    #[error("{0}")]
    Lost(#[from] Lost),
}

/// The connection is gone, and how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Lost(pub String);

/// The status byte of PostgreSQL's ReadyForQuery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionStatus {
    /// No transaction.
    Idle,
    /// In a transaction.
    Open,
    /// In a transaction that failed.
    Failed,
}

/// What a call does in its transaction.
#[derive(Debug)]
pub enum Work {
    /// Runs statements, in order, until one fails.
    Statements(Arc<[Statement]>, ResultFormat),
    /// Runs a statement whose rows go into the sink as they come.
    Stream(Box<(Statement, ResultFormat)>, Sink),
    /// Copies a caller's data into a table.
    CopyIn(Box<(Table, CopyOptions)>, Supply),
    /// Copies data into the sink.
    CopyOut(Box<(Source, CopyOptions)>, Sink),
    /// Acts on a savepoint.
    Savepoint(SavepointAction, SavepointName),
}

impl Work {
    /// Cancelled, the work waits for its caller no more.
    pub(super) fn closing(&self) -> CancellationToken {
        match self {
            Self::Stream(_, sink) | Self::CopyOut(_, sink) => sink.closing(),
            Self::CopyIn(_, supply) => supply.closing(),
            Self::Statements(..) | Self::Savepoint(..) => CancellationToken::new(),
        }
    }
}

/// What is done to a savepoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavepointAction {
    /// SAVEPOINT.
    Create,
    /// RELEASE SAVEPOINT.
    Release,
    /// ROLLBACK TO SAVEPOINT.
    RollBackTo,
}

impl SavepointAction {
    /// What is wrong with a name that no savepoint has.
    pub(super) fn unknown(self) -> Error {
        let field = if self == Self::RollBackTo { "savepoint" } else { "name" };
        Error::invalid(field, "is no savepoint of this transaction: create it first")
    }
}

/// The longest name: PostgreSQL cuts longer ones short.
const NAME_BYTES_MAX: usize = 63;

/// Whether PostgreSQL keeps a name as it is, in quotes.
pub(super) fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains('\0')
}

/// Says what is wrong with a name that PostgreSQL would not keep as it is.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), Error> {
    if is_name(name) {
        Ok(())
    } else {
        Err(Error::invalid(field, format!("must be 1 to {NAME_BYTES_MAX} bytes without NUL")))
    }
}

/// A name that PostgreSQL keeps as it is: 1 to 63 bytes without NUL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavepointName(String);

impl SavepointName {
    /// # Errors
    /// [`Error::Invalid`] for that field.
    pub fn new(field: &str, name: String) -> Result<Self, Error> {
        check_name(field, &name)?;
        Ok(Self(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// How a transaction begins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TransactionOptions {
    /// `None`: PostgreSQL's default.
    pub isolation_level: Option<IsolationLevel>,
    /// READ ONLY or READ WRITE; `None`: PostgreSQL's default.
    pub read_only: Option<bool>,
    /// DEFERRABLE or NOT DEFERRABLE; `None`: PostgreSQL's default.
    pub deferrable: Option<bool>,
    /// SET LOCAL lock_timeout.
    pub lock_timeout: Option<Duration>,
    /// SET LOCAL ROLE.
    pub role: Option<String>,
    /// set_config(name, value, true).
    pub settings: BTreeMap<String, String>,
    /// PostgreSQL's own timeouts.
    pub nets: Nets,
}

/// PostgreSQL's own timeouts, the nets under the broker's clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Nets {
    /// statement_timeout.
    pub statement: Duration,
    /// idle_in_transaction_session_timeout, should the broker die.
    pub idle: Duration,
}

impl Nets {
    /// How much later than the broker's clocks they strike.
    const SLACK: Duration = Duration::from_secs(5);

    /// Those under these clocks.
    pub fn under(statement_timeout: Duration, transaction_timeout: Duration) -> Self {
        Self { statement: statement_timeout + Self::SLACK, idle: transaction_timeout + Self::SLACK }
    }
}

/// SQL's isolation levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are SQL's")]
pub enum IsolationLevel {
    ReadUncommitted,
    ReadCommitted,
    RepeatableRead,
    Serializable,
}

/// Why work stopped, and at which of its statements.
#[derive(Debug, Clone, PartialEq)]
pub struct Stopped {
    /// From 0.
    pub index: usize,
    /// Why.
    pub error: StatementError,
}

/// Why a statement has no result.
#[derive(Debug, Clone, PartialEq)]
pub enum StatementError {
    /// Found wrong before anything ran; [`Connection::status`] tells where that leaves the transaction.
    Refused(Error),
    /// PostgreSQL failed it.
    Failed(Box<PgError>),
    /// PostgreSQL failed it because the tables it was prepared for have changed: the transaction can be tried again.
    StalePlan(Box<PgError>),
    /// Given up after something had run, as when the result passed a limit; the transaction has been failed.
    GivenUp(Error),
    /// The connection went away before the transaction had begun.
    LostBeforeBegin(Lost),
    /// The connection went away in the transaction.
    Lost(Lost),
}

/// What COMMIT did.
#[derive(Debug, Clone, PartialEq)]
pub enum CommitVerdict {
    /// Committed. Also when the answer was lost, if the transaction had only read: nothing is lost with it.
    Committed,
    /// The transaction had failed; PostgreSQL rolled it back.
    RolledBack,
    /// The commit itself failed, as a deferred constraint makes it, and PostgreSQL rolled back.
    Failed(Box<PgError>),
    /// The connection went away before the answer.
    Lost(Lost),
}
