//! A session: a caller's leased context. It owns no connection; its transaction task does, while there is one.
//!
//! Every call enters (the lease is suspended), waits for its turn, hands the turn with its command to the transaction
//! task, and waits for the answer. A call that is dropped anywhere on that way leaves nothing behind: before the
//! hand-over nothing has begun, after it the task owns everything. Invariant: [`Phase`] changes under the lock only,
//! and nothing leaves [`Phase::Ended`].

pub mod attach;
pub mod interact;
pub mod streaming;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{Span, debug, info};

use super::account::{Resource, Taken};
use super::admin::AUDIT;
use super::commit::{ClusterXid, CommitToken, TransactionId};
use super::connect::ConnectOverrides;
use super::engine::{Engine, EngineInfo, IsolationLevel, SavepointAction, SavepointName, TransactionOptions, Work};
use super::error::{Bound, EndReason, Error, Exhausted, Failure};
use super::lease::{Judgement, Lease};
use super::observer::{Event, Observer, TracePlace};
use super::principal::Principal;
use super::profile::{Class, Profile, ReaperMode};
use super::reaper::Place;
use super::statement::{ResultFormat, ResultLimits, ResultSet, Statement};
use super::terms::Terms;
use super::token::{SessionId, SessionToken};
use super::transaction::{self, Call, Command, Deadline, Verdict};
use super::{Fingerprint, Shared};

/// How a session lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// For a caller that comes back: its lease is watched, and its end remembered.
    Leased,
    /// For one call, which owns it.
    OneShot,
}

/// A leased session.
#[derive(Debug)]
pub struct Session {
    life: Life,
    token: SessionToken,
    principal: Principal,
    /// The most transactions that its principal may have open.
    transactions_max: Option<usize>,
    engine: Arc<dyn Engine>,
    terms: Arc<Terms>,
    labels: BTreeMap<String, String>,
    /// Where it was begun, if that is traced.
    origin: Option<TracePlace>,
    shared: Arc<Shared>,
    /// One permit: calls take it in arrival order.
    turns: Semaphore,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    lease: Lease,
    /// Calls that run or wait; while there is one, the lease is suspended.
    calls: u32,
    /// What the last commit did, until another transaction begins. It outlives the session, in its tombstone.
    last_commit: Option<Verdict>,
    /// The last numbered call; it goes with the session.
    last_numbered: Option<Box<Kept>>,
    /// Its place in the reaper's wheel.
    place: Option<Place>,
    /// Tells the stream that is attached of a change.
    changed: Option<Arc<Notify>>,
    /// Its time is over, and the reaper has only counted it.
    spared: bool,
    /// Its place among its principal's; `None` once it has ended.
    taken: Option<Taken>,
}

/// A call of Execute that can be repeated: its number in its session, and a fingerprint of what it asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbered {
    /// From 1.
    pub seq: u64,
    /// Differs when the request does.
    pub fingerprint: Fingerprint,
}

/// A numbered call's answer, kept for a repeat.
#[derive(Debug)]
struct Kept {
    numbered: Numbered,
    /// `None` when it was too large, or there was no room.
    answer: Option<Box<Result<Executed, Failure>>>,
    /// The room of a large one.
    _room: Option<OwnedSemaphorePermit>,
}

/// The largest answer kept for a repeat. What changes data answers little; what reads much can be read again.
const KEPT_KIB_MAX: usize = 64;

/// The largest answer that is always kept: a row or two, or an error.
const SMALL_KIB: usize = 4;

/// Where a session is in its life.
#[derive(Debug)]
enum Phase {
    /// No transaction. Leaves for `Open` with the next Execute, for `Ended` at any time.
    Idle,
    /// A transaction task runs. Leaves for `Idle` when the task says the transaction is over, for `Ended` at any time.
    Open(Box<Open>),
    /// Over, for good.
    Ended(EndReason),
}

#[derive(Debug)]
struct Open {
    /// To the transaction task. Dropping it tells the task to roll back.
    commands: mpsc::Sender<Command>,
    deadline: Instant,
    /// Once the task has a connection.
    backend: Option<BackendInfo>,
    /// Once PostgreSQL has given it one.
    id: Option<TransactionId>,
    failed: bool,
    /// COMMIT is under way.
    committing: bool,
    /// Resolves when the task has left.
    over: Over,
    /// The statement that runs, or the last that ran.
    running: Option<Running>,
    /// Its place among its principal's.
    _taken: Taken,
}

/// Resolves when a transaction's task has left: its sender goes with the task, and says nothing.
pub(super) type Over = oneshot::Receiver<Infallible>;

/// A statement that runs, or waits for a connection to run on, as Cancel sees it.
#[derive(Debug, Clone)]
struct Running {
    since: Instant,
    /// Asks that the statement stop.
    stop: Arc<Notify>,
    course: watch::Receiver<Course>,
}

impl Running {
    fn is_over(&self) -> bool {
        matches!(*self.course.borrow(), Course::Over { .. })
    }
}

/// What becomes of a statement that somebody may want to stop.
#[derive(Debug)]
enum Course {
    Runs,
    /// It runs on, because PostgreSQL could not be asked to stop it.
    RunsOn(String),
    Over {
        stopped: bool,
    },
}

/// The same, as the transaction task sees it. Dropped, the statement is over.
#[derive(Debug)]
pub(super) struct Stoppable {
    since: Instant,
    /// Notified, the statement is to stop.
    pub(super) stop: Arc<Notify>,
    /// Whether it has been stopped.
    pub(super) was_stopped: bool,
    course: watch::Sender<Course>,
}

