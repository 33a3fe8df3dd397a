//! What operators look at again and again: the sessions, the engines, and what has ended lately, once a second.
//!
//! Knows no HTTP. However many watch, one task looks for all of them, and none when nobody does. PostgreSQL is asked who
//! stands in whose way every two seconds, while statements run, and whether it answers every five; no look waits for it.
//! Invariants: the right to watch is looked at before each snapshot; none holds a label, SQL, a parameter's value or a
//! token.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

use super::{Blocking, Operator, Seen, ask_blocking, give_way, probe};
use crate::broker::Shared;
use crate::broker::engine::{Engine, EngineInfo};
use crate::broker::error::EndReason;
use crate::broker::principal::Principal;
use crate::broker::session::{Glance, TransactionState};
use crate::broker::token::SessionId;

/// How often is looked: as often as a person can follow.
const LOOK: Duration = Duration::from_secs(1);

/// How long after an answer PostgreSQL is asked again who stands in whose way. Its asking costs what the waiting do.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// How long after an answer each engine is asked again whether it answers. That opens a connection.
const PROBE_AGAIN: Duration = Duration::from_secs(5);

/// The sessions in a snapshot: some screens full.
const SESSIONS_MAX: usize = 200;

/// The ended sessions in a snapshot.
const ENDINGS_MAX: usize = 50;

/// What there is to see at one instant.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The broker's name.
    pub owner: Arc<str>,
    /// It takes no new sessions.
    pub draining: bool,
    /// All live sessions, counted.
    pub totals: Totals,
    /// At most 200 of them: first who stands in another's way or is stood in the way of, then the longest transactions,
    /// then those that have not been used for longest.
    pub sessions: Vec<WatchedSession>,
    /// Whether all whose statement runs were asked who stands in their way.
    pub blockers_complete: bool,
    /// The engines, by name.
    pub engines: Vec<WatchedEngine>,
    /// The sessions that ended last, at most 50, the latest first.
    pub endings: Vec<Ending>,
}

/// Live sessions, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// All.
    pub live: usize,
    /// Those with a transaction, failed ones among them.
    pub in_transaction: usize,
    /// Those whose transaction has failed.
    pub failed: usize,
    /// Those whose statement runs.
    pub running: usize,
    /// Those whose statement waits for a connection to run on.
    pub waiting: usize,
    /// Those whose statement waits for another backend, as far as that is known.
    pub blocked: usize,
}

/// A live session. It has no labels here: they may say more of a person than an operator is to see.
#[derive(Debug)]
pub struct WatchedSession {
    /// Its loggable name.
    pub id: SessionId,
    /// Its caller.
    pub principal: Principal,
    /// Its engine's name.
    pub engine: String,
    /// Its profile's name.
    pub profile: String,
    /// It belongs to one call, and ends with it.
    pub one_shot: bool,
    /// The lease granted.
    pub lease_ttl: Duration,
    /// What changes.
    pub glance: Glance,
    /// Who stood in its statement's way when PostgreSQL was last asked.
    pub blocked_by: Arc<[Blocking]>,
}

/// An engine.
#[derive(Debug)]
pub struct WatchedEngine {
    /// What is behind it.
    pub info: EngineInfo,
    /// Whether its PostgreSQL answers.
    pub reach: Reach,
}

/// Whether an engine's PostgreSQL answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Reach {
    /// It has not been asked to its end yet.
    #[default]
    Unknown,
    /// It does.
    Answers,
    /// It does not, and why.
    Silent(String),
}

/// A session that has ended and is remembered.
#[derive(Debug)]
pub struct Ending {
    /// Its loggable name.
    pub id: SessionId,
    /// Its caller.
    pub principal: Principal,
    /// Its engine's name.
    pub engine: String,
    /// Why it ended.
    pub reason: EndReason,
    /// How long ago.
    pub ago: Duration,
}

/// Why nothing more is to be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unseen {
    /// The principal has the admin right no more.
    NotGranted,
    /// A defect of ours, which is logged.
    LookoutDied,
}

/// An operator who watches.
#[derive(Debug)]
pub struct Watch {
    principal: Principal,
    shared: Arc<Shared>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Looks for as long as this is here.
    _lookout: Arc<Lookout>,
}

impl Operator<'_> {
    /// Looks once.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn look(mut self) -> Snapshot {
        let scope = self.scope();
        let (seen, _) = scope.scan(&HashSet::new()).await;
        let (blocked, reach) = tokio::join!(scope.ask(&seen), scope.probe());
        let answers = Answers { blocked, reach };
        // Once more: who stands in whose way is known now, and goes first.
        let (seen, totals) = scope.scan(&answers.involved()).await;
        self.count = Some(totals.live);
        scope.snapshot(&seen, totals, &answers)
    }

    /// Begins to watch. The call is over with that, and in the audit log.
    pub fn watch(self) -> Watch {
        let lookout = self.broker.shared.lookout.join(|| self.scope());
        Watch {
            principal: self.principal.clone(),
            shared: self.broker.shared.clone(),
            snapshots: lookout.snapshots.clone(),
            _lookout: lookout,
        }
    }

    fn scope(&self) -> Scope {
        let (owner, engines) = (self.broker.owner.clone(), self.broker.engines.clone());
        Scope { owner, engines, shared: self.broker.shared.clone() }
    }
}

