//! Real VMs pass the suite; and what only real VMs have: ports that answer, processes, half-made folders.

use crate::conformance::{self, Rig, only, script, spec};
use crate::guest;
use mainstay_agent::driver::qemu::{QemuConfig, QemuDriver};
use mainstay_agent::driver::{Driver, DriverError, OUTPUT_KEPT};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A state folder whose name is too long for a socket's path, gone with its VMs at the end.
pub(crate) struct State(tempfile::TempDir);

impl State {
    pub(crate) fn new() -> State {
        State(
            tempfile::Builder::new()
                .prefix(&"long-".repeat(25))
                .tempdir()
                .unwrap(),
        )
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap()
    }

    pub(crate) async fn open(&self) -> QemuDriver {
        QemuDriver::open(QemuConfig::new(self.0.path()))
            .await
            .unwrap()
    }

    fn vm(&self, id: &str) -> PathBuf {
        self.0.path().canonicalize().unwrap().join("vms").join(id)
    }

    fn pid(&self, id: &str) -> String {
        std::fs::read_to_string(self.vm(id).join("pid"))
            .unwrap()
            .trim()
            .to_string()
    }
}

impl Drop for State {
    /// A test that failed half way must not leave machines running.
    fn drop(&mut self) {
        let Ok(vms) = std::fs::read_dir(self.0.path().join("vms")) else {
            return;
        };
        for vm in vms.flatten() {
            let pidfile = self.vm(&vm.file_name().to_string_lossy()).join("pid");
            let Ok(pid) = std::fs::read_to_string(&pidfile) else {
                continue;
            };
            let line = std::fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(&*pidfile.to_string_lossy()) {
                let _ = Command::new("kill").args(["-KILL", pid.trim()]).status();
            }
        }
    }
}

struct QemuRig {
    state: State,
    base: PathBuf,
}

#[async_trait::async_trait]
impl Rig for QemuRig {
    async fn open(&self) -> Arc<dyn Driver> {
        Arc::new(self.state.open().await)
    }

