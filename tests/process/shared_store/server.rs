//! A real S3 server for tests: SeaweedFS, which `deploy/install-deps.sh` installs as `weed`.

use crate::cluster::free_port;
use mainstay::bucket::{Access, BlobStore, S3Bucket};
use mainstay_storage::chunks::Bucket;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

pub(crate) const KEY: &str = "mainstay";
pub(crate) const SECRET: &str = "mainstay-secret";

/// The server; ends with the test.
pub(crate) struct S3Server {
    dir: tempfile::TempDir,
    ports: Vec<u16>,
    child: Option<Child>,
}

impl S3Server {
    /// Running and answering.
    pub(crate) async fn ready() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("mainstay-s3-")
            .tempdir()
            .unwrap();
        let identity = serde_json::json!({"identities": [{
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }]});
        std::fs::write(dir.path().join("s3.json"), identity.to_string()).unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let mut server = Self {
            dir,
            ports: (0..8).map(|_| free_port()).collect(),
            child: None,
        };
        server.start().await;
        server
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    pub(crate) fn place(&self, prefix: &str) -> BlobStore {
        let url = format!("s3://chunks/{prefix}");
        BlobStore::parse(&url, Some(self.endpoint()), 64 << 20).unwrap()
    }

    /// A bucket of its own under this prefix.
    pub(crate) fn bucket(&self, prefix: &str) -> Arc<dyn Bucket> {
        let access = Access {
            id: KEY.to_owned(),
            secret: SECRET.to_owned(),
        };
        Arc::new(S3Bucket::new(&self.place(prefix), &access, Handle::current()).unwrap())
    }

    /// Start it, on what is there.
    pub(crate) async fn start(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        let names = [
            "s3.port",
            "s3.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "master.port",
            "master.port.grpc",
        ];
        let mut command = Command::new("weed");
        command
            .args([
                "-logtostderr=true",
                "server",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
            ])
            .args([
                "-filer",
                "-s3",
                "-volume.max=50",
                "-master.volumeSizeLimitMB=64",
            ])
            .arg(format!("-dir={}", self.dir.path().join("data").display()))
            .arg(format!(
                "-s3.config={}",
                self.dir.path().join("s3.json").display()
            ))
            .args(
                names
                    .iter()
                    .zip(&self.ports)
                    .map(|(name, port)| format!("-{name}={port}")),
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let child = command.spawn();
        self.child = Some(child.expect("weed is there: run deploy/install-deps.sh"));
        let begin = Instant::now();
        let bucket = self.bucket("probe");
        loop {
            let bucket = Arc::clone(&bucket);
            let put = move || {
                bucket.put("probe", bytes::Bytes::from_static(b"1"))?;
                bucket.get("probe", 0..1)
            };
            match tokio::task::spawn_blocking(put).await.unwrap() {
                Ok(_) => return,
                Err(error) => {
                    let late = begin.elapsed() > Duration::from_secs(90);
                    assert!(
                        !late,
                        "the S3 server does not come up: {error}\n{}",
                        self.log()
                    );
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Sockets that it leaves behind.
    fn sockets(&self) -> Vec<PathBuf> {
        let mut sockets = Vec::new();
        for port in &self.ports {
            for kind in ["s3", "filer", "volume", "master"] {
                sockets.push(format!("/tmp/seaweedfs-{kind}-{port}.sock").into());
                sockets.push(format!("/tmp/seaweedfs-{kind}-grpc-{port}.sock").into());
            }
        }
        sockets
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for socket in self.sockets() {
            let _ = std::fs::remove_file(socket);
        }
    }
}
