//! One SQL statement with its parameters, and the result it brings.
//!
//! Invariant: a [`Statement`] that exists has passed the guard: it is not empty, holds no NUL, controls no transaction
//! and starts no COPY over the session's connection.

use std::sync::Arc;

use super::error::{Error, PgError};
use super::guard;
pub use super::guard::Kind;
use super::value::Value;

/// The longest SQL text. Data belongs into parameters; PostgreSQL parses a mebibyte in tens of milliseconds.
pub const SQL_BYTES_MAX: usize = 1024 * 1024;

/// The most parameters PostgreSQL's protocol can carry in one statement.
pub const PARAMETERS_MAX: usize = 65_535;

/// The most notices an answer carries; more are dropped, so that a loop of RAISE NOTICE stays harmless.
pub const NOTICES_MAX: usize = 100;

/// The most statements of one batch: what a loader sends at a time, and few enough to be bounded by one timeout.
pub const BATCH_MAX: usize = 10_000;

/// A statement that may run.
#[derive(Debug, Clone)]
pub struct Statement {
    sql: Arc<str>,
    kind: Kind,
    parameters: Vec<Parameter>,
}

/// A parameter, `$1` first.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its value.
    pub value: Value,
    /// Its type, when the caller names it.
    pub type_name: Option<String>,
}

impl Statement {
    /// Checks all that can be known without PostgreSQL.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn new(sql: String, parameters: Vec<Parameter>) -> Result<Self, Error> {
        if sql.len() > SQL_BYTES_MAX {
            let problem = format!("is {} bytes long, the limit is {SQL_BYTES_MAX}: pass data as parameters", sql.len());
            return Err(Error::invalid("sql", problem));
        }
        if sql.contains('\0') {
            return Err(Error::invalid("sql", "holds a NUL character, which PostgreSQL cannot store"));
        }
        let kind = guard::check(&sql).map_err(|problem| Error::invalid("sql", problem))?;
        Self { sql: sql.into(), kind, parameters: Vec::new() }.with(parameters)
    }

    /// The same statement with other parameters.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they are too many.
    pub fn with(&self, parameters: Vec<Parameter>) -> Result<Self, Error> {
        if parameters.len() > PARAMETERS_MAX {
            let problem = format!("are {}, the limit is {PARAMETERS_MAX}: pass arrays", parameters.len());
            return Err(Error::invalid("parameters", problem));
        }
        Ok(Self { sql: self.sql.clone(), kind: self.kind, parameters })
    }

    /// What its leading word says of it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether its text names this function or command, in lower case; it may do so in passing.
    pub fn mentions(&self, name: &str) -> bool {
        self.sql.as_bytes().windows(name.len()).any(|text| text.eq_ignore_ascii_case(name.as_bytes()))
    }

    /// The SQL text.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// The SQL text, to keep.
    pub fn shared_sql(&self) -> Arc<str> {
        self.sql.clone()
    }

    /// Whether what is prepared for one will do for the other: the same text, and the same types named.
    pub fn prepares_like(&self, other: &Self) -> bool {
        let types = self.parameters.iter().map(|parameter| &parameter.type_name);
        self.sql == other.sql && types.eq(other.parameters.iter().map(|parameter| &parameter.type_name))
    }

    /// The parameters, `$1` first.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }
}

/// How large a result may be.
#[derive(Debug, Clone, Copy)]
pub struct ResultLimits {
    /// Rows.
    pub rows_max: u64,
    /// Bytes of all values as encoded in the answer.
    pub bytes_max: usize,
}

/// A complete result.
#[derive(Debug, Clone, Default)]
pub struct ResultSet {
    /// None when the statement returns no rows.
    pub columns: Vec<Column>,
    /// One value per column.
    pub rows: Vec<Vec<Value>>,
    /// Rows returned, or affected when it returns none.
    pub row_count: u64,
    /// As PostgreSQL sent it: "INSERT 0 1".
    pub command_tag: String,
    /// What the statement raised, at most [`NOTICES_MAX`].
    pub notices: Vec<PgError>,
    /// How many bytes of the limit its values have taken.
    pub bytes: usize,
}

impl ResultSet {
    /// About how many bytes it takes to keep.
    pub(super) fn kept_bytes(&self) -> usize {
        /// A value, a column or a notice, without its text.
        const EACH: usize = 64;
        let values: usize = self.rows.iter().map(Vec::len).sum();
        self.bytes + (1 + values + self.columns.len() + self.notices.len()) * EACH
    }
}

/// A column of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name; names may repeat.
    pub name: String,
    /// `pg_type.oid`.
    pub type_oid: u32,
    /// `pg_type.typname`.
    pub type_name: String,
    /// As in varchar(10); -1 for none.
    pub type_modifier: i32,
    /// `pg_class.oid`, when the column is a table's.
    pub table_oid: Option<u32>,
    /// `pg_attribute.attnum`, when the column is a table's.
    pub column_number: Option<i16>,
}
