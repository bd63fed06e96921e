//! Names of objects. Every name is used once; numbers are 16 hexadecimal digits.
//!
//! ```text
//! store                             whose bucket this is
//! members/MEMBER                    who may ever have had a claim
//! packs/WRITER/SEQ                  a pack; the sequence grows with each pack of a writer
//! claims/MEMBER/WRITER-SEQ          the member relies on the pack, or is about to
//! dooms/WRITER-SEQ/MEMBER-NONCE     the member is about to delete the pack: one byte; two once nothing stops it
//! ```

/// Which pack. Ordered by age as far as clocks agree: of two packs with the same chunk, all members
/// rely on the later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PackName {
    pub seq: u64,
    pub writer: u64,
}

impl std::fmt::Display for PackName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}-{:016x}", self.writer, self.seq)
    }
}

fn number(hex: &str) -> Option<u64> {
    (hex.len() == 16)
        .then(|| u64::from_str_radix(hex, 16).ok())
        .flatten()
}

impl PackName {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (writer, seq) = text.split_once('-')?;
        Some(Self {
            seq: number(seq)?,
            writer: number(writer)?,
        })
    }

    pub(super) fn key(&self) -> String {
        format!("packs/{:016x}/{:016x}", self.writer, self.seq)
    }

    pub(super) fn of_key(key: &str) -> Option<Self> {
        let (writer, seq) = key.strip_prefix("packs/")?.split_once('/')?;
        Some(Self {
            seq: number(seq)?,
            writer: number(writer)?,
        })
    }
}

pub(super) fn packs_of(writer: u64) -> String {
    format!("packs/{writer:016x}/")
}

pub(super) fn member(id: u64) -> String {
    format!("members/{id:016x}")
}

pub(super) fn member_of(key: &str) -> Option<u64> {
    number(key.strip_prefix("members/")?)
}

pub(super) fn claims_of(member: u64) -> String {
    format!("claims/{member:016x}/")
}

pub(super) fn claim(member: u64, name: &PackName) -> String {
    format!("claims/{member:016x}/{name}")
}

pub(super) fn claimed(key: &str) -> Option<PackName> {
    PackName::parse(key.rsplit_once('/')?.1)
}

pub(super) fn doom(name: &PackName, member: u64, nonce: u64) -> String {
    format!("dooms/{name}/{member:016x}-{nonce:016x}")
}

/// The pack, and who is about to delete it.
pub(super) fn doomed(key: &str) -> Option<(PackName, u64)> {
    let (name, by) = key.strip_prefix("dooms/")?.split_once('/')?;
    Some((PackName::parse(name)?, number(by.split_once('-')?.0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let name = PackName {
            seq: 0x1234,
            writer: u64::MAX,
        };
        assert_eq!(PackName::parse(&name.to_string()), Some(name));
        assert_eq!(PackName::of_key(&name.key()), Some(name));
        assert_eq!(claimed(&claim(3, &name)), Some(name));
        assert_eq!(doomed(&doom(&name, 5, 9)), Some((name, 5)));
        assert_eq!(member_of(&member(77)), Some(77));
        for bad in [
            "",
            "packs/",
            "packs/1/2",
            "packs/zzzzzzzzzzzzzzzz/0000000000000001",
        ] {
            assert_eq!(PackName::of_key(bad), None, "{bad}");
        }
    }
}
