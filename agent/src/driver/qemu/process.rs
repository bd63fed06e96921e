//! QEMU processes: which one runs a VM, and how to end it. A process is trusted to be a VM's only if
//! its command line names that VM's pid file: numbers are reused.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

/// The VM's living process.
pub(super) fn find(pidfile: &Path) -> Option<Pid> {
    find_as(pidfile, pidfile)
}

/// The same where the pid file has moved since the process was started with `named`.
pub(super) fn find_as(pidfile: &Path, named: &Path) -> Option<Pid> {
    let text = std::fs::read_to_string(pidfile).ok()?;
    let pid = Pid::from_raw(text.trim().parse().ok()?)?;
    is_ours(pid, named).then_some(pid)
}

fn is_ours(pid: Pid, pidfile: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    // Empty for a process that has ended and not been reaped.
    let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
    let wanted = pidfile.as_os_str().as_bytes();
    line.is_ok_and(|line| line.split(|byte| *byte == 0).any(|arg| arg == wanted))
}

/// Kill it for certain; `false` if it lives on regardless.
pub(super) async fn kill(pid: Pid, pidfile: &Path) -> bool {
    // The descriptor names the process, whatever becomes of its number after the check.
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
        return !is_ours(pid, pidfile);
    };
    if is_ours(pid, pidfile) {
        tracing::info!(pid = pid.as_raw_nonzero(), "killing qemu");
        if pidfd_send_signal(&handle, Signal::KILL).is_err() {
            return !is_ours(pid, pidfile);
        }
    }
    gone(pid, pidfile, Duration::from_secs(10)).await
}

/// Wait for its end; `false` if that takes too long.
pub(super) async fn gone(pid: Pid, pidfile: &Path, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    while is_ours(pid, pidfile) {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_process_that_names_the_file_is_ours() {
        let dir = tempfile::tempdir().unwrap();
        let pidfile = dir.path().join("pid");
        assert!(find(&pidfile).is_none());
        std::fs::write(&pidfile, std::process::id().to_string()).unwrap();
        assert!(
            find(&pidfile).is_none(),
            "this test's process must never be killed"
        );
        let mut child = std::process::Command::new("tail")
            .args(["-f", "/dev/null"])
            .arg(&pidfile)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::fs::write(&pidfile, format!("{}\n", child.id())).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let pid = loop {
            // Between fork and exec the child still has our command line.
            match find(&pidfile) {
                Some(pid) => break pid,
                None => assert!(Instant::now() < deadline),
            }
            tokio::task::yield_now().await;
        };
        assert!(!gone(pid, &pidfile, Duration::from_millis(1)).await);
        assert!(kill(pid, &pidfile).await);
        assert!(find(&pidfile).is_none());
        child.wait().unwrap();
    }
}
