//! One backend, as the domain's port wants it.
//!
//! Invariants: every driver future is driven to its end, or the connection is discarded; the connection counts as ready
//! only when the wire says that PostgreSQL has answered everything; only a reset by proof gives it back to the pool.

use std::collections::VecDeque;
use std::fmt::Write;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use deadpool::managed::Object;
use futures_util::future::{FutureExt, MaybeDone, OptionFuture, maybe_done};
use futures_util::{StreamExt, join};
use lru::LruCache;
use tokio::time::timeout;
use tokio_postgres::{RowStream, SimpleQueryMessage, SimpleQueryRow, Statement as Prepared};
use tracing::debug;

use super::cancel::BackendCanceller;
use super::error::pg_error;
use super::opener::Backend;
use super::pool::{CheckedOut, Pool, ResetMode};
use super::value::{self, Raw, Refusal};
use crate::broker::commit::Cluster;
use crate::broker::engine::{
    Canceller, CommitVerdict, Connection, IsolationLevel, Lost, SavepointAction, SavepointName, StatementError,
    Stopped, TransactionOptions, TransactionStatus, Work,
};
use crate::broker::error::{Error, Exhausted, PgError};
use crate::broker::statement::{Column, Kind, NOTICES_MAX, ResultLimits, ResultSet, Statement};
use crate::broker::value::Value;

/// How long a reset may take; it does next to nothing, so longer means stuck.
const RESET_GRACE: Duration = Duration::from_secs(2);

/// What `DISCARD ALL` does, but for the driver's own prepared statements, which are kept with their plans; and a new
/// seed for random(). The last line counts the prepared statements: those that callers have left cannot be dropped
/// alone, and those of the driver that callers have dropped cannot be brought back, so either costs the connection.
///
/// It runs as the login role, so every name in it, operators and types included, is PostgreSQL's own: a caller may have
/// made its namesake in a schema on the path.
const RESET: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; DISCARD TEMP; \
    DISCARD SEQUENCES; SELECT pg_catalog.pg_advisory_unlock_all(), \
    pg_catalog.setseed(pg_catalog.hashtext(pg_catalog.gen_random_uuid()::pg_catalog.text)::pg_catalog.float8 \
        OPERATOR(pg_catalog./) 2147483648::pg_catalog.float8), \
    pg_catalog.count(*) FILTER (WHERE from_sql), pg_catalog.count(*) FILTER (WHERE NOT from_sql) \
    FROM pg_catalog.pg_prepared_statement()";

/// Sent right behind a statement while the transaction has no id that we know of: so it is known before COMMIT is sent.
const TRANSACTION_ID: &str = "SELECT pg_catalog.pg_current_xact_id_if_assigned()";

/// The most statements sent and not yet answered: enough to hide a round trip, few enough to buffer.
pub(super) const PIPELINE_MAX: usize = 64;

/// A backend checked out of the pool, for one transaction. Invariant: dropped, it is discarded.
pub(super) struct PooledConnection {
    checked_out: CheckedOut,
    pool: Arc<Pool>,
    canceller: Arc<BackendCanceller>,
    /// How many requests had been cancelled on the backend before.
    cancelled_before: u32,
    /// The transaction's id, once PostgreSQL has told it.
    xid: OnceLock<u64>,
    /// Whether COMMIT may do something, or fail, although the transaction has no id: send notifications, commit on a
    /// foreign server, fill a cursor WITH HOLD, find out that what was read cannot stand.
    may_act: AtomicBool,
    /// Whether its transaction has run something that may have left a trace: a strict reset does not trust it, and
    /// names may mean something else to it than to others, so it neither uses nor fills the statement cache.
    soiled: AtomicBool,
}

type DriverError = tokio_postgres::Error;

/// A request whose answer is to come.
type Asked<'a, T> = MaybeDone<Pin<Box<dyn Future<Output = Result<T, DriverError>> + Send + 'a>>>;

/// Sends a request without waiting for its answer.
async fn send<'a, T>(request: impl Future<Output = Result<T, DriverError>> + Send + 'a) -> Asked<'a, T> {
    let mut asked: Asked<'a, T> = maybe_done(Box::pin(request));
    // The driver sends when its future is first polled.
    poll_fn(|cx| Poll::Ready(asked.poll_unpin(cx).is_ready())).await;
    asked
}

