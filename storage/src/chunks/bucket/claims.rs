//! Who relies on which pack. There is no leader, no lock and no clock in it: the order in which the
//! bucket answers decides.
//!
//! ```text
//! who comes to rely on it             who deletes it
//!   put the claim                       nobody claims it: put a doom of it
//!   is it doomed? then give up          a while later: does anybody claim it? then take the doom back
//!   is it there? else give up           mark the doom as final
//!   keep a copy of its index            delete the pack, then its doom
//! ```
//! Whoever relies on a pack saw no doom after the claim was there: each doom came later, and its maker,
//! who looks for claims after that, finds this one. Whoever found none deletes what nobody can come to
//! rely on any more. A crash leaves a claim without a copy of the index, which is taken back by its
//! member; a doom that is not final, which is taken back by its member; or a final one, which is carried out.

use super::super::ChunkId;
use super::names::{self, PackName};
use super::{Adopted, BucketPacks, Known, Members, is_absent, object, unavailable};
use crate::Result;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;

pub(super) const CLAIM: &[u8] = b"1";
const DOOMED: &[u8] = b"1";
const FINAL: &[u8] = b"22";

impl BucketPacks {
    /// Come to rely on all that others have written since the last look.
    pub(in super::super) fn look(&self) -> Result<Vec<Adopted>> {
        self.greet()?;
        let failed = unavailable("list the packs in the bucket");
        let mut found: BTreeMap<PackName, Option<u64>> = BTreeMap::new();
        for (key, _) in self.bucket.list("members/", None).map_err(&failed)? {
            let Some(writer) = names::member_of(&key).filter(|id| *id != self.me) else {
                continue;
            };
            let seen = self.state.lock().seen.get(&writer).copied();
            let after = seen.map(|seq| PackName { seq, writer }.key());
            let packs = self
                .bucket
                .list(&names::packs_of(writer), after.as_deref())
                .map_err(&failed)?;
            for (key, size) in packs {
                if let Some(name) = PackName::of_key(&key) {
                    found.insert(name, Some(size));
                }
            }
        }
        for name in &self.state.lock().skipped {
            found.entry(*name).or_default();
        }
        self.claim(found)
    }

    /// The same for packs with any of these chunks that are not new; and what of these lies in packs
    /// that are relied on already.
    pub(in super::super) fn dig(&self, wanted: &HashSet<ChunkId>) -> Result<Vec<Adopted>> {
        let failed = unavailable("list the packs in the bucket");
        let mut adopted = Vec::new();
        let numbers: Vec<(u32, Known)> = {
            let state = self.state.lock();
            state.by_number.iter().map(|(n, k)| (*n, *k)).collect()
        };
        for (number, known) in numbers {
            let path = self.copy_path(&known.name, known.size);
            let mut entries =
                super::super::index::load(&path, number, known.size).unwrap_or_default();
            entries.retain(|(id, _)| wanted.contains(id));
            if !entries.is_empty() {
                adopted.push(Adopted {
                    number,
                    len: known.size,
                    entries,
                });
            }
        }
        let mut found = BTreeMap::new();
        for (key, size) in self.bucket.list("packs/", None).map_err(&failed)? {
            let Some(name) = PackName::of_key(&key) else {
                continue;
            };
            if self.state.lock().by_name.contains_key(&name) {
                continue;
            }
            match object::entries(&*self.bucket, &key, size, 0) {
                Ok(entries) if entries.iter().any(|(id, _)| wanted.contains(id)) => {
                    found.insert(name, Some(size));
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                // Others' chunks, or deleted meanwhile.
                _ => {}
            }
        }
        adopted.extend(self.claim(found)?);
        Ok(adopted)
    }

    /// Claim these packs; what was doomed is skipped for now. The sizes may not be known.
    fn claim(&self, found: BTreeMap<PackName, Option<u64>>) -> Result<Vec<Adopted>> {
        let failed = unavailable("claim packs in the bucket");
        let mut asked = Vec::new();
        for (name, size) in found {
            if self.state.lock().by_name.contains_key(&name) {
                continue;
            }
            let claim = names::claim(self.me, &name);
            self.bucket
                .put(&claim, Bytes::from_static(CLAIM))
                .map_err(&failed)?;
            asked.push((name, size, claim));
        }
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        // Behind all the claims.
        let dooms = self.bucket.list("dooms/", None).map_err(&failed)?;
        let dooms: HashSet<PackName> = dooms
            .iter()
            .filter_map(|(key, _)| Some(names::doomed(key)?.0))
            .collect();
        let mut adopted = Vec::new();
        for (name, size, claim) in asked {
            if dooms.contains(&name) {
                self.bucket.delete(&claim).map_err(&failed)?;
                self.state.lock().skipped.insert(name);
                self.saw(&name);
                continue;
            }
            match self.adopt_one(&name, size)? {
                Some(one) => adopted.push(one),
                None => self.bucket.delete(&claim).map_err(&failed)?,
            }
            self.state.lock().skipped.remove(&name);
            self.saw(&name);
        }
        Ok(adopted)
    }

    fn saw(&self, name: &PackName) {
        let mut state = self.state.lock();
        let seen = state.seen.entry(name.writer).or_default();
        *seen = (*seen).max(name.seq);
    }

    /// It is asked for and not doomed; `None`: it is not there.
    fn adopt_one(&self, name: &PackName, size: Option<u64>) -> Result<Option<Adopted>> {
        let failed = unavailable("claim packs in the bucket");
        let key = name.key();
        let size = match size {
            Some(size) => size,
            None => match self.bucket.size(&key) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other.map_err(&failed)?,
            },
        };
        let number = {
            let mut state = self.state.lock();
            state.next_number += 1;
            state.next_number
        };
        let entries = object::entries(&*self.bucket, &key, size, number);
        if is_absent(&entries) {
            return Ok(None);
        }
        let entries = entries.map_err(&failed)?;
        self.keep_copy(name, size, &entries)?;
        let mut state = self.state.lock();
        state.by_number.insert(number, Known { name: *name, size });
        state.by_name.insert(*name, number);
        Ok(Some(Adopted {
            number,
            len: size,
            entries,
        }))
    }