impl Stoppable {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            stop: Arc::new(Notify::new()),
            was_stopped: false,
            course: watch::Sender::new(Course::Runs),
        }
    }

    fn running(&self) -> Running {
        Running { since: self.since, stop: self.stop.clone(), course: self.course.subscribe() }
    }

    /// Tells whoever wants it stopped that PostgreSQL could not be asked.
    pub(super) fn runs_on(&self, cause: String) {
        self.course.send_replace(Course::RunsOn(cause));
    }
}

impl Drop for Stoppable {
    fn drop(&mut self) {
        self.course.send_replace(Course::Over { stopped: self.was_stopped });
    }
}

/// Where a session stands, as its caller sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionState {
    /// The transaction.
    pub transaction: TransactionState,
    /// The transaction's id, once it has one.
    pub transaction_id: Option<TransactionId>,
    /// Until the lease runs out.
    pub lease_remaining: Duration,
    /// Until the maximum age.
    pub session_remaining: Duration,
    /// Until the transaction's deadline.
    pub transaction_remaining: Option<Duration>,
    /// Until the session ends for being kept and not used.
    pub idle_remaining: Duration,
    /// A stream keeps it.
    pub attached: bool,
    /// When to renew.
    pub renew_after: Duration,
    /// The broker is about to stop.
    pub draining: bool,
}

/// Where a session's transaction stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TransactionState {
    /// There is none.
    None,
    /// It takes statements.
    Open,
    /// It takes nothing but a rollback.
    Failed,
}

/// The PostgreSQL backend that runs a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendInfo {
    /// Its process id.
    pub pid: i32,
    /// Where its server is.
    pub host: Arc<str>,
}

/// A live session at one instant, as operators see it.
#[derive(Debug, Clone)]
pub struct Glance {
    /// Where it stands. Its transaction's id comes without the commit token, which is the caller's.
    pub state: SessionState,
    /// How long ago it began.
    pub age: Duration,
    /// For how long it has not been used; zero while a call runs or waits.
    pub idle: Duration,
    /// How long ago its transaction began.
    pub transaction_age: Option<Duration>,
    /// How long ago the statement was given that runs, or waits for a connection to run on.
    pub statement_age: Option<Duration>,
    /// The backend of its transaction.
    pub backend: Option<BackendInfo>,
}

/// What is behind a session.
#[derive(Debug, Clone)]
pub struct Description {
    /// The session's loggable name.
    pub id: SessionId,
    /// The engine.
    pub engine: EngineInfo,
    /// The profile's name.
    pub profile: String,
    /// The backend of the open transaction.
    pub backend: Option<BackendInfo>,
    /// Where it stands, or why it ended.
    pub standing: Result<SessionState, EndReason>,
    /// The labels it was begun with.
    pub labels: BTreeMap<String, String>,
}

/// How one transaction begins, where not as its session's options say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransactionChoice {
    /// Its isolation.
    pub isolation_level: Option<IsolationLevel>,
    /// READ ONLY.
    pub read_only: Option<bool>,
    /// DEFERRABLE.
    pub deferrable: Option<bool>,
}

/// A call of Execute.
#[derive(Debug)]
pub struct ExecuteCall {
    /// What to run, in order.
    pub statements: Arc<[Statement]>,
    /// How rows are returned.
    pub format: ResultFormat,
    /// For a call that can be repeated.
    pub numbered: Option<Numbered>,
    /// How it is done.
    pub options: CallOptions,
}

/// How a call is done.
#[derive(Debug, Clone, Default)]
pub struct CallOptions {
    /// Commit when all has succeeded.
    pub commit: bool,
    /// How the transaction begins, for a call that begins it.
    pub transaction: Option<TransactionChoice>,
    /// The kind of its statements, by its name.
    pub class: Option<String>,
    /// The caller's row limit.
    pub rows_max: Option<u64>,
    /// The request's own time limit.
    pub timeout: Option<Duration>,
    /// When the caller's gRPC deadline passes.
    pub grpc_deadline: Option<Instant>,
}

/// Where the answer comes.
pub(super) type Answer = oneshot::Receiver<Result<Executed, Failure>>;

/// An Execute that succeeded.
#[derive(Debug, Clone)]
pub struct Executed {
    /// The statements' results, in order.
    pub results: Vec<ResultSet>,
    /// What the commit did, if one was asked for.
    pub verdict: Option<Verdict>,
    /// The session after the call.
    pub state: SessionState,
}

/// A commit that succeeded.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    /// `Committed` or `NothingWritten`.
    pub verdict: Verdict,
    /// The session after the call; `None` when it had ended before.
    pub state: Option<SessionState>,
}

impl Session {
    #[allow(clippy::too_many_arguments, reason = "each is a part of the session, given once, in one place")]
    pub(super) fn new(
        life: Life,
        token: SessionToken,
        principal: Principal,
        taken: Taken,
        transactions_max: Option<usize>,
        engine: Arc<dyn Engine>,
        terms: Arc<Terms>,
        labels: BTreeMap<String, String>,
        lease_ttl: Duration,
        shared: Arc<Shared>,
    ) -> Self {
        let state = State {
            phase: Phase::Idle,
            lease: Lease::grant(Instant::now(), lease_ttl, terms.profile.session_age_max),
            calls: 0,
            last_commit: None,
            last_numbered: None,
            place: None,
            changed: None,
            spared: false,
            taken: Some(taken),
        };
        Self {
            life,
            token,
            principal,
            transactions_max,
            engine,
            terms,
            labels,
            origin: shared.observer.here(),
            shared,
            turns: Semaphore::new(1),
            state: Mutex::new(state),
        }
    }

