//! Every bound the state machine enforces, with its reason. They are part of the replicated
//! behaviour: two members with different values would disagree, so none is configurable, and a
//! change of one is a change of what commands do.

/// Instances one request may ask for: one log entry stays small and its apply short.
pub const INSTANCES_PER_REQUEST: usize = 1_000;
/// Instances known at once, ended ones included: about 2 GB at 2 kB each.
pub const INSTANCES: usize = 1_000_000;
/// Decoded startup script, as the reference system's users know it.
pub const SCRIPT_BYTES: usize = 1 << 20;
/// Script bytes times instances of one request: what a request may add to every snapshot.
pub const SCRIPT_BYTES_PER_REQUEST: usize = 64 << 20;
/// Kept end of a monitored script's stdout, and of its stderr.
pub const SCRIPT_OUTPUT_BYTES: usize = 64 << 10;
/// Kept end of the stdout of a script that ran before a save, and of its stderr: what users of the
/// reference system are used to.
pub const SAVE_OUTPUT_BYTES: usize = 1 << 20;
/// Saves known at once, ended ones included; the longest ended is forgotten for a new one.
pub const SAVES: usize = 1_000;
/// Scripts of open saves and outputs of all, by [`crate::save::Save::weight`]: what they add to every
/// snapshot. The longest ended are forgotten for new ones.
pub const SAVES_BYTES: usize = 64 << 20;
/// Ids: UUIDs have 36 bytes.
pub const ID_BYTES: usize = 64;
/// Names of templates, tags, instances, nodes, groups.
pub const NAME_BYTES: usize = 256;
/// Caller's marks: clients put URLs there.
pub const EXTERNAL_ID_BYTES: usize = 2_048;
/// Free texts: descriptions, messages, reasons.
pub const TEXT_BYTES: usize = 4_096;
/// Metadata keys of one instance.
pub const METADATA_KEYS: usize = 256;
/// Metadata keys and values of one instance together.
pub const METADATA_BYTES: usize = 16 << 10;
/// Port rules of one instance or tag.
pub const PORT_RULES: usize = 64;
/// Lowest priority; 1 is the highest.
pub const PRIORITY_MAX: u32 = 10_000;
/// Bindings, observations or expiries in one command.
pub const BATCH: usize = 10_000;
/// Nodes known at once.
pub const NODES: usize = 20_000;
/// Groups known at once, and groups of one node.
pub const GROUPS: usize = 1_000;
/// How many groups a chain of fallbacks may have.
pub const FALLBACK_DEPTH: usize = 8;
/// Cached images reported by one node.
pub const NODE_IMAGES: usize = 4_096;
/// Distributions known at once, ended ones included: each node's desired set is made by asking them all.
pub const DISTRIBUTIONS: usize = 1_000;
/// Nodes of all of them together: about 20 MB in memory and in each snapshot.
pub const DELIVERIES: usize = 200_000;
/// Templates known at once.
pub const TEMPLATES: usize = 100_000;
/// Tags of one template at once.
pub const TAGS: usize = 10_000;
/// Repositories known at once.
pub const REPOSITORIES: usize = 100_000;
/// Artifacts of one repository at once: listing who refers to one reads them all.
pub const ARTIFACTS: usize = 10_000;
/// Tags of one repository at once.
pub const REPOSITORY_TAGS: usize = 20_000;
/// Tags of one put, and tags that wait for one artifact.
pub const ARTIFACT_TAGS: usize = 64;
/// Blobs of one artifact: they stand in the log entry, 40 bytes each.
pub const ARTIFACT_BLOBS: usize = 1_000;
/// What all repositories say together, by [`crate::artifact::Artifact::weight`] and its like: about
/// what it takes in memory, and in each snapshot, of every member.
pub const REPOSITORY_BYTES: u64 = 256 << 20;
/// Members recorded as holders of one tag, members that are gone included.
pub const HOLDERS: usize = 64;
/// Members that were taken out and are remembered; the oldest is forgotten.
pub const RETIRED: usize = 1_024;
/// Rejections remembered for one instance.
pub const REJECTIONS: usize = 16;
/// Newest commands whose outcome is remembered, so that a retry is not applied twice. Twice
/// what the log may grow before a member gives up retrying, so that those in flight fit as well.
pub const RECENT_COMMANDS: usize = 65_536;
/// Ids of instances and nodes inside remembered outcomes: bounds their memory when requests are large.
pub const RECENT_IDS: usize = 262_144;

/// Virtual CPUs counted for an instance that asks for none.
pub const DEFAULT_VCPU: u32 = 2;
/// Memory in MB counted for an instance that asks for none.
pub const DEFAULT_VRAM_MB: u32 = 4_096;
/// Memory in MB that a node in resource mode keeps for itself.
pub const NODE_RESERVED_RAM_MB: u64 = 2_048;
/// How long a node that rejected an instance is not offered it again.
pub const REJECTION_BACKOFF_MS: u64 = 30_000;

/// The first `max` bytes of `text`, cut at a character.
pub(crate) fn clip(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// The last `max` bytes of `text`, cut at a character.
pub(crate) fn clip_front(text: &str, max: usize) -> String {
    let mut start = text.len().saturating_sub(max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}

/// Whether `id` may name an object: short, printable ASCII, so that keys sort as ids do.
pub(crate) fn id_ok(id: &str) -> bool {
    !id.is_empty() && id.len() <= ID_BYTES && id.bytes().all(|b| b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_keeps_characters_whole() {
        assert_eq!(clip("aé", 2), "a");
        assert_eq!(clip("aé", 3), "aé");
        assert_eq!(clip_front("éa", 2), "a");
        assert_eq!(clip_front("éa", 3), "éa");
        assert_eq!(clip("", 0), "");
    }

    #[test]
    fn ids_are_short_and_printable() {
        assert!(id_ok("3f1c"));
        for bad in ["", "a b", "a\0", "é", &"x".repeat(ID_BYTES + 1)] {
            assert!(!id_ok(bad), "{bad:?}");
        }
    }
}
