//! Three server processes, and agents, under a test's control.

use serde_json::Value;
use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The binary under test.
pub(crate) const BIN: &str = env!("CARGO_BIN_EXE_mainstay");

/// The binary of servers and command lines: `MAINSTAY_TEST_BINARY` names another build of it.
pub(crate) fn binary() -> String {
    std::env::var("MAINSTAY_TEST_BINARY").unwrap_or_else(|_| BIN.to_owned())
}

/// One server: its addresses outlive its process.
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) api: String,
    pub(crate) registry: String,
    pub(crate) peer: String,
    /// What the member list says instead of `peer`, if something stands before it.
    pub(crate) advertised: Option<String>,
    pub(crate) data: PathBuf,
    /// The release it runs.
    pub(crate) binary: PathBuf,
    /// Peer addresses that it is started with instead of the list; empty for a founder.
    pub(crate) join: Vec<String>,
    /// Further flags of this one.
    pub(crate) extra: Vec<String>,
    child: Option<Child>,
}

/// A cluster and its agents; everything ends with it.
pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) members: Vec<Member>,
    pub(crate) token: String,
    /// Further flags of every server.
    pub(crate) flags: Vec<&'static str>,
    /// Environment of every server, beyond the test's own.
    pub(crate) environment: Vec<(&'static str, String)>,
    /// Further environment of single servers.
    pub(crate) env: BTreeMap<usize, Vec<(OsString, OsString)>>,
    agents: Vec<(String, Child)>,
    pub(crate) client: reqwest::Client,
}

/// Below the range that the system hands out by itself: between now and the member's start nobody's
/// outgoing connection takes it. Random, so that test runs side by side do not meet; never the same twice,
/// for a member that has not started yet holds none of its own.
pub(crate) fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port =
            10_000 + (std::hash::BuildHasher::hash_one(&RandomState::new(), ()) % 22_000) as u16;
        let free = TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free && GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

impl Member {
    fn new(dir: &Path, n: usize) -> Self {
        Self {
            name: format!("c{}", n + 1),
            api: format!("127.0.0.1:{}", free_port()),
            registry: format!("127.0.0.1:{}", free_port()),
            peer: format!("127.0.0.1:{}", free_port()),
            advertised: None,
            data: dir.join(format!("c{}", n + 1)),
            binary: binary().into(),
            join: Vec::new(),
            extra: Vec::new(),
            child: None,
        }
    }

    /// Other addresses from its next start on.
    pub(crate) fn move_house(&mut self) {
        for at in [&mut self.api, &mut self.registry, &mut self.peer] {
            *at = format!("127.0.0.1:{}", free_port());
        }
    }
}

