//! An engine's pool: how many connections, who gets one next, and how long each one lives.
//!
//! Each distinct combination of connection options has a deadpool pool of its own, a sub-pool, inside one total. One
//! fair queue stands before all of them, so that callers are served in arrival order. Invariants: connections in use
//! and idle never exceed size + overflow; every wait has a bound, and so has the queue.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{self, Object, PoolError, QueueMode, Timeouts};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::debug;

use super::opener::{Backend, CANNOT_CONNECT_NOW, Census, Notified, OpenError, Opener, TOO_MANY_CONNECTIONS};
use super::options::ConnectOptions;
use crate::broker::connect::ConnectOverrides;
use crate::broker::engine::{CheckoutError, PoolStatistics};
use crate::broker::principal::Principal;
use crate::random::jittered;

/// How large a pool is, how long it makes callers wait, and how long its connections live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolOptions {
    /// Connections kept open.
    pub size: usize,
    /// Connections beyond, closed once they are not needed.
    pub overflow_max: usize,
    /// The longest wait for one when all are in use.
    pub timeout: Duration,
    /// The most callers that wait.
    pub waiters_max: usize,
    /// How much of the pool one authenticated principal may use.
    pub principal_share_percent: usize,
    /// How old a connection gets, give or take a fifth.
    pub recycle: Duration,
    /// How long a connection stays unused.
    pub idle_timeout: Duration,
    /// Connections kept open even when unused.
    pub idle_min: usize,
    /// A connection unused for longer is asked whether it is still there before it is handed out.
    pub pre_ping_after: Duration,
    /// The most combinations of options that callers have at a time.
    pub sub_pools_max: usize,
    /// Prepared statements kept on each connection.
    pub statement_cache_size: usize,
    /// Whether statements of traces that are kept end in a comment that says where they stand in them.
    pub sql_comment: bool,
    /// What a connection must prove before it is used again.
    pub reset: ResetMode,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            // SQLAlchemy's 5 + 10 comes to the same 15.
            size: 10,
            overflow_max: 5,
            // A caller that waits longer is better off with an error it can act on.
            timeout: Duration::from_secs(2),
            // At 15 connections and some milliseconds for each transaction, what the timeout lets through.
            waiters_max: 1000,
            // So that one caller gone wild leaves room for two others.
            principal_share_percent: 40,
            // Old connections hold memory and stick to a server that others have left; at once they would storm.
            recycle: Duration::from_mins(30),
            idle_timeout: Duration::from_mins(10),
            idle_min: 0,
            // A ping costs a round trip, and a connection used a moment ago has just proven itself.
            pre_ping_after: Duration::from_secs(5),
            sub_pools_max: 16,
            // What an application's hot statements come to; each costs PostgreSQL some tens of kilobytes.
            statement_cache_size: 256,
            sql_comment: false,
            reset: ResetMode::Clean,
        }
    }
}

/// What a connection must prove before it is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetMode {
    /// That it is idle, and then cleaned of everything a session can leave behind.
    Clean,
    /// That, and that its transaction ran nothing but SELECT, INSERT, UPDATE, DELETE and MERGE.
    Strict,
    /// Nothing: it is closed.
    Never,
}

impl ResetMode {
    /// Every mode with its word.
    pub const WORDS: &[(&str, Self)] =
        &[("clean", Self::Clean), ("strict", Self::Strict), ("never-reuse", Self::Never)];

    /// The mode's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Strict => "strict",
            Self::Never => "never-reuse",
        }
    }
}

/// How long a connection beyond the pool's size is kept unused: callers that come one behind the other share it, and one
/// that is not needed is soon gone.
const OVERFLOW_IDLE: Duration = Duration::from_secs(1);

/// Attempts to log in to a server that starts up or is full, before a caller hears so.
const ATTEMPTS_MAX: u32 = 5;

/// The first pause after a failed login, and the longest; each is doubled, and taken at random up to its length.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(50);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(2);

