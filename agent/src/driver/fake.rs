//! VMs that exist only in memory (and, if asked, in one file, so that a restarted agent can adopt
//! them). For tests and for rehearsing scale: every delay is configurable, every verb can be made to
//! fail, a VM can be made to die. It runs nothing: a script is read, not executed.
//!
//! Scripts understand one command per line: `echo WORDS`, `echo WORDS >&2`, `sleep SECONDS`,
//! `exit CODE`. Other lines do nothing. Programs are such lines, and `cat`. All that one can be connected to says
//! back what it is told.

use super::{
    CONSOLE_KEPT, Driver, DriverError, Exec, ExecError, Executed, Plug, Saved, Suspended, VmSeen,
    VmSpec, check_id, kept_output, now_ms,
};
use crate::tunnel::held::AnyStream;
use crate::wire::{PortRule, Script, ScriptResult, VmFacts};
use async_trait::async_trait;
use base64::Engine as _;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How the fake behaves.
#[derive(Clone, Debug)]
pub struct FakeConfig {
    /// What `start` takes until the VM is there.
    pub start_delay: Duration,
    /// From then on until `start` says so.
    pub answer_delay: Duration,
    /// From the start to the guest's first answer.
    pub boot_delay: Duration,
    /// What `stop` and `delete` take.
    pub stop_delay: Duration,
    /// `start` refuses as busy above this many VMs.
    pub capacity: usize,
    /// Remember VMs here across restarts.
    pub file: Option<PathBuf>,
}

impl Default for FakeConfig {
    fn default() -> FakeConfig {
        FakeConfig {
            start_delay: Duration::from_millis(20),
            answer_delay: Duration::ZERO,
            boot_delay: Duration::from_millis(100),
            stop_delay: Duration::from_millis(20),
            capacity: usize::MAX,
            file: None,
        }
    }
}

/// What is under way in a connection.
const ECHO_BYTES: usize = 16 << 10;

/// A verb that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// [`Driver::list`].
    List,
    /// [`Driver::start`].
    Start,
    /// [`Driver::ready`].
    Ready,
    /// [`Driver::run_script`].
    Script,
    /// [`Driver::restart`].
    Restart,
    /// [`Driver::suspend`].
    Suspend,
    /// [`Driver::stop`].
    Stop,
    /// [`Driver::export`].
    Export,
    /// [`Driver::delete`].
    Delete,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct FakeVm {
    generation: u64,
    facts: VmFacts,
    message: String,
}

struct Inner {
    vms: BTreeMap<String, FakeVm>,
    faults: VecDeque<(Verb, DriverError)>,
}

/// The driver.
pub struct FakeDriver {
    config: FakeConfig,
    inner: Mutex<Inner>,
}

impl FakeDriver {
    /// With the VMs of its file, if it has one.
    pub fn open(config: FakeConfig) -> std::io::Result<FakeDriver> {
        let vms = match config.file.as_deref().map(std::fs::read) {
            Some(Ok(bytes)) => serde_json::from_slice(&bytes)?,
            Some(Err(e)) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => BTreeMap::new(),
        };
        let inner = Inner {
            vms,
            faults: VecDeque::new(),
        };
        Ok(FakeDriver {
            config,
            inner: Mutex::new(inner),
        })
    }

    /// The next call of `verb` fails with `error`; calls queue up.
    pub fn fail_next(&self, verb: Verb, error: DriverError) {
        self.inner.lock().faults.push_back((verb, error));
    }

    /// The VM's process dies.
    pub fn kill(&self, id: &str) -> Result<(), DriverError> {
        self.change(|vms| {
            if let Some(vm) = vms.get_mut(id) {
                vm.facts.status = "failed".into();
                vm.message = "the VM was killed".into();
            }
        })
    }

