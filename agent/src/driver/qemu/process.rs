//! QEMU processes: which one runs a VM, and how to end it. A process is trusted to be a VM's only if
//! its command line names that VM's pid file: numbers are reused. Where the system cannot say, that is
//! an error and never "no process".

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

/// The VM's living process.
pub(super) fn find(pidfile: &Path) -> io::Result<Option<Pid>> {
    find_as(pidfile, pidfile)
}

/// The same where the pid file has moved since the process was started with `named`.
pub(super) fn find_as(pidfile: &Path, named: &Path) -> io::Result<Option<Pid>> {
    let text = match std::fs::read(pidfile) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    // No number: QEMU is just writing it, or a crash of the machine left nonsense.
    let number = std::str::from_utf8(&text).ok();
    let number = number.and_then(|text| text.trim().parse().ok());
    match number.and_then(Pid::from_raw) {
        Some(pid) => Ok(is_ours(pid, named)?.then_some(pid)),
        None => Ok(None),
    }
}

fn is_ours(pid: Pid, pidfile: &Path) -> io::Result<bool> {
    use std::os::unix::ffi::OsStrExt as _;
    let wanted = pidfile.as_os_str().as_bytes();
    match std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())) {
        // Empty for a process that has ended and not been reaped.
        Ok(line) => Ok(line.split(|byte| *byte == 0).any(|arg| arg == wanted)),
        Err(e) if ended(&e) => Ok(false),
        // Another user's, where /proc hides those: the number was reused.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(false),
        Err(e) => Err(e),
    }
}

/// There is no process of that number any more.
fn ended(e: &io::Error) -> bool {
    e.kind() == ErrorKind::NotFound
        || e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// Kill it for certain; `false` if it lives on regardless, or may do so.
pub(super) async fn kill(pid: Pid, pidfile: &Path) -> bool {
    // The descriptor names the process, whatever becomes of its number after the check.
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
        return is_ours(pid, pidfile).is_ok_and(|ours| !ours);
    };
    // Unsure: not signalled, and below not gone.
    if is_ours(pid, pidfile).unwrap_or(false) {
        tracing::info!(pid = pid.as_raw_nonzero(), "killing qemu");
        if pidfd_send_signal(&handle, Signal::KILL).is_err() {
            return is_ours(pid, pidfile).is_ok_and(|ours| !ours);
        }
    }
    gone(pid, pidfile, Duration::from_secs(10)).await
}

/// Wait for its end; `false` if that takes too long.
pub(super) async fn gone(pid: Pid, pidfile: &Path, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    while is_ours(pid, pidfile).unwrap_or(true) {
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
        assert!(find(&pidfile).unwrap().is_none());
        std::fs::write(&pidfile, std::process::id().to_string()).unwrap();
        assert!(
            find(&pidfile).unwrap().is_none(),
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
            match find(&pidfile).unwrap() {
                Some(pid) => break pid,
                None => assert!(Instant::now() < deadline),
            }
            tokio::task::yield_now().await;
        };
        assert!(!gone(pid, &pidfile, Duration::from_millis(1)).await);
        assert!(kill(pid, &pidfile).await);
        assert!(find(&pidfile).unwrap().is_none());
        child.wait().unwrap();
    }

    #[test]
    fn what_cannot_be_read_is_not_taken_for_no_process() {
        let dir = tempfile::tempdir().unwrap();
        let pidfile = dir.path().join("pid");
        std::fs::write(&pidfile, "no number").unwrap();
        assert!(find(&pidfile).unwrap().is_none());
        std::fs::remove_file(&pidfile).unwrap();
        // Readable for nobody, not even for root.
        std::fs::create_dir(&pidfile).unwrap();
        assert!(find(&pidfile).is_err());
    }
}
