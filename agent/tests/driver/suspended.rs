//! Real VMs that are suspended, and clones that go on from there: alive in a fraction of the time, each with an
//! identity of its own; booted, and said so, where the memory is of no use.

use crate::conformance::{only, script, spec};
use crate::guest;
use crate::qemu::{State, fetch_until};
use mainstay_agent::driver::qemu::QemuDriver;
use mainstay_agent::driver::{Driver, OUTPUT_KEPT, Suspended, VmSpec};
use mainstay_agent::wire::VmFacts;
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// As small as the tiny guest can do with.
const RAM_MB: u32 = 128;

/// Only in memory: a guest that has it did not boot.
const ALIVE: &str = "/tmp/alive";

async fn run(driver: &QemuDriver, id: &str, text: &str) -> String {
    let ended = driver
        .run_script(id, &script(text, 120), OUTPUT_KEPT)
        .await
        .unwrap();
    assert_eq!(ended.return_code, 0, "{text}: {ended:?}");
    ended.stdout.trim().to_owned()
}

/// A guest with a file on its disk and one in its memory, suspended; and what its start took.
async fn suspended(driver: &QemuDriver, dir: &Path) -> (Suspended, Duration) {
    let mut parent = spec("parent", &guest::tiny());
    parent.ram_mb = RAM_MB;
    let begun = Instant::now();
    driver.start(&parent).await.unwrap();
    driver.ready("parent", true).await.unwrap();
    let cold = begun.elapsed();
    run(
        driver,
        "parent",
        // And no program can be started from there.
        &format!("mount -o remount,noexec /tmp; echo yes >{ALIVE}; echo kept >/srv/www/mark"),
    )
    .await;
    std::fs::create_dir(dir).unwrap();
    let made = driver.suspend("parent", dir).await.unwrap();
    let seen = only(driver).await;
    assert_eq!(seen.facts.status, "stopped", "{}", seen.message);
    assert!(
        driver.suspend("parent", dir).await.is_err(),
        "it does not run any more"
    );
    driver.delete("parent").await.unwrap();
    (made, cold)
}

fn clone_of(made: &Suspended, id: &str) -> VmSpec {
    let mut wanted = spec(id, &made.disk);
    wanted.base_format.clone_from(&made.format);
    wanted.saved = Some(made.saved.clone());
    (wanted.vcpu, wanted.ram_mb) = (0, 0);
    wanted
}

async fn start(driver: &QemuDriver, wanted: &VmSpec) -> (VmFacts, Duration) {
    let begun = Instant::now();
    driver.start(wanted).await.unwrap();
    let facts = driver.ready(&wanted.id, true).await.unwrap();
    (facts, begun.elapsed())
}

/// What makes a guest the one it is.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone)]
struct Identity {
    host_name: String,
    machine_id: String,
    random: String,
}

