//! Values on the way to and from PostgreSQL.
//!
//! Results of the types that are read here come in PostgreSQL's binary form, all others as the text that PostgreSQL
//! prints. Parameters go out as text, which every type reads and no type misreads; bytea alone goes as it is. Invariant: a
//! value that cannot be carried without loss is refused with its place in the request, before anything is sent.

use std::collections::HashMap;
use std::sync::LazyLock;

use bytes::{BufMut, Bytes, BytesMut};
use tokio_postgres::types::{Format, FromSql, IsNull, Kind, ToSql, Type, to_sql_checked};

use super::array_literal::{self, DIMENSIONS_MAX, Item};
use super::begin::quoted_literal;
use super::text_form::{self, Malformed};
use crate::broker::error::Error;
use crate::broker::statement::{Parameter, WireFormat};
use crate::broker::value::{List, Value, ValueRef};
use crate::hex;

type BoxError = Box<dyn std::error::Error + Sync + Send>;

/// The first oid that PostgreSQL does not give by hand.
const NOT_BUILT_IN: u32 = 16_384;

/// A type this broker carries: how its binary form reads and which kinds of value it takes.
#[derive(Debug, Clone, Copy)]
enum Carried {
    Bool,
    Int2,
    Int4,
    Int8,
    Oid,
    Float4,
    Float8,
    Numeric,
    Bytea,
    /// Its binary form is its text.
    Text,
    /// Its binary form is a version byte and its text.
    Jsonb,
    /// Its binary form has this text.
    Printed(fn(&[u8]) -> Result<String, Malformed>),
}

impl Carried {
    fn of(type_: &Type) -> Option<Self> {
        Some(match *type_ {
            Type::BOOL => Self::Bool,
            Type::INT2 => Self::Int2,
            Type::INT4 => Self::Int4,
            Type::INT8 => Self::Int8,
            Type::OID => Self::Oid,
            Type::FLOAT4 => Self::Float4,
            Type::FLOAT8 => Self::Float8,
            Type::NUMERIC => Self::Numeric,
            Type::BYTEA => Self::Bytea,
            Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME | Type::UNKNOWN | Type::JSON | Type::VOID => {
                Self::Text
            }
            Type::JSONB => Self::Jsonb,
            Type::UUID => Self::Printed(text_form::uuid),
            Type::DATE => Self::Printed(text_form::date),
            Type::TIME => Self::Printed(text_form::time),
            Type::TIMETZ => Self::Printed(text_form::timetz),
            Type::TIMESTAMP => Self::Printed(text_form::timestamp),
            Type::TIMESTAMPTZ => Self::Printed(text_form::timestamptz),
            Type::INTERVAL => Self::Printed(text_form::interval),
            _ => match type_.kind() {
                Kind::Enum(_) => Self::Text,
                Kind::Domain(base) => return Self::of(base),
                _ => return None,
            },
        })
    }

