//! Real VMs: one QEMU process each, in a session of its own, so that it outlives the agent. All that
//! is known of a VM lies in its folder; this driver can be dropped and opened again at any time.
//! A service manager must leave QEMU alone when it stops the agent (systemd: `KillMode=process`).
//! Linux only. Knows nothing of templates: it is handed a base disk and promises not to write to it.
//!
//! | folder | holds |
//! | --- | --- |
//! | `vms/ID/` | a VM: its specification, overlay, sockets, console |
//! | `vms/.ID.new/` | one in the making; an interrupted one is deleted by the next `list` |
//! | `vms/.ID.gone/` | one being deleted; likewise |
//! | `consoles/` | what the consoles of the last deleted VMs said |
//!
//! * [`accel`]: is KVM any good here?
//! * `tools`: the installed QEMU; base disks and overlays. `args`: its command line. `launch`: its start.
//! * `export`: its disk as one that stands by itself. `dir`: the folder. `process`: is it alive, end it.
//! * `access`: programs in the guest, console, screen, ports.
//! * `qmp`: talks to QEMU. `qga`: talks to the guest. `guest`: what we want of the guest.
//! * `suspend`: memories written and brought to life again. `machine`: what one belongs to. `renew`: a clone's
//!   own identity.

pub mod accel;
mod access;
mod args;
mod dir;
mod export;
mod guest;
mod launch;
mod lifecycle;
mod machine;
mod process;
mod qga;
mod qmp;
mod renew;
mod suspend;
mod tools;

use super::{
    Driver, DriverError, Exec, ExecError, Executed, Plug, Suspended, VmSeen, VmSpec, check_id,
};
use crate::tunnel::held::AnyStream;
use crate::wire::{Script, ScriptResult, VmFacts};
use accel::{Accel, Acceleration};
use async_trait::async_trait;
use dir::VmDir;
use futures::future::BoxFuture;
use futures::{StreamExt as _, TryStreamExt as _};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How the driver behaves.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// Where VMs live; made if missing. One driver process per folder.
    pub dir: PathBuf,
    /// Which acceleration.
    pub accel: Accel,
    /// The QEMU program, instead of `qemu-system-x86_64` on the path.
    pub binary: Option<PathBuf>,
    /// Address that forwarded ports listen on; unspecified = all.
    pub bind: Ipv4Addr,
    /// Choose host ports from here (inclusive); otherwise the kernel chooses.
    pub ports: Option<(u16, u16)>,
    /// Longest wait for a guest to answer.
    pub ready_max: Duration,
    /// How long a guest may take to shut down when asked.
    pub stop_max: Duration,
    /// Virtual CPUs where the specification says 0.
    pub vcpu_default: u32,
    /// Memory (MB) where the specification says 0.
    pub ram_mb_default: u32,
}

impl QemuConfig {
    /// Defaults, with VMs in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> QemuConfig {
        QemuConfig {
            dir: dir.into(),
            accel: Accel::Auto,
            binary: None,
            bind: Ipv4Addr::UNSPECIFIED,
            ports: None,
            ready_max: Duration::from_secs(180),
            stop_max: Duration::from_secs(30),
            vcpu_default: 1,
            ram_mb_default: 512,
        }
    }
}

/// VMs listed at once: each costs a round trip to its QEMU.
const LIST_PARALLEL: usize = 32;

/// The driver.
pub struct QemuDriver {
    config: QemuConfig,
    tools: tools::Tools,
    acceleration: Acceleration,
    vms: Mutex<HashMap<String, Arc<Vm>>>,
    /// Saved memories that are what they should be.
    checked: machine::Checked,
}

/// What this process holds of one VM: only connections and their locks, all of which can be made again.
struct Vm {
    dir: VmDir,
    /// Held by whoever makes, restarts, stops or removes it.
    lifecycle: tokio::sync::Mutex<()>,
    qmp: tokio::sync::Mutex<Option<Arc<qmp::Qmp>>>,
    qga: tokio::sync::Mutex<Option<qga::Qga>>,
    /// Held by whoever is at its console.
    console: Arc<tokio::sync::Mutex<()>>,
    /// Held while a forward is made.
    forwards: tokio::sync::Mutex<()>,
}

