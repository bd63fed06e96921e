//! Ways into a VM: programs in the guest, its console, its screen, its ports. Knows no tunnels.

use super::super::{CONSOLE_KEPT, DriverError, Exec, ExecError, Executed, Plug};
use super::guest::{bytes, code};
use super::qga::QgaError;
use super::{QemuDriver, Vm, args, qmp};
use crate::tunnel::held::{AnyStream, Held};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::BoxFuture;
use rustix::fs::FallocateFlags;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// Runs its arguments as a program in a session of its own, so that all of it can be killed.
const SESSION: &str = r#"command -v setsid >/dev/null 2>&1 && exec setsid "$0" "$@"
exec "$0" "$@""#;
/// Longest wait for a program that was killed to have ended.
const KILLED_MAX: Duration = Duration::from_secs(10);
/// QEMU itself takes connections to guests' ports: it does so at once.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Deleted VMs whose consoles are kept, the last ones.
const LOGS_MAX: usize = 100;
/// Disk space for what is not kept of a console is given back in such pieces.
const PUNCH: u64 = 1 << 20;

impl QemuDriver {
    pub(super) async fn exec_in(
        &self,
        vm: &Arc<Vm>,
        exec: &Exec,
        give_up: BoxFuture<'static, ()>,
    ) -> Result<Executed, ExecError> {
        let not_run = |e: DriverError| ExecError::NotRun(e.to_string());
        self.there(vm).map_err(not_run)?;
        // Without an agent in the guest, or with one that does not answer, nothing was asked for.
        let ping = self.ask(vm, "guest-ping", json!({})).await;
        ping.map_err(|e| ExecError::NotRun(e.to_string()))?;
        let mut words = vec!["-c", SESSION];
        words.extend(exec.argv.iter().map(String::as_str));
        let request = json!({ "path": "/bin/sh", "arg": words, "capture-output": true,
                              "input-data": STANDARD.encode(&exec.input) });
        let started = match self.ask(vm, "guest-exec", request).await {
            Ok(started) => started,
            Err(e @ QgaError::Refused(_)) => return Err(ExecError::NotRun(e.to_string())),
            Err(e @ QgaError::Lost(_)) => return Err(ExecError::Unknown(e.to_string())),
        };
        let unknown = |e: DriverError| ExecError::Unknown(e.to_string());
        let pid = started["pid"].as_u64().ok_or_else(|| {
            ExecError::Unknown("the guest agent does not say which process it started".to_owned())
        })?;
        // Far: nobody's patience, and no overflow.
        let far = Duration::from_secs(10 * 365 * 86_400);
        let deadline = Instant::now() + exec.within.unwrap_or(far).min(far);
        let ended = tokio::select! {
            ended = self.wait_exec(vm, pid, deadline) => ended.map_err(unknown)?,
            () = give_up => None,
        };
        if let Some(ended) = ended {
            return Ok(executed(&ended, false));
        }
        self.kill_exec(vm, pid).await.map_err(unknown)?;
        let deadline = Instant::now() + KILLED_MAX;
        let ended = self.wait_exec(vm, pid, deadline).await.map_err(unknown)?;
        Ok(executed(&ended.unwrap_or_default(), true))
    }

    pub(super) async fn plug_in(&self, vm: &Arc<Vm>, plug: Plug) -> Result<AnyStream, DriverError> {
        self.there(vm)?;
        let failed = |e: String| DriverError::Failed(e);
        match plug {
            Plug::Vnc => {
                let stream = qmp::connect(&vm.dir.path(), args::VNC_SOCKET).await;
                Ok(Box::new(stream.map_err(failed)?))
            }
            Plug::Console => {
                let Ok(alone) = Arc::clone(&vm.console).try_lock_owned() else {
                    let why = "somebody is at this console already: it takes one at a time";
                    return Err(failed(why.to_owned()));
                };
                if !vm.dir.file(args::CONSOLE_SOCKET).exists() {
                    let why = "an older agent started this VM: its console can be read, and taken after a restart of the instance";
                    return Err(failed(why.to_owned()));
                }
                let stream = qmp::connect(&vm.dir.path(), args::CONSOLE_SOCKET).await;
                Ok(Box::new(Held::new(stream.map_err(failed)?, alone)))
            }
            Plug::Tcp(0) => Err(failed("a guest has no port 0".to_owned())),
            Plug::Tcp(port) => Ok(Box::new(self.to_port(vm, port).await.map_err(failed)?)),
        }
    }