/// The answer to a request.
async fn answer<T>(mut asked: Asked<'_, T>) -> Result<T, DriverError> {
    (&mut asked).await;
    Pin::new(&mut asked).take_output().expect("it is done, and taken once")
}

/// A statement that has been sent.
struct Sent<'a> {
    statement: &'a Statement,
    prepared: Prepared,
    was_cached: bool,
    rows: Asked<'a, RowStream>,
}

/// Statements sent and not yet answered, in order, and what the answered ones brought.
struct Pipeline<'a> {
    sent: VecDeque<Sent<'a>>,
    results: Vec<ResultSet>,
    budget: Budget,
}

/// Why statements stopped.
struct Halt {
    index: usize,
    error: StatementError,
    /// Whether the one to blame had been prepared in an earlier transaction.
    was_cached: bool,
}

impl PooledConnection {
    pub(super) fn new(checked_out: CheckedOut, pool: Arc<Pool>) -> Self {
        let Backend { client, wire, address, tls, .. } = checked_out.backend();
        let cancelled_before = wire.cancelled();
        let canceller = Arc::new(BackendCanceller::new(client.cancel_token(), address.clone(), tls.clone()));
        Self {
            checked_out,
            pool,
            canceller,
            cancelled_before,
            xid: OnceLock::new(),
            may_act: AtomicBool::new(false),
            soiled: AtomicBool::new(false),
        }
    }

    pub(super) fn backend(&self) -> &Backend {
        self.checked_out.backend()
    }

    /// Begins the transaction, if asked to, and prepares the statement, in one round trip; none for a statement that is
    /// prepared already and a transaction that has begun.
    async fn prepare(
        &self,
        begin: Option<&TransactionOptions>,
        statement: &Statement,
        cached: Option<Prepared>,
    ) -> Result<Prepared, StatementError> {
        let is_new = cached.is_none();
        // The types of a statement that is prepared already are part of what it is kept by.
        let types = if is_new { parameter_types(statement).map_err(StatementError::Refused)? } else { Vec::new() };
        let prepare = async {
            match cached {
                Some(prepared) => Ok(prepared),
                None => self.backend().client.prepare_typed(statement.sql(), &types).await,
            }
        };
        let prepared = match begin {
            None => match prepare.await {
                Ok(prepared) => prepared,
                Err(error) => return Err(self.failure(&error).await),
            },
            Some(options) => self.begin(options, prepare).await?,
        };
        // The driver looks unknown types up with statements of its own.
        self.backend().wire.forget_tags();
        if is_new {
            self.cache(statement, &prepared);
        }
        Ok(prepared)
    }

    /// Begins the transaction and has PostgreSQL do something harmless in the same round trip.
    async fn begin<T>(
        &self,
        options: &TransactionOptions,
        first: impl Future<Output = Result<T, DriverError>>,
    ) -> Result<T, StatementError> {
        let Backend { client, wire, nets, .. } = self.backend();
        let sql = begin_sql(options, nets);
        let (begun, first) = join!(client.batch_execute(&sql), first);
        let status = wire.settled().await.map_err(StatementError::LostBeforeBegin)?;
        if options.isolation_level == Some(IsolationLevel::Serializable) {
            self.may_act.store(true, Ordering::Relaxed);
        }
        match (begun, first) {
            (Ok(()), Ok(first)) => Ok(first),
            (Ok(()), Err(error)) => Err(self.failure(&error).await),
            (Err(error), _) => Err(match error.as_db_error() {
                // The role or a setting: nothing of the caller's ran, and the transaction goes.
                Some(refusal) => StatementError::Refused(Error::Database(Box::new(pg_error(refusal)))),
                None if status == TransactionStatus::Idle => StatementError::LostBeforeBegin(Lost(error.to_string())),
                None => StatementError::Lost(Lost(error.to_string())),
            }),
        }
    }

    fn cached(&self, statement: &Statement) -> Option<Prepared> {
        if self.is_soiled() {
            return None;
        }
        self.statements().get(&cache_key(statement)).cloned()
    }

