//! The protocol's `Row`, which can be sent as it was written, without a message for each of its values.
//!
//! Invariant: what is written here is what prost would have encoded.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::encoding::{self, DecodeContext, WireType, encoded_len_varint};
use prost::{DecodeError, Message};

use super::{convert, pb};
use crate::broker::value::{Value, ValueRef};

/// A row of a result: one value per column, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row {
    /// The values.
    pub values: Vec<pb::Value>,
    /// More values, written already.
    written: Bytes,
}

impl Row {
    /// The number of the field that has the values.
    const VALUES: u32 = 1;

    /// A row whose values are written.
    pub fn written(written: Bytes) -> Self {
        Self { values: Vec::new(), written }
    }
}

impl From<Vec<pb::Value>> for Row {
    fn from(values: Vec<pb::Value>) -> Self {
        Self { values, written: Bytes::new() }
    }
}

impl Message for Row {
    fn encode_raw(&self, out: &mut impl BufMut) {
        encoding::message::encode_repeated(Self::VALUES, &self.values, out);
        out.put_slice(&self.written);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        bytes: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            Self::VALUES => {
                encoding::message::merge_repeated(wire_type, &mut self.values, bytes, context).map_err(|mut error| {
                    error.push("Row", "values");
                    error
                })
            }
            _ => encoding::skip_field(wire_type, tag, bytes, context),
        }
    }

    fn encoded_len(&self) -> usize {
        encoding::message::encoded_len_repeated(Self::VALUES, &self.values) + self.written.len()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// What stands before a value: put together here, and written at once.
#[derive(Default)]
struct Head {
    /// Two tags and two varints.
    bytes: [u8; 22],
    length: usize,
}

impl Head {
    fn put(&mut self, byte: u8) {
        self.bytes[self.length] = byte;
        self.length += 1;
    }

    fn put_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            // Its lowest seven bits, and that more follow.
            self.put(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.put(value.to_le_bytes()[0]);
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Writes a value as one of a row's.
pub fn write(out: &mut BytesMut, value: ValueRef<'_>) {
    /// The tags of `Row.values` and of `Value`'s kinds.
    const VALUES: u8 = 0x0a;
    const NULL: u8 = 0x08;
    const BOOL: u8 = 0x10;
    const INT: u8 = 0x18;
    const DOUBLE: u8 = 0x21;
    const STRING: u8 = 0x2a;
    const BYTES: u8 = 0x32;

    let delimited = |out: &mut BytesMut, tag: u8, bytes: &[u8]| {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let mut head = Head::default();
        head.put(VALUES);
        head.put_varint(1 + u64::try_from(encoded_len_varint(length)).unwrap_or(0) + length);
        head.put(tag);
        head.put_varint(length);
        out.put_slice(head.bytes());
        out.put_slice(bytes);
    };
    match value {
        ValueRef::Null => out.put_slice(&[VALUES, 2, NULL, 0]),
        ValueRef::Bool(value) => out.put_slice(&[VALUES, 2, BOOL, u8::from(value)]),
        ValueRef::Int(value) => {
            let value = value.cast_unsigned();
            let mut head = Head::default();
            head.put(VALUES);
            head.put_varint(1 + u64::try_from(encoded_len_varint(value)).unwrap_or(0));
            head.put(INT);
            head.put_varint(value);
            out.put_slice(head.bytes());
        }
        ValueRef::Double(value) => {
            let mut head = [VALUES, 9, DOUBLE, 0, 0, 0, 0, 0, 0, 0, 0];
            head[3..].copy_from_slice(&value.to_le_bytes());
            out.put_slice(&head);
        }
        ValueRef::Text(text) => delimited(out, STRING, text.as_bytes()),
        ValueRef::Bytes(bytes) => delimited(out, BYTES, bytes),
        ValueRef::List(list) => {
            encoding::message::encode(Row::VALUES, &convert::to_value(Value::List(list)), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::broker::value::List;

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            any::<f64>().prop_filter("NaN equals nothing", |value| !value.is_nan()).prop_map(Value::Double),
            "\\PC{0,200}".prop_map(Value::Text),
            prop::collection::vec(any::<u8>(), 0..200).prop_map(|bytes| Value::Bytes(bytes.into())),
        ];
        leaf.prop_recursive(3, 20, 5, |inner| {
            (prop::collection::vec(inner, 0..5), prop::collection::vec(any::<i32>(), 0..3))
                .prop_map(|(values, lower_bounds)| Value::List(List { values, lower_bounds }))
        })
    }

    fn as_read(value: &Value) -> ValueRef<'_> {
        match value {
            Value::Null => ValueRef::Null,
            Value::Bool(value) => ValueRef::Bool(*value),
            Value::Int(value) => ValueRef::Int(*value),
            Value::Double(value) => ValueRef::Double(*value),
            Value::Text(text) => ValueRef::Text(text.into()),
            Value::Bytes(bytes) => ValueRef::Bytes(bytes),
            Value::List(list) => ValueRef::List(list.clone()),
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_prost_encodes(values in prop::collection::vec(values(), 0..6)) {
            let mut written = BytesMut::new();
            for value in &values {
                write(&mut written, as_read(value));
            }
            let row = Row::from(values.into_iter().map(convert::to_value).collect::<Vec<_>>());
            let written = Row::written(written.freeze());
            prop_assert_eq!(written.encode_to_vec(), row.encode_to_vec());
            prop_assert_eq!(Row::decode(written.encode_to_vec().as_slice()).unwrap(), row);
        }
    }
}
