//! Figures of this machine, from `/proc` and the file system. Where one cannot be had, it is zero:
//! a node is not refused for lack of figures.

use parking_lot::Mutex;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};

/// What this machine is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Host name.
    pub hostname: String,
    /// `amd64` or `arm64`.
    pub arch: String,
    /// CPUs.
    pub cpu_count: u32,
    /// MB.
    pub ram_mb: u64,
    /// Size of the data directory's file system.
    pub disk_bytes: u64,
}

/// Look at the machine; the disk is that of `root`.
pub fn facts(root: &Path) -> Facts {
    let hostname = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let arch = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Facts {
        hostname,
        arch: arch.to_owned(),
        cpu_count: u32::try_from(cpus).unwrap_or(u32::MAX),
        ram_mb: memory().0 >> 10,
        disk_bytes: space(root).0,
    }
}

/// The address from which `towards` (a URL) is reached: the one to show if the operator gave none.
pub fn local_ip(towards: &str) -> Option<IpAddr> {
    let url: reqwest::Url = towards.parse().ok()?;
    let host = url.host_str()?.trim_matches(['[', ']']);
    let port = url.port_or_known_default()?;
    let targets = std::net::ToSocketAddrs::to_socket_addrs(&(host, port)).ok()?;
    for target in targets {
        let any = if target.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        // Nothing is sent: connecting a datagram socket only chooses the route.
        let found = UdpSocket::bind(any).and_then(|s| {
            s.connect(target)?;
            s.local_addr()
        });
        if let Ok(address) = found {
            return Some(address.ip());
        }
    }
    None
}

/// Measures use; CPU use is that since the last call.
#[derive(Debug)]
pub struct Meter {
    root: PathBuf,
    last: Mutex<(u64, u64)>,
}

/// One measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Use {
    /// 0..1.
    pub cpu: f32,
    /// 0..1.
    pub ram: f32,
    /// Bytes.
    pub free_disk: u64,
}

impl Meter {
    /// The disk is that of `root`.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            last: Mutex::new(cpu_time()),
        }
    }

    /// Measure now.
    pub fn measure(&self) -> Use {
        let now = cpu_time();
        let before = std::mem::replace(&mut *self.last.lock(), now);
        let (total, free) = memory();
        Use {
            cpu: part(
                now.0.saturating_sub(before.0),
                now.1.saturating_sub(before.1),
            ),
            ram: part(total.saturating_sub(free), total),
            free_disk: space(&self.root).1,
        }
    }
}

/// Bytes that files under `root` take on disk, but those under `except`.
pub fn disk_use(root: &Path, except: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = fs::read_dir(root) else {
        return 0;
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(m) if m.is_dir() && entry.path() != except => disk_use(&entry.path(), except),
            Ok(m) if m.is_file() => m.blocks() * 512,
            _ => 0,
        })
        .sum()
}

#[allow(clippy::cast_precision_loss)]
fn part(used: u64, total: u64) -> f32 {
    if total == 0 {
        return 0.0;
    }
    (used as f32 / total as f32).clamp(0.0, 1.0)
}

/// Busy and total ticks of all CPUs since boot.
fn cpu_time() -> (u64, u64) {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    parse_cpu(&text).unwrap_or_default()
}

fn parse_cpu(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line
        .split_ascii_whitespace()
        .filter_map(|t| t.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq steal; guest time is in user time already.
    let total: u64 = ticks.iter().take(8).sum();
    let idle = ticks.get(3)? + ticks.get(4).copied().unwrap_or(0);
    Some((total - idle, total))
}

/// Total and available memory in KB.
fn memory() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse_memory(&text)
}

fn parse_memory(text: &str) -> (u64, u64) {
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse().ok()
    };
    (
        field("MemTotal:").unwrap_or(0),
        field("MemAvailable:").unwrap_or(0),
    )
}

/// Total and free bytes of a file system.
fn space(root: &Path) -> (u64, u64) {
    rustix::fs::statvfs(root).map_or((0, 0), |s| {
        (
            s.f_blocks.saturating_mul(s.f_frsize),
            s.f_bavail.saturating_mul(s.f_frsize),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_understood() {
        let stat = "cpu  100 10 50 800 40 0 0 0 20 0\ncpu0 1 1 1 1\n";
        assert_eq!(parse_cpu(stat), Some((160, 1000)));
        assert_eq!(parse_cpu("nothing"), None);
        let memory = "MemTotal:  2000 kB\nMemFree: 5 kB\nMemAvailable:  500 kB\n";
        assert_eq!(parse_memory(memory), (2000, 500));
        assert!((part(1500, 2000) - 0.75).abs() < f32::EPSILON);
    }

    #[test]
    fn this_machine_has_facts() {
        let facts = facts(Path::new("/"));
        assert!(!facts.hostname.is_empty() && facts.cpu_count > 0);
        assert!(facts.ram_mb > 0 && facts.disk_bytes > 0);
        let ip = local_ip("http://127.0.0.1:8090").unwrap();
        assert!(ip.is_loopback());
    }
}
