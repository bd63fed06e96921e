//! The installed QEMU: where it is, which machine type to pin, and its disk tool. Base disks come
//! from outside and are looked at before use: a disk may name any file of the host as its backing.

use super::super::DriverError;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// What to do where QEMU is missing.
pub(super) const INSTALL: &str =
    "run deploy/install-deps.sh, or: apt-get install qemu-system-x86 qemu-utils";
const TOOL_MAX: Duration = Duration::from_secs(60);
/// A large disk on a slow one.
const CONVERT_MAX: Duration = Duration::from_secs(6 * 3600);

/// What was found.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) qemu: PathBuf,
    img: PathBuf,
    /// First line of `--version`.
    pub(crate) version: String,
    /// Newest versioned machine type.
    pub(crate) machine: String,
}

impl Tools {
    pub(crate) async fn find(binary: Option<&Path>) -> Result<Tools, DriverError> {
        let qemu = match binary {
            Some(path) => path.to_path_buf(),
            None => on_path("qemu-system-x86_64")?,
        };
        let img = match qemu.with_file_name("qemu-img") {
            beside if beside.exists() => beside,
            _ => on_path("qemu-img")?,
        };
        let version = output(Command::new(&qemu).arg("--version")).await?;
        let machines = output(Command::new(&qemu).args(["-machine", "help"])).await?;
        let machine = versioned_machine(&machines).ok_or_else(|| {
            DriverError::Failed(format!("{} knows no PC machine", qemu.display()))
        })?;
        let version = version.lines().next().unwrap_or_default().to_string();
        Ok(Tools {
            qemu,
            img,
            version,
            machine,
        })
    }

    /// Refuse a base that is not what it is said to be, or that reaches for other files.
    pub(super) async fn check_base(&self, base: &Path, format: &str) -> Result<(), DriverError> {
        if !matches!(format, "qcow2" | "raw") {
            return Err(DriverError::Failed(format!(
                "disk format {format:?} is not qcow2 or raw"
            )));
        }
        if !base.is_absolute() {
            return Err(DriverError::Failed(format!(
                "{} is not absolute",
                base.display()
            )));
        }
        let mut info = Command::new(&self.img);
        info.args(["info", "--output=json", "-U", "-f", format])
            .arg(base);
        let text = output(&mut info)
            .await
            .map_err(|e| DriverError::Failed(e.to_string()))?;
        refuse_references(&text).map_err(|why| {
            DriverError::Failed(format!("disk {} is refused: {why}", base.display()))
        })
    }

    /// A fresh disk on top of `base`, which is not written to.
    pub(super) async fn overlay(
        &self,
        base: &Path,
        format: &str,
        overlay: &Path,
    ) -> Result<(), DriverError> {
        let mut create = Command::new(&self.img);
        create
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
            .arg(base)
            .arg(overlay);
        output(&mut create).await.map(drop)
    }

    /// A disk like `overlay` on its base, in a file of its own. No process may write to it. Durable.
    pub(super) async fn flatten(&self, overlay: &Path, to: &Path) -> Result<(), DriverError> {
        let mut convert = Command::new(&self.img);
        convert
            .args(["convert", "-f", "qcow2", "-O", "qcow2"])
            .arg(overlay)
            .arg(to);
        output_within(&mut convert, CONVERT_MAX).await?;
        let synced = std::fs::File::open(to).and_then(|file| file.sync_all());
        synced.map_err(|e| DriverError::Busy(format!("cannot write {}: {e}", to.display())))
    }

    /// Write into `disk`, a copy of `base`, what `overlay` says otherwise. Neither of these is written to.
    pub(super) async fn lay_over(
        &self,
        (base, format): (&Path, &str),
        overlay: &Path,
        disk: &Path,
    ) -> Result<(), DriverError> {
        let mut convert = Command::new(&self.img);
        convert
            .args(["convert", "-q", "-n", "-f", "qcow2", "-O", format])
            .args(["-F", format, "-B"])
            .arg(base)
            .arg(overlay)
            .arg(disk);
        output_within(&mut convert, CONVERT_MAX).await.map(drop)
    }
}

