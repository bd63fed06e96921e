//! `mainstay bench fetch` and `serve-file`: how long a whole answer takes, and its yardstick, the same bytes from memory
//! through the same server stack.

use super::load::{Client, Link, Target, host_of};
use crate::descriptors;
use crate::listen::{self, Door};
use anyhow::{Context, bail};
use axum::Router;
use bytes::Bytes;
use clap::Args;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use std::path::PathBuf;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Arguments of `mainstay bench serve-file`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The file, a gzip one: the answer says so.
    pub file: PathBuf,
    /// Address.
    #[arg(long)]
    pub listen: String,
}

/// Serve it for ever.
pub(super) async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let bytes = tokio::fs::read(&args.file).await;
    let bytes = Bytes::from(bytes.with_context(|| format!("read {}", args.file.display()))?);
    let heads = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CONTENT_ENCODING, "gzip"),
    ];
    let router = Router::new().fallback(move || std::future::ready((heads, bytes.clone())));
    let listener = TcpListener::bind(&args.listen).await;
    let listener = listener.with_context(|| format!("listen on {}", args.listen))?;
    let connections = descriptors::connections()?.api;
    let (_open, stop) = watch::channel(false);
    listen::serve(listener, Door::new(router), false, connections, stop).await;
    Ok(())
}

/// One path of all endpoints.
#[derive(Debug)]
pub(super) struct Fetch {
    hosts: Vec<String>,
    path: String,
}

/// One kept-alive connection.
#[derive(Debug)]
pub(super) struct Fetcher {
    link: Link,
    host: String,
    path: String,
}

impl Fetch {
    /// `path` with its query.
    pub(super) fn new(endpoints: &[String], path: &str) -> anyhow::Result<Self> {
        let hosts = endpoints.iter().map(|e| host_of(e));
        Ok(Self {
            hosts: hosts.collect::<anyhow::Result<Vec<_>>>()?,
            path: path.to_owned(),
        })
    }
}

impl Target for Fetch {
    type Client = Fetcher;
    async fn connect(&self, n: usize) -> anyhow::Result<Fetcher> {
        let host = self.hosts[n % self.hosts.len()].clone();
        Ok(Fetcher {
            link: Link::open(&host).await?,
            host,
            path: self.path.clone(),
        })
    }
    fn objects(&self) -> usize {
        1
    }
}

impl Client for Fetcher {
    async fn write(&mut self, _: usize, _: u64) -> anyhow::Result<()> {
        bail!("a fetch writes nothing");
    }
    /// All of it; not unpacked, for that would be the client's time.
    async fn read(&mut self, _: usize) -> anyhow::Result<()> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(&self.path)
            .header(header::HOST, &self.host)
            .header(header::ACCEPT_ENCODING, "gzip")
            .body(Full::default())?;
        let mut body = self.link.request(request).await?;
        while let Some(frame) = body.frame().await {
            frame?;
        }
        Ok(())
    }
}
