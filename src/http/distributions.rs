//! Distributions as JSON: what was asked for and, for each node, how far it is. Refuses to judge whether a node is
//! alive: the state says so.

use super::View;
use super::time::Rfc3339;
use mainstay_model::NodeId;
use mainstay_model::distribution::{Delivery, Distribution};
use mainstay_model::node::Node;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Shown for an image that is here but not yet known to be: only what is done is at 1.
const ALMOST: f32 = 0.99;

/// `GET /api/v1/registry/vm/distribute`: an array.
#[derive(Clone, Copy)]
pub struct DistributionList<'a>(pub View<'a>);

impl Serialize for DistributionList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = self.0.state.distributions.values();
        serializer.collect_seq(all.map(|d| DistributionView::new(self.0, d)))
    }
}

/// What `GET /api/v1/registry/vm/distribute` shows.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Distributions<'a> {
    /// Without an id.
    All(Vec<DistributionView<'a>>),
    /// With an id.
    One(Box<DistributionView<'a>>),
}

/// One of them.
#[derive(Serialize, ToSchema)]
#[schema(as = Distribution)]
pub struct DistributionView<'a> {
    request: Request<'a>,
    /// No node is waited for any more.
    ended: bool,
    /// By node id.
    distribute_status: BTreeMap<&'a str, NodeStatus<'a>>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = DistributionRequest)]
struct Request<'a> {
    request_id: &'a str,
    template_id: &'a str,
    tag: &'a str,
    version: u32,
    #[schema(value_type = String)]
    time_requested: Rfc3339,
}

#[derive(Serialize, ToSchema)]
#[schema(as = DistributionStatus)]
struct NodeStatus<'a> {
    /// The node has fetched it.
    status: bool,
    /// 1 exactly if it has.
    progress: f32,
    /// Why not, or not yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    node_name: &'a str,
}

impl<'a> DistributionView<'a> {
    /// As it stands.
    pub fn new(view: View<'a>, of: &'a Distribution) -> Self {
        let nodes = of.nodes.iter();
        let status = nodes.map(|(id, delivery)| (id.as_str(), node_status(view, of, id, delivery)));
        Self {
            request: Request {
                request_id: of.id.as_str(),
                template_id: of.template.as_str(),
                tag: &of.tag,
                version: of.number,
                time_requested: Rfc3339(of.requested_ms),
            },
            ended: of.ended_ms.is_some(),
            distribute_status: status.collect(),
        }
    }
}

fn node_status<'a>(
    view: View<'a>,
    of: &Distribution,
    id: &NodeId,
    delivery: &Delivery,
) -> NodeStatus<'a> {
    let node = view.state.nodes.get(id);
    let (status, progress, error) = match (delivery, node) {
        (Delivery::Done, _) => (true, 1.0, None),
        (Delivery::Ended(why), _) => (false, 0.0, Some(why.clone())),
        (Delivery::Wanted, None) => (false, 0.0, None),
        (Delivery::Wanted, Some(node)) => {
            let (progress, error) = fetching(view, of, node);
            (false, progress, error)
        }
    };
    NodeStatus {
        status,
        progress,
        error,
        node_name: node.map_or("", Node::name),
    }
}

/// How far a node is that is still to fetch it, and what keeps it from that.
fn fetching(view: View<'_>, of: &Distribution, node: &Node) -> (f32, Option<String>) {
    let heard = view.soft.node_stats(&node.id).is_some();
    let pull = view.soft.pull(&node.id, &of.template, of.number);
    let pull = pull.unwrap_or_default();
    let error = if !node.reachable {
        "the node is not reachable; it fetches it when it is back".to_owned()
    } else if heard && view.soft.pulls(&node.id).is_none() {
        let version = &node.spec.agent_version;
        format!(
            "the node's agent ({version}) cannot fetch ahead of instances; it does once it is updated"
        )
    } else {
        pull.error
    };
    // Whatever a node says.
    let progress = match pull.progress.is_nan() {
        true => 0.0,
        false => pull.progress.clamp(0.0, ALMOST),
    };
    (progress, Some(error).filter(|e| !e.is_empty()))
}
