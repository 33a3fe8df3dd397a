//! Values on the way to and from PostgreSQL.
//!
//! Results come in PostgreSQL's binary form and are decoded here. Parameters go out as text, which every type reads and
//! no type misreads; bytea alone goes as it is. Invariant: a value that cannot be carried without loss is refused with
//! its place in the request, before anything is sent.

use bytes::{BufMut, Bytes, BytesMut};
use tokio_postgres::types::{Format, FromSql, IsNull, Kind, ToSql, Type, to_sql_checked};

use super::text_form::{self, Malformed};
use crate::broker::error::Error;
use crate::broker::statement::Parameter;
use crate::broker::value::{List, Value};

type BoxError = Box<dyn std::error::Error + Sync + Send>;

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

    fn decode(self, bytes: &[u8]) -> Result<Value, Malformed> {
        Ok(match self {
            Self::Bool => Value::Bool(u8::from_be_bytes(fixed(bytes)?) != 0),
            Self::Int2 => Value::Int(i16::from_be_bytes(fixed(bytes)?).into()),
            Self::Int4 => Value::Int(i32::from_be_bytes(fixed(bytes)?).into()),
            Self::Int8 => Value::Int(i64::from_be_bytes(fixed(bytes)?)),
            Self::Oid => Value::Int(u32::from_be_bytes(fixed(bytes)?).into()),
            Self::Float4 => Value::Double(f32::from_be_bytes(fixed(bytes)?).into()),
            Self::Float8 => Value::Double(f64::from_be_bytes(fixed(bytes)?)),
            Self::Numeric => Value::Text(text_form::numeric(bytes)?),
            Self::Bytea => Value::Bytes(Bytes::copy_from_slice(bytes)),
            Self::Text => Value::Text(utf8(bytes)?),
            Self::Jsonb => match bytes.split_first() {
                Some((1, text)) => Value::Text(utf8(text)?),
                _ => return Err(Malformed),
            },
            Self::Printed(print) => Value::Text(print(bytes)?),
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
            (Self::Bytea, Value::Bytes(bytes)) => Ok(hex(bytes)),
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

/// The type a caller names: "uuid", "int4[]".
///
/// # Errors
/// What is wrong with the name.
pub(super) fn named_type(name: &str) -> Result<Type, String> {
    const KNOWN: [(&str, Type, Type); 21] = [
        ("bool", Type::BOOL, Type::BOOL_ARRAY),
        ("int2", Type::INT2, Type::INT2_ARRAY),
        ("int4", Type::INT4, Type::INT4_ARRAY),
        ("int8", Type::INT8, Type::INT8_ARRAY),
        ("oid", Type::OID, Type::OID_ARRAY),
        ("float4", Type::FLOAT4, Type::FLOAT4_ARRAY),
        ("float8", Type::FLOAT8, Type::FLOAT8_ARRAY),
        ("numeric", Type::NUMERIC, Type::NUMERIC_ARRAY),
        ("text", Type::TEXT, Type::TEXT_ARRAY),
        ("varchar", Type::VARCHAR, Type::VARCHAR_ARRAY),
        ("bpchar", Type::BPCHAR, Type::BPCHAR_ARRAY),
        ("name", Type::NAME, Type::NAME_ARRAY),
        ("bytea", Type::BYTEA, Type::BYTEA_ARRAY),
        ("uuid", Type::UUID, Type::UUID_ARRAY),
        ("json", Type::JSON, Type::JSON_ARRAY),
        ("jsonb", Type::JSONB, Type::JSONB_ARRAY),
        ("date", Type::DATE, Type::DATE_ARRAY),
        ("time", Type::TIME, Type::TIME_ARRAY),
        ("timestamp", Type::TIMESTAMP, Type::TIMESTAMP_ARRAY),
        ("timestamptz", Type::TIMESTAMPTZ, Type::TIMESTAMPTZ_ARRAY),
        ("interval", Type::INTERVAL, Type::INTERVAL_ARRAY),
    ];
    let (element, array) = match name.strip_suffix("[]") {
        Some(element) => (element, true),
        None => (name, false),
    };
    match KNOWN.into_iter().find(|(known, ..)| *known == element) {
        Some((_, _, type_)) if array => Ok(type_),
        Some((_, type_, _)) => Ok(type_),
        None => {
            let known: Vec<_> = KNOWN.iter().map(|(known, ..)| *known).collect();
            Err(format!(
                "{name:?} is none of {}, nor one of them followed by []: write a cast into the statement instead, \
                 such as $1::inet",
                known.join(", ")
            ))
        }
    }
}

/// Whether results of the type can be returned.
pub(super) fn can_return(type_: &Type) -> bool {
    match type_.kind() {
        Kind::Array(element) => Carried::of(element).is_some(),
        _ => Carried::of(type_).is_some(),
    }
}

/// Why a result's value is not returned.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It takes more bytes than are left.
    TooLarge,
    /// What is wrong with it; never the value.
    Unreadable(String),
}

/// Reads a result's value from PostgreSQL's binary form, and takes its size in the answer off `bytes_left`. Text can be
/// thousands of times longer than its binary form, so the size is looked at element by element.
///
/// # Errors
/// [`Refusal`].
pub(super) fn decode(type_: &Type, bytes: Option<&[u8]>, bytes_left: &mut usize) -> Result<Value, Refusal> {
    let Some(bytes) = bytes else { return spend(Value::Null, bytes_left) };
    // No type's text is shorter than half of its binary form.
    if bytes.len() / 2 > *bytes_left {
        return Err(Refusal::TooLarge);
    }
    match type_.kind() {
        Kind::Array(element) => decode_array(element, bytes, bytes_left),
        _ => decode_scalar(type_, bytes, bytes_left),
    }
}

fn spend(value: Value, bytes_left: &mut usize) -> Result<Value, Refusal> {
    *bytes_left = bytes_left.checked_sub(value.encoded_len()).ok_or(Refusal::TooLarge)?;
    Ok(value)
}

fn decode_scalar(type_: &Type, bytes: &[u8], bytes_left: &mut usize) -> Result<Value, Refusal> {
    let value = Carried::of(type_).ok_or(Malformed).and_then(|carried| carried.decode(bytes));
    spend(value.map_err(|malformed| unreadable(type_, malformed))?, bytes_left)
}

fn unreadable(type_: &Type, Malformed: Malformed) -> Refusal {
    Refusal::Unreadable(format!("a value of type {} is not in its binary form, or not UTF-8", type_.name()))
}

fn decode_array(element: &Type, mut rest: &[u8], bytes_left: &mut usize) -> Result<Value, Refusal> {
    let malformed = |malformed| unreadable(element, malformed);
    let dimensions = i32::from_be_bytes(take(&mut rest).map_err(malformed)?);
    let _has_nulls: [u8; 4] = take(&mut rest).map_err(malformed)?;
    let _element_oid: [u8; 4] = take(&mut rest).map_err(malformed)?;
    let (count, lower_bound) = match dimensions {
        0 => (0, 1),
        1 => {
            let count = i32::from_be_bytes(take(&mut rest).map_err(malformed)?);
            (count, i32::from_be_bytes(take(&mut rest).map_err(malformed)?))
        }
        _ => {
            let problem = format!("an array has {dimensions} dimensions, not one: cast it to text in the statement");
            return Err(Refusal::Unreadable(problem));
        }
    };
    // Each element has a length of four bytes, so a hostile count allocates no more than was sent.
    let count = usize::try_from(count).ok().filter(|count| *count <= rest.len() / 4).ok_or(Malformed);
    let count = count.map_err(malformed)?;
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        values.push(match i32::from_be_bytes(take(&mut rest).map_err(malformed)?) {
            -1 => spend(Value::Null, bytes_left)?,
            length => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                let (bytes, after) = rest.split_at_checked(length).ok_or(Malformed).map_err(malformed)?;
                rest = after;
                decode_scalar(element, bytes, bytes_left)?
            }
        });
    }
    if rest.is_empty() { Ok(Value::List(List { values, lower_bound })) } else { Err(malformed(Malformed)) }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (first, after) = rest.split_first_chunk().ok_or(Malformed)?;
    *rest = after;
    Ok(*first)
}

fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Malformed> {
    bytes.try_into().map_err(|_| Malformed)
}

fn utf8(bytes: &[u8]) -> Result<String, Malformed> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Malformed)
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
pub(super) enum Encoded {
    Null,
    Text(String),
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
            Self::Null | Self::Binary(_) => Format::Binary,
            Self::Text(_) => Format::Text,
        }
    }

    to_sql_checked!();
}

/// Makes a statement's parameters ready for the types PostgreSQL wants.
///
/// # Errors
/// [`Error::Invalid`] naming the first parameter that does not fit.
pub(super) fn encode(parameters: &[Parameter], types: &[Type]) -> Result<Vec<Encoded>, Error> {
    if parameters.len() != types.len() {
        let problem = format!("are {}, the statement takes {}", parameters.len(), types.len());
        return Err(Error::invalid("parameters", problem));
    }
    let each = parameters.iter().zip(types).enumerate();
    each.map(|(index, (parameter, type_))| {
        encode_one(&parameter.value, type_)
            .map_err(|problem| Error::invalid(format!("parameters[{index}].value"), problem))
    })
    .collect()
}

fn encode_one(value: &Value, type_: &Type) -> Result<Encoded, String> {
    match (value, type_.kind()) {
        (Value::Null, _) => Ok(Encoded::Null),
        (Value::Bytes(bytes), _) if matches!(Carried::of(type_), Some(Carried::Bytea)) => {
            Ok(Encoded::Binary(bytes.clone()))
        }
        (Value::List(list), Kind::Array(element)) => print_array(list, element).map(Encoded::Text),
        (Value::List(_), _) => Err(format!("is a list_value: type {} is no array", type_.name())),
        (value, _) => match Carried::of(type_) {
            Some(carried) => carried.print(value).map(Encoded::Text),
            // Every type reads its own text form.
            None => match value {
                Value::Text(_) => Carried::Text.print(value).map(Encoded::Text),
                _ => Err(format!("is a {}: type {} takes a string_value", value.kind(), type_.name())),
            },
        },
    }
}

