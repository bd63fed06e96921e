//! Before bytes are sent: would a push fit? Asks the quotas, this member's disk, and the disks of the
//! others as far as copies on them are needed. On this member's disk the room is kept for the push while it
//! goes on (`reserve`); of quotas and other disks nothing is promised, and each batch is still looked at when
//! it comes. It saves a client from sending for an hour what is refused.

use super::answer::{self, Answer, Params, Refused, ok};
use super::catalog::voters;
use super::publish::copies_needed;
use super::{RegistryService, Service};
use axum::extract::{Request, State};
use futures::future::join_all;
use mainstay_agent::transfer::api::{self, Admission, AdmitRequest};
use mainstay_model::MemberId;
use std::time::Duration;

/// Longest wait for a peer's word about its own disk. Who is silent may have room.
const PEER_MAX: Duration = Duration::from_secs(2);

/// `POST admit`; `?local=1`: only what this member's disk says.
pub(super) async fn admit(State(service): Service, request: Request) -> Answer {
    let params = Params::from_query(request.uri());
    let local = params.get("local").is_some_and(|v| v != "0");
    let asked: AdmitRequest =
        answer::read_object(request.into_body(), "a question about room").await?;
    service.admission(&asked, local).await.map(ok)
}

fn no(why: String, anywhere: bool) -> Admission {
    Admission {
        fits: false,
        why,
        anywhere,
    }
}

fn yes() -> Admission {
    Admission {
        fits: true,
        ..Admission::default()
    }
}

impl RegistryService {
    async fn admission(&self, asked: &AdmitRequest, local: bool) -> Result<Admission, Refused> {
        // What is asked by a member is kept by the member that asks.
        let push = if local { "" } else { asked.push.as_str() };
        if let Err(why) = self.has_room(asked.bytes, push) {
            return Ok(no(why, false));
        }
        if local {
            return Ok(yes());
        }
        let admission = self.admission_elsewhere(asked).await;
        if !matches!(&admission, Ok(said) if said.fits) {
            self.reserved.end(push);
        }
        admission
    }

    /// What quotas and the other members say.
    async fn admission_elsewhere(&self, asked: &AdmitRequest) -> Result<Admission, Refused> {
        if let Some(why) = self.over_quota(&asked.template, asked.bytes).await? {
            return Ok(no(why, true));
        }
        let members = self.catalog.members().await?;
        let voters = voters(&members);
        let needed = copies_needed(asked.durability, voters.len())?;
        let others = voters.iter().filter(|id| **id != self.member);
        let answers = join_all(others.map(|id| self.ask_room(*id, asked))).await;
        let name = |id: &MemberId| {
            let known = members.members.get(&id.0);
            known.map_or_else(|| id.to_string(), |m| m.member.name.clone())
        };
        let full: Vec<String> = answers
            .into_iter()
            .filter_map(|(id, why)| Some(format!("{}: {}", name(&id), why?)))
            .collect();
        let able = u32::try_from(voters.len() - full.len()).unwrap_or(u32::MAX);
        if able >= needed {
            return Ok(yes());
        }
        let text = format!(
            "{needed} members must hold it, and only {able} may have room for it: {}",
            full.join("; ")
        );
        Ok(no(text, true))
    }

    /// Would so many bytes more fit on this member's disk? If so, they are kept for this push.
    fn has_room(&self, bytes: u64, push: &str) -> Result<(), String> {
        (self.room)()?;
        if self.chunks.shared() {
            // It goes into the bucket, which has no end that could be asked for.
            return Ok(());
        }
        let Some(left) = (self.left)() else {
            return Ok(());
        };
        self.reserved.take(push, bytes, left).map_err(|promised| {
            let promised = match promised {
                0 => String::new(),
                some => format!(", {} MiB of them for pushes under way", some.div_ceil(1 << 20)),
            };
            format!(
                "it may take up to {} MiB, and {} MiB can be stored{promised} before the disk is almost full (--low-disk): push through another member, or make room in {}",
                bytes.div_ceil(1 << 20),
                left >> 20,
                self.chunks.dir().display()
            )
        })
    }

    /// Why a peer cannot take it; `None` if it can, or does not say.
    async fn ask_room(&self, id: MemberId, asked: &AdmitRequest) -> (MemberId, Option<String>) {
        let path = format!("{}?local=1", api::ADMIT);
        let Some(request) = self.peers.request(reqwest::Method::POST, id, &path) else {
            return (id, None);
        };
        let answered = async {
            let response = request.json(asked).timeout(PEER_MAX).send().await.ok()?;
            response.json::<api::Answer<Admission>>().await.ok()?.body
        };
        let said = answered.await.filter(|answer| !answer.fits);
        (id, said.map(|answer| answer.why))
    }
}
