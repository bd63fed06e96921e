//! The only place that turns model types into bytes: one version byte, then bincode.
//!
//! Bytes come from other members and from disk: decoding refuses what it does not understand,
//! never panics, and allocates at most a small multiple of the input's length.

use crate::command::Envelope;
use crate::outcome::Outcome;
use bincode::config;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;

/// First byte of everything this module writes.
pub const VERSION: u8 = 1;

/// Longest log entry a proposer may hand to the log. Decoding accepts more, so that a committed
/// entry can always be read.
pub const ENTRY_BYTES_MAX: usize = 16 << 20;

/// Longest input that is looked at.
const INPUT_BYTES_MAX: usize = 64 << 20;

/// Bytes that are not what they should be.
#[derive(Debug)]
pub struct CodecError(pub String);
impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for CodecError {}

/// Encode a command for the log. The proposer refuses more than [`ENTRY_BYTES_MAX`].
pub fn encode_envelope(envelope: &Envelope) -> Vec<u8> {
    encode(envelope)
}
/// Decode a log entry.
pub fn decode_envelope(bytes: &[u8]) -> Result<Envelope, CodecError> {
    decode(bytes)
}
/// Encode an outcome (crosses members when a follower forwards).
pub fn encode_outcome(outcome: &Outcome) -> Vec<u8> {
    encode(outcome)
}
/// Decode an outcome.
pub fn decode_outcome(bytes: &[u8]) -> Result<Outcome, CodecError> {
    decode(bytes)
}

/// How many bytes a value takes inside a command.
pub fn encoded_len<T: Serialize>(value: &T) -> usize {
    encode(value).len() - 1
}

/// Version byte and bincode.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    out.push(VERSION);
    bincode::serde::encode_into_std_write(value, &mut out, config::standard())
        .expect("writing to memory cannot fail and every model type has a known length");
    out
}

/// The reverse of [`encode`]; every byte must be used.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    match bytes.split_first() {
        None => Err(CodecError("empty value".into())),
        Some((&VERSION, body)) => decode_body(body),
        Some((version, _)) => Err(CodecError(format!(
            "value of format {version}; this release reads format {VERSION}"
        ))),
    }
}

fn decode_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    // The limit counts decoded sizes: one byte of input stands for at most 16 of them (a u128).
    // It is a constant in bincode, hence the steps: nothing decodes to more than 256 times its
    // input before the input is found to be too short.
    let (value, used) = match body.len() {
        0..=0x1000 => from_slice::<T, 0x1_0000>(body),
        0x1001..=0x1_0000 => from_slice::<T, 0x10_0000>(body),
        0x1_0001..=0x10_0000 => from_slice::<T, 0x100_0000>(body),
        0x10_0001..=0x100_0000 => from_slice::<T, 0x1000_0000>(body),
        0x100_0001..=INPUT_BYTES_MAX => from_slice::<T, 0x4000_0000>(body),
        n => {
            return Err(CodecError(format!(
                "value of {n} bytes; at most {INPUT_BYTES_MAX} are read"
            )));
        }
    }?;
    if used == body.len() {
        Ok(value)
    } else {
        Err(CodecError(format!(
            "{} bytes left over after a value",
            body.len() - used
        )))
    }
}

fn from_slice<T: DeserializeOwned, const LIMIT: usize>(
    body: &[u8],
) -> Result<(T, usize), CodecError> {
    bincode::serde::decode_from_slice(body, config::standard().with_limit::<LIMIT>())
        .map_err(|e| CodecError(format!("cannot decode a value: {e}")))
}

/// `Vec<u8>` as one run of bytes instead of element by element: the same encoding, much faster.
pub(crate) mod bytes {
    use serde::de::{Error, SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};
    use std::fmt;

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        d.deserialize_byte_buf(Bytes)
    }

    struct Bytes;
    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bytes")
        }
        fn visit_bytes<E: Error>(self, v: &[u8]) -> Result<Vec<u8>, E> {
            Ok(v.to_vec())
        }
        fn visit_byte_buf<E: Error>(self, v: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(v)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u8>, A::Error> {
            let mut out = Vec::new();
            while let Some(b) = seq.next_element()? {
                out.push(b);
            }
            Ok(out)
        }
    }
}
