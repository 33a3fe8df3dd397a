//! The domain: sessions, their leases, their transactions, and what became of them.
//!
//! Knows no tonic, prost, tokio_postgres or deadpool: callers reach it through [`Broker`] and [`Session`], and it
//! reaches PostgreSQL through the port in [`engine`]. Invariant: nothing a caller does or fails to do leaves a
//! transaction, a connection or a session behind.

pub mod value;

mod guard;
pub mod statement;

pub mod stream;

pub mod error;
pub mod grant;
pub mod principal;
pub mod profile;
pub mod token;

pub mod bulk;
pub mod commit;
pub mod connect;
pub mod engine;
pub mod session;

mod idempotency;
pub mod notification;
pub mod run;

pub mod admin;

pub mod observer;

mod account;
mod lease;
mod reaper;
mod record;
mod registry;
mod terms;
mod transaction;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SetOnce, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tracing::{Span, debug, info, warn};

pub use idempotency::Fingerprint;
pub use session::attach;
pub use transaction::Verdict;

use account::{Accounts, Resource, Taken};
use admin::watch::LookoutPost;
use commit::{CommitTokens, Resolution};
use connect::ConnectOverrides;
use engine::{Engine, IsolationLevel};
use error::{EndReason, Error, Exhausted};
use grant::Quotas;
use idempotency::Outcomes;
use observer::{Event, Observer};
use principal::Principal;
use profile::{Limits, Profiles, ReaperMode};
use reaper::Place;
use registry::Registry;
use session::{Life, Session, TransactionState};
use terms::{Offers, Terms};
use token::{SessionId, SessionToken};

/// The most labels of a session, and the longest key and value in bytes: enough for a name, a version and a trace.
const LABELS_MAX: usize = 16;
const LABEL_KEY_BYTES_MAX: usize = 63;
const LABEL_VALUE_BYTES_MAX: usize = 255;

/// The most that all large answers kept for a repeat take together.
const KEPT_KIB_MAX: usize = 64 * 1024;

/// The longest name a caller may give a request that it may repeat: room for two UUIDs and a prefix.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Lends sessions.
#[derive(Debug)]
pub struct Broker {
    owner: Arc<str>,
    engines: BTreeMap<String, Arc<dyn Engine>>,
    default_engine: String,
    _reaper: AbortOnDropHandle<()>,
    shared: Arc<Shared>,
}

/// What every session needs of its broker.
#[derive(Debug)]
struct Shared {
    registry: Registry,
    /// To the reaper, which lives as long as the broker.
    reaper: mpsc::UnboundedSender<reaper::Order>,
    commit_tokens: CommitTokens,
    outcomes: Outcomes,
    /// Room for large answers of numbered calls, in KiB.
    kept_kib: Arc<Semaphore>,
    /// What each principal takes.
    accounts: Accounts,
    /// Room for calls.
    calls: Arc<Semaphore>,
    calls_max: usize,
    /// The transaction tasks.
    transactions: TaskTracker,
    draining: AtomicBool,
    /// Cancelled when draining begins, for streams that no session ends.
    stopping: CancellationToken,
    /// What sessions begin by, now, and who may do what.
    offers: watch::Sender<Arc<Offers>>,
    /// Set when an operator has asked for the broker to be drained: within that grace, if one was named.
    drain_asked: SetOnce<Option<Duration>>,
    /// Looks for operators who watch, while there are any.
    lookout: LookoutPost,
    reaper_mode: ReaperMode,
    would_have_reaped: AtomicU64,
    observer: Arc<dyn Observer>,
}

impl Shared {
    fn tell(&self, event: Event<'_>) {
        self.observer.observe(event);
    }

    /// Has the reaper look at a session, and again when its lease can first run out.
    fn watch(&self, id: SessionId) {
        // A reaper that has gone has gone with the broker: nobody is left to need it.
        let _ = self.reaper.send(reaper::Order::Watch(id));
    }

