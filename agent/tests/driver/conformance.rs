//! What every driver must do. Timings differ, states do not.

use base64::Engine as _;
use mainstay_agent::driver::{
    Driver, DriverError, Exec, ExecError, Executed, OUTPUT_KEPT, Plug, VmSeen, VmSpec,
};
use mainstay_agent::wire::{PortRule, Script, VmFacts};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A driver to test and what the suite cannot do through the trait.
#[async_trait::async_trait]
pub(crate) trait Rig: Sync {
    /// The driver as a freshly started agent has it. There is at most one at a time.
    async fn open(&self) -> Arc<dyn Driver>;
    /// The VM dies, unasked.
    async fn kill(&self, id: &str);
    /// A disk to start from.
    fn base(&self) -> PathBuf;
    /// A folder for what is written.
    fn scratch(&self) -> PathBuf;
}

pub(crate) fn spec(id: &str, base: &Path) -> VmSpec {
    VmSpec {
        id: id.into(),
        generation: 12,
        name: format!("vm-{id}"),
        base: base.into(),
        base_format: "qcow2".into(),
        saved: None,
        vcpu: 1,
        ram_mb: 256,
        forwards: vec![PortRule {
            name: "http".into(),
            guest_port: 80,
            host_port: 0,
        }],
        host_ip: "192.0.2.1".into(),
    }
}

pub(crate) fn script(text: &str, timeout_s: u32) -> Script {
    let body = base64::engine::general_purpose::STANDARD.encode(text);
    Script {
        body,
        monitored: true,
        timeout_s,
        ..Script::default()
    }
}

pub(crate) async fn only(driver: &dyn Driver) -> VmSeen {
    let mut seen = driver.list().await.unwrap();
    assert_eq!(seen.len(), 1, "{seen:?}");
    seen.remove(0)
}

pub(crate) async fn run_all(rig: &dyn Rig) {
    nothing_there(rig).await;
    life(rig).await;
    sudden_death(rig).await;
}

/// Verbs on what does not exist: nothing to stop or delete, nothing to talk to.
async fn nothing_there(rig: &dyn Rig) {
    let driver = rig.open().await;
    assert!(driver.list().await.unwrap().is_empty());
    driver.stop("none").await.unwrap();
    driver.delete("none").await.unwrap();
    assert!(driver.ready("none", true).await.is_err());
    assert!(driver.restart("none", 1).await.is_err());
    assert!(driver.suspend("none", &std::env::temp_dir()).await.is_err());
    assert!(
        driver
            .run_script("none", &script("exit 0", 5), OUTPUT_KEPT)
            .await
            .is_err()
    );
    no_ways(&*driver, "none").await;
    assert!(driver.console_log("none", None).await.is_err());
    for id in ["", ".hidden", "../up", "a/b", "-flag", "a b"] {
        no_ways(&*driver, id).await;
        let refused = driver.start(&spec(id, &rig.base())).await;
        assert!(
            matches!(refused, Err(DriverError::Failed(_))),
            "{id:?}: {refused:?}"
        );
    }
    assert!(driver.list().await.unwrap().is_empty());
}