    fn cache(&self, statement: &Statement, prepared: &Prepared) {
        if self.pool.options().statement_cache_size > 0 && !self.is_soiled() {
            self.statements().put(cache_key(statement), prepared.clone());
        }
    }

    fn is_soiled(&self) -> bool {
        self.soiled.load(Ordering::Relaxed)
    }

    /// Forgets a prepared statement that PostgreSQL does not run any more.
    fn forget(&self, statement: &Statement) {
        self.statements().pop(&cache_key(statement));
    }

    fn statements(&self) -> MutexGuard<'_, LruCache<StatementKey, Prepared>> {
        // Nothing panics while it is held, so a poisoned lock holds a sound cache.
        self.backend().statements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs statements in order, sending each before the one before is answered where that is safe. With `Fresh::Yes`
    /// none is taken from the cache.
    async fn run(
        &self,
        mut begin: Option<&TransactionOptions>,
        statements: &[Statement],
        limits: ResultLimits,
        fresh: Fresh,
    ) -> Result<Vec<ResultSet>, Halt> {
        let Backend { client, wire, .. } = self.backend();
        let mut pipeline = Pipeline {
            sent: VecDeque::new(),
            results: Vec::with_capacity(statements.len()),
            budget: Budget { rows: limits.rows_max, bytes: limits.bytes_max, notices: NOTICES_MAX, limits },
        };
        let mut last: Option<(&Statement, Prepared, bool)> = None;
        wire.forget_tags();
        for (index, statement) in statements.iter().enumerate() {
            let cached = || if fresh == Fresh::Yes { None } else { self.cached(statement) };
            let (ready, was_cached) = match &last {
                Some((before, prepared, was_cached)) if before.prepares_like(statement) => {
                    (Some(prepared.clone()), *was_cached)
                }
                _ => cached().map_or((None, false), |prepared| (Some(prepared), true)),
            };
            let prepared = match ready {
                Some(prepared) if begin.is_none() => prepared,
                ready => {
                    // To be prepared, a statement may need the tables that those before it make.
                    self.land(&mut pipeline, 0).await?;
                    match self.prepare(begin.take(), statement, ready).await {
                        Ok(prepared) => prepared,
                        Err(error) => return Err(self.halt(pipeline, index, error, was_cached).await),
                    }
                }
            };
            let checked = value::encode(statement.parameters(), prepared.params())
                .and_then(|parameters| check_columns(&prepared).map(|()| parameters));
            let parameters = match checked {
                Ok(parameters) => parameters,
                Err(error) => {
                    return Err(self.halt(pipeline, index, StatementError::Refused(error), was_cached).await);
                }
            };
            if statement.kind() != Kind::Query || statement.may_notify() {
                self.may_act.store(true, Ordering::Relaxed);
            }
            let run = prepared.clone();
            let rows = send(async move { client.query_raw(&run, parameters).await }).await;
            let is_last = index + 1 == statements.len();
            // What changes the meaning of names must be through before the next statement is looked up.
            let unanswered = if may_soil(statement, &prepared) && !is_last { 0 } else { PIPELINE_MAX };
            pipeline.sent.push_back(Sent { statement, prepared: prepared.clone(), was_cached, rows });
            last = Some((statement, prepared, was_cached));
            self.land(&mut pipeline, unanswered).await?;
        }
        let ask = self.xid.get().is_none();
        let asked = OptionFuture::from(ask.then(|| client.simple_query(TRANSACTION_ID)));
        let (transaction_id, landed) = join!(asked, self.land(&mut pipeline, 0));
        landed?;
        let stopped = |error| Halt { index: statements.len() - 1, error, was_cached: false };
        match transaction_id {
            None => {}
            Some(Ok(answers)) => {
                if let Some(xid) = first_row(&answers).and_then(|row| row.get(0)?.parse().ok()) {
                    self.xid.get_or_init(|| xid);
                }
            }
            // A cancel that came too late for the statement.
            Some(Err(error)) => return Err(stopped(self.failure(&error).await)),
        }
        match wire.settled().await {
            Ok(_) => Ok(pipeline.results),
            Err(lost) => Err(stopped(StatementError::Lost(lost))),
        }
    }

