//! What all repositories say together has a bound: reached, kept to, and given back.

use crate::sample;
use mainstay_model::artifact::Blob;
use mainstay_model::command::{Addition, ArtifactPut, Command, TagPush, TagSelector};
use mainstay_model::feature::{ADD_WITHIN, ARTIFACT_ROOM};
use mainstay_model::ids::{Digest, MemberId, Sha256};
use mainstay_model::{CommandId, Envelope, Outcome, Refusal, State, invariants, limits};
use std::collections::BTreeSet;

/// A state with this level, and a count of commands.
struct Cloud(State, u128);

impl Cloud {
    fn of_level(level: u32) -> Self {
        let mut cloud = Self(State::default(), 0);
        assert_eq!(cloud.apply(Command::SetFeatures { level }), Outcome::Done);
        cloud
    }

    fn apply(&mut self, command: Command) -> Outcome {
        self.1 += 1;
        self.0.apply(&Envelope {
            id: CommandId(self.1),
            stamp_ms: 1,
            command,
        })
    }

    /// The largest artifact that there may be, under a tag of its own.
    fn put(&mut self, repository: &str, number: u32) -> Outcome {
        self.apply(largest(repository, number))
    }
}

fn name(number: u32) -> [u8; 32] {
    let mut name = [7; 32];
    name[..4].copy_from_slice(&number.to_be_bytes());
    name
}

fn largest(repository: &str, number: u32) -> Command {
    let mut content = sample::artifact(1);
    content.digest = Sha256(name(number));
    content.bundle = Digest(name(number));
    let blob = |n: usize| Blob {
        digest: Sha256(name(u32::try_from(n).unwrap())),
        size: 1,
    };
    content.blobs = (0..limits::ARTIFACT_BLOBS).map(blob).collect();
    let put = ArtifactPut {
        repository: repository.to_owned(),
        tags: vec![format!("t{number}")],
        content,
        template: None,
        holder: MemberId(1),
        copies_needed: 2,
        voters: [1, 2, 3].map(MemberId).into(),
    };
    Command::PutArtifact { put: Box::new(put) }
}

#[test]
fn all_repositories_together_have_a_bound() {
    let mut cloud = Cloud::of_level(ARTIFACT_ROOM);
    let full = |cloud: &mut Cloud, number| {
        matches!(cloud.put("b", number), Outcome::Refused(Refusal::Limit(why))
            if why.contains("delete manifests"))
    };
    let mut number = 0;
    while cloud.put("a", number) == Outcome::Done {
        number += 1;
    }
    assert!((5_000..7_000).contains(&number), "{number} fitted");
    // Whatever repository it is for.
    assert!(full(&mut cloud, number));
    assert!(!cloud.0.repositories.contains_key("b"), "half put");
    assert!(cloud.0.repository_bytes() <= limits::REPOSITORY_BYTES);
    // What adds nothing, and what goes on with what is there, is taken still.
    assert_eq!(cloud.put("a", 3), Outcome::Done);
    let member = MemberId(2);
    let held = |digest: [u8; 32]| Command::ReportArtifactHeld {
        repository: "a".to_owned(),
        digest: Sha256(digest),
        bundle: Digest(digest),
        member,
        held: true,
        voters: [1, 2, 3].map(MemberId).into(),
    };
    assert_eq!(cloud.apply(held(name(3))), Outcome::Done);
    assert!(cloud.0.repositories["a"].tagged("t3").is_some());
    assert!(full(&mut cloud, number));
    // A member goes: nothing weighs more or less by that.
    let before = cloud.0.repository_bytes();
    let retire = Command::RetireMember {
        id: member,
        name: "c2".to_owned(),
        voters: [1, 2, 3].map(MemberId).into(),
    };
    assert_eq!(cloud.apply(retire), Outcome::Done);
    assert_eq!(cloud.0.repository_bytes(), before);
    assert_eq!(invariants::check(&cloud.0), Ok(()));
    // What goes makes room for as much.
    let delete = Command::DeleteArtifact {
        repository: "a".to_owned(),
        digest: Sha256(name(3)),
    };
    assert_eq!(cloud.apply(delete), Outcome::Done);
    assert_eq!(cloud.put("a", number), Outcome::Done);
    assert!(full(&mut cloud, number + 1));
}

