//! What a VM is now, and how it is made, stopped and removed. Every step may be the last one of this
//! process: the next one reads the folder and goes on.

use super::super::{DriverError, VmSeen, VmSpec};
use super::dir::{Run, Spec};
use super::{QemuDriver, Vm, machine, process};
use crate::wire::VmFacts;
use rustix::process::Pid;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long QEMU may take to end itself.
const QUIT_MAX: Duration = Duration::from_secs(5);
/// A guest that does not listen yet has missed the request: ask again.
const ASK_EVERY: Duration = Duration::from_secs(5);

impl Vm {
    /// Its living process. Busy where the system cannot say: no verdict may be built on that.
    pub(super) fn process(&self) -> Result<Option<Pid>, DriverError> {
        process::find(&self.dir.pidfile()).map_err(|e| unsure(&self.dir.id, &e))
    }
}

fn unsure(id: &str, e: &std::io::Error) -> DriverError {
    DriverError::Busy(format!("cannot tell whether VM {id} runs: {e}"))
}

impl QemuDriver {
    pub(super) async fn start_locked(
        &self,
        vm: &Arc<Vm>,
        wanted: &VmSpec,
    ) -> Result<VmFacts, DriverError> {
        let spec = match vm.dir.spec()? {
            Some(spec) => {
                let run = vm.dir.run()?;
                let pid = vm.process()?;
                if let Some(seen) = self.look(vm, &spec, run, pid).await? {
                    return Ok(seen.facts);
                }
                if spec.memory.is_some() {
                    // Its guest may have come to life and written: then disk and memory differ.
                    self.renew_overlay(vm, &spec).await?;
                }
                spec
            }
            None => self.make(vm, wanted).await?,
        };
        let run = self.launch(vm, &spec).await?;
        Ok(facts(&spec, &run, "running"))
    }

    /// A process that ran for the former generation ends; whatever of this was done before is not done again.
    pub(super) async fn restart_locked(
        &self,
        vm: &Arc<Vm>,
        generation: u64,
    ) -> Result<VmFacts, DriverError> {
        let Some(mut spec) = vm.dir.spec()? else {
            return Err(DriverError::Failed(format!("there is no VM {}", vm.dir.id)));
        };
        let run = vm.dir.run()?;
        if spec.ran
            && spec.generation == generation
            && let Some(pid) = vm.process()?
            && let Some(seen) = self.look(vm, &spec, run.clone(), Some(pid)).await?
            && seen.facts.status == "running"
        {
            return Ok(seen.facts);
        }
        self.force(vm).await?;
        *vm.qmp.lock().await = None;
        *vm.qga.lock().await = None;
        spec.generation = generation;
        spec.ran = true;
        spec.memory = None;
        if let Some(run) = run {
            spec.cloned &= !run.renewed;
            spec.had = run.forwards;
        }
        vm.dir.set_again(&spec)?;
        let run = self.launch(vm, &spec).await?;
        Ok(facts(&spec, &run, "running"))
    }

    /// The folder, complete but for the process.
    async fn make(&self, vm: &Arc<Vm>, wanted: &VmSpec) -> Result<Spec, DriverError> {
        self.tools
            .check_base(&wanted.base, &wanted.base_format)
            .await?;
        let or = |value, default| if value == 0 { default } else { value };
        let pinned = match &wanted.saved {
            Some(saved) => Some(machine::read(&saved.machine).await),
            None => None,
        };
        let had = pinned.as_ref().and_then(|read| read.as_ref().ok());
        let vcpu = or(
            wanted.vcpu,
            had.map_or(self.config.vcpu_default, |m| m.vcpu),
        );
        let ram_mb = or(
            wanted.ram_mb,
            had.map_or(self.config.ram_mb_default, |m| m.ram_mb),
        );
        let mut spec = Spec::new(wanted, &self.tools.machine, vcpu, ram_mb);
        if let (Some(saved), Some(pinned)) = (&wanted.saved, pinned) {
            match pinned.and_then(|pinned| self.fitting(saved, &pinned, &spec)) {
                Ok(memory) => spec.memory = Some(memory),
                Err(why) => {
                    tracing::warn!(vm = %spec.id, why, "the saved memory cannot be used; booting cold");
                    spec.cold = why;
                }
            }
        }
        let making = vm.dir.begin()?;
        let overlay = making.join("overlay.qcow2");
        self.tools
            .overlay(&spec.base, &spec.base_format, &overlay)
            .await?;
        vm.dir.commit(&spec)?;
        Ok(spec)
    }

