//! A statement whose rows come as they are read.
//!
//! Invariant: dropping it is its caller's leaving: the statement is stopped.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::{Call, Command, Executed, Failure, Session, Stoppable, TransactionChoice, transaction};
use crate::broker::engine::Work;
use crate::broker::statement::{ResultFormat, ResultLimits, Statement};
use crate::broker::stream::{Part, Sink};

/// A call of ExecuteStream.
#[derive(Debug)]
pub struct StreamCall {
    /// What to run.
    pub statement: Statement,
    /// How rows are returned.
    pub format: ResultFormat,
    /// Commit when it has succeeded.
    pub commit: bool,
    /// How the transaction begins, for a call that begins it.
    pub transaction: Option<TransactionChoice>,
    /// The kind of the statement, by its name.
    pub class: Option<String>,
    /// The caller's row limit.
    pub rows_max: Option<u64>,
    /// The request's own time limit.
    pub timeout: Option<Duration>,
    /// When the caller's gRPC deadline passes.
    pub grpc_deadline: Option<Instant>,
}

/// Where the answer comes.
type Answer = oneshot::Receiver<Result<Executed, Failure>>;

/// A result on its way.
#[derive(Debug)]
pub struct Streaming {
    session: Arc<Session>,
    parts: mpsc::Receiver<Part>,
    /// `None` once it has come.
    answer: Option<Answer>,
}

/// What comes of a stream.
#[derive(Debug)]
pub enum Streamed {
    /// A part of the result.
    Part(Part),
    /// The result is complete. Nothing follows.
    End(Executed),
}

impl Session {
    /// Runs a statement whose rows come as they are read. Returns when its turn has come.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn runs nothing; later it cancels the statement, but never a COMMIT.
    pub async fn execute_stream(self: &Arc<Self>, call: StreamCall) -> Result<Streaming, Failure> {
        let turn = self.turn().await?;
        let StreamCall { statement, format, commit, transaction, class, rows_max, timeout, grpc_deadline } = call;
        let (turn, class) = self.check(turn, class.as_deref(), transaction)?;
        let (sink, parts) = Sink::new();
        let (reply, answer) = oneshot::channel();
        self.dispatch(Command::Execute(transaction::Execute {
            begin: self.begin(transaction),
            work: Work::Stream(Box::new((statement, format)), sink),
            commit,
            limits: ResultLimits { rows_max: rows_max.unwrap_or(u64::MAX), bytes_max: self.result_bytes_max() },
            deadline: self.deadline(class, timeout, grpc_deadline),
            answer_by: grpc_deadline,
            running: Stoppable::new(),
            call: Call { turn, numbered: None, reply },
        }));
        Ok(Streaming::new(self.clone(), parts, answer))
    }

    /// Does work in bulk. Returns when its turn has come, with where its answer will come.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn does nothing; later it fails the transaction.
    pub(in crate::broker) async fn bulk(
        self: &Arc<Self>,
        work: Work,
        commit: bool,
        class: Option<String>,
        timeout: Option<Duration>,
        grpc_deadline: Option<Instant>,
    ) -> Result<Answer, Failure> {
        let turn = self.turn().await?;
        let (turn, class) = self.check(turn, class.as_deref(), None)?;
        let (reply, answer) = oneshot::channel();
        self.dispatch(Command::Execute(transaction::Execute {
            begin: self.begin(None),
            work,
            commit,
            limits: ResultLimits { rows_max: u64::MAX, bytes_max: self.result_bytes_max() },
            deadline: self.deadline(class, timeout, grpc_deadline),
            answer_by: grpc_deadline,
            running: Stoppable::new(),
            call: Call { turn, numbered: None, reply },
        }));
        Ok(answer)
    }
}

impl Streaming {
    pub(in crate::broker) fn new(session: Arc<Session>, parts: mpsc::Receiver<Part>, answer: Answer) -> Self {
        Self { session, parts, answer: Some(answer) }
    }

    /// Waits for what comes next; `None` when all has come.
    ///
    /// # Errors
    /// Why the result is not complete. Nothing follows.
    ///
    /// # Cancel safety
    /// Dropping the future loses no part.
    pub async fn next(&mut self) -> Option<Result<Streamed, Failure>> {
        // The parts end before the answer comes.
        if let Some(part) = self.parts.recv().await {
            return Some(Ok(Streamed::Part(part)));
        }
        let answer = self.session.answered(self.answer.as_mut()?).await;
        self.answer = None;
        Some(answer.map(Streamed::End))
    }
}
