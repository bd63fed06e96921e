//! `mainstay server`: sets up the log and hands over to [`crate::server`].

use crate::config::{LogFormat, ServerArgs};
use crate::server;
use mainstay_raft::LOG_FILTER;
use tracing_subscriber::EnvFilter;

/// Run one member until it is told to stop.
pub async fn run(args: ServerArgs) -> anyhow::Result<()> {
    let config = args.resolve()?;
    log(config.log_format);
    server::run(config).await
}

/// Log to standard error; `RUST_LOG` says how much.
fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(format!("info,{LOG_FILTER},sled=warn")));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}
