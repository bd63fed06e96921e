//! What members say to each other on the peer port, in JSON. The Raft stream and the chunk transfer
//! have forms of their own.

use crate::config::Entry;
use crate::founding::{Founder, Reply, Request};
use mainstay_raft::Member;
use serde::{Deserialize, Serialize};

use crate::founding::Charter;

/// "Look at the membership now": no body, no answer.
pub const LOOK_PATH: &str = "/peer/v1/look";

/// "This is me; who are you?"
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The caller's id.
    pub member_id: u64,
    /// Its name and addresses.
    pub member: Member,
    /// Its cluster, if it is part of one.
    pub cluster_id: Option<String>,
    /// It has been a voter of that cluster.
    pub joined: bool,
    /// Its initial list.
    pub list: Vec<Entry>,
    /// It was started with `--join`: it founds nothing, and its list binds nobody.
    #[serde(default)]
    pub joining: bool,
    /// It does not want a vote.
    #[serde(default)]
    pub learner: bool,
}

/// The answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// The answerer's name.
    pub name: String,
    /// Its id.
    pub member_id: u64,
    /// Its cluster, if it is part of one.
    pub cluster_id: Option<String>,
    /// How that cluster was founded, if it knows.
    pub charter: Option<Charter>,
    /// Why the caller cannot be part of the same cluster, as a sentence for its operator.
    pub refusal: Option<String>,
    /// The answerer was started with `--join`: it founds nothing.
    #[serde(default)]
    pub joining: bool,
    /// The caller's identity was taken out of the cluster: a committed fact, and for good.
    #[serde(default)]
    pub removed: bool,
}

/// A founding request with its sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundingCall {
    /// The sender's initial list: voters must agree on who votes.
    pub list: Vec<Entry>,
    /// The request.
    pub request: Request,
}

/// The answer with the identity that gave it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundingReply {
    /// Who answers.
    pub voter: Founder,
    /// The answer.
    pub reply: Reply,
}

/// How far a joining member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JoinReply {
    /// Receives the log; ask again.
    Learner,
    /// Votes.
    Voter,
}

/// The body of every refusal on the peer port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// A sentence for the operator.
    pub message: String,
}
