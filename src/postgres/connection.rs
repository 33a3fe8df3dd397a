//! One backend, as the domain's port wants it.
//!
//! Invariants: every driver future is driven to its end, or the connection is discarded; the connection counts as ready
//! only when the wire says that PostgreSQL has answered everything; only a reset by proof gives it back to the pool.

mod copy;
mod pipeline;

use pipeline::Output;
pub(super) use pipeline::PIPELINE_MAX;

use std::borrow::Cow;
use std::future::Ready;
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use deadpool::managed::Object;
use futures_util::join;
use lru::LruCache;
use tokio::time::timeout;
use tokio_postgres::types::Type;
use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow, Statement as Prepared};
use tracing::debug;

use super::begin::{begin_sql, quoted_identifier};
use super::cancel::BackendCanceller;
use super::error::pg_error;
use super::opener::Backend;
use super::pool::{CheckedOut, Pool, ResetMode};
use super::value::{self, DatabaseType, Delimiters, NamedType};
use crate::broker::commit::Cluster;
use crate::broker::engine::{
    Canceller, CommitVerdict, Connection, IsolationLevel, Lost, SavepointAction, SavepointName, StatementError,
    Stopped, TransactionOptions, TransactionStatus, Work,
};
use crate::broker::error::Error;
use crate::broker::observer::{Discard, TracePlace};
use crate::broker::statement::{ResultLimits, ResultSet, Statement};

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

type DriverError = tokio_postgres::Error;

/// A backend checked out of the pool, for one transaction. Invariant: dropped, it is discarded.
pub(super) struct PooledConnection {
    checked_out: CheckedOut,
    pool: Arc<Pool>,
    canceller: Arc<BackendCanceller>,
    /// The transaction's id, once PostgreSQL has told it.
    xid: OnceLock<u64>,
    /// Whether COMMIT may do something, or fail, although the transaction has no id: send notifications, commit on a
    /// foreign server, fill a cursor WITH HOLD, find out that what was read cannot stand.
    may_act: AtomicBool,
    /// Whether its transaction has run something that may have left a trace: a strict reset does not trust it, and
    /// names may mean something else to it than to others, so it neither uses nor fills the statement cache.
    soiled: AtomicBool,
    /// Whether its transaction may have changed tables, for which statements are prepared on other connections.
    may_change_tables: AtomicBool,
    /// It is not to be used again.
    spent: AtomicBool,
    /// Where its work stands in a trace, if PostgreSQL is to be told.
    place: Option<TracePlace>,
}

impl PooledConnection {
    pub(super) fn new(checked_out: CheckedOut, pool: Arc<Pool>) -> Self {
        let Backend { client, wire, address, tls, .. } = checked_out.backend();
        let canceller =
            Arc::new(BackendCanceller::new(client.cancel_token(), address.clone(), tls.clone(), wire.clone()));
        let connection = Self {
            checked_out,
            pool,
            canceller,
            xid: OnceLock::new(),
            may_act: AtomicBool::new(false),
            soiled: AtomicBool::new(false),
            may_change_tables: AtomicBool::new(false),
            spent: AtomicBool::new(false),
            place: None,
        };
        if connection.backend().outdated_by(connection.pool.schema_version()) {
            connection.statements().clear();
        }
        connection
    }

    pub(super) fn backend(&self) -> &Backend {
        self.checked_out.backend()
    }

    /// Begins the transaction, if asked to, and prepares the statement, in one round trip; none for a statement that is
    /// prepared already and a transaction that has begun.
    async fn prepare(
        &self,
        mut begin: Option<&TransactionOptions>,
        statement: &Statement,
        cached: Option<Prepared>,
    ) -> Result<Prepared, StatementError> {
        let is_new = cached.is_none();
        // The types of a statement that is prepared already are part of what it is kept by.
        let types = if is_new { self.parameter_types(&mut begin, statement).await? } else { Vec::new() };
        let prepare = async {
            match cached {
                Some(prepared) => Ok(prepared),
                None => self.backend().client.prepare_typed(&self.sql(statement), &types).await,
            }
        };
        let prepared = self.request(begin, prepare).await?;
        if is_new {
            self.learn_delimiters(&prepared).await?;
            // Another transaction's search_path may have another type of that name.
            if !statement.parameters().iter().any(|parameter| is_found_on_path(parameter.type_name.as_deref())) {
                self.cache(statement, &prepared);
            }
        }
        // The driver looks unknown types up with statements of its own.
        self.backend().wire.forget_tags();
        Ok(prepared)
    }