    /// The loggable name.
    pub fn id(&self) -> SessionId {
        self.token.id()
    }

    /// The credential that opens it, for its caller.
    pub fn token(&self) -> &SessionToken {
        &self.token
    }

    /// The longest its transactions stay open.
    pub(super) fn transaction_timeout(&self) -> Duration {
        self.terms.transaction_timeout
    }

    /// The most bytes of an answer.
    pub(super) fn result_bytes_max(&self) -> usize {
        self.profile().result_bytes_max
    }

    /// Says what is wrong with a class's name.
    pub(super) fn check_class(&self, class: &str) -> Result<(), Error> {
        self.terms.class(class).map(drop)
    }

    pub(super) fn profile(&self) -> &Profile {
        &self.terms.profile
    }

    /// The name of its profile.
    pub fn profile_name(&self) -> &str {
        &self.terms.profile_name
    }

    /// The lease granted.
    pub(super) fn lease_ttl(&self) -> Duration {
        self.lock().lease.ttl()
    }

    /// Runs statements in the session's transaction, beginning it when there is none.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn runs nothing; later it cancels the statement, but never a COMMIT.
    pub async fn execute(self: &Arc<Self>, call: ExecuteCall) -> Result<Executed, Failure> {
        let turn = self.turn().await?;
        let ExecuteCall { statements, format, numbered, options } = call;
        if let Some(numbered) = numbered
            && let Some(answer) = turn.repeated(numbered)
        {
            return answer;
        }
        let turn = self.check_parameters(turn, &statements)?;
        let work = Work::Statements(statements, format);
        let answer = self.ask(turn, work, Terms::result_limits, numbered, options)?;
        self.answered(answer).await
    }

    /// Runs the broker's own statements: the limits on what callers send and get are not for them.
    pub(super) async fn execute_own(
        self: &Arc<Self>,
        statements: Arc<[Statement]>,
        options: CallOptions,
    ) -> Result<Executed, Failure> {
        let turn = self.turn().await?;
        let work = Work::Statements(statements, ResultFormat::Values);
        let answer = self.ask(turn, work, |_, _, _| ResultLimits::NONE, None, options)?;
        self.answered(answer).await
    }

    /// Refuses what callers send beyond the limits, before any of it runs.
    fn check_parameters(&self, turn: Turn, statements: &[Statement]) -> Result<Turn, Failure> {
        match self.terms.check_parameters(statements) {
            Ok(()) => Ok(turn),
            Err((index, error)) => Err(Failure { index: Some(index), ..turn.refuse(error) }),
        }
    }

    /// Asks the transaction's task for work, and says where its answer will come; or what is wrong with the call that
    /// can be seen now: its class's name, and options for a transaction that is open.
    fn ask(
        self: &Arc<Self>,
        turn: Turn,
        work: Work,
        limits: impl FnOnce(&Terms, Class, Option<u64>) -> ResultLimits,
        numbered: Option<Numbered>,
        options: CallOptions,
    ) -> Result<Answer, Failure> {
        let CallOptions { commit, transaction, class, rows_max, timeout, grpc_deadline } = options;
        let class = match class.map(|class| self.terms.class(&class)).transpose() {
            Err(error) => return Err(turn.refuse(error)),
            Ok(_) if transaction.is_some() && !turn.is_idle() => return Err(turn.refuse(transaction_is_open())),
            Ok(class) => class.unwrap_or_default(),
        };
        let (reply, answer) = oneshot::channel();
        self.dispatch(Command::Execute(Box::new(transaction::Execute {
            begin: self.begin(transaction),
            commit,
            work,
            limits: limits(&self.terms, class, rows_max),
            deadline: self.deadline(class, timeout, grpc_deadline),
            answer_by: grpc_deadline,
            running: Stoppable::new(),
            call: Call { turn, numbered, reply, span: Span::current() },
        })));
        Ok(answer)
    }

    /// Sets a savepoint, releases it or rolls back to it. Setting one begins a transaction when there is none.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn does nothing; later the action may be done or not.
    pub async fn savepoint(
        self: &Arc<Self>,
        action: SavepointAction,
        name: SavepointName,
        transaction: Option<TransactionChoice>,
        grpc_deadline: Option<Instant>,
    ) -> Result<SessionState, Failure> {
        let turn = self.turn().await?;
        if turn.is_idle() && action != SavepointAction::Create {
            return Err(turn.refuse(action.unknown()));
        }
        let options = CallOptions { transaction, grpc_deadline, ..CallOptions::default() };
        let answer = self.ask(turn, Work::Savepoint(action, name), Terms::stream_limits, None, options)?;
        self.answered(answer).await.map(|done| done.state)
    }

