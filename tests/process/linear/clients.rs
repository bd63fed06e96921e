//! Clients of one schedule: each asks its own member first, does one thing after another, and writes
//! down what it was told. Knows no fault.

use super::field::{Answer, CREATED, Call, Field, http, send};
use super::history::{Event, Glance, History, KEYS, MISSING, Made, What};
use crate::Dice;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::task::JoinSet;

/// Writing and reading clients of each member: one patient, one that hangs up early.
const TIMEOUTS: [Duration; 2] = [Duration::from_secs(10), Duration::from_millis(700)];
/// Repetitions of a request with a key before its client gives up.
const SENDS_MAX: u32 = 8;
/// Longest thought between two operations, in ms.
const THOUGHT_MS: u64 = 12;
/// Tags are left in each pile, so that it never vanishes.
const PILE_FLOOR: u32 = 12;
/// Takes at once in a burst, by each client that takes.
const BURST: usize = 3;

/// Start all clients; each returns what it saw.
pub(crate) fn start(field: &Arc<Field>, dice: &mut Dice) -> JoinSet<History> {
    let mut clients = JoinSet::new();
    let mut number = 0;
    let mut client = |home, timeout, dice: &mut Dice| {
        number += 1;
        Client {
            number,
            home,
            timeout,
            field: Arc::clone(field),
            http: http(),
            dice: Dice(dice.below(u64::MAX) | 1),
            seen: History::default(),
        }
    };
    for home in 0..field.apis.len() {
        for timeout in TIMEOUTS {
            clients.spawn(client(home, timeout, dice).write_and_read());
        }
        clients.spawn(client(home, TIMEOUTS[1], dice).take_and_count());
    }
    clients
}

/// The last words: everything, read through every member. Panics if one does not answer.
pub(crate) async fn read_all(field: &Arc<Field>) -> History {
    let mut seen = History::default();
    for home in 0..field.apis.len() {
        let mut last = Client {
            number: 0,
            home,
            timeout: TIMEOUTS[0],
            field: Arc::clone(field),
            http: http(),
            dice: Dice(1),
            seen: History::default(),
        };
        for instance in 0..field.instances.len() {
            last.read(instance).await;
        }
        for pile in 0..field.piles.len() {
            last.count(pile).await;
        }
        last.list().await;
        let answered = last.seen.events.iter().all(|e| e.returned.is_some());
        let expected = field.instances.len() + field.piles.len() + 1;
        assert!(
            answered && last.seen.events.len() == expected,
            "member {home} does not answer after the faults: {:?}",
            last.seen.surprises
        );
        seen.add(last.seen);
    }
    seen
}

struct Client {
    number: usize,
    home: usize,
    timeout: Duration,
    field: Arc<Field>,
    http: reqwest::Client,
    dice: Dice,
    seen: History,
}

/// How a change ended.
enum Change {
    Done(Value),
    Unknown,
    /// It had no effect.
    None,
}

impl Client {
    async fn write_and_read(mut self) -> History {
        while !self.field.stopping() {
            let instance = self.dice.below(self.field.instances.len() as u64) as usize;
            match self.dice.below(100) {
                0..40 => self.write(instance).await,
                40..72 => self.read(instance).await,
                72..82 => self.read_stale(instance).await,
                82..90 => self.list().await,
                _ => self.create().await,
            }
            let thought = Duration::from_millis(self.dice.below(THOUGHT_MS));
            tokio::time::sleep(thought).await;
        }
        self.seen
    }

    /// Takes a tag now and then, and several at once when a fault is about to come: what is under way
    /// then is what its member, or its client, sends again.
    async fn take_and_count(mut self) -> History {
        let field = Arc::clone(&self.field);
        let mut burst = field.burst.subscribe();
        let mut left: Vec<u32> = field.piles.iter().map(|(_, count)| *count).collect();
        while !self.field.stopping() {
            let pile = self.dice.below(left.len() as u64) as usize;
            let pause = Duration::from_millis(300 + self.dice.below(600));
            let at_once = match tokio::time::timeout(pause, burst.changed()).await {
                Ok(_) => BURST,
                Err(_) => 1,
            };
            if left[pile] > PILE_FLOOR {
                self.take(pile, at_once).await;
            }
            if let Some(count) = self.count(pile).await {
                left[pile] = count;
            }
        }
        self.seen
    }

