//! The guest agent of the tiny guest: answers the QEMU guest agent protocol on the virtio port that
//! QEMU calls `org.qemu.guest_agent.0`. It knows nothing of hosts, nodes or instances: whoever holds
//! the other end of the port is root here, as with any guest agent.
//!
//! `mainstay-guest [PORT]`: `PORT` is a character device; by default the port is found by its name.

mod command;
mod exec;
mod frame;
mod net;

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

const PORT_NAME: &str = "org.qemu.guest_agent.0";
/// How often to look for a host that is not there: first, and at most.
const IDLE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

fn main() {
    let given = std::env::args_os().nth(1).map(PathBuf::from);
    let path = loop {
        match given
            .clone()
            .or_else(|| find_port(Path::new("/sys/class/virtio-ports")))
        {
            Some(path) if path.exists() => break path,
            _ => sleep(Duration::from_millis(50)),
        }
    };
    let served = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .and_then(serve);
    // Init starts us again.
    if let Err(e) = served {
        let _ = writeln!(std::io::stderr(), "mainstay-guest: {}: {e}", path.display());
        sleep(Duration::from_secs(1));
        std::process::exit(1);
    }
}

/// The device of the port that carries our name.
fn find_port(class: &Path) -> Option<PathBuf> {
    let entry = std::fs::read_dir(class).ok()?.flatten().find(|entry| {
        std::fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == PORT_NAME)
    })?;
    Some(Path::new("/dev").join(entry.file_name()))
}

/// Answer requests, one after the other, for ever.
fn serve(mut port: File) -> std::io::Result<()> {
    let mut frames = frame::Frames::default();
    let mut agent = command::Agent::default();
    let mut chunk = vec![0; 64 << 10];
    let mut idle = IDLE.0;
    loop {
        let read = port.read(&mut chunk)?;
        if read == 0 {
            // No host at the other end: the port does not block then.
            frames.reset();
            sleep(idle);
            idle = (idle * 2).min(IDLE.1);
            continue;
        }
        idle = IDLE.0;
        for request in frames.push(&chunk[..read]) {
            if let Some(answer) = agent.answer(&request) {
                port.write_all(&answer)?;
            }
        }
    }
}