    /// Reads answers until no more than `unanswered` are to come.
    async fn land(&self, pipeline: &mut Pipeline<'_>, unanswered: usize) -> Result<(), Halt> {
        while pipeline.sent.len() > unanswered
            && let Some(sent) = pipeline.sent.pop_front()
        {
            let (index, was_cached) = (pipeline.results.len(), sent.was_cached);
            if index > 0 {
                pipeline.budget.add_result(&sent.prepared);
            }
            let unread = match self.read(sent, &mut pipeline.budget).await {
                Ok(result) => {
                    pipeline.results.push(result);
                    continue;
                }
                Err(unread) => unread,
            };
            let rest = std::mem::take(&mut pipeline.sent);
            let error = match unread {
                Unread::Failed(error) => {
                    // In a failed transaction PostgreSQL refuses them all.
                    drain(None, rest).await;
                    self.failure(&error).await
                }
                Unread::GivenUp(rows, error) => self.abandon(rows, rest, error).await,
            };
            return Err(Halt { index, error, was_cached });
        }
        Ok(())
    }

    /// Reads one statement's result, and checks what is expected of it.
    async fn read(&self, sent: Sent<'_>, budget: &mut Budget) -> Result<ResultSet, Unread> {
        let wire = &self.backend().wire;
        let Sent { statement, prepared, rows: asked, .. } = sent;
        // Returning drops the stream: unread, it would keep the driver from reading on.
        let mut stream = Box::pin(answer(asked).await.map_err(Unread::Failed)?);
        let before = budget.bytes;
        let mut rows = Vec::new();
        while let Some(row) = stream.next().await {
            match budget.read(&row.map_err(Unread::Failed)?) {
                Ok(values) => rows.push(values),
                Err(error) => return Err(Unread::GivenUp(Some(stream), error)),
            }
        }
        let columns: Vec<_> = prepared.columns().iter().map(column).collect();
        let returned = u64::try_from(rows.len()).unwrap_or(u64::MAX);
        let mut notices = wire.take_notices();
        notices.truncate(budget.notices);
        budget.notices -= notices.len();
        let result = ResultSet {
            row_count: if columns.is_empty() { stream.rows_affected().unwrap_or(0) } else { returned },
            columns,
            rows,
            command_tag: wire.next_tag().unwrap_or_default(),
            notices,
            bytes: before - budget.bytes,
        };
        if !leaves_no_trace(statement, &result) {
            self.soiled.store(true, Ordering::Relaxed);
        }
        match statement.check(&result) {
            Ok(()) => Ok(result),
            Err(error) => Err(Unread::GivenUp(None, error)),
        }
    }

    /// Stops at a statement that has not been sent. If others have run before it, they are the first to be blamed, and
    /// otherwise the transaction is failed: half of what was asked must not commit.
    async fn halt(&self, mut pipeline: Pipeline<'_>, index: usize, error: StatementError, was_cached: bool) -> Halt {
        if let Err(halt) = self.land(&mut pipeline, 0).await {
            return halt;
        }
        let error = match error {
            StatementError::Refused(error) if index > 0 => self.abandon(None, VecDeque::new(), error).await,
            error => error,
        };
        Halt { index, error, was_cached }
    }

    /// Stops what runs and reads what is under way: unread rows would block everything behind them, ROLLBACK included.
    /// Leaves the transaction failed, also when all was through before it could be stopped: its caller has not seen what
    /// it did.
    async fn abandon(&self, rows: Option<Pin<Box<RowStream>>>, rest: VecDeque<Sent<'_>>, why: Error) -> StatementError {
        let Backend { client, wire, .. } = self.backend();
        if rows.is_some() || !rest.is_empty() {
            let (cancelled, ()) = join!(self.canceller.cancel(), drain(rows, rest));
            if let Err(lost) = cancelled {
                return StatementError::Lost(lost);
            }
        }
        if let Ok(TransactionStatus::Open) = wire.settled().await {
            // Any error fails the transaction. This one says in PostgreSQL's log what it is about.
            let _ = client.batch_execute("\"the result could not be returned\"").await;
        }
        match wire.settled().await {
            Ok(TransactionStatus::Failed) => StatementError::GivenUp(why),
            Ok(status) => StatementError::Lost(Lost(format!("a transaction to be failed is {status:?}"))),
            Err(lost) => StatementError::Lost(lost),
        }
    }