    fn decode(self, bytes: &[u8]) -> Result<ValueRef<'_>, Malformed> {
        Ok(match self {
            Self::Bool => ValueRef::Bool(u8::from_be_bytes(fixed(bytes)?) != 0),
            Self::Int2 => ValueRef::Int(i16::from_be_bytes(fixed(bytes)?).into()),
            Self::Int4 => ValueRef::Int(i32::from_be_bytes(fixed(bytes)?).into()),
            Self::Int8 => ValueRef::Int(i64::from_be_bytes(fixed(bytes)?)),
            Self::Oid => ValueRef::Int(u32::from_be_bytes(fixed(bytes)?).into()),
            Self::Float4 => ValueRef::Double(f32::from_be_bytes(fixed(bytes)?).into()),
            Self::Float8 => ValueRef::Double(f64::from_be_bytes(fixed(bytes)?)),
            Self::Numeric => ValueRef::Text(text_form::numeric(bytes)?.into()),
            Self::Bytea => ValueRef::Bytes(bytes),
            Self::Text => ValueRef::Text(utf8(bytes)?.into()),
            Self::Jsonb => match bytes.split_first() {
                Some((1, text)) => ValueRef::Text(utf8(text)?.into()),
                _ => return Err(Malformed),
            },
            Self::Printed(print) => ValueRef::Text(print(bytes)?.into()),
        })
    }

    /// The text PostgreSQL reads for `value`, or what is wrong with it.
    fn print(self, value: &Value) -> Result<String, String> {
        match (self, value) {
            (_, Value::Text(text)) if text.contains('\0') => {
                Err("holds a NUL character, which PostgreSQL cannot store".into())
            }
            (_, Value::Text(text)) => Ok(text.clone()),
            (Self::Bool, Value::Bool(value)) => Ok(value.to_string()),
            (Self::Int2, Value::Int(value)) => in_range(*value, i16::MIN.into(), i16::MAX.into(), "int2"),
            (Self::Int4, Value::Int(value)) => in_range(*value, i32::MIN.into(), i32::MAX.into(), "int4"),
            (Self::Oid, Value::Int(value)) => in_range(*value, 0, u32::MAX.into(), "oid"),
            (Self::Int8 | Self::Numeric, Value::Int(value)) => Ok(value.to_string()),
            (Self::Float4, Value::Int(value)) => exactly(*value, f32::MANTISSA_DIGITS, "float4"),
            (Self::Float8, Value::Int(value)) => exactly(*value, f64::MANTISSA_DIGITS, "float8"),
            (Self::Float4, Value::Double(value)) => float4(*value),
            (Self::Float8 | Self::Numeric, Value::Double(value)) => Ok(float(*value)),
            (Self::Bytea, Value::Bytes(bytes)) => Ok(bytea(bytes)),
            (wanted, value) => Err(format!("is a {}: {}", value.kind(), wanted.wants())),
        }
    }

    fn wants(self) -> &'static str {
        match self {
            Self::Bool => "bool takes a bool_value",
            Self::Int2 | Self::Int4 | Self::Int8 | Self::Oid => "integers take an int_value",
            Self::Float4 | Self::Float8 | Self::Numeric => {
                "numbers take a double_value, an int_value or a string_value"
            }
            Self::Bytea => "bytea takes a bytes_value",
            Self::Text | Self::Jsonb | Self::Printed(_) => "this type takes a string_value",
        }
    }
}

/// A type as a caller names it.
#[derive(Debug)]
pub(super) enum NamedType {
    /// PostgreSQL's own.
    BuiltIn(Type),
    /// One that the database has, or not.
    Database(DatabaseType),
}

/// A type that PostgreSQL has to be asked for: in its schema, or the first on the search path.
#[derive(Debug)]
pub(super) struct DatabaseType {
    pub(super) schema: Option<String>,
    name: String,
    array: bool,
}

impl DatabaseType {
    /// What PostgreSQL is asked: it answers with its oid, or 0, or nothing.
    pub(super) fn question(&self) -> String {
        let Self { schema, name, array } = self;
        let oid = if *array { "typarray" } else { "oid" };
        let place = match schema {
            Some(schema) => format!("nspname OPERATOR(pg_catalog.=) {}", quoted_literal(schema)),
            None => "pg_catalog.pg_type_is_visible(type.oid)".to_owned(),
        };
        format!(
            "SELECT type.{oid} FROM pg_catalog.pg_type AS type \
             JOIN pg_catalog.pg_namespace AS schema ON schema.oid OPERATOR(pg_catalog.=) typnamespace \
             WHERE typname OPERATOR(pg_catalog.=) {} AND {place}",
            quoted_literal(name)
        )
    }
}

