//! Limits and timeouts: what a session may ask for, and what the broker holds at most.
//!
//! Invariant: every limit has a default, and the default a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::engine::Nets;
use super::grant::{Grant, Grants};
use super::value::LIST_DEPTH_MAX;

/// The profiles there are, and whose they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profiles {
    /// By name; [`Profiles::DEFAULT`] is among them.
    pub profiles: BTreeMap<String, Profile>,
    /// Who may have which.
    pub principals: Grants,
}

impl Profiles {
    /// The name of the profile that is always there.
    pub const DEFAULT: &str = "default";

    /// What transactions want of PostgreSQL's own timeouts, unless their profile or their caller says otherwise.
    pub fn usual_nets(&self) -> Option<Nets> {
        let Profile { statement_timeout, transaction_timeout, .. } = self.profiles.get(Self::DEFAULT)?;
        Some(Nets::under(*statement_timeout, *transaction_timeout))
    }
}

impl From<Profile> for Profiles {
    /// The default profile alone, for everybody.
    fn from(default: Profile) -> Self {
        let profiles = [(Self::DEFAULT.to_owned(), default)].into();
        Self { profiles, principals: Grants::for_everybody(Grant::default()) }
    }
}

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
    /// The longest a session without a transaction is kept without being used. No shorter than the longest lease.
    pub session_idle_timeout: Duration,
    /// The longest a session with a transaction is kept without being used.
    pub idle_in_transaction_timeout: Duration,
    /// The longest a transaction stays open.
    pub transaction_timeout: Duration,
    /// The longest a statement runs.
    pub statement_timeout: Duration,
    /// How long a session outlives the stream that kept it.
    pub disconnect_grace: Duration,
    /// The most rows in one result.
    pub result_rows_max: u64,
    /// The most bytes of encoded values in one result.
    pub result_bytes_max: usize,
    /// The most bytes of one value, in a parameter or a result.
    pub value_bytes_max: usize,
    /// The most bytes of all parameters of one call.
    pub parameters_bytes_max: usize,
    /// The most levels of lists in a parameter.
    pub list_depth_max: usize,
    /// The most calls that run or wait on one session.
    pub session_queue_max: u32,
    /// The engines that sessions may name, the first for those that may not have the default engine. Empty: all.
    pub engines: Vec<String>,
    /// The connection options that sessions may ask for, of those that the engine lets callers choose. `None`: all those.
    pub connect_options: Option<BTreeSet<String>>,
    /// The roles that sessions may ask for.
    pub roles: BTreeSet<String>,
    /// The settings that sessions may ask for.
    pub settings: BTreeSet<String>,
    /// The kinds of statements, by name.
    pub classes: BTreeMap<String, Class>,
}

/// What a kind of statement may take, where that is less than its session's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Class {
    /// The longest it runs.
    pub statement_timeout: Option<Duration>,
    /// The most rows in one result.
    pub result_rows_max: Option<u64>,
    /// The most bytes of encoded values in one result.
    pub result_bytes_max: Option<usize>,
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
            // It costs half a kilobyte and no connection, but a program that only keeps it alive has forgotten it.
            session_idle_timeout: Duration::from_mins(5),
            // As long as a transaction: who keeps it alive means to. Where locks are dear, less.
            idle_in_transaction_timeout: Duration::from_mins(1),
            // Open transactions hold locks and keep vacuum from its work.
            transaction_timeout: Duration::from_mins(1),
            // Half of the transaction's time, so that one statement cannot use up all of it.
            statement_timeout: Duration::from_secs(30),
            // Long enough to connect again, and a sixth of what the locks of a dead caller would wait for its lease.
            disconnect_grace: Duration::from_secs(5),
            result_rows_max: 10_000,
            // Every gRPC client accepts messages of 4 MiB by default; half a mebibyte of it is for 1,600 columns, 100
            // notices and the state.
            result_bytes_max: 7 * 512 * 1024,
            // Results and requests have their own limits: this is for who wants less.
            value_bytes_max: 256 * 1024 * 1024,
            // A request has half of it, in which small numbers take half of what they do here.
            parameters_bytes_max: 32 * 1024 * 1024,
            list_depth_max: LIST_DEPTH_MAX,
            // A session is one conversation: more than a few calls in flight is a caller's mistake.
            session_queue_max: 32,
            engines: Vec::new(),
            connect_options: None,
            // What a caller may become is the operator's to say.
            roles: BTreeSet::new(),
            settings: BTreeSet::new(),
            classes: BTreeMap::new(),
        }
    }
}

/// The limits of the broker as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The most live sessions.
    pub sessions_max: usize,
    /// The most calls that wait for their answer; a stream until it begins.
    pub calls_max: usize,
    /// The most ended sessions whose reason is remembered.
    pub tombstones_max: usize,
    /// How long an ended session's reason is remembered.
    pub tombstone_ttl: Duration,
    /// What becomes of a session whose time is over.
    pub reaper: ReaperMode,
}

/// What the reaper does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReaperMode {
    /// It ends sessions whose time is over.
    On,
    /// It only counts and logs them, each once: for trying limits out. They stay until they are closed, or their transaction
    /// meets its deadline.
    DryRun,
}

impl ReaperMode {
    /// Every mode with its word.
    pub const WORDS: &[(&str, Self)] = &[("on", Self::On), ("dry-run", Self::DryRun)];

    /// The mode's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::DryRun => "dry-run",
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // At about half a kilobyte each, 50 MB; labels and numbered calls (up to 4 KiB each) come on top.
            sessions_max: 100_000,
            // Each may hold a request of mebibytes: what is more than can be worked off in a second is better refused.
            calls_max: 10_000,
            tombstones_max: 10_000,
            // Longer than any client's retry loop.
            tombstone_ttl: Duration::from_mins(10),
            reaper: ReaperMode::On,
        }
    }
}
