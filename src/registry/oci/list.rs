//! Lists: tags of a repository, who refers to a manifest, repositories. Pages go on behind the last
//! name of the one before, so that nothing is skipped when others change meanwhile.

use super::document::{Descriptor, Document, INDEX};
use super::error::{OciAnswer, OciError, no_repository, unavailable};
use super::{route, template, value};
use crate::app::Consistency;
use crate::registry::RegistryService;
use crate::registry::answer::Params;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, Uri, header};
use mainstay_model::State;
use mainstay_model::artifact::Artifact;
use mainstay_model::ids::Sha256;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Descriptors of one page of referrers, and bytes of their JSON.
const REFERRERS_PAGE: usize = 200;
const REFERRERS_BYTES: usize = 3 << 20;
/// Repositories of one page when the client does not say.
const CATALOG_PAGE: usize = 1000;
const FILTERS: HeaderName = HeaderName::from_static("oci-filters-applied");

/// Which part of a list is asked for.
struct Page {
    count: Option<usize>,
    last: String,
}

impl Page {
    fn of(uri: &Uri) -> Result<Self, OciError> {
        let params = Params::from_query(uri);
        let count = match params.get("n").map(str::parse::<usize>) {
            None => None,
            Some(Ok(n)) => Some(n),
            Some(Err(_)) => {
                let text = "n is not a number";
                return Err(OciError::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", text));
            }
        };
        Ok(Self {
            count,
            last: params.get("last").unwrap_or_default().to_owned(),
        })
    }

    /// The names of this page, out of all in order, and the `Link` to the next one.
    fn cut(&self, names: Vec<String>, path: &str) -> (Vec<String>, Option<String>) {
        let mut names: Vec<String> = names
            .into_iter()
            .filter(|name| self.last.is_empty() || *name > self.last)
            .collect();
        let Some(count) = self.count.filter(|count| *count < names.len()) else {
            return (names, None);
        };
        names.truncate(count);
        let link = names.last().map(|last| {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.append_pair("n", &count.to_string());
            query.append_pair("last", last);
            link(path, &query.finish())
        });
        (names, link)
    }
}

fn link(path: &str, query: &str) -> String {
    format!("<{path}?{query}>; rel=\"next\"")
}

fn with_link(mut response: Response, link: Option<String>) -> Response {
    if let Some(link) = link {
        response.headers_mut().insert(header::LINK, value(&link));
    }
    response
}

impl RegistryService {
    /// `GET tags/list`
    pub(super) async fn list_tags(&self, name: &str, uri: &Uri) -> OciAnswer {
        let page = Page::of(uri)?;
        let tags = |state: &State| {
            let repository = state.repositories.get(name);
            let template = template::named(state, name);
            if repository.is_none() && template.is_none() {
                return None;
            }
            let own = repository.into_iter().flat_map(|r| r.tags.keys().cloned());
            let templates = template.into_iter().flat_map(template::tags);
            let all = own.chain(templates.map(|t| t.name.clone()));
            Some(all.collect::<BTreeSet<String>>())
        };
        let tags = self.catalog.take(Consistency::Linearizable, tags).await?;
        let tags = tags.ok_or_else(|| no_repository(name))?;
        let tags = tags.into_iter().collect();
        let (tags, link) = page.cut(tags, &format!("/v2/{name}/tags/list"));
        let body = json!({"name": name, "tags": tags}).to_string();
        Ok(with_link(super::json(StatusCode::OK, body), link))
    }

    /// `GET _catalog`
    pub(super) async fn list_repositories(&self, uri: &Uri) -> OciAnswer {
        let mut page = Page::of(uri)?;
        page.count = Some(page.count.unwrap_or(CATALOG_PAGE).min(CATALOG_PAGE));
        let names = |state: &State| {
            let shown = state.repositories.iter();
            let shown = shown.filter(|(_, r)| r.artifacts.values().any(Artifact::visible));
            let mut names: BTreeSet<String> = shown.map(|(name, _)| name.clone()).collect();
            let templates = state.templates.values();
            let templates = templates.filter(|t| route::is_name(&t.name) && t.latest().is_some());
            names.extend(templates.map(|t| t.name.clone()));
            names
        };
        let names = self.catalog.take(Consistency::Linearizable, names).await?;
        let names = names.into_iter().collect();
        let (names, link) = page.cut(names, "/v2/_catalog");
        let body = json!({"repositories": names}).to_string();
        Ok(with_link(super::json(StatusCode::OK, body), link))
    }