/// An array's literal: `[0:1]={"a",NULL}`, every element quoted.
fn print_array(list: &List, element: &Type) -> Result<String, String> {
    let Some(carried) = Carried::of(element) else {
        return Err(format!("is a list_value: arrays of {} take their text form as a string_value", element.name()));
    };
    let mut text = String::from("{");
    for (index, value) in list.values.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        if *value == Value::Null {
            text.push_str("NULL");
            continue;
        }
        let printed = carried.print(value).map_err(|problem| format!("element {index} {problem}"))?;
        text.push('"');
        for c in printed.chars() {
            if matches!(c, '"' | '\\') {
                text.push('\\');
            }
            text.push(c);
        }
        text.push('"');
    }
    text.push('}');
    if list.lower_bound == 1 || list.values.is_empty() {
        return Ok(text);
    }
    let last = i64::from(list.lower_bound) + i64::try_from(list.values.len()).unwrap_or(i64::MAX) - 1;
    if last >= i32::MAX.into() {
        return Err("has a lower bound that puts its last subscript out of range".into());
    }
    Ok(format!("[{}:{last}]={text}", list.lower_bound))
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
    #[allow(clippy::cast_possible_truncation, reason = "it is the overflow of this cast that is tested")]
    let overflows = value.is_finite() && (value as f32).is_infinite();
    if overflows { Err("is out of range for float4".into()) } else { Ok(float(value)) }
}

/// The shortest decimal that reads back as the same number.
fn float(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    format!("{value:?}")
}

/// bytea's text form.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("\\x");
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a String takes everything");
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(value: &Value, type_: &Type) -> Result<String, String> {
        encode_one(value, type_).map(|encoded| match encoded {
            Encoded::Null => "NULL".into(),
            Encoded::Text(text) => text,
            Encoded::Binary(bytes) => hex(&bytes),
        })
    }

    fn list(values: Vec<Value>, lower_bound: i32) -> Value {
        Value::List(List { values, lower_bound })
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
        assert!(matches!(decode(&Type::NUMERIC_ARRAY, Some(&array), &mut left), Err(Refusal::TooLarge)));
        assert!(left < 100_000, "what was built before the third is accounted for");
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_decoded_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            for type_ in [
                Type::BOOL, Type::INT2, Type::INT8, Type::FLOAT4, Type::NUMERIC, Type::BYTEA, Type::TEXT, Type::JSONB,
                Type::UUID, Type::INTERVAL, Type::INT4_ARRAY, Type::TEXT_ARRAY, Type::NUMERIC_ARRAY, Type::INET,
            ] {
                let _ = decode(&type_, Some(&bytes), &mut 1000);
            }
        }
    }
}
