//! How messages lie on the wire.

use bytes::Buf;
use prost::{DecodeError, Message};
use std::marker::PhantomData;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Protobuf's. What cannot be read is told as such: it is for whoever serves the call to say what that means.
pub struct Protobuf<Read, Written>(PhantomData<(Read, Written)>);

impl<Read, Written> Default for Protobuf<Read, Written> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// Reads messages.
pub struct Reader<Read>(PhantomData<Read>);

/// Writes messages.
pub struct Writer<Written>(PhantomData<Written>);

impl<Read, Written> Codec for Protobuf<Read, Written>
where
    Read: Message + Default + Send + 'static,
    Written: Message + Send + 'static,
{
    type Encode = Written;
    type Decode = Result<Read, DecodeError>;
    type Encoder = Writer<Written>;
    type Decoder = Reader<Read>;

    fn encoder(&mut self) -> Self::Encoder {
        Writer(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        Reader(PhantomData)
    }
}

impl<Read: Message + Default> Decoder for Reader<Read> {
    type Item = Result<Read, DecodeError>;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        let read = Read::decode(&mut *bytes);
        if read.is_err() {
            bytes.advance(bytes.remaining());
        }
        Ok(Some(read))
    }
}

impl<Written: Message> Encoder for Writer<Written> {
    type Item = Written;
    type Error = Status;

    fn encode(&mut self, message: Written, bytes: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message.encode(bytes).map_err(|error| Status::internal(error.to_string()))
    }
}