    async fn call(&self, member: usize, call: Call<'_>) -> Answer {
        send(&self.http, &self.field.apis[member], call).await
    }

    fn record(&mut self, member: usize, invoked: u64, returned: Option<u64>, what: What) {
        self.seen.events.push(Event {
            client: self.number,
            member,
            invoked,
            returned,
            what,
        });
    }

    /// Change something; again with the same key through the next member as long as it is unclear, if
    /// there is a key. Without one, again only if the connection broke and `again` says so: as a client
    /// does that takes a broken connection for a request that was not received. Answers how it ended,
    /// the member that was asked last, and how many sends may have had an effect.
    async fn change(
        &mut self,
        method: &'static str,
        path: &str,
        body: &Value,
        key: Option<&str>,
        again: bool,
    ) -> (Change, usize, u32) {
        let mut member = self.home;
        let mut maybe = 0;
        for _ in 0..SENDS_MAX {
            let call = Call {
                method,
                path,
                body: Some(body.clone()),
                key,
                timeout: self.timeout,
            };
            let answer = self.call(member, call).await;
            let dropped = matches!(answer, Answer::Dropped);
            match answer {
                Answer::Done(body, ..) => {
                    self.field.acknowledged[member].fetch_add(1, Ordering::SeqCst);
                    return (Change::Done(body), member, maybe + 1);
                }
                Answer::Refused(why, _) => {
                    let text = format!("{method} {path} through member {member}: {why}");
                    self.seen.surprises.push(text);
                    return (Change::Unknown, member, maybe + 1);
                }
                Answer::Nothing => self.seen.refused += 1,
                Answer::Dropped | Answer::Unknown => maybe += 1,
            }
            let clear = maybe == 0;
            if self.field.stopping() || (key.is_none() && (clear || !again || !dropped)) {
                break;
            }
            member = (member + 1) % self.field.apis.len();
            // A member that is down refuses at once: not a thousand times.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let change = if maybe == 0 {
            Change::None
        } else {
            Change::Unknown
        };
        (change, member, maybe)
    }

    async fn write(&mut self, instance: usize) {
        let first = self.dice.below(KEYS as u64) as usize;
        let count = 1 + self.dice.below(2) as usize;
        let pairs: Vec<_> = (first..first + count)
            .map(|key| (key % KEYS, self.field.number()))
            .collect();
        let metadata: serde_json::Map<_, _> = pairs
            .iter()
            .map(|(key, value)| (format!("k{key}"), json!(value)))
            .collect();
        let path = format!("/api/v1/vm?id={}", self.field.instances[instance]);
        let key = (self.dice.below(3) == 0).then(|| format!("write-{}", pairs[0].1));
        let invoked = self.field.now();
        let (change, member, _) = self
            .change(
                "PUT",
                &path,
                &json!({"metadata": metadata}),
                key.as_deref(),
                false,
            )
            .await;
        self.changed(&change, member, invoked, What::Write(instance, pairs));
    }

    fn changed(&mut self, change: &Change, member: usize, invoked: u64, what: What) {
        let returned = match change {
            Change::Done(_) => Some(self.field.now()),
            Change::Unknown => None,
            Change::None => return,
        };
        self.record(member, invoked, returned, what);
    }

    async fn create(&mut self) {
        let number = self.field.number();
        let body = json!({
            "vmid": self.field.template, "external_id": format!("{CREATED}{number}"),
        });
        let keyed = self.dice.below(2) == 0;
        let key = keyed.then(|| format!("create-{number}"));
        let again = self.dice.below(2) == 0;
        let invoked = self.field.now();
        let (change, member, sends) = self
            .change("POST", "/api/v1/vm", &body, key.as_deref(), again)
            .await;
        if let Change::Done(ids) = &change
            && ids.as_array().map(Vec::len) != Some(1)
        {
            let text = format!("create {number} was answered {ids}");
            self.seen.surprises.push(text);
        }
        self.seen.made.push(Made {
            number,
            keyed,
            sends,
        });
        self.changed(&change, member, invoked, What::Create(number));
    }