/// The type a caller names: "uuid", "int4[]", "my_schema.mood".
///
/// # Errors
/// What is wrong with the name.
pub(super) fn named_type(text: &str) -> Result<NamedType, String> {
    /// SQL's own names for PostgreSQL's types.
    const SQL: [(&str, &str); 14] = [
        ("smallint", "int2"),
        ("int", "int4"),
        ("integer", "int4"),
        ("bigint", "int8"),
        ("real", "float4"),
        ("double precision", "float8"),
        ("decimal", "numeric"),
        ("boolean", "bool"),
        ("character varying", "varchar"),
        ("character", "bpchar"),
        ("time without time zone", "time"),
        ("time with time zone", "timetz"),
        ("timestamp without time zone", "timestamp"),
        ("timestamp with time zone", "timestamptz"),
    ];
    static BUILT_IN: LazyLock<HashMap<String, Type>> = LazyLock::new(|| {
        /// Past the last oid that PostgreSQL gives by hand.
        const OIDS: std::ops::Range<u32> = 1..10_000;
        OIDS.filter_map(Type::from_oid).map(|type_| (type_.name().to_owned(), type_)).collect()
    });

    let (name, array) = text.strip_suffix("[]").map_or((text, false), |element| (element, true));
    let is_name = |name: &str| (1..=63).contains(&name.len()) && !name.contains(['(', ')', '[', ']', '"', '\0']);
    let built_in = SQL.iter().find(|(sql, _)| *sql == name).map_or(name, |(_, name)| *name);
    let key = if array { format!("_{built_in}") } else { built_in.to_owned() };
    if let Some(type_) = BUILT_IN.get(&key) {
        return Ok(NamedType::BuiltIn(type_.clone()));
    }
    let (schema, name) = name.split_once('.').map_or((None, name), |(schema, name)| (Some(schema), name));
    if !is_name(name) || !schema.is_none_or(is_name) {
        return Err(format!(
            "{text:?} is no type's name: give it as PostgreSQL has it in pg_type, such as \"numeric\", \"int4[]\" or \
             \"my_schema.my_type\", without modifiers and quotes"
        ));
    }
    Ok(NamedType::Database(DatabaseType { schema: schema.map(str::to_owned), name: name.to_owned(), array }))
}

/// The format in which PostgreSQL is asked for results of the type: binary where that is read here, and otherwise its own
/// text.
pub fn format(type_: &Type) -> WireFormat {
    let read = match element(type_) {
        Some(element) => Carried::of(element),
        None if is_word(type_) => None,
        None => Carried::of(type_),
    };
    if read.is_some() { WireFormat::Binary } else { WireFormat::Text }
}

/// The same for results that are passed on as they are. Who reads them cannot know what an array of a domain is made of:
/// its type is the database's own.
pub(super) fn packed_format(type_: &Type) -> WireFormat {
    match element(type_).map(Type::kind) {
        Some(Kind::Domain(_)) => WireFormat::Text,
        _ => format(type_),
    }
}

/// Why a result's value is not returned.
#[derive(Debug)]
pub enum Refusal {
    /// It takes more bytes than are left.
    TooLarge,
    /// What is wrong with it; never the value.
    Unreadable(String),
}

/// Reads a result's value, and takes its size in the answer off `bytes_left`. Text can be thousands of times longer than
/// its binary form, so the size is looked at element by element.
///
/// # Errors
/// [`Refusal`].
pub fn decode<'a>(
    type_: &Type,
    format: WireFormat,
    delimiters: &Delimiters,
    bytes: Option<&'a [u8]>,
    bytes_left: &mut usize,
) -> Result<ValueRef<'a>, Refusal> {
    let Some(bytes) = bytes else { return spend(ValueRef::Null, bytes_left) };
    // No type's text is shorter than half of its binary form.
    if bytes.len() / 2 > *bytes_left {
        return Err(Refusal::TooLarge);
    }
    match (format, element(type_)) {
        (WireFormat::Binary, Some(element)) => decode_array(element, bytes, bytes_left).map(ValueRef::List),
        (WireFormat::Binary, None) => decode_scalar(type_, bytes, bytes_left),
        (WireFormat::Text, Some(element)) => {
            read_array(element, delimiters.of(element), bytes, bytes_left).map(ValueRef::List)
        }
        (WireFormat::Text, None) => {
            let text = utf8(bytes).map_err(|malformed| unreadable(type_, malformed))?;
            spend(ValueRef::Text(text.into()), bytes_left)
        }
    }
}

/// What an array's elements are.
fn element(type_: &Type) -> Option<&Type> {
    match type_.kind() {
        Kind::Array(element) if !is_word(type_) => Some(element),
        // Not arrays by their kind.
        _ if *type_ == Type::RECORD_ARRAY => Some(&Type::RECORD),
        _ if *type_ == Type::CSTRING_ARRAY => Some(&Type::CSTRING),
        _ => None,
    }
}

fn is_vector(type_: &Type) -> bool {
    matches!(*type_, Type::INT2_VECTOR | Type::OID_VECTOR)
}

/// An array to the catalog, and a word to everybody else: it has elements, but its text is not an array's. PostgreSQL has
/// two of them; of an extension's types it names the arrays itself, with an underscore.
fn is_word(type_: &Type) -> bool {
    let is_built_in = type_.oid() < NOT_BUILT_IN;
    let is_array = || if is_built_in { !is_vector(type_) } else { type_.name().starts_with('_') };
    matches!(type_.kind(), Kind::Array(_)) && !is_array()
}