    /// `GET referrers/DIGEST`: an image index of the manifests whose subject this is.
    pub(super) async fn list_referrers(
        self: &Arc<Self>,
        name: &str,
        subject: &str,
        uri: &Uri,
    ) -> OciAnswer {
        let subject = route::digest(subject)?;
        let params = Params::from_query(uri);
        let wanted = params.get("artifactType");
        let last = params.get("last").map(route::digest).transpose()?;
        let refers = |state: &State| {
            let repository = state.repositories.get(name);
            let artifacts = repository.into_iter().flat_map(|r| r.artifacts.values());
            let refers = artifacts.filter(|a| {
                a.visible()
                    && a.content.subject == Some(subject)
                    && wanted.is_none_or(|wanted| a.content.artifact_type == wanted)
                    && last.is_none_or(|last| a.content.digest > last)
            });
            refers.take(REFERRERS_PAGE + 1).cloned().collect::<Vec<_>>()
        };
        let refers = self.catalog.take(Consistency::Linearizable, refers).await?;
        let mut shown: Vec<Descriptor> = Vec::new();
        let (mut bytes, mut end) = (0, None);
        for artifact in &refers {
            let descriptor = self.describe_artifact(artifact).await?;
            bytes += serde_json::to_string(&descriptor).map_or(0, |text| text.len());
            let full = shown.len() == REFERRERS_PAGE || bytes > REFERRERS_BYTES;
            if full && !shown.is_empty() {
                break;
            }
            end = Some(artifact.content.digest);
            shown.push(descriptor);
        }
        let next = end.filter(|_| shown.len() < refers.len());
        let link = next.map(|end| next_referrers(name, &subject, wanted, &end));
        let body = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": shown});
        let kind = [(header::CONTENT_TYPE, HeaderValue::from_static(INDEX))];
        let mut response = (StatusCode::OK, kind, body.to_string()).into_response();
        if wanted.is_some() {
            let applied = HeaderValue::from_static("artifactType");
            response.headers_mut().insert(FILTERS, applied);
        }
        Ok(with_link(response, link))
    }

    async fn describe_artifact(
        self: &Arc<Self>,
        artifact: &Artifact,
    ) -> Result<Descriptor, OciError> {
        let content = &artifact.content;
        let bytes = self.manifest_bytes(artifact).await.map_err(unavailable)?;
        let document = Document::parse(&bytes, &content.media_type)?;
        let kind = Some(document.artifact_type).filter(|kind| !kind.is_empty());
        Ok(Descriptor {
            media_type: content.media_type.clone(),
            digest: content.digest.to_string(),
            size: content.size,
            urls: None,
            artifact_type: kind,
            annotations: Some(document.annotations).filter(|a| !a.is_empty()),
        })
    }
}

fn next_referrers(name: &str, subject: &Sha256, wanted: Option<&str>, last: &Sha256) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    if let Some(wanted) = wanted {
        query.append_pair("artifactType", wanted);
    }
    query.append_pair("last", &last.to_string());
    link(&format!("/v2/{name}/referrers/{subject}"), &query.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_go_on_behind_the_last_name() {
        let names = || ["a", "b", "c"].map(str::to_owned).to_vec();
        let page = |text: &str| Page::of(&format!("/x?{text}").parse().unwrap()).unwrap();
        let cut = |text: &str| page(text).cut(names(), "/p");
        assert_eq!(cut(""), (names(), None));
        assert_eq!(cut("n=0"), (Vec::new(), None));
        assert_eq!(cut("n=3"), (names(), None));
        let (first, link) = cut("n=2");
        assert_eq!(first, ["a", "b"]);
        assert_eq!(link.unwrap(), "</p?n=2&last=b>; rel=\"next\"");
        assert_eq!(cut("n=2&last=b"), (vec!["c".to_owned()], None));
        assert_eq!(cut("last=bb").0, ["c"]);
        assert!(Page::of(&"/x?n=x".parse().unwrap()).is_err());
        assert!(Page::of(&"/x?n=-1".parse().unwrap()).is_err());
    }
}
