//! Names of stored values: a table byte, then the id's bytes. Knows nothing of the values.

use crate::codec::CodecError;
use crate::ids::{
    DistributionId, GroupId, InstanceId, MemberId, NodeId, SaveId, Sha256, TemplateId,
};

/// One stored value. The order of the variants is the order of their table bytes, so that keys
/// sort as their bytes do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    /// `c`: the clock.
    Meta,
    /// `d`: a distribution without its nodes.
    Distribution(DistributionId),
    /// `e`: what became of a distribution on a node: distribution, a zero byte, node.
    Delivery(DistributionId, NodeId),
    /// `f`: the level of the commands in use; absent at level 0.
    Features,
    /// `g`: a node group.
    Group(GroupId),
    /// `h`: the script of an open save.
    SaveScript(SaveId),
    /// `i`: an instance without the two that follow, which are large and change rarely.
    Instance(InstanceId),
    /// `j`: the output of a save's script.
    SaveOutput(SaveId),
    /// `k`: what a node shall drop of a template: node, a zero byte, template.
    Eviction(NodeId, TemplateId),
    /// `l`: what may be left of an ended instance on its node.
    Left(InstanceId),
    /// `m`: a member that was taken out.
    Retired(MemberId),
    /// `n`: a node.
    Node(NodeId),
    /// `o`: the output of an instance's script.
    Output(InstanceId),
    /// `p`: a save without its script and the output.
    Save(SaveId),
    /// `q`: some recent commands, by block of slots.
    RecentBlock(u32),
    /// `r`: a recent command, by slot: the form below feature level `RECENT_BLOCKS`.
    Recent(u32),
    /// `s`: the body of an instance's script.
    Script(InstanceId),
    /// `t`: a template without its tags.
    Template(TemplateId),
    /// `u`: a repository without its artifacts and tags.
    Repository(String),
    /// `v`: a tag: template id, a zero byte, number.
    Tag(TemplateId, u32),
    /// `w`: an artifact: repository, a zero byte, 32 bytes of SHA-256.
    Artifact(String, Sha256),
    /// `x`: a tag of a repository: repository, a zero byte, tag.
    RepositoryTag(String, String),
    /// `y`: how much of a template may be stored, by name; without a name: of all.
    Quota(String),
    /// `z`: when a tag was last pulled: template id, a zero byte, number.
    Pulled(TemplateId, u32),
}