    fn fault(&self, verb: Verb) -> Result<(), DriverError> {
        let faults = &mut self.inner.lock().faults;
        match faults
            .iter()
            .position(|(v, _)| *v == verb)
            .and_then(|at| faults.remove(at))
        {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// Change the set and, if it has a file, write it before anyone can see the change.
    fn change<T>(
        &self,
        f: impl FnOnce(&mut BTreeMap<String, FakeVm>) -> T,
    ) -> Result<T, DriverError> {
        let mut inner = self.inner.lock();
        let Some(file) = &self.config.file else {
            return Ok(f(&mut inner.vms));
        };
        let mut next = inner.vms.clone();
        let out = f(&mut next);
        let write = || -> std::io::Result<()> {
            let new = file.with_extension("new");
            std::fs::write(&new, serde_json::to_vec(&next)?)?;
            std::fs::rename(&new, file)
        };
        write().map_err(|e| DriverError::Busy(format!("cannot keep {file:?}: {e}")))?;
        inner.vms = next;
        Ok(out)
    }

    fn get(&self, id: &str) -> Result<FakeVm, DriverError> {
        let inner = self.inner.lock();
        let vm = inner.vms.get(id).cloned();
        vm.ok_or_else(|| DriverError::Failed(format!("there is no VM {id}")))
    }

    fn running(&self, id: &str) -> Result<FakeVm, DriverError> {
        let vm = self.get(id)?;
        if vm.facts.status == "running" {
            return Ok(vm);
        }
        Err(DriverError::Failed(format!(
            "the VM does not run: {}",
            vm.message
        )))
    }
}

/// Give every rule a port: its own, which must be free, or the first free one from 10000 up.
fn assign(
    rules: &[PortRule],
    vms: &BTreeMap<String, FakeVm>,
) -> Result<Vec<PortRule>, DriverError> {
    let running = vms.values().filter(|vm| vm.facts.status == "running");
    let mut used: BTreeSet<u16> = running
        .flat_map(|vm| vm.facts.port_forwarding.iter().map(|r| r.host_port))
        .collect();
    let mut out = Vec::new();
    for rule in rules {
        let mut rule = rule.clone();
        if rule.host_port == 0 {
            let free = (10_000..=u16::MAX).find(|port| !used.contains(port));
            rule.host_port = free.ok_or_else(|| DriverError::Busy("no free port".into()))?;
        }
        if !used.insert(rule.host_port) {
            return Err(DriverError::Busy(format!(
                "port {} is in use",
                rule.host_port
            )));
        }
        out.push(rule);
    }
    Ok(out)
}

/// The machine that a fake memory belongs to.
const MACHINE: &[u8] = br#"{"version":1,"driver":"fake"}"#;

/// What it runs on, and how it begins.
fn how(spec: &VmSpec) -> String {
    let machine = spec
        .saved
        .as_ref()
        .map(|saved| std::fs::read(&saved.machine));
    match machine {
        None => "fake".into(),
        Some(Ok(machine)) if machine == MACHINE => RESUMED.into(),
        Some(_) => "fake, booted cold: it was saved with another machine".into(),
    }
}
const RESUMED: &str = "fake, resumed";

fn facts_of(spec: &VmSpec, forwards: Vec<PortRule>) -> VmFacts {
    VmFacts {
        uuid: spec.id.clone(),
        name: spec.name.clone(),
        status: "running".into(),
        ip: String::new(),
        host_ip: spec.host_ip.clone(),
        cpu_cores: spec.vcpu,
        ram_mb: spec.ram_mb,
        port_forwarding: forwards,
        vnc_port: 0,
        created_ms: now_ms(),
        started_ms: now_ms(),
        accelerator: how(spec),
    }
}

#[async_trait]
impl Driver for FakeDriver {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn list(&self) -> Result<Vec<VmSeen>, DriverError> {
        self.fault(Verb::List)?;
        let inner = self.inner.lock();
        let seen = inner.vms.iter().map(|(id, vm)| VmSeen {
            id: id.clone(),
            generation: vm.generation,
            facts: vm.facts.clone(),
            message: vm.message.clone(),
        });
        Ok(seen.collect())
    }

    async fn start(&self, spec: &VmSpec) -> Result<VmFacts, DriverError> {
        check_id(&spec.id)?;
        self.fault(Verb::Start)?;
        sleep(self.config.start_delay).await;
        let made = self.change(|vms| {
            if let Some(vm) = vms.get(&spec.id) {
                return Ok(vm.facts.clone());
            }
            if vms.len() >= self.config.capacity {
                return Err(DriverError::Busy(format!("{} VMs are enough", vms.len())));
            }
            let facts = facts_of(spec, assign(&spec.forwards, vms)?);
            let vm = FakeVm {
                generation: spec.generation,
                facts: facts.clone(),
                message: String::new(),
            };
            vms.insert(spec.id.clone(), vm);
            Ok(facts)
        })?;
        sleep(self.config.answer_delay).await;
        made
    }

    async fn ready(&self, id: &str, need_network: bool) -> Result<VmFacts, DriverError> {
        self.fault(Verb::Ready)?;
        let vm = self.running(id)?;
        let up = Duration::from_millis(now_ms().saturating_sub(vm.facts.started_ms));
        if vm.facts.accelerator != RESUMED {
            sleep(self.config.boot_delay.saturating_sub(up)).await;
        }
        self.running(id)?;
        self.change(|vms| {
            let vm = vms
                .get_mut(id)
                .ok_or_else(|| DriverError::Failed("deleted".into()))?;
            if need_network && vm.facts.ip.is_empty() {
                vm.facts.ip = "10.0.2.15".into();
            }
            Ok(vm.facts.clone())
        })?
    }

    async fn run_script(
        &self,
        id: &str,
        script: &Script,
        keep: usize,
    ) -> Result<ScriptResult, DriverError> {
        self.fault(Verb::Script)?;
        let body = base64::engine::general_purpose::STANDARD.decode(&script.body);
        let body =
            body.map_err(|e| DriverError::Failed(format!("the script is not base64: {e}")))?;
        self.running(id)?;
        let deadline = Instant::now() + Duration::from_secs(script.timeout_s.max(1).into());
        let mut out = ScriptResult::default();
        for line in String::from_utf8_lossy(&body).lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["echo", rest @ .., ">&2"] => out.stderr += &(rest.join(" ") + "\n"),
                ["echo", rest @ ..] => out.stdout += &(rest.join(" ") + "\n"),
                ["exit", code] => {
                    out.return_code = code.parse().unwrap_or(2);
                    break;
                }
                ["sleep", seconds] => {
                    let end = Instant::now() + Duration::from_secs(seconds.parse().unwrap_or(0));
                    tokio::time::sleep_until(end.min(deadline)).await;
                    if end > deadline {
                        out.did_timeout = true;
                        out.return_code = -1;
                        break;
                    }
                }
                _ => {}
            }
        }
        out.stdout = kept_output(&out.stdout, keep).to_owned();
        out.stderr = kept_output(&out.stderr, keep).to_owned();
        self.running(id)?;
        Ok(out)
    }

