//! A transaction: a task that owns exactly one connection, from the first statement to the end.
//!
//! Commands come one at a time, each with its session's turn. The task ends when a command ends the transaction, when
//! its deadline passes, when the connection is lost, or when the session ends and drops the commands' sender. Then it
//! proves the connection clean and releases it, or drops it. Invariants: a COMMIT is never interrupted; a statement is
//! interrupted at most once, and nothing else is sent before PostgreSQL has answered both.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{Span, error, info, warn};

use super::commit::{ClusterXid, Resolution, TransactionId};
use super::engine::{
    Canceller, CheckoutError, CommitVerdict, Connection, Lost, NotCancelled, SavepointAction, SavepointName,
    StatementError, Stopped, TransactionOptions, TransactionStatus, Work,
};
use super::error::{Bound, EndReason, Error, Failure};
use super::observer::{Discard, Event};
use super::record::Record;
use super::session::{Committed, Executed, Numbered, Progress, Session, SessionState, Stoppable, Turn};
use super::statement::{ResultLimits, ResultSet};

/// How long a cancelled statement may take to stop without a sign of life. Cancelling takes PostgreSQL milliseconds; longer
/// means that the network or the server is stuck, and only closing the connection helps.
const CANCEL_GRACE: Duration = Duration::from_secs(2);

/// How often it is given that grace while rows come that were on their way: some hundred thousand short ones may be.
const CANCEL_GRACES: usize = 5;

/// How long a cancelled statement is waited for before it is cancelled again: PostgreSQL ignores a cancel that comes
/// between two messages of one statement.
const CANCEL_AGAIN: Duration = Duration::from_millis(100);

/// How long ROLLBACK may take. It writes next to nothing; longer means stuck, as above.
const ROLLBACK_GRACE: Duration = Duration::from_secs(2);

/// How long a lost commit's outcome is looked for before its caller is told that it is unknown: a restart or a failover
/// in the same place is over by then, and callers' own deadlines are not.
const RESOLVE_GRACE: Duration = Duration::from_secs(5);

/// How long to wait before asking again.
const RESOLVE_AGAIN: Duration = Duration::from_millis(50);

/// The most savepoints of a transaction at a time. Each costs memory here and in PostgreSQL, which slows down from 64 on.
const SAVEPOINTS_MAX: usize = 1000;

/// What became of a transaction that someone tried to commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Its writes are durable.
    Committed(TransactionId),
    /// It ended without having written.
    NothingWritten,
    /// None of its writes happened.
    RolledBack,
    /// Nobody could say. The id is there if PostgreSQL told it before.
    Unknown(Option<TransactionId>),
}

impl Verdict {
    /// The outcome's name in the protocol.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Committed(_) => "COMMITTED",
            Self::NothingWritten => "NOTHING_WRITTEN",
            Self::RolledBack => "ROLLED_BACK",
            Self::Unknown(_) => "UNKNOWN",
        }
    }

    /// The answer to a commit with this verdict.
    pub(super) fn answer(self, state: Option<SessionState>) -> Result<Committed, Failure> {
        match self.error() {
            None => Ok(Committed { verdict: self, state }),
            Some(error) => Err(Failure { error, state, verdict: Some(self), index: None }),
        }
    }

    /// What a commit with this verdict has to be told, if it failed.
    fn error(&self) -> Option<Error> {
        match self {
            Self::Committed(_) | Self::NothingWritten => None,
            Self::RolledBack => Some(Error::CommitRolledBack),
            Self::Unknown(_) => Some(Error::CommitUnknown),
        }
    }
}

/// What a session asks of its transaction task. The reply's receiver may be gone: the caller left.
#[derive(Debug)]
pub(super) enum Command {
    Execute(Box<Execute>),
    Commit { answer_by: Option<Instant>, turn: Turn, reply: Reply<Committed>, span: Span },
    Rollback { turn: Turn, reply: Reply<SessionState>, span: Span },
    Close { turn: Turn, reply: Reply<EndReason>, span: Span },
}

