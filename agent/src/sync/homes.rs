//! Which controller is next, and how long to wait before that. Knows addresses, not what is said.

use std::collections::BTreeSet;
use std::time::Duration;

/// The list of controllers and our place in it.
pub(super) struct Homes {
    /// As the operator gave them: never forgotten, so that a wrong list from outside cannot lock us out.
    given: Vec<String>,
    urls: Vec<String>,
    at: usize,
    tried: usize,
    begun: bool,
    pause: Duration,
    backoff: (Duration, Duration),
    strangers: BTreeSet<String>,
}

impl Homes {
    /// Different nodes begin at different places (`seed`), so that they spread over the members.
    pub(super) fn new(
        given: &[String],
        known: &[String],
        seed: &str,
        backoff: (Duration, Duration),
    ) -> Self {
        let given: Vec<String> = given.iter().map(|u| plain(u)).collect();
        let mut homes = Self {
            urls: Vec::new(),
            given,
            at: 0,
            tried: 0,
            begun: false,
            pause: backoff.0,
            backoff,
            strangers: BTreeSet::new(),
        };
        homes.update(known);
        if !homes.urls.is_empty() {
            let hash = seed.bytes().fold(7_usize, |h, b| {
                h.wrapping_mul(31).wrapping_add(usize::from(b))
            });
            homes.at = hash % homes.urls.len();
        }
        homes
    }

    /// A controller told who the members are now. Those the operator gave stay, at the end.
    pub(super) fn update(&mut self, told: &[String]) {
        let here = self.urls.get(self.at).cloned();
        let mut urls: Vec<String> = Vec::new();
        for url in told.iter().map(|u| plain(u)).chain(self.given.clone()) {
            if !url.is_empty() && !urls.contains(&url) {
                urls.push(url);
            }
        }
        if urls == self.urls {
            return;
        }
        let at = here.and_then(|here| urls.iter().position(|u| *u == here));
        self.at = at.unwrap_or(0);
        self.urls = urls;
        self.tried = self.tried.min(self.urls.len());
    }

    /// Where to try now; waits first when everybody was tried in vain.
    pub(super) async fn next(&mut self) -> Option<String> {
        if self.urls.is_empty() {
            return None;
        }
        if self.tried >= self.urls.len() {
            tokio::time::sleep(jitter(self.pause)).await;
            self.pause = (self.pause * 2).min(self.backoff.1);
            self.tried = 0;
        }
        if self.begun {
            self.at = (self.at + 1) % self.urls.len();
        }
        self.begun = true;
        self.tried += 1;
        Some(self.urls[self.at].clone())
    }

    /// The present one serves us.
    pub(super) fn good(&mut self) {
        self.tried = 0;
        self.pause = self.backoff.0;
        self.strangers.clear();
    }

    /// `url` belongs to another cluster. Is there anybody left to try?
    pub(super) fn strangers_only(&mut self, url: &str) -> bool {
        self.strangers.insert(url.to_owned());
        self.urls.iter().all(|u| self.strangers.contains(u))
    }
}

fn plain(url: &str) -> String {
    let url = url.trim().trim_end_matches('/');
    if url.is_empty() || url.contains("://") {
        return url.to_owned();
    }
    format!("http://{url}")
}

/// Between half of it and all of it, so that nodes do not come back in step.
pub(super) fn jitter(pause: Duration) -> Duration {
    let random = u32::try_from(uuid::Uuid::new_v4().as_u128() % 1000).unwrap_or(0);
    pause / 2 + pause * random / 2000
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

    fn list(urls: &[&str]) -> Vec<String> {
        urls.iter().map(|u| (*u).to_owned()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_in_turn_then_a_growing_pause() {
        let mut homes = Homes::new(&list(&["a:1", "http://b:1/"]), &[], "", BACKOFF);
        let began = tokio::time::Instant::now();
        let first = homes.next().await.unwrap();
        let second = homes.next().await.unwrap();
        let both = BTreeSet::from([first.clone(), second]);
        assert_eq!(
            both,
            BTreeSet::from(["http://a:1".to_owned(), "http://b:1".to_owned()])
        );
        assert!(began.elapsed() < Duration::from_millis(1));
        assert_eq!(homes.next().await.unwrap(), first);
        let one_pause = began.elapsed();
        assert!(one_pause >= Duration::from_millis(50), "{one_pause:?}");
        for _ in 0..20 {
            homes.next().await.unwrap();
        }
        let many = began.elapsed();
        assert!(
            many > Duration::from_secs(2) && many < Duration::from_secs(12),
            "{many:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_good_home_is_left_for_the_next_one_and_lists_are_taken_over() {
        let mut homes = Homes::new(&list(&["http://a", "http://b"]), &[], "", BACKOFF);
        let first = homes.next().await.unwrap();
        homes.good();
        homes.update(&list(&["http://x", &first, "http://y"]));
        assert_eq!(homes.next().await.unwrap(), "http://y");
        let mut seen = BTreeSet::new();
        for _ in 0..3 {
            seen.insert(homes.next().await.unwrap());
        }
        assert!(
            seen.contains("http://x") && seen.contains(&first),
            "{seen:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_are_passed_over_until_there_is_nobody_else() {
        let mut homes = Homes::new(&list(&["http://a", "http://b"]), &[], "", BACKOFF);
        let first = homes.next().await.unwrap();
        assert!(!homes.strangers_only(&first));
        let second = homes.next().await.unwrap();
        assert_ne!(first, second);
        assert!(homes.strangers_only(&second));
    }
}
