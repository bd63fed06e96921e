//! `mainstay dev`.
use clap::Args;
/// Arguments of `mainstay dev`.
#[derive(Args, Debug)]
pub struct DevArgs {}
/// Run it.
pub async fn run(args: DevArgs) -> anyhow::Result<()> {
    let _ = args;
    anyhow::bail!("not yet")
}
