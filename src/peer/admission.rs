//! May this caller be part of the same cluster as we? Pure: a greeting and what we know, and a sentence
//! for the caller's operator if not.

use super::wire::Hello;
use crate::config::Entry;
use crate::founding::Charter;
use mainstay_raft::MemberStatus;
use std::collections::BTreeMap;

/// What we know.
#[derive(Debug)]
pub struct Known<'a> {
    /// Our name.
    pub name: &'a str,
    /// Our id.
    pub id: u64,
    /// Our initial list.
    pub list: &'a [Entry],
    /// Our cluster.
    pub cluster_id: Option<&'a str>,
    /// How it was founded, if we know.
    pub charter: Option<&'a Charter>,
    /// Its members, as far as our group knows.
    pub members: &'a BTreeMap<u64, MemberStatus>,
    /// We were started with `--join`.
    pub joining: bool,
    /// The caller's identity was taken out of the cluster by an operator: committed.
    pub retired: bool,
}

/// Is the caller's identity out for good? One that an operator is just taking out is still in.
pub fn removed_for_good(ours: &Known<'_>, hello: &Hello) -> bool {
    ours.retired
        && hello.cluster_id.as_deref() == ours.cluster_id
        && !ours.members.contains_key(&hello.member_id)
}

/// The reason to refuse `hello`, if there is one.
pub fn refusal(ours: &Known<'_>, hello: &Hello) -> Option<String> {
    double(ours, hello)
        .or_else(|| foreign(ours, hello))
        .or_else(|| removed(ours, hello))
        .or_else(|| lists(ours, hello))
        .or_else(|| wiped(ours, hello))
        .or_else(|| hidden(ours, hello))
}

/// Two processes with one name or one directory.
fn double(ours: &Known<'_>, hello: &Hello) -> Option<String> {
    let (name, url) = (&hello.member.name, &hello.member.peer_url);
    if hello.member_id == ours.id {
        return Some(format!(
            "member {name} at {url} has the same identity as member {}: its data directory was copied; empty it and start it again",
            ours.name
        ));
    }
    (name == ours.name).then(|| {
        format!(
            "another process already runs as member {name}: give each member a --name of its own"
        )
    })
}

fn foreign(ours: &Known<'_>, hello: &Hello) -> Option<String> {
    let (theirs, ours_id) = (hello.cluster_id.as_deref()?, ours.cluster_id?);
    let name = &hello.member.name;
    (theirs != ours_id).then(|| {
        format!(
            "the data directory of member {name} belongs to cluster {theirs}, but member {} is part of cluster {ours_id}: start {name} with an empty --data-dir (after `mainstay member replace {name}` if it was a member here), or with the --initial-cluster (or --join) of its own cluster",
            ours.name
        )
    })
}

/// Voters in founding, and whoever joins, must agree on the list.
fn lists(ours: &Known<'_>, hello: &Hello) -> Option<String> {
    // Who joins a cluster by its address has no list to agree on, on either side.
    if hello.joined || hello.joining || ours.joining || hello.list == ours.list {
        return None;
    }
    Some(format!(
        "--initial-cluster of member {} ({}) differs from that of member {} ({}): give every member the same list",
        hello.member.name,
        show(&hello.list),
        ours.name,
        show(ours.list)
    ))
}

fn show(list: &[Entry]) -> String {
    let each: Vec<_> = list
        .iter()
        .map(|e| format!("{}={}", e.name, e.url))
        .collect();
    each.join(",")
}

/// A known name under an unknown identity.
fn wiped(ours: &Known<'_>, hello: &Hello) -> Option<String> {
    let name = &hello.member.name;
    let other = if ours.members.is_empty() {
        let founders = ours
            .charter
            .map(|charter| charter.founders.as_slice())
            .unwrap_or_default();
        founders
            .iter()
            .any(|f| &f.member.name == name && f.id != hello.member_id)
    } else {
        ours.members
            .iter()
            .any(|(id, m)| &m.member.name == name && *id != hello.member_id)
    };
    other.then(|| {
        format!(
            "member {name} is already in the cluster under another identity: its data directory was wiped or replaced; run `mainstay member replace {name} --endpoints URL,...` on a healthy member, then start it again"
        )
    })
}

