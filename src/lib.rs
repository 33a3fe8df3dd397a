//! A gRPC session broker for PostgreSQL: the map of the house.
//!
//! It lends PostgreSQL sessions to programs in any language: begin one, run statements, commit or roll back, close; and it
//! runs whole transactions in one call.
//!
//! ```text
//!            callers                                  operators
//!               │ TCP, TLS, Unix sockets                  │ signals, probes, cli
//!   ┌───────────▼─────────────┐                           │
//!   │ acceptor                │                           │
//!   ├─────────────────────────┤                ┌──────────▼─────────┐
//!   │ grpc    gate ─▶ service │◀───────────────│ server    config   │
//!   │   │     convert  status │                │ telemetry dev main │
//!   │   └──▶ identity         │                └──────────┬─────────┘
//!   └───────────┬─────────────┘                           │
//!   ┌───────────▼─────────────────────────────────────┐   │
//!   │ broker  registry ─▶ session ─▶ transaction task │   │
//!   │         reaper ──────▲ ▲ run    │ engine (port) │   │
//!   └─────────────────────────────────┼───────────────┘   │
//!   ┌─────────────────────────────────▼───────────────┐   │
//!   │ postgres  engine ─▶ pool (deadpool) ─▶ opener   │◀──┘
//!   │           connection  outcome  cancel  wire ... │
//!   └─────────────────────────────────┬───────────────┘
//!                                     ▼ PostgreSQL
//! ```
//!
//! The way of one Execute, six rooms, no turning back: `grpc::gate` knows who calls and whether there is room,
//! `grpc::service` decodes, `broker::registry` finds the session
//! or why it ended, `broker::session` suspends the lease and waits for the turn, `broker::transaction` owns the
//! connection and the deadline, `postgres::connection` runs the statement and reads the rows. Results of any size and
//! COPY take the same way part by part, through `broker::stream` and `broker::bulk`, and the calls of a session on one
//! stream message by message, through `grpc::interact`; notifications have a connection of
//! their own, in `postgres::listener`. Connections come in through `acceptor`, accepted, encrypted and limited, before
//! anything is said over them.
//!
//! `identity` tells who calls: by a bearer token, static or a JWT, or by a client certificate; `broker::grant` what they may
//! do, and `broker::account` how much of it they do. Who is named by no grant may do nothing.
//!
//! `operations` is the port beside it, in HTTP: probes, metrics, and a console in which operators watch.
//!
//! `cli` is the other side: it calls a running broker for people, through `grpc::client`.
//!
//! One word per idea, here as in the protocol: an *engine* is a configured PostgreSQL target; a *session* is a caller's
//! leased context and owns no connection; a *transaction* is a task that owns one *connection*; a *lease* is granted,
//! renewed, expires, and its session is reaped; a *principal* is a caller that is known, and has a *grant*; a *profile* is a named set of limits and timeouts that sessions live by,
//! with *classes* of statements in it; an ended session leaves a *tombstone* that says why; a connection is
//! *released* when proven clean and *discarded* otherwise; a commit has an *outcome*, and a *commit token* to *resolve* it
//! with when its answer is lost; a *listener* has no session and is told what is notified on its *channels*, or that it may
//! have *missed* some; a broker that stops *drains*;
//! a principal with the admin right is an *operator*, and a session that it ends is *terminated*.
//!
//! The invariants, each with a test:
//!
//! 1. A dropped connection is discarded; only the transaction task releases one, after proof that it is idle and clean.
//! 2. An RPC future owns nothing; all work on a connection runs in the transaction task.
//! 3. Nothing falls back to autocommit: a statement for an ended or unknown session runs nothing.
//! 4. OK from Commit means committed; a commit that became a rollback is an error; a lost answer is looked into, and UNKNOWN
//!    when nobody can say.
//! 5. A COMMIT in flight is never cancelled, and its outcome is remembered.
//! 6. A running statement suspends the lease; a busy session is never reaped.
//! 7. KeepAlive touches the lease only: never PostgreSQL, the idle limit, the maximum age or the transaction's deadline.
//! 8. Reaping cancels, rolls back, releases or discards, each within a bound, and leaves the reason.
//! 9. No state crosses sessions, nor does a cancel request.
//! 10. Calls on one session are serial, in arrival order, in a bounded queue.
//! 11. At most one cancel is outstanding on a connection, and nothing is sent before it is known to be over.
//! 12. Everything has a limit, with a default and a reason.
//! 13. Liveness never depends on PostgreSQL; readiness does.
//! 14. No secret and no parameter's value reaches a log, a `Debug` text or an error's detail of ours.

pub mod broker;

pub mod postgres;

pub mod identity;

pub mod acceptor;

pub mod operations;

pub mod grpc;

pub mod config;
mod hex;
mod https;
pub mod names;
mod pem;
mod random;
pub mod secret;
mod seldom;
pub mod server;
pub mod telemetry;

pub mod dev;

pub mod cli;
