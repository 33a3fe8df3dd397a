//! Limits and timeouts: what a session may ask for, and what the broker holds at most.
//!
//! Invariant: every limit has a default, and the default a reason.

use std::collections::BTreeSet;
use std::time::Duration;

/// The limits of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// The lease granted when none is asked for.
    pub lease_ttl: Duration,
    /// The shortest lease granted.
    pub lease_ttl_min: Duration,
    /// The longest lease granted.
    pub lease_ttl_max: Duration,
    /// The longest a session lives, whatever the renewals.
    pub session_age_max: Duration,
    /// The longest a transaction stays open.
    pub transaction_timeout: Duration,
    /// The longest a statement runs.
    pub statement_timeout: Duration,
    /// The most rows in one result.
    pub result_rows_max: u64,
    /// The most bytes of encoded values in one result.
    pub result_bytes_max: usize,
    /// The most calls that run or wait on one session.
    pub session_queue_max: u32,
    /// The roles that sessions may ask for.
    pub roles: BTreeSet<String>,
    /// The settings that sessions may ask for.
    pub settings: BTreeSet<String>,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            // Long enough for a garbage collection or a slow downstream call, short enough to free a dead caller's locks.
            lease_ttl: Duration::from_secs(30),
            // Below a second, renewals would cost more than the connection they free.
            lease_ttl_min: Duration::from_secs(1),
            // A person at a prompt; anything longer is abandonment.
            lease_ttl_max: Duration::from_mins(5),
            // Bounds what a caller that renews for ever can hold, and lets replicas be rolled within the hour.
            session_age_max: Duration::from_mins(30),
            // Open transactions hold locks and keep vacuum from its work.
            transaction_timeout: Duration::from_mins(1),
            // Half of the transaction's time, so that one statement cannot use up all of it.
            statement_timeout: Duration::from_secs(30),
            result_rows_max: 10_000,
            // Every gRPC client accepts messages of 4 MiB by default; half a mebibyte of it is for 1,600 columns, 100
            // notices and the state.
            result_bytes_max: 7 * 512 * 1024,
            // A session is one conversation: more than a few calls in flight is a caller's mistake.
            session_queue_max: 32,
            // What a caller may become is the operator's to say.
            roles: BTreeSet::new(),
            settings: BTreeSet::new(),
        }
    }
}

/// The limits of the broker as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The most live sessions.
    pub sessions_max: usize,
    /// The most ended sessions whose reason is remembered.
    pub tombstones_max: usize,
    /// How long an ended session's reason is remembered.
    pub tombstone_ttl: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // At about half a kilobyte each, 50 MB; labels and numbered calls (up to 4 KiB each) come on top.
            sessions_max: 100_000,
            tombstones_max: 10_000,
            // Longer than any client's retry loop.
            tombstone_ttl: Duration::from_mins(10),
        }
    }
}