    /// Commits the transaction. Without one it repeats the last commit's verdict, also after the session's end. Should
    /// the answer to COMMIT be lost, its outcome is looked for until the caller's gRPC deadline at the latest.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn commits nothing; later it does not stop the commit.
    pub async fn commit(self: &Arc<Self>, grpc_deadline: Option<Instant>) -> Result<Committed, Failure> {
        let turn = match self.turn().await {
            Ok(turn) => turn,
            Err(failure) => {
                let ended = matches!(failure.error, Error::SessionEnded(_));
                let verdict = self.last_commit().filter(|_| ended);
                return verdict.map_or(Err(failure), |verdict| verdict.answer(None));
            }
        };
        if turn.is_idle() {
            let verdict = self.last_commit().unwrap_or(Verdict::NothingWritten);
            return verdict.answer(Some(turn.finish(Progress::Unchanged)));
        }
        let (reply, answer) = oneshot::channel();
        self.dispatch(Command::Commit { answer_by: grpc_deadline, turn, reply, span: Span::current() });
        self.answered(answer).await
    }

    /// Rolls the transaction back. Without one it does nothing.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn rolls nothing back; later it does not stop the rollback.
    pub async fn rollback(self: &Arc<Self>) -> Result<SessionState, Failure> {
        let turn = self.turn().await?;
        if turn.is_idle() {
            return Ok(turn.finish(Progress::Unchanged));
        }
        let (reply, answer) = oneshot::channel();
        self.dispatch(Command::Rollback { turn, reply, span: Span::current() });
        self.answered(answer).await
    }

    /// Ends the session and says why it ended, which may have been earlier. Returns when an open transaction has been
    /// rolled back.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn ends nothing; later the end goes on.
    pub async fn close(self: &Arc<Self>) -> Result<EndReason, Failure> {
        let turn = match self.turn().await {
            Ok(turn) => turn,
            Err(Failure { error: Error::SessionEnded(reason), .. }) => return Ok(reason),
            Err(failure) => return Err(failure),
        };
        if turn.is_idle() {
            return Ok(self.end(EndReason::Closed));
        }
        let (reply, answer) = oneshot::channel();
        self.dispatch(Command::Close { turn, reply, span: Span::current() });
        match self.answered(answer).await {
            Err(Failure { error: Error::SessionEnded(reason), .. }) => Ok(reason),
            closed => closed,
        }
    }

    /// Stops the running statement: whether it was stopped, and not over before. Returns when it is over, or with
    /// [`Error::CancelUndelivered`] while it runs on.
    ///
    /// # Cancel safety
    /// Dropping the future does not take the request back.
    pub async fn cancel(&self) -> Result<(bool, SessionState), Failure> {
        let state = self.keep_alive()?;
        let running = match &self.lock().phase {
            Phase::Open(open) => open.running.clone(),
            Phase::Idle | Phase::Ended(_) => None,
        };
        let running = running.map(|mut running| {
            // What was told of earlier requests is none of this one's.
            running.course.mark_unchanged();
            running
        });
        let Some(Running { stop, mut course, .. }) = running.filter(|running| !running.is_over()) else {
            return Err(Failure { state: Some(state), ..Error::NothingToCancel.into() });
        };
        stop.notify_one();
        // A sender that has gone has told before.
        let _ = course.changed().await;
        let stopped = match &*course.borrow() {
            Course::Over { stopped } => Ok(*stopped),
            Course::RunsOn(cause) => Err(Error::CancelUndelivered(cause.clone())),
            Course::Runs => Ok(false),
        };
        let state = self.keep_alive()?;
        match stopped {
            Ok(stopped) => Ok((stopped, state)),
            Err(error) => Err(Failure { state: Some(state), ..error.into() }),
        }
    }

    /// Renews the lease.
    pub fn keep_alive(&self) -> Result<SessionState, Error> {
        let now = Instant::now();
        self.expire_at(now);
        let mut state = self.lock();
        state.alive()?;
        self.tell_renewal(&state, now);
        state.lease.renew(now);
        Ok(self.snapshot(&state, now))
    }

    /// Tells how much was left of a lease that is about to be renewed, if it runs.
    fn tell_renewal(&self, state: &State, now: Instant) {
        if self.life == Life::Leased && state.calls == 0 && !state.lease.is_attached() {
            self.shared.tell(Event::LeaseRenewed { remaining: state.lease.remaining(now) });
        }
    }

    /// Tells what is behind the session.
    pub fn describe(&self) -> Description {
        let now = Instant::now();
        self.expire_at(now);
        let mut engine = self.engine.info();
        let ConnectOverrides { database, user, .. } = &*self.terms.connect;
        engine.database = database.clone().unwrap_or(engine.database);
        engine.user = user.clone().unwrap_or(engine.user);
        let state = self.lock();
        Description {
            id: self.id(),
            engine,
            profile: self.profile_name().to_owned(),
            backend: match &state.phase {
                Phase::Open(open) => open.backend.clone(),
                Phase::Idle | Phase::Ended(_) => None,
            },
            standing: self.standing(&state, now),
            labels: self.labels.clone(),
        }
    }

    /// The session as operators see it, or why it ended.
    pub(super) fn glance(&self) -> Result<Glance, EndReason> {
        self.glance_at(&self.lock(), Instant::now())
    }

    fn glance_at(&self, state: &State, now: Instant) -> Result<Glance, EndReason> {
        let mut standing = self.standing(state, now)?;
        if let Some(id) = &mut standing.transaction_id {
            id.commit_token = None;
        }
        let (transaction_age, statement_age, backend) = match &state.phase {
            Phase::Idle | Phase::Ended(_) => (None, None, None),
            Phase::Open(open) => {
                let age = (now + self.terms.transaction_timeout).saturating_duration_since(open.deadline);
                let running = open.running.as_ref().filter(|running| !running.is_over());
                let statement_age = running.map(|running| now.saturating_duration_since(running.since));
                (Some(age), statement_age, open.backend.clone())
            }
        };
        let idle = match state.calls {
            0 => now.saturating_duration_since(state.lease.idle_since()),
            1.. => Duration::ZERO,
        };
        let age = state.lease.age(now, self.profile().session_age_max);
        Ok(Glance { state: standing, age, idle, transaction_age, statement_age, backend })
    }