fn refuse_references(info: &str) -> Result<(), String> {
    let info: Value = serde_json::from_str(info).map_err(|e| e.to_string())?;
    if let Some(backing) = info["backing-filename"].as_str() {
        return Err(format!("it has a backing file ({backing})"));
    }
    let data = &info["format-specific"]["data"];
    if !data["data-file"].is_null() {
        return Err(format!(
            "it keeps its data in another file ({})",
            data["data-file"]
        ));
    }
    if data["corrupt"] == true {
        return Err("it is marked corrupt".into());
    }
    Ok(())
}

/// `pc` is an alias of the newest type: take what it stands for, since the alias moves with QEMU.
fn versioned_machine(help: &str) -> Option<String> {
    let line = help.lines().find(|line| line.starts_with("pc "))?;
    let (_, rest) = line.split_once("(alias of ")?;
    Some(rest.split(')').next()?.to_string())
}

fn on_path(name: &str) -> Result<PathBuf, DriverError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file());
    found.ok_or_else(|| DriverError::Failed(format!("{name} is not installed: {INSTALL}")))
}

/// Standard output of a short command, or what it complained about.
pub(super) async fn output(command: &mut Command) -> Result<String, DriverError> {
    output_within(command, TOOL_MAX).await
}

async fn output_within(command: &mut Command, limit: Duration) -> Result<String, DriverError> {
    let name = command
        .as_std()
        .get_program()
        .to_string_lossy()
        .into_owned();
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(limit, command.output())
        .await
        .map_err(|_| DriverError::Busy(format!("{name} does not end")))?
        .map_err(|e| DriverError::Busy(format!("cannot run {name}: {e}")))?;
    if ended.status.success() {
        return Ok(String::from_utf8_lossy(&ended.stdout).into_owned());
    }
    Err(complaint(&name, &ended.stderr))
}

/// A tool's complaint: another node may have the memory, the disk or the port that this one lacks.
pub(super) fn complaint(name: &str, stderr: &[u8]) -> DriverError {
    let text = String::from_utf8_lossy(stderr);
    let text = text
        .lines()
        .filter(|line| !line.contains("warning:"))
        .collect::<Vec<_>>();
    let message = format!("{name}: {}", text.join("; ").trim());
    let scarce = [
        "No space left",
        "Cannot allocate memory",
        "cannot set up guest memory",
        "Too many open",
    ];
    if scarce.iter().any(|sign| message.contains(sign)) {
        DriverError::Busy(message)
    } else {
        DriverError::Failed(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alias_is_resolved() {
        let help = "Supported machines are:\n\
            microvm              microvm (i386)\n\
            pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)\n\
            pc-i440fx-10.0       Standard PC (i440FX + PIIX, 1996) (default)\n";
        assert_eq!(versioned_machine(help).unwrap(), "pc-i440fx-10.0");
        assert_eq!(versioned_machine("nothing"), None);
    }

    #[test]
    fn disks_that_reach_for_other_files_are_refused() {
        refuse_references(r#"{"format":"qcow2","format-specific":{"data":{}}}"#).unwrap();
        refuse_references(r#"{"format":"raw"}"#).unwrap();
        let backing = refuse_references(r#"{"backing-filename":"/etc/shadow"}"#).unwrap_err();
        assert!(backing.contains("/etc/shadow"));
        let data = r#"{"format-specific":{"data":{"data-file":"/dev/sda"}}}"#;
        assert!(refuse_references(data).unwrap_err().contains("/dev/sda"));
    }

    #[test]
    fn scarcity_is_told_from_nonsense() {
        let scarce = complaint(
            "q",
            b"q: warning: x\nq: cannot set up guest memory 'pc.ram'\n",
        );
        assert!(matches!(scarce, DriverError::Busy(_)));
        assert!(matches!(
            complaint("q", b"Image is not in qcow2 format"),
            DriverError::Failed(_)
        ));
    }
}
