//! Cuts a stream of bytes into lines, with a bound on a line.

use bytes::{Bytes, BytesMut};

/// A desired set of ten thousand instances is about 5 MB; scripts may be larger.
const LINE_MAX: usize = 256 << 20;

/// Collects bytes until a line is whole.
pub(super) struct Lines {
    buffer: BytesMut,
    looked: usize,
    max: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            buffer: BytesMut::new(),
            looked: 0,
            max: LINE_MAX,
        }
    }
}

impl Lines {
    /// More bytes, once all whole lines are taken; an error if the line they belong to is too long.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), String> {
        let more = bytes.iter().position(|b| *b == b'\n');
        if self.buffer.len() + more.unwrap_or(bytes.len()) > self.max {
            return Err(format!("a line of more than {} bytes", self.max));
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next whole line that is not empty.
    pub(super) fn next(&mut self) -> Option<Bytes> {
        loop {
            let at = self.buffer[self.looked..].iter().position(|b| *b == b'\n');
            let Some(at) = at else {
                self.looked = self.buffer.len();
                return None;
            };
            let line = self.buffer.split_to(self.looked + at + 1).freeze();
            self.looked = 0;
            let line = line.slice(..line.len() - 1);
            if !line.trim_ascii().is_empty() {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_however_the_bytes_are_cut() {
        let text = b"{\"a\":1}\n\n{\"b\":2}\r\n{\"c\"";
        for cut in 1..text.len() {
            let mut lines = Lines::default();
            let mut out = Vec::new();
            for piece in text.chunks(cut) {
                lines.push(piece).unwrap();
                while let Some(line) = lines.next() {
                    out.push(String::from_utf8(line.to_vec()).unwrap());
                }
            }
            assert_eq!(out, ["{\"a\":1}", "{\"b\":2}\r"], "cut every {cut}");
        }
    }

    #[test]
    fn a_line_has_a_bound_however_it_trickles() {
        let mut lines = Lines {
            max: 8,
            ..Lines::default()
        };
        lines.push(b"12345678\n12").unwrap();
        assert_eq!(lines.next().unwrap(), "12345678");
        assert!(lines.next().is_none());
        for byte in b"345678" {
            lines.push(&[*byte]).unwrap();
            assert!(lines.next().is_none());
        }
        assert!(lines.push(b"9").is_err());
    }
}
