//! Which cluster a server belongs to, and what became of a transaction there.
//!
//! A transaction id means something only where it was given out, and only until the server may have given it out again:
//! to another cluster it is nothing, after a failover or a crash it may be somebody else's. Invariant: what is told here
//! as committed or rolled back is so.

use tokio_postgres::{Client, SimpleQueryMessage};

use super::connection::first_row;
use crate::broker::commit::{Cluster, ClusterXid, Resolution, UnknownReason};

/// SQLSTATE of asking for an id that has not been given out.
const INVALID_PARAMETER_VALUE: &str = "22023";

/// The last column tells whether the server has lost its memory: a crash resets both statistics, a clean stop none. So may
/// an operator, which then takes outcomes away that could have been told, but never turns one around. Every name is
/// PostgreSQL's own: a caller may have made its namesake in a schema on the path.
const IDENTITY: &str = "SELECT system_identifier, \
    CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()) END, \
    (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()), \
    (pg_catalog.date_part('epoch', \
        LEAST(pg_catalog.pg_stat_get_bgwriter_stat_reset_time(), archiver.stats_reset)) \
        OPERATOR(pg_catalog.*) 1000000::pg_catalog.float8)::pg_catalog.int8 \
    FROM pg_catalog.pg_control_system(), pg_catalog.pg_stat_get_archiver() AS archiver";

/// What a server says it is.
struct Identity {
    system_identifier: u64,
    /// `None` on a standby.
    timeline: Option<u32>,
    database: u32,
    epoch: i64,
}

impl Identity {
    fn read(answers: &[SimpleQueryMessage]) -> Option<Self> {
        let row = first_row(answers)?;
        let timeline = match row.get(1) {
            None => None,
            // The name of a WAL file begins with its timeline.
            Some(file) => Some(u32::from_str_radix(file.get(..8)?, 16).ok()?),
        };
        Some(Self {
            // PostgreSQL has no unsigned type for it.
            system_identifier: row.get(0)?.parse::<i64>().ok()?.cast_unsigned(),
            timeline,
            database: row.get(2)?.parse().ok()?,
            epoch: row.get(3)?.parse().ok()?,
        })
    }
}

/// Which cluster gives ids to the connection's transactions. `None` on a standby, which gives none, and where the server
/// does not tell.
pub(super) async fn cluster(client: &Client) -> Option<Cluster> {
    let Identity { system_identifier, timeline, database, epoch } =
        Identity::read(&client.simple_query(IDENTITY).await.ok()?)?;
    Some(Cluster { system_identifier, timeline: timeline?, database, epoch })
}

/// What became of a transaction. `orphan` is the backend of a connection that is lost: should it wait there for the
/// transaction's next statement, it never comes.
pub(super) async fn resolve(
    client: &Client,
    transaction: &ClusterXid,
    orphan: Option<i32>,
) -> Result<Resolution, tokio_postgres::Error> {
    let ClusterXid { cluster, xid } = transaction;
    let unknown = |reason| Ok(Resolution::Unknown(reason));
    // A server that does not tell is not the one that told.
    let Some(now) = Identity::read(&client.simple_query(IDENTITY).await?) else {
        return unknown(UnknownReason::OtherCluster);
    };
    if now.system_identifier != cluster.system_identifier {
        return unknown(UnknownReason::OtherCluster);
    }
    match now.timeline {
        None => return unknown(UnknownReason::InRecovery),
        Some(timeline) if timeline != cluster.timeline => return unknown(UnknownReason::OtherTimeline),
        Some(_) => {}
    }
    if let Some(backend) = orphan {
        end_orphan(client, backend, *xid).await?;
    }
    let database = cluster.database;
    let status = format!(
        "SELECT pg_catalog.pg_xact_status('{xid}'::pg_catalog.xid8), \
            EXISTS (SELECT FROM pg_catalog.pg_database WHERE oid OPERATOR(pg_catalog.=) {database}::pg_catalog.oid)"
    );
    let answers = match client.simple_query(&status).await {
        // An id that is still to come was lost in a crash, before anything of it reached the disk.
        Err(error) if error.code().is_some_and(|code| code.code() == INVALID_PARAMETER_VALUE) => {
            return Ok(Resolution::RolledBack);
        }
        answers => answers?,
    };
    let row = first_row(&answers);
    match (row.and_then(|row| row.get(0)), row.and_then(|row| row.get(1))) {
        (_, Some("f")) => unknown(UnknownReason::DatabaseDropped),
        (Some("committed"), _) if now.epoch == cluster.epoch => Ok(Resolution::Committed),
        // It may be another's, who was given the id again because ours was lost.
        (Some("committed"), _) => unknown(UnknownReason::ServerCrashed),
        (Some("in progress"), _) => Ok(Resolution::InProgress),
        // Ours, or another's who was given the id again because ours was lost.
        (Some("aborted"), _) => Ok(Resolution::RolledBack),
        _ => unknown(UnknownReason::TooOld),
    }
}

/// Ends a backend that is idle in that transaction. One that is busy comes to an end of its own.
async fn end_orphan(client: &Client, backend: i32, xid: u64) -> Result<(), tokio_postgres::Error> {
    // pg_stat_activity has the lower half of the id.
    let xid = xid % (1 << 32);
    let end = format!(
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
            WHERE pid OPERATOR(pg_catalog.=) {backend} AND state OPERATOR(pg_catalog.=) 'idle in transaction'::pg_catalog.text \
            AND backend_xid::pg_catalog.text OPERATOR(pg_catalog.=) '{xid}'::pg_catalog.text"
    );
    match client.simple_query(&end).await {
        // Not ours to end.
        Err(error) if error.as_db_error().is_some() => Ok(()),
        ended => ended.map(drop),
    }
}
