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
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{error, warn};

use super::engine::{
    Canceller, CheckoutError, CommitVerdict, Connection, Lost, StatementError, TransactionOptions, TransactionStatus,
};
use super::error::{Bound, EndReason, Error, Failure};
use super::session::{Committed, Executed, Progress, Session, SessionState, Turn};
use super::statement::{ResultLimits, ResultSet, Statement};

/// How long a cancelled statement may take to stop. Cancelling takes PostgreSQL milliseconds; longer means that the
/// network or the server is stuck, and only closing the connection helps.
const CANCEL_GRACE: Duration = Duration::from_secs(2);

/// How long a cancelled statement is waited for before it is cancelled again: PostgreSQL ignores a cancel that comes
/// between two messages of one statement.
const CANCEL_AGAIN: Duration = Duration::from_millis(100);

/// How long ROLLBACK may take. It writes next to nothing; longer means stuck, as above.
const ROLLBACK_GRACE: Duration = Duration::from_secs(2);

/// What became of a transaction that someone tried to commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Its writes are durable; the xid8.
    Committed(u64),
    /// It ended well and had written nothing.
    NothingWritten,
    /// None of its writes happened.
    RolledBack,
    /// Nobody knows yet; the xid8 if PostgreSQL told it before.
    Unknown(Option<u64>),
}

impl Verdict {
    /// The answer to a commit with this verdict.
    pub(super) fn answer(self, state: Option<SessionState>) -> Result<Committed, Failure> {
        match self.error() {
            None => Ok(Committed { verdict: self, state }),
            Some(error) => Err(Failure { error, state, verdict: Some(self) }),
        }
    }

    /// What a commit with this verdict has to be told, if it failed.
    fn error(self) -> Option<Error> {
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
    Execute(Execute),
    Commit { turn: Turn, reply: Reply<Committed> },
    Rollback { turn: Turn, reply: Reply<SessionState> },
    Close { turn: Turn, reply: Reply<EndReason> },
}

#[derive(Debug)]
pub(super) struct Execute {
    pub(super) statement: Statement,
    pub(super) commit: bool,
    pub(super) limits: ResultLimits,
    pub(super) deadline: Deadline,
    pub(super) turn: Turn,
    pub(super) reply: Reply<Executed>,
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

    fn exceeded(&self) -> Error {
        let after = self.at.saturating_duration_since(self.start);
        Error::DeadlineExceeded { bound: self.bound, after }
    }
}

/// Runs a transaction from its first statement to its end.
pub(super) async fn run(
    session: Arc<Session>,
    first: Execute,
    mut commands: mpsc::Receiver<Command>,
    deadline: Instant,
) {
    let begin = session.options().transaction.clone();
    let Some((connection, first)) = checkout(&session, first, &mut commands).await else { return };
    session.set_backend(connection.backend_pid(), connection.host());
    let mut transaction = Transaction { session, connection, commands, deadline };
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
    mut first: Execute,
    commands: &mut mpsc::Receiver<Command>,
) -> Option<(Box<dyn Connection>, Execute)> {
    let engine = session.engine();
    let error = tokio::select! {
        biased;
        // The caller left, or the session was ended: nothing has begun, so nothing is left to do.
        () = first.reply.closed() => None,
        _ = commands.recv() => None,
        connection = engine.checkout(session.principal(), session.connect()) => match connection {
            Ok(connection) => return Some((connection, first)),
            Err(error) => Some(error.into_error(&engine.info().name)),
        },
        () = sleep_until(first.deadline.at) => Some(first.deadline.exceeded()),
    };
    let state = first.turn.finish(Progress::Over(None));
    if let Some(error) = error {
        let _ = first.reply.send(Err(Failure { error, state: Some(state), verdict: None }));
    }
    None
}

struct Transaction {
    session: Arc<Session>,
    connection: Box<dyn Connection>,
    commands: mpsc::Receiver<Command>,
    deadline: Instant,
}

/// How a transaction ends, as the server sees it.
enum End {
    /// The server says it is over.
    Over,
    /// It is still open there.
    Open,
    /// There is no knowing: the connection is dead or in the middle of something.
    Unknown,
}

/// What cut a statement short.
#[derive(PartialEq, Eq)]
enum Interruption {
    Deadline,
    CallerLeft,
    SessionEnded,
}

impl Transaction {
    /// Waits for the next command, or for a reason to end without one.
    async fn next(&mut self) -> Option<End> {
        tokio::select! {
            biased;
            command = self.commands.recv() => match command {
                Some(Command::Execute(execute)) => self.execute(execute, None).await,
                Some(Command::Commit { turn, reply }) => Some(self.commit(turn, reply).await),
                Some(Command::Rollback { turn, reply }) => {
                    let end = self.roll_back().await;
                    let _ = reply.send(Ok(turn.finish(Progress::Over(None))));
                    Some(end)
                }
                Some(Command::Close { turn, reply }) => {
                    let end = self.roll_back().await;
                    let reason = self.session.end(EndReason::Closed);
                    drop(turn);
                    let _ = reply.send(Ok(reason));
                    Some(end)
                }
                // The session has ended.
                None => Some(End::Open),
            },
            () = sleep_until(self.deadline) => {
                self.session.end(EndReason::TransactionDeadline);
                Some(End::Open)
            }
            lost = self.connection.lost() => {
                self.backend_lost(&lost);
                Some(End::Unknown)
            }
        }
    }

