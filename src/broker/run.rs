//! A whole transaction in one call: begin, run, check, commit, and try again when that is asked for and safe.
//!
//! It stands on a session of its own that nobody else can name. Invariants: an attempt that may have committed is never
//! followed by another; what an idempotency key has committed once is answered again, not run again.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::commit::{Resolution, TransactionId};
use super::engine::IdempotencyTable;
use super::error::{Bound, EndReason, Error, Exhausted, Failure};
use super::idempotency::{Fingerprint, Held, Outcome};
use super::principal::Principal;
use super::session::{CallOptions, ExecuteCall, Executed, Life, Session, TransactionState};
use super::statement::{Parameter, ResultFormat, ResultSet, Statement};
use super::transaction::{Deadline, Verdict};
use super::value::Value;
use super::{BeginSession, Broker, check_name};
use crate::random::jittered;

/// The most attempts: past ten, two transactions do not meet by chance.
const ATTEMPTS_MAX: u32 = 10;

/// The first pause between two attempts, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A transaction to run.
#[derive(Debug)]
pub struct Run {
    /// How it begins, and on which engine.
    pub begin: BeginSession,
    /// What to run, in order.
    pub statements: Arc<[Statement]>,
    /// The kind of its statements, by its name.
    pub class: Option<String>,
    /// The caller's row limit.
    pub rows_max: Option<u64>,
    /// How often to try; 0 is once.
    pub attempts_max: u32,
    /// When the caller's gRPC deadline passes.
    pub grpc_deadline: Option<Instant>,
    /// For a call that may be repeated.
    pub idempotency: Option<IdempotencyKey>,
    /// Makes of the results the answer that a repeat is given.
    pub encode: fn(Vec<ResultSet>) -> Vec<u8>,
}

/// A call's name, given by its caller.
#[derive(Debug)]
pub struct IdempotencyKey {
    /// The name.
    pub key: String,
    /// Differs when the request does.
    pub request: Fingerprint,
}

/// A transaction that has ended well.
#[derive(Debug)]
pub struct Ran {
    /// What it brought.
    pub answer: Answer,
    /// `Committed` or `NothingWritten`.
    pub verdict: Verdict,
    /// How many attempts it took.
    pub attempts: u32,
}

/// What a transaction brought.
#[derive(Debug)]
pub enum Answer {
    /// It ran now.
    Results(Vec<ResultSet>),
    /// It ran before; as [`Run::encode`] made it.
    Stored(Vec<u8>),
}

/// A transaction that has failed.
#[derive(Debug)]
pub struct RunFailure {
    /// Why.
    pub failure: Failure,
    /// How many attempts there were.
    pub attempts: u32,
}

/// Ends a call's session however the call ends.
#[derive(Debug)]
pub(super) struct Own(pub(super) Arc<Session>);

impl Drop for Own {
    fn drop(&mut self) {
        self.0.end(EndReason::Closed);
    }
}

impl Broker {
    /// A session for one call, which owns it.
    pub(super) fn own_session(&self, principal: &Principal, begin: &BeginSession) -> Result<Own, Error> {
        let session = Own(self.open(Life::OneShot, principal, begin)?);
        self.shared.registry.insert(session.0.clone(), None)?;
        // A drain that began meanwhile may have looked at the sessions before this one was there.
        if self.shared.is_draining() { Err(Error::Draining) } else { Ok(session) }
    }

