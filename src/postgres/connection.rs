//! One backend, as the domain's port wants it.
//!
//! Invariants: every driver future is driven to its end, or the connection is discarded; the connection counts as ready
//! only when the wire says that PostgreSQL has answered everything; only a reset by proof gives it back to the pool.

mod copy;
mod pipeline;

use pipeline::{Asked, Output, send};
pub(super) use pipeline::{PIPELINE_MAX, TRANSACTION_ID};

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
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow, Statement as Prepared};
use tracing::debug;

use super::begin::{BEGIN, quoted_identifier, settings_sql};
use super::error::pg_error;
use super::opener::Backend;
use super::pool::{CheckedOut, Pool, ResetMode};
use super::value::{self, DatabaseType, Delimiters, NamedType};
use super::wire::{Bind, Sync};
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

/// What `DISCARD ALL` does, but for the driver's own prepared statements, which are kept with their plans. It runs right
/// behind what ends a transaction, in one message with it.
///
/// It runs as the login role, so every name in it, operators and types included, is PostgreSQL's own: a caller may have
/// made its namesake in a schema on the path.
const RESET: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; DISCARD TEMP; \
    DISCARD SEQUENCES; SELECT pg_catalog.pg_advisory_unlock_all()";

/// A new seed for random(), and a count of the prepared statements: those that callers have left cannot be dropped alone,
/// and those of the driver that callers have dropped cannot be brought back, so either costs the connection.
///
/// It costs PostgreSQL as much as the rest of a short transaction. So it is left out behind one that showed nothing but
/// SELECT, INSERT, UPDATE, DELETE and MERGE, as long as all connections of the pool are one principal's.
const PROOF: &str = "SELECT \
    pg_catalog.setseed(pg_catalog.hashtext(pg_catalog.gen_random_uuid()::pg_catalog.text)::pg_catalog.float8 \
        OPERATOR(pg_catalog./) 2147483648::pg_catalog.float8), \
    pg_catalog.count(*) FILTER (WHERE from_sql), pg_catalog.count(*) FILTER (WHERE NOT from_sql) \
    FROM pg_catalog.pg_prepared_statement()";

type DriverError = tokio_postgres::Error;

/// A backend checked out of the pool, for one transaction. Invariant: dropped, it is discarded.
pub(super) struct PooledConnection {
    checked_out: CheckedOut,
    pool: Arc<Pool>,
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
    /// What the reset behind its transaction's end has brought, if there was one.
    cleaned: Option<Result<Checks, Lost>>,
}

impl PooledConnection {
    pub(super) fn new(checked_out: CheckedOut, pool: Arc<Pool>) -> Self {
        let connection = Self {
            checked_out,
            pool,
            xid: OnceLock::new(),
            may_act: AtomicBool::new(false),
            soiled: AtomicBool::new(false),
            may_change_tables: AtomicBool::new(false),
            spent: AtomicBool::new(false),
            place: None,
            cleaned: None,
        };
        if connection.backend().outdated_by(connection.pool.schema_version()) {
            connection.statements().clear();
        }
        connection
    }

    pub(super) fn backend(&self) -> &Backend {
        self.checked_out.backend()
    }

