//! The driver's errors and notices as the domain's.

use tokio_postgres::error::{DbError, ErrorPosition};

use crate::broker::error::PgError;

/// Every field PostgreSQL sent, within the limits of [`PgError::bounded`].
pub(super) fn pg_error(error: &DbError) -> PgError {
    let text = |field: Option<&str>| field.map(str::to_owned);
    let (position, internal_position, internal_query) = match error.position() {
        None => (None, None, None),
        Some(ErrorPosition::Original(position)) => (Some(*position), None, None),
        Some(ErrorPosition::Internal { position, query }) => (None, Some(*position), Some(query.clone())),
    };
    PgError {
        // The parsed severity is the one that no lc_messages translates.
        severity: error.parsed_severity().map_or_else(|| error.severity().to_owned(), |severity| severity.to_string()),
        sqlstate: error.code().code().to_owned(),
        message: error.message().to_owned(),
        detail: text(error.detail()),
        hint: text(error.hint()),
        position,
        internal_position,
        internal_query,
        where_: text(error.where_()),
        schema: text(error.schema()),
        table: text(error.table()),
        column: text(error.column()),
        datatype: text(error.datatype()),
        constraint: text(error.constraint()),
        file: text(error.file()),
        line: error.line(),
        routine: text(error.routine()),
    }
    .bounded()
}