    /// Acts on a savepoint, beginning the transaction if asked to.
    async fn savepoint(
        &self,
        begin: Option<&TransactionOptions>,
        action: SavepointAction,
        name: &SavepointName,
    ) -> Result<(), StatementError> {
        let client = &self.backend().client;
        let command = match action {
            SavepointAction::Create => "SAVEPOINT",
            SavepointAction::Release => "RELEASE SAVEPOINT",
            SavepointAction::RollBackTo => "ROLLBACK TO SAVEPOINT",
        };
        let sql = format!("{command} {}", quoted_identifier(name.as_str()));
        match begin {
            Some(options) => self.begin(options, client.batch_execute(&sql)).await,
            None => match client.batch_execute(&sql).await {
                Ok(()) => self.backend().wire.settled().await.map(drop).map_err(StatementError::Lost),
                Err(error) => Err(self.failure(&error).await),
            },
        }
    }

    /// What a driver's error means, once PostgreSQL is ready again.
    async fn failure(&self, error: &tokio_postgres::Error) -> StatementError {
        match (self.backend().wire.settled().await, error.as_db_error()) {
            (Err(lost), _) => StatementError::Lost(lost),
            (Ok(_), Some(refusal)) => StatementError::Failed(Box::new(pg_error(refusal))),
            // The driver did not understand the server: there is no telling what state they are in.
            (Ok(_), None) => StatementError::Lost(Lost(error.to_string())),
        }
    }

    /// Runs statements; should one turn out to be prepared for what is no longer, prepares it anew where that is safe.
    async fn run_or_prepare_afresh(
        &mut self,
        begin: Option<&TransactionOptions>,
        statements: &[Statement],
        limits: ResultLimits,
    ) -> Result<Vec<ResultSet>, Stopped> {
        let Halt { index, error, was_cached } = match self.run(begin, statements, limits, Fresh::No).await {
            Ok(results) => return Ok(results),
            Err(halt) => halt,
        };
        let stale = match &error {
            StatementError::Failed(error) if was_cached => Staleness::of(error),
            _ => None,
        };
        if stale.is_some() {
            self.forget(&statements[index]);
        }
        match (stale, error) {
            (Some(_), _) if begin.is_some() => {
                // Nothing else has run in this transaction, so it can begin again and prepare afresh.
                self.rollback().await.map_err(|lost| Stopped { index, error: StatementError::Lost(lost) })?;
                let ran = self.run(begin, statements, limits, Fresh::Yes).await;
                ran.map_err(|Halt { index, error, .. }| Stopped { index, error })
            }
            (Some(Staleness::Certain), StatementError::Failed(error)) => {
                Err(Stopped { index, error: StatementError::StalePlan(error) })
            }
            (_, error) => Err(Stopped { index, error }),
        }
    }

    async fn reset(&self) -> Result<(), Lost> {
        let Backend { client, wire, .. } = self.backend();
        // Statements may be cancelled by others too, by a statement_timeout of their own for one.
        if self.canceller.requests() > wire.cancelled() - self.cancelled_before {
            return Err(Lost("a cancel request may still be on its way".into()));
        }
        let must_be_idle = |status| match status {
            TransactionStatus::Idle => Ok(()),
            TransactionStatus::Open | TransactionStatus::Failed => Err(Lost("a transaction was left open".into())),
        };
        must_be_idle(wire.settled().await?)?;
        let answers = client.simple_query(RESET).await.map_err(|error| Lost(error.to_string()))?;
        must_be_idle(wire.settled().await?)?;
        let prepared = first_row(&answers).and_then(|row| Some((row.get(2)?, row.get(3)?.parse().ok()?)));
        if prepared == Some(("0", wire.prepared())) {
            Ok(())
        } else {
            Err(Lost("prepared statements were left, or the driver's were dropped".into()))
        }
    }
}