/// An engine's connections.
pub(super) struct Pool {
    options: PoolOptions,
    connect: ConnectOptions,
    /// One permit for each connection in use.
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
    shares: Mutex<HashMap<Principal, Arc<Semaphore>>>,
    sub_pools: Mutex<HashMap<Arc<ConnectOverrides>, Arc<SubPool>>>,
    census: Arc<Census>,
    login_failures: AtomicU64,
    /// The first principal that had a connection.
    first: OnceLock<Principal>,
    /// Whether others have had one too.
    shared: AtomicBool,
    /// Counts the transactions that may have changed tables: statements prepared before the last of them are prepared
    /// anew, or they could fail in the middle of a transaction.
    schema_version: AtomicU64,
}

/// The connections of one combination of options.
struct SubPool {
    pool: managed::Pool<Opener>,
    /// Since when logging in fails, if it does.
    failing: Mutex<Option<Failing>>,
}

#[derive(Clone)]
struct Failing {
    error: CheckoutError,
    times: u32,
    until: Instant,
}

/// Why there is no connection yet.
enum NotOpened {
    Failed(CheckoutError),
    /// There may be one after a pause until then.
    Pause(Instant),
}

/// A connection in use, with the right to it.
pub(super) struct CheckedOut {
    /// First, so that it is back before another caller is let in.
    pub(super) backend: Option<Object<Opener>>,
    _share: Option<OwnedSemaphorePermit>,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    pub(super) fn new(connect: ConnectOptions, options: PoolOptions) -> Self {
        let total = options.size + options.overflow_max;
        Self {
            permits: Arc::new(Semaphore::new(total)),
            waiting: AtomicUsize::new(0),
            shares: Mutex::default(),
            sub_pools: Mutex::default(),
            census: Arc::new(Census::new(total)),
            login_failures: AtomicU64::new(0),
            first: OnceLock::new(),
            shared: AtomicBool::new(false),
            schema_version: AtomicU64::new(0),
            connect,
            options,
        }
    }

    pub(super) fn connect_options(&self) -> &ConnectOptions {
        &self.connect
    }

    pub(super) fn options(&self) -> &PoolOptions {
        &self.options
    }

    pub(super) fn statistics(&self) -> PoolStatistics {
        PoolStatistics {
            size: self.options.size,
            overflow_max: self.options.overflow_max,
            open: self.census.open(),
            in_use: self.in_use(),
            idle: self.idle(),
            waiting: self.waiting.load(Ordering::Relaxed),
            sub_pools: lock(&self.sub_pools).len(),
            opened: self.census.opened(),
            login_failures: self.login_failures.load(Ordering::Relaxed),
        }
    }

    pub(super) fn schema_version(&self) -> u64 {
        self.schema_version.load(Ordering::Relaxed)
    }

    /// A transaction has been committed that may have changed tables.
    pub(super) fn tables_changed(&self) {
        self.schema_version.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether its connections are used by more than one principal.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.load(Ordering::SeqCst)
    }

    fn in_use(&self) -> usize {
        self.total() - self.permits.available_permits()
    }

    fn idle(&self) -> usize {
        self.census.open().saturating_sub(self.in_use())
    }

    fn total(&self) -> usize {
        self.options.size + self.options.overflow_max
    }

    /// Waits for a connection, in arrival order.
    ///
    /// # Cancel safety
    /// Dropping the future gives back what it had.
    pub(super) async fn checkout(
        &self,
        principal: &Principal,
        overrides: &Arc<ConnectOverrides>,
    ) -> Result<CheckedOut, CheckoutError> {
        // Before it can get one that is clean for somebody else only.
        if self.first.get_or_init(|| principal.clone()) != principal {
            self.shared.store(true, Ordering::SeqCst);
        }
        self.take(principal, overrides).await
    }

