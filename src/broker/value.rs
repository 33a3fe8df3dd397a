//! PostgreSQL values as callers see them: a kind of their own, or the text PostgreSQL prints.
//!
//! Knows neither wire format. Invariant: `Debug` shows a value's kind and size, never the value.

use std::fmt;

use bytes::Bytes;

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

/// A one-dimensional array.
#[derive(Clone, PartialEq)]
pub struct List {
    /// The elements in order.
    pub values: Vec<Value>,
    /// The subscript of the first element; PostgreSQL's default is 1.
    pub lower_bound: i32,
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

    /// How many bytes the value takes in an answer, framing included and rounded up.
    pub fn encoded_len(&self) -> usize {
        /// Tags and lengths around one value: never more than this in protobuf for values below 256 MiB.
        const FRAMING: usize = 12;
        FRAMING
            + match self {
                Self::Null | Self::Bool(_) => 1,
                Self::Int(_) => 10,
                Self::Double(_) => 8,
                Self::Text(text) => text.len(),
                Self::Bytes(bytes) => bytes.len(),
                Self::List(list) => list.values.iter().map(Self::encoded_len).sum(),
            }
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{} B]", self.kind(), self.encoded_len())
    }
}
