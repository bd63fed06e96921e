//! The list of all instances, kept as it is sent: in pages, each compressed once. A request makes anew only the pages in
//! which something changed since the last one, so that clients which list ten thousand instances every few seconds
//! cost what changed, and nothing is held up meanwhile: the state is under its guard for a look at all instances
//! and for rendering a bounded number of them.
//!
//! A page is named by the versions of what is in it ([`State::nodes_version`], [`Instances::versioned`], and progress
//! where it moves); equal names, equal bytes. Pages end at ids that say so by themselves, so that an instance which
//! comes or goes changes one page. Compressed, a page is a run of deflate blocks that ends at a byte and refers to nothing
//! before it; pages in a row between a head and an end are one gzip stream (RFC 1951, RFC 1952). A client that takes no
//! gzip gets them unpacked, one after the other.
//!
//! [`State::nodes_version`]: mainstay_model::State::nodes_version
//! [`Instances::versioned`]: mainstay_model::state::Instances::versioned

use super::envelope::Call;
use super::error::ApiError;
use super::instances::{Wrapper, moves, progress};
use super::{ApiState, Stale, View};
use crate::app::Consistency;
use axum::body::{Body, Bytes};
use axum::response::Response;
use flate2::{Compress, Compression, Crc, Decompress, FlushCompress, FlushDecompress, Status};
use futures::stream;
use http::{HeaderMap, HeaderValue, header};
use mainstay_model::instance::Instance;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, LazyLock};
use tokio::sync::Mutex;

/// Most instances of a page; ids end one after 16 on average.
const PAGE_MAX: usize = 64;
/// Instances that are rendered under one guard, at least; else a part of all.
const RENDER_MIN: usize = 512;
const RENDER_PART: usize = 16;
/// Where so much changes that they never suffice, all are rendered under one guard.
const LOOKS_MAX: usize = 64;
/// Sent at once, about.
const PART_BYTES: usize = 128 << 10;

const HEAD: &[u8] = br#"{"status":"OK","message":"","body":["#;
const END: &[u8] = b"]}";
/// Ten bytes before the first block: no name, no time, written by whatever system.
const GZIP_HEAD: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 255];
/// A comma as a block of its own.
const COMMA: [u8; 6] = [0, 1, 0, 0xfe, 0xff, b','];

/// What is kept; one request at a time brings it up to date.
#[derive(Default)]
pub struct Listing {
    kept: Mutex<Kept>,
}

/// The pages, and the list they make.
#[derive(Default)]
pub(super) struct Kept {
    /// Versions of what the list shows; `None`: look.
    seen: Option<(u64, u64)>,
    pages: HashMap<Box<[u64]>, Page>,
    list: List,
}

/// Some instances, as JSON with commas between them.
#[derive(Clone)]
pub(super) struct Page(Arc<Packed>);

struct Packed {
    /// [`COMMA`], then the blocks.
    bytes: Box<[u8]>,
    /// Of the JSON.
    crc: Crc,
}

/// A whole list, ready to be sent many times.
#[derive(Clone)]
pub(super) struct List(Arc<Whole>);

struct Whole {
    pages: Vec<Page>,
    /// Of all of the JSON.
    crc: Crc,
    /// Its bytes.
    length: usize,
}