    /// The backend of its transaction, if it has one.
    pub(super) fn backend(&self) -> Option<BackendInfo> {
        match &self.lock().phase {
            Phase::Open(open) => open.backend.clone(),
            Phase::Idle | Phase::Ended(_) => None,
        }
    }

    /// The labels it was begun with.
    pub(super) fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    /// Whether it belongs to one call.
    pub(super) fn is_one_shot(&self) -> bool {
        self.life == Life::OneShot
    }

    /// Ends the session for an operator: how it was, and what resolves when its transaction's task has left, if it has
    /// one; or why it had ended before.
    pub(super) fn terminate(&self) -> Result<(Glance, Option<Over>), EndReason> {
        let state = self.lock();
        let glance = self.glance_at(&state, Instant::now())?;
        let over = match self.end_phase(state, EndReason::Terminated)? {
            Phase::Open(open) => Some(open.over),
            Phase::Idle | Phase::Ended(_) => None,
        };
        Ok((glance, over))
    }

    /// Whether the token's bearer is this session's caller.
    pub(super) fn answers_to(&self, principal: &Principal, token: &SessionToken) -> bool {
        // Both are always compared, so that the time taken tells nothing.
        let proven = self.token.secret().matches(&token.secret());
        let own = self.principal == *principal;
        proven && own
    }

    /// Where its transaction stands, or why it ended.
    pub(super) fn transaction_state(&self) -> Result<TransactionState, EndReason> {
        match &self.lock().phase {
            Phase::Idle => Ok(TransactionState::None),
            Phase::Open(open) if open.failed => Ok(TransactionState::Failed),
            Phase::Open(_) => Ok(TransactionState::Open),
            Phase::Ended(reason) => Err(*reason),
        }
    }

    /// Why it ended, if it has.
    pub(super) fn end_reason(&self) -> Option<EndReason> {
        self.transaction_state().err()
    }

    pub(super) fn observer(&self) -> &dyn Observer {
        &*self.shared.observer
    }

    /// Links a span to where the session was begun.
    pub(super) fn link(&self, span: &Span) {
        if let Some(origin) = self.origin {
            self.shared.observer.link(span, origin);
        }
    }

    /// The session's state as of now, or why it ended.
    pub fn state(&self) -> Result<SessionState, EndReason> {
        let now = Instant::now();
        self.expire_at(now);
        self.standing(&self.lock(), now)
    }

    fn standing(&self, state: &State, now: Instant) -> Result<SessionState, EndReason> {
        match state.phase {
            Phase::Ended(reason) => Err(reason),
            Phase::Idle | Phase::Open(_) => Ok(self.snapshot(state, now)),
        }
    }

    /// Ends the session if its lease has run out; otherwise says when to ask again, unless it has ended.
    pub(super) fn expire(&self) -> Option<Instant> {
        self.expire_at(Instant::now())
    }

    fn expire_at(&self, now: Instant) -> Option<Instant> {
        let state = self.lock();
        let idle_timeout = self.profile().session_idle_timeout;
        let idle_end = match state.phase {
            Phase::Ended(_) => return None,
            Phase::Idle => Some(state.lease.idle_since() + idle_timeout),
            // The transaction's task looks after that.
            Phase::Open(_) => None,
        };
        match state.calls {
            // Its caller is there, waiting.
            _ if self.life == Life::OneShot => None,
            1.. => Some(state.lease.judge_again(now)),
            0 => match state.lease.judge(now, idle_end) {
                // A transaction may end meanwhile, and the session be idle from then on.
                Judgement::HoldsUntil(due) => Some(due.min(now + idle_timeout)),
                Judgement::Expired(reason, since) => {
                    self.reap(state, reason, now - since);
                    None
                }
            },
        }
    }

    /// Ends the session if it has not been used in its transaction for its idle limit; otherwise says when to ask again,
    /// unless it has ended.
    pub(super) fn expire_in_transaction(&self) -> Option<Instant> {
        let now = Instant::now();
        let state = self.lock();
        let limit = self.profile().idle_in_transaction_timeout;
        let end = match state.calls {
            0 if self.life == Life::Leased => state.lease.idle_since() + limit,
            // Its caller is there, waiting.
            _ => now + limit,
        };
        match state.phase {
            Phase::Ended(_) => None,
            Phase::Idle | Phase::Open(_) if now < end => Some(end),
            Phase::Idle | Phase::Open(_) => self.reap(state, EndReason::IdleTimeout, now - end).then_some(now + limit),
        }
    }

    /// Ends a session whose time is over; or counts it once, and lets it live: whether it does.
    fn reap(&self, mut state: MutexGuard<'_, State>, reason: EndReason, late: Duration) -> bool {
        match self.shared.reaper_mode {
            ReaperMode::On => {
                self.end_locked(state, reason);
                self.shared.tell(Event::SessionReaped { late });
                false
            }
            ReaperMode::DryRun => {
                if !std::mem::replace(&mut state.spared, true) {
                    let count = self.shared.would_have_reaped.fetch_add(1, Ordering::Relaxed) + 1;
                    self.shared.tell(Event::SessionSpared);
                    info!(
                        session.id = %self.id(), would.end_reason = %reason, would.have_reaped = count,
                        "session would have been reaped"
                    );
                }
                true
            }
        }
    }

