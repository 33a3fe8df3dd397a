//! One backend, as the domain's port wants it.
//!
//! Invariants: every driver future is driven to its end, or the connection is discarded; the connection counts as ready
//! only when the wire says that PostgreSQL has answered everything; only a reset by proof gives it back to the pool.

use std::fmt::Write;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use deadpool::managed::Object;
use futures_util::{StreamExt, join};
use tokio::time::timeout;
use tokio_postgres::{RowStream, SimpleQueryMessage, Statement as Prepared};
use tracing::debug;

use super::cancel::BackendCanceller;
use super::engine::{Backend, Opener};
use super::error::pg_error;
use super::value::{self, Raw};
use crate::broker::engine::{
    Canceller, CheckoutError, CommitVerdict, Connection, IsolationLevel, Lost, StatementError, TransactionOptions,
    TransactionStatus,
};
use crate::broker::error::{Error, Exhausted};
use crate::broker::statement::{Column, ResultLimits, ResultSet, Statement};
use crate::broker::value::Value;

/// How long a reset may take; it does next to nothing, so longer means stuck.
const RESET_GRACE: Duration = Duration::from_secs(5);

/// What `DISCARD ALL` does, but for the driver's own prepared statements, which it keeps for type look-ups. The last
/// line finds the ones that callers have left: there is no command that drops only those, so they cost the connection.
const RESET: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; \
    SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES; \
    SELECT 'left' FROM pg_catalog.pg_prepared_statements WHERE from_sql LIMIT 1";

/// Sent right before COMMIT, in the same round trip: the transaction's id arrives before COMMIT's answer.
const TRANSACTION_ID: &str = "SELECT pg_catalog.pg_current_xact_id_if_assigned()";

/// A backend checked out of the pool. Invariant: dropped, it is discarded.
pub(super) struct PooledConnection {
    /// `None` only once it has been given back.
    backend: Option<Object<Opener>>,
    canceller: Arc<BackendCanceller>,
}

impl PooledConnection {
    pub(super) fn new(backend: Object<Opener>) -> Self {
        let canceller = Arc::new(BackendCanceller::new(backend.client.cancel_token(), backend.address.clone()));
        Self { backend: Some(backend), canceller }
    }

    fn backend(&self) -> &Backend {
        self.backend.as_ref().expect("it is there until the connection is released, which consumes it")
    }

