//! The ways to get the work done that are compared.
//!
//! Invariant: every way runs the same SQL on the same accounts, with the same changes for the same client.

use std::sync::Arc;

use crate::cpu::Process;
use crate::servers::Endpoints;
use crate::work::{Caller, Change, Failure, Work};
use crate::{broker, fastapi, interact, postgres};

/// A client's changes.
pub(crate) type Changes = Arc<[Change]>;

/// A way to get the work done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Through the broker, a session for each transaction: five unary calls.
    Session,
    /// Through the broker, in a session that is kept, committing with the last statement: two unary calls.
    Kept,
    /// Through the broker, the whole transaction in one call.
    Run,
    /// Through the broker, the statements as messages on a stream that is kept, each awaited.
    Interact,
    /// Through the broker, the statements as messages on a stream that is kept, both sent at once.
    InteractPipelined,
    /// Through PgBouncer, each step awaited.
    PgBouncer,
    /// Through PgBouncer, all steps sent at once.
    PgBouncerPipelined,
    /// Straight to PostgreSQL, a connection for each client, each step awaited.
    Direct,
    /// Straight to PostgreSQL, a connection for each client, all steps sent at once.
    DirectPipelined,
    /// Through a web service, one request for each transaction.
    FastApi,
}

impl Shape {
    /// All of them, in the order of the tables.
    pub(crate) const ALL: [Self; 10] = [
        Self::Session,
        Self::Kept,
        Self::Run,
        Self::Interact,
        Self::InteractPipelined,
        Self::PgBouncer,
        Self::PgBouncerPipelined,
        Self::Direct,
        Self::DirectPipelined,
        Self::FastApi,
    ];

    /// Its name in results.json and on the plot.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Session => "a",
            Self::Kept => "b",
            Self::Run => "c",
            Self::Interact => "d1",
            Self::InteractPipelined => "d2",
            Self::PgBouncer => "pgbouncer",
            Self::PgBouncerPipelined => "pgbouncer pipelined",
            Self::Direct => "direct",
            Self::DirectPipelined => "direct pipelined",
            Self::FastApi => "fastapi",
        }
    }

    /// What it is, for the tables.
    pub(crate) fn description(self) -> &'static str {
        match self {
            Self::Session => "broker, a: a session for each transaction",
            Self::Kept => "broker, b: Execute, Execute with commit",
            Self::Run => "broker, c: Run",
            Self::Interact => "broker, d1: Interact, each message awaited",
            Self::InteractPipelined => "broker, d2: Interact, both messages at once",
            Self::PgBouncer => "PgBouncer, each step awaited",
            Self::PgBouncerPipelined => "PgBouncer, pipelining client",
            Self::Direct => "direct, each step awaited",
            Self::DirectPipelined => "direct, pipelining client",
            Self::FastApi => "FastAPI and SQLAlchemy",
        }
    }

    /// The process between the client and PostgreSQL.
    pub(crate) fn service(self) -> Option<Process> {
        match self {
            Self::Session | Self::Kept | Self::Run | Self::Interact | Self::InteractPipelined => Some(Process::Broker),
            Self::PgBouncer | Self::PgBouncerPipelined => Some(Process::PgBouncer),
            Self::Direct | Self::DirectPipelined => None,
            Self::FastApi => Some(Process::FastApi),
        }
    }

    /// Whether this work is done differently by it than by another shape: a single statement has nothing to pipeline.
    pub(crate) fn does(self, work: Work) -> bool {
        match self {
            Self::InteractPipelined | Self::PgBouncerPipelined | Self::DirectPipelined => work == Work::Transaction,
            Self::Session
            | Self::Kept
            | Self::Run
            | Self::Interact
            | Self::PgBouncer
            | Self::Direct
            | Self::FastApi => true,
        }
    }

    /// Connects a client for each of these.
    pub(crate) async fn connect(
        self,
        endpoints: &Endpoints,
        clients: &[Changes],
    ) -> Result<Vec<Box<dyn Caller>>, Failure> {
        match self {
            Self::Session => broker::sessions(endpoints, clients).await,
            Self::Kept => broker::kept_sessions(endpoints, clients).await,
            Self::Run => broker::runs(endpoints, clients).await,
            Self::Interact => interact::streams(endpoints, clients, postgres::Steps::Awaited).await,
            Self::InteractPipelined => interact::streams(endpoints, clients, postgres::Steps::Pipelined).await,
            Self::PgBouncer => postgres::through_pgbouncer(endpoints, clients, postgres::Steps::Awaited).await,
            Self::PgBouncerPipelined => {
                postgres::through_pgbouncer(endpoints, clients, postgres::Steps::Pipelined).await
            }
            Self::Direct => postgres::direct(endpoints, clients, postgres::Steps::Awaited).await,
            Self::DirectPipelined => postgres::direct(endpoints, clients, postgres::Steps::Pipelined).await,
            Self::FastApi => fastapi::requests(endpoints, clients).await,
        }
    }
}