/// Members that know no such bound must come to the same state.
#[test]
fn below_its_level_nothing_of_this_is_refused() {
    let mut cloud = Cloud::of_level(ARTIFACT_ROOM - 1);
    let mut number = 0;
    while cloud.0.repository_bytes() <= limits::REPOSITORY_BYTES {
        assert_eq!(cloud.put("a", number), Outcome::Done);
        number += 1;
    }
    assert_eq!(cloud.apply(as_another_kind()), Outcome::Done);
    let level = ARTIFACT_ROOM;
    assert_eq!(cloud.apply(Command::SetFeatures { level }), Outcome::Done);
    assert!(matches!(cloud.put("a", number), Outcome::Refused(_)));
    assert_eq!(cloud.put("a", 0), Outcome::Done);
}

/// Artifact 0 as `largest` makes it, under another media type.
fn as_another_kind() -> Command {
    let Command::PutArtifact { mut put } = largest("a", 0) else {
        panic!("another command")
    };
    put.content.media_type = "application/vnd.docker.distribution.manifest.v2+json".to_owned();
    Command::PutArtifact { put }
}

#[test]
fn a_manifest_has_one_media_type() {
    let mut cloud = Cloud::of_level(ARTIFACT_ROOM);
    assert_eq!(cloud.put("a", 0), Outcome::Done);
    let refused = cloud.apply(as_another_kind());
    assert!(
        matches!(&refused, Outcome::Refused(Refusal::Conflict(why)) if why.contains("oci.image")),
        "{refused:?}"
    );
}

/// What was weighed against quotas is added only if it would weigh the same now.
#[test]
fn what_was_weighed_is_not_added_once_something_else_came_or_went() {
    let voters = || BTreeSet::from([1, 2, 3].map(MemberId));
    let push = |template: &str, tag: &str, seed: u8| TagPush {
        new_template_id: template.into(),
        template: template.to_owned(),
        tag: tag.to_owned(),
        content: sample::content(seed, ""),
        holder: MemberId(1),
        copies_needed: 1,
        voters: voters(),
    };
    let quota = |of: Option<&str>, bytes| Command::SetQuota {
        template: of.map(str::to_owned),
        bytes,
    };
    let delete = |number| Command::DeleteTag {
        id: "a".into(),
        selector: TagSelector::Number(number),
    };
    let mut cloud = Cloud::of_level(ADD_WITHIN);
    let within = |named, push| Command::AddWithin {
        named,
        what: Addition::Tag(Box::new(push)),
    };
    let stale = Outcome::Refused(Refusal::Stale);
    let published = |outcome: &Outcome| matches!(outcome, Outcome::Published { .. });
    let first = cloud.0.named("a");
    assert!(published(&cloud.apply(within(first, push("a", "v1", 1)))));
    assert_eq!(cloud.apply(within(first, push("a", "v2", 2))), stale);
    // Without a quota of all of them, the others do not count.
    let before = cloud.0.named("c");
    cloud.apply(largest("b", 1));
    assert_eq!(cloud.0.named("c"), before);
    for change in [
        quota(None, Some(5)),
        quota(Some("a"), Some(5)),
        largest("b", 2),
        delete(0),
    ] {
        let before = cloud.0.named("c");
        assert_eq!(cloud.apply(Command::Noop), Outcome::Done);
        assert_eq!(cloud.0.named("c"), before, "nothing that counts");
        cloud.apply(change);
        assert_ne!(cloud.0.named("c"), before);
        assert_eq!(cloud.apply(within(before, push("c", "v1", 3))), stale);
    }
    let now = cloud.0.named("c");
    assert!(published(&cloud.apply(within(now, push("c", "v1", 3)))));
    assert_eq!(cloud.0.templates.len(), 1, "a went with its last tag");
}
