//! Data in bulk: COPY between a caller and a table, in a session's transaction or in one of its own.
//!
//! Invariant: data that did not come to its end is not kept: whoever leaves in between fails the transaction.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::engine::{Work, is_name};
use super::error::{Error, Failure};
use super::guard;
use super::principal::Principal;
use super::run::{Own, without_session};
use super::session::streaming::{Streamed, Streaming};
use super::session::{Answer, CallOptions, Executed, Session};
use super::statement::{Kind, Statement};
use super::stream::Sink;
use super::{BeginSession, Broker};

/// A COPY of data.
#[derive(Debug)]
pub struct Copy<T> {
    /// Where from, or where to.
    pub what: T,
    /// How the data is written.
    pub data: CopyOptions,
    /// How it is done.
    pub options: CallOptions,
}

/// A table and some of its columns.
#[derive(Debug, Clone)]
pub struct Table {
    /// Its schema; `None`: the first on the search path that has it.
    pub schema: Option<String>,
    /// Its name.
    pub name: String,
    /// In the order of the data; none: all.
    pub columns: Vec<String>,
}

/// What is copied to a caller.
#[derive(Debug, Clone)]
pub enum Source {
    /// A table.
    Table(Table),
    /// What a query returns.
    Query(Statement),
}

/// How data is written; what is absent is PostgreSQL's to say.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "the names are those of PostgreSQL's COPY")]
pub struct CopyOptions {
    pub format: CopyFormat,
    pub header: bool,
    pub delimiter: Option<String>,
    pub null: Option<String>,
    pub quote: Option<String>,
    pub escape: Option<String>,
}

/// PostgreSQL's formats of COPY.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of PostgreSQL's COPY")]
pub enum CopyFormat {
    #[default]
    Text,
    Csv,
    Binary,
}

impl Table {
    /// The table of that name, "TABLE" or "SCHEMA.TABLE".
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn new(text: &str, columns: Vec<String>) -> Result<Self, Error> {
        let (schema, name) = text.split_once('.').map_or((None, text), |(schema, name)| (Some(schema), name));
        if !is_name(name) || !schema.is_none_or(is_name) {
            return Err(Error::invalid(
                "table",
                "must be TABLE or SCHEMA.TABLE, each of 1 to 63 bytes, without quotes",
            ));
        }
        if !columns.iter().all(|column| is_name(column)) {
            return Err(Error::invalid("columns", "must be names of 1 to 63 bytes"));
        }
        Ok(Self { schema: schema.map(str::to_owned), name: name.to_owned(), columns })
    }
}

impl Source {
    /// What a query returns.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn query(sql: &str) -> Result<Self, Error> {
        let statement = Statement::new(guard::bare(sql).to_owned(), Vec::new()).map_err(|error| match error {
            Error::Invalid { problem, .. } => Error::invalid("query", problem),
            error => error,
        })?;
        match statement.kind() {
            Kind::Query | Kind::Change => Ok(Self::Query(statement)),
            Kind::Other => Err(Error::invalid("query", "must return rows: SELECT, VALUES, TABLE, WITH, or RETURNING")),
        }
    }
}

/// What a caller sends.
#[derive(Debug)]
enum Upload {
    Data(Bytes),
    /// That was all.
    End,
}

/// Where a caller's data comes out.
#[derive(Debug)]
pub struct Supply {
    uploads: Mutex<Option<mpsc::Receiver<Upload>>>,
    closed: CancellationToken,
}

/// A caller's data, for the one who copies it.
#[derive(Debug)]
pub struct Supplied {
    uploads: mpsc::Receiver<Upload>,
    closed: CancellationToken,
}

/// The data does not come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BrokenOff;

impl Supply {
    fn new() -> (Self, mpsc::Sender<Upload>) {
        // One message: it may have mebibytes.
        let (put, uploads) = mpsc::channel(1);
        (Self { uploads: Mutex::new(Some(uploads)), closed: CancellationToken::new() }, put)
    }

    /// The data; once.
    pub fn open(&self) -> Option<Supplied> {
        let uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Supplied { uploads, closed: self.closed.clone() })
    }

    pub(super) fn closing(&self) -> CancellationToken {
        self.closed.clone()
    }
}

impl Supplied {
    /// The next data; `None` when that was all.
    ///
    /// # Errors
    /// [`BrokenOff`].
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Bytes>, BrokenOff> {
        let upload = tokio::select! {
            biased;
            () = self.closed.cancelled() => None,
            upload = self.uploads.recv() => upload,
        };
        match upload {
            Some(Upload::Data(data)) => Ok(Some(data)),
            Some(Upload::End) => Ok(None),
            None => Err(BrokenOff),
        }
    }
}

/// Whose transaction a COPY is a part of.
#[derive(Debug)]
pub struct Holder {
    session: Arc<Session>,
    /// It has a session of its own, which ends with it.
    own: Option<Own>,
}