    async fn exec(
        &self,
        id: &str,
        exec: &Exec,
        give_up: BoxFuture<'static, ()>,
    ) -> Result<Executed, ExecError> {
        let script = |line: &str| Script {
            body: base64::engine::general_purpose::STANDARD.encode(line),
            timeout_s: exec.within.map_or(u32::MAX, |t| {
                u32::try_from(t.as_secs()).unwrap_or(u32::MAX).max(1)
            }),
            ..Script::default()
        };
        let not_run = |e: DriverError| ExecError::NotRun(e.to_string());
        self.running(id).map_err(not_run)?;
        if exec.argv[0] == "cat" {
            let stdout = exec.input.clone();
            return Ok(Executed {
                stdout,
                ..Executed::default()
            });
        }
        let script = script(&exec.argv.join(" "));
        let run = self.run_script(id, &script, usize::MAX);
        let ended = tokio::select! {
            ended = run => ended.map_err(|e| ExecError::Unknown(e.to_string()))?,
            () = give_up => ScriptResult { return_code: 137, ..ScriptResult::default() },
        };
        Ok(Executed {
            code: ended.return_code,
            did_timeout: ended.did_timeout,
            truncated: false,
            stdout: ended.stdout.into_bytes(),
            stderr: ended.stderr.into_bytes(),
        })
    }

