//! How a transaction begins: its options as SQL.
//!
//! Invariant: what a caller names stands in quotes that no name or value can leave.

use std::time::Duration;

use crate::broker::engine::{IsolationLevel, TransactionOptions};

/// The run-time parameters that hold PostgreSQL's own timeouts.
pub(super) const STATEMENT_TIMEOUT: &str = "statement_timeout";
pub(super) const IDLE_TIMEOUT: &str = "idle_in_transaction_session_timeout";

/// A timeout set at login.
#[derive(Debug, Clone, Copy)]
pub(super) enum LoginTimeout {
    /// The engine's own, which a transaction's may tighten but not loosen.
    Engine(Duration),
    /// What most transactions want.
    Usual(Duration),
}

/// The timeouts set at login that transactions set too.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoginTimeouts {
    pub(super) statement: Option<LoginTimeout>,
    pub(super) idle: Option<LoginTimeout>,
}

impl LoginTimeout {
    /// Whether it does for a transaction that wants `timeout`.
    fn serves(self, timeout: Duration) -> bool {
        match self {
            Self::Engine(own) => timeout >= own,
            Self::Usual(usual) => timeout == usual,
        }
    }
}

/// What begins a transaction. It can fail, if only for being cancelled: what is not to run outside of the transaction is
/// sent behind its answer, or shares its Sync.
pub(super) const BEGIN: &str = "BEGIN";

/// What is set behind [`BEGIN`].
pub(super) fn settings_sql(options: &TransactionOptions, at_login: &LoginTimeouts) -> Vec<String> {
    let TransactionOptions { isolation_level, read_only, deferrable, lock_timeout, role, settings, nets } = options;
    let mut commands = Vec::new();
    let modes: Vec<_> = [
        isolation_level.map(|level| match level {
            IsolationLevel::ReadUncommitted => "ISOLATION LEVEL READ UNCOMMITTED",
            IsolationLevel::ReadCommitted => "ISOLATION LEVEL READ COMMITTED",
            IsolationLevel::RepeatableRead => "ISOLATION LEVEL REPEATABLE READ",
            IsolationLevel::Serializable => "ISOLATION LEVEL SERIALIZABLE",
        }),
        read_only.map(|read_only| if read_only { "READ ONLY" } else { "READ WRITE" }),
        deferrable.map(|deferrable| if deferrable { "DEFERRABLE" } else { "NOT DEFERRABLE" }),
    ]
    .into_iter()
    .flatten()
    .collect();
    if !modes.is_empty() {
        commands.push(format!("SET TRANSACTION {}", modes.join(", ")));
    }
    let timeouts = [
        (STATEMENT_TIMEOUT, Some(nets.statement), at_login.statement),
        (IDLE_TIMEOUT, Some(nets.idle), at_login.idle),
        ("lock_timeout", *lock_timeout, None),
    ];
    for (name, value, at_login) in timeouts {
        if let Some(value) = value.filter(|value| !at_login.is_some_and(|at_login| at_login.serves(*value))) {
            commands.push(format!("SET LOCAL {name} = {}", value.as_millis()));
        }
    }
    // The settings first: the role may not be allowed to set them.
    if !settings.is_empty() {
        let set = settings.iter().map(|(name, value)| {
            format!("pg_catalog.set_config({}, {}, true)", quoted_literal(name), quoted_literal(value))
        });
        commands.push(format!("SELECT {}", set.collect::<Vec<_>>().join(", ")));
    }
    if let Some(role) = role {
        commands.push(format!("SET LOCAL ROLE {}", quoted_identifier(role)));
    }
    commands
}

/// A name as SQL writes it.
pub(super) fn quoted_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as SQL writes it, whatever standard_conforming_strings says.
pub(super) fn quoted_literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}
