//! An OCI manifest's JSON: which kinds are taken, and what one names. Nothing of it is believed but
//! what was checked here.

use super::error::{OciError, bad_manifest};
use super::route;
use http::StatusCode;
use mainstay_model::ids::Sha256;
use mainstay_model::limits;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest manifest that is taken.
pub(super) const MANIFEST_MAX: usize = 4 << 20;

pub(super) const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_IMAGE: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// One thing that a manifest names.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Descriptor {
    #[serde(rename = "mediaType", default)]
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    #[serde(default, skip_serializing)]
    pub urls: Option<Vec<String>>,
    #[serde(
        rename = "artifactType",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Json {
    schema_version: u32,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    subject: Option<Descriptor>,
    annotations: Option<BTreeMap<String, String>>,
}

/// A blob that a manifest names.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub digest: Sha256,
    pub size: u64,
    /// It lies elsewhere by design, and need not be here.
    pub foreign: bool,
}

/// A manifest that was understood.
#[derive(Debug)]
pub(super) struct Document {
    pub media_type: String,
    /// Empty where there is none.
    pub artifact_type: String,
    pub subject: Option<Sha256>,
    /// As they stand there; empty for an index.
    pub config: Option<Descriptor>,
    pub layers: Vec<Descriptor>,
    /// Each once.
    pub blobs: Vec<Named>,
    /// Manifests of the same repository.
    pub children: Vec<Sha256>,
    pub annotations: BTreeMap<String, String>,
}

impl Document {
    /// `content_type` is the request's, without parameters; empty if there is none.
    pub(super) fn parse(bytes: &[u8], content_type: &str) -> Result<Self, OciError> {
        let json: Json = serde_json::from_slice(bytes).map_err(|e| bad_manifest(format!("{e}")))?;
        if json.schema_version != 2 {
            return Err(bad_manifest("only schema version 2 is supported"));
        }
        let stated = json.media_type.as_deref().unwrap_or_default();
        let media_type = match (stated, content_type) {
            ("", "") => return Err(bad_manifest("neither Content-Type nor mediaType is set")),
            (stated, "" | "application/json") => stated,
            ("", content_type) => content_type,
            (stated, content_type) if stated == content_type => stated,
            (stated, other) => {
                let text = format!("its mediaType is {stated}, its Content-Type {other}");
                return Err(bad_manifest(text));
            }
        };
        let media_type = media_type.to_owned();
        let subject = json.subject.as_ref().map(digest_in).transpose()?;
        let annotations = json.annotations.clone().unwrap_or_default();
        let mut document = Self {
            media_type,
            artifact_type: json.artifact_type.clone().unwrap_or_default(),
            subject,
            config: None,
            layers: Vec::new(),
            blobs: Vec::new(),
            children: Vec::new(),
            annotations,
        };
        match document.media_type.as_str() {
            IMAGE | DOCKER_IMAGE => document.read_image(json)?,
            INDEX | DOCKER_LIST => document.read_index(json)?,
            other => {
                let text = format!("manifests of type {other:?} are not supported");
                return Err(bad_manifest(text));
            }
        }
        let named = [&document.media_type, &document.artifact_type];
        if named.iter().any(|text| text.len() > limits::NAME_BYTES) {
            return Err(bad_manifest("a media type that is too long"));
        }
        if document.blobs.len() > limits::ARTIFACT_BLOBS {
            return Err(too_many_blobs());
        }
        Ok(document)
    }

    fn read_image(&mut self, json: Json) -> Result<(), OciError> {
        let (Some(config), Some(layers)) = (json.config, json.layers) else {
            return Err(bad_manifest("an image manifest has a config and layers"));
        };
        if json.manifests.is_some() {
            return Err(bad_manifest("an image manifest names no manifests"));
        }
        if self.artifact_type.is_empty() {
            self.artifact_type.clone_from(&config.media_type);
        }
        if layers.len() > limits::ARTIFACT_BLOBS {
            return Err(too_many_blobs());
        }
        let mut sizes = BTreeMap::new();
        for descriptor in std::iter::once(&config).chain(&layers) {
            let (digest, size) = (digest_in(descriptor)?, descriptor.size);
            match sizes.insert(digest, size) {
                None => self.blobs.push(Named {
                    digest,
                    size,
                    foreign: is_foreign(descriptor),
                }),
                Some(former) if former != size => {
                    let text = format!("{digest} has {former} bytes there, and {size} bytes");
                    return Err(bad_manifest(text));
                }
                Some(_) => {}
            }
        }
        (self.config, self.layers) = (Some(config), layers);
        Ok(())
    }