#[derive(Debug)]
pub(super) struct Execute {
    /// How the transaction begins, if this is its first call.
    pub(super) begin: Arc<TransactionOptions>,
    pub(super) work: Work,
    pub(super) commit: bool,
    pub(super) limits: ResultLimits,
    pub(super) deadline: Deadline,
    /// When the caller stops waiting for what became of a commit.
    pub(super) answer_by: Option<Instant>,
    /// What Cancel sees of it.
    pub(super) running: Stoppable,
    pub(super) call: Call,
}

/// Who waits for an Execute.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) turn: Turn,
    pub(super) numbered: Option<Numbered>,
    pub(super) reply: Reply<Executed>,
    /// The call's, of which spans are part.
    pub(super) span: Span,
}

impl Call {
    /// Answers a call that ran something; a repeat of it will be answered alike.
    fn answer(self, progress: Progress, ran: Result<(Vec<ResultSet>, Option<Verdict>), Failed>) {
        let Self { turn, numbered, reply, span: _ } = self;
        let state = turn.settle(progress);
        let answer = match ran {
            Ok((results, verdict)) => Ok(Executed { results, verdict, state }),
            Err(Failed { error, verdict, index }) => Err(Failure { error, state: Some(state), verdict, index }),
        };
        if let Some(numbered) = numbered {
            turn.keep(numbered, &answer);
        }
        drop(turn);
        let _ = reply.send(answer);
    }

    /// Answers a call that ran nothing: it can be made again.
    fn refuse(self, progress: Progress, error: Error, index: Option<usize>) {
        let state = self.turn.finish(progress);
        let _ = self.reply.send(Err(Failure { error, state: Some(state), verdict: None, index }));
    }
}

/// What is told of a failed Execute.
struct Failed {
    error: Error,
    verdict: Option<Verdict>,
    index: Option<usize>,
}

/// Who waits for a commit, and for how long.
struct Committing {
    answer_by: Option<Instant>,
    /// The call's.
    span: Span,
    caller: CommitCaller,
}

enum CommitCaller {
    Commit(Turn, Reply<Committed>),
    Execute(Vec<ResultSet>, Call),
}

impl Committing {
    fn answer(self, verdict: Verdict, error: Option<Error>) {
        let error = error.or_else(|| verdict.error());
        let progress = Progress::Over(Some(verdict.clone()));
        match self.caller {
            CommitCaller::Commit(turn, reply) => {
                let state = Some(turn.finish(progress));
                let _ = reply.send(match error {
                    None => Ok(Committed { verdict, state }),
                    Some(error) => Err(Failure { error, state, verdict: Some(verdict), index: None }),
                });
            }
            CommitCaller::Execute(results, call) => call.answer(
                progress,
                match error {
                    None => Ok((results, Some(verdict))),
                    Some(error) => Err(Failed { error, verdict: Some(verdict), index: None }),
                },
            ),
        }
    }
}

type Reply<T> = oneshot::Sender<Result<T, Failure>>;

/// When a statement must have ended, and which limit says so.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    start: Instant,
    at: Instant,
    bound: Bound,
}

impl Deadline {
    pub(super) fn new(start: Instant, at: Instant, bound: Bound) -> Self {
        Self { start, at, bound }
    }

    /// This one, or the other when it comes first.
    pub(super) fn or_earlier(self, at: Instant, bound: Bound) -> Self {
        if at < self.at { Self { at, bound, ..self } } else { self }
    }

    pub(super) fn at(&self) -> Instant {
        self.at
    }

    pub(super) fn exceeded(&self) -> Error {
        let after = self.at.saturating_duration_since(self.start);
        Error::DeadlineExceeded { bound: self.bound, after }
    }
}

/// Runs a transaction from its first statement to its end.
pub(super) async fn run(
    session: Arc<Session>,
    mut first: Box<Execute>,
    mut commands: mpsc::Receiver<Command>,
    deadline: Instant,
) {
    first.deadline = first.deadline.or_earlier(deadline, Bound::TransactionTimeout);
    let mut record = Record::begin(session.clone(), &first.call.span);
    let Some((connection, first)) = checkout(&session, first, &mut commands).await else { return };
    record.connected();
    session.set_backend(connection.backend_pid(), connection.host());
    let mut transaction = Transaction {
        session,
        connection,
        commands,
        deadline,
        id: None,
        savepoints: Vec::new(),
        record,
        verdict: Some(Verdict::RolledBack),
    };
    let begin = first.begin.clone();
    let mut end = transaction.execute(first, Some(&begin)).await;
    let end = loop {
        match end {
            Some(end) => break end,
            None => end = transaction.next().await,
        }
    };
    transaction.leave(end).await;
}

