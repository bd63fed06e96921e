//! `template push --suspend`: boots the disk here, waits until its guest is ready, and writes it down as it is then.
//! Instances of the pushed tag begin there.

use super::super::node::AccelName;
use anyhow::{Context as _, bail};
use base64::Engine as _;
use clap::Args;
use mainstay_agent::driver::qemu::{QemuConfig, QemuDriver};
use mainstay_agent::driver::{Driver, DriverError, OUTPUT_KEPT, Suspended, VmSpec};
use mainstay_agent::transfer::{MACHINE_FILE, MEMORY_FILE};
use mainstay_agent::wire::Script;
use std::path::{Path, PathBuf};
use tokio::signal::unix::{SignalKind, signal};

/// Name of the VM, and of the host in it until an instance gives it another.
const NAME: &str = "suspended";
/// A script may prepare the guest for so long.
const SCRIPT_MAX_S: u32 = 3600;

#[derive(Args, Debug)]
pub(super) struct SuspendArgs {
    /// Boot the disk here until its guest answers, and push it with its memory: instances go on from there
    #[arg(long)]
    suspend: bool,
    /// Run this in the guest before it is suspended
    #[arg(long, value_name = "FILE", requires = "suspend")]
    script: Option<PathBuf>,
    /// Virtual CPUs of the guest, and of every instance that begins in its memory
    #[arg(long, default_value_t = 1, requires = "suspend")]
    vcpu: u32,
    /// Its memory in MB
    #[arg(long, default_value_t = 512, requires = "suspend")]
    ram: u32,
    /// How QEMU runs the guest; nodes must do it in the same way
    #[arg(long, value_enum, default_value_t = AccelName::Auto, requires = "suspend")]
    accel: AccelName,
    /// Where the guest runs meanwhile: room for its disk and memory [default: the system's temporary folder]
    #[arg(long, value_name = "DIR", requires = "suspend")]
    work_dir: Option<PathBuf>,
    /// The memory of a guest that was suspended before
    #[arg(
        long,
        value_name = "FILE",
        requires = "machine",
        conflicts_with = "suspend"
    )]
    state: Option<PathBuf>,
    /// The machine that this memory belongs to
    #[arg(long, value_name = "FILE", requires = "state")]
    machine: Option<PathBuf>,
}

/// What is pushed.
pub(super) struct Pushed {
    pub(super) disk: PathBuf,
    pub(super) format: Option<String>,
    pub(super) beside: Vec<(String, PathBuf)>,
    _scratch: Option<Scratch>,
}

/// A folder that goes with this process.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "cannot remove a temporary folder");
        }
    }
}

impl SuspendArgs {
    /// The disk as it is, or what becomes of it.
    pub(super) async fn prepare(
        &self,
        disk: &Path,
        format: Option<&String>,
    ) -> anyhow::Result<Pushed> {
        let named = |memory: &Path, machine: &Path| {
            vec![
                (MEMORY_FILE.to_owned(), memory.to_owned()),
                (MACHINE_FILE.to_owned(), machine.to_owned()),
            ]
        };
        if !self.suspend {
            let beside = match (&self.state, &self.machine) {
                (Some(memory), Some(machine)) => named(memory, machine),
                _ => Vec::new(),
            };
            return Ok(Pushed {
                disk: disk.to_owned(),
                format: format.cloned(),
                beside,
                _scratch: None,
            });
        }
        let base = disk.canonicalize();
        let base = base.with_context(|| format!("cannot read {}", disk.display()))?;
        let root = self.work_dir.clone().unwrap_or_else(std::env::temp_dir);
        let root = root.join(format!("mainstay-suspend-{}", uuid::Uuid::new_v4()));
        let made = root.join("made");
        std::fs::create_dir_all(&made)
            .with_context(|| format!("cannot make {}", made.display()))?;
        let scratch = Scratch(root.clone());
        let mut config = QemuConfig::new(&root);
        config.accel = self.accel.into();
        let driver = QemuDriver::open(config).await?;
        let format = match format {
            Some(format) => format.clone(),
            None => format_of(&base).await?,
        };
        let spec = VmSpec {
            id: NAME.into(),
            name: NAME.into(),
            base,
            base_format: format,
            vcpu: self.vcpu,
            ram_mb: self.ram,
            ..VmSpec::default()
        };
        let (mut term, mut hup) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        );
        let suspended = tokio::select! {
            suspended = self.suspended(&driver, &spec, &made) => suspended,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
            _ = term.recv() => Err(anyhow::anyhow!("told to stop")),
            _ = hup.recv() => Err(anyhow::anyhow!("the terminal is gone")),
        };
        // Whatever became of it: QEMU would outlive us.
        driver.delete(NAME).await?;
        let suspended = suspended?;
        Ok(Pushed {
            beside: named(&suspended.saved.memory, &suspended.saved.machine),
            disk: suspended.disk,
            format: Some(suspended.format),
            _scratch: Some(scratch),
        })
    }

    async fn suspended(
        &self,
        driver: &QemuDriver,
        spec: &VmSpec,
        into: &Path,
    ) -> anyhow::Result<Suspended> {
        let said = |e: DriverError| anyhow::anyhow!("{e}");
        driver.start(spec).await.map_err(said)?;
        driver.ready(NAME, true).await.map_err(said)?;
        if let Some(path) = &self.script {
            let body = std::fs::read(path);
            let body = body.with_context(|| format!("cannot read {}", path.display()))?;
            let script = Script {
                body: base64::engine::general_purpose::STANDARD.encode(body),
                monitored: true,
                timeout_s: SCRIPT_MAX_S,
                ..Script::default()
            };
            let ended = driver
                .run_script(NAME, &script, OUTPUT_KEPT)
                .await
                .map_err(said)?;
            if ended.return_code != 0 || ended.did_timeout {
                let (code, said) = (ended.return_code, ended.stderr.trim());
                bail!("{} ended with {code}: {said}", path.display());
            }
        }
        driver.suspend(NAME, into).await.map_err(said)
    }
}

/// As the file says.
async fn format_of(disk: &Path) -> anyhow::Result<String> {
    use tokio::io::AsyncReadExt as _;
    let mut head = Vec::new();
    let file = tokio::fs::File::open(disk).await?;
    file.take(4).read_to_end(&mut head).await?;
    let qcow2 = head == b"QFI\xfb";
    Ok(if qcow2 { "qcow2" } else { "raw" }.to_owned())
}