/// Reads an array of what has no binary form that is read here.
fn read_array(element: &Type, delimiter: char, bytes: &[u8], bytes_left: &mut usize) -> Result<List, Refusal> {
    let text = std::str::from_utf8(bytes).map_err(|_| unreadable(element, Malformed))?;
    array_literal::parse(text, delimiter, |item| {
        let value = match item {
            // Its own size is spent like an empty list's.
            Item::List => ValueRef::List(List { values: Vec::new(), lower_bounds: Vec::new() }),
            Item::Null => ValueRef::Null,
            Item::Text(text) => ValueRef::Text(text.into()),
        };
        spend(value, bytes_left).map(Value::from)
    })
}

/// What stands between the elements of arrays' literals: a comma, but for a few types.
#[derive(Debug, Clone, Default)]
pub struct Delimiters(HashMap<u32, char>);

impl Delimiters {
    /// The type of a result or a parameter whose arrays' delimiter is not known: one that an extension has brought.
    pub(super) fn lacks(&self, type_: &Type) -> Option<u32> {
        let element = base(element(base(type_))?);
        let is_simple = *element.kind() == Kind::Simple || is_word(element);
        let is_unknown = is_simple && element.oid() >= NOT_BUILT_IN;
        (is_unknown && !self.0.contains_key(&element.oid())).then(|| element.oid())
    }

    /// Notes what PostgreSQL says.
    pub(super) fn note(&mut self, oid: u32, delimiter: char) {
        self.0.insert(oid, delimiter);
    }

    fn of(&self, element: &Type) -> char {
        let element = base(element);
        match self.0.get(&element.oid()) {
            Some(delimiter) => *delimiter,
            None if *element == Type::BOX => ';',
            None => ',',
        }
    }
}

impl From<Malformed> for Refusal {
    fn from(Malformed: Malformed) -> Self {
        Self::Unreadable("an array is not in its text form".into())
    }
}

fn spend<'a>(value: ValueRef<'a>, bytes_left: &mut usize) -> Result<ValueRef<'a>, Refusal> {
    *bytes_left = bytes_left.checked_sub(value.encoded_len()).ok_or(Refusal::TooLarge)?;
    Ok(value)
}

fn decode_scalar<'a>(type_: &Type, bytes: &'a [u8], bytes_left: &mut usize) -> Result<ValueRef<'a>, Refusal> {
    let value = Carried::of(type_).ok_or(Malformed).and_then(|carried| carried.decode(bytes));
    spend(value.map_err(|malformed| unreadable(type_, malformed))?, bytes_left)
}

fn unreadable(type_: &Type, Malformed: Malformed) -> Refusal {
    Refusal::Unreadable(format!("a value of type {} is not in its binary form, or not UTF-8", type_.name()))
}

fn decode_array(element: &Type, mut rest: &[u8], bytes_left: &mut usize) -> Result<List, Refusal> {
    let malformed = |malformed| unreadable(element, malformed);
    let dimensions = i32::from_be_bytes(take(&mut rest).map_err(malformed)?);
    let _has_nulls: [u8; 4] = take(&mut rest).map_err(malformed)?;
    let _element_oid: [u8; 4] = take(&mut rest).map_err(malformed)?;
    let dimensions = usize::try_from(dimensions).ok().filter(|dimensions| *dimensions <= DIMENSIONS_MAX);
    let (mut lengths, mut lower_bounds) = (Vec::new(), Vec::new());
    for _ in 0..dimensions.ok_or(Malformed).map_err(malformed)? {
        let length = i32::from_be_bytes(take(&mut rest).map_err(malformed)?);
        // An empty array has no dimensions.
        let length = usize::try_from(length).ok().filter(|length| *length > 0);
        lengths.push(length.ok_or(Malformed).map_err(malformed)?);
        lower_bounds.push(i32::from_be_bytes(take(&mut rest).map_err(malformed)?));
    }
    if lower_bounds.iter().all(|bound| *bound == 1) {
        lower_bounds.clear();
    }
    // Each element has a length of four bytes, so a hostile count allocates no more than was sent.
    let count = lengths.iter().try_fold(1_usize, |count, length| count.checked_mul(*length));
    if count.is_none_or(|count| !lengths.is_empty() && count > rest.len() / 4) {
        return Err(malformed(Malformed));
    }
    let values = decode_dimension(element, &lengths, &mut rest, bytes_left)?;
    if rest.is_empty() { Ok(List { values, lower_bounds }) } else { Err(malformed(Malformed)) }
}