impl QemuDriver {
    /// Find QEMU, find out what it can do here, and take over the VMs in the folder.
    pub async fn open(mut config: QemuConfig) -> Result<QemuDriver, DriverError> {
        let busy =
            |e: std::io::Error| DriverError::Busy(format!("cannot use {:?}: {e}", config.dir));
        std::fs::create_dir_all(config.dir.join("vms")).map_err(busy)?;
        // Processes are recognised by their paths: one spelling for each.
        let dir = config.dir.canonicalize().map_err(busy)?;
        config.dir = dir;
        let tools = tools::Tools::find(config.binary.as_deref()).await?;
        let acceleration = accel::choose(config.accel, &tools).await?;
        tracing::info!(qemu = %tools.version, machine = %tools.machine,
            accelerator = %acceleration.label(), "qemu driver is ready");
        Ok(QemuDriver {
            config,
            tools,
            acceleration,
            vms: Mutex::default(),
            checked: machine::Checked::default(),
        })
    }

    /// `kvm`, or `tcg` and why.
    pub fn accelerator(&self) -> String {
        self.acceleration.label()
    }

    fn vm(&self, id: &str) -> Result<Arc<Vm>, DriverError> {
        check_id(id)?;
        let mut vms = self.vms.lock();
        let vm = vms.entry(id.to_string()).or_insert_with(|| {
            Arc::new(Vm {
                dir: VmDir::new(&self.config.dir, id),
                lifecycle: tokio::sync::Mutex::default(),
                qmp: tokio::sync::Mutex::default(),
                qga: tokio::sync::Mutex::default(),
                console: Arc::default(),
                forwards: tokio::sync::Mutex::default(),
            })
        });
        Ok(vm.clone())
    }

    /// Remove what an interrupted making or removal left.
    async fn sweep(&self, id: &str) -> Result<(), DriverError> {
        let vm = self.vm(id)?;
        // Locked: someone is at work on it, and it is no leftover. Whole: it was made since the look
        // at the folder.
        if let Ok(_lock) = vm.lifecycle.try_lock()
            && !vm.dir.exists()
            && let Err(e) = self.remove(&vm).await
        {
            tracing::warn!(vm = %id, error = %e, "a leftover cannot be removed");
        }
        Ok(())
    }

    async fn listed(&self, id: String) -> Result<Option<VmSeen>, DriverError> {
        let vm = self.vm(&id)?;
        if let Err(e) = access::trim(&vm.dir.file(args::CONSOLE_LOG))
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::debug!(vm = %id, error = %e, "its console cannot be cut");
        }
        match self.seen(&vm).await {
            Err(e) if vm.dir.garbled() => Ok(Some(lifecycle::unreadable(id, &e))),
            seen => seen,
        }
    }

    /// Whoever asks for a VM that is not there leaves nothing behind.
    fn let_go(&self, vm: &Arc<Vm>) {
        if !vm.dir.exists() {
            self.forget(&vm.dir.id);
        }
    }

    /// Drop the connections of a VM that is gone, unless someone is at work on it.
    fn forget(&self, id: &str) {
        let mut vms = self.vms.lock();
        // Ours in the map and the caller's own.
        if vms.get(id).is_some_and(|vm| Arc::strong_count(vm) <= 2) {
            vms.remove(id);
        }
    }
}