    /// Begins the transaction, if asked to, and prepares the statement, in one round trip.
    async fn prepare(
        &self,
        begin: Option<&TransactionOptions>,
        statement: &Statement,
    ) -> Result<Prepared, StatementError> {
        let Backend { client, wire, .. } = self.backend();
        let types = parameter_types(statement).map_err(StatementError::Refused)?;
        let prepare = client.prepare_typed(statement.sql(), &types);
        let prepared = match begin {
            None => prepare.await,
            Some(options) => {
                let sql = begin_sql(options);
                let (begun, prepared) = join!(client.batch_execute(&sql), prepare);
                begun.and(prepared)
            }
        };
        let begun = wire.settled().await;
        match prepared {
            Ok(prepared) => Ok(prepared),
            Err(error) => match (begin, begun) {
                (Some(_), Err(lost)) => Err(StatementError::LostBeforeBegin(lost)),
                (Some(_), Ok(TransactionStatus::Idle)) if error.as_db_error().is_none() => {
                    Err(StatementError::LostBeforeBegin(Lost(error.to_string())))
                }
                _ => Err(self.failure(&error).await),
            },
        }
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
        wire.forget();
        let mut stream = match client.query_raw(prepared, parameters).await {
            Ok(stream) => pin!(stream),
            Err(error) => return Err(self.failure(&error).await),
        };
        let mut rows = Vec::new();
        let mut bytes = 0;
        while let Some(row) = stream.next().await {
            let row = match row {
                Ok(row) => row,
                Err(error) => return Err(self.failure(&error).await),
            };
            let values = match read_row(&row) {
                Ok(values) => values,
                Err(error) => return Err(self.abandon(stream.as_mut(), StatementError::Unreturnable(error)).await),
            };
            bytes += values.iter().map(Value::encoded_len).sum::<usize>();
            rows.push(values);
            if let Some(limit) = exceeded(limits, rows.len(), bytes) {
                return Err(self.abandon(stream.as_mut(), StatementError::Unreturnable(Error::Exhausted(limit))).await);
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

    /// Stops a statement whose result is not wanted any more, and reads what is under way: unread rows would block
    /// everything behind them, ROLLBACK included.
    async fn abandon(&self, mut stream: std::pin::Pin<&mut RowStream>, why: StatementError) -> StatementError {
        let drain = async { while let Some(Ok(_)) = stream.next().await {} };
        let (cancelled, ()) = join!(self.canceller.cancel(), drain);
        if let Err(lost) = cancelled {
            debug!(cause = %lost, "a result passed its limit and had to be read to its end");
        }
        match self.backend().wire.settled().await {
            Ok(_) => why,
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

    /// Proves that the server answers.
    pub(super) async fn ping(&self) -> Result<(), CheckoutError> {
        match timeout(RESET_GRACE, self.backend().client.check_connection()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(CheckoutError::Unreachable(error.to_string())),
            Err(_) => Err(CheckoutError::Unreachable(format!("no answer within {RESET_GRACE:?}"))),
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
        let left =
            |answer: &SimpleQueryMessage| matches!(answer, SimpleQueryMessage::Row(row) if row.get(0) == Some("left"));
        if answers.iter().any(left) {
            return Err(Lost("SQL-level prepared statements were left".into()));
        }
        Ok(())
    }
}

#[async_trait]
impl Connection for PooledConnection {
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
        let prepared = self.prepare(begin, statement).await?;
        self.run(&prepared, statement, limits).await
    }

    async fn commit(&mut self) -> CommitVerdict {
        let Backend { client, wire, .. } = self.backend();
        wire.forget();
        let (probe, answer) = join!(client.simple_query(TRANSACTION_ID), client.batch_execute("COMMIT"));
        let settled = wire.settled().await;
        // `None`: not known. `Some(None)`: no id was assigned, so nothing was written.
        let transaction_id = probe.ok().map(|answers| {
            answers.iter().find_map(|answer| match answer {
                SimpleQueryMessage::Row(row) => row.get(0).and_then(|text| text.parse().ok()),
                _ => None,
            })
        });
        // The tag is PostgreSQL's own word, sent after the fact: not even losing the connection next takes it back.
        match (wire.last_tag().as_deref(), answer, settled) {
            (Some("COMMIT"), _, _) => match transaction_id.flatten() {
                Some(id) => CommitVerdict::Committed(id),
                None => CommitVerdict::NothingWritten,
            },
            (Some("ROLLBACK"), _, _) => CommitVerdict::RolledBack,
            (_, _, Err(_)) if transaction_id == Some(None) => CommitVerdict::NothingWritten,
            (_, _, Err(lost)) => CommitVerdict::Unknown(transaction_id.flatten(), lost),
            (_, Err(error), Ok(TransactionStatus::Idle)) if error.as_db_error().is_some() => {
                let error = error.as_db_error().map(pg_error).unwrap_or_default();
                CommitVerdict::Failed(Box::new(error))
            }
            (tag, _, Ok(status)) => {
                let lost = Lost(format!("COMMIT was answered with {tag:?}, leaving the transaction {status:?}"));
                CommitVerdict::Unknown(transaction_id.flatten(), lost)
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
        // Until the proof is there, `self` holds the backend, and dropping it discards.
        match timeout(RESET_GRACE, self.reset()).await {
            Ok(Ok(())) => drop(self.backend.take()),
            Ok(Err(lost)) => debug!(cause = %lost, "connection discarded"),
            Err(_) => debug!("connection discarded: the reset took longer than {RESET_GRACE:?}"),
        }
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        if let Some(backend) = self.backend.take() {
            // Taken out of the pool, which may then open another; dropping it closes the socket at once.
            drop(Object::take(backend));
        }
    }
}

fn begin_sql(options: &TransactionOptions) -> String {
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
        ("statement_timeout", Some(statement_net)),
        ("idle_in_transaction_session_timeout", Some(idle_net)),
        ("lock_timeout", lock_timeout.as_ref()),
    ];
    for (name, value) in timeouts {
        if let Some(value) = value {
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

fn read_row(row: &tokio_postgres::Row) -> Result<Vec<Value>, Error> {
    let columns = row.columns().iter().enumerate();
    let values = columns.map(|(index, column)| {
        let Raw(bytes) = row.try_get(index).map_err(|error| error.to_string())?;
        value::decode(column.type_(), bytes).map_err(|problem| format!("column {}: {problem}", index + 1))
    });
    values.collect::<Result<_, String>>().map_err(|problem| Error::invalid("sql", format!("result: {problem}")))
}

fn exceeded(limits: ResultLimits, rows: usize, bytes: usize) -> Option<Exhausted> {
    if u64::try_from(rows).unwrap_or(u64::MAX) > limits.rows_max {
        Some(Exhausted::ResultRows(limits.rows_max))
    } else if bytes > limits.bytes_max {
        Some(Exhausted::ResultBytes(limits.bytes_max))
    } else {
        None
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