    /// Several at once, each an operation of its own: half of them with a key and sent again until
    /// they are answered.
    async fn take(&mut self, pile: usize, at_once: usize) {
        let mut taking = JoinSet::new();
        for _ in 0..at_once {
            let mut one = Self {
                number: self.number,
                home: self.home,
                timeout: self.timeout,
                field: Arc::clone(&self.field),
                http: self.http.clone(),
                dice: Dice(self.dice.below(u64::MAX) | 1),
                seen: History::default(),
            };
            taking.spawn(async move {
                let key = (one.dice.below(2) == 0).then(|| format!("take-{}", one.field.number()));
                let path = format!("/api/v1/registry/revert?id={}", one.field.piles[pile].0);
                let invoked = one.field.now();
                let (change, member, _) = one
                    .change("DELETE", &path, &json!({}), key.as_deref(), false)
                    .await;
                one.changed(&change, member, invoked, What::Take(pile));
                one.seen
            });
        }
        while let Some(one) = taking.join_next().await {
            self.seen.add(one.unwrap());
        }
    }

    /// Ask any member half of the time, the own one otherwise.
    fn some_member(&mut self) -> usize {
        if self.number != 0 && self.dice.below(2) == 0 {
            self.dice.below(self.field.apis.len() as u64) as usize
        } else {
            self.home
        }
    }

    /// Read; what was seen, or `None` without an answer.
    async fn look(&mut self, member: usize, path: &str) -> Option<Value> {
        match self.call(member, self.get(path)).await {
            Answer::Done(body, _) => Some(body),
            Answer::Refused(why, _) => {
                let text = format!("GET {path} through member {member}: {why}");
                self.seen.surprises.push(text);
                None
            }
            _ => None,
        }
    }

    fn get<'a>(&self, path: &'a str) -> Call<'a> {
        Call {
            method: "GET",
            path,
            body: None,
            key: None,
            timeout: self.timeout,
        }
    }

    async fn read(&mut self, instance: usize) {
        let member = self.some_member();
        let path = format!("/api/v1/vm?id={}", self.field.instances[instance]);
        let invoked = self.field.now();
        if let Some(body) = self.look(member, &path).await {
            let returned = Some(self.field.now());
            let what = What::Read(instance, Field::values(&body));
            self.record(member, invoked, returned, what);
        }
    }

    /// Everything acknowledged longer ago than the age is in a stale answer: it is a read that may
    /// have begun that much earlier (and a millisecond, which the header cuts off).
    async fn read_stale(&mut self, instance: usize) {
        let member = self.some_member();
        let id = &self.field.instances[instance];
        let path = format!("/api/v1/vm?id={id}&consistency=stale");
        let process = self.field.process[member].load(Ordering::SeqCst);
        let invoked = self.field.now();
        let (values, age) = match self.call(member, self.get(&path)).await {
            Answer::Done(body, age) => (Field::values(&body), age),
            // A member that has just joined does not know it yet.
            Answer::Refused(_, age) => (vec![MISSING; KEYS], age),
            _ => return,
        };
        let returned = self.field.now();
        let same = process == self.field.process[member].load(Ordering::SeqCst);
        if let Some(applied) = age.applied.filter(|_| same) {
            self.seen.glances.push(Glance {
                process: (member, process),
                invoked,
                returned,
                applied,
            });
        }
        if let Some(ms_max) = age.ms_max {
            let begun = invoked.saturating_sub((ms_max + 1) * 1000);
            self.record(member, begun, Some(returned), What::Read(instance, values));
        }
    }

    async fn list(&mut self) {
        let member = self.some_member();
        let invoked = self.field.now();
        if let Some(body) = self.look(member, "/api/v1/vm").await {
            let returned = Some(self.field.now());
            let (registers, counts) = self.field.list(&body);
            self.record(member, invoked, returned, What::List(registers, counts));
        }
    }

    async fn count(&mut self, pile: usize) -> Option<u32> {
        let member = self.some_member();
        let path = format!("/api/v1/registry/vm?id={}", self.field.piles[pile].0);
        let invoked = self.field.now();
        let body = self.look(member, &path).await?;
        let left = body["versions"].as_array().map_or(0, Vec::len) as u32;
        let returned = Some(self.field.now());
        self.record(member, invoked, returned, What::Count(pile, left));
        Some(left)
    }
}
