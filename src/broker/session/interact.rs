//! Interact: a session in the hands of one stream, over which its calls come one after the other.
//!
//! Knows nothing of what comes over it. Invariants: behind a failure nothing is done until somebody says that it is
//! known; dropping it is its caller's leaving.

use std::sync::Arc;

use tokio::sync::Notify;

use super::{Failure, Session};
use crate::broker::error::{EndReason, Error};

/// A session in the hands of one stream.
#[derive(Debug)]
pub struct Interaction {
    session: Arc<Session>,
    changed: Arc<Notify>,
    origin: Origin,
    pipeline: Pipeline,
}

/// Where a stream has its session from, and so what becomes of the session when the stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// It was begun for the stream, and ends with it.
    Begun,
    /// It was there before, and its caller may come back.
    Found,
}

/// What becomes of the calls that come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pipeline {
    /// They are done.
    Runs,
    /// One has failed. Those behind it may have been sent by somebody who did not know.
    Aborted,
}

impl Interaction {
    /// Takes a session that was begun for the stream: it ends with it.
    ///
    /// # Errors
    /// As for [`Session::attach`].
    pub fn begun(session: Arc<Session>) -> Result<Self, Failure> {
        Self::new(session, Origin::Begun)
    }

    /// Takes a session that is there: when the stream goes, it is as when an attached one does.
    ///
    /// # Errors
    /// As for [`Session::attach`].
    pub fn found(session: Arc<Session>) -> Result<Self, Failure> {
        Self::new(session, Origin::Found)
    }

    fn new(session: Arc<Session>, origin: Origin) -> Result<Self, Failure> {
        let changed = session.open_stream()?;
        Ok(Self { session, changed, origin, pipeline: Pipeline::Runs })
    }

    /// The session.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Waits until the session has ended, and says why.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn ended(&self) -> EndReason {
        loop {
            if let Some(reason) = self.session.end_reason() {
                return reason;
            }
            self.changed.notified().await;
        }
    }

    /// Says whether the next call may be done.
    ///
    /// # Errors
    /// [`Error::PipelineAborted`] behind a failure, until [`Self::resume`].
    pub fn check(&self) -> Result<(), Failure> {
        match self.pipeline {
            Pipeline::Runs => Ok(()),
            Pipeline::Aborted => {
                let state = self.session.state().map_err(Error::from)?;
                Err(Failure { state: Some(state), ..Error::PipelineAborted.into() })
            }
        }
    }

    /// A call has failed: what was sent behind it is not to be done.
    pub fn fail(&mut self) {
        self.pipeline = Pipeline::Aborted;
    }

    /// The failure is known, or undone: what comes now is to be done.
    pub fn resume(&mut self) {
        self.pipeline = Pipeline::Runs;
    }

    /// Its caller has said all.
    pub fn finish(self) {
        let Self { session, origin, .. } = &self;
        match origin {
            // With a transaction open, or a call of somebody else's, it ends as if its caller had left.
            Origin::Begun => session.end_if_idle(EndReason::Closed),
            Origin::Found => {
                let session = session.clone();
                drop(self);
                // Whoever says goodbye is there. A session that has ended needs no lease.
                let _ = session.keep_alive();
            }
        }
    }
}

impl Drop for Interaction {
    fn drop(&mut self) {
        match self.origin {
            Origin::Begun => {
                self.session.end(EndReason::Disconnected);
            }
            Origin::Found => self.session.detach(),
        }
    }
}