#[async_trait]
impl Connection for PooledConnection {
    fn host(&self) -> String {
        self.backend().address.to_string()
    }

    fn backend_pid(&self) -> i32 {
        self.backend().pid
    }

    fn canceller(&self) -> Arc<dyn Canceller> {
        self.canceller.clone()
    }

    fn status(&self) -> TransactionStatus {
        self.backend().wire.status()
    }

    fn cluster(&self) -> Option<Cluster> {
        self.backend().cluster
    }

    fn xid(&self) -> Option<u64> {
        self.xid.get().copied()
    }

    async fn execute(
        &mut self,
        begin: Option<&TransactionOptions>,
        work: &Work,
        limits: ResultLimits,
    ) -> Result<Vec<ResultSet>, Stopped> {
        self.backend().wire.forget_notices();
        let done = match work {
            Work::Savepoint(action, name) => self
                .savepoint(begin, *action, name)
                .await
                .map(|()| Vec::new())
                .map_err(|error| Stopped { index: 0, error }),
            Work::Statements(statements) => self.run_or_prepare_afresh(begin, statements, limits).await,
        };
        if done.is_err() {
            self.soiled.store(true, Ordering::Relaxed);
        }
        done
    }

    async fn commit(&mut self) -> CommitVerdict {
        let Backend { client, wire, .. } = self.backend();
        let had_failed = wire.status() == TransactionStatus::Failed;
        let may_act = self.xid.get().is_some() || self.may_act.load(Ordering::Relaxed);
        wire.forget_tags();
        let answer = client.batch_execute("COMMIT").await;
        let settled = wire.settled().await;
        // The tag is PostgreSQL's own word, sent after the fact: not even losing the connection next takes it back.
        match (wire.next_tag().as_deref(), answer, settled) {
            (Some("COMMIT"), _, _) => CommitVerdict::Committed,
            (Some("ROLLBACK"), _, _) => CommitVerdict::RolledBack,
            // However a failed transaction ends, it is rolled back.
            (_, _, Err(_)) if had_failed => CommitVerdict::RolledBack,
            // However one ends that has only read, nothing is lost.
            (_, _, Err(_)) if !may_act => CommitVerdict::Committed,
            (_, _, Err(lost)) => CommitVerdict::Lost(lost),
            (_, Err(error), Ok(TransactionStatus::Idle)) if error.as_db_error().is_some() => {
                let error = error.as_db_error().map(pg_error).unwrap_or_default();
                CommitVerdict::Failed(Box::new(error))
            }
            (tag, _, Ok(status)) => CommitVerdict::Lost(Lost(format!(
                "COMMIT was answered with {tag:?}, leaving the transaction {status:?}"
            ))),
        }
    }

    async fn rollback(&mut self) -> Result<(), Lost> {
        let Backend { client, wire, .. } = self.backend();
        let answer = client.batch_execute("ROLLBACK").await;
        match (wire.settled().await?, answer) {
            (TransactionStatus::Idle, Ok(())) => Ok(()),
            (status, answer) => Err(Lost(format!("ROLLBACK left the transaction {status:?}: {answer:?}"))),
        }
    }

    async fn lost(&mut self) -> Lost {
        self.backend().wire.lost().await
    }

    async fn release(mut self: Box<Self>) {
        let reset = match self.pool.options().reset {
            ResetMode::Never => return,
            ResetMode::Strict if self.is_soiled() => return,
            // Until the proof is there, `self` holds the backend, and dropping it discards.
            ResetMode::Strict | ResetMode::Clean => timeout(RESET_GRACE, self.reset()).await,
        };
        match reset {
            Ok(Ok(())) if self.pool.is_overflow() => {}
            Ok(Ok(())) => {
                if let Some(mut backend) = self.checked_out.backend.take() {
                    backend.used();
                }
            }
            Ok(Err(lost)) => debug!(cause = %lost, "connection discarded"),
            Err(_) => debug!("connection discarded: the reset took longer than {RESET_GRACE:?}"),
        }
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        if let Some(backend) = self.checked_out.backend.take() {
            // Taken out of the pool, which may then open another; dropping it closes the socket at once.
            drop(Object::take(backend));
        }
    }
}

