//! Writes a running VM down, and brings such a one to life again.
//!
//! ```text
//! suspend: guest writes its files -> stopped -> memory in a file -> QEMU ends -> disk in a file -> machine.json
//! resume:  QEMU waits for a memory -> loads it, while its digest is taken -> goes on -> guest answers
//!          -> has an identity of its own -> noted in run.json: it lives
//!          any step fails, or takes too long -> QEMU ends, fresh disk, boot; the reason stands in spec.json
//! ```
//!
//! The memory is in QEMU's `mapped-ram` form: each page of the guest has its place in the file, so that pages that
//! did not change are the same chunks in the next tag, and free ones are holes.

use super::super::{DriverError, Saved, Suspended};
use super::dir::{Memory, Spec};
use super::renew::RENEW_MAX;
use super::{QemuDriver, Vm, machine, process, qmp::Qmp};
use crate::transfer::content_of;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How often QEMU is asked how far it is: first, and at most.
const ASK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// The guest may take so long to write its files.
const SYNC_MAX: Duration = Duration::from_secs(60);
/// The slowest disk that a memory is written to, or loaded from, in bytes a second.
const SLOWEST: u64 = 20 << 20;
/// Beyond that.
const MOVE_MIN: Duration = Duration::from_secs(60);
/// A guest that has come to life answers within this.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Bytes a second: no limit.
const BANDWIDTH: u64 = 1 << 40;

impl QemuDriver {
    pub(super) async fn suspend_locked(
        &self,
        vm: &Arc<Vm>,
        into: &Path,
    ) -> Result<Suspended, DriverError> {
        let failed = |why: String| DriverError::Failed(format!("cannot suspend the VM: {why}"));
        let into = into.canonicalize();
        let into = into.map_err(|e| failed(format!("no folder to write to: {e}")))?;
        let spec = vm
            .dir
            .spec()?
            .ok_or_else(|| failed("there is none".into()))?;
        let run = vm.dir.run()?;
        let pid = vm.process()?;
        let (Some(pid), Some(run)) = (pid, run) else {
            return Err(failed("it does not run".into()));
        };
        if spec.awaits(&run) {
            return Err(failed("it is being resumed".into()));
        }
        self.write_files(vm).await.map_err(failed)?;
        *vm.qga.lock().await = None;
        let qmp = self.qmp(vm).await.map_err(failed)?;
        let memory = into.join("memory");
        let (bytes, digest) = match written(&qmp, &memory, spec.ram_mb).await {
            Ok(written) => written,
            Err(why) => {
                // What was written is of no use; the guest has noticed a pause.
                let _ = std::fs::remove_file(&memory);
                let _ = qmp.call("cont", json!({})).await;
                return Err(failed(why));
            }
        };
        self.force(vm).await?;
        process::gone(pid, &vm.dir.pidfile(), Duration::from_secs(10)).await;
        let disk = into.join("disk");
        self.tools
            .flatten(&vm.dir.file("overlay.qcow2"), &disk)
            .await?;
        let flat = disk.clone();
        let content = tokio::task::spawn_blocking(move || content_of(&flat)).await;
        let content = content.map_err(|e| failed(e.to_string()))?;
        let content = content.map_err(|e| failed(e.to_string()))?;
        let described = into.join("machine.json");
        let machine = self.machine_of(&spec, content.clone(), (bytes, digest));
        let unwritten =
            |e: std::io::Error| DriverError::Busy(format!("cannot suspend the VM: {e}"));
        machine::write(&described, &machine)
            .and_then(|()| std::fs::File::open(&into)?.sync_all())
            .map_err(unwritten)?;
        tracing::info!(vm = %vm.dir.id, bytes, "vm suspended");
        Ok(Suspended {
            disk,
            format: "qcow2".to_owned(),
            saved: Saved {
                memory,
                machine: described,
                disk: content,
            },
        })
    }