    /// The same, for no principal to use.
    async fn take(
        &self,
        principal: &Principal,
        overrides: &Arc<ConnectOverrides>,
    ) -> Result<CheckedOut, CheckoutError> {
        let until = Instant::now() + self.options.timeout;
        let mut attempts = 0;
        loop {
            let share = match self.share(principal) {
                None => None,
                Some(share) => Some(self.wait(share, until).await?),
            };
            let permit = self.wait(self.permits.clone(), until).await?;
            let sub_pool = self.sub_pool(overrides)?;
            let opened = timeout_at(until + self.connect.connect_timeout, self.open(&sub_pool, until, &mut attempts));
            let next = match opened.await {
                Ok(Ok(backend)) => {
                    return Ok(CheckedOut { backend: Some(backend), _share: share, _permit: permit });
                }
                Ok(Err(NotOpened::Failed(error))) => return Err(error),
                Ok(Err(NotOpened::Pause(next))) => next,
                Err(_) => {
                    let bound = humantime::format_duration(self.options.timeout + self.connect.connect_timeout);
                    return Err(CheckoutError::Unreachable(format!("no usable connection within {bound}")));
                }
            };
            // Who pauses takes no place from those that could go on.
            drop((share, permit));
            sleep_until(next).await;
        }
    }

    /// The principal's part of the pool. The anonymous principal is everyone, and has all of it.
    fn share(&self, principal: &Principal) -> Option<Arc<Semaphore>> {
        if *principal == Principal::anonymous() {
            return None;
        }
        let part = (self.total() * self.options.principal_share_percent / 100).max(1);
        let mut shares = lock(&self.shares);
        // Those of principals that use nothing are not kept.
        shares.retain(|_, share| Arc::strong_count(share) > 1);
        Some(shares.entry(principal.clone()).or_insert_with(|| Arc::new(Semaphore::new(part))).clone())
    }

    async fn wait(&self, permits: Arc<Semaphore>, until: Instant) -> Result<OwnedSemaphorePermit, CheckoutError> {
        if let Ok(permit) = permits.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let _waiting = Waiting::new(&self.waiting, self.options.waiters_max)?;
        match timeout_at(until, permits.acquire_owned()).await {
            Ok(permit) => Ok(permit.expect("the semaphores are never closed")),
            Err(_) => Err(CheckoutError::Wait(self.options.timeout)),
        }
    }

    /// The sub-pool for these options. The engine's own is always there; one that nobody uses makes room for another.
    fn sub_pool(&self, overrides: &Arc<ConnectOverrides>) -> Result<Arc<SubPool>, CheckoutError> {
        let mut sub_pools = lock(&self.sub_pools);
        if let Some(sub_pool) = sub_pools.get(overrides) {
            return Ok(sub_pool.clone());
        }
        let others = sub_pools.keys().filter(|overrides| !overrides.is_empty()).count();
        if !overrides.is_empty() && others >= self.options.sub_pools_max {
            let unused = sub_pools.iter().find(|(overrides, sub_pool)| !overrides.is_empty() && sub_pool.is_unused());
            let unused = unused.map(|(overrides, _)| overrides.clone());
            sub_pools.remove(&unused.ok_or(CheckoutError::SubPools(self.options.sub_pools_max))?);
        }
        let sub_pool = Arc::new(SubPool::new(self.connect.with(overrides), &self.options, self.census.clone()));
        sub_pools.insert(overrides.clone(), sub_pool.clone());
        Ok(sub_pool)
    }

