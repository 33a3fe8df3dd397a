//! Every name under which the broker is seen: spans, their attributes, and metrics. Nothing else is here.
//!
//! The general ones are OpenTelemetry's semantic conventions, as of [`SCHEMA_URL`]; the others begin with `sessionbroker`.
//! Invariant: whatever is exported has its name from here, and README's table has each metric.

/// The semantic conventions that the general names are of.
pub const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.43.0";

/// The instrumentation scope of spans, metrics and logs.
pub const SCOPE: &str = "session-broker";

/// Attributes of spans and metrics.
pub mod attribute {
    /// The RPC system: `grpc`.
    pub const RPC_SYSTEM: &str = "rpc.system.name";
    /// `sessionbroker.v1.SessionService/Execute`.
    pub const RPC_METHOD: &str = "rpc.method";
    /// `OK`, `ABORTED` ...
    pub const RPC_STATUS: &str = "rpc.response.status_code";
    /// A call's reason to fail, as its caller is told; what PostgreSQL failed with, by its class in metrics.
    pub const ERROR_TYPE: &str = "error.type";
    /// `postgresql`.
    pub const DB_SYSTEM: &str = "db.system.name";
    /// The database's name.
    pub const DB_NAMESPACE: &str = "db.namespace";
    /// `SELECT`, `INSERT` ..., `COMMIT`.
    pub const DB_OPERATION: &str = "db.operation.name";
    /// How many runs a batch has, if not one.
    pub const DB_BATCH_SIZE: &str = "db.operation.batch.size";
    /// What a statement does to which table.
    pub const DB_SUMMARY: &str = "db.query.summary";
    /// The statement, with `$1` for parameters. Off by default.
    pub const DB_TEXT: &str = "db.query.text";
    /// An error's SQLSTATE.
    pub const DB_STATUS: &str = "db.response.status_code";
    /// The engine, as the pool's name.
    pub const POOL_NAME: &str = "db.client.connection.pool.name";
    /// `used` or `idle`.
    pub const CONNECTION_STATE: &str = "db.client.connection.state";
    /// The engine's name.
    pub const ENGINE: &str = "sessionbroker.engine";
    /// Where a session stands: `idle`, `in_transaction` or `failed`.
    pub const SESSION_STATE: &str = "sessionbroker.session.state";
    /// The session's loggable name.
    pub const SESSION_ID: &str = "sessionbroker.session.id";
    /// Why a session ended: `LEASE_EXPIRED` ...
    pub const END_REASON: &str = "sessionbroker.session.end_reason";
    /// What became of a transaction: `COMMITTED`, `ROLLED_BACK`, `NOTHING_WRITTEN` or `UNKNOWN`.
    pub const OUTCOME: &str = "sessionbroker.transaction.outcome";
    /// How long a transaction has waited for its caller, in seconds.
    pub const PAUSE: &str = "sessionbroker.transaction.pause";
    /// The part of a transaction in which it did nothing.
    pub const IDLE_RATIO: &str = "sessionbroker.transaction.idle_ratio";
    /// Why a connection was not given back.
    pub const DISCARD_REASON: &str = "sessionbroker.connection.discard_reason";
    /// `traces`, `metrics` or `logs`.
    pub const SIGNAL: &str = "sessionbroker.telemetry.signal";
}

/// Metrics. All times are in seconds.
pub mod metric {
    /// How long calls take, to the end of their answer.
    pub const CALL_DURATION: &str = "rpc.server.call.duration";
    /// How long PostgreSQL takes to do what a call asks, and to commit.
    pub const OPERATION_DURATION: &str = "db.client.operation.duration";
    /// Open connections.
    pub const CONNECTION_COUNT: &str = "db.client.connection.count";
    /// The most connections there may be.
    pub const CONNECTION_MAX: &str = "db.client.connection.max";
    /// Calls that wait for a connection.
    pub const CONNECTION_PENDING: &str = "db.client.connection.pending_requests";
    /// Calls that got none in time.
    pub const CONNECTION_TIMEOUTS: &str = "db.client.connection.timeouts";
    /// How long calls wait for one.
    pub const CONNECTION_WAIT_TIME: &str = "db.client.connection.wait_time";
    /// How long one is used at a time, its reset included.
    pub const CONNECTION_USE_TIME: &str = "db.client.connection.use_time";
    /// Connections that were closed instead of given back.
    pub const CONNECTIONS_DISCARDED: &str = "sessionbroker.connections.discarded";
    /// Connections that could not be opened.
    pub const LOGIN_FAILURES: &str = "sessionbroker.connections.login_failures";
    /// Live sessions.
    pub const SESSIONS: &str = "sessionbroker.sessions";
    /// Sessions begun.
    pub const SESSIONS_BEGUN: &str = "sessionbroker.sessions.begun";
    /// Sessions ended.
    pub const SESSIONS_ENDED: &str = "sessionbroker.sessions.ended";
    /// How long transactions are open.
    pub const TRANSACTION_DURATION: &str = "sessionbroker.transaction.duration";
    /// The part of that in which they do nothing.
    pub const TRANSACTION_IDLE_RATIO: &str = "sessionbroker.transaction.idle_ratio";
    /// How much of a lease was left when it was renewed.
    pub const LEASE_REMAINING: &str = "sessionbroker.lease.remaining_at_renewal";
    /// How late sessions are reaped.
    pub const REAPER_LAG: &str = "sessionbroker.reaper.lag";
    /// Sessions that the reaper has only counted.
    pub const REAPER_SPARED: &str = "sessionbroker.reaper.spared";
    /// How long stopping a statement takes.
    pub const CANCEL_DURATION: &str = "sessionbroker.cancel.duration";
    /// Commits whose answer was lost, by what was found out.
    pub const COMMITS_RESOLVED: &str = "sessionbroker.commit.resolved";
    /// Whether an engine's PostgreSQL answers: 1 or 0.
    pub const ENGINE_REACHABLE: &str = "sessionbroker.engine.reachable";
    /// Whether the broker is draining: 1 or 0.
    pub const DRAINING: &str = "sessionbroker.draining";
    /// Spans and log records that no collector got.
    pub const TELEMETRY_DROPPED: &str = "sessionbroker.telemetry.dropped";
}