/// Waits for a connection, as long as the caller does.
async fn checkout(
    session: &Session,
    mut first: Box<Execute>,
    commands: &mut mpsc::Receiver<Command>,
) -> Option<(Box<dyn Connection>, Box<Execute>)> {
    let engine = session.engine();
    let denied = || session.observer().observe(Event::ConnectionDenied { engine: engine.name() });
    let error = tokio::select! {
        biased;
        // The caller left, or the session was ended: nothing has begun, so nothing is left to do.
        () = first.call.reply.closed() => None,
        _ = commands.recv() => None,
        connection = engine.checkout(session.principal(), session.connect()) => match connection {
            Ok(connection) => return Some((connection, first)),
            Err(error) => {
                if matches!(error, CheckoutError::Wait(_) | CheckoutError::Queue(_) | CheckoutError::SubPools(_)) {
                    denied();
                }
                Some(error.into_error(engine.name()))
            }
        },
        () = sleep_until(first.deadline.at) => {
            denied();
            Some(first.deadline.exceeded())
        }
        () = first.running.stop.notified() => Some(Error::Cancelled),
    };
    refuse(first, error);
    None
}

/// Ends a transaction that has not begun; with an error, if there is somebody to hear it.
pub(super) fn refuse(first: Box<Execute>, error: Option<Error>) {
    let Execute { call, mut running, .. } = *first;
    running.was_stopped = error.as_ref().is_none_or(was_stopped);
    match error {
        Some(error) => call.refuse(Progress::Over(None), error, None),
        None => drop(call.turn.finish(Progress::Over(None))),
    }
}

struct Transaction {
    session: Arc<Session>,
    connection: Box<dyn Connection>,
    commands: mpsc::Receiver<Command>,
    deadline: Instant,
    /// Once PostgreSQL has given it one.
    id: Option<TransactionId>,
    /// The oldest first. Names may repeat.
    savepoints: Vec<SavepointName>,
    record: Record,
    /// What became of it, unless it is to be looked into; `None`: it has never begun.
    verdict: Option<Verdict>,
}

/// How a transaction ends, as the server sees it.
enum End {
    /// The server says it is over.
    Over,
    /// It is still open there.
    Open,
    /// There is no knowing: the connection is dead or in the middle of something.
    Unknown,
    /// The connection was lost while COMMIT was under way, and somebody waits to hear what became of it.
    CommitLost(Committing),
}

/// What cut a statement short.
#[derive(PartialEq, Eq)]
enum Interruption {
    Deadline,
    CallerLeft,
    Cancelled,
    SessionEnded,
}

impl Transaction {
    /// Waits for the next command, or for a reason to end without one.
    async fn next(&mut self) -> Option<End> {
        let session = &self.session;
        let reaped_idle = async {
            while let Some(again) = session.expire_in_transaction() {
                sleep_until(again).await;
            }
        };
        let since = Instant::now();
        let command = tokio::select! {
            biased;
            command = self.commands.recv() => Ok(command),
            () = sleep_until(self.deadline) => {
                session.end(EndReason::TransactionDeadline);
                Err(End::Open)
            }
            () = reaped_idle => Err(End::Open),
            lost = self.connection.lost() => {
                self.backend_lost(&lost);
                Err(End::Unknown)
            }
        };
        self.record.paused(since);
        match command {
            Ok(Some(command)) => self.obey(command).await,
            // The session has ended.
            Ok(None) => Some(End::Open),
            Err(end) => Some(end),
        }
    }

    /// Does what a call asks. Returns how the transaction ended if it did.
    async fn obey(&mut self, command: Command) -> Option<End> {
        match command {
            Command::Execute(execute) => self.execute(execute, None).await,
            Command::Commit { answer_by, turn, reply, span } => {
                Some(self.commit(Committing { answer_by, span, caller: CommitCaller::Commit(turn, reply) }).await)
            }
            Command::Rollback { turn, reply, span } => {
                let end = self.roll_back(Some(&span)).await;
                let _ = reply.send(Ok(turn.finish(Progress::Over(None))));
                Some(end)
            }
            Command::Close { turn, reply, span } => {
                let end = self.roll_back(Some(&span)).await;
                let reason = self.session.end(EndReason::Closed);
                drop(turn);
                let _ = reply.send(Ok(reason));
                Some(end)
            }
        }
    }

