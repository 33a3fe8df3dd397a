//! One SQL statement with its parameters, and the result it brings.
//!
//! Invariant: a [`Statement`] that exists has passed the guard: it is not empty, holds no NUL, controls no transaction
//! and starts no COPY over the session's connection.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::error::{Error, PgError};
use super::guard;
pub use super::guard::Kind;
use super::value::{Value, ValueRef};

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
    operation: &'static str,
    may_set: bool,
    may_notify: bool,
    parameters: Vec<Parameter>,
    expectation: Option<Expectation>,
}

/// What must come of a statement, or its transaction is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expectation {
    /// So many rows returned or affected.
    Exactly(u64),
    /// So many or more.
    AtLeast(u64),
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
        let (kind, operation) = guard::check(&sql).map_err(|problem| Error::invalid("sql", problem))?;
        let may_set = mentions(&sql, b"set_config") || mentions(&sql, b"setseed");
        let may_notify = mentions(&sql, b"notify");
        let statement =
            Self { sql: sql.into(), kind, operation, may_set, may_notify, parameters: Vec::new(), expectation: None };
        statement.with(parameters)
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
        Ok(Self { sql: self.sql.clone(), parameters, ..*self })
    }

    /// The same statement, of which something is expected.
    #[must_use]
    pub fn expecting(self, expectation: Option<Expectation>) -> Self {
        Self { expectation, ..self }
    }

    /// Says what is not as expected.
    ///
    /// # Errors
    /// [`Error::ExpectationFailed`], and [`Error::Invalid`] when the statement counts no rows.
    pub fn check(&self, result: &ResultSet) -> Result<(), Error> {
        let count = result.row_count;
        let expected = match self.expectation {
            None => return Ok(()),
            Some(_) if !result.counts() => {
                let problem = format!("is for statements that count rows: {} counts none", result.command_tag);
                return Err(Error::invalid("expectation", problem));
            }
            Some(Expectation::Exactly(expected)) if count == expected => return Ok(()),
            Some(Expectation::AtLeast(expected)) if count >= expected => return Ok(()),
            Some(Expectation::Exactly(expected)) => format!("exactly {expected}"),
            Some(Expectation::AtLeast(expected)) => format!("at least {expected}"),
        };
        Err(Error::ExpectationFailed { count, expected })
    }

    /// What its leading word says of it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What it does, in a word of SQL's: one of a few dozen.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// What it does to which table, as far as its beginning tells; no value of it.
    pub(super) fn summary(&self) -> String {
        /// Longer names are nobody's.
        const NAME_BYTES_MAX: usize = 127;

        match guard::target(&self.sql).filter(|name| name.len() <= NAME_BYTES_MAX) {
            Some(name) => format!("{} {name}", self.operation),
            None => self.operation.to_owned(),
        }
    }

    /// Whether it may change what others' statements are prepared for: tables that are not its session's own.
    pub fn may_change_tables(&self) -> bool {
        matches!(self.operation, "ALTER" | "CREATE" | "DROP") && !mentions(&self.sql, b"temp")
    }

    /// Whether its text names set_config or setseed, of which a SELECT is a SET.
    pub fn may_set(&self) -> bool {
        self.may_set
    }

    /// Whether its text names NOTIFY or pg_notify.
    pub fn may_notify(&self) -> bool {
        self.may_notify
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

/// Whether a text holds a word, given in lower case; it may do so in passing.
fn mentions(sql: &str, word: &[u8]) -> bool {
    sql.as_bytes().windows(word.len()).any(|text| text[0] | 0x20 == word[0] && text.eq_ignore_ascii_case(word))
}

/// How large a result may be.
#[derive(Debug, Clone, Copy)]
pub struct ResultLimits {
    /// Rows.
    pub rows_max: u64,
    /// Bytes of all values as encoded in the answer, and of the columns of all results but the first. Of a stream: of one
    /// row.
    pub bytes_max: usize,
    /// Bytes of one value as PostgreSQL sends it.
    pub value_bytes_max: usize,
}

impl ResultLimits {
    /// For statements of our own.
    pub(super) const NONE: Self = Self { rows_max: u64::MAX, bytes_max: usize::MAX, value_bytes_max: usize::MAX };
}

/// How rows are returned.
#[derive(Debug, Clone, Copy)]
pub enum ResultFormat {
    /// As values.
    Values,
    /// As values that are written as soon as they are read.
    Written(ValueWriter),
    /// As PostgreSQL sent them.
    Packed,
}

/// Writes a value as the caller's protocol has it.
pub type ValueWriter = fn(&mut BytesMut, ValueRef<'_>);

/// PostgreSQL's format of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireFormat {
    /// Its text form.
    Text,
    /// Its binary form.
    Binary,
}

/// Some rows.
#[derive(Debug, Clone, Default)]
pub struct Rows {
    /// One value per column, with [`ResultFormat::Values`].
    pub values: Vec<Vec<Value>>,
    /// Each row's values, one behind the other, with [`ResultFormat::Written`].
    pub written: Vec<Bytes>,
    /// For each row and column its length as a big-endian i32, -1 for NULL, and its bytes, with
    /// [`ResultFormat::Packed`].
    pub packed: Bytes,
    /// How many they are.
    pub count: u64,
}

/// A complete result.
#[derive(Debug, Clone, Default)]
pub struct ResultSet {
    /// None when the statement returns no rows.
    pub columns: Vec<Column>,
    /// None of a stream: they have gone before.
    pub rows: Rows,
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
    /// Whether its statement counts rows: then its tag ends with the number.
    fn counts(&self) -> bool {
        self.command_tag.ends_with(|c: char| c.is_ascii_digit())
    }

    /// About how many bytes it takes to keep.
    pub(super) fn kept_bytes(&self) -> usize {
        /// A value, a column or a notice, without its text.
        const EACH: usize = 64;
        let values: usize = self.rows.values.iter().map(Vec::len).sum();
        let names: usize = self.columns.iter().map(|column| column.name.len() + column.type_name.len()).sum();
        let notices: usize = self.notices.iter().map(PgError::text_bytes).sum();
        self.bytes + names + notices + (1 + values + self.columns.len() + self.notices.len()) * EACH
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
    /// How packed rows hold it; `None` when they are not packed.
    pub wire_format: Option<WireFormat>,
}
