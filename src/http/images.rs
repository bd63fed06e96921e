//! Saves as JSON: what the dialect calls requests of save-image. The request's members are spelt as in the
//! reference system's own records, capitalised; `error` and `script_result` are `null` when there is none.

use super::View;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mainstay_model::instance::ScriptResult;
use mainstay_model::save::{Save, SaveTarget};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// The reference system's priority of what asks for none.
const PRIORITY: u32 = 1_000;

/// What `GET /api/v1/image` shows.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Images<'a> {
    /// Without an id.
    All(Vec<ImageView<'a>>),
    /// With an id.
    One(Box<ImageView<'a>>),
}

/// `GET /api/v1/image`: an array of requests.
#[derive(Clone, Copy)]
pub struct ImageList<'a>(pub View<'a>);

impl Serialize for ImageList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let saves = self.0.state.saves.values();
        serializer.collect_seq(saves.map(|save| ImageView::new(self.0, save)))
    }
}

/// One request.
#[derive(Serialize, ToSchema)]
#[schema(as = SavedImage)]
pub struct ImageView<'a> {
    id: &'a str,
    /// `pending`, `done`, `error`
    status: &'static str,
    request: RequestView<'a>,
    error: Option<ErrorView<'a>>,
    script_result: Option<ScriptView<'a>>,
}

impl<'a> ImageView<'a> {
    /// The request as `view` has it.
    pub fn new(view: View<'a>, save: &'a Save) -> Self {
        let error = save.end.as_ref().and_then(|end| end.error.as_deref());
        Self {
            id: save.id.as_str(),
            status: match (&save.end, error) {
                (None, _) => "pending",
                (Some(_), None) => "done",
                (Some(_), Some(_)) => "error",
            },
            request: RequestView::new(view, save),
            error: error.map(|text| ErrorView { message: text }),
            script_result: save.script_result.as_deref().map(ScriptView::new),
        }
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = SavedImageError)]
#[serde(rename_all = "PascalCase")]
struct ErrorView<'a> {
    message: &'a str,
}

#[derive(Serialize, ToSchema)]
#[schema(as = SavedImageRequest)]
#[serde(rename_all = "PascalCase")]
struct RequestView<'a> {
    request_id: &'a str,
    priority: u32,
    /// Unix seconds
    timestamp: u64,
    /// Nothing expires: 0
    reserve_expiry_timestamp: u64,
    registry_addr: &'a str,
    #[serde(rename = "VMID")]
    vm_id: &'a str,
    #[serde(rename = "InstanceID")]
    instance_id: &'a str,
    #[serde(rename = "NodeID")]
    node_id: &'a str,
    /// Of the template that the tag goes to, or went to
    #[serde(rename = "TemplateID")]
    template_id: &'a str,
    new_template_name: &'a str,
    tag: &'a str,
    description: &'a str,
    suspend: bool,
    /// Standard base64; empty once the request has ended
    script: String,
    do_suspend_test: bool,
    revert_before_push: bool,
    revert_tag: &'a str,
    cancel_on_script_failure: bool,
}

impl<'a> RequestView<'a> {
    fn new(view: View<'a>, save: &'a Save) -> Self {
        let request = &save.request;
        let (template, name) = match &request.target {
            SaveTarget::Template(id) => (id.as_str(), ""),
            SaveTarget::New { name, .. } => {
                let made = save.published.as_ref();
                (made.map_or("", |(id, _)| id.as_str()), name.as_str())
            }
        };
        Self {
            request_id: save.id.as_str(),
            priority: PRIORITY,
            timestamp: save.created_ms / 1_000,
            reserve_expiry_timestamp: 0,
            registry_addr: view.registry_address,
            vm_id: request.instance.as_str(),
            instance_id: request.instance.as_str(),
            node_id: save.node.as_str(),
            template_id: template,
            new_template_name: name,
            tag: &request.tag,
            description: &request.description,
            suspend: request.suspend,
            script: STANDARD.encode(&request.script),
            do_suspend_test: request.sanity_test,
            revert_before_push: request.revert,
            revert_tag: request.revert_tag.as_deref().unwrap_or_default(),
            cancel_on_script_failure: request.cancel_on_script_failure,
        }
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = SavedImageScriptResult)]
struct ScriptView<'a> {
    return_code: i32,
    errors: Vec<&'static str>,
    did_timeout: bool,
    stdout: &'a str,
    stderr: &'a str,
}

impl<'a> ScriptView<'a> {
    fn new(result: &'a ScriptResult) -> Self {
        let late = result.did_timeout;
        Self {
            return_code: result.return_code,
            errors: late
                .then_some("the script did not end in time")
                .into_iter()
                .collect(),
            did_timeout: late,
            stdout: &result.stdout,
            stderr: &result.stderr,
        }
    }
}