    /// Notes that it stands in the reaper's wheel no more, and where it has.
    pub(super) fn take_place(&self) -> Option<Place> {
        self.lock().place.take()
    }

    /// Notes where it stands in the reaper's wheel. False when it has ended, and is not to stand there.
    pub(super) fn set_place(&self, place: Place) -> bool {
        let mut state = self.lock();
        let alive = state.alive().is_ok();
        if alive {
            state.place = Some(place);
        }
        alive
    }

    /// Ends the session now, whatever runs, and says why it ended, which may have been earlier.
    pub(super) fn end(&self, reason: EndReason) -> EndReason {
        self.end_locked(self.lock(), reason)
    }

    /// Ends the session if it has neither a transaction nor a call.
    pub(super) fn end_if_idle(&self, reason: EndReason) {
        let state = self.lock();
        if matches!(state.phase, Phase::Idle) && state.calls == 0 {
            self.end_locked(state, reason);
        }
    }

    fn end_locked(&self, state: MutexGuard<'_, State>, reason: EndReason) -> EndReason {
        match self.end_phase(state, reason) {
            Ok(_) => reason,
            Err(earlier) => earlier,
        }
    }

    /// Ends the session: in which phase it was, or why it had ended before. Dropping an open phase drops the task's
    /// only sender: the task rolls back.
    fn end_phase(&self, mut state: MutexGuard<'_, State>, reason: EndReason) -> Result<Phase, EndReason> {
        if let Phase::Ended(earlier) = state.phase {
            return Err(earlier);
        }
        if matches!(&state.phase, Phase::Open(open) if open.backend.is_some() && !open.committing) {
            // What was committed before says nothing of the transaction that has begun since.
            state.last_commit = None;
        }
        state.last_numbered = None;
        state.taken = None;
        let place = state.place.take();
        let phase = std::mem::replace(&mut state.phase, Phase::Ended(reason));
        state.tell();
        drop(state);
        // Calls that wait for a turn find the phase ended and leave.
        match self.life {
            Life::Leased => {
                self.shared.bury(self.id(), place);
                self.shared.tell(Event::SessionEnded { engine: self.engine.name(), reason });
                if reason == EndReason::Closed {
                    debug!(session.id = %self.id(), session.end_reason = %reason, "session ended");
                } else {
                    info!(session.id = %self.id(), session.end_reason = %reason, "session ended");
                }
            }
            Life::OneShot => self.shared.registry.forget(self.id()),
        }
        if reason.is_reaping() {
            info!(
                target: AUDIT, event = "session.reaped", session.id = %self.id(), principal = %self.principal,
                session.end_reason = %reason, "session reaped"
            );
        }
        Ok(phase)
    }

    /// Enters the session and waits for the calls before.
    async fn turn(self: &Arc<Self>) -> Result<Turn, Failure> {
        let ticket = self.enter()?;
        let permit = self.turns.acquire().await.expect("the semaphore is never closed");
        permit.forget();
        let turn = Turn { ticket };
        let alive = self.lock().alive();
        alive.map(|()| turn).map_err(Failure::from)
    }

    /// Suspends the lease for a call, or says why there is none.
    fn enter(self: &Arc<Self>) -> Result<Ticket, Failure> {
        let now = Instant::now();
        self.expire_at(now);
        let mut state = self.lock();
        state.alive()?;
        // Calls that follow one another without a gap would keep it for ever.
        if state.calls > 0 && state.lease.until_end(now).is_zero() && self.shared.reaper_mode == ReaperMode::On {
            return Err(Error::SessionEnded(EndReason::MaxAge).into());
        }
        self.tell_renewal(&state, now);
        state.lease.renew(now);
        if state.calls >= self.profile().session_queue_max {
            let error = Error::Exhausted(Exhausted::SessionQueue(self.profile().session_queue_max));
            return Err(Failure { state: Some(self.snapshot(&state, now)), ..error.into() });
        }
        state.calls += 1;
        Ok(Ticket(self.clone()))
    }

    /// Hands a command, and with it the turn, to the transaction task, starting one when there is none. Does not wait.
    ///
    /// A command that finds no task is dropped, and its caller looks why: see [`Self::answered`].
    fn dispatch(self: &Arc<Self>, command: Command) {
        let mut state = self.lock();
        match (&mut state.phase, command) {
            (Phase::Open(open), command) => {
                if let Command::Execute(execute) = &command {
                    open.running = Some(execute.running.running());
                }
                // The turn sees to it that the channel, which holds one command, is empty.
                let refused = open.commands.try_send(command);
                state.tell();
                // The lock goes first: a dropped command drops its turn, which takes the lock.
                drop(state);
                drop(refused);
            }
            (Phase::Idle, Command::Execute(first)) => {
                let own = state.taken.as_ref().expect("a session that has not ended has its place");
                let taken = match own.account().take(Resource::Transaction, self.transactions_max) {
                    Ok(taken) => taken,
                    Err(error) => {
                        drop(state);
                        return transaction::refuse(first, Some(error));
                    }
                };
                let (commands, received) = mpsc::channel(1);
                let (leaving, over) = oneshot::channel();
                let deadline = Instant::now() + self.terms.transaction_timeout;
                // A commit of what cannot begin must not be told of one before that went well.
                if matches!(state.last_commit, Some(Verdict::Committed(_) | Verdict::NothingWritten)) {
                    state.last_commit = None;
                }
                state.phase = Phase::Open(Box::new(Open {
                    commands,
                    deadline,
                    backend: None,
                    id: None,
                    failed: false,
                    committing: false,
                    over,
                    running: Some(first.running.running()),
                    _taken: taken,
                }));
                state.tell();
                drop(state);
                let task = transaction::run(self.clone(), first, received, deadline);
                self.shared.transactions.spawn(async move {
                    task.await;
                    // It goes too when the task is dropped or dies.
                    drop(leaving);
                });
            }
            (Phase::Idle | Phase::Ended(_), command) => {
                drop(state);
                drop(command);
            }
        }
    }

