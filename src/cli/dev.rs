//! `mainstay dev`: three members and one node as child processes on loopback, a demo template pushed.
//! Uses the public command line only: what it does, an operator can do by hand.

use super::client::ApiClient;
use super::table::line;
use anyhow::{Context, bail};
use clap::Args;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// Longest wait for three members to be ready: they sync to disk a few dozen times.
const READY_MAX: Duration = Duration::from_secs(60);
/// Longest wait for the VMs to end before the processes do.
const VMS_END_SECONDS: &str = "30";
/// Longest wait for a process to end after SIGTERM; a member takes 10 s at most.
const END_MAX: Duration = Duration::from_secs(12);
/// Between two looks.
const POLL: Duration = Duration::from_millis(100);
/// Distance between the ports of two members.
const PORT_STEP: u16 = 100;
/// Name of the template.
const TEMPLATE: &str = "demo";

/// Arguments of `mainstay dev`.
#[derive(Args, Debug)]
pub struct DevArgs {
    /// Everything is kept here; a second run goes on with it
    #[arg(long, default_value = "mainstay-dev")]
    dir: PathBuf,
    /// API port of the first member; the others follow at +100 and +200
    #[arg(long, default_value_t = crate::config::API_PORT)]
    port: u16,
    /// Disk of the demo template (qcow2) [default: built by guest/build.sh when run in a source tree]
    #[arg(long, env = "MAINSTAY_DEMO_DISK")]
    disk: Option<PathBuf>,
    /// What runs the VMs: qemu, or fake where there is no QEMU
    #[arg(long)]
    driver: Option<String>,
}

/// Run the cloud until Ctrl-C.
pub async fn run(args: DevArgs) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.dir)
        .with_context(|| format!("cannot create {}", args.dir.display()))?;
    let mut cloud = Cloud::new(&args)?;
    let mut stop = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let ended = tokio::select! {
        ended = cloud.bring_up(&args) => ended,
        _ = stop.recv() => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    line("stopping")?;
    cloud.stop().await;
    ended
}

struct Cloud {
    binary: PathBuf,
    dir: PathBuf,
    ports: [u16; 3],
    children: Vec<(String, Child)>,
}

impl Cloud {
    fn new(args: &DevArgs) -> anyhow::Result<Self> {
        let last = args.port.checked_add(2 * PORT_STEP + 1);
        if args.port < 2 || last.is_none() {
            bail!("--port {} leaves no room for the other ports", args.port);
        }
        Ok(Self {
            binary: std::env::current_exe().context("cannot find this program's own file")?,
            dir: std::path::absolute(&args.dir)?,
            ports: [args.port, args.port + PORT_STEP, args.port + 2 * PORT_STEP],
            children: Vec::new(),
        })
    }

    fn urls(&self) -> Vec<String> {
        self.ports
            .iter()
            .map(|port| format!("http://127.0.0.1:{port}"))
            .collect()
    }

    fn endpoints(&self) -> String {
        self.urls().join(",")
    }

    async fn bring_up(&mut self, args: &DevArgs) -> anyhow::Result<()> {
        self.start_members()?;
        self.wait_ready().await?;
        line(&format!("three members are ready: {}", self.endpoints()))?;
        self.start_node(args.driver.as_deref())?;
        match disk(args, &self.dir).await? {
            Some(disk) => self.push(&disk).await?,
            None => line("no template was pushed: give --disk DISK.qcow2")?,
        }
        line(&format!(
            "\ntry, in another terminal:\n  export MAINSTAY_ENDPOINTS={}\n  mainstay status\n  mainstay instance start {TEMPLATE} --wait\n  mainstay instance list\n  kill -9 {}    # the process of member c1; everything goes on\n\nCtrl-C stops all of it; logs are in {}",
            self.endpoints(),
            self.children
                .first()
                .and_then(|(_, child)| child.id())
                .unwrap_or_default(),
            self.dir.display()
        ))?;
        self.watch().await
    }

    fn start_members(&mut self) -> anyhow::Result<()> {
        let each = (1..).zip(self.ports);
        let list = each.map(|(n, port)| format!("c{n}=http://127.0.0.1:{}", port + 1));
        let list = list.collect::<Vec<_>>().join(",");
        for (n, port) in (1..).zip(self.ports) {
            let name = format!("c{n}");
            let mut command = self.command();
            command.args(["server", "--name", &name, "--initial-cluster", &list]);
            for (flag, at) in [
                ("--listen", port),
                ("--registry-listen", port - 1),
                ("--peer-listen", port + 1),
            ] {
                command.args([flag, &format!("127.0.0.1:{at}")]);
            }
            command.arg("--data-dir").arg(self.dir.join(&name));
            self.spawn(&name, command)?;
        }
        Ok(())
    }

