//! How many files this process may have open, and what that leaves for connections. Knows no port.

use anyhow::bail;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// With fewer, a handful of agents and clients would keep the stores from opening their files.
const FILES_MIN: u64 = 1024;
/// For the log, the database, chunks, links to members and requests to them.
const FILES_OWN: u64 = 512;
/// The ports that accept connections.
const PORTS: u64 = 3;
/// More connections wait in the kernel's queue. Clients of a large fleet keep theirs open.
const CONNECTIONS_MAX: u64 = 8192;

/// Take all the open files the system gives; how many connections each port may have then.
pub fn connections_per_port() -> anyhow::Result<usize> {
    connections(raise())
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

fn connections(files: u64) -> anyhow::Result<usize> {
    if files < FILES_MIN {
        bail!(
            "this process may open only {files} files, it needs {FILES_MIN} at least: raise the hard \
             limit (`ulimit -Hn`, or LimitNOFILE= in the service), 65536 is a good one"
        );
    }
    let each = CONNECTIONS_MAX.min((files - FILES_OWN) / PORTS);
    Ok(usize::try_from(each).expect("at most CONNECTIONS_MAX"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_files_for_the_rest() {
        for (files, each) in [(1024, 170), (4096, 1194), (65_536, 8192), (u64::MAX, 8192)] {
            assert_eq!(connections(files).unwrap(), each, "{files} files");
            assert!(each as u64 * PORTS + FILES_OWN <= files);
        }
        let refused = connections(1023).unwrap_err().to_string();
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