    /// Does a call's work, and the commit behind it if asked for. Returns how the transaction ended if it did.
    async fn execute(&mut self, execute: Box<Execute>, begin: Option<&TransactionOptions>) -> Option<End> {
        let Execute { begin: _, work, commit, limits, deadline, answer_by, mut running, mut call } = *execute;
        if let Err(error) = self.check_savepoint(&work) {
            return self.fail(error, None, commit, call).await;
        }
        let deadline = deadline.or_earlier(self.deadline, Bound::TransactionTimeout);
        let (ran, interruption) = self.run_work(begin, &work, limits, deadline, &running, &mut call).await;
        if interruption == Some(Interruption::SessionEnded) {
            // The dropped reply tells the caller to look why.
            return Some(End::Open);
        }
        let Stopped { index, error } = match ran {
            // A caller that has left may be trying again elsewhere: what it cannot hear of must not commit.
            Ok(_) if commit && call.reply.is_closed() => return self.fail(Error::CallerLeft, None, commit, call).await,
            Ok(results) if commit => {
                // A COMMIT is not to be stopped.
                drop(running);
                self.identify();
                let span = call.span.clone();
                return Some(
                    self.commit(Committing { answer_by, span, caller: CommitCaller::Execute(results, call) }).await,
                );
            }
            Ok(results) => {
                // Work that succeeds leaves its transaction open. Should it have ended it, past the guard, then what
                // follows must not run outside of a transaction.
                if self.connection.status() != TransactionStatus::Open {
                    error!(session.id = %self.session.id(), "a statement ended its transaction");
                    self.session.end(EndReason::BackendLost);
                    self.verdict = Some(Verdict::Unknown(self.id.clone()));
                    return Some(End::Unknown);
                }
                self.identify();
                self.note_savepoint(work);
                call.answer(Progress::Open { failed: false }, Ok((results, None)));
                return None;
            }
            Err(stopped) => stopped,
        };
        let index = Some(index);
        match error {
            StatementError::LostBeforeBegin(lost) => {
                self.verdict = None;
                let error = CheckoutError::Unreachable(lost.0).into_error(self.session.engine().name());
                call.refuse(Progress::Over(None), error, index);
                Some(End::Unknown)
            }
            StatementError::Lost(lost) => {
                self.backend_lost(&lost);
                // Its time was up, and it would not stop. Otherwise the dropped reply tells the caller to look why.
                if interruption == Some(Interruption::Deadline) {
                    let _ = call.reply.send(Err(deadline.exceeded().into()));
                }
                Some(End::Unknown)
            }
            // Nothing ran: the transaction stands as before the call, which may be not at all.
            StatementError::Refused(error) if begin.is_some() => {
                self.verdict = None;
                let end = if self.connection.status() == TransactionStatus::Idle { End::Over } else { End::Open };
                let error = told(error, interruption.as_ref(), deadline);
                running.was_stopped = was_stopped(&error);
                call.refuse(Progress::Over(None), error, index);
                Some(end)
            }
            StatementError::Refused(error) => {
                let failed = self.connection.status() == TransactionStatus::Failed;
                call.refuse(Progress::Open { failed }, error, index);
                None
            }
            StatementError::GivenUp(error) => {
                let error = told(error, interruption.as_ref(), deadline);
                running.was_stopped = was_stopped(&error);
                self.fail(error, index, commit, call).await
            }
            StatementError::StalePlan(error) => self.fail(Error::StalePlan(error), index, commit, call).await,
            StatementError::Failed(error) => {
                let error = told(Error::Database(error), interruption.as_ref(), deadline);
                running.was_stopped = was_stopped(&error);
                self.fail(error, index, commit, call).await
            }
        }
    }

