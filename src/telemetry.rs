//! Logs: structured events on standard error, for people on a terminal and as JSON elsewhere.
//!
//! Invariant: the driver's own log, which shows statements and parameters, stays silent whatever the level.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging. The level is RUST_LOG's, or `info`.
pub fn init() {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .from_env_lossy()
        .add_directive("tokio_postgres=off".parse().expect("it is a directive"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    if stderr().is_terminal() {
        logs.init();
    } else {
        logs.json().init();
    }
}