/// It was a voter, and is not even a learner now: an operator removed it.
fn removed(ours: &Known<'_>, hello: &Hello) -> Option<String> {
    let name = &hello.member.name;
    let gone = hello.joined
        && hello.cluster_id.as_deref() == ours.cluster_id
        && !ours.members.is_empty()
        && !ours.members.contains_key(&hello.member_id);
    (gone || removed_for_good(ours, hello)).then(|| {
        format!(
            "member {name} was removed from the cluster: stop it for good, or start it with an empty --data-dir to let it join again as a new member"
        )
    })
}

/// The others would dial a loopback address on their own machine.
fn hidden(ours: &Known<'_>, hello: &Hello) -> Option<String> {
    let joining = !ours.members.is_empty() && !ours.members.contains_key(&hello.member_id);
    let (name, url) = (&hello.member.name, &hello.member.peer_url);
    let others = || {
        ours.members
            .values()
            .filter(|m| !m.member.peer_url.is_empty())
    };
    if !joining || url.is_empty() {
        return None;
    }
    if let Some(far) = others().find(|m| !loopback(&m.member.peer_url))
        && loopback(url)
    {
        return Some(format!(
            "member {name} tells the others to reach it at {url}, which means their own machine; member {} is at {}: start {name} with --advertise-host HOST",
            far.member.name, far.member.peer_url
        ));
    }
    let near = others().find(|m| loopback(&m.member.peer_url) && !loopback(url))?;
    Some(format!(
        "member {} tells the others to reach it at {}, which member {name} at {url} cannot: start {} again with --advertise-host HOST, then {name} joins by itself",
        near.member.name, near.member.peer_url, near.member.name
    ))
}

