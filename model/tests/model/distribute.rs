//! What is known of distributions has bounds: those that ended make place, those that wait never do.

use crate::sample;
use mainstay_model::command::Command;
use mainstay_model::distribution::Delivery;
use mainstay_model::feature::DISTRIBUTE;
use mainstay_model::ids::MemberId;
use mainstay_model::{
    CommandId, DistributionId, Envelope, NodeId, Outcome, Refusal, State, invariants, limits,
};

/// A cloud with a template, and a count of commands.
struct Cloud(State, u128);

impl Cloud {
    fn with_nodes(nodes: usize) -> Self {
        let mut cloud = Self(State::default(), 0);
        cloud.apply(Command::SetFeatures { level: DISTRIBUTE });
        cloud.apply(Command::PublishTag {
            new_template_id: "t1".into(),
            template: "debian".into(),
            tag: "v1".into(),
            content: sample::content(1, "amd64"),
            holder: MemberId(1),
            copies_needed: 1,
            voters: [MemberId(1)].into(),
        });
        for n in 0..nodes {
            cloud.apply(Command::RegisterNode {
                id: node(n),
                spec: Box::new(sample::spec(&format!("node {n}"), 1)),
            });
        }
        cloud
    }

    /// Each command a millisecond after the one before.
    fn apply(&mut self, command: Command) -> Outcome {
        self.1 += 1;
        self.0.apply(&Envelope {
            id: CommandId(self.1),
            stamp_ms: u64::try_from(self.1).unwrap(),
            command,
        })
    }

    fn distribute(&mut self, id: usize, nodes: Vec<NodeId>) -> Outcome {
        self.apply(Command::Distribute {
            id: name(id),
            template: "t1".into(),
            selector: None,
            nodes,
            group: None,
        })
    }

    fn cancel(&mut self, id: usize) {
        let id = name(id);
        let done = self.apply(Command::CancelDistribution { id });
        assert_eq!(done, Outcome::Done);
    }

    fn knows(&self, id: usize) -> bool {
        self.0.distributions.contains_key(&name(id))
    }
}

fn node(n: usize) -> NodeId {
    format!("n{n:05}").into()
}

fn name(id: usize) -> DistributionId {
    format!("d{id:04}").into()
}

#[test]
fn the_one_that_ended_first_makes_place_and_none_that_waits() {
    let mut cloud = Cloud::with_nodes(2);
    for id in 0..limits::DISTRIBUTIONS {
        assert_eq!(cloud.distribute(id, vec![node(0)]), Outcome::Done);
    }
    let more = limits::DISTRIBUTIONS;
    let full = cloud.distribute(more, vec![node(0)]);
    assert!(
        matches!(&full, Outcome::Refused(Refusal::Limit(why)) if why.contains("1001 distributions")),
        "{full:?}"
    );
    cloud.cancel(7);
    cloud.cancel(3);
    assert_eq!(cloud.distribute(more, vec![node(1)]), Outcome::Done);
    assert!(!cloud.knows(7) && cloud.knows(3) && cloud.knows(more));
    // What cannot be drops nothing: neither one that is refused, nor one that is known.
    assert!(matches!(
        cloud.distribute(more + 1, vec![node(9)]),
        Outcome::Refused(Refusal::NodeUnknown(_))
    ));
    assert_eq!(cloud.distribute(more, Vec::new()), Outcome::Done);
    assert!(cloud.knows(3));
    invariants::check(&cloud.0).unwrap();
}

#[test]
fn so_many_nodes_in_all_and_each_of_them_has_its_entry() {
    let nodes = 10_000;
    let mut cloud = Cloud::with_nodes(nodes);
    let fit = limits::DELIVERIES / nodes;
    for id in 0..fit {
        assert_eq!(cloud.distribute(id, Vec::new()), Outcome::Done);
    }
    let entries = &cloud.0.distributions[&name(0)].nodes;
    assert_eq!(entries.len(), nodes);
    assert!(entries.values().all(|d| *d == Delivery::Wanted));
    let full = cloud.distribute(fit, vec![node(5)]);
    assert!(matches!(full, Outcome::Refused(Refusal::Limit(_))));
    // Every node asks all of them for its own share.
    let n5 = node(5);
    assert_eq!(cloud.0.wanted_on(&n5).count(), fit);
    let images = vec![("t1".into(), 0)];
    cloud.apply(Command::SetNodeImages { id: n5, images });
    assert_eq!(cloud.0.wanted_on(&node(5)).count(), 0);
    cloud.cancel(0);
    assert_eq!(cloud.distribute(fit, vec![node(5)]), Outcome::Done);
    let new = &cloud.0.distributions[&name(fit)];
    assert_eq!(new.nodes[&node(5)], Delivery::Done, "it has it");
    assert!(new.ended_ms.is_some());
    invariants::check(&cloud.0).unwrap();
}
