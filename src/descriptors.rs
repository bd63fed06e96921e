//! How many files this process may have open, and what that leaves for connections. Knows no port.

use anyhow::bail;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// With fewer, a handful of agents and clients would keep the stores from opening their files.
const FILES_MIN: u64 = 1024;
/// For the log, the database, chunks, links to members and requests to them.
const FILES_OWN: u64 = 512;
/// Most connections of the peer port and of the registry port, and the part of what is left that each may have.
const PEERS_MAX: u64 = 1024;
const REGISTRY_MAX: u64 = 8192;
const PART: u64 = 4;
/// More wait in the kernel's queue. A node keeps two open to its home, clients of a large fleet theirs.
const API_MAX: u64 = 32_768;

/// How many connections each port may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    /// Clients and nodes.
    pub api: usize,
    /// Images.
    pub registry: usize,
    /// Members.
    pub peers: usize,
}

/// Take all the open files the system gives; how many connections each port may have then.
pub fn connections() -> anyhow::Result<Connections> {
    share(raise())
}

/// Raise the soft limit to the hard one; the limit from now on.
fn raise() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let files = match setrlimit(Resource::Nofile, wanted) {
        Ok(()) => limit.maximum,
        Err(e) => {
            tracing::warn!(error = %e, "cannot raise the limit of open files");
            limit.current
        }
    };
    files.unwrap_or(u64::MAX)
}

fn share(files: u64) -> anyhow::Result<Connections> {
    if files < FILES_MIN {
        bail!(
            "this process may open only {files} files, it needs {FILES_MIN} at least: raise the hard \
             limit (`ulimit -Hn`, or LimitNOFILE= in the service), 65536 is a good one"
        );
    }
    let all = files - FILES_OWN;
    let peers = PEERS_MAX.min(all / PART);
    let registry = REGISTRY_MAX.min(all / PART);
    let api = API_MAX.min(all - peers - registry);
    let number = |n: u64| usize::try_from(n).expect("at most one of the bounds");
    Ok(Connections {
        api: number(api),
        registry: number(registry),
        peers: number(peers),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_files_for_the_rest() {
        for (files, api, registry, peers) in [
            (1024, 256, 128, 128),
            (4096, 1792, 896, 896),
            // Ten thousand nodes, of which each keeps two, while one of three members is down.
            (20_000, 13_592, 4872, 1024),
            (65_536, 32_768, 8192, 1024),
            (u64::MAX, 32_768, 8192, 1024),
        ] {
            let each = Connections {
                api,
                registry,
                peers,
            };
            assert_eq!(share(files).unwrap(), each, "{files} files");
            assert!((api + registry + peers) as u64 + FILES_OWN <= files);
        }
        let refused = share(1023).unwrap_err().to_string();
        assert!(refused.contains("only 1023 files"), "{refused}");
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let files = raise();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
        assert_eq!(limit.current.unwrap_or(u64::MAX), files);
    }
}
