//! PostgreSQL behind the domain's port: engines, their pools, connections, values.
//!
//! The only place that says tokio_postgres or deadpool; it knows no tonic and no prost.

mod array_literal;
mod text_form;
pub mod value;

mod error;
mod net;
pub mod options;
mod tls;
mod wire;

mod begin;
mod blockers;
mod cancel;
mod connection;
mod listener;
mod opener;
mod outcome;
mod pool;

pub mod engine;