    /// A clone that must boot after all shall find on the disk what the guest has written.
    async fn write_files(&self, vm: &Arc<Vm>) -> Result<(), String> {
        let args = json!({ "path": "/bin/sh", "arg": ["-c", "sync"] });
        let begun = self.ask(vm, "guest-exec", args).await;
        let begun = begun.map_err(|e| e.to_string())?;
        let pid = begun["pid"].as_u64().ok_or("guest-exec names no process")?;
        let ended = self.wait_exec(vm, pid, Instant::now() + SYNC_MAX).await;
        match ended {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err("the guest does not finish writing its files".to_owned()),
            Err(e) => Err(e.to_string()),
        }
    }

    /// Bring a VM with a saved memory to life, or boot it. Nothing to do for others, and when it was done before.
    /// `true`: it has just come to life.
    pub(super) async fn settle(&self, vm: &Arc<Vm>) -> Result<bool, DriverError> {
        // Nobody may restart, remove or judge it meanwhile.
        let _lock = vm.lifecycle.lock().await;
        let (Some(spec), Some(mut run)) = (vm.dir.spec()?, vm.dir.run()?) else {
            return Ok(false);
        };
        let Some(memory) = spec.memory.as_ref().filter(|_| !run.resumed) else {
            return Ok(false);
        };
        let begun = Instant::now();
        let limit = move_max(memory.bytes) + ANSWER_MAX + RENEW_MAX;
        let resumed = match timeout(limit, self.resume(vm, &spec, memory)).await {
            Ok(resumed) => resumed,
            Err(_) => Err(format!("it was not there within {} s", limit.as_secs())),
        };
        if let Err(why) = resumed {
            self.boot_cold(vm, spec, why).await?;
            return Ok(false);
        }
        (run.resumed, run.renewed) = (true, true);
        vm.dir.set_run(&run)?;
        let took_ms = begun.elapsed().as_millis();
        tracing::info!(vm = %vm.dir.id, took_ms, "vm resumed from a saved memory");
        Ok(true)
    }

    /// May be begun again at any point: a QEMU that loads goes on loading whatever becomes of us.
    async fn resume(&self, vm: &Arc<Vm>, spec: &Spec, memory: &Memory) -> Result<(), String> {
        let load = timeout(move_max(memory.bytes), self.load(vm, memory));
        let (loaded, whole) = tokio::join!(load, self.check_memory(memory));
        whole?;
        loaded.map_err(|_| "QEMU does not finish loading its memory".to_owned())??;
        let qmp = self.qmp(vm).await?;
        if qmp.status().await? != "running" {
            qmp.call("cont", json!({})).await?;
        }
        let answers = timeout(ANSWER_MAX, self.wait_agent(vm)).await;
        let within = ANSWER_MAX.as_secs();
        let answers = answers.map_err(|_| format!("its guest did not answer within {within} s"))?;
        answers.map_err(|e| e.to_string())?;
        self.renew(vm, spec).await
    }

    async fn load(&self, vm: &Arc<Vm>, memory: &Memory) -> Result<(), String> {
        let mut pause = ASK.0;
        loop {
            // A QEMU that is busy loading may not answer; one that is gone never will.
            if matches!(vm.process(), Ok(None)) {
                return Err("QEMU ended while it loaded its memory".to_owned());
            }
            if let Ok(qmp) = self.qmp(vm).await
                && load_step(&qmp, memory).await?
            {
                return Ok(());
            }
            sleep(pause).await;
            pause = (pause * 2).min(ASK.1);
        }
    }

    /// The memory is of no use: as if it had never been there.
    async fn boot_cold(
        &self,
        vm: &Arc<Vm>,
        mut spec: Spec,
        why: String,
    ) -> Result<(), DriverError> {
        tracing::warn!(vm = %spec.id, why, "the saved memory cannot be used; booting cold");
        if let Some(run) = vm.dir.run()? {
            // They were told already.
            spec.had = run.forwards;
        }
        vm.dir.forget_run()?;
        self.force(vm).await?;
        *vm.qmp.lock().await = None;
        *vm.qga.lock().await = None;
        self.renew_overlay(vm, &spec).await?;
        spec.memory = None;
        spec.cold = why;
        vm.dir.set_spec(&spec)?;
        self.launch(vm, &spec).await.map(drop)
    }

