//! How many bytes of request bodies this member holds at once. A request's body is held, as bytes, as JSON
//! and as a command, until the request is answered; connections are bounded by count, and this bounds
//! what they carry. Knows no route.

use super::error::ApiError;
use http::{HeaderMap, header};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// All bodies together, in KiB: as JSON and as commands they take a few times that.
const HELD_KIB_MAX: u32 = 64 << 10;
/// What a body of unknown length is taken for, in KiB: the largest one.
const UNKNOWN_KIB: u64 = (super::envelope::REQUEST_BODY_BYTES_MAX >> 10) as u64;

/// The room for bodies; one per process.
static HELD: std::sync::LazyLock<Intake> = std::sync::LazyLock::new(|| Intake::new(HELD_KIB_MAX));

/// See the module.
struct Intake(Arc<Semaphore>);

/// Room for one body, for as long as it is held.
#[derive(Clone, Debug)]
pub(super) struct Held {
    _permit: Option<Arc<OwnedSemaphorePermit>>,
}

/// Room for the body that these headers announce, or the answer to a client that came at a bad time.
pub(super) fn admit(headers: &HeaderMap) -> Result<Held, ApiError> {
    HELD.admit(headers)
}

/// No body.
pub(super) const NONE: Held = Held { _permit: None };

impl Intake {
    fn new(kib: u32) -> Self {
        Self(Arc::new(Semaphore::new(kib as usize)))
    }

    fn admit(&self, headers: &HeaderMap) -> Result<Held, ApiError> {
        let Some(kib) = announced_kib(headers) else {
            return Ok(NONE);
        };
        match Arc::clone(&self.0).try_acquire_many_owned(kib) {
            Ok(permit) => Ok(Held {
                _permit: Some(Arc::new(permit)),
            }),
            Err(_) => Err(ApiError::unavailable(format!(
                "overloaded: requests of {} MiB are being served (request_bodies_kib_max {HELD_KIB_MAX}); \
                 nothing was changed, try again, or another member",
                HELD_KIB_MAX >> 10
            ))),
        }
    }
}

/// At least one for any body; one over the limit is refused later, and held until then.
fn announced_kib(headers: &HeaderMap) -> Option<u32> {
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    let kib = match length {
        Some(0) => return None,
        Some(bytes) => bytes.div_ceil(1024).min(UNKNOWN_KIB),
        None if headers.contains_key(header::TRANSFER_ENCODING) => UNKNOWN_KIB,
        None => return None,
    };
    u32::try_from(kib).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn length(bytes: u64) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_LENGTH, HeaderValue::from(bytes))])
    }

    #[test]
    fn bodies_are_bounded_together_and_give_their_room_back() {
        let intake = Intake::new(5 << 10);
        let first = intake.admit(&length(3 << 20)).unwrap();
        let small = intake.admit(&length(1)).unwrap();
        let refused = intake.admit(&length(2 << 20)).unwrap_err();
        assert_eq!(refused.status, 503);
        assert!(
            refused.message.contains("overloaded"),
            "{}",
            refused.message
        );
        // Without a body there is nothing to hold.
        intake.admit(&HeaderMap::new()).unwrap();
        let second = first.clone();
        drop((first, small));
        assert!(intake.admit(&length(3 << 20)).is_err(), "still held");
        drop(second);
        intake.admit(&length(3 << 20)).unwrap();
        let chunked = HeaderValue::from_static("chunked");
        let chunked = HeaderMap::from_iter([(header::TRANSFER_ENCODING, chunked)]);
        let largest = intake.admit(&chunked).unwrap();
        assert!(intake.admit(&length(2 << 20)).is_err());
        drop(largest);
    }
}