/// The first row among the answers to a simple query.
pub(super) fn first_row(answers: &[SimpleQueryMessage]) -> Option<&SimpleQueryRow> {
    answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    })
}

/// What a prepared statement is kept by: its text, and the types given for its parameters.
pub(super) type StatementKey = (Arc<str>, Vec<Option<String>>);

fn cache_key(statement: &Statement) -> StatementKey {
    let types = statement.parameters().iter().map(|parameter| parameter.type_name.clone());
    (statement.shared_sql(), types.collect())
}

/// Whether a prepared statement failed because of what it was prepared for.
#[derive(PartialEq, Eq)]
enum Staleness {
    /// The table has changed, or the statement is gone.
    Certain,
    /// Names or types did not fit: perhaps only those that were found when it was prepared, by a function that had
    /// changed the `search_path` unseen.
    Possible,
}

impl Staleness {
    fn of(error: &PgError) -> Option<Self> {
        match error.sqlstate.as_str() {
            "26000" => Some(Self::Certain),
            "0A000" if error.routine.as_deref() == Some("RevalidateCachedQuery") => Some(Self::Certain),
            sqlstate if sqlstate.starts_with("42") => Some(Self::Possible),
            _ => None,
        }
    }
}

/// Whether a statement with this result can have left nothing behind that a transaction's end does not undo. SELECT INTO
/// has the tag of a SELECT, but no columns; set_config() is a SELECT that is a SET.
fn leaves_no_trace(statement: &Statement, result: &ResultSet) -> bool {
    match result.command_tag.split(' ').next() {
        Some("SELECT") => statement.kind() == Kind::Query && !result.columns.is_empty() && !statement.may_set(),
        Some("INSERT" | "UPDATE" | "DELETE" | "MERGE") => !statement.may_set(),
        _ => false,
    }
}

/// The same, as far as it can be told before there is a result, and rather yes than no.
fn may_soil(statement: &Statement, prepared: &Prepared) -> bool {
    match statement.kind() {
        Kind::Change => statement.may_set(),
        Kind::Query => statement.may_set() || prepared.columns().is_empty(),
        Kind::Other => true,
    }
}

/// Whether statements are prepared anew, whatever is in the cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fresh {
    Yes,
    No,
}

/// Why a result was not read to its end.
enum Unread {
    /// PostgreSQL failed the statement, or the connection is lost.
    Failed(DriverError),
    /// It is more than can be returned, or other than expected; with what is still to be read.
    GivenUp(Option<Pin<Box<RowStream>>>, Error),
}

/// Reads all answers, whatever they are.
async fn drain(rows: Option<Pin<Box<RowStream>>>, rest: VecDeque<Sent<'_>>) {
    let read = async |mut rows: Pin<Box<RowStream>>| while let Some(Ok(_)) = rows.next().await {};
    if let Some(rows) = rows {
        read(rows).await;
    }
    for sent in rest {
        if let Ok(rows) = answer(sent.rows).await {
            read(Box::pin(rows)).await;
        }
    }
}

/// A name as SQL writes it.
pub(super) fn quoted_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as SQL writes it, whatever standard_conforming_strings says.
fn quoted_literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// The engine's own timeouts, which a transaction's may tighten but not loosen.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Nets {
    pub(super) statement: Option<Duration>,
    pub(super) idle: Option<Duration>,
}