impl Default for List {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

/// What a look at the state found.
#[derive(Default)]
pub(super) struct Draft {
    seen: Option<(u64, u64)>,
    /// All pages in order; those that are not kept by their place in `new`.
    order: Vec<Result<Page, usize>>,
    new: Vec<(Box<[u64]>, Vec<u8>)>,
    /// Every page is there, all of the same state.
    pub(super) whole: bool,
    /// The kept list is it.
    same: bool,
}

impl ApiState {
    /// `GET /api/v1/vm` without an id.
    pub(super) async fn list_instances(
        &self,
        call: &Call,
        gzip: bool,
    ) -> Result<Response, ApiError> {
        // What is read after this is newer still.
        let stale = self.read(call).await?.stale;
        let mut kept = self.listing.kept.lock().await;
        for look in 0.. {
            let mut draft = {
                let state = self.app.read(Consistency::Stale).await?;
                let part = (state.instances.len() / RENDER_PART).max(RENDER_MIN);
                let most = if look < LOOKS_MAX { part } else { usize::MAX };
                let view = View {
                    state: &state,
                    soft: &self.liveness,
                    registry_address: &self.about.registry_address,
                };
                kept.look(view, most)
            };
            let whole = draft.whole;
            if !draft.new.is_empty() {
                // Milliseconds, in which this thread could answer others.
                let packed = tokio::task::spawn_blocking(move || (draft.pack(), draft)).await;
                let (packed, after) = packed.map_err(|e| failed(&e))?;
                draft = after;
                kept.keep(draft, packed.map_err(|e| failed(&e))?);
            } else {
                kept.keep(draft, Vec::new());
            }
            if whole {
                break;
            }
        }
        let list = kept.list();
        drop(kept);
        Ok(Stale::tell(stale, list.response(gzip)))
    }
}

fn failed(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::internal(format!("cannot encode the answer: {error}"))
}

impl Kept {
    /// What is missing, rendered, but of more than `most` instances only the first pages.
    pub(super) fn look(&self, view: View<'_>, most: usize) -> Draft {
        let seen = (view.state.instances.version(), view.state.nodes_version());
        if self.seen == Some(seen) {
            return Draft {
                seen: self.seen,
                whole: true,
                same: true,
                ..Draft::default()
            };
        }
        let mut draft = Draft {
            seen: Some(seen),
            whole: true,
            ..Draft::default()
        };
        let (mut name, mut page, mut rendered) = (vec![seen.1], Vec::new(), 0);
        let mut all = view.state.instances.versioned().peekable();
        while let Some((instance, version)) = all.next() {
            name.push(version);
            if moves(instance) {
                name.push(progress(view, instance).to_bits().into());
                draft.seen = None;
            }
            page.push(instance);
            if page.len() < PAGE_MAX && !ends_page(instance) && all.peek().is_some() {
                continue;
            }
            match self.pages.get(name.as_slice()) {
                Some(kept) => draft.order.push(Ok(kept.clone())),
                None if rendered > 0 && rendered + page.len() > most => {
                    draft.whole = false;
                    return draft;
                }
                None => {
                    rendered += page.len();
                    draft.order.push(Err(draft.new.len()));
                    draft
                        .new
                        .push((name.as_slice().into(), render(view, &page)));
                }
            }
            name.truncate(1);
            page.clear();
        }
        draft
    }

    /// As of the last whole look.
    pub(super) fn list(&self) -> List {
        self.list.clone()
    }

    /// Take the new pages, and, of a whole list, drop those that are no longer in it.
    pub(super) fn keep(&mut self, draft: Draft, packed: Vec<Page>) {
        if draft.same {
            return;
        }
        if draft.whole {
            let pages = draft.order.into_iter().map(|page| match page {
                Ok(kept) => kept,
                Err(n) => packed[n].clone(),
            });
            self.list = List::new(pages.collect());
            self.seen = draft.seen;
        }
        let names = draft.new.into_iter().map(|(name, _)| name);
        self.pages.extend(names.zip(packed));
        if draft.whole && self.pages.len() > self.list.0.pages.len() {
            // A page that is only here is in no list.
            let listed = |page: &Page| Arc::strong_count(&page.0) > 1;
            self.pages.retain(|_, page| listed(page));
        }
    }
}

impl Draft {
    pub(super) fn pack(&self) -> io::Result<Vec<Page>> {
        let mut compress = Compress::new(Compression::fast(), false);
        let pages = self.new.iter();
        pages
            .map(|(_, json)| {
                let mut bytes = COMMA.to_vec();
                deflate(&mut compress, json, FlushCompress::Sync, &mut bytes)?;
                let mut crc = Crc::new();
                crc.update(json);
                let bytes = bytes.into();
                Ok(Page(Arc::new(Packed { bytes, crc })))
            })
            .collect()
    }
}

/// About one in 16 of our ids, which end with a random hexadecimal digit.
fn ends_page(instance: &Instance) -> bool {
    let id = instance.id.as_str().as_bytes();
    id.last().is_some_and(|last| last.is_multiple_of(16))
}

fn render(view: View<'_>, page: &[&Instance]) -> Vec<u8> {
    let mut json = Vec::with_capacity(page.len() * 1024);
    for instance in page {
        if !json.is_empty() {
            json.push(b',');
        }
        let whole = serde_json::to_writer(&mut json, &Wrapper::new(view, instance));
        debug_assert!(whole.is_ok(), "nothing in an instance is refused by JSON");
    }
    json
}

/// Append blocks that end at a byte and refer to nothing before them.
fn deflate(
    compress: &mut Compress,
    plain: &[u8],
    flush: FlushCompress,
    to: &mut Vec<u8>,
) -> io::Result<()> {
    compress.reset();
    loop {
        to.reserve(plain.len() / 4 + 64);
        let done = usize::try_from(compress.total_in()).unwrap_or(plain.len());
        let status = compress.compress_vec(&plain[done..], to, flush)?;
        let done = compress.total_in() == plain.len() as u64;
        // Room left: everything was flushed.
        if status == Status::StreamEnd || (done && to.len() < to.capacity()) {
            return Ok(());
        }
    }
}

/// The blocks of the head and of the end are always the same.
static ENDS: LazyLock<(Bytes, Bytes)> = LazyLock::new(|| {
    let mut compress = Compress::new(Compression::fast(), false);
    let mut head = GZIP_HEAD.to_vec();
    let mut end = Vec::new();
    let packed = deflate(&mut compress, HEAD, FlushCompress::Sync, &mut head)
        .and_then(|()| deflate(&mut compress, END, FlushCompress::Finish, &mut end));
    debug_assert!(packed.is_ok());
    (head.into(), end.into())
});

impl List {
    fn new(pages: Vec<Page>) -> Self {
        let of = |bytes: &[u8]| {
            let mut crc = Crc::new();
            crc.update(bytes);
            crc
        };
        let (mut crc, comma) = (of(HEAD), of(b","));
        // A checksum keeps lengths in 32 bits only.
        let mut length = HEAD.len() + END.len();
        for (n, page) in pages.iter().enumerate() {
            if n > 0 {
                crc.combine(&comma);
                length += 1;
            }
            crc.combine(&page.0.crc);
            length += page.length();
        }
        crc.combine(&of(END));
        Self(Arc::new(Whole { pages, crc, length }))
    }