    async fn connect(&self, id: &str, _: Plug) -> Result<AnyStream, DriverError> {
        self.running(id)?;
        let (ours, theirs) = tokio::io::duplex(ECHO_BYTES);
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(theirs);
            tokio::io::copy(&mut from, &mut to).await.ok();
            tokio::io::AsyncWriteExt::shutdown(&mut to).await.ok();
        });
        Ok(Box::new(ours))
    }

    async fn console_log(
        &self,
        id: &str,
        from: Option<u64>,
    ) -> Result<(Vec<u8>, u64), DriverError> {
        let vm = self.get(id)?;
        let said = format!("console of {}\n", vm.facts.uuid).into_bytes();
        let at = u64::try_from(said.len()).unwrap_or(CONSOLE_KEPT);
        Ok((if from.is_some() { Vec::new() } else { said }, at))
    }

    async fn restart(&self, id: &str, generation: u64) -> Result<VmFacts, DriverError> {
        self.fault(Verb::Restart)?;
        let vm = self.get(id)?;
        if vm.generation == generation && vm.facts.status == "running" {
            return Ok(vm.facts);
        }
        self.stop(id).await?;
        sleep(self.config.start_delay).await;
        self.change(|vms| {
            let gone = || DriverError::Failed(format!("there is no VM {id}"));
            let vm = vms.get_mut(id).ok_or_else(gone)?;
            vm.generation = generation;
            vm.message.clear();
            vm.facts.status = "running".into();
            vm.facts.accelerator = "fake".into();
            vm.facts.ip.clear();
            // Later than the former start by any clock.
            vm.facts.started_ms = now_ms().max(vm.facts.started_ms + 1);
            Ok(vm.facts.clone())
        })?
    }

    async fn suspend(&self, id: &str, into: &Path) -> Result<Suspended, DriverError> {
        self.fault(Verb::Suspend)?;
        self.running(id)?;
        let failed = |e: std::io::Error| DriverError::Failed(format!("cannot suspend the VM: {e}"));
        let made = Suspended {
            disk: into.join("disk"),
            format: "raw".into(),
            saved: Saved {
                memory: into.join("memory"),
                machine: into.join("machine.json"),
                disk: String::new(),
            },
        };
        std::fs::write(&made.disk, b"a fake disk").map_err(failed)?;
        std::fs::write(&made.saved.memory, b"a fake memory").map_err(failed)?;
        std::fs::write(&made.saved.machine, MACHINE).map_err(failed)?;
        self.stop(id).await?;
        Ok(made)
    }

    async fn stop(&self, id: &str) -> Result<(), DriverError> {
        self.fault(Verb::Stop)?;
        sleep(self.config.stop_delay).await;
        self.change(|vms| {
            if let Some(vm) = vms.get_mut(id).filter(|vm| vm.facts.status == "running") {
                vm.facts.status = "stopped".into();
                vm.message = "the VM was stopped".into();
            }
        })
    }

    async fn export_bytes(&self, id: &str) -> Result<u64, DriverError> {
        self.get(id)?;
        Ok(1 << 10)
    }

    /// The disk of a VM that exists only in memory is a word about it.
    async fn export(&self, id: &str, dest: &Path) -> Result<String, DriverError> {
        self.fault(Verb::Export)?;
        let vm = self.get(id)?;
        if vm.facts.status == "running" {
            return Err(DriverError::Failed(format!("VM {id} runs")));
        }
        let disk = format!("disk of {}", vm.facts.uuid);
        let write = std::fs::write(dest, disk);
        write.map_err(|e| DriverError::Busy(format!("cannot write {}: {e}", dest.display())))?;
        Ok("raw".to_owned())
    }

    async fn delete(&self, id: &str) -> Result<(), DriverError> {
        self.fault(Verb::Delete)?;
        sleep(self.config.stop_delay).await;
        self.change(|vms| {
            vms.remove(id);
        })
    }
}