fn begin_sql(options: &TransactionOptions, nets: &Nets) -> String {
    let TransactionOptions {
        isolation_level,
        read_only,
        deferrable,
        lock_timeout,
        role,
        settings,
        statement_net,
        idle_net,
    } = options;
    let mut sql = String::from("BEGIN");
    if let Some(level) = isolation_level {
        sql.push_str(match level {
            IsolationLevel::ReadUncommitted => " ISOLATION LEVEL READ UNCOMMITTED",
            IsolationLevel::ReadCommitted => " ISOLATION LEVEL READ COMMITTED",
            IsolationLevel::RepeatableRead => " ISOLATION LEVEL REPEATABLE READ",
            IsolationLevel::Serializable => " ISOLATION LEVEL SERIALIZABLE",
        });
    }
    sql.push_str(match read_only {
        Some(true) => " READ ONLY",
        Some(false) => " READ WRITE",
        None => "",
    });
    sql.push_str(match deferrable {
        Some(true) => " DEFERRABLE",
        Some(false) => " NOT DEFERRABLE",
        None => "",
    });
    let timeouts = [
        ("statement_timeout", Some(statement_net), nets.statement),
        ("idle_in_transaction_session_timeout", Some(idle_net), nets.idle),
        ("lock_timeout", lock_timeout.as_ref(), None),
    ];
    for (name, value, net) in timeouts {
        if let Some(value) = value.filter(|value| net.is_none_or(|net| **value < net)) {
            write!(sql, "; SET LOCAL {name} = {}", value.as_millis()).expect("a String takes everything");
        }
    }
    // The settings first: the role may not be allowed to set them.
    for (name, value) in settings {
        let (name, value) = (quoted_literal(name), quoted_literal(value));
        write!(sql, "; SELECT pg_catalog.set_config({name}, {value}, true)").expect("a String takes everything");
    }
    if let Some(role) = role {
        write!(sql, "; SET LOCAL ROLE {}", quoted_identifier(role)).expect("a String takes everything");
    }
    sql
}

fn parameter_types(statement: &Statement) -> Result<Vec<tokio_postgres::types::Type>, Error> {
    let parameters = statement.parameters();
    let named = parameters.iter().rposition(|parameter| parameter.type_name.is_some()).map_or(0, |last| last + 1);
    let types = parameters.iter().take(named).enumerate().map(|(index, parameter)| match &parameter.type_name {
        None => Ok(tokio_postgres::types::Type::UNKNOWN),
        Some(name) => {
            value::named_type(name).map_err(|problem| Error::invalid(format!("parameters[{index}].type"), problem))
        }
    });
    types.collect()
}

fn check_columns(prepared: &Prepared) -> Result<(), Error> {
    let columns = prepared.columns();
    match columns.iter().position(|column| !value::can_return(column.type_())) {
        None => Ok(()),
        Some(index) => {
            let column = &columns[index];
            let problem = format!(
                "returns column {} ({}) of type {}, which this broker cannot return yet: cast it to text",
                index + 1,
                column.name(),
                column.type_().name()
            );
            Err(Error::invalid("sql", problem))
        }
    }
}

/// What a result may still take.
struct Budget {
    rows: u64,
    bytes: usize,
    notices: usize,
    limits: ResultLimits,
}

impl Budget {
    /// Counts what one more result takes in an answer, without its values.
    fn add_result(&mut self, prepared: &Prepared) {
        /// A tag and a count; a column's numbers.
        const EACH: usize = 32;
        let names = prepared.columns().iter().map(|column| column.name().len() + column.type_().name().len() + EACH);
        // What is over the limit has no room for a value.
        self.bytes = self.bytes.saturating_sub(EACH + names.sum::<usize>());
    }

    /// Reads a row within the budget.
    fn read(&mut self, row: &tokio_postgres::Row) -> Result<Vec<Value>, Error> {
        self.rows = self.rows.checked_sub(1).ok_or(Error::Exhausted(Exhausted::ResultRows(self.limits.rows_max)))?;
        let columns = row.columns().iter().enumerate();
        let values = columns.map(|(index, column)| {
            let in_column = |problem| Error::Unreturnable(format!("column {}: {problem}", index + 1));
            let Raw(bytes) = row.try_get(index).map_err(|error| in_column(error.to_string()))?;
            value::decode(column.type_(), bytes, &mut self.bytes).map_err(|refusal| match refusal {
                Refusal::TooLarge => Error::Exhausted(Exhausted::ResultBytes(self.limits.bytes_max)),
                Refusal::Unreadable(problem) => in_column(problem),
            })
        });
        values.collect()
    }
}

fn column(column: &tokio_postgres::Column) -> Column {
    Column {
        name: column.name().to_owned(),
        type_oid: column.type_().oid(),
        type_name: column.type_().name().to_owned(),
        type_modifier: column.type_modifier(),
        table_oid: column.table_oid(),
        column_number: column.column_id(),
    }
}