    /// Begins the transaction, if asked to, and prepares the statement, in one round trip.
    async fn prepare(
        &self,
        mut begin: Option<&TransactionOptions>,
        statement: &Statement,
    ) -> Result<Prepared, StatementError> {
        let types = self.parameter_types(&mut begin, statement).await?;
        let sql = self.sql(statement);
        let prepared = self.request(begin, self.backend().client.prepare_typed(&sql, &types)).await?;
        self.learn_delimiters(&prepared).await?;
        // Another transaction's search_path may have another type of that name.
        if !statement.parameters().iter().any(|parameter| is_found_on_path(parameter.type_name.as_deref())) {
            self.cache(statement, &prepared);
        }
        // The driver looks unknown types up with statements of its own.
        let wire = &self.backend().wire;
        wire.settled().await.map_err(StatementError::Lost)?;
        wire.forget_tags();
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

    /// Asks for the transaction's id; in full where callers may have dropped the statement that is prepared for it.
    async fn ask_xid(&self, in_full: bool) -> Result<Option<u64>, DriverError> {
        let Backend { client, wire, own, .. } = self.backend();
        let id = match own {
            Some(own) if !in_full => {
                wire.expect(Bind::default());
                client.query_one(&own.transaction_id, &[]).await?.get::<_, Option<String>>(0)
            }
            _ => {
                let answers = client.simple_query(TRANSACTION_ID).await?;
                first_row(&answers).and_then(|row| row.get(0).map(str::to_owned))
            }
        };
        Ok(id.and_then(|id| id.parse().ok()))
    }

    /// Notes the transaction's id, if it has one.
    fn note_xid(&self, xid: Option<u64>) {
        if let Some(xid) = xid {
            self.xid.get_or_init(|| xid);
        }
    }

    /// Begins the transaction and has PostgreSQL do something harmless in the same round trip.
    async fn begin<T>(
        &self,
        options: &TransactionOptions,
        first: impl Future<Output = Result<T, DriverError>>,
    ) -> Result<T, StatementError> {
        let Backend { client, wire, login_timeouts, .. } = self.backend();
        if options.isolation_level == Some(IsolationLevel::Serializable) {
            self.may_act.store(true, Ordering::Relaxed);
        }
        let mut commands = settings_sql(options, login_timeouts);
        commands.insert(0, BEGIN.to_owned());
        let sql = commands.join("; ");
        let (begun, first) = join!(client.batch_execute(&sql), first);
        if let Err(error) = begun {
            return Err(self.not_begun(&error).await);
        }
        match (wire.settled().await, first) {
            (Ok(_), Ok(first)) => Ok(first),
            (Ok(_), Err(error)) => Err(self.failure(&error).await),
            (Err(lost), _) => Err(StatementError::LostBeforeBegin(lost)),
        }
    }

    /// What begins the transaction, if it can share a Sync with its first statement, as where there is nothing to be set.
    fn begin_ahead(&self, options: &TransactionOptions) -> Option<&Prepared> {
        let Backend { login_timeouts, own, .. } = self.backend();
        own.as_ref().filter(|_| settings_sql(options, login_timeouts).is_empty()).map(|own| &own.begin)
    }

    /// Sends what begins the transaction. A statement must follow at once: it runs in the transaction, or not at all.
    async fn send_begin<'a>(&'a self, begin: &'a Prepared) -> Asked<'a, u64> {
        let Backend { client, wire, .. } = self.backend();
        wire.expect(Bind { sync: Sync::Joins, ..Bind::default() });
        send(client.execute(begin, &[])).await
    }

    /// Whether the broker's own prepared statements are gone: a function has dropped them, unseen. Then all is sent in full,
    /// and the connection is not used again.
    fn misses_own_statements(&self, error: &DriverError) -> bool {
        let misses = error.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME);
        if misses {
            self.soiled.store(true, Ordering::Relaxed);
            self.spent.store(true, Ordering::Relaxed);
        }
        misses
    }

    /// Why there is no transaction, once PostgreSQL is ready again.
    async fn not_begun(&self, error: &DriverError) -> StatementError {
        match (self.backend().wire.settled().await, error.as_db_error()) {
            (Err(lost), _) => StatementError::LostBeforeBegin(lost),
            // The role or a setting: nothing of the caller's ran, and the transaction goes.
            (Ok(_), Some(refusal)) => StatementError::Refused(Error::Database(Box::new(pg_error(refusal)))),
            (Ok(TransactionStatus::Idle), None) => StatementError::LostBeforeBegin(Lost(error.to_string())),
            (Ok(_), None) => StatementError::Lost(Lost(error.to_string())),
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

    /// Ends the transaction, and cleans the connection right behind it, unless there may be much to clean: nobody is to wait
    /// for that. Returns the answer to the end, once PostgreSQL is ready again.
    async fn finish(&mut self, end: &str) -> (Result<(), DriverError>, Result<TransactionStatus, Lost>) {
        self.backend().wire.forget_tags();
        let (answer, cleaned) = match self.checks().filter(|_| !self.is_soiled()) {
            None => (self.backend().client.batch_execute(end).await, None),
            Some(Checks::Trusting) => {
                let answer = self.backend().client.batch_execute(&Checks::Trusting.sql(Some(end))).await;
                let cleaned = answer.is_ok().then(|| self.cleaned(Checks::Trusting, &[]));
                (answer, cleaned)
            }
            Some(checks @ Checks::All) => {
                let answers = self.backend().client.simple_query(&checks.sql(Some(end))).await;
                let cleaned = answers.as_ref().ok().map(|answers| self.cleaned(checks, answers));
                (answers.map(drop), cleaned)
            }
        };
        self.cleaned = cleaned;
        (answer, self.backend().wire.settled().await)
    }

    /// How thoroughly the connection is to be cleaned; `None` when it is not to be used again anyway.
    fn checks(&self) -> Option<Checks> {
        // A cancel request that may still be on its way would hit whoever is next.
        if !self.backend().canceller.is_settled() || self.spent.load(Ordering::Relaxed) {
            return None;
        }
        match self.pool.options().reset {
            ResetMode::Never => None,
            ResetMode::Strict if self.is_soiled() => None,
            ResetMode::Clean if !self.is_soiled() && !self.pool.is_shared() => Some(Checks::Trusting),
            ResetMode::Strict | ResetMode::Clean => Some(Checks::All),
        }
    }

    /// Whether the answers to a reset prove that the connection is as clean as a new one.
    fn cleaned(&self, checks: Checks, answers: &[SimpleQueryMessage]) -> Result<Checks, Lost> {
        let wire = &self.backend().wire;
        let is_idle = wire.status() == TransactionStatus::Idle;
        let has_own_statements = || {
            let row = answers.iter().rev().find_map(row);
            let prepared = row.and_then(|row| Some((row.get(1)?, row.get(2)?.parse().ok()?)));
            prepared == Some(("0", wire.prepared()))
        };
        match checks {
            _ if !is_idle => Err(Lost("a transaction was left open".into())),
            Checks::All if !has_own_statements() => {
                Err(Lost("prepared statements were left, or the driver's were dropped".into()))
            }
            checks => Ok(checks),
        }
    }

    /// Cleans the connection, if that was not done behind its transaction.
    async fn reset(&mut self) -> Result<Checks, Lost> {
        if let Some(cleaned) = self.cleaned.take() {
            return cleaned;
        }
        let answers = self.backend().client.simple_query(&Checks::All.sql(None)).await;
        let answers = answers.map_err(|error| Lost(error.to_string()))?;
        self.backend().wire.settled().await?;
        self.cleaned(Checks::All, &answers)
    }
}

/// How thoroughly a connection is cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checks {
    /// For use by whoever is next.
    All,
    /// For use by the same principal.
    Trusting,
}

impl Checks {
    fn sql(self, end: Option<&str>) -> String {
        let proof = (self == Self::All).then_some(PROOF);
        [end, Some(RESET), proof].into_iter().flatten().collect::<Vec<_>>().join("; ")
    }
}

#[async_trait]
impl Connection for PooledConnection {
    fn host(&self) -> Arc<str> {
        self.backend().host.clone()
    }