async fn life(rig: &dyn Rig) {
    let driver = rig.open().await;
    let wanted = spec("life", &rig.base());
    let started = driver.start(&wanted).await.unwrap();
    assert_eq!(
        (started.status.as_str(), started.name.as_str()),
        ("running", "vm-life")
    );
    assert_eq!((started.cpu_cores, started.ram_mb), (1, 256));
    assert_eq!(started.host_ip, "192.0.2.1");
    assert_eq!(started.port_forwarding.len(), 1);
    assert_ne!(started.port_forwarding[0].host_port, 0);
    assert_eq!(
        driver.start(&wanted).await.unwrap(),
        started,
        "a second start changes nothing"
    );

    let ready = driver.ready("life", true).await.unwrap();
    assert!(!ready.ip.is_empty());
    let seen = only(&*driver).await;
    assert_eq!((seen.id.as_str(), seen.generation), ("life", 12));
    assert_eq!((&seen.facts, seen.message.as_str()), (&ready, ""));

    scripts(&*driver).await;
    ways(&*driver).await;
    let ready = restarts(&*driver, &ready).await;

    // The agent restarts: everything is as it was.
    drop(driver);
    let driver = rig.open().await;
    assert_eq!(only(&*driver).await.facts, ready);
    assert_eq!(driver.start(&wanted).await.unwrap(), ready);
    assert_eq!(driver.ready("life", true).await.unwrap(), ready);
    let again = driver
        .run_script("life", &script("echo again", 60), OUTPUT_KEPT)
        .await
        .unwrap();
    assert_eq!((again.return_code, again.stdout.as_str()), (0, "again\n"));

    driver.stop("life").await.unwrap();
    driver.stop("life").await.unwrap();
    let seen = only(&*driver).await;
    assert_eq!(seen.facts.status, "stopped", "{}", seen.message);
    assert!(!seen.message.is_empty());
    assert_eq!(
        driver.start(&wanted).await.unwrap().status,
        "stopped",
        "left as it is"
    );
    assert!(driver.ready("life", false).await.is_err());
    no_ways(&*driver, "life").await;
    exports(&*driver, &rig.scratch()).await;
    let again = driver.restart("life", 14).await.unwrap();
    assert_eq!(again.status, "running", "a stopped one is started again");
    let running = driver.export("life", &rig.scratch().join("disk")).await;
    assert!(
        matches!(running, Err(DriverError::Failed(_))),
        "{running:?}"
    );

    driver.delete("life").await.unwrap();
    assert!(driver.list().await.unwrap().is_empty());
    driver.delete("life").await.unwrap();
}

/// The same VM with another start; once for each generation.
async fn restarts(driver: &dyn Driver, before: &VmFacts) -> VmFacts {
    let again = driver.restart("life", 13).await.unwrap();
    assert_eq!(again.status, "running");
    assert_eq!(again.uuid, before.uuid);
    assert_eq!(again.created_ms, before.created_ms);
    assert_eq!(again.port_forwarding, before.port_forwarding);
    assert!(again.started_ms > before.started_ms);
    let seen = only(driver).await;
    assert_eq!((seen.generation, &seen.facts), (13, &again));
    assert_eq!(driver.restart("life", 13).await.unwrap(), again, "once");
    let ready = driver.ready("life", true).await.unwrap();
    assert_eq!(ready.started_ms, again.started_ms);
    assert!(!ready.ip.is_empty());
    ready
}

/// A stopped VM's disk, as often as it is asked for; the VM stays as it is.
async fn exports(driver: &dyn Driver, scratch: &Path) {
    let disk = scratch.join("disk");
    std::fs::write(&disk, "half of one").unwrap();
    let most = driver.export_bytes("life").await.unwrap();
    let format = driver.export("life", &disk).await.unwrap();
    assert!(["qcow2", "raw"].contains(&format.as_str()), "{format}");
    let first = std::fs::read(&disk).unwrap();
    assert!(first.len() > 4 && first != b"half of one" && most > 0);
    assert_eq!(driver.export("life", &disk).await.unwrap(), format);
    assert_eq!(std::fs::read(&disk).unwrap(), first);
    assert_eq!(only(driver).await.facts.status, "stopped");
    assert!(driver.export("none", &disk).await.is_err());
    assert!(driver.export_bytes("none").await.is_err());
}

async fn scripts(driver: &dyn Driver) {
    let good = driver
        .run_script("life", &script("echo hello\nexit 0", 60), OUTPUT_KEPT)
        .await
        .unwrap();
    assert_eq!((good.return_code, good.did_timeout), (0, false));
    assert_eq!(
        (good.stdout.as_str(), good.stderr.as_str()),
        ("hello\n", "")
    );
    let bad = driver
        .run_script("life", &script("echo no >&2\nexit 7", 60), OUTPUT_KEPT)
        .await
        .unwrap();
    assert_eq!(
        (bad.return_code, bad.stderr.as_str(), bad.did_timeout),
        (7, "no\n", false)
    );
    let begun = Instant::now();
    let slow = script("echo before\nsleep 300\necho after", 2);
    let slow = driver.run_script("life", &slow, OUTPUT_KEPT).await.unwrap();
    assert!(slow.did_timeout);
    assert_eq!(slow.stdout, "before\n");
    assert!((Duration::from_secs(2)..Duration::from_secs(100)).contains(&begun.elapsed()));
    let broken = Script {
        body: "!".into(),
        ..script("", 5)
    };
    assert!(
        driver
            .run_script("life", &broken, OUTPUT_KEPT)
            .await
            .is_err()
    );
}

