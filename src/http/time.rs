//! Times as the dialect writes them. Reads no clock.

use serde::{Serialize, Serializer};
use std::fmt;
use time::OffsetDateTime;

/// Last millisecond of the year 9999: RFC 3339 has no later time.
const LAST_MS: u64 = 253_402_300_799_999;

/// Milliseconds since the Unix epoch, written as RFC 3339 in UTC.
#[derive(Clone, Copy, Debug)]
pub struct Rfc3339(pub u64);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.min(LAST_MS);
        let nanos = i128::from(ms) * 1_000_000;
        let t =
            OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let (year, month, day) = (t.year(), u8::from(t.month()), t.day());
        let (h, m, s) = (t.hour(), t.minute(), t.second());
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z",
            ms % 1000
        )
    }
}

impl Serialize for Rfc3339 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A date that may be unset (0): then it is the year 1, as Go's clients expect.
#[derive(Clone, Copy, Debug)]
pub struct MaybeRfc3339(pub u64);

impl Serialize for MaybeRfc3339 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            0 => serializer.serialize_str("0001-01-01T00:00:00Z"),
            ms => Rfc3339(ms).serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_3339_with_milliseconds() {
        let text = |ms| Rfc3339(ms).to_string();
        assert_eq!(text(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(text(1_709_210_096_007), "2024-02-29T12:34:56.007Z");
        assert_eq!(text(u64::MAX), "9999-12-31T23:59:59.999Z");
        assert_eq!(
            serde_json::to_string(&MaybeRfc3339(0)).unwrap(),
            "\"0001-01-01T00:00:00Z\""
        );
    }
}
