//! `mainstay bench`: the load tool behind every published figure. Each client is one kept-alive
//! connection that sends the next request when the last one is answered (closed loop); it drives a
//! Mainstay cluster over its REST API, or an etcd cluster over gRPC, with the same loop, so that both
//! sides see the same client.
//!
//! It knows how to send load and how to count; it starts nothing and judges nothing.

use super::fetch::{self, Fetch, ServeArgs};
use super::fleet::{self, FleetArgs};
use super::load::{Etcd, Load, Rest, Summary, Target};
use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use std::time::Duration;

/// Arguments of `mainstay bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub work: Work,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Work {
    /// Committed durable writes of 256 bytes: metadata updates of instances, or etcd puts.
    Writes(LoadArgs),
    /// Linearizable reads by id: instances, or etcd keys.
    Reads(LoadArgs),
    /// Whole answers to `GET` of one path, compressed.
    Fetch {
        /// The path, with its query.
        #[arg(long, default_value = "/api/v1/vm")]
        path: String,
        /// How much load.
        #[command(flatten)]
        load: LoadArgs,
    },
    /// Serve one file from memory at any path, as a member serves its answers: what `fetch` is held against.
    ServeFile(ServeArgs),
    /// Placements: instances of a template on simulated nodes, which speak the agents' protocol and run no VM.
    Schedule(FleetArgs),
}

/// How much load.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Concurrent clients, spread over the endpoints.
    #[arg(long, default_value_t = 16)]
    pub clients: usize,
    /// Seconds that count.
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// Seconds before that, which do not count.
    #[arg(long, default_value_t = 1)]
    pub warmup: u64,
    /// Distinct instances or keys.
    #[arg(long, default_value_t = 256)]
    pub objects: usize,
    /// Bytes of each value.
    #[arg(long, default_value_t = 256)]
    pub value_bytes: usize,
    /// What runs at the endpoints.
    #[arg(long, value_enum, default_value_t = Against::Mainstay)]
    pub against: Against,
    /// Add what was done in each tenth of a second (JSON only)
    #[arg(long)]
    pub timeline: bool,
    /// Template whose instances are updated (Mainstay only); see `mainstay template push`.
    #[arg(long, default_value = "bench")]
    pub template: String,
}

/// The system under load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Against {
    /// A Mainstay cluster; endpoints are API addresses.
    Mainstay,
    /// An etcd cluster; endpoints are client addresses.
    Etcd,
}

/// Run the load and print one line (or a JSON object) of figures.
pub async fn run(args: BenchArgs, endpoints: &[String], as_json: bool) -> anyhow::Result<()> {
    let (kind, load) = match args.work {
        Work::Writes(load) => ("writes", load),
        Work::Reads(load) => ("reads", load),
        Work::Fetch { path, load } => return fetch(&path, &load, endpoints, as_json).await,
        Work::ServeFile(args) => return fetch::serve(args).await,
        Work::Schedule(args) => return fleet::run(args, endpoints, as_json).await,
    };
    if endpoints.is_empty() || load.clients == 0 || load.objects == 0 {
        bail!("bench needs at least one endpoint, one client and one object");
    }
    let plan = load.plan();
    let mut summary = match load.against {
        Against::Mainstay => {
            let target = Rest::prepare(endpoints, &load.template, load.objects, load.value_bytes)
                .await
                .context("prepare instances for the load")?;
            drive(kind, plan, target).await?
        }
        Against::Etcd => {
            let target = Etcd::prepare(endpoints, load.objects, load.value_bytes)
                .await
                .context("prepare keys for the load")?;
            drive(kind, plan, target).await?
        }
    };
    print(kind, &load, &mut summary, as_json);
    ended(summary)
}

async fn fetch(
    path: &str,
    load: &LoadArgs,
    endpoints: &[String],
    as_json: bool,
) -> anyhow::Result<()> {
    if endpoints.is_empty() || load.clients == 0 {
        bail!("bench fetch needs at least one endpoint and one client");
    }
    let target = Fetch::new(endpoints, path)?;
    let mut summary = drive("fetch", load.plan(), target).await?;
    print("fetch", load, &mut summary, as_json);
    ended(summary)
}

impl LoadArgs {
    fn plan(&self) -> Load {
        Load {
            clients: self.clients,
            warmup: Duration::from_secs(self.warmup),
            counted: Duration::from_secs(self.seconds.max(1)),
        }
    }
}

/// A run in which nothing succeeded has failed.
fn ended(summary: Summary) -> anyhow::Result<()> {
    if summary.done == 0 {
        bail!(
            "not one request succeeded; first error: {}",
            summary.first_error.unwrap_or_default()
        );
    }
    Ok(())
}

async fn drive<T: Target>(kind: &str, plan: Load, target: T) -> anyhow::Result<Summary> {
    plan.run(target, kind == "writes").await
}

#[allow(clippy::print_stdout)] // the command's result
fn print(kind: &str, load: &LoadArgs, s: &mut Summary, as_json: bool) {
    let (against, clients) = (load.against, load.clients);
    if as_json {
        let mut line = json!({
            "work": kind, "against": format!("{against:?}").to_lowercase(), "clients": clients,
            "done": s.done, "failed": s.failed, "all": s.all,
            "seconds": s.seconds, "per_second": s.per_second(), "begin_unix_ms": s.begin_unix_ms,
            "p50_ms": s.quantile_ms(0.50), "p99_ms": s.quantile_ms(0.99), "max_ms": s.quantile_ms(1.0),
            "longest_gap_ms": s.longest_gap.as_secs_f64() * 1e3, "first_error": s.first_error,
        });
        if load.timeline {
            // [done, p99 ms, max ms] of each slice.
            let slices = s.slices.iter_mut().map(|slice| json!(slice.figures()));
            line["slices"] = slices.collect();
        }
        println!("{line}");
    } else {
        println!(
            "{kind} {against:?} clients={clients} {:.0}/s p50={:.2} ms p99={:.2} ms max={:.2} ms failed={}",
            s.per_second(),
            s.quantile_ms(0.50),
            s.quantile_ms(0.99),
            s.quantile_ms(1.0),
            s.failed
        );
    }
}