/// Run a program, with so much time.
async fn run(
    driver: &dyn Driver,
    argv: &[&str],
    input: &[u8],
    seconds: u64,
    give_up: impl Future<Output = ()> + Send + 'static,
) -> Result<Executed, ExecError> {
    let exec = Exec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        input: input.to_vec(),
        within: (seconds > 0).then(|| Duration::from_secs(seconds)),
    };
    driver.exec("life", &exec, Box::pin(give_up)).await
}

/// Programs, connections, the console's log.
async fn ways(driver: &dyn Driver) {
    let never = std::future::pending;
    let said = run(driver, &["echo", "hello"], b"", 0, never()).await;
    let said = said.unwrap();
    assert_eq!((said.code, &said.stdout[..]), (0, &b"hello\n"[..]));
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    let said = run(driver, &["cat"], &bytes, 60, never()).await.unwrap();
    assert!(said.stdout == bytes && said.stderr.is_empty());
    let begun = Instant::now();
    let slow = run(driver, &["sleep", "300"], b"", 1, never())
        .await
        .unwrap();
    assert!(slow.did_timeout && slow.code != 0, "{slow:?}");
    let soon = tokio::time::sleep(Duration::from_millis(300));
    let left = run(driver, &["sleep", "300"], b"", 0, soon).await.unwrap();
    assert_ne!(left.code, 0);
    assert!(begun.elapsed() < Duration::from_secs(100));
    for plug in [Plug::Vnc, Plug::Console, Plug::Tcp(80), Plug::Tcp(81)] {
        let done = driver.connect("life", plug).await.map(drop);
        assert!(done.is_ok(), "{plug:?}: {done:?}");
    }
    let (bytes, at) = driver.console_log("life", None).await.unwrap();
    assert!(
        !bytes.is_empty(),
        "the guest's kernel or init said something"
    );
    let (more, next) = driver.console_log("life", Some(at)).await.unwrap();
    assert_eq!(next, at + more.len() as u64);
}

/// There is no way into a VM that does not run, or is not there.
async fn no_ways(driver: &dyn Driver, id: &str) {
    for plug in [Plug::Vnc, Plug::Console, Plug::Tcp(80)] {
        let refused = driver.connect(id, plug).await.map(drop);
        assert!(refused.is_err(), "{id:?} {plug:?}");
    }
    let exec = Exec {
        argv: vec!["true".to_owned()],
        ..Exec::default()
    };
    let refused = driver
        .exec(id, &exec, Box::pin(std::future::pending()))
        .await;
    assert!(
        matches!(refused, Err(ExecError::NotRun(_))),
        "{id:?} {refused:?}"
    );
}

async fn sudden_death(rig: &dyn Rig) {
    let driver = rig.open().await;
    driver.start(&spec("victim", &rig.base())).await.unwrap();
    assert_eq!(only(&*driver).await.facts.status, "running");
    rig.kill("victim").await;
    let seen = only(&*driver).await;
    assert_eq!(seen.facts.status, "failed");
    assert!(!seen.message.is_empty());
    let silent = driver.ready("victim", false).await.unwrap_err().to_string();
    assert!(silent.contains(&seen.message), "{silent}");
    assert!(
        driver
            .run_script("victim", &script("exit 0", 5), OUTPUT_KEPT)
            .await
            .is_err()
    );
    driver.stop("victim").await.unwrap();
    driver.delete("victim").await.unwrap();
    assert!(driver.list().await.unwrap().is_empty());
}