    /// Works until it is done, fails, or is interrupted. What will not stop then counts as lost.
    async fn run_work(
        &mut self,
        begin: Option<&TransactionOptions>,
        work: &Work,
        limits: ResultLimits,
        deadline: Deadline,
        running: &Stoppable,
        call: &mut Call,
    ) -> (Result<Vec<ResultSet>, Stopped>, Option<Interruption>) {
        let canceller = self.connection.canceller();
        let closing = work.closing();
        let operation = self.record.working(&call.span, work);
        let place = operation.place(self.session.observer());
        let mut working = self.connection.execute(begin, work, limits, place);
        let too_long = |_| Lost(format!("a cancelled statement did not stop within {CANCEL_GRACE:?}"));
        loop {
            let interruption = tokio::select! {
                biased;
                ran = &mut working => {
                    self.record.worked(operation, ran.as_ref().err().map(|stopped| &stopped.error));
                    return (ran, None);
                }
                () = sleep_until(deadline.at) => Interruption::Deadline,
                () = call.reply.closed() => Interruption::CallerLeft,
                () = running.stop.notified() => Interruption::Cancelled,
                // Calls are serial, so this is no command but the end of the session.
                _ = self.commands.recv() => Interruption::SessionEnded,
            };
            let asked_at = Instant::now();
            let stopped = if interruption == Interruption::Cancelled {
                let asked = within_grace(&*canceller, stop_if_asked(&*canceller, &mut working, &closing)).await;
                match asked.map_err(too_long).unwrap_or_else(|lost| Err(lost.into())) {
                    Err(NotCancelled::Unsent(cause)) => {
                        // Its time limits still hold.
                        running.runs_on(cause);
                        continue;
                    }
                    Err(NotCancelled::Lost(lost)) => Err(lost),
                    Ok(ran) => Ok(ran),
                }
            } else {
                closing.cancel();
                let stopped = within_grace(&*canceller, stop(&*canceller, &mut working, &closing)).await;
                stopped.map_err(too_long).flatten()
            };
            self.record.cancelled(asked_at);
            let ran = stopped.unwrap_or_else(|lost| Err(Stopped { index: 0, error: StatementError::Lost(lost) }));
            self.record.worked(operation, ran.as_ref().err().map(|stopped| &stopped.error));
            return (ran, Some(interruption));
        }
    }

    /// Answers a failed call. With a commit asked for, the transaction is rolled back at once.
    async fn fail(&mut self, error: Error, index: Option<usize>, commit: bool, call: Call) -> Option<End> {
        let status = self.connection.status();
        let (progress, verdict, end) = match status {
            TransactionStatus::Open if !commit => (Progress::Open { failed: false }, None, None),
            TransactionStatus::Failed if !commit => (Progress::Open { failed: true }, None, None),
            TransactionStatus::Open | TransactionStatus::Failed => {
                let end = self.roll_back(Some(&call.span)).await;
                (Progress::Over(Some(Verdict::RolledBack)), Some(Verdict::RolledBack), Some(end))
            }
            TransactionStatus::Idle => (Progress::Over(None), None, Some(End::Over)),
        };
        call.answer(progress, Err(Failed { error, verdict, index }));
        end
    }

    /// Says what is wrong with a savepoint's name, before PostgreSQL would fail the transaction for it.
    fn check_savepoint(&self, work: &Work) -> Result<(), Error> {
        let Work::Savepoint(action, name) = work else { return Ok(()) };
        match action {
            SavepointAction::Create if self.savepoints.len() < SAVEPOINTS_MAX => Ok(()),
            SavepointAction::Create => {
                let problem = format!("would be the transaction's savepoint {}: release some", SAVEPOINTS_MAX + 1);
                Err(Error::invalid("name", problem))
            }
            SavepointAction::Release | SavepointAction::RollBackTo if self.savepoints.contains(name) => Ok(()),
            SavepointAction::Release | SavepointAction::RollBackTo => Err(action.unknown()),
        }
    }

    /// Notes what an action did to the savepoints: a name means its newest.
    fn note_savepoint(&mut self, work: Work) {
        let Work::Savepoint(action, name) = work else { return };
        let newest = self.savepoints.iter().rposition(|savepoint| *savepoint == name);
        match (action, newest) {
            (SavepointAction::Create, _) => self.savepoints.push(name),
            (SavepointAction::Release, Some(at)) => self.savepoints.truncate(at),
            (SavepointAction::RollBackTo, Some(at)) => self.savepoints.truncate(at + 1),
            // It has been checked.
            (SavepointAction::Release | SavepointAction::RollBackTo, None) => {}
        }
    }