    /// A connection of the sub-pool: an idle one that is still good, or a new one. While logging in fails, callers
    /// pause until the next attempt, each a little longer than the other, or hear what the last one said.
    async fn open(&self, sub_pool: &SubPool, until: Instant, attempts: &mut u32) -> Result<Object<Opener>, NotOpened> {
        if sub_pool.failing().is_none() || sub_pool.pool.status().available > 0 {
            match self.get(sub_pool).await {
                Ok(backend) => {
                    *lock(&sub_pool.failing) = None;
                    return Ok(backend);
                }
                Err(PoolError::Backend(error)) => {
                    let error = CheckoutError::from(error);
                    self.login_failures.fetch_add(1, Ordering::Relaxed);
                    *attempts += 1;
                    debug!(cause = %error, attempts, "cannot open a connection");
                    sub_pool.fail(error.clone());
                    if *attempts == ATTEMPTS_MAX {
                        return Err(NotOpened::Failed(error));
                    }
                }
                Err(error) => return Err(NotOpened::Failed(CheckoutError::Unreachable(error.to_string()))),
            }
        }
        match sub_pool.failing() {
            None => Err(NotOpened::Pause(Instant::now())),
            Some(failing) => {
                let next = failing.until + jittered(PAUSE_MIN);
                let hopeless = !may_pass(&failing.error) || next >= until;
                Err(if hopeless { NotOpened::Failed(failing.error) } else { NotOpened::Pause(next) })
            }
        }
    }

    /// A connection of the sub-pool; where there is no room for a new one, an idle one of another sub-pool is closed.
    async fn get(&self, sub_pool: &SubPool) -> Result<Object<Opener>, PoolError<OpenError>> {
        loop {
            match sub_pool.pool.get().await {
                // From before others came, whose it is not.
                Ok(backend) if backend.is_for_one_principal() && self.is_shared() => drop(Object::take(backend)),
                // Connections in use are bounded by their permits, ours among them: if there is no room, one is idle.
                Err(PoolError::Backend(OpenError::NoRoom)) => self.close_one_idle(),
                got => return got,
            }
            tokio::task::yield_now().await;
        }
    }

    fn close_one_idle(&self) {
        let sub_pools: Vec<_> = lock(&self.sub_pools).values().cloned().collect();
        for sub_pool in sub_pools {
            let mut closed = false;
            // Keeps all from the second on.
            sub_pool.pool.retain(|_, _| std::mem::replace(&mut closed, true));
            if closed {
                return;
            }
        }
    }

    /// Closes what is too old, unused for too long or gone, forgets sub-pools that are empty, and opens what is to be
    /// kept open.
    pub(super) async fn maintain(&self) {
        let sub_pools: Vec<_> = lock(&self.sub_pools).values().cloned().collect();
        let mut spare = self.idle().saturating_sub(self.options.idle_min);
        let mut beyond = self.idle().saturating_sub(self.options.size);
        for sub_pool in &sub_pools {
            sub_pool.pool.retain(|backend, _| {
                let unused = spare > 0 && backend.idle_for() >= self.options.idle_timeout;
                let overflowed = beyond > 0 && backend.idle_for() >= OVERFLOW_IDLE;
                let keep = backend.is_usable() && !unused && !overflowed;
                if !keep {
                    spare = spare.saturating_sub(1);
                    beyond = beyond.saturating_sub(1);
                }
                keep
            });
        }
        lock(&self.sub_pools).retain(|overrides, sub_pool| {
            // Two that hold it are this function and the map.
            let in_use = Arc::strong_count(sub_pool) > 2 || sub_pool.pool.status().size > 0;
            overrides.is_empty() || in_use || sub_pool.failing().is_some()
        });
        drop(sub_pools);
        if self.in_use() > 0 {
            // Callers open what they need; nothing is to be taken from them.
            return;
        }
        let own = Arc::new(ConnectOverrides::default());
        let mut fresh = Vec::new();
        while self.census.open() < self.options.idle_min.min(self.options.size) {
            // Held until all are open, or the same one would be handed out again.
            match self.take(&Principal::anonymous(), &own).await {
                Ok(checked_out) => fresh.push(checked_out),
                Err(error) => {
                    debug!(cause = %error, "cannot keep the least number of connections open");
                    break;
                }
            }
        }
    }