    /// Through the forward that is there, or one of our own that is open only for as long as it takes to connect.
    async fn to_port(&self, vm: &Arc<Vm>, port: u16) -> Result<TcpStream, String> {
        let run = vm.dir.run().map_err(|e| e.to_string())?;
        let rules = run.map(|run| run.forwards).unwrap_or_default();
        if let Some(rule) = rules.iter().find(|r| r.guest_port == port) {
            let host = match self.config.bind {
                any if any.is_unspecified() => Ipv4Addr::LOCALHOST,
                bind => bind,
            };
            return connect(host, rule.host_port).await;
        }
        // One at a time: each knows its forward among QEMU's by the guest's port.
        let _alone = vm.forwards.lock().await;
        let qmp = self.qmp(vm).await?;
        let network = args::NETWORK;
        let add = format!("hostfwd_add {network} tcp:127.0.0.1:0-:{port}");
        let said = qmp.human(&add).await?;
        if !said.trim().is_empty() {
            return Err(format!("QEMU refused: {}", said.trim()));
        }
        let table = qmp.human("info usernet").await?;
        let Some(host_port) = forwarded(&table, port) else {
            return Err(format!("QEMU does not forward to port {port}"));
        };
        let stream = connect(Ipv4Addr::LOCALHOST, host_port).await;
        // What is connected stays so. Left over, it is one more port on loopback until the VM ends.
        let remove = format!("hostfwd_remove {network} tcp:127.0.0.1:{host_port}");
        if let Err(why) = qmp.human(&remove).await {
            tracing::warn!(vm = %vm.dir.id, why, "a forward cannot be removed");
        }
        stream
    }

    /// There is such a VM, and it runs.
    fn there(&self, vm: &Vm) -> Result<(), DriverError> {
        if vm.dir.spec()?.is_none() {
            return Err(no_vm(&vm.dir.id));
        }
        match vm.process()? {
            Some(_) => Ok(()),
            None => Err(DriverError::Failed("the VM does not run".to_owned())),
        }
    }

    pub(super) fn console_of(
        &self,
        vm: &Vm,
        from: Option<u64>,
    ) -> Result<(Vec<u8>, u64), DriverError> {
        let ours = vm.dir.file(args::CONSOLE_LOG);
        let mut opened = File::open(&ours);
        if opened.is_err() && from.is_none() {
            opened = File::open(kept_log(&self.config.dir, &vm.dir.id));
        }
        let read = opened.and_then(|file| tail(file, from));
        read.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => no_vm(&vm.dir.id),
            _ => DriverError::Failed(format!("cannot read the console of {}: {e}", vm.dir.id)),
        })
    }

    /// Before a VM is deleted: why it failed may stand there, and nowhere else.
    pub(super) fn keep_console(&self, vm: &Vm) {
        let keep = || -> std::io::Result<()> {
            let (bytes, _) = tail(File::open(vm.dir.file(args::CONSOLE_LOG))?, None)?;
            if bytes.is_empty() {
                return Ok(());
            }
            let dest = kept_log(&self.config.dir, &vm.dir.id);
            let folder = self.config.dir.join(LOGS);
            std::fs::create_dir_all(&folder)?;
            std::fs::write(&dest, bytes)?;
            forget_oldest(&folder)
        };
        match keep() {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(vm = %vm.dir.id, error = %e, "its console is not kept");
            }
            _ => {}
        }
    }
}

fn no_vm(id: &str) -> DriverError {
    DriverError::Failed(format!("there is no VM of instance {id} on its node"))
}

async fn connect(host: Ipv4Addr, port: u16) -> Result<TcpStream, String> {
    let stream = timeout(CONNECT_MAX, TcpStream::connect((host, port)));
    let stream = stream.await.map_err(|_| "the port does not answer")?;
    let stream = stream.map_err(|e| format!("the port cannot be reached: {e}"))?;
    stream.set_nodelay(true).ok();
    Ok(stream)
}

/// The host port of our own forward to a guest's port.
fn forwarded(table: &str, port: u16) -> Option<u16> {
    // TCP[HOST_FORWARD]  FD  SOURCE  PORT  DEST  PORT  RECVQ  SENDQ
    let mut ours = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let guest: u16 = words.get(5)?.parse().ok()?;
        let fits = words[0] == "TCP[HOST_FORWARD]" && words[2] == "127.0.0.1" && guest == port;
        fits.then(|| words[3].parse().ok()).flatten()
    });
    ours.next_back()
}

fn executed(status: &Value, killed: bool) -> Executed {
    let cut = |name: &str| status[name] == true;
    Executed {
        code: code(status),
        did_timeout: killed,
        truncated: cut("out-truncated") || cut("err-truncated"),
        stdout: bytes(&status["out-data"]),
        stderr: bytes(&status["err-data"]),
    }
}