    /// Runs a statement, and the commit behind it if asked for. Returns how the transaction ended if it did.
    async fn execute(&mut self, call: Execute, begin: Option<&TransactionOptions>) -> Option<End> {
        let Execute { statement, commit, limits, deadline, turn, mut reply } = call;
        let deadline = deadline.or_earlier(self.deadline, Bound::TransactionTimeout);
        let (ran, interruption) = self.run_statement(begin, &statement, limits, deadline, &mut reply).await;
        if interruption == Some(Interruption::SessionEnded) {
            // The dropped reply tells the caller to look why.
            return Some(End::Open);
        }
        match ran {
            // A caller that has left may be trying again elsewhere: what it cannot hear of must not commit.
            Ok(_) if commit && reply.is_closed() => {
                let end = self.roll_back().await;
                turn.finish(Progress::Over(Some(Verdict::RolledBack)));
                Some(end)
            }
            Ok(result) if commit => Some(self.commit_result(result, turn, reply).await),
            Ok(result) => {
                // A statement that succeeds leaves its transaction open. Should one have ended it, past the guard,
                // then what follows must not run outside of a transaction.
                if self.connection.status() != TransactionStatus::Open {
                    error!(session.id = %self.session.id(), "a statement ended its transaction");
                    self.session.end(EndReason::BackendLost);
                    return Some(End::Unknown);
                }
                let state = turn.finish(Progress::Open { failed: false });
                let _ = reply.send(Ok(Executed { result, verdict: None, state }));
                None
            }
            Err(StatementError::LostBeforeBegin(lost)) => {
                let error = CheckoutError::Unreachable(lost.0).into_error(&self.session.engine().info().name);
                let state = turn.finish(Progress::Over(None));
                let _ = reply.send(Err(Failure { error, state: Some(state), verdict: None }));
                Some(End::Unknown)
            }
            Err(StatementError::Lost(lost)) => {
                // The dropped reply tells the caller to look why.
                self.backend_lost(&lost);
                Some(End::Unknown)
            }
            // Nothing ran: the transaction stands as before the call, which may be not at all.
            Err(StatementError::Refused(error)) if begin.is_some() => {
                let end = if self.connection.status() == TransactionStatus::Idle { End::Over } else { End::Open };
                let state = turn.finish(Progress::Over(None));
                let _ = reply.send(Err(Failure { error, state: Some(state), verdict: None }));
                Some(end)
            }
            Err(StatementError::Refused(error)) => self.fail(error, false, turn, reply).await,
            Err(StatementError::Unreturnable(error)) => self.fail(error, commit, turn, reply).await,
            Err(StatementError::StalePlan(error)) => self.fail(Error::StalePlan(error), commit, turn, reply).await,
            Err(StatementError::Failed(error)) => {
                let stopped = error.sqlstate == QUERY_CANCELED && interruption == Some(Interruption::Deadline);
                let error = if stopped { deadline.exceeded() } else { Error::Database(error) };
                self.fail(error, commit, turn, reply).await
            }
        }
    }

    /// Runs a statement until it ends, by itself or interrupted. One that will not stop counts as lost.
    async fn run_statement(
        &mut self,
        begin: Option<&TransactionOptions>,
        statement: &Statement,
        limits: ResultLimits,
        deadline: Deadline,
        reply: &mut Reply<Executed>,
    ) -> (Result<ResultSet, StatementError>, Option<Interruption>) {
        let canceller = self.connection.canceller();
        let mut running = self.connection.execute(begin, statement, limits);
        let interruption = tokio::select! {
            biased;
            ran = &mut running => return (ran, None),
            () = sleep_until(deadline.at) => Interruption::Deadline,
            () = reply.closed() => Interruption::CallerLeft,
            // Calls are serial, so this is no command but the end of the session.
            _ = self.commands.recv() => Interruption::SessionEnded,
        };
        let stopped = timeout(CANCEL_GRACE, stop(&*canceller, running))
            .await
            .unwrap_or_else(|_| Err(Lost(format!("a cancelled statement did not stop within {CANCEL_GRACE:?}"))));
        (stopped.unwrap_or_else(|lost| Err(StatementError::Lost(lost))), Some(interruption))
    }