    /// Forgets that logging in has failed: it has just worked.
    pub(super) fn recovered(&self) {
        for sub_pool in lock(&self.sub_pools).values() {
            let mut failing = lock(&sub_pool.failing);
            // A caller's wrong database or user is still wrong.
            if failing.as_ref().is_some_and(|failing| !matches!(failing.error, CheckoutError::Refused(_))) {
                *failing = None;
            }
        }
    }

    /// Opens a connection beside the pool, and closes it again.
    pub(super) async fn probe(&self) -> Result<(), OpenError> {
        self.opener_apart().open().await.map(drop)
    }

    /// Opens a connection to the server at `host` that is none of the pool's.
    pub(super) async fn open_apart(&self, host: &str) -> Result<Backend, OpenError> {
        self.opener_apart().open_found(host).await
    }

    /// Opens a connection that is none of the pool's and tells what is notified to it.
    pub(super) async fn open_listening(&self, notified: Notified) -> Result<Backend, OpenError> {
        self.opener_apart().telling(notified).open().await
    }

    fn opener_apart(&self) -> Opener {
        Opener::new(self.connect.clone(), &self.options, Arc::new(Census::new(1)))
    }
}

impl SubPool {
    fn new(connect: ConnectOptions, options: &PoolOptions, census: Arc<Census>) -> Self {
        /// The opener keeps its own budget; this only stops one that fails to.
        const OPENER_SLACK: Duration = Duration::from_secs(5);
        /// A ping takes a round trip.
        const RECYCLE: Duration = Duration::from_secs(1);

        let create = connect.connect_timeout + OPENER_SLACK;
        let timeouts = Timeouts { wait: Some(options.timeout), create: Some(create), recycle: Some(RECYCLE) };
        let pool = managed::Pool::builder(Opener::new(connect, options, census))
            // The permits before it are the bound.
            .max_size(options.size + options.overflow_max)
            // The one used last is the likeliest to be good, and the others get old enough to be retired.
            .queue_mode(QueueMode::Lifo)
            .timeouts(timeouts)
            .runtime(Runtime::Tokio1)
            .build()
            .expect("a pool with timeouts has a runtime");
        Self { pool, failing: Mutex::default() }
    }

    fn is_unused(&self) -> bool {
        let status = self.pool.status();
        status.available == status.size
    }

    /// The failure that new attempts wait out.
    fn failing(&self) -> Option<Failing> {
        lock(&self.failing).clone().filter(|failing| failing.until > Instant::now())
    }

    fn fail(&self, error: CheckoutError) {
        let mut failing = lock(&self.failing);
        if failing.as_ref().is_some_and(|failing| failing.until > Instant::now()) {
            // One of several attempts made at the same time: together they are one failure.
            return;
        }
        let times = failing.as_ref().map_or(0, |failing| failing.times) + 1;
        let longest = (PAUSE_MIN * 2_u32.saturating_pow(times - 1).min(1000)).min(PAUSE_MAX);
        *failing = Some(Failing { error, times, until: Instant::now() + jittered(longest) });
    }
}

impl CheckedOut {
    /// The connection.
    pub(super) fn backend(&self) -> &Backend {
        self.backend.as_ref().expect("it is there until it has been given back")
    }
}

/// Whether a failure may pass by itself within moments: the server starts up, or all its connections are in use.
fn may_pass(error: &CheckoutError) -> bool {
    matches!(error, CheckoutError::Refused(error)
        if matches!(error.sqlstate.as_str(), CANNOT_CONNECT_NOW | TOO_MANY_CONNECTIONS))
}

/// Counts a caller that waits.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize, max: usize) -> Result<Self, CheckoutError> {
        let entered = count.fetch_add(1, Ordering::Relaxed) < max;
        let waiting = Self(count);
        if entered { Ok(waiting) } else { Err(CheckoutError::Queue(max)) }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while one of these is held, so a poisoned one holds sound facts.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