impl Cluster {
    /// Addresses and directories for members `c1`..; nothing is started.
    pub(crate) fn new(count: usize) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("mainstay-")
            .tempdir()
            .unwrap();
        let members = (0..count).map(|n| Member::new(dir.path(), n)).collect();
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(12))
            .build()
            .unwrap();
        Self {
            dir,
            members,
            token: "test-token".to_owned(),
            flags: Vec::new(),
            environment: Vec::new(),
            env: BTreeMap::new(),
            agents: Vec::new(),
            client,
        }
    }

    /// Three members, started and ready.
    pub(crate) async fn ready() -> Self {
        let mut cluster = Self::new(3);
        for n in 0..3 {
            cluster.start(n);
        }
        cluster.wait_ready(&[0, 1, 2]).await;
        cluster
    }

    /// One more member, not started, that will join through these.
    pub(crate) fn joiner(&mut self, through: &[usize]) -> usize {
        let mut member = Member::new(self.dir.path(), self.members.len());
        let urls = through.iter().map(|n| &self.members[*n].peer);
        member.join = urls.map(|peer| format!("http://{peer}")).collect();
        self.members.push(member);
        self.members.len() - 1
    }

    /// The member list as the command line takes it.
    pub(crate) fn list(&self) -> String {
        let founders = self.members.iter().filter(|m| m.join.is_empty());
        let each = founders.map(|m| {
            format!(
                "{}=http://{}",
                m.name,
                m.advertised.as_ref().unwrap_or(&m.peer)
            )
        });
        each.collect::<Vec<_>>().join(",")
    }

    /// The command that runs member `n`, for tests that want to change it.
    pub(crate) fn server_command(&self, n: usize) -> Command {
        let m = &self.members[n];
        let mut command = Command::new(&m.binary);
        command
            .args(["server", "--name", &m.name])
            .args([
                "--listen",
                &m.api,
                "--registry-listen",
                &m.registry,
                "--peer-listen",
                &m.peer,
            ])
            .args(["--cluster-token", &self.token])
            .arg("--data-dir")
            .arg(&m.data)
            .args(&self.flags)
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .envs(self.env.get(&n).into_iter().flatten().cloned())
            .args(&m.extra)
            .stdin(Stdio::null());
        if m.join.is_empty() {
            command.args(["--initial-cluster", &self.list()]);
        } else {
            command.args(["--join", &m.join.join(",")]);
        }
        command
    }

    fn log_file(&self, name: &str) -> File {
        let path = self.dir.path().join(format!("{name}.log"));
        File::options()
            .create(true)
            .append(true)
            .open(path)
            .unwrap()
    }

    /// Everything a process printed.
    pub(crate) fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Start member `n`.
    pub(crate) fn start(&mut self, n: usize) {
        let log = self.log_file(&self.members[n].name);
        let mut command = self.server_command(n);
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.members[n].child = Some(command.spawn().expect("the server starts"));
    }

    /// kill -9.
    pub(crate) fn kill(&mut self, n: usize) {
        let mut child = self.members[n].child.take().expect("the member runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Send a signal by name to the process of member `n`.
    pub(crate) fn signal(&self, n: usize, signal: &str) {
        let child = self.members[n].child.as_ref().expect("the member runs");
        let told = Command::new("kill")
            .args([format!("-{signal}"), child.id().to_string()])
            .status()
            .unwrap();
        assert!(told.success());
    }

    /// Is the process of member `n` stopped by a signal?
    pub(crate) fn paused(&self, n: usize) -> bool {
        let child = self.members[n].child.as_ref().expect("the member runs");
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        // The state stands behind the name, which may hold anything.
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('T'))
    }

    /// SIGTERM, as a service manager stops it: the member ends by itself, cleanly, within a bound.
    pub(crate) async fn stop(&mut self, n: usize) {
        let mut child = self.members[n].child.take().expect("the member runs");
        let pid = child.id().to_string();
        let told = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(told.success());
        let begin = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "a clean stop ended with {status}");
                return;
            }
            if begin.elapsed() > Duration::from_secs(20) {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("member {n} did not stop when told to");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Process id of member `n`.
    pub(crate) fn pid(&self, n: usize) -> u32 {
        let child = self.members[n].child.as_ref().expect("the member runs");
        child.id()
    }

    /// kill -9, if it has not ended by itself.
    pub(crate) fn kill_if_running(&mut self, n: usize) {
        if let Some(mut child) = self.members[n].child.take() {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    /// Has the process of member `n` ended by itself?
    pub(crate) fn exited(&mut self, n: usize) -> Option<std::process::ExitStatus> {
        self.members[n]
            .child
            .as_mut()
            .and_then(|c| c.try_wait().unwrap())
    }

    /// The process of member `n` has ended by itself, as was expected.
    pub(crate) fn reap(&mut self, n: usize) {
        let mut child = self.members[n].child.take().expect("the member ran");
        assert!(child.try_wait().unwrap().is_some(), "it still runs");
    }

    /// Is it running, as far as this test knows?
    pub(crate) fn running(&self, n: usize) -> bool {
        self.members[n].child.is_some()
    }

    /// API addresses of all members, as the command line takes them.
    pub(crate) fn endpoints(&self) -> String {
        self.members
            .iter()
            .map(|m| format!("http://{}", m.api))
            .collect::<Vec<_>>()
            .join(",")
    }

    /// Wait until `/readyz` of each of these members is 200.
    pub(crate) async fn wait_ready(&mut self, which: &[usize]) {
        for &n in which {
            let url = format!("http://{}/readyz", self.members[n].api);
            let begin = Instant::now();
            loop {
                if let Ok(answer) = self.client.get(&url).send().await
                    && answer.status() == 200
                {
                    break;
                }
                let name = self.members[n].name.clone();
                if let Some(status) = self.exited(n) {
                    panic!("{name} ended with {status}:\n{}", tail(&self.log(&name)));
                }
                let log = tail(&self.log(&name));
                assert!(
                    begin.elapsed() < Duration::from_secs(60),
                    "{name} is not ready:\n{log}"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Run the command line against all members.
    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        let mut command = Command::new(binary());
        command
            .args(args)
            .args(["--endpoints", &self.endpoints()])
            .stdin(Stdio::null());
        // Other tasks of the test, such as the links between members, must go on meanwhile.
        tokio::task::block_in_place(|| command.output()).expect("the command line runs")
    }

    /// The same, which must succeed; its standard output.
    pub(crate) fn cli_ok(&self, args: &[&str]) -> String {
        let out = self.cli(args);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.success(),
            "mainstay {args:?}: {}\n{text}{error}",
            out.status
        );
        text
    }

    /// The same with `--output json`, decoded.
    pub(crate) fn cli_json(&self, args: &[&str]) -> Value {
        let mut all = args.to_vec();
        all.extend(["--output", "json"]);
        let text = self.cli_ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?} printed {text:?}: {e}"))
    }

    /// One REST call to member `n`; the envelope's body of an OK answer, else the error text.
    pub(crate) async fn call(
        &self,
        n: usize,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<Value, String> {
        let url = format!("http://{}{path}", self.members[n].api);
        let mut request = self.client.request(method.parse().unwrap(), url);
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        let answer = request.send().await.map_err(|e| format!("{e:?}"))?;
        let status = answer.status();
        let text = answer.text().await.map_err(|e| format!("{e:?}"))?;
        let mut envelope: Value =
            serde_json::from_str(&text).map_err(|e| format!("{status} {text:?}: {e}"))?;
        if status != 200 || envelope["status"] != "OK" {
            return Err(format!(
                "{status} {}",
                envelope["message"].as_str().unwrap_or("")
            ));
        }
        Ok(envelope["body"].take())
    }

    /// Index of the leader, as soon as a running member names one that runs.
    pub(crate) async fn leader(&self) -> usize {
        let begin = Instant::now();
        loop {
            for n in (0..self.members.len()).filter(|n| self.running(*n)) {
                let Ok(list) = self.call(n, "GET", "/api/v1/members", None).await else {
                    continue;
                };
                let leads = |m: &&Value| m["is_leader"] == true;
                let Some(leader) = list.as_array().into_iter().flatten().find(leads) else {
                    continue;
                };
                let found = self
                    .members
                    .iter()
                    .position(|m| leader["name"] == m.name.as_str());
                if let Some(found) = found.filter(|f| self.running(*f)) {
                    return found;
                }
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "no leader");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Start an agent with these extra arguments; its data directory survives restarts by name.
    pub(crate) fn start_agent(&mut self, name: &str, extra: &[&str]) {
        let log = self.log_file(name);
        let mut command = Command::new(binary());
        command
            .args([
                "node",
                "join",
                &self.endpoints(),
                "--name",
                name,
                "--host",
                "127.0.0.1",
            ])
            .arg("--data-dir")
            .arg(self.dir.path().join(name))
            .args(extra)
            // How full this machine's disk is says nothing about Mainstay; a flag in `extra` goes first.
            .env("MAINSTAY_NODE_RESERVE_SPACE", "1G")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.agents
            .push((name.to_owned(), command.spawn().expect("the agent starts")));
    }

    /// kill -9 an agent.
    pub(crate) fn kill_agent(&mut self, name: &str) {
        let at = self
            .agents
            .iter()
            .position(|(n, _)| n == name)
            .expect("the agent runs");
        let (_, mut child) = self.agents.remove(at);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Processes whose command line mentions this cluster's directory: its VMs.
    pub(crate) fn vm_processes(&self) -> Vec<u32> {
        processes_naming(self.dir.path())
            .into_iter()
            .filter(|(_, line)| line.contains("qemu-system"))
            .map(|(pid, _)| pid)
            .collect()
    }
}

fn processes_naming(dir: &Path) -> Vec<(u32, String)> {
    let needle = dir.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let raw = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&raw).replace('\0', " ");
        let cwd = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        if line.contains(&needle) || cwd.starts_with(dir) {
            found.push((pid, line));
        }
    }
    found
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, child) in &mut self.agents {
            let _ = child.kill();
            let _ = child.wait();
        }
        for member in &mut self.members {
            if let Some(mut child) = member.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        for pid in self.vm_processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        if std::thread::panicking() {
            let members = self.members.iter().map(|m| m.name.as_str());
            for name in members.chain(["node1"]) {
                eprintln!("--- last lines of {name}:\n{}", tail(&self.log(name)));
            }
        }
    }
}

/// Wait until `probe` answers `Some`, at most `limit`; `what` names it in the failure.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> F,
) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(begin.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