/// The elements, or rows, of an array's outermost dimension.
fn decode_dimension(
    element: &Type,
    lengths: &[usize],
    rest: &mut &[u8],
    bytes_left: &mut usize,
) -> Result<Vec<Value>, Refusal> {
    let malformed = |malformed| unreadable(element, malformed);
    let Some((length, inner)) = lengths.split_first() else { return Ok(Vec::new()) };
    let mut values = Vec::with_capacity(*length);
    for _ in 0..*length {
        if !inner.is_empty() {
            // Its own size is spent like an empty list's.
            spend(ValueRef::List(List { values: Vec::new(), lower_bounds: Vec::new() }), bytes_left)?;
            let values_of_row = decode_dimension(element, inner, rest, bytes_left)?;
            values.push(Value::List(List { values: values_of_row, lower_bounds: Vec::new() }));
            continue;
        }
        values.push(match i32::from_be_bytes(take(rest).map_err(malformed)?) {
            -1 => spend(ValueRef::Null, bytes_left)?.into(),
            length => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                let (bytes, after) = rest.split_at_checked(length).ok_or(Malformed).map_err(malformed)?;
                *rest = after;
                decode_scalar(element, bytes, bytes_left)?.into()
            }
        });
    }
    Ok(values)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (first, after) = rest.split_first_chunk().ok_or(Malformed)?;
    *rest = after;
    Ok(*first)
}

fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Malformed> {
    bytes.try_into().map_err(|_| Malformed)
}

fn utf8(bytes: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(bytes).map_err(|_| Malformed)
}

/// A column's value as it came.
pub(super) struct Raw<'a>(pub(super) Option<&'a [u8]>);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, bytes: &'a [u8]) -> Result<Self, BoxError> {
        Ok(Self(Some(bytes)))
    }

    fn from_sql_null(_: &Type) -> Result<Self, BoxError> {
        Ok(Self(None))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// A parameter ready to be sent.
pub enum Encoded {
    /// NULL.
    Null,
    /// In text form.
    Text(String),
    /// In binary form.
    Binary(Bytes),
}

// Debug is the driver's demand; it must not show the value.
impl std::fmt::Debug for Encoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<parameter>")
    }
}

impl ToSql for Encoded {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, BoxError> {
        match self {
            Self::Null => return Ok(IsNull::Yes),
            Self::Text(text) => out.put_slice(text.as_bytes()),
            Self::Binary(bytes) => out.put_slice(bytes),
        }
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        match self {
            Self::Binary(_) => Format::Binary,
            // Not every type has a binary form, be it for NULL.
            Self::Null | Self::Text(_) => Format::Text,
        }
    }

    to_sql_checked!();
}

/// Makes a statement's parameters ready for the types PostgreSQL wants.
///
/// # Errors
/// [`Error::Invalid`] naming the first parameter that does not fit.
pub fn encode(parameters: &[Parameter], types: &[Type], delimiters: &Delimiters) -> Result<Vec<Encoded>, Error> {
    if parameters.len() != types.len() {
        let problem = format!("are {}, the statement takes {}", parameters.len(), types.len());
        return Err(Error::invalid("parameters", problem));
    }
    let each = parameters.iter().zip(types).enumerate();
    each.map(|(index, (parameter, type_))| {
        encode_one(&parameter.value, type_, delimiters)
            .map_err(|problem| Error::invalid(format!("parameters[{index}].value"), problem))
    })
    .collect()
}

fn encode_one(value: &Value, type_: &Type, delimiters: &Delimiters) -> Result<Encoded, String> {
    let type_ = base(type_);
    match (value, element(type_)) {
        (Value::Null, _) => Ok(Encoded::Null),
        (Value::Bytes(bytes), _) if *type_ == Type::BYTEA => Ok(Encoded::Binary(bytes.clone())),
        (Value::List(list), Some(element)) => {
            let element = base(element);
            array_literal::print(list, delimiters.of(element), |value| print(value, element)).map(Encoded::Text)
        }
        (Value::List(_), _) => Err(format!("is a list_value: type {} is no array", type_.name())),
        (value, _) => print(value, type_).map(Encoded::Text),
    }
}

