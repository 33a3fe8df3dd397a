//! Logs: structured events on standard error, for people on a terminal and as JSON elsewhere.
//!
//! Invariant: nothing listens to the `log` crate, through which the driver shows statements and parameters.

use std::backtrace::Backtrace;
use std::io::{IsTerminal, stderr};
use std::panic;

use tracing::error;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging, panics among it. The level is RUST_LOG's, or `info`.
pub fn init() {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    if stderr().is_terminal() {
        logs.init();
    } else {
        logs.json().init();
    }
    // What a panic says may hold a value; where it was, and who it was that died, is enough to find it.
    panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        let backtrace = Backtrace::capture();
        error!(location, %backtrace, "panic");
    }));
}
