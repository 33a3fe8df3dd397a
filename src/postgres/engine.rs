//! An engine: one PostgreSQL target, its pool, and what callers may change about their connections.
//!
//! Invariant: an option that a caller asks for is one that the engine's `overridable` list names, and is then honoured.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::begin::quoted_identifier;
use super::blockers::Blockers;
use super::connection::PooledConnection;
use super::listener::Listeners;
use super::opener::{OpenError, TOO_MANY_CONNECTIONS};
use super::options::{self, ConnectOptions};
use super::outcome;
use super::pool::Pool;
pub use super::pool::{PoolOptions, ResetMode};
use crate::broker::commit::{ClusterXid, Resolution};
use crate::broker::connect::ConnectOverrides;
use crate::broker::engine::{Blocker, CheckoutError, Connection, Engine, EngineInfo, IdempotencyTable, Notifications};
use crate::broker::error::Error;
use crate::broker::notification::ChannelName;
use crate::broker::principal::Principal;
use crate::broker::statement::{Expectation, Statement};

/// A table's name: with its schema, or found on the login role's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableName(Vec<String>);

impl TableName {
    /// Reads "table" or "schema.table", as they are, without quotes.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<_> = text.split('.').map(str::to_owned).collect();
        let sound = |part: &String| !part.is_empty() && !part.contains(['"', '\0']);
        (parts.len() <= 2 && parts.iter().all(sound)).then_some(Self(parts))
    }

    fn quoted(&self) -> String {
        self.0.iter().map(|part| quoted_identifier(part)).collect::<Vec<_>>().join(".")
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("."))
    }
}

/// The statements on an idempotency table.
fn idempotency(table: &TableName) -> IdempotencyTable {
    let table = table.quoted();
    let statement = |sql: String| Statement::new(sql, Vec::new()).expect("it is an INSERT, a SELECT or an UPDATE");
    IdempotencyTable {
        claim: statement(format!(
            "INSERT INTO {table} (principal, key, request) VALUES ($1, $2, $3) ON CONFLICT (principal, key) DO NOTHING"
        )),
        read: statement(format!(
            "SELECT request, answer, transaction_id::pg_catalog.text FROM {table} WHERE principal = $1 AND key = $2"
        )),
        keep: statement(format!("UPDATE {table} SET answer = $3 WHERE principal = $1 AND key = $2"))
            .expecting(Some(Expectation::Exactly(1))),
    }
}

/// A PostgreSQL target and its pool.
pub struct PostgresEngine {
    name: String,
    pool: Arc<Pool>,
    blockers: Arc<Blockers>,
    listeners: Listeners,
    overridable: BTreeSet<String>,
    idempotency: Option<IdempotencyTable>,
    server_version: Mutex<String>,
    _maintenance: AbortOnDropHandle<()>,
}

impl PostgresEngine {
    /// An engine that opens its first connection when it is needed. Call it on a tokio runtime.
    pub fn new(
        name: String,
        connect: ConnectOptions,
        pool: PoolOptions,
        overridable: BTreeSet<String>,
        idempotency_table: Option<&TableName>,
    ) -> Self {
        let idempotency = idempotency_table.map(idempotency);
        let pool = Arc::new(Pool::new(connect, pool));
        let blockers = Arc::new(Blockers::default());
        let (maintained, asked) = (pool.clone(), blockers.clone());
        let maintenance = tokio::spawn(async move {
            /// Short against the times that connections live, long against the cost of a look.
            const LOOK: Duration = Duration::from_secs(1);
            loop {
                maintained.maintain().await;
                asked.maintain();
                sleep(LOOK).await;
            }
        });
        let maintenance = AbortOnDropHandle::new(maintenance);
        let listeners = Listeners::new(name.clone(), pool.clone());
        Self {
            name,
            pool,
            blockers,
            listeners,
            overridable,
            idempotency,
            server_version: Mutex::default(),
            _maintenance: maintenance,
        }
    }
}

#[async_trait]
impl Engine for PostgresEngine {
    fn name(&self) -> &str {
        &self.name
    }

    fn info(&self) -> EngineInfo {
        let connect = self.pool.connect_options();
        EngineInfo {
            name: self.name.clone(),
            database: connect.database.clone(),
            user: connect.user.clone(),
            server_version: self.server_version.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            pool: self.pool.statistics(),
        }
    }

    fn idempotency_table(&self) -> Option<&IdempotencyTable> {
        self.idempotency.as_ref()
    }

    fn check(&self, overrides: &ConnectOverrides) -> Result<(), Error> {
        options::check(overrides, self.pool.connect_options(), &self.overridable)
    }

    async fn checkout(
        &self,
        principal: &Principal,
        overrides: &Arc<ConnectOverrides>,
    ) -> Result<Box<dyn Connection>, CheckoutError> {
        let checked_out = self.pool.checkout(principal, overrides).await?;
        self.server_version
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&checked_out.backend().server_version);
        Ok(Box::new(PooledConnection::new(checked_out, self.pool.clone())))
    }

    async fn resolve(
        &self,
        principal: &Principal,
        transaction: &ClusterXid,
        orphan: Option<i32>,
    ) -> Result<Resolution, CheckoutError> {
        let checked_out = self.pool.checkout(principal, &Arc::default()).await?;
        let connection = Box::new(PooledConnection::new(checked_out, self.pool.clone()));
        let bound = self.pool.connect_options().connect_timeout;
        let asked = timeout(bound, outcome::resolve(&connection.backend().client, transaction, orphan)).await;
        match asked {
            Ok(Ok(resolution)) => {
                connection.release().await;
                Ok(resolution)
            }
            Ok(Err(error)) => Err(CheckoutError::Unreachable(error.to_string())),
            Err(_) => {
                let bound = humantime::format_duration(bound);
                Err(CheckoutError::Unreachable(format!("the server did not say within {bound}")))
            }
        }
    }

    async fn blockers(&self, host: &str, backend_pid: i32) -> Result<Vec<Blocker>, CheckoutError> {
        Ok(self.blockers.of(&self.pool, host, backend_pid).await?)
    }

    async fn listen(&self, channels: BTreeSet<ChannelName>) -> Result<Box<dyn Notifications>, CheckoutError> {
        self.listeners.listen(channels).await
    }

    async fn probe(&self) -> Result<(), CheckoutError> {
        // A connection of its own: a busy pool says nothing about the server, and callers need all of it.
        match self.pool.probe().await {
            Ok(()) => {
                self.pool.recovered();
                Ok(())
            }
            // All the server's connections are in use: it is there.
            Err(OpenError::Refused(error)) if error.sqlstate == TOO_MANY_CONNECTIONS => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl fmt::Debug for PostgresEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresEngine").field("name", &self.name).finish_non_exhaustive()
    }
}