/// What a domain is made of.
fn base(mut type_: &Type) -> &Type {
    while let Kind::Domain(base) = type_.kind() {
        type_ = base;
    }
    type_
}

/// The text that the type reads for a value that is neither NULL nor a list.
fn print(value: &Value, type_: &Type) -> Result<String, String> {
    match (Carried::of(type_), value) {
        (Some(carried), value) => carried.print(value),
        // Every type reads its own text form.
        (None, Value::Text(_)) => Carried::Text.print(value),
        (None, Value::Int(value)) => match *type_ {
            // money reads a number in its currency's units.
            Type::MONEY => Ok(value.to_string()),
            Type::XID8 => in_range(*value, 0, i64::MAX, "xid8"),
            Type::XID
            | Type::CID
            | Type::REGCLASS
            | Type::REGCOLLATION
            | Type::REGTYPE
            | Type::REGPROC
            | Type::REGPROCEDURE
            | Type::REGOPER
            | Type::REGOPERATOR
            | Type::REGCONFIG
            | Type::REGDICTIONARY
            | Type::REGROLE
            | Type::REGNAMESPACE => in_range(*value, 0, u32::MAX.into(), type_.name()),
            _ => Err(format!("is an int_value: type {} takes a string_value", type_.name())),
        },
        (None, value) => Err(format!("is a {}: type {} takes a string_value", value.kind(), type_.name())),
    }
}

fn in_range(value: i64, min: i64, max: i64, type_name: &str) -> Result<String, String> {
    if (min..=max).contains(&value) {
        Ok(value.to_string())
    } else {
        Err(format!("is out of range for {type_name}, which holds {min} to {max}"))
    }
}

/// An integer that a float of so many mantissa digits holds exactly.
fn exactly(value: i64, mantissa_digits: u32, type_name: &str) -> Result<String, String> {
    let magnitude = value.unsigned_abs();
    let significant = u64::BITS - magnitude.leading_zeros() - magnitude.trailing_zeros().min(u64::BITS - 1);
    if magnitude == 0 || significant <= mantissa_digits {
        Ok(value.to_string())
    } else {
        Err(format!("cannot be held exactly by {type_name}: pass a double_value to have it rounded"))
    }
}

fn float4(value: f64) -> Result<String, String> {
    #[allow(clippy::cast_possible_truncation, reason = "it is what is lost by this cast that is tested")]
    let cast = value as f32;
    let is_out_of_range = value.is_finite() && cast.is_infinite() || value != 0.0 && cast == 0.0;
    if is_out_of_range { Err("is out of range for float4".into()) } else { Ok(float(value)) }
}

/// The shortest decimal that reads back as the same number.
fn float(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    format!("{value:?}")
}

