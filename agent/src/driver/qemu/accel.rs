//! Is KVM any good here? A `/dev/kvm` that opens proves nothing: on some nested hosts it accepts a
//! virtual CPU and then never runs it. So a tiny machine without firmware counts to a million; what
//! does not do that in good time is not used.

use super::super::DriverError;
use super::tools::Tools;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tokio::time::timeout;

/// Which acceleration to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// KVM if it works, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}

impl std::str::FromStr for Accel {
    type Err = String;

    fn from_str(text: &str) -> Result<Accel, String> {
        match text {
            "auto" => Ok(Accel::Auto),
            "kvm" => Ok(Accel::Kvm),
            "tcg" => Ok(Accel::Tcg),
            _ => Err(format!("{text:?} is none of auto, kvm, tcg")),
        }
    }
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Acceleration {
    Kvm,
    /// And why.
    Tcg(String),
}

impl Acceleration {
    pub(super) fn label(&self) -> String {
        match self {
            Acceleration::Kvm => "kvm".into(),
            Acceleration::Tcg(why) => format!("tcg ({why})"),
        }
    }
}

/// The probe costs up to a few seconds where KVM is broken: once per process.
static KVM: OnceCell<Result<(), String>> = OnceCell::const_new();

pub(super) async fn choose(wish: Accel, tools: &Tools) -> Result<Acceleration, DriverError> {
    if wish == Accel::Tcg {
        return Ok(Acceleration::Tcg("as configured".into()));
    }
    match (KVM.get_or_init(|| probe_kvm(tools)).await, wish) {
        (Ok(()), _) => Ok(Acceleration::Kvm),
        (Err(why), Accel::Kvm) => Err(DriverError::Failed(format!("KVM was asked for, but {why}"))),
        (Err(why), _) => Ok(Acceleration::Tcg(why.clone())),
    }
}

async fn probe_kvm(tools: &Tools) -> Result<(), String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm".into());
    }
    let mut result = Ok(());
    // A busy host may delay a good one.
    for _ in 0..PROBES {
        result = probe(tools, "kvm").await;
        if result.is_ok() {
            break;
        }
    }
    result
}

const PROBES: u32 = 3;

/// Longest time for the count itself.
const COUNT_MAX: Duration = Duration::from_millis(200);
/// Longest time for QEMU to start and do it.
const PROBE_MAX: Duration = Duration::from_secs(5);
const ROM_LEN: usize = 64 << 10;

/// Says `S` on the debug port, counts to 1,000,000 in real mode, says `E`, and ends QEMU.
const PROGRAM: [u8; 26] = [
    0xba, 0xe9, 0x00, // mov dx, 0xe9
    0xb0, b'S', // mov al, 'S'
    0xee, // out dx, al
    0x66, 0xb9, 0x40, 0x42, 0x0f, 0x00, // mov ecx, 1000000
    0x67, 0xe2, 0xfd, // loop on ecx
    0xb0, b'E', // mov al, 'E'
    0xee, // out dx, al
    0xba, 0xf4, 0x00, // mov dx, 0xf4
    0xee, // out dx, al: end
    0xf4, // hlt
    0xeb, 0xfd, // jmp to hlt
    0x90,
];

/// A ROM that takes the firmware's place.
fn rom() -> Vec<u8> {
    let mut rom = vec![0xf4; ROM_LEN];
    rom[..PROGRAM.len()].copy_from_slice(&PROGRAM);
    // A CPU starts 16 bytes below the top; jmp f000:0000.
    rom[ROM_LEN - 16..ROM_LEN - 11].copy_from_slice(&[0xea, 0x00, 0x00, 0x00, 0xf0]);
    rom
}

async fn probe(tools: &Tools, accel: &str) -> Result<(), String> {
    let rom_path = std::env::temp_dir().join(format!("mainstay-probe-{}", uuid::Uuid::new_v4()));
    std::fs::write(&rom_path, rom()).map_err(|e| format!("the probe cannot be written: {e}"))?;
    let machine = format!("{},accel={accel}", tools.machine);
    let child = Command::new(&tools.qemu)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-machine", &machine, "-m", "16", "-debugcon", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x01", "-bios"])
        .arg(&rom_path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let result = match child {
        Ok(mut child) => {
            let result = timeout(PROBE_MAX, count(&mut child)).await;
            // A machine that died inside KVM leaves QEMU waiting.
            let _ = child.kill().await;
            result.unwrap_or_else(|_| Err(format!("a {accel} guest does not run")))
        }
        Err(e) => Err(format!("QEMU does not start: {e}")),
    };
    let _ = std::fs::remove_file(&rom_path);
    result
}

async fn count(child: &mut Child) -> Result<(), String> {
    let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err("QEMU has no output".into());
    };
    if out.read_u8().await.is_ok() {
        return match timeout(COUNT_MAX, out.read_u8()).await {
            Ok(Ok(b'E')) => Ok(()),
            Ok(_) => Err("its guest dies".into()),
            Err(_) => Err(format!(
                "counting to a million takes over {} ms",
                COUNT_MAX.as_millis()
            )),
        };
    }
    let mut text = String::new();
    let _ = err.read_to_string(&mut text).await;
    let line = text
        .lines()
        .find(|line| !line.contains("warning:"))
        .unwrap_or("QEMU ended");
    Err(line.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_program_counts_where_emulation_runs_it() {
        let tools = Tools::find(None).await.unwrap();
        match probe(&tools, "tcg").await {
            // A loaded machine may be too slow, but it began.
            Err(why) if !why.starts_with("counting") => panic!("{why}"),
            _ => {}
        }
        assert!(
            probe(&tools, "no-such")
                .await
                .unwrap_err()
                .contains("no-such")
        );
    }
}
