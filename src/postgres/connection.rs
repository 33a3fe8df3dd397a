//! One backend, as the domain's port wants it.
//!
//! Invariants: every driver future is driven to its end, or the connection is discarded; the connection counts as ready
//! only when the wire says that PostgreSQL has answered everything; only a reset by proof gives it back to the pool.

use std::fmt::Write;
use std::pin::Pin;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use deadpool::managed::Object;
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
use crate::broker::engine::{
    Canceller, CommitVerdict, Connection, IsolationLevel, Lost, StatementError, TransactionOptions, TransactionStatus,
};
use crate::broker::error::{Error, Exhausted, PgError};
use crate::broker::statement::{Column, ResultLimits, ResultSet, Statement};
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

/// Sent right before COMMIT, in the same round trip: the transaction's id arrives before COMMIT's answer.
const TRANSACTION_ID: &str = "SELECT pg_catalog.pg_current_xact_id_if_assigned()";

/// A backend checked out of the pool. Invariant: dropped, it is discarded.
pub(super) struct PooledConnection {
    checked_out: CheckedOut,
    pool: Arc<Pool>,
    canceller: Arc<BackendCanceller>,
    /// Whether its transaction has run something that may have left a trace: a strict reset does not trust it, and
    /// names may mean something else to it than to others, so it neither uses nor fills the statement cache.
    soiled: bool,
}

impl PooledConnection {
    pub(super) fn new(checked_out: CheckedOut, pool: Arc<Pool>) -> Self {
        let Backend { client, address, tls, .. } = checked_out.backend();
        let canceller = Arc::new(BackendCanceller::new(client.cancel_token(), address.clone(), tls.clone()));
        Self { checked_out, pool, canceller, soiled: false }
    }

    fn backend(&self) -> &Backend {
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
        let Backend { client, wire, nets, .. } = self.backend();
        let is_new = cached.is_none();
        // The types of a statement that is prepared already are part of what it is kept by.
        let types = if is_new { parameter_types(statement).map_err(StatementError::Refused)? } else { Vec::new() };
        let prepare = async {
            match cached {
                Some(prepared) => Ok(prepared),
                None => client.prepare_typed(statement.sql(), &types).await,
            }
        };
        let prepared = match begin {
            None => prepare.await,
            Some(options) => {
                let sql = begin_sql(options, nets);
                let (begun, prepared) = join!(client.batch_execute(&sql), prepare);
                begun.and(prepared)
            }
        };
        let begun = wire.settled().await;
        match prepared {
            Ok(prepared) => {
                if is_new {
                    self.cache(statement, &prepared);
                }
                Ok(prepared)
            }
            Err(error) => match (begin, begun) {
                (Some(_), Err(lost)) => Err(StatementError::LostBeforeBegin(lost)),
                (Some(_), Ok(TransactionStatus::Idle)) if error.as_db_error().is_none() => {
                    Err(StatementError::LostBeforeBegin(Lost(error.to_string())))
                }
                _ => Err(self.failure(&error).await),
            },
        }
    }

    fn cached(&self, statement: &Statement) -> Option<Prepared> {
        if self.soiled {
            return None;
        }
        self.statements().get(&cache_key(statement)).cloned()
    }

    fn cache(&self, statement: &Statement, prepared: &Prepared) {
        if self.pool.options().statement_cache_size > 0 && !self.soiled {
            self.statements().put(cache_key(statement), prepared.clone());
        }
    }

    /// Forgets a prepared statement that PostgreSQL does not run any more.
    fn forget(&self, statement: &Statement) {
        self.statements().pop(&cache_key(statement));
    }

    fn statements(&self) -> MutexGuard<'_, LruCache<StatementKey, Prepared>> {
        // Nothing panics while it is held, so a poisoned lock holds a sound cache.
        self.backend().statements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a prepared statement and reads its result.
    async fn run(
        &self,
        prepared: &Prepared,
        statement: &Statement,
        limits: ResultLimits,
    ) -> Result<ResultSet, StatementError> {
        let parameters = value::encode(statement.parameters(), prepared.params()).map_err(StatementError::Refused)?;
        check_columns(prepared).map_err(StatementError::Refused)?;
        let Backend { client, wire, .. } = self.backend();
        wire.forget_tags();
        let mut stream = match client.query_raw(prepared, parameters).await {
            Ok(stream) => Box::pin(stream),
            Err(error) => return Err(self.failure(&error).await),
        };
        let mut rows = Vec::new();
        let mut budget = Budget { rows: limits.rows_max, bytes: limits.bytes_max, limits };
        while let Some(row) = stream.next().await {
            let read = match row {
                Ok(row) => budget.read(&row),
                Err(error) => {
                    // An unread stream would keep the driver from reading on.
                    drop(stream);
                    return Err(self.failure(&error).await);
                }
            };
            match read {
                Ok(values) => rows.push(values),
                Err(error) => return Err(self.abandon(stream.as_mut(), error).await),
            }
        }
        wire.settled().await.map_err(StatementError::Lost)?;
        let columns: Vec<_> = prepared.columns().iter().map(column).collect();
        let returned = u64::try_from(rows.len()).unwrap_or(u64::MAX);
        Ok(ResultSet {
            row_count: if columns.is_empty() { stream.rows_affected().unwrap_or(0) } else { returned },
            columns,
            rows,
            command_tag: wire.last_tag().unwrap_or_default(),
            notices: wire.take_notices(),
        })
    }