fn loopback(url: &str) -> bool {
    let Ok((host, _)) = crate::config::split_url(url) else {
        return false;
    };
    let bare = host.trim_matches(['[', ']']);
    let ip = bare.parse::<std::net::IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::founding::Founder;
    use mainstay_raft::{Member, Role};

    fn member(name: &str) -> Member {
        Member {
            name: name.to_owned(),
            ..Member::default()
        }
    }
    fn list(names: &[&str]) -> Vec<Entry> {
        names
            .iter()
            .map(|n| Entry {
                name: (*n).to_owned(),
                url: format!("http://{n}:1"),
            })
            .collect()
    }
    fn hello(id: u64, name: &str) -> Hello {
        Hello {
            member_id: id,
            member: member(name),
            cluster_id: None,
            joined: false,
            list: list(&["c1", "c2", "c3"]),
            joining: false,
            learner: false,
        }
    }
    fn members() -> BTreeMap<u64, MemberStatus> {
        let each = |name| MemberStatus {
            member: member(name),
            role: Role::Voter,
            matched: None,
        };
        BTreeMap::from([(1, each("c1")), (2, each("c2"))])
    }
    fn ask(hello: &Hello, members: &BTreeMap<u64, MemberStatus>) -> String {
        asked(hello, members, false)
    }
    fn asked(hello: &Hello, members: &BTreeMap<u64, MemberStatus>, retired: bool) -> String {
        let ours = list(&["c1", "c2", "c3"]);
        let charter = Charter {
            cluster_id: "x".into(),
            founders: vec![Founder {
                id: 2,
                member: member("c2"),
            }],
        };
        let known = Known {
            name: "c1",
            id: 1,
            list: &ours,
            cluster_id: Some("x"),
            charter: Some(&charter),
            members,
            joining: false,
            retired,
        };
        refusal(&known, hello).unwrap_or_default()
    }

    #[test]
    fn each_refusal_says_what_to_do() {
        let (known, none) = (members(), BTreeMap::new());
        assert_eq!(ask(&hello(3, "c3"), &known), "");
        assert_eq!(ask(&hello(2, "c2"), &known), "");
        assert!(ask(&hello(9, "c2"), &known).contains("mainstay member replace c2"));
        assert!(ask(&hello(9, "c2"), &none).contains("mainstay member replace c2"));
        assert!(ask(&hello(9, "c1"), &known).contains("--name"));
        assert!(ask(&hello(1, "c3"), &known).contains("copied"));
        let other = Hello {
            list: list(&["c1", "c3"]),
            ..hello(3, "c3")
        };
        assert!(ask(&other, &known).contains("same list"));
        // Lists may change later: they bind those who found or join, nobody else.
        let voter = Hello {
            joined: true,
            cluster_id: Some("x".into()),
            ..hello(2, "c2")
        };
        assert_eq!(
            ask(
                &Hello {
                    list: list(&["c2"]),
                    ..voter.clone()
                },
                &known
            ),
            ""
        );
        assert!(
            ask(
                &Hello {
                    member_id: 3,
                    member: member("c3"),
                    ..voter
                },
                &known
            )
            .contains("removed")
        );
        let foreign = Hello {
            cluster_id: Some("y".into()),
            joined: true,
            ..hello(3, "c3")
        };
        assert!(ask(&foreign, &known).contains("data directory"));
    }

    #[test]
    fn a_list_binds_nobody_who_joins_by_address() {
        let known = members();
        let joiner = Hello {
            joining: true,
            list: list(&["c4"]),
            ..hello(4, "c4")
        };
        assert_eq!(ask(&joiner, &known), "");
        let again = Hello {
            member: member("c2"),
            ..joiner.clone()
        };
        assert!(ask(&again, &known).contains("mainstay member replace c2"));
        let lost = Hello {
            cluster_id: Some("y".into()),
            ..joiner
        };
        assert!(ask(&lost, &known).contains("--join"));
    }

    #[test]
    fn a_removed_identity_stays_out_even_if_it_never_voted() {
        let mut known = members();
        let gone = Hello {
            cluster_id: Some("x".into()),
            joining: true,
            ..hello(3, "c3")
        };
        assert!(asked(&gone, &known, true).contains("was removed"));
        assert_eq!(ask(&gone, &known), "");
        // Its removal is recorded, but the group has not let it go yet: it is needed until then.
        let status = known[&2].clone();
        known.insert(3, status);
        assert!(!asked(&gone, &known, true).contains("was removed"));
    }

    #[test]
    fn addresses_that_others_cannot_use_are_refused() {
        let mut known = members();
        let at = |url: &str| Hello {
            joining: true,
            member: Member {
                peer_url: url.into(),
                ..member("c4")
            },
            ..hello(4, "c4")
        };
        let place = |known: &mut BTreeMap<u64, MemberStatus>, url: &str| {
            for status in known.values_mut() {
                status.member.peer_url = url.into();
            }
        };
        place(&mut known, "http://127.0.0.1:8091");
        assert_eq!(ask(&at("http://127.0.0.1:8092"), &known), "");
        let said = ask(&at("http://10.0.0.4:8091"), &known);
        assert!(
            said.contains("start c1 again with --advertise-host"),
            "{said}"
        );
        place(&mut known, "http://10.0.0.1:8091");
        let said = ask(&at("http://[::1]:8091"), &known);
        assert!(said.contains("start c4 with --advertise-host"), "{said}");
        assert_eq!(ask(&at("http://10.0.0.4:8091"), &known), "");
        // Who is in already is not asked again.
        assert_eq!(
            ask(
                &Hello {
                    member_id: 2,
                    member: member("c2"),
                    ..at("")
                },
                &known
            ),
            ""
        );
    }
}