async fn identity(driver: &QemuDriver, id: &str) -> Identity {
    let text =
        "hostname; cat /etc/hostname /etc/machine-id; head -c 32 /dev/urandom | md5sum; date +%s";
    let said = run(driver, id, text).await;
    let [name, stored, machine_id, random, clock] = said.lines().collect::<Vec<_>>()[..] else {
        panic!("{said}")
    };
    assert_eq!(name, stored);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let drift = now.unwrap().as_secs().abs_diff(clock.parse().unwrap());
    assert!(drift < 10, "{id}'s clock is off by {drift} s");
    Identity {
        host_name: name.to_owned(),
        machine_id: machine_id.to_owned(),
        random: random.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clones_of_a_suspended_vm_are_guests_of_their_own() {
    let state = State::new();
    let driver = state.open().await;
    let (made, cold) = suspended(&driver, &state.folder().join("made")).await;
    let wanted: Vec<_> = (0..3).map(|n| clone_of(&made, &format!("c{n}"))).collect();
    let (a, b, c) = tokio::join!(
        start(&driver, &wanted[0]),
        start(&driver, &wanted[1]),
        start(&driver, &wanted[2])
    );
    let mut identities = BTreeSet::new();
    for (wanted, (facts, took)) in wanted.iter().zip([&a, &b, &c]) {
        assert!(
            facts.accelerator.ends_with(", resumed"),
            "{}",
            facts.accelerator
        );
        assert_eq!(
            (facts.cpu_cores, facts.ram_mb),
            (1, RAM_MB),
            "as it was saved"
        );
        assert_eq!(
            run(&driver, &wanted.id, &format!("cat {ALIVE}")).await,
            "yes"
        );
        let identity = identity(&driver, &wanted.id).await;
        assert_eq!(identity.host_name, wanted.name);
        assert_eq!(identity.machine_id.len(), 32, "{identity:?}");
        identities.insert(identity);
        fetch_until(facts.port_forwarding[0].host_port, "/mark", "kept").await;
        eprintln!(
            "{}: resumed to ready in {:.2} s, booted in {:.2} s",
            wanted.id,
            took.as_secs_f64(),
            cold.as_secs_f64()
        );
        assert!(*took < cold, "three at once are slower than a boot");
    }
    for part in [
        |i: &Identity| &i.host_name,
        |i| &i.machine_id,
        |i| &i.random,
    ] as [fn(&Identity) -> &String; 3]
    {
        let parts: BTreeSet<&String> = identities.iter().map(part).collect();
        assert_eq!(parts.len(), 3, "{identities:?}");
    }
    let ports = [&a, &b, &c].map(|(facts, _)| facts.port_forwarding[0].host_port);
    assert_eq!(BTreeSet::from(ports).len(), 3);
    disks_are_sound_and_their_own(&driver).await;
    let driver = the_identity_stays(&state, driver, &wanted[0]).await;
    let (_, alone) = start(&driver, &clone_of(&made, "alone")).await;
    eprintln!("alone: resumed to ready in {:.2} s", alone.as_secs_f64());
    let next = state.folder().join("next");
    std::fs::create_dir(&next).unwrap();
    let next = driver.suspend("alone", &next).await.unwrap();
    let (new, all) = new_chunks(&made, &next);
    eprintln!("{new} of {all} chunks of the next memory are new");
    assert!(new * 2 < all, "{new} of {all} are new");
    for vm in driver.list().await.unwrap() {
        driver.delete(&vm.id).await.unwrap();
    }
}

/// A clone that is suspended in its turn shares the chunks of what it did not touch: how many of how many are new.
fn new_chunks(made: &Suspended, next: &Suspended) -> (usize, usize) {
    let chunks = |made: &Suspended| {
        let bytes = std::fs::read(&made.saved.memory).unwrap();
        let chunks = bytes.chunks(64 << 10).filter(|c| c.iter().any(|b| *b != 0));
        let names = chunks.map(|c| *blake3::hash(c).as_bytes());
        names.collect::<BTreeSet<[u8; 32]>>()
    };
    let (before, after) = (chunks(made), chunks(next));
    (after.difference(&before).count(), after.len())
}

/// What each writes comes back from its disk, past its caches, and no other has it.
async fn disks_are_sound_and_their_own(driver: &QemuDriver) {
    let write = "head -c 3000000 /dev/urandom >/var/own && md5sum </var/own && sync && echo 3 >/proc/sys/vm/drop_caches";
    let sums = [
        run(driver, "c0", write).await,
        run(driver, "c1", write).await,
    ];
    assert_ne!(sums[0], sums[1]);
    for (id, sum) in ["c0", "c1"].iter().zip(&sums) {
        assert_eq!(&run(driver, id, "md5sum </var/own").await, sum);
    }
    assert_eq!(run(driver, "c2", "ls /var").await, "log");
    for id in ["c0", "c1", "c2"] {
        let complaints = run(driver, id, "dmesg | grep -ci 'ext4.*error' || true").await;
        assert_eq!(complaints, "0");
    }
}

/// Over a restart of the agent and one of the VM, which is a boot.
async fn the_identity_stays(state: &State, driver: QemuDriver, wanted: &VmSpec) -> QemuDriver {
    let before = identity(&driver, &wanted.id).await;
    drop(driver);
    let driver = state.open().await;
    let facts = driver.ready(&wanted.id, true).await.unwrap();
    assert!(facts.accelerator.ends_with(", resumed"));
    let after = identity(&driver, &wanted.id).await;
    assert_eq!(
        (&after.host_name, &after.machine_id),
        (&before.host_name, &before.machine_id)
    );
    driver.restart(&wanted.id, 13).await.unwrap();
    let facts = driver.ready(&wanted.id, true).await.unwrap();
    assert!(
        !facts.accelerator.contains("resumed"),
        "{}",
        facts.accelerator
    );
    let alive = run(&driver, &wanted.id, &format!("ls {ALIVE} 2>&1 || true")).await;
    assert!(alive.contains("No such"), "{alive}");
    let after = identity(&driver, &wanted.id).await;
    assert_eq!(
        (after.host_name, after.machine_id),
        (before.host_name, before.machine_id)
    );
    driver
}

/// A copy of what was suspended, to be spoilt.
fn copy(made: &Suspended, to: &Path) -> Suspended {
    std::fs::create_dir(to).unwrap();
    let mut made = made.clone();
    for (path, name) in [
        (&mut made.saved.memory, "memory"),
        (&mut made.saved.machine, "machine.json"),
    ] {
        let new: PathBuf = to.join(name);
        std::fs::copy(&*path, &new).unwrap();
        *path = new;
    }
    made
}

fn edit(made: &Suspended, member: &str, value: impl Into<serde_json::Value>) {
    let bytes = std::fs::read(&made.saved.machine).unwrap();
    let mut machine: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert!(!machine[member].is_null());
    machine[member] = value.into();
    std::fs::write(&made.saved.machine, machine.to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_that_is_of_no_use_is_booted_and_that_is_said() {
    let state = State::new();
    let driver = state.open().await;
    let dir = state.folder();
    let (made, _) = suspended(&driver, &dir.join("made")).await;
    let spoilt = |name: &str| copy(&made, &dir.join(name));
    let other_qemu = spoilt("qemu");
    edit(&other_qemu, "qemu", "QEMU emulator version 1.0");
    let truncated = spoilt("truncated");
    let file = std::fs::File::options()
        .write(true)
        .open(&truncated.saved.memory)
        .unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let damaged = spoilt("damaged");
    let file = std::fs::File::options()
        .write(true)
        .open(&damaged.saved.memory)
        .unwrap();
    file.write_all_at(b"no page of this guest", 40 << 20)
        .unwrap();
    // Damaged, and described as if it were not: only QEMU notices.
    let nonsense = spoilt("nonsense");
    let file = std::fs::File::options()
        .write(true)
        .open(&nonsense.saved.memory)
        .unwrap();
    file.write_all_at(&[0xaa; 300], 0).unwrap();
    let bytes = std::fs::read(&nonsense.saved.memory).unwrap();
    edit(
        &nonsense,
        "blake3",
        blake3::hash(&bytes).to_hex().to_string(),
    );
    let other_disk = spoilt("disk");
    edit(&other_disk, "disk", "0".repeat(64));
    let garbage = spoilt("garbage");
    edit(&garbage, "ram_mb", 4_000_000_000_u32);
    let more = made.clone();
    for (id, made, why) in [
        (
            "qemu",
            &other_qemu,
            "it was saved with a QEMU \"QEMU emulator version 1.0\"",
        ),
        ("disk", &other_disk, "it was saved with another disk"),
        ("garbage", &garbage, "4000000000 MB of memory in"),
        ("truncated", &truncated, "its memory has"),
        ("damaged", &damaged, "its memory is damaged"),
        ("nonsense", &nonsense, "QEMU cannot load its memory"),
        (
            "larger",
            &more,
            "a memory of MB \"128\", here it is \"160\"",
        ),
    ] {
        let mut wanted = clone_of(made, id);
        if id == "larger" {
            wanted.ram_mb = 160;
        }
        let (facts, _) = start(&driver, &wanted).await;
        assert!(
            facts.accelerator.contains("booted cold"),
            "{id}: {}",
            facts.accelerator
        );
        assert!(
            facts.accelerator.contains(why),
            "{id}: {}",
            facts.accelerator
        );
        let left = run(
            &driver,
            id,
            &format!("cat /srv/www/mark; ls {ALIVE} 2>/dev/null || echo booted"),
        )
        .await;
        assert_eq!(left, "kept\nbooted", "{id}");
        assert_eq!(identity(&driver, id).await.host_name, wanted.name);
        fetch_until(facts.port_forwarding[0].host_port, "/mark", "kept").await;
        driver.delete(id).await.unwrap();
    }
}

/// The agent dies while a clone comes to life, at many points; the next one brings it there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_while_a_vm_is_resumed_leaves_nothing_odd() {
    let state = State::new();
    let mut driver = state.open().await;
    let (made, _) = suspended(&driver, &state.folder().join("made")).await;
    for after_ms in [0, 10, 30, 60, 100, 200, 400] {
        let wanted = clone_of(&made, &format!("after-{after_ms}"));
        let begun = start(&driver, &wanted);
        let ended = tokio::time::timeout(Duration::from_millis(after_ms), begun).await;
        drop(driver);
        driver = state.open().await;
        // What is there is running, or never was; in either case a start is right.
        for vm in driver.list().await.unwrap() {
            assert_eq!(vm.facts.status, "running", "{after_ms} ms: {}", vm.message);
        }
        let (facts, _) = start(&driver, &wanted).await;
        assert!(
            facts.accelerator.ends_with(", resumed"),
            "{after_ms} ms: {}",
            facts.accelerator
        );
        assert_eq!(
            run(
                &driver,
                &wanted.id,
                &format!("cat {ALIVE} && md5sum /etc/machine-id >/dev/null")
            )
            .await,
            "yes"
        );
        assert_eq!(
            identity(&driver, &wanted.id).await.host_name,
            wanted.name,
            "{after_ms} ms, {}",
            ended.is_ok()
        );
        driver.delete(&wanted.id).await.unwrap();
        assert!(driver.list().await.unwrap().is_empty());
    }
}
