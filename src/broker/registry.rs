//! Every session the broker knows: live, or ended and remembered for a while.
//!
//! Invariant: a session's own phase is the one truth about its end; the registry only decides how long it is remembered.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

use super::error::{Error, Exhausted};
use super::profile::Limits;
use super::session::Session;
use super::token::SessionId;

/// Session id to session.
#[derive(Debug)]
pub(super) struct Registry {
    limits: Limits,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    /// The live and the remembered.
    sessions: HashMap<SessionId, Arc<Session>>,
    /// The remembered, in the order of their end.
    tombstones: VecDeque<(Instant, SessionId)>,
}

impl Registry {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, entries: Mutex::default() }
    }

    /// Takes a new session in.
    pub(super) fn insert(&self, session: Arc<Session>) -> Result<(), Error> {
        let mut entries = self.lock();
        if entries.live() >= self.limits.sessions_max {
            return Err(Error::Exhausted(Exhausted::Sessions(self.limits.sessions_max)));
        }
        entries.sessions.insert(session.id(), session);
        Ok(())
    }

    /// The session of that id, live or remembered.
    pub(super) fn get(&self, id: SessionId) -> Option<Arc<Session>> {
        let mut entries = self.lock();
        entries.forget_old(&self.limits, Instant::now());
        entries.sessions.get(&id).cloned()
    }

    /// Notes that a session has ended. Called once for each session.
    pub(super) fn bury(&self, id: SessionId) {
        let now = Instant::now();
        let mut entries = self.lock();
        entries.tombstones.push_back((now, id));
        entries.forget_old(&self.limits, now);
    }

    /// All sessions, live and remembered.
    pub(super) fn sessions(&self) -> Vec<Arc<Session>> {
        self.lock().sessions.values().cloned().collect()
    }

    /// How many sessions are live.
    pub(super) fn live(&self) -> usize {
        self.lock().live()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Entries> {
        // Nothing panics between two changes that belong together, so a poisoned lock holds sound entries.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn live(&self) -> usize {
        self.sessions.len() - self.tombstones.len()
    }

    fn forget_old(&mut self, limits: &Limits, now: Instant) {
        while let Some(&(ended, id)) = self.tombstones.front() {
            let expired = now.saturating_duration_since(ended) >= limits.tombstone_ttl;
            if !expired && self.tombstones.len() <= limits.tombstones_max {
                return;
            }
            self.tombstones.pop_front();
            self.sessions.remove(&id);
        }
    }
}
