//! A statement whose rows come as they are read.
//!
//! Invariant: dropping it is its caller's leaving: the statement is stopped.

use std::slice;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Answer, CallOptions, Executed, Failure, Session};
use crate::broker::engine::Work;
use crate::broker::statement::{ResultFormat, Statement};
use crate::broker::stream::{Part, Sink};
use crate::broker::terms::Terms;

/// A call of ExecuteStream.
#[derive(Debug)]
pub struct StreamCall {
    /// What to run.
    pub statement: Statement,
    /// How rows are returned.
    pub format: ResultFormat,
    /// How it is done.
    pub options: CallOptions,
}

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
        let StreamCall { statement, format, options } = call;
        let turn = self.check_parameters(turn, slice::from_ref(&statement))?;
        let (sink, parts) = Sink::new();
        let work = Work::Stream(Box::new((statement, format)), sink);
        let answer = self.ask(turn, work, Terms::stream_limits, None, options)?;
        Ok(Streaming::new(self.clone(), parts, answer))
    }

    /// Does work in bulk. Returns when its turn has come, with where its answer will come.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn does nothing; later it fails the transaction.
    pub(in crate::broker) async fn bulk(self: &Arc<Self>, work: Work, options: CallOptions) -> Result<Answer, Failure> {
        let turn = self.turn().await?;
        self.ask(turn, work, Terms::stream_limits, None, options)
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