impl Key {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let with = |table: u8, id: &str| {
            let mut out = Vec::with_capacity(id.len() + 6);
            out.push(table);
            out.extend_from_slice(id.as_bytes());
            out
        };
        match self {
            Self::Meta => with(b'c', ""),
            Self::Distribution(id) => with(b'd', id.as_str()),
            Self::Delivery(id, node) => {
                let mut out = with(b'e', id.as_str());
                out.push(0);
                out.extend_from_slice(node.as_str().as_bytes());
                out
            }
            Self::Features => with(b'f', ""),
            Self::Group(id) => with(b'g', id.as_str()),
            Self::SaveScript(id) => with(b'h', id.as_str()),
            Self::Instance(id) => with(b'i', id.as_str()),
            Self::Eviction(node, of) => {
                let mut out = with(b'k', node.as_str());
                out.push(0);
                out.extend_from_slice(of.as_str().as_bytes());
                out
            }
            Self::SaveOutput(id) => with(b'j', id.as_str()),
            Self::Save(id) => with(b'p', id.as_str()),
            Self::Left(id) => with(b'l', id.as_str()),
            Self::Retired(id) => {
                let mut out = with(b'm', "");
                out.extend_from_slice(&id.0.to_be_bytes());
                out
            }
            Self::Node(id) => with(b'n', id.as_str()),
            Self::Output(id) => with(b'o', id.as_str()),
            Self::RecentBlock(number) | Self::Recent(number) => {
                let table = if matches!(self, Self::Recent(_)) {
                    b'r'
                } else {
                    b'q'
                };
                let mut out = with(table, "");
                out.extend_from_slice(&number.to_be_bytes());
                out
            }
            Self::Script(id) => with(b's', id.as_str()),
            Self::Template(id) => with(b't', id.as_str()),
            Self::Repository(name) => with(b'u', name),
            Self::Quota(name) => with(b'y', name),
            Self::Tag(id, number) | Self::Pulled(id, number) => {
                let table = if matches!(self, Self::Tag(..)) {
                    b'v'
                } else {
                    b'z'
                };
                let mut out = with(table, id.as_str());
                out.push(0);
                out.extend_from_slice(&number.to_be_bytes());
                out
            }
            Self::Artifact(repository, digest) => {
                let mut out = with(b'w', repository);
                out.push(0);
                out.extend_from_slice(&digest.0);
                out
            }
            Self::RepositoryTag(repository, tag) => {
                let mut out = with(b'x', repository);
                out.push(0);
                out.extend_from_slice(tag.as_bytes());
                out
            }
        }
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, CodecError> {
        let bad = || CodecError(format!("unknown key {}", hex(bytes)));
        let (table, rest) = bytes.split_first().ok_or_else(bad)?;
        let text = |b: &[u8]| match std::str::from_utf8(b) {
            Ok(s) if !s.is_empty() => Ok(s.to_owned()),
            _ => Err(bad()),
        };
        let number = |b: &[u8]| b.try_into().map(u32::from_be_bytes).map_err(|_| bad());
        Ok(match table {
            b'c' if rest.is_empty() => Self::Meta,
            b'd' => Self::Distribution(text(rest)?.into()),
            b'e' => {
                let at = rest.iter().position(|b| *b == 0).ok_or_else(bad)?;
                Self::Delivery(text(&rest[..at])?.into(), text(&rest[at + 1..])?.into())
            }
            b'k' => {
                let at = rest.iter().position(|b| *b == 0).ok_or_else(bad)?;
                Self::Eviction(text(&rest[..at])?.into(), text(&rest[at + 1..])?.into())
            }
            b'f' if rest.is_empty() => Self::Features,
            b'g' => Self::Group(text(rest)?.into()),
            b'h' => Self::SaveScript(text(rest)?.into()),
            b'i' => Self::Instance(text(rest)?.into()),
            b'j' => Self::SaveOutput(text(rest)?.into()),
            b'l' => Self::Left(text(rest)?.into()),
            b'm' => {
                let id = rest.try_into().map_err(|_| bad())?;
                Self::Retired(MemberId(u64::from_be_bytes(id)))
            }
            b'n' => Self::Node(text(rest)?.into()),
            b'o' => Self::Output(text(rest)?.into()),
            b'p' => Self::Save(text(rest)?.into()),
            b'q' => Self::RecentBlock(number(rest)?),
            b'r' => Self::Recent(number(rest)?),
            b's' => Self::Script(text(rest)?.into()),
            b't' => Self::Template(text(rest)?.into()),
            b'v' | b'z' if rest.len() > 5 && rest[rest.len() - 5] == 0 => {
                let (id, tail) = rest.split_at(rest.len() - 5);
                let (id, number) = (text(id)?.into(), number(&tail[1..])?);
                match table {
                    b'v' => Self::Tag(id, number),
                    _ => Self::Pulled(id, number),
                }
            }
            b'y' if rest.is_empty() => Self::Quota(String::new()),
            b'y' => Self::Quota(text(rest)?),
            b'u' => Self::Repository(text(rest)?),
            b'w' if rest.len() > 33 && rest[rest.len() - 33] == 0 => {
                let (name, tail) = rest.split_at(rest.len() - 33);
                let digest = tail[1..].try_into().map_err(|_| bad())?;
                Self::Artifact(text(name)?, Sha256(digest))
            }
            b'x' => {
                let at = rest.iter().position(|b| *b == 0).ok_or_else(bad)?;
                Self::RepositoryTag(text(&rest[..at])?, text(&rest[at + 1..])?)
            }
            _ => return Err(bad()),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(64).map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_and_sort_as_their_bytes() {
        let mut keys = vec![
            Key::Pulled("t1".into(), 256),
            Key::Pulled("t1".into(), 3),
            Key::Quota("debian".into()),
            Key::Quota(String::new()),
            Key::RepositoryTag("a/b".into(), "v1".into()),
            Key::RepositoryTag("a/b".into(), "v".into()),
            Key::RepositoryTag("a".into(), "v1".into()),
            Key::Artifact("a/b".into(), Sha256([0; 32])),
            Key::Artifact("a".into(), Sha256([255; 32])),
            Key::Artifact("a".into(), Sha256([7; 32])),
            Key::Repository("a/b".into()),
            Key::Repository("a".into()),
            Key::Tag("t1".into(), 256),
            Key::Tag("t1".into(), 3),
            Key::Tag("t10".into(), 1),
            Key::Template("t1".into()),
            Key::Script("i1".into()),
            Key::Recent(300),
            Key::Recent(2),
            Key::RecentBlock(300),
            Key::RecentBlock(2),
            Key::Save("s1".into()),
            Key::SaveOutput("s1".into()),
            Key::SaveScript("s1".into()),
            Key::Output("i1".into()),
            Key::Node("n1".into()),
            Key::Retired(MemberId(300)),
            Key::Retired(MemberId(2)),
            Key::Left("i1".into()),
            Key::Instance("i1".into()),
            Key::Eviction("n1".into(), "t1".into()),
            Key::Eviction("n".into(), "t1".into()),
            Key::Instance("i".into()),
            Key::Group("g1".into()),
            Key::Features,
            Key::Delivery("d1".into(), "n2".into()),
            Key::Delivery("d1".into(), "n1".into()),
            Key::Delivery("d".into(), "n1".into()),
            Key::Distribution("d1".into()),
            Key::Distribution("d".into()),
            Key::Meta,
        ];
        for key in &keys {
            assert_eq!(&Key::from_bytes(&key.to_bytes()).unwrap(), key);
        }
        keys.sort();
        let bytes: Vec<_> = keys.iter().map(Key::to_bytes).collect();
        assert!(bytes.is_sorted(), "{bytes:?}");
    }

    #[test]
    fn strange_keys_are_refused() {
        for bad in [
            &b""[..],
            b"x",
            b"i",
            b"c1",
            b"f1",
            b"r123",
            b"q12345",
            b"m1234567",
            b"vt",
            b"v\0\0\0\0\0",
            b"vt\x01\0\0\0\0",
            b"i\xff",
            b"u",
            b"wa\x001234567",
            b"xa",
            b"xa\0",
            b"x\0v1",
            b"y\xff",
            b"z",
            b"zt\x01\0\0\0\0",
            b"d",
            b"e",
            b"ed1",
            b"ed1\0",
            b"e\0n1",
            b"k",
            b"kn1",
            b"kn1\0",
            b"k\0t1",
        ] {
            assert!(Key::from_bytes(bad).is_err(), "{bad:?}");
        }
    }
}
