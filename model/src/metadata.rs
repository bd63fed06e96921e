//! A caller's key-values. Sorted pairs in one run of memory: most instances have a few keys or none, and a
//! tree takes 600 bytes for the first of them.

use crate::instance::Value;
use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;

/// Values by key, each key once. Stored and sent as a map.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "BTreeMap<String, Value>")]
pub struct Metadata(Vec<(String, Value)>);

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        Some(&self.0[self.find(key).ok()?].1)
    }

    /// Set a key.
    pub fn insert(&mut self, key: String, value: Value) {
        match self.find(&key) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => {
                self.0.reserve_exact(1);
                self.0.insert(at, (key, value));
            }
        }
    }

    /// Pairs in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    /// Without any key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn find(&self, key: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(k, _)| k.as_str().cmp(key))
    }
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl From<BTreeMap<String, Value>> for Metadata {
    fn from(map: BTreeMap<String, Value>) -> Self {
        let mut pairs: Vec<_> = map.into_iter().collect();
        pairs.shrink_to_fit();
        Self(pairs)
    }
}

impl FromIterator<(String, Value)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(pairs: I) -> Self {
        pairs.into_iter().collect::<BTreeMap<_, _>>().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode};

    #[test]
    fn is_a_map_in_memory_and_in_bytes() {
        let pair = |key: &str, n| (key.to_owned(), Value::Int(n));
        let map = BTreeMap::from([pair("b", 2), pair("c", 3), pair("a", 1)]);
        let mut metadata: Metadata = map.clone().into_iter().rev().collect();
        assert_eq!(encode(&metadata), encode(&map));
        assert_eq!(decode::<Metadata>(&encode(&map)).unwrap(), metadata);
        assert!(metadata.iter().eq(&map));
        metadata.insert("b".into(), Value::Int(9));
        metadata.insert("aa".into(), Value::Int(8));
        assert_eq!(metadata.get("b"), Some(&Value::Int(9)));
        assert_eq!(metadata.get("aa"), Some(&Value::Int(8)));
        assert_eq!(metadata.get("d"), None);
        let keys: Vec<_> = metadata.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["a", "aa", "b", "c"]);
        assert!(!metadata.is_empty() && Metadata::default().is_empty());
    }
}