    /// Its disk is the base again. Nothing may have it open.
    pub(super) async fn renew_overlay(&self, vm: &Arc<Vm>, spec: &Spec) -> Result<(), DriverError> {
        let (new, disk) = (vm.dir.file("overlay.new"), vm.dir.file("overlay.qcow2"));
        let busy = |e: std::io::Error| {
            DriverError::Busy(format!("cannot make a fresh disk of VM {}: {e}", spec.id))
        };
        match std::fs::remove_file(&new) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(busy(e)),
            _ => {}
        }
        self.tools
            .overlay(&spec.base, &spec.base_format, &new)
            .await?;
        std::fs::rename(new, disk).map_err(busy)
    }
}

/// One look at a QEMU that is to load a memory; `true` once it has.
async fn load_step(qmp: &Qmp, memory: &Memory) -> Result<bool, String> {
    let Ok(status) = qmp.status().await else {
        return Ok(false);
    };
    if status != "inmigrate" {
        return match status.as_str() {
            "paused" | "prelaunch" | "running" => Ok(true),
            other => Err(format!("QEMU says of the loaded guest: {other}")),
        };
    }
    let Ok(moved) = qmp.call("query-migrate", json!({})).await else {
        return Ok(false);
    };
    match moved["status"].as_str() {
        Some("failed") => Err(format!("QEMU cannot load its memory: {}", reason(&moved))),
        Some(_) => Ok(false),
        None => {
            map_pages(qmp).await?;
            let from = json!({ "uri": uri(&memory.file)?, "exit-on-error": false });
            qmp.call("migrate-incoming", from).await?;
            Ok(false)
        }
    }
}

/// Stop the guest and write its memory, durably; its length and digest.
async fn written(qmp: &Qmp, to: &Path, ram_mb: u32) -> Result<(u64, String), String> {
    write_memory(qmp, to, ram_mb).await?;
    let synced = std::fs::File::open(to).and_then(|file| file.sync_all());
    synced.map_err(|e| e.to_string())?;
    machine::digest_of(to).await.map_err(|e| e.to_string())
}

/// Stop the guest and write its memory.
async fn write_memory(qmp: &Qmp, to: &Path, ram_mb: u32) -> Result<(), String> {
    map_pages(qmp).await?;
    let fast = json!({ "max-bandwidth": BANDWIDTH });
    qmp.call("migrate-set-parameters", fast).await?;
    qmp.call("stop", json!({})).await?;
    qmp.call("migrate", json!({ "uri": uri(to)? })).await?;
    let until = Instant::now() + move_max(u64::from(ram_mb) << 20);
    let mut pause = ASK.0;
    while Instant::now() < until {
        let moved = qmp.call("query-migrate", json!({})).await?;
        match moved["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                return Err(format!("QEMU cannot write its memory: {}", reason(&moved)));
            }
            _ => {}
        }
        sleep(pause).await;
        pause = (pause * 2).min(ASK.1);
    }
    let _ = qmp.call("migrate_cancel", json!({})).await;
    Err("QEMU does not finish writing its memory".to_owned())
}

async fn map_pages(qmp: &Qmp) -> Result<(), String> {
    let mapped = json!({ "capabilities": [{ "capability": "mapped-ram", "state": true }] });
    let done = qmp.call("migrate-set-capabilities", mapped).await;
    done.map(drop)
        .map_err(|why| format!("this QEMU does not know mapped-ram, 9.0 does: {why}"))
}

fn reason(moved: &Value) -> &str {
    moved["error-desc"].as_str().unwrap_or("for no reason")
}

fn uri(file: &Path) -> Result<String, String> {
    let path = file.to_str().filter(|path| !path.contains(",offset="));
    let path = path.ok_or_else(|| format!("{} cannot name a memory", file.display()))?;
    Ok(format!("file:{path}"))
}

fn move_max(bytes: u64) -> Duration {
    MOVE_MIN + Duration::from_secs(bytes / SLOWEST)
}