/// Folder of consoles of VMs that are gone.
const LOGS: &str = "consoles";

fn kept_log(state: &Path, id: &str) -> std::path::PathBuf {
    state.join(LOGS).join(format!("{id}.log"))
}

fn forget_oldest(folder: &Path) -> std::io::Result<()> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder)?.flatten() {
        all.push((entry.metadata()?.modified()?, entry.path()));
    }
    all.sort();
    let over = all.len().saturating_sub(LOGS_MAX);
    all.iter()
        .take(over)
        .try_for_each(|(_, path)| std::fs::remove_file(path))
}

/// From `from`, or the last bytes that are kept; and the place after them.
fn tail(mut file: File, from: Option<u64>) -> std::io::Result<(Vec<u8>, u64)> {
    let length = file.metadata()?.len();
    let oldest = length.saturating_sub(CONSOLE_KEPT);
    // A file that became shorter was begun anew.
    let from = from
        .filter(|from| *from <= length)
        .unwrap_or(oldest)
        .max(oldest);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(CONSOLE_KEPT).read_to_end(&mut bytes)?;
    let next = from + u64::try_from(bytes.len()).unwrap_or(0);
    Ok((bytes, next))
}

/// Gives back the room of what a console said long ago: a guest that talks without end must not fill the node's disk.
/// The file keeps its length, so that nobody who writes to it or reads it needs to know.
pub(super) fn trim(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let facts = std::fs::metadata(path)?;
    let old = facts.len().saturating_sub(CONSOLE_KEPT) / PUNCH * PUNCH;
    if old == 0 || facts.blocks() * 512 <= CONSOLE_KEPT + 2 * PUNCH {
        return Ok(());
    }
    let file = File::options().write(true).open(path)?;
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, how, 0, old)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn of_a_console_the_end_is_kept_and_places_stay() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(&path)
            .unwrap();
        let line = [b'x'; 1023];
        let kept = usize::try_from(CONSOLE_KEPT).unwrap();
        for n in 0..8 << 10 {
            file.write_all(&line).unwrap();
            writeln!(file).unwrap();
            if n % 512 == 0 {
                trim(&path).unwrap();
            }
        }
        file.write_all(b"last words").unwrap();
        file.sync_all().unwrap();
        trim(&path).unwrap();
        let facts = std::fs::metadata(&path).unwrap();
        assert_eq!(facts.len(), (8 << 20) + 10);
        assert!(facts.blocks() * 512 < 4 << 20, "{} blocks", facts.blocks());
        let open = || File::open(&path).unwrap();
        let (bytes, at) = tail(open(), None).unwrap();
        assert_eq!((bytes.len(), at), (kept, facts.len()));
        assert!(bytes.ends_with(b"\nlast words") && !bytes.contains(&0));
        assert_eq!(tail(open(), Some(at - 5)).unwrap(), (b"words".to_vec(), at));
        assert_eq!(tail(open(), Some(at)).unwrap(), (Vec::new(), at));
        // What is not kept is left out; a place behind the end is one of another file.
        assert_eq!(tail(open(), Some(7)).unwrap().0.len(), kept);
        assert_eq!(tail(open(), Some(at + 1)).unwrap().0.len(), kept);
    }

    #[test]
    fn the_oldest_consoles_go() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..LOGS_MAX + 3 {
            let path = dir.path().join(format!("{n}.log"));
            let at = std::time::UNIX_EPOCH + Duration::from_secs(1_000 + n as u64);
            File::create(path).unwrap().set_modified(at).unwrap();
        }
        forget_oldest(dir.path()).unwrap();
        assert!(!dir.path().join("2.log").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), LOGS_MAX);
    }

    #[test]
    fn our_own_forward_is_known_among_others() {
        let text = "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\n  \
            TCP[ESTABLISHED]   19       127.0.0.1 40001       10.0.2.15    22     0     0\n  \
            TCP[HOST_FORWARD]  15               * 40002       10.0.2.15    22     0     0\n  \
            TCP[HOST_FORWARD]  13       127.0.0.1  8080       10.0.2.15    80     0     0\n  \
            TCP[HOST_FORWARD]  14       127.0.0.1 41234       10.0.2.15    22     0     0\n";
        assert_eq!(forwarded(text, 22), Some(41234));
        assert_eq!(forwarded(text, 80), Some(8080));
        assert_eq!(forwarded(text, 443), None);
    }
}
