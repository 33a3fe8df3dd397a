//! A broker for figures that need neither gRPC nor a database.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use session_broker::broker::Broker;
use session_broker::broker::commit::CommitTokens;
use session_broker::broker::engine::Engine;
use session_broker::broker::observer::Nobody;
use session_broker::broker::profile::{Limits, Profile};
use session_broker::config::Config;
use session_broker::postgres::engine::PostgresEngine;

/// The longest lease.
pub(crate) const LEASE_TTL_MAX: Duration = Duration::from_mins(30);

/// A broker that takes so many sessions, and some more. Its engine is never asked for anything.
pub(crate) fn broker(sessions: usize) -> Broker {
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = "[engines.main]\nurl = \"postgresql://nobody@localhost/nowhere\"\n\
        [authentication]\nanonymous = true\n[principals.anonymous]\n";
    std::fs::write(file.path(), config).unwrap();
    let engine = Config::load(Some(file.path()), []).unwrap().engines.remove("main").unwrap();
    let engine = PostgresEngine::new("main".into(), engine.connect, engine.pool, BTreeSet::new(), None);
    let engines = BTreeMap::from([("main".to_owned(), Arc::new(engine) as Arc<dyn Engine>)]);
    let limits = Limits { sessions_max: 2 * sessions + 100_000, tombstones_max: 10, ..Limits::default() };
    let profile = Profile { lease_ttl_max: LEASE_TTL_MAX, session_idle_timeout: LEASE_TTL_MAX, ..Profile::default() };
    let tokens = CommitTokens::new(&[0; CommitTokens::KEY_BYTES_MIN]);
    Broker::new("broker-0".into(), engines, "main".into(), profile.into(), limits, tokens, Arc::new(Nobody))
}
