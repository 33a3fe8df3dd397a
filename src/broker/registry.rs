//! Every session the broker knows: live, or ended and remembered for a while.
//!
//! Invariant: a session's own phase is the one truth about its end; the registry only decides how long it is remembered.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

use super::error::{Error, Exhausted};
use super::principal::Principal;
use super::profile::Limits;
use super::session::Session;
use super::token::SessionId;
use super::{Fingerprint, Repeatable};

/// Session id to session.
#[derive(Debug)]
pub(super) struct Registry {
    limits: Limits,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    /// The live and the remembered.
    sessions: HashMap<SessionId, Known>,
    /// The sessions of requests that may be repeated.
    requests: HashMap<Request, SessionId>,
    /// The remembered, in the order of their end.
    tombstones: VecDeque<(Instant, SessionId)>,
}

#[derive(Debug)]
struct Known {
    session: Arc<Session>,
    /// The request that began it, if it may be repeated, and its fingerprint.
    request: Option<Box<(Request, Fingerprint)>>,
}

/// A caller and its name for a request.
type Request = (Principal, String);

impl Registry {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, entries: Mutex::default() }
    }

    /// Takes a new session in; or returns the one that the same request has begun before.
    pub(super) fn insert(&self, session: Arc<Session>, repeatable: Option<Repeatable>) -> Result<Arc<Session>, Error> {
        let mut entries = self.lock();
        entries.forget_old(&self.limits, Instant::now());
        let request =
            repeatable.map(|Repeatable { id, fingerprint }| Box::new(((session.principal().clone(), id), fingerprint)));
        if let Some(request) = &request
            && let Some(known) = entries.begun_by(request)?
        {
            return Ok(known);
        }
        if entries.live() >= self.limits.sessions_max {
            return Err(Error::Exhausted(Exhausted::Sessions(self.limits.sessions_max)));
        }
        let id = session.id();
        if let Some(request) = &request {
            entries.requests.insert(request.0.clone(), id);
        }
        entries.sessions.insert(id, Known { session: session.clone(), request });
        Ok(session)
    }

    /// The session that the same request has begun before.
    pub(super) fn begun_by(
        &self,
        principal: &Principal,
        repeatable: &Repeatable,
    ) -> Result<Option<Arc<Session>>, Error> {
        let Repeatable { id, fingerprint } = repeatable;
        let mut entries = self.lock();
        entries.forget_old(&self.limits, Instant::now());
        entries.begun_by(&((principal.clone(), id.clone()), *fingerprint))
    }

    /// The session of that id, live or remembered.
    pub(super) fn get(&self, id: SessionId) -> Option<Arc<Session>> {
        let mut entries = self.lock();
        entries.forget_old(&self.limits, Instant::now());
        entries.sessions.get(&id).map(|known| known.session.clone())
    }

    /// Notes that a session has ended. Called once for each session.
    pub(super) fn bury(&self, id: SessionId) {
        let now = Instant::now();
        let mut entries = self.lock();
        entries.tombstones.push_back((now, id));
        entries.forget_old(&self.limits, now);
    }

    /// Forgets a session that has ended and was not buried.
    pub(super) fn forget(&self, id: SessionId) {
        self.lock().forget(id);
    }

    /// All sessions, live and remembered.
    pub(super) fn sessions(&self) -> Vec<Arc<Session>> {
        self.lock().sessions.values().map(|known| known.session.clone()).collect()
    }

    /// The remembered that ended last, so many at most, the latest first, and when they ended.
    pub(super) fn ended_last(&self, count: usize) -> Vec<(Instant, Arc<Session>)> {
        let mut entries = self.lock();
        entries.forget_old(&self.limits, Instant::now());
        let last = entries.tombstones.iter().rev().take(count);
        last.filter_map(|(at, id)| Some((*at, entries.sessions.get(id)?.session.clone()))).collect()
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

    /// The session that an earlier request of that name has begun, if it was the same.
    fn begun_by(&self, request: &(Request, Fingerprint)) -> Result<Option<Arc<Session>>, Error> {
        let known = self.requests.get(&request.0).and_then(|id| self.sessions.get(id));
        match known {
            Some(known) if known.request.as_deref() == Some(request) => Ok(Some(known.session.clone())),
            Some(_) => Err(Error::invalid("request_id", "was used for another request: take a new one")),
            None => Ok(None),
        }
    }

    fn forget_old(&mut self, limits: &Limits, now: Instant) {
        while let Some(&(ended, id)) = self.tombstones.front() {
            let expired = now.saturating_duration_since(ended) >= limits.tombstone_ttl;
            if !expired && self.tombstones.len() <= limits.tombstones_max {
                return;
            }
            self.tombstones.pop_front();
            self.forget(id);
        }
    }

    fn forget(&mut self, id: SessionId) {
        if let Some(Known { request: Some(request), .. }) = self.sessions.remove(&id) {
            self.requests.remove(&request.0);
        }
    }
}