impl Watch {
    /// Waits for the next snapshot. Those that nobody waited for are not kept: it is the latest.
    ///
    /// # Errors
    /// [`Unseen`]: why there will be none.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn snapshot(&mut self) -> Result<Arc<Snapshot>, Unseen> {
        if self.snapshots.changed().await.is_err() {
            error!("the task that looks for operators died");
            return Err(Unseen::LookoutDied);
        }
        if !self.shared.offers.borrow().grant(&self.principal).is_ok_and(|grant| grant.admin) {
            return Err(Unseen::NotGranted);
        }
        Ok(self.snapshots.borrow_and_update().clone())
    }
}

/// Where the one lookout of a broker is found, while there is one.
#[derive(Debug, Default)]
pub(in crate::broker) struct LookoutPost(Mutex<Weak<Lookout>>);

impl LookoutPost {
    fn join(&self, scope: impl FnOnce() -> Scope) -> Arc<Lookout> {
        let mut posted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lookout) = posted.upgrade() {
            return lookout;
        }
        let lookout = Arc::new(Lookout::new(scope()));
        *posted = Arc::downgrade(&lookout);
        lookout
    }
}

/// Looks for all who watch. Dropped by the last of them, it looks no more.
#[derive(Debug)]
struct Lookout {
    /// Never looked at here, so that whoever joins sees the latest at once.
    snapshots: watch::Receiver<Arc<Snapshot>>,
    _task: AbortOnDropHandle<()>,
}

impl Lookout {
    fn new(scope: Scope) -> Self {
        let (told, snapshots) = watch::channel(Arc::default());
        let task = tokio::spawn(async move { scope.keep_looking(&told).await });
        Self { snapshots, _task: AbortOnDropHandle::new(task) }
    }
}

/// What there is to look at.
#[derive(Debug)]
struct Scope {
    owner: Arc<str>,
    engines: BTreeMap<String, Arc<dyn Engine>>,
    shared: Arc<Shared>,
}

/// What PostgreSQL has said, shown until it says more.
#[derive(Debug, Default)]
struct Answers {
    blocked: Blocked,
    reach: BTreeMap<String, Reach>,
}

/// Who stands in whose way.
#[derive(Debug, Default)]
struct Blocked {
    by: HashMap<SessionId, Arc<[Blocking]>>,
    /// Whether all were asked that were to be.
    complete: bool,
}

impl Answers {
    /// Who stands in another's way or is stood in the way of.
    fn involved(&self) -> HashSet<SessionId> {
        let blocked = self.blocked.by.keys().copied();
        let blocking = self.blocked.by.values().flat_map(|blocking| blocking.iter().filter_map(|one| one.session));
        blocked.chain(blocking).collect()
    }
}

impl Scope {
    /// Looks, and has PostgreSQL asked meanwhile. Never returns.
    async fn keep_looking(&self, told: &watch::Sender<Arc<Snapshot>>) {
        let answers = Mutex::default();
        let (shown, to_ask) = watch::channel(Arc::default());
        tokio::join!(
            self.look_often(&answers, told, &shown),
            self.ask_often(&answers, to_ask),
            self.probe_often(&answers)
        );
    }