    /// Asks PostgreSQL for what it puts between the elements of arrays, where that is not known.
    async fn learn_delimiters(&self, prepared: &Prepared) -> Result<(), StatementError> {
        let mut delimiters = self.delimiters();
        let columns = prepared.columns().iter().map(tokio_postgres::Column::type_);
        for type_ in columns.chain(prepared.params()) {
            let Some(oid) = delimiters.lacks(type_) else { continue };
            let question = format!("SELECT typdelim FROM pg_catalog.pg_type WHERE oid OPERATOR(pg_catalog.=) {oid}");
            let answers = self.request(None, self.backend().client.simple_query(&question)).await?;
            let delimiter = first_row(&answers).and_then(|row| row.get(0)?.chars().next());
            Arc::make_mut(&mut delimiters).note(oid, delimiter.unwrap_or(','));
            *self.backend().delimiters.lock().unwrap_or_else(PoisonError::into_inner) = delimiters.clone();
        }
        Ok(())
    }

    fn delimiters(&self) -> Arc<Delimiters> {
        self.backend().delimiters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has PostgreSQL do something harmless, in a transaction begun in the same round trip if asked to.
    async fn request<T>(
        &self,
        begin: Option<&TransactionOptions>,
        request: impl Future<Output = Result<T, DriverError>>,
    ) -> Result<T, StatementError> {
        match begin {
            Some(options) => self.begin(options, request).await,
            None => match request.await {
                Ok(done) => Ok(done),
                Err(error) => Err(self.failure(&error).await),
            },
        }
    }

    /// Notes the transaction's id, if PostgreSQL has told one.
    fn note_xid(&self, answers: &[SimpleQueryMessage]) {
        if let Some(xid) = first_row(answers).and_then(|row| row.get(0)?.parse().ok()) {
            self.xid.get_or_init(|| xid);
        }
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

    /// The types that a statement's caller names for its parameters, up to the last that is named. Those that PostgreSQL
    /// has to be asked for are those of the transaction, which is begun then.
    async fn parameter_types(
        &self,
        begin: &mut Option<&TransactionOptions>,
        statement: &Statement,
    ) -> Result<Vec<Type>, StatementError> {
        let parameters = statement.parameters();
        let named = parameters.iter().rposition(|parameter| parameter.type_name.is_some()).map_or(0, |last| last + 1);
        let mut types = Vec::with_capacity(named);
        for (index, parameter) in parameters.iter().take(named).enumerate() {
            let wrong = |problem| StatementError::Refused(Error::invalid(format!("parameters[{index}].type"), problem));
            types.push(match &parameter.type_name {
                None => Type::UNKNOWN,
                Some(name) => match value::named_type(name).map_err(wrong)? {
                    NamedType::BuiltIn(type_) => type_,
                    NamedType::Database(type_) => {
                        let found = self.look_up(begin.take(), &type_).await?;
                        found.ok_or_else(|| wrong(format!("{name:?} is no type of this database")))?
                    }
                },
            });
        }
        Ok(types)
    }

    /// Asks PostgreSQL for a type.
    async fn look_up(
        &self,
        begin: Option<&TransactionOptions>,
        type_: &DatabaseType,
    ) -> Result<Option<Type>, StatementError> {
        let client = &self.backend().client;
        let question = type_.question();
        let answers = self.request(begin, client.simple_query(&question)).await?;
        let oid = first_row(&answers).and_then(|row| row.get(0)?.parse().ok()).filter(|oid| *oid != 0);
        // The driver learns its kind when the statement is prepared.
        Ok(oid.map(|oid| Type::new(String::new(), oid, tokio_postgres::types::Kind::Simple, String::new())))
    }

    /// The statement's text; with where it stands in a trace behind it, if PostgreSQL is to be told.
    fn sql<'a>(&self, statement: &'a Statement) -> Cow<'a, str> {
        match self.place {
            None => statement.sql().into(),
            // On a line of its own: the statement may end in a comment.
            Some(place) => format!("{}\n/*traceparent='{place}'*/", statement.sql()).into(),
        }
    }

