//! Paths below `/v2/`, and what may stand in them. Nothing of a path ever becomes a file's name.

use super::error::{OciError, bad_digest};
use http::StatusCode;
use mainstay_model::ids::Sha256;

/// Bytes of a repository's name: what clients can address.
const NAME_MAX: usize = 255;
/// Bytes of a tag.
const TAG_MAX: usize = 128;

/// What a path asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Repository; empty where there is none.
    pub name: String,
    pub target: Target,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    Base,
    Catalog,
    Uploads,
    Upload(String),
    Blob(String),
    Manifest(String),
    Tags,
    Referrers(String),
}

/// What a manifest is named by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reference {
    Tag(String),
    Digest(Sha256),
}

pub(super) fn parse(path: &str) -> Result<Route, OciError> {
    let bare = |target| {
        Ok(Route {
            name: String::new(),
            target,
        })
    };
    let rest = path.strip_prefix("/v2").unwrap_or(path);
    let rest = rest.strip_prefix('/').unwrap_or(rest);
    match rest {
        "" => return bare(Target::Base),
        "_catalog" => return bare(Target::Catalog),
        _ => {}
    }
    // The only thing that clients escape in a path of theirs.
    let rest = rest.replace("%3A", ":").replace("%3a", ":");
    let parts: Vec<&str> = rest.split('/').collect();
    let (name, target) = match parts.as_slice() {
        [name @ .., "blobs", "uploads"] | [name @ .., "blobs", "uploads", ""] => {
            (name, Target::Uploads)
        }
        [name @ .., "blobs", "uploads", id] => (name, Target::Upload((*id).to_owned())),
        [name @ .., "blobs", digest] => (name, Target::Blob((*digest).to_owned())),
        [name @ .., "manifests", reference] => (name, Target::Manifest((*reference).to_owned())),
        [name @ .., "tags", "list"] => (name, Target::Tags),
        [name @ .., "referrers", digest] => (name, Target::Referrers((*digest).to_owned())),
        _ => {
            let text = "no such path";
            return Err(OciError::new(StatusCode::NOT_FOUND, "UNSUPPORTED", text));
        }
    };
    let name = name.join("/");
    check_name(&name)?;
    Ok(Route { name, target })
}

/// The specification's grammar: lower-case path components.
pub(super) fn check_name(name: &str) -> Result<(), OciError> {
    if is_name(name) {
        return Ok(());
    }
    let text = format!(
        "repository name {:?} is refused: lower-case letters and digits, separated by '.', '_', '__' or '-' inside parts and by '/' between them, at most {NAME_MAX} bytes",
        name.chars().take(NAME_MAX).collect::<String>()
    );
    Err(OciError::new(StatusCode::BAD_REQUEST, "NAME_INVALID", text))
}

pub(super) fn is_name(name: &str) -> bool {
    name.len() <= NAME_MAX && name.split('/').all(is_component)
}

/// Runs of letters and digits, with one separator between two of them.
fn is_component(part: &str) -> bool {
    let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let separator = |run: &[u8]| {
        matches!(run, b"." | b"_" | b"__") || (!run.is_empty() && run.iter().all(|b| *b == b'-'))
    };
    let bytes = part.as_bytes();
    if !bytes.first().is_some_and(plain) || !bytes.last().is_some_and(plain) {
        return false;
    }
    let runs = bytes.chunk_by(|a, b| plain(a) == plain(b));
    runs.filter(|run| !plain(&run[0])).all(separator)
}

pub(super) fn is_tag(tag: &str) -> bool {
    let first = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let other = |b: u8| first(b) || b == b'.' || b == b'-';
    tag.len() <= TAG_MAX && tag.bytes().next().is_some_and(first) && tag.bytes().all(other)
}

/// A digest; only SHA-256 names anything here.
pub(super) fn digest(text: &str) -> Result<Sha256, OciError> {
    let mut bytes = [0; 32];
    let hex_digits = text.strip_prefix("sha256:").unwrap_or_default();
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let good = hex_digits.len() == 64
        && hex_digits.bytes().all(lower)
        && hex::decode_to_slice(hex_digits, &mut bytes).is_ok();
    if good {
        return Ok(Sha256(bytes));
    }
    Err(bad_digest(
        "a digest is sha256: and 64 lower-case hex digits; other algorithms are not supported",
    ))
}

/// A tag or a digest; `None`: nothing can have this name.
pub(super) fn reference(text: &str) -> Option<Reference> {
    if text.contains(':') {
        return digest(text).ok().map(Reference::Digest);
    }
    is_tag(text).then(|| Reference::Tag(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_from_their_end() {
        let of = |path: &str| parse(path).map(|r| (r.name, r.target)).unwrap();
        let named = |name: &str, target| (name.to_owned(), target);
        assert_eq!(of("/v2"), named("", Target::Base));
        assert_eq!(of("/v2/"), named("", Target::Base));
        assert_eq!(of("/v2/_catalog"), named("", Target::Catalog));
        assert_eq!(of("/v2/a/b/blobs/uploads/"), named("a/b", Target::Uploads));
        assert_eq!(of("/v2/a/blobs/uploads"), named("a", Target::Uploads));
        assert_eq!(
            of("/v2/a/blobs/uploads/x"),
            named("a", Target::Upload("x".into()))
        );
        assert_eq!(
            of("/v2/blobs/uploads/manifests/tags/list"),
            named("blobs/uploads/manifests", Target::Tags)
        );
        assert_eq!(
            of("/v2/a/blobs/sha256%3Aab"),
            named("a", Target::Blob("sha256:ab".into()))
        );
        for bad in [
            "/v2/a",
            "/v2/a/b",
            "/v2/blobs/x",
            "/v2/A/tags/list",
            "/v2/../tags/list",
            "/v2/a/../b/tags/list",
            "/v2/a%2F..%2Fb/tags/list",
            "/v2/.a/tags/list",
            "/v2/a-/tags/list",
            "/v2/a..b/tags/list",
            "/v2/a___b/tags/list",
            "/v2/a//b/tags/list",
            "/v2/é/tags/list",
            &format!("/v2/{}/tags/list", "a".repeat(256)),
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for good in ["a", "a.b/c_d/e__f/g---h", "0", &"a".repeat(255)] {
            assert!(is_name(good), "{good}");
        }
    }

    #[test]
    fn references() {
        assert!(is_tag("v1.0-rc_1") && is_tag("_") && is_tag(&"t".repeat(128)));
        for bad in ["", ".a", "-a", "a/b", "a:b", "é", &"t".repeat(129)] {
            assert!(!is_tag(bad), "{bad}");
        }
        let good = format!("sha256:{}", "0f".repeat(32));
        assert_eq!(digest(&good).unwrap(), Sha256([15; 32]));
        for bad in [
            String::new(),
            "sha256:".to_owned(),
            good.to_uppercase(),
            good.replace('f', "F"),
            format!("{good}0"),
            format!("sha512:{}", "0f".repeat(64)),
            format!("sha256:{}", "0g".repeat(32)),
        ] {
            assert!(digest(&bad).is_err(), "{bad}");
            assert_eq!(reference(&bad), None);
        }
    }
}