    fn start_node(&mut self, driver: Option<&str>) -> anyhow::Result<()> {
        let mut command = self.command();
        command.args([
            "node",
            "join",
            &self.endpoints(),
            "--name",
            "node1",
            "--host",
            "127.0.0.1",
        ]);
        command.arg("--data-dir").arg(self.dir.join("node1"));
        if let Some(driver) = driver {
            command.args(["--driver", driver]);
        }
        self.spawn("node1", command)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        // A group of their own: Ctrl-C is ours, the children end in order.
        command
            .stdin(Stdio::null())
            .process_group(0)
            .kill_on_drop(true);
        // What the caller's shell says to clients and servers is not meant for these.
        for name in ["NAME", "CONFIG", "INITIAL_CLUSTER", "DATA_DIR", "ENDPOINTS"] {
            command.env_remove(format!("MAINSTAY_{name}"));
        }
        command
    }

    fn spawn(&mut self, name: &str, mut command: Command) -> anyhow::Result<()> {
        let path = self.dir.join(format!("{name}.log"));
        let log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        let child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        self.children.push((name.to_owned(), child));
        Ok(())
    }

    async fn wait_ready(&mut self) -> anyhow::Result<()> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(3))
            .build()?;
        let until = Instant::now() + READY_MAX;
        for port in self.ports {
            let url = format!("http://127.0.0.1:{port}/readyz");
            while !http
                .get(&url)
                .send()
                .await
                .is_ok_and(|answer| answer.status() == 200)
            {
                self.check()?;
                if Instant::now() > until {
                    bail!(
                        "{url} is not ready after {READY_MAX:?}: see {}",
                        self.dir.display()
                    );
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Fails if a process has ended that should not have.
    fn check(&mut self) -> anyhow::Result<()> {
        for (name, child) in &mut self.children {
            if let Some(status) = child.try_wait()? {
                let path = self.dir.join(format!("{name}.log"));
                bail!(
                    "{name} ended ({status}); the end of {}:\n{}",
                    path.display(),
                    tail(&path)
                );
            }
        }
        Ok(())
    }

    async fn push(&self, disk: &Path) -> anyhow::Result<()> {
        let client = ApiClient::new(&self.urls())?;
        let templates: Vec<Value> = client.get("/api/v1/registry/vm?apiVer=v1").await?;
        if templates
            .iter()
            .any(|template| template["name"] == TEMPLATE)
        {
            return Ok(());
        }
        let mut command = self.command();
        command.args([
            "template",
            "push",
            TEMPLATE,
            "--tag",
            "v1",
            "--endpoints",
            &self.endpoints(),
        ]);
        let status = command.arg("--disk").arg(disk).status().await?;
        if !status.success() {
            bail!("the template {TEMPLATE} could not be pushed");
        }
        Ok(())
    }

    /// Until something ends: say so, once; a killed member is part of the play.
    async fn watch(&mut self) -> anyhow::Result<()> {
        loop {
            tokio::time::sleep(POLL).await;
            let mut gone = Vec::new();
            for (name, child) in &mut self.children {
                if let Some(status) = child.try_wait()? {
                    gone.push(name.clone());
                    line(&format!("{name} ended ({status})"))?;
                }
            }
            self.children.retain(|(name, _)| !gone.contains(name));
            if self.children.is_empty() {
                bail!(
                    "every process has ended: see the logs in {}",
                    self.dir.display()
                );
            }
        }
    }

    /// End the VMs, then the node, then the members.
    async fn stop(&mut self) {
        if let Err(e) = self.end_vms().await {
            line(&format!("VMs may still run: {e:#}")).ok();
        }
        while let Some((name, mut child)) = self.children.pop() {
            if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok())
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
            {
                rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
            }
            // The members side by side: each would wait for another to take its lead.
            if name == "node1" || self.children.is_empty() {
                tokio::time::timeout(END_MAX, child.wait()).await.ok();
            } else {
                tokio::spawn(async move { tokio::time::timeout(END_MAX, child.wait()).await });
            }
        }
    }

    async fn end_vms(&self) -> anyhow::Result<()> {
        let client = ApiClient::new(&self.urls())?;
        let live: Vec<Value> =
            tokio::time::timeout(Duration::from_secs(5), client.get("/api/v1/vm")).await??;
        let live = live.iter().map(|wrapper| &wrapper["vm"]);
        let live = live.filter(|vm| vm["instance_state"] != "Terminated");
        let ids: Vec<_> = live.filter_map(|vm| vm["instance_id"].as_str()).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let mut command = self.command();
        command.args(["instance", "terminate"]).args(ids);
        command.args([
            "--wait",
            "--timeout",
            VMS_END_SECONDS,
            "--endpoints",
            &self.endpoints(),
        ]);
        let status = command.stdout(Stdio::null()).status().await?;
        if !status.success() {
            bail!("not every VM ended in {VMS_END_SECONDS} s");
        }
        Ok(())
    }
}

/// The template's disk: given, built before, or built now.
async fn disk(args: &DevArgs, dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    if let Some(disk) = &args.disk {
        if !disk.exists() {
            bail!("--disk {} is not there", disk.display());
        }
        return Ok(Some(disk.clone()));
    }
    let built = dir.join("guest.qcow2");
    if built.exists() {
        return Ok(Some(built));
    }
    if !Path::new("guest/build.sh").exists() {
        return Ok(None);
    }
    line("building the demo guest")?;
    let status = Command::new("guest/build.sh").arg(&built).status().await?;
    if !status.success() {
        bail!("guest/build.sh could not build the demo guest");
    }
    Ok(Some(built))
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}