    /// Notes the transaction's id as soon as PostgreSQL has told it.
    fn identify(&mut self) {
        if self.id.is_none()
            && let Some(xid) = self.connection.xid()
        {
            let commit_token = self.connection.cluster().map(|cluster| self.session.seal(&ClusterXid { cluster, xid }));
            let id = TransactionId { xid, commit_token };
            self.session.set_transaction_id(id.clone());
            self.id = Some(id);
        }
    }

    /// Commits and tells the truth about it.
    async fn commit(&mut self, committing: Committing) -> End {
        if !self.session.set_committing(self.id.clone()) {
            // The dropped reply tells the caller to look why.
            return End::Open;
        }
        let operation = self.record.committing(&committing.span);
        let answer = self.connection.commit().await;
        self.record.done(operation, commit_error(&answer));
        let (verdict, error) = match answer {
            CommitVerdict::Committed => (self.id.clone().map_or(Verdict::NothingWritten, Verdict::Committed), None),
            CommitVerdict::RolledBack => (Verdict::RolledBack, None),
            CommitVerdict::Failed(error) => (Verdict::RolledBack, Some(Error::Database(error))),
            CommitVerdict::Lost(lost) => {
                warn!(session.id = %self.session.id(), cause = %lost, "connection lost in commit");
                return End::CommitLost(committing);
            }
        };
        self.verdict = Some(verdict.clone());
        committing.answer(verdict, error);
        End::Over
    }

    /// Rolls back for a call, or for nobody, within a bound. Past it the connection is given up, and PostgreSQL rolls back
    /// on its own.
    async fn roll_back(&mut self, call: Option<&Span>) -> End {
        let operation = self.record.rolling_back(call);
        let rolled_back = timeout(ROLLBACK_GRACE, self.connection.rollback()).await;
        let is_back = matches!(rolled_back, Ok(Ok(())));
        self.record.done(operation, (!is_back).then_some("connection_lost"));
        if is_back { End::Over } else { End::Unknown }
    }

    fn backend_lost(&self, lost: &Lost) {
        warn!(session.id = %self.session.id(), cause = %lost, "backend lost");
        self.session.end(EndReason::BackendLost);
    }

    async fn leave(mut self, end: End) {
        let end = match end {
            End::Open => self.roll_back(None).await,
            end => end,
        };
        match end {
            End::Over => {
                self.record.ended(self.verdict.as_ref());
                let discarded = self.connection.release().await;
                self.record.returned(discarded);
            }
            End::Open | End::Unknown => {
                drop(self.connection);
                self.record.ended(self.verdict.as_ref());
                self.record.returned(Some(Discard::Lost));
            }
            End::CommitLost(committing) => Box::pin(self.resolve(committing)).await,
        }
    }

    /// Asks PostgreSQL anew what became of a commit whose answer was lost, and answers with what it says.
    async fn resolve(self, committing: Committing) {
        let Self { session, connection, id, mut record, .. } = self;
        let backend = connection.backend_pid();
        let transaction = connection.cluster().zip(connection.xid()).map(|(cluster, xid)| ClusterXid { cluster, xid });
        // Its place in the pool is needed for the question.
        drop(connection);
        record.returned(Some(Discard::Lost));
        let grace = Instant::now() + RESOLVE_GRACE;
        let until = committing.answer_by.map_or(grace, |answer_by| grace.min(answer_by));
        let resolution = match transaction {
            None => None,
            Some(transaction) => timeout_at(until, resolved(&session, &transaction, backend)).await.ok(),
        };
        let verdict = match (resolution, id) {
            (Some(Resolution::Committed), Some(id)) => Verdict::Committed(id),
            (Some(Resolution::RolledBack), _) => Verdict::RolledBack,
            (_, id) => Verdict::Unknown(id),
        };
        info!(session.id = %session.id(), outcome = verdict.name(), "lost commit looked into");
        record.resolved(&verdict);
        record.ended(Some(&verdict));
        committing.answer(verdict, None);
    }
}

