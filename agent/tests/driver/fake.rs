//! The fake passes the suite, and fails on demand.

use crate::conformance::{self, Rig, spec};
use mainstay_agent::driver::fake::{FakeConfig, FakeDriver, Verb};
use mainstay_agent::driver::{Driver, DriverError};
use parking_lot::Mutex;
use std::path::{Path, PathBuf};
use std::sync::Arc;

struct FakeRig {
    file: PathBuf,
    driver: Mutex<Option<Arc<FakeDriver>>>,
}

#[async_trait::async_trait]
impl Rig for FakeRig {
    async fn open(&self) -> Arc<dyn Driver> {
        let config = FakeConfig {
            file: Some(self.file.clone()),
            ..FakeConfig::default()
        };
        let driver = Arc::new(FakeDriver::open(config).unwrap());
        *self.driver.lock() = Some(driver.clone());
        driver
    }

    async fn kill(&self, id: &str) {
        self.driver.lock().as_ref().unwrap().kill(id).unwrap();
    }

    fn base(&self) -> PathBuf {
        "/none".into()
    }

    fn scratch(&self) -> PathBuf {
        self.file.parent().unwrap().to_owned()
    }
}

#[tokio::test]
async fn the_fake_is_a_driver() {
    let dir = tempfile::tempdir().unwrap();
    let rig = FakeRig {
        file: dir.path().join("vms.json"),
        driver: Mutex::default(),
    };
    conformance::run_all(&rig).await;
}

#[tokio::test]
async fn it_fails_on_demand_and_only_once() {
    let driver = FakeDriver::open(FakeConfig::default()).unwrap();
    let wanted = spec("a", Path::new("/none"));
    driver.fail_next(Verb::Start, DriverError::Busy("no memory".into()));
    assert!(matches!(
        driver.start(&wanted).await,
        Err(DriverError::Busy(_))
    ));
    driver.start(&wanted).await.unwrap();
}

#[tokio::test]
async fn ports_and_capacity_are_scarce() {
    let config = FakeConfig {
        capacity: 2,
        ..FakeConfig::default()
    };
    let driver = FakeDriver::open(config).unwrap();
    let start = async |id: &str, host_port: u16| {
        let mut wanted = spec(id, Path::new("/none"));
        wanted.forwards[0].host_port = host_port;
        driver.start(&wanted).await
    };
    let first = start("a", 0).await.unwrap().port_forwarding[0].host_port;
    assert!(matches!(start("b", first).await, Err(DriverError::Busy(_))));
    start("b", 0).await.unwrap();
    assert!(matches!(start("c", 0).await, Err(DriverError::Busy(_))));
    driver.stop("a").await.unwrap();
    driver.delete("a").await.unwrap();
    start("c", first).await.unwrap();
}

#[tokio::test]
async fn clones_of_a_suspended_vm_need_no_boot() {
    let config = FakeConfig {
        boot_delay: std::time::Duration::from_secs(3600),
        ..FakeConfig::default()
    };
    let driver = FakeDriver::open(config).unwrap();
    let dir = tempfile::tempdir().unwrap();
    driver.start(&spec("a", Path::new("/none"))).await.unwrap();
    let made = driver.suspend("a", dir.path()).await.unwrap();
    assert!(
        driver.suspend("a", dir.path()).await.is_err(),
        "it does not run"
    );
    let mut clone = spec("b", &made.disk);
    clone.saved = Some(made.saved.clone());
    driver.start(&clone).await.unwrap();
    let ready = driver.ready("b", true).await.unwrap();
    assert_eq!(ready.accelerator, "fake, resumed");
    std::fs::write(&made.saved.machine, "{}").unwrap();
    clone.id = "c".into();
    let started = driver.start(&clone).await.unwrap();
    assert!(started.accelerator.contains("booted cold"));
}