    async fn look_often(
        &self,
        answers: &Mutex<Answers>,
        told: &watch::Sender<Arc<Snapshot>>,
        shown: &watch::Sender<Arc<[Seen]>>,
    ) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let involved = lock(answers).involved();
            let (seen, totals) = self.scan(&involved).await;
            let snapshot = self.snapshot(&seen, totals, &lock(answers));
            told.send_replace(Arc::new(snapshot));
            shown.send_replace(seen.into());
        }
    }

    async fn ask_often(&self, answers: &Mutex<Answers>, mut to_ask: watch::Receiver<Arc<[Seen]>>) {
        while to_ask.changed().await.is_ok() {
            let seen = to_ask.borrow_and_update().clone();
            let blocked = self.ask(&seen).await;
            lock(answers).blocked = blocked;
            sleep(ASK_AGAIN).await;
        }
    }

    async fn probe_often(&self, answers: &Mutex<Answers>) {
        loop {
            let reach = self.probe().await;
            lock(answers).reach = reach;
            sleep(PROBE_AGAIN).await;
        }
    }

    /// The sessions to show, in their order, and all of them counted.
    async fn scan(&self, involved: &HashSet<SessionId>) -> (Vec<Seen>, Totals) {
        let mut totals = Totals::default();
        let mut shown: BTreeMap<(Rank, SessionId), Seen> = BTreeMap::new();
        for (index, session) in self.shared.registry.sessions().into_iter().enumerate() {
            give_way(index).await;
            let Ok(glance) = session.glance() else { continue };
            totals.count(&glance);
            let place = (Rank::of(&glance, involved.contains(&session.id())), session.id());
            if shown.len() == SESSIONS_MAX {
                if shown.last_key_value().is_some_and(|(last, _)| *last < place) {
                    continue;
                }
                shown.pop_last();
            }
            shown.insert(place, Seen { session, glance });
        }
        (shown.into_values().collect(), totals)
    }

    /// Asks who stands in the way of those whose statement runs.
    async fn ask(&self, seen: &[Seen]) -> Blocked {
        let (blocked, complete) = ask_blocking(seen, || self.shared.registry.sessions()).await;
        Blocked { by: blocked.into_iter().map(|(id, blocking)| (id, blocking.into())).collect(), complete }
    }

    /// Asks each engine whether its PostgreSQL answers.
    async fn probe(&self) -> BTreeMap<String, Reach> {
        let reach = probe(&self.engines).await.map(|unreachable| unreachable.map_or(Reach::Answers, Reach::Silent));
        self.engines.keys().cloned().zip(reach).collect()
    }

    fn snapshot(&self, seen: &[Seen], mut totals: Totals, answers: &Answers) -> Snapshot {
        let Answers { blocked, reach } = answers;
        let sessions: Vec<_> = seen.iter().map(|seen| WatchedSession::new(seen, blocked)).collect();
        totals.blocked = sessions.iter().filter(|session| !session.blocked_by.is_empty()).count();
        let running = sessions.iter().filter(|session| is_running(&session.glance)).count();
        let engines = self.engines.iter().map(|(name, engine)| WatchedEngine {
            info: engine.info(),
            reach: reach.get(name).cloned().unwrap_or_default(),
        });
        Snapshot {
            owner: self.owner.clone(),
            draining: self.shared.is_draining(),
            totals,
            blockers_complete: totals.running == 0 || (blocked.complete && running == totals.running),
            sessions,
            engines: engines.collect(),
            endings: self.endings(),
        }
    }

    fn endings(&self) -> Vec<Ending> {
        let now = Instant::now();
        let ended = self.shared.registry.ended_last(ENDINGS_MAX).into_iter();
        let endings = ended.filter_map(|(at, session)| {
            let reason = session.glance().err()?;
            Some(Ending {
                id: session.id(),
                principal: session.principal().clone(),
                engine: session.engine().name().to_owned(),
                reason,
                ago: now.saturating_duration_since(at),
            })
        });
        endings.collect()
    }
}

impl Totals {
    fn count(&mut self, glance: &Glance) {
        let Glance { state, statement_age, backend, .. } = glance;
        self.live += 1;
        self.in_transaction += usize::from(state.transaction != TransactionState::None);
        self.failed += usize::from(state.transaction == TransactionState::Failed);
        self.running += usize::from(is_running(glance));
        self.waiting += usize::from(statement_age.is_some() && backend.is_none());
    }
}

impl WatchedSession {
    fn new(seen: &Seen, blocked: &Blocked) -> Self {
        let Seen { session, glance } = seen;
        // What was in the way of a statement that is over is in nobody's.
        let blocked_by = blocked.by.get(&session.id()).filter(|_| is_running(glance));
        Self {
            id: session.id(),
            principal: session.principal().clone(),
            engine: session.engine().name().to_owned(),
            profile: session.profile_name().to_owned(),
            one_shot: session.is_one_shot(),
            lease_ttl: session.lease_ttl(),
            glance: glance.clone(),
            blocked_by: blocked_by.cloned().unwrap_or_default(),
        }
    }
}

/// Which sessions are shown before others: the smaller first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Stands in another's way, or is stood in the way of; its transaction is that old.
    Involved(Reverse<Duration>),
    /// Its transaction is that old.
    InTransaction(Reverse<Duration>),
    /// Has not been used for that long.
    Idle(Reverse<Duration>),
}

impl Rank {
    fn of(glance: &Glance, is_involved: bool) -> Self {
        match glance.transaction_age {
            Some(age) if is_involved => Self::Involved(Reverse(age)),
            Some(age) => Self::InTransaction(Reverse(age)),
            None => Self::Idle(Reverse(glance.idle)),
        }
    }
}

/// Whether a statement runs on a backend.
fn is_running(glance: &Glance) -> bool {
    glance.statement_age.is_some() && glance.backend.is_some()
}

fn lock(answers: &Mutex<Answers>) -> MutexGuard<'_, Answers> {
    // What is said is put there as a whole, so a poisoned lock holds sound answers.
    answers.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_anothers_way_goes_before_who_is_long_in_transaction_before_who_is_long_idle() {
        let seconds = |seconds| Reverse(Duration::from_secs(seconds));
        let ranks = [
            Rank::Involved(seconds(9)),
            Rank::Involved(seconds(1)),
            Rank::InTransaction(seconds(100)),
            Rank::InTransaction(seconds(0)),
            Rank::Idle(seconds(1000)),
            Rank::Idle(seconds(0)),
        ];
        assert!(ranks.is_sorted());
    }
}