#[async_trait]
impl Driver for QemuDriver {
    fn name(&self) -> &'static str {
        "qemu"
    }

    async fn list(&self) -> Result<Vec<VmSeen>, DriverError> {
        let found = dir::scan(&self.config.dir)?;
        for id in &found.leftovers {
            self.sweep(id).await?;
        }
        // The first that cannot be looked at ends it: no verdict is better than a wrong one.
        let mut seen: Vec<VmSeen> = futures::stream::iter(found.ids)
            .map(|id| self.listed(id))
            .buffer_unordered(LIST_PARALLEL)
            .try_filter_map(async |seen| Ok(seen))
            .try_collect()
            .await?;
        seen.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(seen)
    }

    async fn start(&self, spec: &VmSpec) -> Result<VmFacts, DriverError> {
        let vm = self.vm(&spec.id)?;
        let _lock = vm.lifecycle.lock().await;
        self.start_locked(&vm, spec).await
    }

    async fn ready(&self, id: &str, need_network: bool) -> Result<VmFacts, DriverError> {
        let vm = self.vm(id)?;
        // Has its own bounds; a boot that comes of it shall have all the time of a boot.
        let fresh = self.settle(&vm).await?;
        let wait = self.wait_ready(&vm, fresh, need_network);
        match tokio::time::timeout(self.config.ready_max, wait).await {
            Ok(done) => done,
            Err(_) => Err(DriverError::Failed(format!(
                "the guest did not answer within {} s; its console says: {}",
                self.config.ready_max.as_secs(),
                vm.dir.console_tail()
            ))),
        }
    }

    async fn run_script(
        &self,
        id: &str,
        script: &Script,
        keep: usize,
    ) -> Result<ScriptResult, DriverError> {
        let vm = self.vm(id)?;
        self.script(&vm, script, keep).await
    }

    async fn exec(
        &self,
        id: &str,
        exec: &Exec,
        give_up: BoxFuture<'static, ()>,
    ) -> Result<Executed, ExecError> {
        let vm = self.vm(id).map_err(|e| ExecError::NotRun(e.to_string()))?;
        let done = self.exec_in(&vm, exec, give_up).await;
        self.let_go(&vm);
        done
    }

    async fn connect(&self, id: &str, plug: Plug) -> Result<AnyStream, DriverError> {
        let vm = self.vm(id)?;
        let done = self.plug_in(&vm, plug).await;
        self.let_go(&vm);
        done
    }

    async fn console_log(
        &self,
        id: &str,
        from: Option<u64>,
    ) -> Result<(Vec<u8>, u64), DriverError> {
        let vm = self.vm(id)?;
        let done = self.console_of(&vm, from);
        self.let_go(&vm);
        done
    }

    async fn restart(&self, id: &str, generation: u64) -> Result<VmFacts, DriverError> {
        let vm = self.vm(id)?;
        let _lock = vm.lifecycle.lock().await;
        self.restart_locked(&vm, generation).await
    }

    async fn suspend(&self, id: &str, into: &Path) -> Result<Suspended, DriverError> {
        let vm = self.vm(id)?;
        let lock = vm.lifecycle.lock().await;
        let done = self.suspend_locked(&vm, into).await;
        drop(lock);
        if !vm.dir.exists() {
            self.forget(id);
        }
        done
    }

    async fn stop(&self, id: &str) -> Result<(), DriverError> {
        let vm = self.vm(id)?;
        let lock = vm.lifecycle.lock().await;
        let done = self.stop_locked(&vm).await;
        drop(lock);
        if !vm.dir.exists() {
            self.forget(id);
        }
        done
    }

    async fn export_bytes(&self, id: &str) -> Result<u64, DriverError> {
        export::bytes(&self.vm(id)?.dir)
    }

    async fn export(&self, id: &str, dest: &Path) -> Result<String, DriverError> {
        let vm = self.vm(id)?;
        let _lock = vm.lifecycle.lock().await;
        self.export_locked(&vm, dest).await
    }

    async fn delete(&self, id: &str) -> Result<(), DriverError> {
        let vm = self.vm(id)?;
        let lock = vm.lifecycle.lock().await;
        let done = self.remove(&vm).await;
        drop(lock);
        if done.is_ok() {
            self.forget(id);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_vm_made_since_the_look_is_no_leftover() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = QemuConfig::new(dir.path());
        config.accel = Accel::Tcg;
        let driver = QemuDriver::open(config).await.unwrap();
        let vms = dir.path().join("vms");
        // The look saw `.vm.new`; before it was swept the VM became whole.
        std::fs::create_dir(vms.join("vm")).unwrap();
        driver.sweep("vm").await.unwrap();
        assert!(vms.join("vm").is_dir());
        std::fs::create_dir(vms.join(".other.new")).unwrap();
        driver.sweep("other").await.unwrap();
        assert!(!vms.join(".other.new").exists());
    }
}