    /// Remembers an ended session, and takes it from the wheel.
    fn bury(&self, id: SessionId, place: Option<Place>) {
        self.registry.bury(id);
        if let Some(place) = place {
            let _ = self.reaper.send(reaper::Order::Forget(id, place));
        }
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }
}

/// What a caller asks of a new session.
#[derive(Debug, Default)]
pub struct BeginSession {
    /// Empty: the default engine, or the profile's first.
    pub engine: String,
    /// Empty: the caller's own.
    pub profile: String,
    /// `None`: the profile's.
    pub lease_ttl: Option<Duration>,
    /// The isolation level of its transactions.
    pub isolation_level: Option<IsolationLevel>,
    /// Its transactions are READ ONLY.
    pub read_only: bool,
    /// Its transactions are DEFERRABLE.
    pub deferrable: bool,
    /// `None`: the profile's, which is also the most.
    pub statement_timeout: Option<Duration>,
    /// `None`: PostgreSQL's.
    pub lock_timeout: Option<Duration>,
    /// `None`: the profile's, which is also the most.
    pub transaction_timeout: Option<Duration>,
    /// What its connections are to be, where the engine's options are not to be.
    pub connect: ConnectOverrides,
    /// The role of its transactions; `None`: the login role.
    pub role: Option<String>,
    /// Settings of its transactions.
    pub settings: BTreeMap<String, String>,
    /// For operators.
    pub labels: BTreeMap<String, String>,
    /// For a request that may be repeated.
    pub repeatable: Option<Repeatable>,
}

/// A request that its caller may repeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repeatable {
    /// The caller's name for it.
    pub id: String,
    /// Differs when the request does.
    pub fingerprint: Fingerprint,
}

/// A call that was let in.
#[derive(Debug)]
pub struct Admitted {
    _taken: Option<(Taken, OwnedSemaphorePermit)>,
}

/// A session as granted.
#[derive(Debug)]
pub struct Granted {
    /// The session.
    pub session: Arc<Session>,
    /// The lease granted.
    pub lease_ttl: Duration,
}