    /// Whether statements are prepared for once, and the cache is left to others.
    fn is_apart(&self) -> bool {
        self.is_soiled() || self.place.is_some()
    }

    fn cached(&self, statement: &Statement) -> Option<Prepared> {
        if self.is_apart() {
            return None;
        }
        self.statements().get(&cache_key(statement)).cloned()
    }

    fn cache(&self, statement: &Statement, prepared: &Prepared) {
        if self.pool.options().statement_cache_size > 0 && !self.is_apart() {
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

    async fn reset(&self) -> Result<(), Lost> {
        let Backend { client, wire, .. } = self.backend();
        if !self.canceller.is_settled() || self.spent.load(Ordering::Relaxed) {
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
        place: Option<TracePlace>,
    ) -> Result<Vec<ResultSet>, Stopped> {
        self.place = place.filter(|_| self.pool.options().sql_comment);
        self.backend().wire.forget_notices();
        let done = match work {
            Work::Savepoint(action, name) => self
                .savepoint(begin, *action, name)
                .await
                .map(|()| Vec::new())
                .map_err(|error| Stopped { index: 0, error }),
            Work::Statements(statements, format) => {
                let output = Output { format: *format, sink: None };
                self.run_or_prepare_afresh(begin, statements, output, limits).await
            }
            Work::CopyIn(what, supply) => self.copy_in(begin, &what.0, &what.1, supply).await,
            Work::CopyOut(what, sink) => self.copy_out(begin, &what.0, &what.1, sink, limits).await,
            Work::Stream(what, sink) => {
                let output = Output { format: what.1, sink: Some(sink) };
                self.run_or_prepare_afresh(begin, slice::from_ref(&what.0), output, limits).await
            }
        };
        if done.is_err() {
            self.soiled.store(true, Ordering::Relaxed);
        }
        if done.is_ok() && self.backend().wire.has_other_encoding() {
            // From here on, texts would change on their way, and nobody would know.
            let why = Error::Unreturnable("client_encoding must stay UTF8".into());
            let error = self.give_up(None::<Ready<()>>, why).await;
            return Err(Stopped { index: 0, error });
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
        if self.may_change_tables.load(Ordering::Relaxed) {
            self.pool.tables_changed();
        }
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

    async fn release(mut self: Box<Self>) -> Option<Discard> {
        let reset = match self.pool.options().reset {
            ResetMode::Never => return Some(Discard::Policy),
            ResetMode::Strict if self.is_soiled() => return Some(Discard::Policy),
            // Until the proof is there, `self` holds the backend, and dropping it discards.
            ResetMode::Strict | ResetMode::Clean => timeout(RESET_GRACE, self.reset()).await,
        };
        match reset {
            Ok(Ok(())) if self.pool.is_overflow() => Some(Discard::Overflow),
            Ok(Ok(())) => {
                if let Some(mut backend) = self.checked_out.backend.take() {
                    backend.used();
                }
                None
            }
            Ok(Err(lost)) => {
                debug!(cause = %lost, "connection discarded");
                Some(Discard::Unclean)
            }
            Err(_) => {
                debug!("connection discarded: the reset took longer than {RESET_GRACE:?}");
                Some(Discard::Unclean)
            }
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

/// Whether a type of that name depends on the search_path.
fn is_found_on_path(name: Option<&str>) -> bool {
    let named = name.map(value::named_type);
    matches!(named, Some(Ok(NamedType::Database(type_))) if type_.schema.is_none())
}

/// What a prepared statement is kept by: its text, and the types given for its parameters.
pub(super) type StatementKey = (Arc<str>, Vec<Option<String>>);

fn cache_key(statement: &Statement) -> StatementKey {
    let types = statement.parameters().iter().map(|parameter| parameter.type_name.clone());
    (statement.shared_sql(), types.collect())
}