    async fn kill(&self, id: &str) {
        let pid = self.state.pid(id);
        assert!(
            Command::new("kill")
                .args(["-KILL", &pid])
                .status()
                .unwrap()
                .success()
        );
        let deadline = Instant::now() + Duration::from_secs(10);
        while !std::fs::read(format!("/proc/{pid}/cmdline"))
            .unwrap_or_default()
            .is_empty()
        {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn base(&self) -> PathBuf {
        self.base.clone()
    }

    fn scratch(&self) -> PathBuf {
        self.state.0.path().to_owned()
    }
}

#[tokio::test]
async fn qemu_is_a_driver() {
    let rig = QemuRig {
        state: State::new(),
        base: guest::tiny(),
    };
    conformance::run_all(&rig).await;
}

/// What the guest's web server says to a client outside.
async fn fetch(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream
        .write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())
        .await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

pub(crate) async fn fetch_until(port: u16, path: &str, wanted: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let got = tokio::time::timeout(Duration::from_secs(5), fetch(port, path)).await;
        if matches!(&got, Ok(Ok(text)) if text.contains(wanted)) {
            return;
        }
        assert!(Instant::now() < deadline, "{got:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn two_vms_at_once_have_ports_scripts_and_disks_of_their_own() {
    let (state, base) = (State::new(), guest::tiny());
    let before = std::fs::read(&base).unwrap();
    let driver = state.open().await;
    let boot = async |id: &str| {
        driver.start(&spec(id, &base)).await.unwrap();
        driver.ready(id, true).await.unwrap()
    };
    let (a, b) = tokio::join!(boot("a"), boot("b"));
    assert_ne!(
        a.port_forwarding[0].host_port,
        b.port_forwarding[0].host_port
    );
    for (id, facts) in [("a", &a), ("b", &b)] {
        let mark = script(&format!("echo disk-of-{id} >/srv/www/mark && sync"), 60);
        assert_eq!(
            driver
                .run_script(id, &mark, OUTPUT_KEPT)
                .await
                .unwrap()
                .return_code,
            0
        );
        let port = facts.port_forwarding[0].host_port;
        fetch_until(port, "/mark", &format!("disk-of-{id}")).await;
        fetch_until(port, "/hostname", "mainstay-guest").await;
    }
    let mut taken = spec("c", &base);
    taken.forwards[0].host_port = a.port_forwarding[0].host_port;
    let refused = driver.start(&taken).await;
    assert!(matches!(refused, Err(DriverError::Busy(_))), "{refused:?}");
    driver.delete("c").await.unwrap();
    demanding_scripts(&driver).await;
    let driver = adoption_of_an_interrupted_start(&state, driver).await;
    interrupted_restarts(&state, driver).await;
    assert!(
        std::fs::read(&base).unwrap() == before,
        "the shared base was written to"
    );
}

async fn demanding_scripts(driver: &QemuDriver) {
    let run = async |text: &str, seconds: u32| {
        driver
            .run_script("a", &script(text, seconds), OUTPUT_KEPT)
            .await
            .unwrap()
    };
    let reads = run("cat\necho whole", 60).await;
    assert_eq!(
        reads.stdout, "whole\n",
        "a script must not be its own input"
    );
    assert_eq!(
        run("#!/bin/awk -f\nBEGIN { print 6*7; exit 3 }\n", 60)
            .await
            .stdout,
        "42\n"
    );
    let long = run("yes | head -c 2000000; echo END", 120).await;
    assert_eq!(long.stdout.len(), mainstay_agent::driver::OUTPUT_KEPT);
    assert!(long.stdout.ends_with("END\n"));
    let left = run("sleep 4321 & sleep 4321", 2).await;
    assert!(left.did_timeout);
    let survivors = run("ps | grep -c '[s]leep 4321'", 60).await;
    assert_eq!(survivors.stdout, "0\n", "a timeout kills all of the script");
    let clock = run("date +%s", 60).await;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let drift = clock
        .stdout
        .trim()
        .parse::<u64>()
        .unwrap()
        .abs_diff(now.as_secs());
    assert!(drift < 60, "the guest's clock is off by {drift} s");
}

/// The agent died between QEMU's start and the note of it: the VM is adopted, not started twice.
async fn adoption_of_an_interrupted_start(state: &State, driver: QemuDriver) -> QemuDriver {
    let before = driver.list().await.unwrap();
    drop(driver);
    std::fs::remove_file(state.vm("a").join("run.json")).unwrap();
    let driver = state.open().await;
    let after = driver.list().await.unwrap();
    assert_eq!(after.len(), 2);
    assert_eq!(after[0].facts.status, "running");
    assert_eq!(
        after[0].facts.port_forwarding,
        before[0].facts.port_forwarding
    );
    assert_eq!(
        driver.ready("a", true).await.unwrap().ip,
        before[0].facts.ip
    );
    driver
}

/// The agent died while it restarted a VM: after the end of the old process, and after the start of the
/// new one. The disk is never taken for one that was never used.
async fn interrupted_restarts(state: &State, driver: QemuDriver) {
    let ports = driver.list().await.unwrap()[0]
        .facts
        .port_forwarding
        .clone();
    driver.restart("a", 13).await.unwrap();
    let spec = std::fs::read(state.vm("a").join("spec.json")).unwrap();
    driver.stop("a").await.unwrap();
    std::fs::write(state.vm("a").join("spec.json"), spec).unwrap();
    for killed_after_launch in [false, true] {
        if killed_after_launch {
            driver.restart("a", 13).await.unwrap();
        }
        std::fs::remove_file(state.vm("a").join("run.json")).unwrap_or_default();
        let seen = driver.list().await.unwrap().remove(0);
        let expected = if killed_after_launch {
            "running"
        } else {
            "stopped"
        };
        assert_eq!(seen.facts.status, expected, "{}", seen.message);
        assert_eq!(seen.generation, 13);
    }
    let again = driver.restart("a", 13).await.unwrap();
    assert_eq!(again.port_forwarding, ports);
    driver.ready("a", true).await.unwrap();
    let mark = script("cat /srv/www/mark", 60);
    let mark = driver.run_script("a", &mark, OUTPUT_KEPT).await.unwrap();
    assert_eq!(mark.stdout, "disk-of-a\n");
    a_saved_disk_starts_others(state, &driver).await;
    driver.delete("a").await.unwrap();
    driver.delete("b").await.unwrap();
    assert!(driver.list().await.unwrap().is_empty());
}

/// What a VM wrote is in its saved disk, which needs no other and is its base but for that; the base and the VM's
/// own disk are as they were.
async fn a_saved_disk_starts_others(state: &State, driver: &QemuDriver) {
    let base = std::fs::read(guest::tiny()).unwrap();
    driver.stop("a").await.unwrap();
    let overlay = state.vm("a").join("overlay.qcow2");
    let before = std::fs::read(&overlay).unwrap();
    let disk = state.0.path().canonicalize().unwrap().join("saved.qcow2");
    assert_eq!(driver.export("a", &disk).await.unwrap(), "qcow2");
    assert!(std::fs::read(&overlay).unwrap() == before, "only read");
    assert!(std::fs::read(guest::tiny()).unwrap() == base, "only read");
    let saved = std::fs::read(&disk).unwrap();
    let chunks = |bytes: &[u8]| bytes.chunks(64 << 10).map(<[u8]>::to_vec).collect();
    let known: std::collections::HashSet<Vec<u8>> = chunks(&base);
    let new = chunks(&saved).difference(&known).count();
    let all = saved.len() / (64 << 10);
    assert!(new * 3 < all, "{new} of {all} chunks are new");
    driver.start(&spec("copy", &disk)).await.unwrap();
    driver.ready("copy", true).await.unwrap();
    let mark = script("cat /srv/www/mark", 60);
    let mark = driver.run_script("copy", &mark, OUTPUT_KEPT).await.unwrap();
    assert_eq!(mark.stdout, "disk-of-a\n");
    driver.delete("copy").await.unwrap();
}

#[tokio::test]
async fn leftovers_of_a_crash_are_swept_and_do_not_stand_in_the_way() {
    let (state, base) = (State::new(), guest::tiny());
    let driver = state.open().await;
    // Died while making, while deleting, and between the folder and QEMU's start.
    for name in [".x.new", ".y.gone"] {
        std::fs::create_dir(state.vm(name)).unwrap();
        std::fs::write(state.vm(name).join("overlay.qcow2"), "half").unwrap();
    }
    driver.start(&spec("z", &base)).await.unwrap();
    let rig_pid = state.pid("z");
    assert!(
        Command::new("kill")
            .args(["-KILL", &rig_pid])
            .status()
            .unwrap()
            .success()
    );
    let deadline = Instant::now() + Duration::from_secs(10);
    while only(&driver).await.facts.status != "failed" {
        assert!(Instant::now() < deadline);
    }
    std::fs::remove_file(state.vm("z").join("run.json")).unwrap();
    // A start completes it...
    assert_eq!(
        driver.start(&spec("z", &base)).await.unwrap().status,
        "running"
    );
    driver.delete("z").await.unwrap();
    assert!(driver.list().await.unwrap().is_empty());
    // A folder that cannot be read hides no other, and can be deleted.
    std::fs::create_dir(state.vm("broken")).unwrap();
    std::fs::write(state.vm("broken").join("spec.json"), "{").unwrap();
    let broken = only(&driver).await;
    assert_eq!(
        (broken.id.as_str(), broken.facts.status.as_str()),
        ("broken", "failed")
    );
    driver.delete("broken").await.unwrap();
    // ...and a list sweeps the rest.
    let left = std::fs::read_dir(state.vm("")).unwrap().count();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn disks_that_are_not_what_they_seem_are_refused() {
    let state = State::new();
    let driver = state.open().await;
    let dir = state.0.path().canonicalize().unwrap();
    let image = |args: &[&str]| {
        let run = Command::new("qemu-img")
            .args(args)
            .current_dir(&dir)
            .output()
            .unwrap();
        assert!(run.status.success(), "{run:?}");
    };
    image(&["create", "-q", "-f", "raw", "plain.raw", "1M"]);
    image(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "plain.raw",
        "-F",
        "raw",
        "top.qcow2",
    ]);
    image(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d.raw,data_file_raw=on",
        "data.qcow2",
        "1M",
    ]);
    for (file, format, why) in [
        ("top.qcow2", "qcow2", "backing file"),
        ("data.qcow2", "qcow2", "another file"),
        ("plain.raw", "qcow2", "not in qcow2 format"),
        ("plain.raw", "vmdk", "not qcow2 or raw"),
        ("missing.raw", "raw", "No such file"),
    ] {
        let mut wanted = spec("bad", Path::new(&dir.join(file)));
        wanted.base_format = format.into();
        let refused = driver.start(&wanted).await.unwrap_err();
        assert!(
            matches!(refused, DriverError::Failed(_)),
            "{file}: {refused}"
        );
        assert!(refused.to_string().contains(why), "{file}: {refused}");
    }
    assert!(driver.list().await.unwrap().is_empty());
}
