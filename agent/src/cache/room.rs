//! Which images must go so that another fits: pure arithmetic.

use std::collections::BTreeSet;

/// The fewest least recently used images (`by_age`: oldest first, with their bytes) whose removal
/// lets `needed` bytes be written with `reserve` still free; nothing in `keep`. If that is not
/// enough, a sentence: then nothing is to be removed.
pub(super) fn victims(
    free: u64,
    needed: u64,
    reserve: u64,
    by_age: &[(String, u64)],
    keep: &BTreeSet<String>,
) -> Result<Vec<String>, String> {
    let goal = needed.saturating_add(reserve);
    let mut free = free;
    let mut victims = Vec::new();
    for (digest, bytes) in by_age {
        if free >= goal {
            break;
        }
        if !keep.contains(digest) {
            free = free.saturating_add(*bytes);
            victims.push(digest.clone());
        }
    }
    if free >= goal {
        return Ok(victims);
    }
    Err(format!(
        "{} MB are needed and {} MB are kept in reserve, but no more than {} MB can be freed",
        needed >> 20,
        reserve >> 20,
        free >> 20
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(free: u64, needed: u64, reserve: u64, keep: &[&str]) -> Result<String, String> {
        let shelf = [("a", 10), ("b", 20), ("c", 30)].map(|(d, n)| (d.to_owned(), n << 20));
        let keep = keep.iter().map(|k| (*k).to_owned()).collect();
        victims(free << 20, needed << 20, reserve << 20, &shelf, &keep).map(|v| v.join(","))
    }

    #[test]
    fn oldest_go_first_pinned_never_and_nothing_in_vain() {
        assert_eq!(ask(100, 50, 50, &[]), Ok(String::new()));
        assert_eq!(ask(100, 55, 50, &[]), Ok("a".to_owned()));
        assert_eq!(ask(100, 65, 50, &[]), Ok("a,b".to_owned()));
        assert_eq!(ask(100, 65, 50, &["a"]), Ok("b".to_owned()));
        assert_eq!(ask(100, 75, 50, &["b"]), Ok("a,c".to_owned()));
        let refused = ask(100, 111, 50, &[]).unwrap_err();
        assert!(
            refused.contains("no more than 160 MB can be freed"),
            "{refused}"
        );
        assert!(ask(0, 1, 0, &["a", "b", "c"]).is_err());
        assert!(ask(0, u64::MAX >> 20, 100, &[]).is_err());
    }
}