fn bytea(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("\\x");
    text.extend(hex::digits(bytes));
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(value: &Value, type_: &Type) -> Result<String, String> {
        encode_one(value, type_, &Delimiters::default()).map(|encoded| match encoded {
            Encoded::Null => "NULL".into(),
            Encoded::Text(text) => text,
            Encoded::Binary(bytes) => bytea(&bytes),
        })
    }

    fn list(values: Vec<Value>, lower_bound: i32) -> Value {
        Value::List(List { values, lower_bounds: vec![lower_bound] })
    }

    #[test]
    fn values_that_fit_are_printed_for_their_type() {
        for (value, type_, printed) in [
            (Value::Bool(true), Type::BOOL, "true"),
            (Value::Int(-32768), Type::INT2, "-32768"),
            (Value::Int(i64::MAX), Type::NUMERIC, "9223372036854775807"),
            (Value::Int(1 << 40), Type::FLOAT4, "1099511627776"),
            (Value::Int(i64::MIN), Type::FLOAT4, "-9223372036854775808"),
            (Value::Double(0.1), Type::FLOAT8, "0.1"),
            (Value::Double(f64::NEG_INFINITY), Type::FLOAT4, "-Infinity"),
            (Value::Double(5e-324), Type::FLOAT8, "5e-324"),
            (Value::Text("10.0.0.1".into()), Type::INET, "10.0.0.1"),
            (Value::Bytes(Bytes::from_static(b"\0\xff")), Type::BYTEA, "\\x00ff"),
            (list(vec![Value::Text("a\"\\,".into()), Value::Null], 1), Type::TEXT_ARRAY, r#"{"a\"\\,",NULL}"#),
            (list(vec![Value::Int(1), Value::Int(2)], -1), Type::INT4_ARRAY, r#"[-1:0]={"1","2"}"#),
            (list(vec![Value::Bytes(Bytes::from_static(b"\xff"))], 1), Type::BYTEA_ARRAY, r#"{"\\xff"}"#),
            (list(vec![], 5), Type::INT4_ARRAY, "{}"),
            (Value::Int(7), Type::MONEY, "7"),
            (Value::Int(7), Type::REGCLASS, "7"),
            (list(vec![Value::Text("(1,1),(0,0)".into()), Value::Null], 1), Type::BOX_ARRAY, r#"{"(1,1),(0,0)";NULL}"#),
        ] {
            assert_eq!(text(&value, &type_).as_deref(), Ok(printed), "{value:?} as {type_}");
        }
    }

    #[test]
    fn values_that_would_lose_something_are_refused() {
        for (value, type_) in [
            (Value::Int(32768), Type::INT2),
            (Value::Int(1 << 31), Type::INT4),
            (Value::Int(-1), Type::OID),
            (Value::Int((1 << 24) + 1), Type::FLOAT4),
            (Value::Int((1 << 53) + 1), Type::FLOAT8),
            (Value::Double(1e39), Type::FLOAT4),
            (Value::Double(1.0), Type::INT4),
            (Value::Int(1), Type::TEXT),
            (Value::Int(1), Type::BOOL),
            (Value::Bool(true), Type::INET),
            (Value::Bytes(Bytes::new()), Type::TEXT),
            (Value::Text("a\0b".into()), Type::TEXT),
            (Value::Text("a\0b".into()), Type::INET),
            (list(vec![], 1), Type::INT4),
            (list(vec![Value::Int(1 << 40)], 1), Type::INT4_ARRAY),
            (list(vec![list(vec![], 1)], 1), Type::INT4_ARRAY),
            (Value::Int(-1), Type::XID),
            (Value::Int(1), Type::INET),
            (list(vec![Value::Int(1)], i32::MAX), Type::INT4_ARRAY),
        ] {
            assert!(text(&value, &type_).is_err(), "{value:?} as {type_}");
        }
    }

    #[test]
    fn a_value_larger_than_what_is_left_is_not_built() {
        // 10^131071 in ten bytes, a thousand times.
        let numeric = [0, 1, 0x7f, 0xff, 0, 0, 0, 0, 0, 10_u8];
        let element = [&10_i32.to_be_bytes()[..], &numeric].concat();
        let header = [1_i32, 0, 1700, 1000, 1].map(i32::to_be_bytes).concat();
        let array = [header, element.repeat(1000)].concat();
        let mut left = 300_000;
        let decoded = decode(&Type::NUMERIC_ARRAY, WireFormat::Binary, &Delimiters::default(), Some(&array), &mut left);
        assert!(matches!(decoded, Err(Refusal::TooLarge)));
        assert!(left < 100_000, "what was built before the third is accounted for");
    }

    #[test]
    fn lists_in_a_list_take_room_however_little_is_in_them() {
        let nested = format!("{{{}}}", vec!["{{{{{::1}}}}}"; 1000].join(","));
        let size = |left: &mut usize| {
            decode(&Type::INET_ARRAY, WireFormat::Text, &Delimiters::default(), Some(nested.as_bytes()), left)
        };
        let mut left = usize::MAX;
        let value = size(&mut left).unwrap();
        assert_eq!(usize::MAX - left + ValueRef::Null.encoded_len() - 1, value.encoded_len());
        assert!(matches!(size(&mut 50_000), Err(Refusal::TooLarge)));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_decoded_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            for type_ in [
                Type::BOOL, Type::INT2, Type::INT8, Type::FLOAT4, Type::NUMERIC, Type::BYTEA, Type::TEXT, Type::JSONB,
                Type::UUID, Type::INTERVAL, Type::INT4_ARRAY, Type::TEXT_ARRAY, Type::NUMERIC_ARRAY, Type::INET,
            ] {
                for format in [WireFormat::Binary, WireFormat::Text] {
                    let _ = decode(&type_, format, &Delimiters::default(), Some(&bytes), &mut 1000);
                }
            }
        }
    }
}
