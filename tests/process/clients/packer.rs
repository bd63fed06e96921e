//! The packer plugin, as far as it speaks to a registry by itself: before a push with its option to do so it
//! reverts the template's latest tag. Everything else goes through the vendor's command line.

use super::gitlab::GO;
use super::read::{self, body, go_text, go_uint};
use super::wire::{Load, Wire};
use super::{HISTORY, Site};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// It has none.
const LIMIT: Duration = Duration::from_secs(60);

/// The plugin's reader of what its command line prints, used for answers too.
async fn revert(wire: &mut Wire, id: &str) -> Result<(), String> {
    let path = format!("/registry/revert?id={id}");
    let sent = wire.send("DELETE", &path, &[], &Load::Nothing).await;
    let answer = sent.unwrap();
    assert_eq!(answer.status, 200, "unsupported http response code");
    let json = read::sound(&answer, &path);
    go_uint(&json, "code");
    go_text(&json, "exception_type");
    match go_text(&json, "status") {
        "OK" => Ok(()),
        _ => Err(go_text(&json, "message").to_owned()),
    }
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    let mut wire = Wire::new(site.registry(n), LIMIT, &GO);
    let id = &site.histories["of-packer"];
    assert_eq!(revert(&mut wire, id).await, Ok(()));
    // On the next member's registry and API alike, at once.
    let mut next = Wire::new(site.registry(n + 1), LIMIT, &GO);
    let mut api = Wire::new(site.api(n + 2), LIMIT, &GO);
    let path = format!("/registry/v2/vm?id={id}");
    let seen = next.send("GET", &path, &[], &Load::Nothing).await.unwrap();
    let path = format!("/api/v1/registry/vm?id={id}");
    let too = api.send("GET", &path, &[], &Load::Nothing).await.unwrap();
    for answer in [seen, too] {
        let json = read::sound(&answer, "registry");
        let tags = read::items(&body(&json)["versions"]).iter();
        let tags: Vec<&str> = tags.map(|tag| go_text(tag, "tag")).collect();
        let all = ["v0", "v1", "v2", "v3"];
        assert_eq!(tags, all[..HISTORY - 1 - n]);
    }
    assert_eq!(revert(&mut wire, "nobody's").await, Err("Not found".into()));
    let left: Value = read::sound(
        &next
            .send("GET", "/registry/vm", &[], &Load::Nothing)
            .await
            .unwrap(),
        "/registry/vm",
    );
    assert!(!read::items(body(&left)).is_empty());
}