    /// Answers a failed statement. With a commit asked for, the transaction is rolled back at once.
    async fn fail(&mut self, error: Error, commit: bool, turn: Turn, reply: Reply<Executed>) -> Option<End> {
        let status = self.connection.status();
        let (progress, verdict, end) = match status {
            TransactionStatus::Open if !commit => (Progress::Open { failed: false }, None, None),
            TransactionStatus::Failed if !commit => (Progress::Open { failed: true }, None, None),
            TransactionStatus::Open | TransactionStatus::Failed => {
                let end = self.roll_back().await;
                (Progress::Over(Some(Verdict::RolledBack)), Some(Verdict::RolledBack), Some(end))
            }
            TransactionStatus::Idle => (Progress::Over(None), None, Some(End::Over)),
        };
        let state = turn.finish(progress);
        let _ = reply.send(Err(Failure { error, state: Some(state), verdict }));
        end
    }

    async fn commit(&mut self, turn: Turn, reply: Reply<Committed>) -> End {
        let (committed, end) = self.commit_truthfully(turn).await;
        let _ = reply.send(committed.map(|(verdict, state)| Committed { verdict, state: Some(state) }));
        end
    }

    async fn commit_result(&mut self, result: ResultSet, turn: Turn, reply: Reply<Executed>) -> End {
        let (committed, end) = self.commit_truthfully(turn).await;
        let _ = reply.send(committed.map(|(verdict, state)| Executed { result, verdict: Some(verdict), state }));
        end
    }

    /// Commits and ends the call: what the commit did and where that leaves the session.
    async fn commit_truthfully(&mut self, turn: Turn) -> (Result<(Verdict, SessionState), Failure>, End) {
        let (verdict, error, end) = match self.connection.commit().await {
            CommitVerdict::Committed(xid) => (Verdict::Committed(xid), None, End::Over),
            CommitVerdict::NothingWritten => (Verdict::NothingWritten, None, End::Over),
            CommitVerdict::RolledBack => (Verdict::RolledBack, None, End::Over),
            CommitVerdict::Failed(error) => (Verdict::RolledBack, Some(Error::Database(error)), End::Over),
            CommitVerdict::Unknown(xid, lost) => {
                warn!(session.id = %self.session.id(), cause = %lost, "commit outcome unknown");
                (Verdict::Unknown(xid), None, End::Unknown)
            }
        };
        let state = turn.finish(Progress::Over(Some(verdict)));
        let answer = match error.or(verdict.error()) {
            None => Ok((verdict, state)),
            Some(error) => Err(Failure { error, state: Some(state), verdict: Some(verdict) }),
        };
        (answer, end)
    }

    /// Rolls back, within a bound. Past it the connection is given up, and PostgreSQL rolls back on its own.
    async fn roll_back(&mut self) -> End {
        match timeout(ROLLBACK_GRACE, self.connection.rollback()).await {
            Ok(Ok(())) => End::Over,
            Ok(Err(Lost(_))) | Err(_) => End::Unknown,
        }
    }

    fn backend_lost(&self, lost: &Lost) {
        warn!(session.id = %self.session.id(), cause = %lost, "backend lost");
        self.session.end(EndReason::BackendLost);
    }

    async fn leave(mut self, end: End) {
        let end = match end {
            End::Open => self.roll_back().await,
            End::Over | End::Unknown => end,
        };
        match end {
            End::Over => self.connection.release().await,
            End::Open | End::Unknown => drop(self.connection),
        }
    }
}

/// SQLSTATE of a cancelled statement.
const QUERY_CANCELED: &str = "57014";

/// Cancels a running statement until it ends, and waits for all answers: only then can no cancel hit a later statement.
async fn stop<T>(canceller: &dyn Canceller, running: impl Future<Output = T>) -> Result<T, Lost> {
    let mut running = pin!(running);
    let mut ran = None;
    loop {
        let mut cancelling = canceller.cancel();
        // Should the request fail, nobody knows whether it is still on its way: the connection cannot be used again.
        loop {
            tokio::select! {
                biased;
                answer = &mut running, if ran.is_none() => ran = Some(answer),
                cancelled = &mut cancelling => break cancelled?,
            }
        }
        if ran.is_none() {
            ran = timeout(CANCEL_AGAIN, &mut running).await.ok();
        }
        if let Some(ran) = ran {
            return Ok(ran);
        }
    }
}
