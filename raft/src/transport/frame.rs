//! Frames on a peer stream: a checked header, a payload of limited length. Knows no message.
//!
//! ```text
//! 0        1      2          4            8                  16           20
//! | version | kind | reserved | length u32 | correlation u64 | crc32 u32 | payload ...
//! ```
//! Little-endian. The checksum covers header and payload: a peer stream may cross proxies and
//! tunnels that TCP's own checksum does not cover end to end.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::io;
use tokio_util::codec::{Decoder, Encoder};

/// Version of the peer protocol. A change of any frame or message raises it.
pub(crate) const PROTOCOL: u8 = 1;
/// Longest payload. A command is limited to half of it, so an append with one always fits.
pub(crate) const PAYLOAD_MAX: usize = 16 << 20;
const HEADER: usize = 20;
/// The buffer grows with what arrives, never by what a header claims.
const GROW: usize = 128 << 10;

/// One message or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    /// Ties an answer to its request.
    pub(crate) id: u64,
    pub(crate) payload: Bytes,
}

/// Splits a byte stream into frames.
#[derive(Debug, Default)]
pub(crate) struct Frames;

impl Encoder<Frame> for Frames {
    type Error = io::Error;

    fn encode(&mut self, frame: Frame, out: &mut BytesMut) -> io::Result<()> {
        if frame.payload.len() > PAYLOAD_MAX {
            return Err(bad(format!(
                "a frame of {} bytes is too long",
                frame.payload.len()
            )));
        }
        out.reserve(HEADER + frame.payload.len());
        let start = out.len();
        out.put_u8(PROTOCOL);
        out.put_u8(frame.kind);
        out.put_u16_le(0);
        out.put_u32_le(u32::try_from(frame.payload.len()).expect("limited above"));
        out.put_u64_le(frame.id);
        let crc = checksum(&out[start..], &frame.payload);
        out.put_u32_le(crc);
        out.put_slice(&frame.payload);
        Ok(())
    }
}

impl Decoder for Frames {
    type Item = Frame;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<Frame>> {
        if src.len() < HEADER {
            return Ok(None);
        }
        if src[0] != PROTOCOL {
            return Err(bad(format!(
                "the peer speaks protocol version {}, this release speaks {PROTOCOL}",
                src[0]
            )));
        }
        let mut header = &src[..HEADER];
        header.advance(1);
        let kind = header.get_u8();
        header.advance(2);
        let length = header.get_u32_le() as usize;
        let id = header.get_u64_le();
        let crc = header.get_u32_le();
        if length > PAYLOAD_MAX {
            return Err(bad(format!(
                "a frame claims {length} bytes, the limit is {PAYLOAD_MAX}"
            )));
        }
        let whole = HEADER + length;
        if src.len() < whole {
            src.reserve((whole - src.len()).min(GROW));
            return Ok(None);
        }
        let mut frame = src.split_to(whole).freeze();
        let header = frame.split_to(HEADER);
        if checksum(&header[..HEADER - 4], &frame) != crc {
            return Err(bad("a frame's checksum does not match".into()));
        }
        Ok(Some(Frame {
            kind,
            id,
            payload: frame,
        }))
    }
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    hash.update(header);
    hash.update(payload);
    hash.finalize()
}

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(payload: &'static [u8]) -> BytesMut {
        let mut out = BytesMut::new();
        let frame = Frame {
            kind: 3,
            id: 77,
            payload: Bytes::from_static(payload),
        };
        Frames.encode(frame, &mut out).unwrap();
        out
    }

    #[test]
    fn frames_survive_any_cut() {
        let whole = encoded(b"hello");
        for cut in 0..whole.len() {
            let mut part = BytesMut::from(&whole[..cut]);
            assert_eq!(Frames.decode(&mut part).unwrap(), None, "{cut}");
            part.extend_from_slice(&whole[cut..]);
            let frame = Frames.decode(&mut part).unwrap().unwrap();
            assert_eq!(
                (frame.kind, frame.id, &frame.payload[..]),
                (3, 77, &b"hello"[..])
            );
            assert!(part.is_empty());
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let whole = encoded(b"hello");
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            // A longer claimed length waits for bytes that never come; all else is an error.
            match Frames.decode(&mut bytes) {
                Ok(None) => assert!((4..8).contains(&(bit / 8)), "bit {bit}"),
                Ok(Some(_)) => panic!("bit {bit} went unnoticed"),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn a_claimed_length_allocates_nothing_much() {
        let mut bytes = encoded(b"");
        bytes[4..8].copy_from_slice(&u32::try_from(PAYLOAD_MAX).unwrap().to_le_bytes());
        assert_eq!(Frames.decode(&mut bytes).unwrap(), None);
        assert!(bytes.capacity() <= 2 * GROW, "{}", bytes.capacity());
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Frames.decode(&mut bytes).is_err());
    }
}