/// Data on its way in. Dropped, it is broken off.
#[derive(Debug)]
pub struct CopyingIn {
    holder: Holder,
    /// `None` once all has been put in.
    put: Option<mpsc::Sender<Upload>>,
    answer: Answer,
}

/// Data on its way out. Dropped, it is broken off.
#[derive(Debug)]
pub struct CopyingOut {
    holder: Holder,
    streaming: Streaming,
}

impl Broker {
    /// For a COPY in a transaction of its own.
    ///
    /// # Errors
    /// Those of BeginSession.
    pub fn alone(&self, principal: &Principal, begin: &BeginSession) -> Result<Holder, Error> {
        let own = self.own_session(principal, begin)?;
        Ok(Holder { session: own.0.clone(), own: Some(own) })
    }
}

impl Holder {
    /// For a COPY in a session's transaction.
    pub fn of(session: Arc<Session>) -> Self {
        Self { session, own: None }
    }

    /// Begins to copy a caller's data into a table. Returns when its turn has come.
    ///
    /// # Errors
    /// As for Execute.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn copies nothing; later it fails the transaction.
    pub async fn copy_in(self, copy: Copy<Table>) -> Result<CopyingIn, Failure> {
        let Copy { what, data, options } = copy;
        let (supply, put) = Supply::new();
        let work = Work::CopyIn(Box::new((what, data)), supply);
        match self.ask(work, options).await {
            Ok(answer) => Ok(CopyingIn { holder: self, put: Some(put), answer }),
            Err(failure) => Err(self.told(failure)),
        }
    }

    /// A transaction that has only a COPY ends with it.
    async fn ask(&self, work: Work, options: CallOptions) -> Result<Answer, Failure> {
        let commit = options.commit || self.own.is_some();
        self.session.bulk(work, CallOptions { commit, ..options }).await
    }

    /// Begins to copy data to a caller. Returns when its turn has come.
    ///
    /// # Errors
    /// As for Execute.
    ///
    /// # Cancel safety
    /// Dropping the future before its turn copies nothing; later it cancels the COPY.
    pub async fn copy_out(self, copy: Copy<Source>) -> Result<CopyingOut, Failure> {
        let Copy { what, data, options } = copy;
        let (sink, parts) = Sink::new();
        let work = Work::CopyOut(Box::new((what, data)), sink);
        match self.ask(work, options).await {
            Ok(answer) => {
                let streaming = Streaming::new(self.session.clone(), parts, answer);
                Ok(CopyingOut { holder: self, streaming })
            }
            Err(failure) => Err(self.told(failure)),
        }
    }

    /// The same failure for a caller that knows of no session, if it has none.
    fn told(&self, failure: Failure) -> Failure {
        if self.own.is_some() { without_session(failure, &self.session) } else { failure }
    }

    /// The session, if its caller knows of it.
    pub fn session(&self) -> Option<&Session> {
        self.own.is_none().then_some(&*self.session)
    }
}

impl CopyingIn {
    /// Puts data in when there is room. What the COPY says meanwhile is to be asked of [`Self::done`].
    ///
    /// # Cancel safety
    /// A dropped future has not put the data in.
    pub async fn put(&self, data: Bytes) {
        if let Some(put) = &self.put {
            // Nobody takes it when the COPY has ended, and then it says why.
            let _ = put.send(Upload::Data(data)).await;
        }
    }

    /// Breaks it off, and says what that has left.
    ///
    /// # Cancel safety
    /// Dropping the future breaks it off as well.
    pub async fn break_off(mut self) -> Result<Executed, Failure> {
        self.put = None;
        self.done().await
    }

    /// Says that all has been put in.
    ///
    /// # Cancel safety
    /// A dropped future has not said it.
    pub async fn end(&mut self) {
        if let Some(put) = &self.put {
            let _ = put.send(Upload::End).await;
        }
        self.put = None;
    }

    /// Waits for what comes of it.
    ///
    /// # Errors
    /// As for Execute.
    ///
    /// # Cancel safety
    /// Safe to drop and call again, until it has answered.
    pub async fn done(&mut self) -> Result<Executed, Failure> {
        let answered = self.holder.session.answered(&mut self.answer).await;
        answered.map_err(|failure| self.holder.told(failure))
    }

    /// Whether its caller knows of the session.
    pub fn has_session(&self) -> bool {
        self.holder.session().is_some()
    }
}

impl CopyingOut {
    /// Waits for what comes next; `None` when all has come.
    ///
    /// # Errors
    /// As for Execute. Nothing follows.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<Streamed, Failure>> {
        let next = self.streaming.next().await?;
        Some(next.map_err(|failure| self.holder.told(failure)))
    }

    /// Whether its caller knows of the session.
    pub fn has_session(&self) -> bool {
        self.holder.session().is_some()
    }
}