    /// A VM for [`super::Driver::list`]; `None` if it is no VM (any more).
    pub(super) async fn seen(&self, vm: &Arc<Vm>) -> Result<Option<VmSeen>, DriverError> {
        let Some(spec) = vm.dir.spec()? else {
            return Ok(None);
        };
        // In this order: a process that ends after the look at it leaves its last state to be seen.
        let pid = vm.process()?;
        let run = vm.dir.run()?;
        if run
            .as_ref()
            .is_none_or(|run| pid.is_none() && spec.awaits(run))
        {
            // Being started now, or its start was interrupted. In the latter case either QEMU came
            // to be and is adopted, or nothing ever ran here and nothing is lost.
            let Ok(_lock) = vm.lifecycle.try_lock() else {
                if spec.cloned && !spec.ran {
                    let run = Run::new(self.acceleration.label(), Vec::new());
                    return Ok(Some(seen(&spec, &run, "running", String::new())));
                }
                return Ok(spec.ran.then(|| self.between(&spec, "being restarted")));
            };
            let pid = vm.process()?;
            let seen = self.look(vm, &spec, vm.dir.run()?, pid).await?;
            if seen.is_none()
                && let Err(e) = self.remove(vm).await
            {
                return Ok(Some(unreadable(vm.dir.id.clone(), &e)));
            }
            return Ok(seen);
        }
        self.look(vm, &spec, run, pid).await
    }

    /// What is there; `None` if it has never run.
    async fn look(
        &self,
        vm: &Arc<Vm>,
        spec: &Spec,
        run: Option<Run>,
        pid: Option<Pid>,
    ) -> Result<Option<VmSeen>, DriverError> {
        let run = match (run, pid) {
            (Some(run), None) if spec.awaits(&run) => return Ok(None),
            (Some(run), _) => run,
            (None, Some(_)) => match self.started(vm, spec).await {
                Ok(run) => run,
                Err(e) => {
                    // It runs; what else there is to know is asked again the next time.
                    let run = Run::new(self.acceleration.label(), Vec::new());
                    return Ok(Some(seen(spec, &run, "running", e.to_string())));
                }
            },
            (None, None) if spec.ran => {
                return Ok(Some(self.between(spec, "its restart was interrupted")));
            }
            (None, None) => return Ok(None),
        };
        let (status, message) = match pid {
            // What becomes of it is decided by whoever waits for it to be ready.
            Some(_) if spec.awaits(&run) => ("running", String::new()),
            Some(_) => self.status_of_running(vm).await,
            None => self.status_of_ended(vm).await,
        };
        Ok(Some(seen(spec, &run, status, message)))
    }

    /// Ended for a restart, and not started again yet.
    fn between(&self, spec: &Spec, why: &str) -> VmSeen {
        let run = Run::new(self.acceleration.label(), Vec::new());
        seen(spec, &run, "stopped", why.to_owned())
    }

    async fn status_of_running(&self, vm: &Arc<Vm>) -> (&'static str, String) {
        let status = match self.qmp(vm).await {
            Ok(qmp) => qmp.status().await,
            Err(e) => Err(e),
        };
        match status.as_deref() {
            Ok("running" | "prelaunch" | "inmigrate" | "finish-migrate" | "restore-vm") => {
                ("running", String::new())
            }
            Ok("suspended") => ("suspended", "the guest sleeps".into()),
            Ok("shutdown") => ("stopped", "the guest shut down".into()),
            Ok("paused" | "postmigrate") => ("suspended", "the VM is paused".into()),
            // `internal-error` is how a guest dies inside KVM; QEMU goes on without it.
            Ok(other) => ("failed", format!("QEMU has stopped the VM: {other}")),
            Err(_) if matches!(vm.process(), Ok(None)) => self.status_of_ended(vm).await,
            // Busy is not dead: judging it is for whoever sees this for long.
            Err(e) => ("running", e.clone()),
        }
    }

    /// QEMU removes its pid file when it ends by itself, and only then.
    async fn status_of_ended(&self, vm: &Arc<Vm>) -> (&'static str, String) {
        let told = vm
            .qmp
            .lock()
            .await
            .as_ref()
            .and_then(|q| q.picture().borrow().shutdown.clone());
        match told.as_deref() {
            Some("guest-panic") => ("failed", "the guest's kernel panicked".into()),
            _ if vm.dir.pidfile().exists() => (
                "failed",
                "QEMU is gone: killed, crashed, or the node restarted".into(),
            ),
            Some("host-qmp-quit" | "host-signal") => ("stopped", "the VM was stopped".into()),
            _ => ("stopped", "the guest shut down".into()),
        }
    }