impl Broker {
    /// A broker named `owner` for these engines. Call it on a tokio runtime: it starts the reaper.
    ///
    /// # Panics
    /// When `default_engine` is not among the engines, or a principal's profile not among the profiles.
    pub fn new(
        owner: String,
        engines: BTreeMap<String, Arc<dyn Engine>>,
        default_engine: String,
        profiles: Profiles,
        limits: Limits,
        commit_tokens: CommitTokens,
        observer: Arc<dyn Observer>,
    ) -> Self {
        assert!(engines.contains_key(&default_engine), "the configuration names an existing default engine");
        let (orders, received) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            reaper_mode: limits.reaper,
            would_have_reaped: AtomicU64::new(0),
            accounts: Accounts::default(),
            calls: Arc::new(Semaphore::new(limits.calls_max)),
            calls_max: limits.calls_max,
            registry: Registry::new(limits),
            reaper: orders,
            commit_tokens,
            outcomes: Outcomes::default(),
            kept_kib: Arc::new(Semaphore::new(KEPT_KIB_MAX)),
            transactions: TaskTracker::new(),
            draining: AtomicBool::new(false),
            stopping: CancellationToken::new(),
            offers: watch::Sender::new(Arc::new(Offers::new(profiles))),
            drain_asked: SetOnce::new(),
            lookout: LookoutPost::default(),
            observer,
        });
        let sessions = shared.clone();
        let reaper = tokio::spawn(reaper::run(received, move |id| sessions.registry.get(id)));
        let reaper = AbortOnDropHandle::new(reaper);
        Self { owner: owner.into(), engines, default_engine, _reaper: reaper, shared }
    }

    /// From now on sessions begin by these profiles; those that have begun keep theirs, but for those of principals that may
    /// do nothing any more: they end.
    ///
    /// # Panics
    /// When a principal's profile is not among them.
    pub fn set_profiles(&self, profiles: Profiles) {
        let offers = Arc::new(Offers::new(profiles));
        self.shared.offers.send_replace(offers.clone());
        for session in self.shared.registry.sessions() {
            if offers.grant(session.principal()).is_err() {
                end_without_grant(&session);
            }
        }
    }

    /// Lets a call in, until the answer is dropped.
    ///
    /// # Errors
    /// [`Error::Forbidden`] when the principal may do nothing, [`Error::Exhausted`] when it does too much, or all do.
    pub fn admit(&self, principal: &Principal) -> Result<Admitted, Error> {
        let Quotas { calls_max, calls_per_second, .. } = self.offers().grant(principal)?.quotas;
        let account = self.shared.accounts.of(principal);
        let taken = account.take(Resource::Call, calls_max)?;
        let room = self.shared.calls.clone().try_acquire_owned();
        let room = room.map_err(|_| Error::Exhausted(Exhausted::Calls(self.shared.calls_max)))?;
        match calls_per_second {
            Some(rate) if !account.pay(Instant::now(), rate) => {
                Err(Error::Exhausted(Exhausted::PrincipalCallRate(rate.get())))
            }
            _ => Ok(Admitted { _taken: Some((taken, room)) }),
        }
    }

    /// Counts a call that comes over a stream which was let in.
    ///
    /// # Errors
    /// [`Error::Forbidden`] when the principal may do nothing any more, [`Error::Exhausted`] when it calls too often.
    pub fn pay(&self, principal: &Principal) -> Result<(), Error> {
        let rate = self.offers().grant(principal)?.quotas.calls_per_second;
        match rate {
            Some(rate) if !self.shared.accounts.of(principal).pay(Instant::now(), rate) => {
                Err(Error::Exhausted(Exhausted::PrincipalCallRate(rate.get())))
            }
            _ => Ok(()),
        }
    }

    /// Lets a call in whatever else is at work: one that gives back what is held, or an operator's.
    ///
    /// # Errors
    /// [`Error::Forbidden`] when the principal may do nothing.
    pub fn admit_spared(&self, principal: &Principal) -> Result<Admitted, Error> {
        self.offers().grant(principal).map(|_| Admitted { _taken: None })
    }

    /// Whether the principal may make an operator's calls.
    pub fn is_admin(&self, principal: &Principal) -> bool {
        self.offers().grant(principal).is_ok_and(|grant| grant.admin)
    }

    /// How many sessions have outlived their time because the reaper only counts.
    pub fn would_have_reaped(&self) -> u64 {
        self.shared.would_have_reaped.load(Ordering::Relaxed)
    }

    /// Whoever watches it.
    pub fn observer(&self) -> &Arc<dyn Observer> {
        &self.shared.observer
    }

    /// Whether it is about to stop.
    pub fn is_draining(&self) -> bool {
        self.shared.is_draining()
    }

    /// How many sessions are live, by their engine's name and where their transaction stands.
    pub fn count_sessions(&self) -> BTreeMap<(&str, TransactionState), usize> {
        let mut counts = BTreeMap::new();
        for name in self.engines.keys() {
            for state in [TransactionState::None, TransactionState::Open, TransactionState::Failed] {
                counts.insert((name.as_str(), state), 0);
            }
        }
        for session in self.shared.registry.sessions() {
            let engine = self.engines.get_key_value(session.engine().name());
            if let (Some((name, _)), Ok(state)) = (engine, session.transaction_state()) {
                *counts.entry((name.as_str(), state)).or_default() += 1;
            }
        }
        counts
    }

    /// Grants a session. Touches no database.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Exhausted`] at the maximum of sessions, [`Error::Draining`].
    pub fn begin_session(&self, principal: &Principal, request: BeginSession) -> Result<Granted, Error> {
        if let Some(repeatable) = &request.repeatable {
            check_name("request_id", &repeatable.id)?;
            // Also while draining: it is there, and its caller is to end it.
            if let Some(known) = self.shared.registry.begun_by(principal, repeatable)? {
                return Ok(Granted { lease_ttl: known.lease_ttl(), session: known });
            }
        }
        let session = self.open(Life::Leased, principal, &request)?;
        let known = self.shared.registry.insert(session.clone(), request.repeatable)?;
        if !Arc::ptr_eq(&known, &session) {
            return Ok(Granted { lease_ttl: known.lease_ttl(), session: known });
        }
        let lease_ttl = session.lease_ttl();
        self.shared.tell(Event::SessionBegan { engine: session.engine().name() });
        // No line for each session of thousands a second; those that do not end well have one.
        debug!(
            session.id = %session.id(), %principal, engine = %session.engine().name(),
            profile = session.profile_name(), lease.ttl = ?lease_ttl, "session began"
        );
        self.shared.watch(session.id());
        // A drain or a reload that began meanwhile may have looked at the sessions before this one was there.
        if self.shared.is_draining() {
            session.end(EndReason::Drained);
            return Err(Error::Draining);
        }
        if let Err(forbidden) = self.offers().grant(principal) {
            end_without_grant(&session);
            return Err(forbidden);
        }
        Ok(Granted { session, lease_ttl })
    }

    /// A session as asked for, not yet known to anybody.
    fn open(&self, life: Life, principal: &Principal, request: &BeginSession) -> Result<Arc<Session>, Error> {
        if self.shared.is_draining() {
            return Err(Error::Draining);
        }
        let (terms, engine) = self.offered(principal, request)?;
        let lease_ttl = terms.lease_ttl(request.lease_ttl)?;
        engine.check(&request.connect)?;
        check_labels(&request.labels)?;
        let quotas = self.offers().grant(principal)?.quotas;
        let taken = self.shared.accounts.of(principal).take(Resource::Session, quotas.sessions_max)?;
        Ok(Arc::new(Session::new(
            life,
            SessionToken::generate(&self.owner),
            principal.clone(),
            taken,
            quotas.transactions_max,
            engine.clone(),
            terms,
            request.labels.clone(),
            lease_ttl,
            self.shared.clone(),
        )))
    }

    /// What a caller is offered that asks for this: terms, and an engine that they allow.
    fn offered(&self, principal: &Principal, request: &BeginSession) -> Result<(Arc<Terms>, &Arc<dyn Engine>), Error> {
        let terms = self.offers().terms(principal, request)?;
        let engine = self.engine(terms.engine(&request.engine, &self.default_engine)?)?;
        Ok((terms, engine))
    }

    fn offers(&self) -> Arc<Offers> {
        self.shared.offers.borrow().clone()
    }

    /// The session a token opens, live or ended: every call on it says which.
    ///
    /// # Errors
    /// [`Error::SessionUnknown`] when there is none, or it is another principal's.
    pub fn session(&self, principal: &Principal, token: &SessionToken) -> Result<Arc<Session>, Error> {
        let session = self.shared.registry.get(token.id()).ok_or(Error::SessionUnknown)?;
        if !session.answers_to(principal, token) {
            return Err(Error::SessionUnknown);
        }
        session.link(&Span::current());
        Ok(session)
    }

    /// Tells what became of the transaction that a commit token names, waiting for its end up to `until`. With its xid8.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a token that this broker did not seal for this principal, and what keeps PostgreSQL from
    /// being asked.
    pub async fn resolve_commit(
        &self,
        principal: &Principal,
        commit_token: &str,
        until: Instant,
    ) -> Result<(Resolution, u64), Error> {
        /// How long to wait before asking again, at first and at most.
        const AGAIN_MIN: Duration = Duration::from_millis(10);
        const AGAIN_MAX: Duration = Duration::from_millis(200);

        let (engine, transaction) = self.shared.commit_tokens.open(principal, commit_token).map_err(|_| {
            let problem = "is none of this broker's for this caller: pass one unchanged, to a broker with the same \
                           commit_token_key";
            Error::invalid("commit_token", problem)
        })?;
        let engine = self.engines.get(&engine).ok_or_else(|| {
            Error::invalid("commit_token", format!("is of engine {engine:?}, which this broker does not have"))
        })?;
        let mut again = AGAIN_MIN;
        loop {
            let resolution =
                engine.resolve(principal, &transaction, None).await.map_err(|error| error.into_error(engine.name()))?;
            let later = Instant::now() + again;
            if resolution != Resolution::InProgress || later >= until {
                return Ok((resolution, transaction.xid));
            }
            sleep_until(later).await;
            again = (again * 2).min(AGAIN_MAX);
        }
    }

    /// The engines, by name.
    pub fn engines(&self) -> &BTreeMap<String, Arc<dyn Engine>> {
        &self.engines
    }

    /// How many sessions are live.
    pub fn live_sessions(&self) -> usize {
        self.shared.registry.live()
    }

    /// Refuses new sessions and listeners, ends the listeners there are, each live session as soon as it is between
    /// transactions, and those that are not within `grace` by rolling back. Returns when no transaction is left, or cannot
    /// be stopped.
    pub async fn drain(&self, grace: Duration) {
        /// How often to look. Short against any grace, long against the cost of a look.
        const LOOK: Duration = Duration::from_millis(20);
        /// Past cancelling, rolling back and resetting, each with its bound of two seconds, only a COMMIT can still be
        /// under way.
        const STOP: Duration = Duration::from_secs(6);

        self.shared.draining.store(true, Ordering::SeqCst);
        self.shared.stopping.cancel();
        info!(sessions = self.live_sessions(), "draining");
        for session in self.shared.registry.sessions() {
            session.tell();
        }
        let until = Instant::now() + grace;
        loop {
            for session in self.shared.registry.sessions() {
                session.end_if_idle(EndReason::Drained);
            }
            if self.live_sessions() == 0 || Instant::now() >= until {
                break;
            }
            sleep(LOOK).await;
        }
        for session in self.shared.registry.sessions() {
            session.end(EndReason::Drained);
        }
        self.shared.transactions.close();
        if timeout(STOP, self.shared.transactions.wait()).await.is_err() {
            warn!(transactions = self.shared.transactions.len(), "transactions did not stop");
        }
    }

    fn engine(&self, name: &str) -> Result<&Arc<dyn Engine>, Error> {
        self.engines.get(name).ok_or_else(|| {
            let known: Vec<_> = self.engines.keys().map(String::as_str).collect();
            Error::invalid("engine", format!("there is no such engine: use one of {}", known.join(", ")))
        })
    }
}