/// What a commit failed with: an SQLSTATE, or a word.
fn commit_error(answer: &CommitVerdict) -> Option<&str> {
    match answer {
        CommitVerdict::Committed => None,
        CommitVerdict::RolledBack => Some("rolled_back"),
        CommitVerdict::Failed(error) => Some(&error.sqlstate),
        CommitVerdict::Lost(_) => Some("connection_lost"),
    }
}

/// What PostgreSQL says of a lost transaction, once it can be asked and the transaction is over.
async fn resolved(session: &Session, transaction: &ClusterXid, backend: i32) -> Resolution {
    loop {
        match session.engine().resolve(session.principal(), transaction, Some(backend)).await {
            Ok(Resolution::InProgress) | Err(_) => sleep(RESOLVE_AGAIN).await,
            Ok(resolution) => return resolution,
        }
    }
}

/// What a caller is told of an error, which may be of our own making: a cancelled statement is one that was interrupted.
fn told(error: Error, interruption: Option<&Interruption>, deadline: Deadline) -> Error {
    let interrupted = match &error {
        Error::Database(cancelled) => cancelled.sqlstate == QUERY_CANCELED,
        // A stream that nobody was to take any more.
        Error::CallerLeft => true,
        _ => false,
    };
    match interruption.filter(|_| interrupted) {
        Some(Interruption::Deadline) => deadline.exceeded(),
        Some(Interruption::CallerLeft) => Error::CallerLeft,
        Some(Interruption::Cancelled) => Error::Cancelled,
        Some(Interruption::SessionEnded) | None => error,
    }
}

/// Whether an error says that the statement was stopped from outside.
fn was_stopped(error: &Error) -> bool {
    matches!(error, Error::Cancelled | Error::CallerLeft | Error::DeadlineExceeded { .. })
}

/// SQLSTATE of a cancelled statement.
const QUERY_CANCELED: &str = "57014";

/// Waits for a cancelled statement to stop, as long as the server gives signs of life.
async fn within_grace<T>(canceller: &dyn Canceller, stopping: impl Future<Output = T>) -> Result<T, Elapsed> {
    let mut stopping = pin!(stopping);
    let mut graces = 1;
    loop {
        let received = canceller.bytes_received();
        match timeout(CANCEL_GRACE, &mut stopping).await {
            Err(_) if graces < CANCEL_GRACES && canceller.bytes_received() > received => graces += 1,
            stopped => return stopped,
        }
    }
}

/// Cancels a running statement until it ends, and waits for all answers: only then can no cancel hit a later statement.
async fn stop<T>(
    canceller: &dyn Canceller,
    running: &mut (impl Future<Output = T> + Unpin),
    closing: &CancellationToken,
) -> Result<T, Lost> {
    loop {
        match stop_if_asked(canceller, running, closing).await {
            Ok(ran) => return Ok(ran),
            Err(NotCancelled::Lost(lost)) => return Err(lost),
            Err(NotCancelled::Unsent(_)) => {
                if let Ok(ran) = timeout(CANCEL_AGAIN, &mut *running).await {
                    return Ok(ran);
                }
            }
        }
    }
}

/// The same, but gives up when the server could not be asked at all; no request is on its way then.
async fn stop_if_asked<T>(
    canceller: &dyn Canceller,
    running: &mut (impl Future<Output = T> + Unpin),
    closing: &CancellationToken,
) -> Result<T, NotCancelled> {
    let mut ran = None;
    let mut asked = false;
    loop {
        let mut cancelling = canceller.cancel();
        let cancelled = loop {
            tokio::select! {
                biased;
                answer = &mut *running, if ran.is_none() => ran = Some(answer),
                cancelled = &mut cancelling => break cancelled,
            }
        };
        match (cancelled, ran) {
            (Ok(()) | Err(NotCancelled::Unsent(_)), Some(ran)) => return Ok(ran),
            (Err(NotCancelled::Unsent(_)), None) if asked => {}
            (Err(error), _) => return Err(error),
            (Ok(()), None) => {
                asked = true;
                closing.cancel();
            }
        }
        ran = timeout(CANCEL_AGAIN, &mut *running).await.ok();
        if let Some(ran) = ran {
            return Ok(ran);
        }
    }
}