    fn read_index(&mut self, json: Json) -> Result<(), OciError> {
        let Some(manifests) = json.manifests else {
            return Err(bad_manifest("an index has manifests"));
        };
        if json.config.is_some() || json.layers.is_some() {
            return Err(bad_manifest("an index has no config and no layers"));
        }
        self.children = manifests.iter().map(digest_in).collect::<Result<_, _>>()?;
        Ok(())
    }
}

fn too_many_blobs() -> OciError {
    let most = limits::ARTIFACT_BLOBS;
    bad_manifest(format!("it names more than {most} blobs"))
}

fn digest_in(descriptor: &Descriptor) -> Result<Sha256, OciError> {
    route::digest(&descriptor.digest).map_err(|_| {
        let text = format!("digest {:?} is not supported", descriptor.digest);
        bad_manifest(text.chars().take(300).collect::<String>())
    })
}

fn is_foreign(descriptor: &Descriptor) -> bool {
    let kind = &descriptor.media_type;
    let urls = descriptor
        .urls
        .as_ref()
        .is_some_and(|urls| !urls.is_empty());
    urls || kind.contains(".foreign.") || kind.contains(".nondistributable.")
}

/// The specification's word for a manifest that names what is not here.
pub(super) fn lacks(digest: &Sha256) -> OciError {
    let text = "manifest references a manifest or blob unknown to registry";
    OciError::new(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN", text)
        .detail(serde_json::json!({"digest": digest.to_string()}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse(document: &Value, content_type: &str) -> Result<Document, OciError> {
        Document::parse(document.to_string().as_bytes(), content_type)
    }

    fn descriptor(seed: u8) -> Value {
        let digest = Sha256([seed; 32]).to_string();
        json!({"mediaType": format!("application/{seed}"), "digest": digest, "size": 3})
    }

    #[test]
    fn what_is_understood() {
        let image = json!({
            "schemaVersion": 2, "mediaType": IMAGE, "config": descriptor(1),
            "layers": [descriptor(2), descriptor(2), descriptor(1)],
            "subject": descriptor(9), "annotations": {"a": "b"},
        });
        for content_type in [IMAGE, "", "application/json"] {
            let read = parse(&image, content_type).unwrap();
            assert_eq!(read.media_type, IMAGE);
            assert_eq!(read.artifact_type, "application/1");
            assert_eq!(read.blobs.len(), 2, "each once");
            assert_eq!(read.subject, Some(Sha256([9; 32])));
            assert_eq!(read.annotations["a"], "b");
        }
        let index = json!({"schemaVersion": 2, "manifests": [descriptor(3)]});
        let read = parse(&index, INDEX).unwrap();
        assert_eq!(read.children, [Sha256([3; 32])]);
        assert_eq!(read.artifact_type, "");
        let nulls = json!({
            "schemaVersion": 2, "config": descriptor(1), "layers": [],
            "annotations": null, "subject": null, "artifactType": "x/y",
        });
        assert_eq!(parse(&nulls, IMAGE).unwrap().artifact_type, "x/y");
    }

    #[test]
    fn what_is_refused() {
        let image = || json!({"schemaVersion": 2, "mediaType": IMAGE, "config": descriptor(1), "layers": []});
        let with = |name: &str, value: Value| {
            let mut image = image();
            image[name] = value;
            image
        };
        let many: Vec<Value> = (0..=1000_u32)
            .map(|n| {
                let mut bytes = [7; 32];
                bytes[..4].copy_from_slice(&n.to_be_bytes());
                json!({"digest": Sha256(bytes).to_string(), "size": 1})
            })
            .collect();
        for (document, content_type) in [
            (image(), INDEX),
            (image(), "text/html"),
            (with("mediaType", json!("text/html")), ""),
            (json!({"schemaVersion": 2}), ""),
            (with("schemaVersion", json!(1)), IMAGE),
            (with("layers", json!(null)), IMAGE),
            (with("manifests", json!([])), IMAGE),
            (
                with("layers", json!([{"digest": "sha256:x", "size": 1}])),
                IMAGE,
            ),
            (
                with("layers", json!([{"digest": "../x", "size": 1}])),
                IMAGE,
            ),
            (
                with(
                    "config",
                    json!({"digest": Sha256([1; 32]).to_string(), "size": -1}),
                ),
                IMAGE,
            ),
            (
                with(
                    "layers",
                    json!([{"digest": Sha256([1; 32]).to_string(), "size": 4}]),
                ),
                IMAGE,
            ),
            (with("artifactType", json!("x".repeat(300))), IMAGE),
            (with("layers", json!(many)), IMAGE),
            (json!([]), IMAGE),
        ] {
            assert!(parse(&document, content_type).is_err(), "{document}");
        }
        assert!(Document::parse(b"{", IMAGE).is_err());
    }
}