/// Ends a session whose principal may do nothing any more.
fn end_without_grant(session: &Session) {
    if session.end(EndReason::Terminated) == EndReason::Terminated {
        let (id, principal) = (session.id(), session.principal());
        let reason = "the principal has no grant any more";
        info!(target: admin::AUDIT, event = "session.terminated", session.id = %id, %principal, reason, "session terminated");
    }
}

/// Says what is wrong with a caller's name for a request that it may repeat.
fn check_name(field: &str, name: &str) -> Result<(), Error> {
    if name.len() > REQUEST_ID_BYTES_MAX || name.contains('\0') {
        return Err(Error::invalid(field, format!("must be up to {REQUEST_ID_BYTES_MAX} bytes without NUL")));
    }
    Ok(())
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), Error> {
    if labels.len() > LABELS_MAX {
        return Err(Error::invalid("labels", format!("are {}, the limit is {LABELS_MAX}", labels.len())));
    }
    for (key, value) in labels {
        if !(1..=LABEL_KEY_BYTES_MAX).contains(&key.len()) || value.len() > LABEL_VALUE_BYTES_MAX {
            let problem = format!(
                "a key takes 1 to {LABEL_KEY_BYTES_MAX} bytes, a value up to {LABEL_VALUE_BYTES_MAX}: one has {} and {}",
                key.len(),
                value.len()
            );
            return Err(Error::invalid("labels", problem));
        }
    }
    Ok(())
}
