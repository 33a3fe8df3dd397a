//! How a transaction begins: its options as one text of SQL, sent in one message.
//!
//! Invariant: what a caller names stands in quotes that no name or value can leave.

use std::fmt::Write;
use std::time::Duration;

use crate::broker::engine::{IsolationLevel, TransactionOptions};

/// The engine's own timeouts, which a transaction's may tighten but not loosen.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Nets {
    pub(super) statement: Option<Duration>,
    pub(super) idle: Option<Duration>,
}

/// BEGIN, and the settings of the transaction.
pub(super) fn begin_sql(options: &TransactionOptions, nets: &Nets) -> String {
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

/// A name as SQL writes it.
pub(super) fn quoted_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as SQL writes it, whatever standard_conforming_strings says.
pub(super) fn quoted_literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}