    /// Ask, then force.
    pub(super) async fn stop_locked(&self, vm: &Arc<Vm>) -> Result<(), DriverError> {
        let Some(pid) = vm.process()? else {
            return Ok(());
        };
        let deadline = Instant::now() + self.config.stop_max;
        while Instant::now() < deadline {
            self.ask_to_stop(vm).await;
            let left = deadline.saturating_duration_since(Instant::now());
            if process::gone(pid, &vm.dir.pidfile(), ASK_EVERY.min(left)).await {
                return Ok(());
            }
        }
        tracing::warn!(vm = %vm.dir.id, "the guest does not shut down; forcing it");
        self.force(vm).await
    }

    async fn ask_to_stop(&self, vm: &Arc<Vm>) {
        // Both: some guests listen to one only, and nobody minds being asked twice.
        if let Ok(qmp) = self.qmp(vm).await {
            if let Err(e) = qmp.call("system_powerdown", json!({})).await {
                tracing::debug!(vm = %vm.dir.id, error = %e, "powerdown");
            }
            if qmp.picture().borrow().guest_open {
                self.guest_shutdown(vm).await;
            }
        }
    }

    /// End QEMU, whatever the guest thinks of it.
    pub(super) async fn force(&self, vm: &Arc<Vm>) -> Result<(), DriverError> {
        let pidfile = vm.dir.pidfile();
        let Some(pid) = vm.process()? else {
            return Ok(());
        };
        if let Ok(qmp) = self.qmp(vm).await
            && qmp.call("quit", json!({})).await.is_ok()
            && process::gone(pid, &pidfile, QUIT_MAX).await
        {
            return Ok(());
        }
        if !process::kill(pid, &pidfile).await {
            return Err(DriverError::Busy(format!(
                "QEMU of VM {} cannot be killed",
                vm.dir.id
            )));
        }
        // Left behind, it would say that the VM failed.
        match std::fs::remove_file(&pidfile) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(DriverError::Busy(format!("{}: {e}", pidfile.display())))
            }
            _ => Ok(()),
        }
    }

    /// Remove all of it; also what is left of an interrupted making or removal.
    pub(super) async fn remove(&self, vm: &Arc<Vm>) -> Result<(), DriverError> {
        self.force(vm).await?;
        self.keep_console(vm);
        vm.dir.bury()?;
        // A QEMU whose start was interrupted may have written its pid file since: it can't any more.
        let late = process::find_as(&vm.dir.buried_pidfile(), &vm.dir.pidfile());
        if let Some(pid) = late.map_err(|e| unsure(&vm.dir.id, &e))?
            && !process::kill(pid, &vm.dir.pidfile()).await
        {
            return Err(DriverError::Busy(format!(
                "QEMU of VM {} cannot be killed",
                vm.dir.id
            )));
        }
        *vm.qmp.lock().await = None;
        *vm.qga.lock().await = None;
        vm.dir.clean()
    }
}

fn seen(spec: &Spec, run: &Run, status: &str, message: String) -> VmSeen {
    let facts = facts(spec, run, status);
    VmSeen {
        id: spec.id.clone(),
        generation: spec.generation,
        facts,
        message,
    }
}

/// A VM whose folder makes no sense: shown, so that it can be deleted and hides no other.
pub(super) fn unreadable(id: String, why: &DriverError) -> VmSeen {
    tracing::error!(vm = %id, error = %why, "the vm's folder cannot be read");
    let facts = VmFacts {
        status: "failed".into(),
        ..VmFacts::default()
    };
    VmSeen {
        id,
        generation: 0,
        facts,
        message: why.to_string(),
    }
}

pub(super) fn facts(spec: &Spec, run: &Run, status: &str) -> VmFacts {
    VmFacts {
        uuid: spec.uuid.clone(),
        name: spec.name.clone(),
        status: status.to_string(),
        ip: run.ip.clone(),
        host_ip: spec.host_ip.clone(),
        cpu_cores: spec.vcpu,
        ram_mb: spec.ram_mb,
        port_forwarding: run.forwards.clone(),
        vnc_port: 0,
        created_ms: spec.created_ms,
        started_ms: run.started_ms,
        accelerator: run.how(spec),
    }
}