    pub(super) fn response(self, gzip: bool) -> Response {
        let mut response = if gzip { self.packed() } else { self.plain() };
        let headers = response.headers_mut();
        let json = HeaderValue::from_static("application/json");
        headers.insert(header::CONTENT_TYPE, json);
        let vary = HeaderValue::from_static("accept-encoding");
        headers.insert(header::VARY, vary);
        response
    }

    fn packed(self) -> Response {
        let mut end = ENDS.1.to_vec();
        end.extend_from_slice(&self.0.crc.sum().to_le_bytes());
        end.extend_from_slice(&self.0.crc.amount().to_le_bytes());
        let pages = self.0.pages.iter().enumerate();
        let pages = pages.map(|(n, page)| page.packed(n).len()).sum::<usize>();
        let length = ENDS.0.len() + pages + end.len();
        let pages = self.parts(|page, n, to| {
            to.extend_from_slice(page.packed(n));
            Ok(())
        });
        let mut response = body(ENDS.0.clone(), pages, end.into(), length);
        let gzip = HeaderValue::from_static("gzip");
        response
            .headers_mut()
            .insert(header::CONTENT_ENCODING, gzip);
        response
    }

    /// Unpacked as it is sent.
    fn plain(self) -> Response {
        let length = self.0.length;
        let pages = self.parts(|page, n, to| {
            if n > 0 {
                to.push(b',');
            }
            inflate(page.packed(0), page.length(), to)
        });
        let (head, end) = (Bytes::from_static(HEAD), Bytes::from_static(END));
        body(head, pages, end, length)
    }

    /// All pages one after the other, some at a time: each part is made when the one before is on its way.
    fn parts(
        self,
        add: impl Fn(&Page, usize, &mut Vec<u8>) -> io::Result<()>,
    ) -> impl Iterator<Item = io::Result<Bytes>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let mut part = Vec::with_capacity(PART_BYTES * 5 / 4);
            while let Some(page) = self.0.pages.get(next)
                && part.len() < PART_BYTES
            {
                if let Err(error) = add(page, next, &mut part) {
                    next = usize::MAX;
                    return Some(Err(error));
                }
                next += 1;
            }
            (!part.is_empty()).then(|| Ok(part.into()))
        })
    }
}

fn body(
    head: Bytes,
    pages: impl Iterator<Item = io::Result<Bytes>> + Send + 'static,
    end: Bytes,
    length: usize,
) -> Response {
    let all = std::iter::once(Ok(head)).chain(pages);
    let all = stream::iter(all.chain(std::iter::once(Ok(end))));
    let mut response = Response::new(Body::from_stream(all));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, length.into());
    response
}

impl Page {
    /// What is sent of it as page number `n`.
    fn packed(&self, n: usize) -> &[u8] {
        let skip = if n == 0 { COMMA.len() } else { 0 };
        &self.0.bytes[skip..]
    }

    /// Bytes of its JSON.
    fn length(&self) -> usize {
        self.0.crc.amount() as usize
    }
}

/// The opposite of [`deflate`]: appends `length` bytes.
fn inflate(packed: &[u8], length: usize, to: &mut Vec<u8>) -> io::Result<()> {
    let end = to.len() + length;
    // One more, so that room is left when all is there.
    to.reserve(length + 1);
    let mut decompress = Decompress::new(false);
    decompress.decompress_vec(packed, to, FlushDecompress::Sync)?;
    if to.len() == end {
        return Ok(());
    }
    Err(io::Error::other("a kept page does not unpack"))
}

/// Does the client take gzip?
pub(super) fn takes_gzip(headers: &HeaderMap) -> bool {
    let names = headers.get_all(header::ACCEPT_ENCODING).iter();
    let names = names.filter_map(|value| value.to_str().ok());
    names.flat_map(|value| value.split(',')).any(|name| {
        let mut parts = name.split(';').map(str::trim);
        let known = matches!(parts.next(), Some("gzip" | "x-gzip" | "*"));
        let refused = |q: &str| q.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0));
        known && !parts.any(refused)
    })
}