    fn backend_pid(&self) -> i32 {
        self.backend().pid
    }

    fn canceller(&self) -> Arc<dyn Canceller> {
        self.backend().canceller.clone()
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
            Work::CopyIn(what, supply) => Box::pin(self.copy_in(begin, &what.0, &what.1, supply)).await,
            Work::CopyOut(what, sink) => Box::pin(self.copy_out(begin, &what.0, &what.1, sink, limits)).await,
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
        let had_failed = self.status() == TransactionStatus::Failed;
        let may_act = self.xid.get().is_some() || self.may_act.load(Ordering::Relaxed);
        let (answer, settled) = self.finish("COMMIT").await;
        if self.may_change_tables.load(Ordering::Relaxed) {
            self.pool.tables_changed();
        }
        // The tag is PostgreSQL's own word, sent after the fact: not even losing the connection next takes it back.
        match (self.backend().wire.next_tag().as_deref(), answer, settled) {
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
        let (answer, status) = self.finish("ROLLBACK").await;
        rolled_back(answer, status)
    }

    async fn lost(&mut self) -> Lost {
        self.backend().wire.lost().await
    }

    async fn release(mut self: Box<Self>) -> Option<Discard> {
        match self.pool.options().reset {
            ResetMode::Never => return Some(Discard::Policy),
            ResetMode::Strict if self.is_soiled() => return Some(Discard::Policy),
            ResetMode::Strict | ResetMode::Clean if self.checks().is_none() => return Some(Discard::Unclean),
            ResetMode::Strict | ResetMode::Clean => {}
        }
        // Until the proof is there, `self` holds the backend, and dropping it discards.
        match timeout(RESET_GRACE, self.reset()).await {
            Ok(Ok(checks)) => {
                if let Some(mut backend) = self.checked_out.backend.take() {
                    backend.used();
                    backend.cleaned(checks);
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

/// Whether ROLLBACK, answered so and leaving the connection so, has ended its transaction.
fn rolled_back(answer: Result<(), DriverError>, status: Result<TransactionStatus, Lost>) -> Result<(), Lost> {
    match (status?, answer) {
        (TransactionStatus::Idle, Ok(())) => Ok(()),
        (status, answer) => Err(Lost(format!("ROLLBACK left the transaction {status:?}: {answer:?}"))),
    }
}

/// The first row among the answers to a simple query.
pub(super) fn first_row(answers: &[SimpleQueryMessage]) -> Option<&SimpleQueryRow> {
    answers.iter().find_map(row)
}

fn row(answer: &SimpleQueryMessage) -> Option<&SimpleQueryRow> {
    match answer {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    }
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