    /// Waits for the transaction task's answer.
    pub(super) async fn answered<T>(
        &self,
        answer: impl Future<Output = Result<Result<T, Failure>, oneshot::error::RecvError>>,
    ) -> Result<T, Failure> {
        if let Ok(answer) = answer.await {
            return answer;
        }
        // A task leaves without an answer when the session has ended. Otherwise it has died, its connection with it.
        let alive = self.lock().alive();
        Err(match alive {
            Err(ended) => ended.into(),
            Ok(()) => {
                self.end(EndReason::BackendLost);
                Error::internal(&format!("the transaction task of session {} died", self.id())).into()
            }
        })
    }

    /// The shortest of the limits on a statement; what the transaction has left is the task's to add.
    fn deadline(&self, class: Class, timeout: Option<Duration>, grpc_deadline: Option<Instant>) -> Deadline {
        let now = Instant::now();
        let (timeout, bound) = self.terms.statement_timeout(class, timeout);
        let deadline = Deadline::new(now, now + timeout, bound);
        match grpc_deadline {
            Some(at) => deadline.or_earlier(at, Bound::GrpcDeadline),
            None => deadline,
        }
    }

    /// How a transaction of this session begins.
    fn begin(&self, choice: Option<TransactionChoice>) -> Arc<TransactionOptions> {
        let options = &self.terms.transaction;
        let Some(TransactionChoice { isolation_level, read_only, deferrable }) = choice else { return options.clone() };
        Arc::new(TransactionOptions {
            isolation_level: isolation_level.or(options.isolation_level),
            read_only: read_only.or(options.read_only),
            deferrable: deferrable.or(options.deferrable),
            ..TransactionOptions::clone(options)
        })
    }

    fn snapshot(&self, state: &State, now: Instant) -> SessionState {
        let (transaction, transaction_id, transaction_remaining) = match &state.phase {
            Phase::Idle | Phase::Ended(_) => (TransactionState::None, None, None),
            Phase::Open(open) => {
                let standing = if open.failed { TransactionState::Failed } else { TransactionState::Open };
                (standing, open.id.clone(), Some(open.deadline.saturating_duration_since(now)))
            }
        };
        let session_remaining = state.lease.until_end(now);
        let idle_limit = self.idle_limit(state);
        let (lease_remaining, idle_remaining) = match state.calls {
            0 => (state.lease.remaining(now), (state.lease.idle_since() + idle_limit).saturating_duration_since(now)),
            1.. => (state.lease.remaining_after_call(now, self.profile().disconnect_grace), idle_limit),
        };
        SessionState {
            transaction,
            transaction_id,
            lease_remaining,
            session_remaining,
            transaction_remaining,
            idle_remaining,
            attached: state.lease.is_attached(),
            renew_after: self.renewal(state.lease.ttl()).min(lease_remaining / 2),
            draining: self.shared.is_draining(),
        }
    }

    /// When to renew a lease of that ttl: after a third, give or take a fifth, so that sessions that began together do not
    /// all renew together.
    fn renewal(&self, ttl: Duration) -> Duration {
        ttl * 4 / 15 + ttl * 2 / 15 * u32::from(self.id().lot()) / u32::from(u8::MAX)
    }

