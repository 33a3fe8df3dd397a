//! Logs: structured events on standard error, for people on a terminal and as JSON elsewhere.
//!
//! Invariant: nothing listens to the `log` crate, through which the driver shows statements and parameters.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging. The level is RUST_LOG's, or `info`.
pub fn init() {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    if stderr().is_terminal() {
        logs.init();
    } else {
        logs.json().init();
    }
}
