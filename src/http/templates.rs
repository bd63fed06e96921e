//! Templates as JSON, for the API and the registry port. A template without a visible tag is not
//! there yet. Knows names and digests only, never bytes.

use mainstay_model::State;
use mainstay_model::template::{Tag, Template};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// `GET /api/v1/registry/vm`: an array.
#[derive(Clone, Copy)]
pub struct TemplateList<'a> {
    /// Where they are.
    pub state: &'a State,
    /// `apiVer=v1`: id and name, without size and architecture.
    pub short: bool,
}

impl Serialize for TemplateList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let visible = self
            .state
            .templates
            .values()
            .filter(|t| t.latest().is_some());
        serializer.collect_seq(visible.map(|t| Item::new(self.state, t, self.short)))
    }
}

/// What `GET /api/v1/registry/vm` shows.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Templates<'a> {
    /// Without an id.
    All(Vec<Item<'a>>),
    /// With an id.
    One(Box<TemplateView<'a>>),
}

/// One item of the list.
#[derive(Serialize, ToSchema)]
#[schema(as = ListedTemplate)]
pub struct Item<'a> {
    id: &'a str,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arch: Option<&'a str>,
    last_pull: u64,
    last_push: u64,
}

impl<'a> Item<'a> {
    fn new(state: &State, template: &'a Template, short: bool) -> Self {
        Self {
            id: template.id.as_str(),
            name: &template.name,
            size: (!short).then(|| size(template)),
            arch: (!short).then(|| arch(template)),
            last_pull: last_pull(state, template),
            last_push: last_push(template),
        }
    }
}

/// `GET /api/v1/registry/vm?id=`: one template with its visible tags in order.
#[derive(Serialize, ToSchema)]
#[schema(as = Template)]
pub struct TemplateView<'a> {
    id: &'a str,
    name: &'a str,
    size: u64,
    arch: &'a str,
    last_pull: u64,
    last_push: u64,
    versions: Vec<TagView<'a>>,
}

impl<'a> TemplateView<'a> {
    /// `None` while no tag is visible.
    pub fn new(state: &State, template: &'a Template) -> Option<Self> {
        template.latest()?;
        Some(Self {
            id: template.id.as_str(),
            name: &template.name,
            size: size(template),
            arch: arch(template),
            last_pull: last_pull(state, template),
            last_push: last_push(template),
            versions: template
                .visible_tags()
                .map(|tag| TagView::new(tag, pulled(state, template, tag.number)))
                .collect(),
        })
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = TemplateTag)]
struct TagView<'a> {
    number: u32,
    tag: &'a str,
    config_file: &'static str,
    nvram: &'static str,
    images: Vec<&'a str>,
    state_files: Vec<&'a str>,
    state_file: &'a str,
    description: &'a str,
    size: u64,
    arch: &'a str,
    last_pull: u64,
    last_push: u64,
    creation_date: u64,
    manifest: String,
    holders: Vec<String>,
}

impl<'a> TagView<'a> {
    fn new(tag: &'a Tag, last_pull: u64) -> Self {
        let content = &tag.content;
        Self {
            number: tag.number,
            tag: &tag.name,
            config_file: "",
            nvram: "",
            images: vec![content.disk()],
            state_files: content.memory().into_iter().collect(),
            state_file: content.memory().unwrap_or_default(),
            description: &content.description,
            size: content.size,
            arch: &content.arch,
            last_pull,
            last_push: tag.created_ms / 1000,
            creation_date: tag.created_ms / 1000,
            manifest: content.manifest.to_string(),
            holders: tag.holders.iter().map(ToString::to_string).collect(),
        }
    }
}

/// Logical bytes of all visible tags: changes with every push, which is what clients watch it for.
fn size(template: &Template) -> u64 {
    template
        .visible_tags()
        .fold(0, |sum, tag| sum.saturating_add(tag.content.size))
}

fn arch(template: &Template) -> &str {
    template.latest().map_or("", |tag| &tag.content.arch)
}

fn last_push(template: &Template) -> u64 {
    template
        .visible_tags()
        .map(|tag| tag.created_ms)
        .max()
        .unwrap_or(0)
        / 1000
}

/// When a tag was last pulled, in seconds since the Unix epoch; 0: never, as far as is known.
fn pulled(state: &State, template: &Template, number: u32) -> u64 {
    let at = state.pulls.get(&(template.id.clone(), number));
    at.copied().unwrap_or(0) / 1000
}

fn last_pull(state: &State, template: &Template) -> u64 {
    let of = |number| (template.id.clone(), number);
    let pulls = state.pulls.range(of(0)..=of(u32::MAX));
    pulls.map(|(_, at)| *at).max().unwrap_or(0) / 1000
}
