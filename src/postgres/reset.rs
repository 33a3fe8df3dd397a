//! What cleans a connection between two transactions: messages that go behind what ends the first, and share its Sync.

use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};

use super::wire::message;

/// How thoroughly a connection is cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checks {
    /// For use by whoever is next.
    All,
    /// For use by the same principal.
    Trusting,
}

/// How many statements [`preparation`] prepares, all or none.
pub(super) const PREPARED: u32 = 7;

/// What `DISCARD ALL` does, but for the prepared statements, which are kept with their plans.
///
/// It runs as the login role, so every name in it is PostgreSQL's own: a caller may have made its namesake in a schema on
/// the path.
const COMMANDS: [&str; PREPARED as usize] = [
    "CLOSE ALL",
    "SET SESSION AUTHORIZATION DEFAULT",
    "RESET ALL",
    "UNLISTEN *",
    "DISCARD TEMP",
    "DISCARD SEQUENCES",
    "SELECT pg_catalog.pg_advisory_unlock_all()",
];

/// A new seed for random(), and a count of the prepared statements: those that callers have left cannot be dropped alone,
/// and those of the broker that callers have dropped cannot be brought back, so either costs the connection.
///
/// It costs PostgreSQL as much as the rest of a short transaction. So it is left out behind one that showed nothing but
/// SELECT, INSERT, UPDATE, DELETE and MERGE, as long as all connections of the pool are one principal's.
const PROOF: &str = "SELECT \
    pg_catalog.setseed(pg_catalog.hashtext(pg_catalog.gen_random_uuid()::pg_catalog.text)::pg_catalog.float8 \
        OPERATOR(pg_catalog./) 2147483648::pg_catalog.float8), \
    pg_catalog.count(*) FILTER (WHERE from_sql), pg_catalog.count(*) FILTER (WHERE NOT from_sql) \
    FROM pg_catalog.pg_prepared_statement()";

/// Whether this is what [`Checks::All`] returns when all prepared statements are the broker's, and there are so many.
pub(super) fn proves(row: &[u8], prepared: i64) -> bool {
    let mut expected = BytesMut::new();
    message::put_row(&["", "0", &prepared.to_string()], &mut expected);
    row == expected
}

/// Prepares the commands, on a connection that has just been opened.
pub(super) fn preparation() -> Bytes {
    let mut messages = BytesMut::new();
    for (index, command) in COMMANDS.into_iter().enumerate() {
        message::parse(&name(index), command, &mut messages);
    }
    messages.freeze()
}

/// Runs the commands, as they have been prepared or else in full. With [`Checks::All`] the last row is to be proof that they
/// did all there is to do.
pub(super) fn commands(checks: Checks, are_prepared: bool) -> Bytes {
    static AS_PREPARED: LazyLock<Bytes> = LazyLock::new(|| {
        let mut messages = BytesMut::new();
        for index in 0..COMMANDS.len() {
            message::run(&name(index), &mut messages);
        }
        messages.freeze()
    });
    static IN_FULL: LazyLock<Bytes> = LazyLock::new(|| {
        let mut messages = BytesMut::new();
        for command in COMMANDS {
            message::parse("", command, &mut messages);
            message::run("", &mut messages);
        }
        messages.freeze()
    });
    let commands = if are_prepared { &*AS_PREPARED } else { &*IN_FULL };
    match checks {
        Checks::Trusting => commands.clone(),
        Checks::All => {
            let mut messages = BytesMut::from(&**commands);
            message::parse("", PROOF, &mut messages);
            message::run("", &mut messages);
            messages.freeze()
        }
    }
}

fn name(index: usize) -> String {
    format!("session_broker_reset_{index}")
}