    /// How long it may be kept without being used.
    fn idle_limit(&self, state: &State) -> Duration {
        match state.phase {
            Phase::Open(_) => self.profile().idle_in_transaction_timeout,
            Phase::Idle | Phase::Ended(_) => self.profile().session_idle_timeout,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the state is half changed, so a poisoned lock holds a sound state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_commit(&self) -> Option<Verdict> {
        self.lock().last_commit.clone()
    }

    pub(super) fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    pub(super) fn principal(&self) -> &Principal {
        &self.principal
    }

    pub(super) fn connect(&self) -> &Arc<ConnectOverrides> {
        &self.terms.connect
    }

    /// A commit token for a transaction of this session.
    pub(super) fn seal(&self, transaction: &ClusterXid) -> CommitToken {
        self.shared.commit_tokens.seal(&self.principal, self.engine.name(), transaction)
    }

    /// Tells the session its transaction's id.
    pub(super) fn set_transaction_id(&self, id: TransactionId) {
        if let Phase::Open(open) = &mut self.lock().phase {
            open.id = Some(id);
        }
    }

    /// Tells the session that COMMIT is to be sent: until its answer comes, what became of it is unknown. False when the
    /// session has ended before.
    pub(super) fn set_committing(&self, id: Option<TransactionId>) -> bool {
        let mut state = self.lock();
        let Phase::Open(open) = &mut state.phase else { return false };
        open.committing = true;
        state.last_commit = Some(Verdict::Unknown(id));
        true
    }

    /// Tells the session which backend its transaction runs on.
    pub(super) fn set_backend(&self, pid: i32, host: Arc<str>) {
        let mut state = self.lock();
        if let Phase::Open(open) = &mut state.phase {
            open.backend = Some(BackendInfo { pid, host });
        }
        state.tell();
    }
}

impl State {
    fn alive(&self) -> Result<(), Error> {
        match self.phase {
            Phase::Ended(reason) => Err(Error::SessionEnded(reason)),
            Phase::Idle | Phase::Open(_) => Ok(()),
        }
    }

    /// Tells the stream that is attached, if one is, to look again.
    fn tell(&self) {
        if let Some(changed) = &self.changed {
            changed.notify_one();
        }
    }
}

/// Counts a call into its session: it runs, or waits for its turn. Dropping it renews the lease.
#[derive(Debug)]
struct Ticket(Arc<Session>);

impl Drop for Ticket {
    fn drop(&mut self) {
        let session = &self.0;
        let mut state = session.lock();
        state.calls -= 1;
        state.lease.used(Instant::now(), session.profile().disconnect_grace);
        if state.calls == 0 && state.lease.is_abandoned() {
            drop(state);
            session.shared.watch(session.id());
        }
    }
}

/// The right to be the one running call of a session. It travels with the command into the transaction task, so that
/// the next call starts when the work is over, not when the caller has left.
#[derive(Debug)]
pub(super) struct Turn {
    ticket: Ticket,
}

/// How a call moved its session's transaction.
#[derive(Debug, Clone)]
pub(super) enum Progress {
    /// Not at all.
    Unchanged,
    /// It takes more statements, or has failed.
    Open { failed: bool },
    /// It is over, or never began. The verdict is there when a commit was tried.
    Over(Option<Verdict>),
}

impl Turn {
    /// Whether there is no transaction.
    fn is_idle(&self) -> bool {
        matches!(self.ticket.0.lock().phase, Phase::Idle)
    }

    /// Ends the call: notes its progress, renews the lease, lets the next call run. Returns the session as the caller
    /// shall see it.
    pub(super) fn finish(self, progress: Progress) -> SessionState {
        self.settle(progress)
    }

    /// The same, but keeps the turn.
    pub(super) fn settle(&self, progress: Progress) -> SessionState {
        let now = Instant::now();
        let session = &self.ticket.0;
        let mut state = session.lock();
        match (&mut state.phase, &progress) {
            (Phase::Open(open), Progress::Open { failed }) => open.failed = *failed,
            (phase @ Phase::Open(_), Progress::Over(_)) => {
                *phase = Phase::Idle;
                state.tell();
            }
            // The session ended meanwhile, or there was no transaction to begin with.
            (Phase::Ended(_) | Phase::Idle, _) | (_, Progress::Unchanged) => {}
        }
        match progress {
            Progress::Unchanged | Progress::Over(None) => {}
            Progress::Open { .. } => state.last_commit = None,
            Progress::Over(verdict) => state.last_commit = verdict,
        }
        state.lease.used(now, session.profile().disconnect_grace);
        session.snapshot(&state, now)
    }

    /// Ends a call that asks for what cannot be.
    fn refuse(self, error: Error) -> Failure {
        Failure { state: Some(self.finish(Progress::Unchanged)), ..error.into() }
    }

    /// What a numbered call is answered without running: the answer it had before, or why it cannot run. `None` when it
    /// is the next.
    fn repeated(&self, numbered: Numbered) -> Option<Result<Executed, Failure>> {
        let Numbered { seq, fingerprint } = numbered;
        let kept = |kept: &Kept| (kept.numbered, kept.answer.clone());
        let last = self.ticket.0.lock().last_numbered.as_deref().map(kept);
        let expected = last.as_ref().map_or(1, |(last, _)| last.seq + 1);
        let answer = match last {
            _ if seq == expected => return None,
            _ if seq > expected => Err(Error::SeqGap { given: seq, expected }.into()),
            Some((last, _)) if last.seq == seq && last.fingerprint != fingerprint => {
                Err(Error::invalid("seq", "was used for another request: count on").into())
            }
            Some((last, Some(answer))) if last.seq == seq => *answer,
            _ => Err(Error::SeqAnswerGone(seq).into()),
        };
        let state = self.settle(Progress::Unchanged);
        Some(match answer {
            Ok(executed) => Ok(Executed { state, ..executed }),
            Err(failure) => Err(Failure { state: Some(state), ..failure }),
        })
    }

    /// Keeps a numbered call's answer for a repeat.
    pub(super) fn keep(&self, numbered: Numbered, answer: &Result<Executed, Failure>) {
        let bytes: usize = answer.iter().flat_map(|executed| &executed.results).map(ResultSet::kept_bytes).sum();
        let kib = bytes.div_ceil(1024);
        let room = match u32::try_from(kib) {
            Ok(_) if kib <= SMALL_KIB => Some(None),
            Ok(large) if kib <= KEPT_KIB_MAX => {
                self.ticket.0.shared.kept_kib.clone().try_acquire_many_owned(large).ok().map(Some)
            }
            _ => None,
        };
        let answer = room.is_some().then(|| Box::new(answer.clone()));
        let mut state = self.ticket.0.lock();
        if !matches!(state.phase, Phase::Ended(_)) {
            state.last_numbered = Some(Box::new(Kept { numbered, answer, _room: room.flatten() }));
        }
    }
}

fn transaction_is_open() -> Error {
    Error::invalid("transaction_options", "are for the call that begins the transaction: one is open already")
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.ticket.0.turns.add_permits(1);
    }
}
