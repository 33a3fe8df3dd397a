//! PostgreSQL values as callers see them: a kind of their own, or the text PostgreSQL prints.
//!
//! Knows neither wire format. Invariant: `Debug` shows a value's kind and size, never the value.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;

/// How deep lists may nest: PostgreSQL's arrays have no more dimensions.
pub const LIST_DEPTH_MAX: usize = 6;

/// One value, lossless for the type its column names.
#[derive(Clone, PartialEq)]
pub enum Value {
    /// NULL of any type.
    Null,
    /// bool.
    Bool(bool),
    /// int2, int4, int8, oid.
    Int(i64),
    /// float4, float8.
    Double(f64),
    /// Everything without a kind of its own, as PostgreSQL prints it.
    Text(String),
    /// bytea.
    Bytes(Bytes),
    /// An array.
    List(List),
}

/// A value that is not kept: as it is read, and to be written.
#[derive(Clone, PartialEq)]
pub enum ValueRef<'a> {
    /// NULL of any type.
    Null,
    /// bool.
    Bool(bool),
    /// int2, int4, int8, oid.
    Int(i64),
    /// float4, float8.
    Double(f64),
    /// Everything without a kind of its own.
    Text(Cow<'a, str>),
    /// bytea.
    Bytes(&'a [u8]),
    /// An array.
    List(List),
}

impl ValueRef<'_> {
    /// As [`Value::encoded_len`].
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Null | Self::Bool(_) => Value::FRAMING + 1,
            Self::Int(_) => Value::FRAMING + 10,
            Self::Double(_) => Value::FRAMING + 8,
            Self::Text(text) => Value::FRAMING + text.len(),
            Self::Bytes(bytes) => Value::FRAMING + bytes.len(),
            Self::List(list) => Value::FRAMING + list.encoded_len(),
        }
    }
}

impl From<ValueRef<'_>> for Value {
    fn from(value: ValueRef<'_>) -> Self {
        match value {
            ValueRef::Null => Self::Null,
            ValueRef::Bool(value) => Self::Bool(value),
            ValueRef::Int(value) => Self::Int(value),
            ValueRef::Double(value) => Self::Double(value),
            ValueRef::Text(text) => Self::Text(text.into_owned()),
            ValueRef::Bytes(bytes) => Self::Bytes(Bytes::copy_from_slice(bytes)),
            ValueRef::List(list) => Self::List(list),
        }
    }
}

/// An array, or one of its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct List {
    /// The elements in order; in an array of more dimensions, its rows.
    pub values: Vec<Value>,
    /// The subscript of the first element in each dimension, the outermost first, in the outermost list alone; empty
    /// where all are 1, PostgreSQL's default.
    pub lower_bounds: Vec<i32>,
}

impl Value {
    /// The kind's name as the protocol spells it, for error messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null_value",
            Self::Bool(_) => "bool_value",
            Self::Int(_) => "int_value",
            Self::Double(_) => "double_value",
            Self::Text(_) => "string_value",
            Self::Bytes(_) => "bytes_value",
            Self::List(_) => "list_value",
        }
    }

    /// Tags and lengths around one value: never more than this in protobuf for values below 256 MiB.
    const FRAMING: usize = 12;

    /// How many bytes the value takes in an answer, framing included and rounded up.
    pub fn encoded_len(&self) -> usize {
        Self::FRAMING
            + match self {
                Self::Null | Self::Bool(_) => 1,
                Self::Int(_) => 10,
                Self::Double(_) => 8,
                Self::Text(text) => text.len(),
                Self::Bytes(bytes) => bytes.len(),
                Self::List(list) => list.encoded_len(),
            }
    }

    /// How many bytes of data it has: those of its text, and eight of a number. What has less counts as much as a number:
    /// nothing is had for nothing.
    pub fn data_len(&self) -> usize {
        const LEAST: usize = 8;
        match self {
            Self::Null | Self::Bool(_) | Self::Int(_) | Self::Double(_) => LEAST,
            Self::Text(text) => text.len().max(LEAST),
            Self::Bytes(bytes) => bytes.len().max(LEAST),
            Self::List(list) => list.values.iter().map(Self::data_len).sum(),
        }
    }

    /// How deep lists nest in it.
    pub fn list_depth(&self) -> usize {
        match self {
            Self::List(list) => 1 + list.values.iter().map(Self::list_depth).max().unwrap_or(0),
            Self::Null | Self::Bool(_) | Self::Int(_) | Self::Double(_) | Self::Text(_) | Self::Bytes(_) => 0,
        }
    }
}

impl List {
    fn encoded_len(&self) -> usize {
        self.values.iter().map(Value::encoded_len).sum::<usize>() + 10 * self.lower_bounds.len()
    }
}

impl fmt::Debug for ValueRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} B]", self.encoded_len())
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{} B]", self.kind(), self.encoded_len())
    }
}
