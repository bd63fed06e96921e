//! Random schedules of loss, duplication, reorder and restart: never two decisions, and one decision
//! once the faults stop.

use super::*;

/// xorshift64*: enough to make schedules, replayable by its seed.
struct Rng(u64);
impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let word = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(word).unwrap() % n
    }
    fn percent(&mut self, p: usize) -> bool {
        self.below(100) < p
    }
}

#[derive(Clone)]
enum Wire {
    Ask {
        from: usize,
        to: usize,
        request: Request,
    },
    Answer {
        from: usize,
        to: usize,
        reply: Reply,
    },
}

struct World {
    acceptors: Vec<Acceptor>,
    proposers: Vec<Option<Proposer>>,
    rounds: Vec<u64>,
    wires: Vec<Wire>,
    decisions: BTreeMap<String, Charter>,
    fresh: u64,
}

fn name(i: usize) -> String {
    format!("c{i}")
}
fn founder(i: usize) -> Founder {
    let member = Member {
        name: name(i),
        ..Member::default()
    };
    Founder {
        id: u64::try_from(i).unwrap() + 1,
        member,
    }
}

impl World {
    fn new(n: usize) -> Self {
        Self {
            acceptors: vec![Acceptor::default(); n],
            proposers: vec![None; n],
            rounds: vec![0; n],
            wires: Vec::new(),
            decisions: BTreeMap::new(),
            fresh: 0,
        }
    }
    fn broadcast(&mut self, from: usize, request: &Request) {
        for to in 0..self.acceptors.len() {
            self.wires.push(Wire::Ask {
                from,
                to,
                request: request.clone(),
            });
        }
    }
    fn start(&mut self, i: usize) {
        self.rounds[i] = self.rounds[i].max(self.acceptors[i].promised.round) + 1;
        let ballot = Ballot {
            round: self.rounds[i],
            proposer: founder(i).id,
        };
        self.proposers[i] = Some(Proposer::new(ballot, (0..self.acceptors.len()).map(name)));
        self.broadcast(i, &Request::Prepare { ballot });
    }
    fn decided(&mut self, by: usize, charter: Charter) {
        self.decisions
            .insert(charter.cluster_id.clone(), charter.clone());
        assert_eq!(
            self.decisions.len(),
            1,
            "two decisions: {:?}",
            self.decisions
        );
        assert!(
            charter.founders.len() > self.acceptors.len() / 2,
            "founded by a minority"
        );
        self.broadcast(by, &Request::Decide { charter });
    }
    fn deliver(&mut self, wire: Wire) {
        match wire {
            Wire::Ask { from, to, request } => {
                let reply = self.acceptors[to].handle(request);
                self.wires.push(Wire::Answer {
                    from: to,
                    to: from,
                    reply,
                });
            }
            Wire::Answer { from, to, reply } => self.answer(from, to, reply),
        }
    }
    fn answer(&mut self, from: usize, to: usize, reply: Reply) {
        let Some(proposer) = self.proposers[to].as_mut() else {
            return;
        };
        match reply {
            Reply::Promise { ballot, accepted } => {
                let before = proposer.charter.is_some();
                proposer.promised(ballot, founder(from), accepted);
                self.fresh += 1;
                let id = format!("cluster-{}", self.fresh);
                let ballot = proposer.ballot();
                if let (false, Some(charter)) = (before, proposer.charter(&id)) {
                    self.broadcast(to, &Request::Accept { ballot, charter });
                }
            }
            Reply::Accepted { ballot } => {
                if let Some(charter) = proposer.accepted(ballot, &founder(from)) {
                    self.decided(to, charter);
                }
            }
            Reply::Outbid { promised } => {
                self.rounds[to] = self.rounds[to].max(promised.round);
                self.proposers[to] = None;
            }
            Reply::Decided { charter } => {
                // Learns it, and stands for the greetings by which everyone else will.
                self.proposers[to] = None;
                self.decided(to, charter);
            }
        }
    }
    fn chaos(&mut self, rng: &mut Rng) {
        let n = self.acceptors.len();
        if self.wires.is_empty() || rng.percent(6) {
            self.start(rng.below(n));
        } else if rng.percent(2) {
            // A restart keeps what was saved (the acceptor) and forgets the attempt.
            let i = rng.below(n);
            self.proposers[i] = None;
            self.rounds[i] = 0;
        } else {
            let k = rng.below(self.wires.len());
            let wire = self.wires.swap_remove(k);
            if rng.percent(15) {
                return; // lost
            }
            if rng.percent(15) {
                self.wires.push(wire.clone()); // duplicated
            }
            self.deliver(wire);
        }
        self.wires.truncate(200);
    }
    fn heal(&mut self) {
        self.wires.clear();
        for _ in 0..1000 {
            if self.acceptors.iter().all(|a| a.decided.is_some()) {
                return;
            }
            self.start(0);
            while let Some(wire) = (!self.wires.is_empty()).then(|| self.wires.remove(0)) {
                self.deliver(wire);
            }
        }
        panic!("no decision after the faults stopped");
    }
}

#[test]
fn never_two_decisions_and_one_after_healing() {
    let mut decided_under_faults = 0;
    for seed in 1..=3000u64 {
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let mut world = World::new([1, 2, 3, 4, 5][rng.below(5)]);
        for _ in 0..rng.below(400) {
            world.chaos(&mut rng);
        }
        decided_under_faults += world.decisions.len();
        world.heal();
        assert_eq!(world.decisions.len(), 1, "seed {seed}");
    }
    // A run that decided nothing under faults would have tested nothing.
    assert!(
        decided_under_faults > 500,
        "only {decided_under_faults} runs decided under faults"
    );
}

/// The checker above must be able to fail: an acceptor that forgets at a restart breaks agreement.
#[test]
fn amnesia_is_caught() {
    let mut broken = 0;
    for seed in 1..=2000u64 {
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let mut world = World::new(3);
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..400 {
                world.chaos(&mut rng);
                if rng.percent(5) {
                    let i = rng.below(3);
                    world.acceptors[i] = Acceptor::default();
                }
            }
        }));
        broken += usize::from(run.is_err());
    }
    assert!(broken > 0, "the checker sees nothing");
}

#[test]
fn a_wiped_voter_does_not_count_twice() {
    let ballot = Ballot {
        round: 1,
        proposer: 1,
    };
    let mut proposer = Proposer::new(ballot, (0..3).map(name));
    proposer.promised(ballot, founder(0), None);
    proposer.promised(ballot, founder(1), None);
    assert!(proposer.charter("x").is_some());
    assert_eq!(proposer.accepted(ballot, &founder(0)), None);
    let wiped = Founder {
        id: 99,
        ..founder(1)
    };
    assert_eq!(proposer.accepted(ballot, &wiped), None);
    assert!(proposer.accepted(ballot, &founder(2)).is_some());
}