    /// Take back what interrupted work left, and delete what nobody relies on.
    pub(in super::super) fn tidy(&self, members: &Members) -> Result<()> {
        self.greet_again()?;
        self.state.lock().members = members.clone();
        self.tidy_claims(members)
            .and_then(|()| self.tidy_packs(members))
            .map_err(unavailable("tidy the bucket"))
    }

    /// Claims of ours that we do not rely on, and those of members that are gone.
    fn tidy_claims(&self, members: &Members) -> io::Result<()> {
        let mut relied: BTreeSet<PackName> = {
            let state = self.state.lock();
            state.by_name.keys().copied().collect()
        };
        for (key, _) in self.bucket.list(&names::claims_of(self.me), None)? {
            let claimed = names::claimed(&key);
            let skipped = |name| self.state.lock().skipped.contains(name);
            match &claimed {
                Some(name) if relied.remove(name) || skipped(name) => {}
                _ => self.bucket.delete(&key)?,
            }
        }
        for name in relied {
            // Its deletion was asked for long ago, and came late.
            tracing::error!(pack = %name, "a claim was lost from the bucket: made again");
            self.bucket
                .put(&names::claim(self.me, &name), Bytes::from_static(CLAIM))?;
        }
        for (key, _) in self.bucket.list("members/", None)? {
            let Some(gone) = names::member_of(&key).filter(|id| members.gone.contains(id)) else {
                continue;
            };
            for (claim, _) in self.bucket.list(&names::claims_of(gone), None)? {
                self.bucket.delete(&claim)?;
            }
            self.bucket.delete(&key)?;
        }
        Ok(())
    }

    fn tidy_packs(&self, members: &Members) -> io::Result<()> {
        // Packs before claims: whoever writes one claims it first.
        let packs: BTreeSet<PackName> = {
            let listed = self.bucket.list("packs/", None)?;
            listed
                .iter()
                .filter_map(|(key, _)| PackName::of_key(key))
                .collect()
        };
        let claimed: HashSet<PackName> = {
            let listed = self.bucket.list("claims/", None)?;
            listed
                .iter()
                .filter_map(|(key, _)| names::claimed(key))
                .collect()
        };
        let ours: HashSet<PackName> = {
            let state = self.state.lock();
            state
                .dooms
                .keys()
                .filter_map(|key| Some(names::doomed(key)?.0))
                .collect()
        };
        for name in packs
            .iter()
            .filter(|n| !claimed.contains(n) && !ours.contains(n))
        {
            let nonce = uuid::Uuid::new_v4().as_u64_pair().0;
            let key = names::doom(name, self.me, nonce);
            self.bucket.put(&key, Bytes::from_static(DOOMED))?;
            let now = (self.clock.0)();
            self.state.lock().dooms.insert(key, now);
        }
        let mut dooms: HashMap<String, u64> = HashMap::new();
        dooms.extend(self.bucket.list("dooms/", None)?);
        for (key, size) in dooms {
            let Some((name, by)) = names::doomed(&key) else {
                continue;
            };
            let due = size == FINAL.len() as u64 && (by == self.me || members.gone.contains(&by));
            if due {
                self.carry_out(&name, &key)?;
            } else if by == self.me {
                self.decide(&name, &key)?;
            }
        }
        Ok(())
    }

    /// A doom of ours that is not final.
    fn decide(&self, name: &PackName, key: &str) -> io::Result<()> {
        let since = self.state.lock().dooms.get(key).copied();
        let Some(since) = since else {
            // Of an earlier life, which has deleted nothing.
            return self.bucket.delete(key);
        };
        if (self.clock.0)().saturating_sub(since) < self.settle {
            return Ok(());
        }
        // Behind the doom: whoever is not in this list cannot have claimed it before.
        let members = self.bucket.list("members/", None)?;
        for (member, _) in members {
            let Some(id) = names::member_of(&member) else {
                continue;
            };
            let claim = self.bucket.size(&names::claim(id, name));
            if !is_absent(&claim) {
                claim?;
                self.bucket.delete(key)?;
                self.state.lock().dooms.remove(key);
                return Ok(());
            }
        }
        self.bucket.put(key, Bytes::from_static(FINAL))?;
        self.carry_out(name, key)
    }

    fn carry_out(&self, name: &PackName, doom: &str) -> io::Result<()> {
        self.bucket.delete(&name.key())?;
        self.bucket.delete(doom)?;
        self.state.lock().dooms.remove(doom);
        tracing::info!(pack = %name, "a pack that nobody needs was deleted from the bucket");
        Ok(())
    }
}
