//! Images that the desired set names, to be had or to be dropped. Those to be had are fetched in the background, a
//! few at a time, tried again until they are here or not named any more. They stay until the controller has taken
//! note and names them no more; from then on a node that needs the room drops them like any other.

use super::executor::Inner;
use crate::cache::Image;
use crate::wire::{ImagePull, ImageRef};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Fetched at once: instances that start meanwhile have most of the line for themselves.
const AT_ONCE: usize = 2;
/// Longest pause between attempts.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Progress is worth a report of its own this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// The images that are named.
#[derive(Debug)]
pub(super) struct Wishes {
    wishes: BTreeMap<ImageRef, Wish>,
    turns: Arc<Semaphore>,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            wishes: BTreeMap::new(),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }
}

#[derive(Debug)]
struct Wish {
    task: JoinHandle<()>,
    step: Step,
}

/// How far one is.
#[derive(Debug)]
enum Step {
    /// Not begun.
    Waiting,
    /// This part is here; the last attempt, if there was one, failed like this.
    Fetching(f32, String),
    /// Here, and kept from being dropped before the controller knows.
    Here { _kept: Image },
}

impl Wishes {
    /// Those that are under way, failed, or here; not those that wait their turn.
    pub(super) fn pulls(&self) -> Vec<ImagePull> {
        let said = self.wishes.iter().filter_map(|(image, wish)| {
            let (progress, error) = match &wish.step {
                Step::Waiting => return None,
                Step::Fetching(part, error) => (*part, error.clone()),
                Step::Here { .. } => (1.0, String::new()),
            };
            Some(ImagePull {
                template_id: image.template_id.clone(),
                number: image.number,
                progress,
                error,
            })
        });
        said.collect()
    }

    /// The agent ends.
    pub(super) fn end(&mut self) {
        self.wishes.values().for_each(|wish| wish.task.abort());
        self.wishes.clear();
    }
}

/// Begin what is named now and was not before, and give up what is not named any more.
pub(super) fn act(inner: &Arc<Inner>, named: &[ImageRef]) {
    let mut wishes = inner.wishes.lock();
    wishes.wishes.retain(|image, wish| {
        let still = named.contains(image);
        if !still {
            wish.task.abort();
        }
        still
    });
    for image in named {
        if wishes.wishes.contains_key(image) {
            continue;
        }
        tracing::info!(template = image.template, tag = image.tag, "image to fetch");
        let turns = Arc::clone(&wishes.turns);
        let task = tokio::spawn(fetch(Arc::clone(inner), image.clone(), turns));
        let step = Step::Waiting;
        wishes.wishes.insert(image.clone(), Wish { task, step });
    }
}

/// Drop these, in the background: a large file takes its time. What a VM stands on stays, until the next round.
pub(super) fn evict(inner: &Arc<Inner>, named: Vec<ImageRef>) {
    if named.is_empty() {
        return;
    }
    let inner = Arc::clone(inner);
    tokio::task::spawn_blocking(move || {
        for image in named {
            if let Err(error) = inner.cache.evict(&image.template_id, image.number) {
                tracing::warn!(template = image.template_id, number = image.number, %error,
                    "an image could not be dropped; trying again");
            }
        }
    });
}

/// What one task says of its image. Nothing, once the image is not named any more.
fn note(inner: &Inner, image: &ImageRef, change: impl FnOnce(&mut Step)) {
    let mut wishes = inner.wishes.lock();
    if let Some(wish) = wishes.wishes.get_mut(image) {
        change(&mut wish.step);
    }
}

async fn fetch(inner: Arc<Inner>, image: ImageRef, turns: Arc<Semaphore>) {
    let mut pause = inner.settings.retry_pause;
    let told = parking_lot::Mutex::new(None::<Instant>);
    let progress = |part: f32| {
        note(&inner, &image, |step| match step {
            Step::Fetching(known, _) => *known = part,
            other => *other = Step::Fetching(part, String::new()),
        });
        let mut told = told.lock();
        if told.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
            *told = Some(Instant::now());
            inner.report();
        }
    };
    loop {
        // Never closed. Given back while it pauses, so that one that cannot be had holds up no other.
        let turn = turns.acquire().await;
        match inner.cache.ensure(&image, &progress).await {
            Ok(kept) => {
                note(&inner, &image, |step| *step = Step::Here { _kept: kept });
                return inner.report();
            }
            Err(error) => {
                tracing::warn!(template = image.template, tag = image.tag, %error,
                    "an image could not be fetched; trying again");
                let text = error.to_string();
                note(&inner, &image, |step| match step {
                    Step::Fetching(_, known) => *known = text,
                    other => *other = Step::Fetching(0.0, text),
                });
                inner.report();
            }
        }
        drop(turn);
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}