    /// Stops a statement whose result cannot be returned, and reads what is under way: unread rows would block
    /// everything behind them, ROLLBACK included. Leaves the transaction failed, also when the statement was through
    /// before it could be stopped: its caller has not seen what it did.
    async fn abandon(&self, mut stream: Pin<&mut RowStream>, why: Error) -> StatementError {
        let Backend { client, wire, .. } = self.backend();
        let drain = async { while let Some(Ok(_)) = stream.next().await {} };
        let (cancelled, ()) = join!(self.canceller.cancel(), drain);
        if let Err(lost) = cancelled {
            return StatementError::Lost(lost);
        }
        if let Ok(TransactionStatus::Open) = wire.settled().await {
            // Any error fails the transaction. This one says in PostgreSQL's log what it is about.
            let _ = client.batch_execute("\"the result could not be returned\"").await;
        }
        match wire.settled().await {
            Ok(TransactionStatus::Failed) => StatementError::Unreturnable(why),
            Ok(status) => StatementError::Lost(Lost(format!("a transaction to be failed is {status:?}"))),
            Err(lost) => StatementError::Lost(lost),
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

    async fn reset(&self) -> Result<(), Lost> {
        let Backend { client, wire, .. } = self.backend();
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

    async fn execute(
        &mut self,
        begin: Option<&TransactionOptions>,
        statement: &Statement,
        limits: ResultLimits,
    ) -> Result<ResultSet, StatementError> {
        self.backend().wire.forget_notices();
        let cached = self.cached(statement);
        let was_cached = cached.is_some();
        let prepared = self.prepare(begin, statement, cached).await?;
        let mut ran = self.run(&prepared, statement, limits).await;
        if let Err(StatementError::Failed(error)) = &ran
            && was_cached
            && let Some(staleness) = Staleness::of(error)
        {
            self.forget(statement);
            if begin.is_some() {
                // Nothing else has run in this transaction, so it can begin again and prepare afresh.
                self.rollback().await.map_err(StatementError::Lost)?;
                let prepared = self.prepare(begin, statement, None).await?;
                ran = self.run(&prepared, statement, limits).await;
            } else if staleness == Staleness::Certain {
                ran = Err(StatementError::StalePlan(error.clone()));
            }
        }
        self.soiled |= ran.as_ref().map_or(true, |result| !leaves_no_trace(statement, result));
        ran
    }

    async fn commit(&mut self) -> CommitVerdict {
        let Backend { client, wire, .. } = self.backend();
        wire.forget_tags();
        let (probe, answer) = join!(client.simple_query(TRANSACTION_ID), client.batch_execute("COMMIT"));
        let settled = wire.settled().await;
        let transaction_id = probe.ok().and_then(|answers| first_row(&answers)?.get(0)?.parse().ok());
        // The tag is PostgreSQL's own word, sent after the fact: not even losing the connection next takes it back.
        match (wire.last_tag().as_deref(), answer, settled) {
            (Some("COMMIT"), _, _) => match transaction_id {
                Some(id) => CommitVerdict::Committed(id),
                None => CommitVerdict::NothingWritten,
            },
            (Some("ROLLBACK"), _, _) => CommitVerdict::RolledBack,
            // Not even a transaction without an id is known to have ended: COMMIT itself may do things, NOTIFY one of them.
            (_, _, Err(lost)) => CommitVerdict::Unknown(transaction_id, lost),
            (_, Err(error), Ok(TransactionStatus::Idle)) if error.as_db_error().is_some() => {
                let error = error.as_db_error().map(pg_error).unwrap_or_default();
                CommitVerdict::Failed(Box::new(error))
            }
            (tag, _, Ok(status)) => {
                let lost = Lost(format!("COMMIT was answered with {tag:?}, leaving the transaction {status:?}"));
                CommitVerdict::Unknown(transaction_id, lost)
            }
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
            ResetMode::Strict if self.soiled => return,
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
pub(super) type StatementKey = (String, Vec<Option<String>>);

fn cache_key(statement: &Statement) -> StatementKey {
    let types = statement.parameters().iter().map(|parameter| parameter.type_name.clone());
    (statement.sql().to_owned(), types.collect())
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
/// and CREATE TABLE AS have the tag of a SELECT, but no columns; set_config() is a SELECT that is a SET.
fn leaves_no_trace(statement: &Statement, result: &ResultSet) -> bool {
    if statement.sql().to_ascii_lowercase().contains("set_config") {
        return false;
    }
    match result.command_tag.split(' ').next() {
        Some("SELECT") => !result.columns.is_empty(),
        Some("INSERT" | "UPDATE" | "DELETE" | "MERGE") => true,
        _ => false,
    }
}

/// The engine's own timeouts, which a transaction's may tighten but not loosen.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Nets {
    pub(super) statement: Option<Duration>,
    pub(super) idle: Option<Duration>,
}

fn begin_sql(options: &TransactionOptions, nets: &Nets) -> String {
    let TransactionOptions { isolation_level, read_only, deferrable, lock_timeout, statement_net, idle_net } = options;
    let mut sql = String::from("BEGIN");
    if let Some(level) = isolation_level {
        sql.push_str(match level {
            IsolationLevel::ReadUncommitted => " ISOLATION LEVEL READ UNCOMMITTED",
            IsolationLevel::ReadCommitted => " ISOLATION LEVEL READ COMMITTED",
            IsolationLevel::RepeatableRead => " ISOLATION LEVEL REPEATABLE READ",
            IsolationLevel::Serializable => " ISOLATION LEVEL SERIALIZABLE",
        });
    }
    sql.push_str(if *read_only { " READ ONLY" } else { "" });
    sql.push_str(if *deferrable { " DEFERRABLE" } else { "" });
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
    limits: ResultLimits,
}

impl Budget {
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
