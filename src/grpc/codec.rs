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
            // "failed to decode Protobuf message: ExecuteRequest.sql: invalid string value: ..."
            let text = error.to_string();
            let cause = text.trim_start_matches("failed to decode Protobuf message: ");
            let (field, problem) = cause.split_once(": ").unwrap_or(("request", cause));
            let field = field.split_once('.').map_or(field, |(_message, field)| field);
            status::from_error(Error::invalid(field, format!("does not decode: {problem}")))
        })
    }
}
