//! The message codec: prost's, but a request that does not decode is the caller's fault, not the server's.
//!
//! Invariant: bytes that are no message of the expected type answer INVALID_ARGUMENT with the field's name.

use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstEncoder};

use super::status;
use crate::broker::error::Error;

/// Encodes `T`, decodes `U`.
pub(crate) struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = RequestDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        RequestDecoder(PhantomData)
    }
}

/// Decodes `U`.
pub(crate) struct RequestDecoder<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for RequestDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::decode(buf).map(Some).map_err(|error| {
            let text = error.to_string();
            let (field, problem) = blame(&text);
            status::from_error(Error::invalid(field, format!("does not decode: {problem}")))
        })
    }
}

/// The field and the problem in prost's "failed to decode Protobuf message: Value.kind: Parameter.value:
/// ExecuteRequest.parameters: invalid string value ...", which names the innermost field first.
fn blame(text: &str) -> (String, &str) {
    let mut problem = text.trim_start_matches("failed to decode Protobuf message: ");
    let mut path = Vec::new();
    while let Some((place, rest)) = problem.split_once(": ")
        && let Some((_message, field)) = place.split_once('.')
        && !place.contains(' ')
    {
        path.push(field);
        problem = rest;
    }
    path.reverse();
    (if path.is_empty() { "request".into() } else { path.join(".") }, problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::pb;

    #[test]
    fn a_request_that_does_not_decode_is_blamed_on_its_field() {
        let parameter = [b"\x0a\x03\x2a\x01\xff".as_slice()].concat();
        let request = [b"\x1a".as_slice(), &[u8::try_from(parameter.len()).unwrap()], &parameter].concat();
        let error = pb::ExecuteRequest::decode(request.as_slice()).unwrap_err().to_string();
        let expected = ("parameters.value.kind".to_owned(), "invalid string value: data is not UTF-8 encoded");
        assert_eq!(blame(&error), expected);
        let error = pb::ExecuteRequest::decode(b"\x07".as_slice()).unwrap_err().to_string();
        assert_eq!(blame(&error).0, "request");
    }
}
