//! The only place that turns model types into bytes: one version byte, then bincode.

use crate::command::Envelope;
use crate::outcome::Outcome;
use std::fmt;

/// Bytes that are not what they should be.
#[derive(Debug)]
pub struct CodecError(pub String);
impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for CodecError {}

/// Encode a command for the log.
pub fn encode_envelope(envelope: &Envelope) -> Vec<u8> {
    let _ = envelope;
    todo!()
}
/// Decode a log entry.
pub fn decode_envelope(bytes: &[u8]) -> Result<Envelope, CodecError> {
    let _ = bytes;
    todo!()
}
/// Encode an outcome (crosses members when a follower forwards).
pub fn encode_outcome(outcome: &Outcome) -> Vec<u8> {
    let _ = outcome;
    todo!()
}
/// Decode an outcome.
pub fn decode_outcome(bytes: &[u8]) -> Result<Outcome, CodecError> {
    let _ = bytes;
    todo!()
}