    /// Runs a whole transaction.
    ///
    /// # Errors
    /// As for the calls of a session, each after as many attempts as it says.
    ///
    /// # Cancel safety
    /// Dropping the future rolls back, unless COMMIT is under way; an idempotency key then knows its outcome.
    pub async fn run(&self, principal: &Principal, run: Run) -> Result<Ran, RunFailure> {
        let refused = |error: Error| RunFailure { failure: error.into(), attempts: 0 };
        check(&run).map_err(refused)?;
        let session = self.own_session(principal, &run.begin).map_err(refused)?;
        if let Some(class) = &run.class {
            session.0.check_class(class).map_err(refused)?;
        }
        let mut attempts = 0;
        let mut pause = PAUSE_MIN;
        loop {
            attempts += 1;
            let attempt = Attempt { broker: self, session: &session.0, run: &run };
            let failure = match attempt.run().await {
                Ok((answer, verdict)) => return Ok(Ran { answer, verdict, attempts }),
                Err(failure) => failure,
            };
            let failure = roll_back(&session.0, failure).await;
            if attempts >= run.attempts_max.max(1) || !is_transient(&failure) {
                let failure = without_session(failure, &session.0);
                return Err(RunFailure { failure, attempts });
            }
            sleep(jittered(pause)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

fn check(run: &Run) -> Result<(), Error> {
    if run.attempts_max > ATTEMPTS_MAX {
        return Err(Error::invalid("attempts_max", format!("must be up to {ATTEMPTS_MAX}")));
    }
    match &run.idempotency {
        Some(IdempotencyKey { key, .. }) => {
            check_name("idempotency_key", key)?;
            if run.begin.read_only {
                let problem = "cannot be kept by a read-only transaction, which can be repeated as it is: leave it out";
                return Err(Error::invalid("idempotency_key", problem));
            }
            Ok(())
        }
        None => Ok(()),
    }
}

/// Rolls back what an attempt has left that failed before its commit.
async fn roll_back(session: &Arc<Session>, failure: Failure) -> Failure {
    let is_open = session.state().is_ok_and(|state| state.transaction != TransactionState::None);
    if is_open {
        let _ = session.rollback().await;
    }
    let verdict = failure.verdict.or(is_open.then_some(Verdict::RolledBack));
    Failure { verdict, ..failure }
}

/// Whether the transaction was rolled back for meeting another, and would do well the next time.
fn is_transient(failure: &Failure) -> bool {
    matches!(&failure.error, Error::Database(error) if matches!(error.sqlstate.as_str(), "40001" | "40P01"))
}

/// The same failure for a caller that knows of no session.
pub(super) fn without_session(failure: Failure, session: &Session) -> Failure {
    let error = match failure.error {
        Error::SessionEnded(EndReason::Drained) => Error::Draining,
        Error::SessionEnded(EndReason::Terminated) => Error::SessionEnded(EndReason::Terminated),
        Error::SessionEnded(EndReason::TransactionDeadline) => {
            Error::DeadlineExceeded { bound: Bound::TransactionTimeout, after: session.transaction_timeout() }
        }
        Error::SessionEnded(_) => Error::Unreachable {
            engine: session.engine().name().to_owned(),
            cause: "the connection was lost in mid-transaction, which was rolled back".into(),
        },
        error => error,
    };
    Failure { error, state: None, ..failure }
}

/// One attempt at a transaction.
struct Attempt<'a> {
    broker: &'a Broker,
    session: &'a Arc<Session>,
    run: &'a Run,
}

impl Attempt<'_> {
    async fn run(&self) -> Result<(Answer, Verdict), Failure> {
        match (&self.run.idempotency, self.session.engine().idempotency_table()) {
            (None, _) => {
                let ran = self.run_statements(true).await?;
                Ok((Answer::Results(ran.results), ran.verdict.unwrap_or(Verdict::NothingWritten)))
            }
            (Some(key), Some(table)) => self.run_with_table(key, table).await,
            (Some(key), None) => self.run_in_memory(key).await,
        }
    }

    /// Runs what the caller wants run.
    async fn run_statements(&self, commit: bool) -> Result<Executed, Failure> {
        let options = CallOptions {
            commit,
            class: self.run.class.clone(),
            rows_max: self.run.rows_max,
            grpc_deadline: self.run.grpc_deadline,
            ..CallOptions::default()
        };
        let statements = self.run.statements.clone();
        self.session.execute(ExecuteCall { statements, format: ResultFormat::Values, numbered: None, options }).await
    }

    /// Runs a statement on the idempotency table.
    async fn execute_own(&self, statement: Statement, commit: bool) -> Result<Executed, Failure> {
        let options = CallOptions { commit, grpc_deadline: self.run.grpc_deadline, ..CallOptions::default() };
        own(self.session.execute_own([statement].into(), options).await)
    }

    /// Keeps the key in the database, in the same transaction. Another call that holds it is waited for by PostgreSQL.
    async fn run_with_table(
        &self,
        key: &IdempotencyKey,
        table: &IdempotencyTable,
    ) -> Result<(Answer, Verdict), Failure> {
        let IdempotencyKey { key, request } = key;
        let text = |text: &str| Value::Text(text.to_owned());
        let name = || vec![text(&self.session.principal().to_string()), text(key)];
        let claim = bound(&table.claim, [name(), vec![Value::Bytes(request.to_vec().into())]].concat())?;
        let claimed = self.look(claim).await?;
        if claimed.results.first().is_some_and(|result| result.row_count == 0) {
            let read = self.look(bound(&table.read, name())?).await?;
            self.session.rollback().await?;
            return stored(&read, request);
        }
        let ran = self.run_statements(false).await?;
        let answer = self.answer(&ran.results)?;
        let keep = bound(&table.keep, [name(), vec![Value::Bytes(answer.into())]].concat())?;
        let kept = self.execute_own(keep, true).await.map_err(|failure| match failure.error {
            // It was there when it was claimed.
            Error::ExpectationFailed { .. } => {
                let problem = "the idempotency table did not take the answer: check its policies and triggers";
                Failure { error: Error::Unreturnable(problem.into()), ..failure }
            }
            _ => failure,
        })?;
        Ok((Answer::Results(ran.results), kept.verdict.unwrap_or(Verdict::NothingWritten)))
    }

    /// Looks for the key in the table. What fails here tells nothing of the call that holds the key.
    async fn look(&self, statement: Statement) -> Result<Executed, Failure> {
        let looked = self.execute_own(statement, false).await;
        if looked.is_err() {
            let _ = self.session.rollback().await;
        }
        looked
    }

    /// The answer as a repeat is to be given it: no larger than an answer may be.
    fn answer(&self, results: &[ResultSet]) -> Result<Vec<u8>, Error> {
        /// What is read beside it.
        const MARGIN: usize = 1024;
        let bytes_max = self.session.result_bytes_max();
        let answer = (self.run.encode)(results.to_vec());
        if answer.len() + MARGIN > bytes_max {
            return Err(Error::Exhausted(Exhausted::ResultBytes(bytes_max)));
        }
        Ok(answer)
    }

    /// Keeps the key in this broker's memory.
    async fn run_in_memory(&self, key: &IdempotencyKey) -> Result<(Answer, Verdict), Failure> {
        let IdempotencyKey { key, request } = key;
        let held = self.hold(key).await?;
        if let Some(earlier) = self.earlier(&held, request).await? {
            return Ok(earlier);
        }
        let ran = self.run_statements(false).await?;
        let outcome = (*request, self.answer(&ran.results)?);
        let verdict = self.commit_and_keep(held, outcome).await?;
        Ok((Answer::Results(ran.results), verdict))
    }

    /// Waits for the calls that came before with the same key.
    async fn hold(&self, key: &str) -> Result<Held, Failure> {
        let now = Instant::now();
        let mut deadline = Deadline::new(now, now + self.session.transaction_timeout(), Bound::TransactionTimeout);
        if let Some(at) = self.run.grpc_deadline {
            deadline = deadline.or_earlier(at, Bound::GrpcDeadline);
        }
        let holding = self.broker.shared.outcomes.hold(self.session.principal(), key);
        timeout_at(deadline.at(), holding).await.map_err(|_| deadline.exceeded().into())
    }

    /// What an earlier call with the key has come to.
    async fn earlier(&self, held: &Held, request: &Fingerprint) -> Result<Option<(Answer, Verdict)>, Failure> {
        let Some(Outcome { request: before, answer, verdict }) = held.outcome() else { return Ok(None) };
        if before != request {
            return Err(used_for_another().into());
        }
        let verdict = match verdict {
            Verdict::Unknown(id) => match self.resolve(id.as_ref()).await {
                Some(Resolution::RolledBack) => return Ok(None),
                Some(Resolution::Committed) => id.clone().map_or(Verdict::NothingWritten, Verdict::Committed),
                Some(Resolution::InProgress | Resolution::Unknown(_)) | None => verdict.clone(),
            },
            verdict => verdict.clone(),
        };
        let verdict = verdict.answer(None)?.verdict;
        Ok(Some((Answer::Stored(answer.clone()), verdict)))
    }

    async fn resolve(&self, id: Option<&TransactionId>) -> Option<Resolution> {
        let token = id?.commit_token.as_ref()?.to_string();
        let resolved = self.broker.resolve_commit(self.session.principal(), &token, Instant::now()).await;
        resolved.ok().map(|(resolution, _)| resolution)
    }

    /// Commits, and keeps what came of it even when the caller leaves meanwhile.
    async fn commit_and_keep(&self, held: Held, outcome: (Fingerprint, Vec<u8>)) -> Result<Verdict, Failure> {
        let session = self.session.clone();
        let deadline = self.run.grpc_deadline;
        let committing = self.broker.shared.transactions.spawn(async move {
            let committed = session.commit(deadline).await;
            let verdict = match &committed {
                Ok(committed) => Some(committed.verdict.clone()),
                Err(failure) => failure.verdict.clone(),
            };
            let (request, answer) = outcome;
            held.keep(match verdict {
                None | Some(Verdict::RolledBack) => None,
                Some(verdict) => Some(Outcome { request, answer, verdict }),
            });
            committed
        });
        match committing.await {
            Ok(committed) => Ok(committed?.verdict),
            Err(_) => Err(Error::internal("a task that commits died").into()),
        }
    }
}

/// A failure of our own statements is to blame on none of the caller's.
fn own(ran: Result<Executed, Failure>) -> Result<Executed, Failure> {
    ran.map_err(|failure| Failure { index: None, ..failure })
}

fn used_for_another() -> Error {
    Error::invalid("idempotency_key", "was used for another request: take a new one")
}

/// One of our own statements with its values.
fn bound(statement: &Statement, values: Vec<Value>) -> Result<Statement, Error> {
    statement.with(values.into_iter().map(|value| Parameter { value, type_name: None }).collect())
}

/// What the table has under a key that an earlier call has committed.
fn stored(read: &Executed, request: &Fingerprint) -> Result<(Answer, Verdict), Failure> {
    let row = read.results.first().and_then(|result| result.rows.values.first());
    match row.map(Vec::as_slice) {
        Some([Value::Bytes(before), _, _]) if before.as_ref() != request => Err(used_for_another().into()),
        Some([_, Value::Bytes(answer), Value::Text(xid)]) => {
            let xid = xid.parse().map_err(|_| Error::internal("the idempotency table has no xid8 under a key"))?;
            Ok((Answer::Stored(answer.to_vec()), Verdict::Committed(TransactionId { xid, commit_token: None })))
        }
        // Somebody else has written or deleted it.
        _ => Err(Error::Unreturnable("the idempotency table has no answer under this key".into()).into()),
    }
}
