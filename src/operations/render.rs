//! What is seen of a broker, as JSON.
//!
//! Knows no HTTP. Invariant: what a session's caller or a foreign program says of itself is not here, neither labels nor
//! an application_name: they may hold anything. All times are in milliseconds.

use std::time::Duration;

use serde_json::{Value, json};

use crate::broker::admin::Blocking;
use crate::broker::admin::watch::{Ending, Reach, Snapshot, Totals, WatchedEngine, WatchedSession};
use crate::broker::engine::{Blocker, EngineInfo, PoolStatistics};
use crate::broker::session::{BackendInfo, Glance, SessionState, TransactionState};

/// What is seen at one instant; `ready` as probes are told.
pub(super) fn snapshot(snapshot: &Snapshot, ready: bool) -> Value {
    let Snapshot { owner, draining, totals, sessions, blockers_complete, engines, endings } = snapshot;
    let Totals { live, in_transaction, failed, running, waiting, blocked } = totals;
    json!({
        "broker": {
            "owner": &**owner,
            "version": env!("CARGO_PKG_VERSION"),
            "ready": ready,
            "draining": draining,
        },
        "totals": {
            "live": live,
            "shown": sessions.len(),
            "in_transaction": in_transaction,
            "failed": failed,
            "running": running,
            "waiting": waiting,
            "blocked": blocked,
        },
        "blockers_complete": blockers_complete,
        "engines": engines.iter().map(engine).collect::<Value>(),
        "sessions": sessions.iter().map(session).collect::<Value>(),
        "endings": endings.iter().map(ending).collect::<Value>(),
    })
}

fn engine(engine: &WatchedEngine) -> Value {
    let WatchedEngine { info: EngineInfo { name, database, user, server_version, pool }, reach } = engine;
    let PoolStatistics { size, overflow_max, open, in_use, idle, waiting, sub_pools, opened, login_failures } = pool;
    let (reachable, cause) = match reach {
        Reach::Unknown => (None, None),
        Reach::Answers => (Some(true), None),
        Reach::Silent(cause) => (Some(false), Some(cause)),
    };
    json!({
        "name": name,
        "database": database,
        "user": user,
        "server_version": server_version,
        "reachable": reachable,
        "cause": cause,
        "pool": {
            "size": size,
            "overflow_max": overflow_max,
            "open": open,
            "in_use": in_use,
            "idle": idle,
            "waiting": waiting,
            "sub_pools": sub_pools,
            "opened": opened,
            "login_failures": login_failures,
        },
    })
}

fn session(session: &WatchedSession) -> Value {
    let WatchedSession { id, principal, engine, profile, one_shot, lease_ttl, glance, blocked_by } = session;
    let Glance { state, age, idle, transaction_age, statement_age, backend } = glance;
    // The transaction's id is its caller's, and so are the times that are advice to it.
    let SessionState {
        transaction,
        transaction_id: _,
        lease_remaining,
        session_remaining,
        transaction_remaining,
        idle_remaining,
        attached,
        renew_after: _,
        draining: _,
    } = state;
    json!({
        "id": id.to_string(),
        "principal": principal.name(),
        "engine": engine,
        "profile": profile,
        "one_shot": one_shot,
        "attached": attached,
        "state": standing(*transaction, glance, !blocked_by.is_empty()),
        "lease_ttl_ms": millis(*lease_ttl),
        "lease_remaining_ms": millis(*lease_remaining),
        "session_remaining_ms": millis(*session_remaining),
        "transaction_remaining_ms": transaction_remaining.map(millis),
        "idle_remaining_ms": millis(*idle_remaining),
        "age_ms": millis(*age),
        "idle_ms": millis(*idle),
        "transaction_age_ms": transaction_age.map(millis),
        "statement_age_ms": statement_age.map(millis),
        "backend_pid": backend.as_ref().map(|BackendInfo { pid, host: _ }| *pid),
        "blocked_by": blocked_by.iter().map(blocking).collect::<Value>(),
    })
}

/// What a session does, in a word.
fn standing(transaction: TransactionState, glance: &Glance, is_blocked: bool) -> &'static str {
    match transaction {
        _ if is_blocked => "blocked",
        _ if glance.statement_age.is_some() && glance.backend.is_none() => "waiting",
        _ if glance.statement_age.is_some() => "running",
        TransactionState::None => "idle",
        TransactionState::Open => "open",
        TransactionState::Failed => "failed",
    }
}

fn blocking(blocking: &Blocking) -> Value {
    let Blocking { backend: Blocker { pid, user, application_name: _, state }, session } = blocking;
    json!({ "pid": pid, "user": user, "state": state, "session": session.map(|id| id.to_string()) })
}

fn ending(ending: &Ending) -> Value {
    let Ending { id, principal, engine, reason, ago } = ending;
    json!({
        "id": id.to_string(),
        "principal": principal.name(),
        "engine": engine,
        "reason": reason.name(),
        "ago_ms": millis(*ago),
    })
}

/// Exact for half a billion years.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
