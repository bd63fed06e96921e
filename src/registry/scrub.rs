//! The scrubber: reads every chunk again, little by little, and finds what the disk has spoilt before
//! anybody needs it. What is bad is not held any more; replication fetches it again. Where it is
//! outlives the process.
//!
//! ```text
//! wait until due (or asked to) -> step, pause by the rate -> ... -> end of the store: ended, wait
//! ```

use super::answer::{self, Answer, ok};
use super::{RegistryService, Service};
use crate::stamp;
use axum::extract::State;
use mainstay_agent::transfer::api::ScrubStatus;
use mainstay_storage::chunks::{Checked, Place, Rounds, Verifier};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Bytes of one step: at 16 MiB/s a pause of 1/16 s.
const STEP: u64 = 1 << 20;
/// The place is saved this often.
const SAVE_EVERY: Duration = Duration::from_secs(5);
/// After the disk could not be read.
const FAULT_PAUSE: Duration = Duration::from_secs(60);
/// Longest sleep towards the next round: clocks are set, and machines sleep.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// How fast and how often.
#[derive(Clone, Copy, Debug)]
pub struct ScrubConfig {
    /// Bytes a second; 0: only when asked to.
    pub rate: u64,
    /// From the beginning of one round to that of the next.
    pub every: Duration,
}

/// What the scrubber tells and is told.
#[derive(Debug, Default)]
pub(super) struct Scrubber {
    status: Mutex<ScrubStatus>,
    wake: Notify,
}

impl Scrubber {
    pub(super) fn status(&self) -> ScrubStatus {
        self.status.lock().clone()
    }
}

/// `GET scrub`: how it stands.
pub(super) async fn status(State(service): Service) -> Answer {
    Ok(ok(service.scrubs()))
}

/// `POST scrub`: a round from the beginning, now and without a limit of its rate. Answers at once.
pub(super) async fn start(State(service): Service) -> Answer {
    let asked = {
        let mut status = service.scrubber.status.lock();
        status.asked += 1;
        status.clone()
    };
    service.scrubber.wake.notify_one();
    Ok(ok(asked))
}

/// Scrub until dropped.
pub(super) async fn run(service: Arc<RegistryService>) {
    let mut rounds = service.chunks.rounds();
    {
        let mut status = service.scrubber.status.lock();
        status.begun_ms = rounds.begun_ms;
        status.ended_ms = rounds.ended_ms;
    }
    loop {
        let asked = wait(&service, &rounds).await;
        let place = match (asked, rounds.next) {
            (None, Some(place)) => place,
            _ => {
                rounds.begun_ms = stamp::now_ms();
                Place::default()
            }
        };
        let ended = round(&service, &mut rounds, place, asked).await;
        service.scrubber.status.lock().running = false;
        if let Err(why) = ended {
            tracing::error!(why, "chunks could not be verified; it will be tried again");
            service.scrubber.status.lock().failure = why;
            tokio::time::sleep(FAULT_PAUSE).await;
        }
    }
}

/// Until a round is due, or goes on; the number of the newest request if that is why.
async fn wait(service: &RegistryService, rounds: &Rounds) -> Option<u64> {
    loop {
        let asked = {
            let status = service.scrubber.status.lock();
            (status.asked > status.done).then_some(status.asked)
        };
        if asked.is_some() {
            return asked;
        }
        let due = match rounds.next {
            Some(_) => 0,
            None => rounds.begun_ms.saturating_add(ms(service.scrub.every)),
        };
        let left = due.saturating_sub(stamp::now_ms());
        if service.scrub.rate > 0 && left == 0 {
            return None;
        }
        let sleep = match service.scrub.rate {
            0 => LOOK_EVERY,
            _ => Duration::from_millis(left).min(LOOK_EVERY),
        };
        tokio::select! {
            () = service.scrubber.wake.notified() => {}
            () = tokio::time::sleep(sleep) => {}
        }
    }
}

/// To the end of the store, or until someone asks for another one.
async fn round(
    service: &Arc<RegistryService>,
    rounds: &mut Rounds,
    from: Place,
    asked: Option<u64>,
) -> Result<(), String> {
    let mut verifier = service.chunks.verify_from(from);
    let mut saved = Instant::now();
    {
        let mut status = service.scrubber.status.lock();
        status.running = true;
        status.begun_ms = rounds.begun_ms;
        if from == Place::default() {
            (
                status.round_chunks,
                status.round_bytes,
                status.round_damaged,
            ) = (0, 0, 0);
        }
        status.failure.clear();
    }
    loop {
        let begun = Instant::now();
        let (back, checked) = step(verifier).await?;
        verifier = back;
        let Some(checked) = checked else { break };
        note(service, &verifier, &checked);
        if !checked.damaged.is_empty() {
            service.damage.notify_one();
        }
        let newer = {
            let status = service.scrubber.status.lock();
            status.asked > asked.unwrap_or(status.done)
        };
        if newer {
            return Ok(());
        }
        if saved.elapsed() >= SAVE_EVERY {
            rounds.next = Some(verifier.place());
            save(service, *rounds).await?;
            saved = Instant::now();
        }
        if asked.is_none() {
            pause(service, begun, checked.bytes).await;
        }
    }
    rounds.next = None;
    rounds.ended_ms = stamp::now_ms();
    save(service, *rounds).await?;
    let mut status = service.scrubber.status.lock();
    status.ended_ms = rounds.ended_ms;
    status.rounds += 1;
    (status.last_chunks, status.last_damaged) = (status.round_chunks, status.round_damaged);
    status.done = status.done.max(asked.unwrap_or(0));
    if status.round_damaged > 0 {
        tracing::error!(
            damaged = status.round_damaged,
            chunks = status.round_chunks,
            "every chunk was verified; some were damaged"
        );
    } else {
        tracing::info!(chunks = status.round_chunks, "every chunk was verified");
    }
    Ok(())
}

async fn step(mut verifier: Verifier) -> Result<(Verifier, Option<Checked>), String> {
    tokio::task::spawn_blocking(move || {
        let checked = verifier.step(STEP);
        checked.map(|checked| (verifier, checked))
    })
    .await
    .map_err(|e| e.to_string())?
    .map_err(|e| answer::chain(&e))
}

fn note(service: &RegistryService, verifier: &Verifier, checked: &Checked) {
    let mut status = service.scrubber.status.lock();
    let damaged = checked.damaged.len() as u64;
    status.chunks += checked.chunks;
    status.bytes += checked.bytes;
    status.damaged += damaged;
    status.round_chunks += checked.chunks;
    status.round_bytes += checked.bytes;
    status.round_damaged += damaged;
    (status.seen_bytes, status.total_bytes) = verifier.progress();
}

/// As long as the bytes may take at the allowed rate; a request ends it.
async fn pause(service: &RegistryService, begun: Instant, bytes: u64) {
    let due = bytes.saturating_mul(1000) / service.scrub.rate.max(1);
    let until = begun + Duration::from_millis(due);
    tokio::select! {
        () = tokio::time::sleep_until(until) => {}
        () = service.scrubber.wake.notified() => {}
    }
}

async fn save(service: &RegistryService, rounds: Rounds) -> Result<(), String> {
    let chunks = service.chunks.clone();
    tokio::task::spawn_blocking(move || chunks.save_rounds(&rounds))
        .await
        .map_err(|e| e.to_string())?
        .map_err(|e| answer::chain(&e))
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
