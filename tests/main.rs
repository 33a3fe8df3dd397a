//! The integration tests: one binary, a module for each subject.
//!
//! Promises about PostgreSQL are tested on a real one, started for the run; promises about time and cancellation on a
//! fake engine with a paused clock.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fake_engine;
mod proxy;
mod support;

mod layers;

mod sessions;

mod batches;
mod repeats;
mod run;
mod savepoints;
mod transactions;

mod bad_input;

mod bulk;
mod catalogs;
mod packed;
mod streams;
mod types;
mod values;

mod attach;
mod attach_times;
mod cancel;
mod dropped_calls;
mod interact;
mod leases;

mod notifications;

mod profiles;

mod admin;
mod operations;

mod acceptor;
mod cancel_network;
mod connect_options;
mod identity;
mod pool;
mod weather;

mod backends;
mod ledger;
mod lost_answers;

#[cfg(target_os = "linux")]
mod hostile;
mod secrets;
mod telemetry;
mod trust;

mod abandoned;
mod chart;
mod cli;
mod command_line;
mod python;
mod python_client;
#[cfg(target_os = "linux")]
mod wall_clock;
