//! Cuts the byte stream of the port into requests: one JSON object per line. The byte 0xFF, which
//! JSON cannot contain, throws away what came before: a host that connects sends it to get rid of
//! the half request that the host before it may have left.

/// Longest request: a script of a few megabytes, as base64.
const REQUEST_MAX: usize = 16 << 20;

/// Collects bytes until they are a request.
#[derive(Default)]
pub(crate) struct Frames {
    held: Vec<u8>,
    /// The current line was too long; skip to its end.
    skipping: bool,
}

impl Frames {
    /// Requests that are complete with these bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        for &byte in bytes {
            match byte {
                0xff => self.reset(),
                b'\n' => {
                    let line = std::mem::take(&mut self.held);
                    if !std::mem::take(&mut self.skipping) && !line.trim_ascii().is_empty() {
                        out.push(line);
                    }
                }
                _ if self.held.len() >= REQUEST_MAX => {
                    self.held.clear();
                    self.skipping = true;
                }
                _ if self.skipping => {}
                _ => self.held.push(byte),
            }
        }
        out
    }

    /// Forget the unfinished request.
    pub(crate) fn reset(&mut self) {
        *self = Frames::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_in_pieces() {
        let mut frames = Frames::default();
        assert!(frames.push(b"{\"a\"").is_empty());
        assert_eq!(
            frames.push(b":1}\n\n{}\n{"),
            vec![b"{\"a\":1}".to_vec(), b"{}".to_vec()]
        );
        assert_eq!(frames.push(b"}\r\n"), vec![b"{}\r".to_vec()]);
    }

    #[test]
    fn the_sentinel_drops_half_a_request() {
        let mut frames = Frames::default();
        assert!(frames.push(b"{\"half\":").is_empty());
        assert_eq!(frames.push(b"\xff{}\n"), vec![b"{}".to_vec()]);
    }

    #[test]
    fn an_endless_line_is_skipped_and_the_next_one_is_read() {
        let mut frames = Frames::default();
        let long = vec![b'x'; REQUEST_MAX + 10];
        assert!(frames.push(&long).is_empty());
        assert!(frames.held.len() < 64);
        assert_eq!(frames.push(b"yy\n{}\n"), vec![b"{}".to_vec()]);
    }
}
