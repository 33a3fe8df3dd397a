//! Running statements: each is sent as soon as the one before has been, where that is safe, and read in order.
//!
//! A statement is held back until it is known whether another request follows, and then shares that one's Sync: each Sync
//! is a write of PostgreSQL's and a wake-up here. Invariants: a request that shares the next one's Sync is followed by that
//! one, whatever fails; whatever has been sent is read to its end before PostgreSQL is asked for anything else; nothing is
//! sent ahead of what may change the meaning of its names; half of what was asked for is never left to commit.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::{FutureExt, MaybeDone, OptionFuture, maybe_done};
use futures_util::{StreamExt, join, try_join};
use tokio::time::{sleep, timeout};
use tokio_postgres::{RowStream, Statement as Prepared};

use super::super::opener::Backend;
use super::super::value::{self, Delimiters, Encoded, Raw, Refusal};
use super::super::wire::{Bind, Sync, Wire};
use super::{DriverError, PooledConnection, rolled_back};
use crate::broker::engine::{
    Canceller, Lost, NotCancelled, StatementError, Stopped, TransactionOptions, TransactionStatus,
};
use crate::broker::error::{Error, Exhausted, PgError};
use crate::broker::statement::{
    Column, Kind, NOTICES_MAX, ResultFormat, ResultLimits, ResultSet, Rows, Statement, WireFormat,
};
use crate::broker::stream::{Closed, Part, Sink};
use crate::broker::value::Value;

/// The most statements sent and not yet answered: enough to hide a round trip, few enough to buffer.
pub(in crate::postgres) const PIPELINE_MAX: usize = 64;

/// The most requests with one Sync. Fewer than may be unanswered, or the first would be waited for before the Sync is sent.
const JOINED_MAX: usize = PIPELINE_MAX / 2;

/// How long a cancel request may take to be dealt with. It takes PostgreSQL milliseconds; longer means that the network
/// or the server is stuck, and only closing the connection helps.
const CANCEL_WAIT: Duration = Duration::from_secs(2);

/// How much is passed on at a time: large against what a message costs, small against what a caller accepts.
pub(super) const CHUNK_BYTES: usize = 128 * 1024;

/// How long rows wait for others to be passed on with.
pub(super) const CHUNK_WAIT: Duration = Duration::from_millis(20);

/// Sent right behind a statement while the transaction has no id that we know of: so it is known before COMMIT is sent.
pub(in crate::postgres) const TRANSACTION_ID: &str =
    "SELECT pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text";

/// A request whose answer is to come.
pub(super) type Asked<'a, T> = MaybeDone<Pin<Box<dyn Future<Output = Result<T, DriverError>> + Send + 'a>>>;

/// Sends a request without waiting for its answer.
pub(super) async fn send<'a, T>(request: impl Future<Output = Result<T, DriverError>> + Send + 'a) -> Asked<'a, T> {
    let mut asked: Asked<'a, T> = maybe_done(Box::pin(request));
    // The driver sends when its future is first polled.
    poll_fn(|cx| Poll::Ready(asked.poll_unpin(cx).is_ready())).await;
    asked
}

/// The answer to a request.
pub(super) async fn answer<T>(mut asked: Asked<'_, T>) -> Result<T, DriverError> {
    (&mut asked).await;
    Pin::new(&mut asked).take_output().expect("it is done, and taken once")
}

/// A statement that has been sent.
pub(super) struct Sent<'a> {
    statement: &'a Statement,
    prepared: Prepared,
    reading: Reading,
    was_cached: bool,
    rows: Asked<'a, RowStream>,
}

/// A statement that is ready to be sent.
struct Held<'a> {
    statement: &'a Statement,
    prepared: Prepared,
    parameters: Vec<Encoded>,
    reading: Reading,
    was_cached: bool,
}

/// How a result is read.
struct Reading {
    /// As PostgreSQL sends it, by column.
    formats: Arc<[WireFormat]>,
    delimiters: Arc<Delimiters>,
    /// As it is returned.
    format: ResultFormat,
}

/// Statements sent and not yet answered, in order, and what the answered ones brought.
struct Pipeline<'a> {
    /// How the transaction begins, unless that has been sent.
    begin: Option<&'a TransactionOptions>,
    /// What of the broker's begins it ahead of its first statement, where that can share a Sync.
    ahead: Option<&'a Prepared>,
    beginning: Option<Asked<'a, u64>>,
    /// The next to be sent.
    held: Option<Held<'a>>,
    /// How many have been sent that share a Sync to come.
    joined: usize,
    sent: VecDeque<Sent<'a>>,
    results: Vec<ResultSet>,
    output: Output<'a>,
    budget: Budget,
}

/// Where rows go.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    pub(super) format: ResultFormat,
    /// `None`: into the result, all together.
    pub(super) sink: Option<&'a Sink>,
}

/// Why statements stopped.
struct Halt {
    index: usize,
    error: StatementError,
    /// Whether the one to blame had been prepared in an earlier transaction.
    was_cached: bool,
}

impl PooledConnection {
    /// Runs statements; should one turn out to be prepared for what is no longer, prepares it anew where that is safe.
    pub(super) async fn run_or_prepare_afresh(
        &mut self,
        begin: Option<&TransactionOptions>,
        statements: &[Statement],
        output: Output<'_>,
        limits: ResultLimits,
    ) -> Result<Vec<ResultSet>, Stopped> {
        let Halt { index, error, was_cached } = match self.run(begin, statements, output, limits, Fresh::No).await {
            Ok(results) => return Ok(results),
            Err(halt) => halt,
        };
        // What has been passed on cannot be taken back.
        let can_repeat = was_cached && !output.sink.is_some_and(Sink::has_begun);
        let stale = match &error {
            StatementError::Failed(error) if can_repeat => Staleness::of(error),
            _ => None,
        };
        if stale.is_some() {
            self.forget(&statements[index]);
        }
        match (stale, error) {
            (Some(_), _) if begin.is_some() => {
                // Nothing else has run in this transaction, so it can begin again and prepare afresh.
                self.undo().await.map_err(|lost| Stopped { index, error: StatementError::Lost(lost) })?;
                let ran = self.run(begin, statements, output, limits, Fresh::Yes).await;
                ran.map_err(|Halt { index, error, .. }| Stopped { index, error })
            }
            (Some(Staleness::Certain), StatementError::Failed(error)) => {
                Err(Stopped { index, error: StatementError::StalePlan(error) })
            }
            (_, error) => Err(Stopped { index, error }),
        }
    }

    /// Rolls back what has been begun for nothing.
    async fn undo(&self) -> Result<(), Lost> {
        let answer = self.backend().client.batch_execute("ROLLBACK").await;
        rolled_back(answer, self.backend().wire.settled().await)
    }

    /// Runs statements in order, sending each before the one before is answered where that is safe. With `Fresh::Yes`
    /// none is taken from the cache.
    async fn run(
        &self,
        begin: Option<&TransactionOptions>,
        statements: &[Statement],
        output: Output<'_>,
        limits: ResultLimits,
        fresh: Fresh,
    ) -> Result<Vec<ResultSet>, Halt> {
        let wire = &self.backend().wire;
        let mut pipeline = Pipeline {
            begin,
            ahead: begin.and_then(|options| self.begin_ahead(options)),
            beginning: None,
            held: None,
            joined: 0,
            sent: VecDeque::new(),
            results: Vec::with_capacity(statements.len()),
            output,
            budget: Budget { rows: limits.rows_max, bytes: limits.bytes_max, notices: NOTICES_MAX, limits },
        };
        let mut last: Option<(&Statement, Prepared, bool)> = None;
        wire.forget_tags();
        wire.take_out_rows(row_bytes_max(limits));
        for (index, statement) in statements.iter().enumerate() {
            let cached = || if fresh == Fresh::Yes { None } else { self.cached(statement) };
            let (ready, was_cached) = match &last {
                Some((before, prepared, was_cached)) if before.prepares_like(statement) => {
                    (Some(prepared.clone()), *was_cached)
                }
                _ => cached().map_or((None, false), |prepared| (Some(prepared), true)),
            };
            let prepared = match ready {
                Some(prepared) => {
                    if let Some(options) = pipeline.begin.take_if(|_| pipeline.ahead.is_none()) {
                        if let Err(error) = self.begin(options, async { Ok(()) }).await {
                            return Err(self.halt(pipeline, index, error, was_cached).await);
                        }
                        wire.forget_tags();
                    }
                    prepared
                }
                None => {
                    // To be prepared, a statement may need the tables that those before it make.
                    self.land(&mut pipeline, 0).await?;
                    match Box::pin(self.prepare(pipeline.begin.take(), statement)).await {
                        Ok(prepared) => prepared,
                        Err(error) => return Err(self.halt(pipeline, index, error, was_cached).await),
                    }
                }
            };
            let delimiters = self.delimiters();
            let parameters = match value::encode(statement.parameters(), prepared.params(), &delimiters) {
                Ok(parameters) => parameters,
                Err(error) => {
                    return Err(self.halt(pipeline, index, StatementError::Refused(error), was_cached).await);
                }
            };
            if statement.kind() != Kind::Query || statement.may_notify() {
                self.may_act.store(true, Ordering::Relaxed);
            }
            if statement.may_change_tables() {
                self.may_change_tables.store(true, Ordering::Relaxed);
            }
            self.send_held(&mut pipeline, Sync::Joins).await;
            if pipeline.joined == 0 {
                // Without the transaction, PostgreSQL would pass over nothing behind this Sync.
                self.land_beginning(&mut pipeline).await?;
            }
            let formats = formats(&prepared, output.format);
            let reading = Reading { formats, delimiters, format: output.format };
            pipeline.held = Some(Held { statement, prepared: prepared.clone(), parameters, reading, was_cached });
            let is_last = index + 1 == statements.len();
            // What changes the meaning of names must be through before the next statement is looked up.
            let unanswered = if may_soil(statement, &prepared) && !is_last { 0 } else { PIPELINE_MAX };
            last = Some((statement, prepared, was_cached));
            self.land(&mut pipeline, unanswered).await?;
        }
        let ask = self.xid.get().is_none();
        // By then, the last statement may have dropped what is prepared.
        let in_full = self.backend().own.is_none()
            || self.is_soiled()
            || last.is_some_and(|(statement, prepared, _)| may_soil(statement, &prepared));
        self.send_held(&mut pipeline, if ask && !in_full { Sync::Joins } else { Sync::Goes }).await;
        let asked = OptionFuture::from(ask.then(|| self.ask_xid(in_full)));
        let (transaction_id, landed) = join!(asked, self.land(&mut pipeline, 0));
        landed?;
        let stopped = |error| Halt { index: statements.len() - 1, error, was_cached: false };
        match transaction_id {
            None => {}
            Some(Ok(xid)) => self.note_xid(xid),
            // A cancel that came too late for the statement; or there is nothing any more to ask with.
            Some(Err(error)) => {
                let was_cached = self.misses_own_statements(&error);
                return Err(Halt { was_cached, ..stopped(self.failure(&error).await) });
            }
        }
        match wire.settled().await {
            Ok(_) => Ok(pipeline.results),
            Err(lost) => Err(stopped(StatementError::Lost(lost))),
        }
    }

    /// Sends the statement that is held back, if there is one, behind what begins the transaction.
    async fn send_held<'a>(&'a self, pipeline: &mut Pipeline<'a>, sync: Sync) {
        let Some(Held { statement, prepared, parameters, reading, was_cached }) = pipeline.held.take() else { return };
        let Backend { client, wire, .. } = self.backend();
        if let Some(begin) = pipeline.begin.take().and(pipeline.ahead) {
            pipeline.beginning = Some(self.send_begin(begin).await);
        }
        let sync = if pipeline.joined < JOINED_MAX { sync } else { Sync::Goes };
        pipeline.joined = if sync == Sync::Joins { pipeline.joined + 1 } else { 0 };
        let formats = reading.formats.contains(&WireFormat::Text).then(|| reading.formats.clone());
        wire.expect(Bind { formats, sync });
        let run = prepared.clone();
        let rows = send(async move { client.query_raw(&run, parameters).await }).await;
        pipeline.sent.push_back(Sent { statement, prepared, reading, was_cached, rows });
    }

    /// Reads answers until no more than `unanswered` are to come; with 0, to what is held back too.
    async fn land<'a>(&'a self, pipeline: &mut Pipeline<'a>, unanswered: usize) -> Result<(), Halt> {
        if unanswered == 0 {
            self.send_held(pipeline, Sync::Goes).await;
        }
        if pipeline.sent.len() > unanswered {
            self.land_beginning(pipeline).await?;
        }
        while pipeline.sent.len() > unanswered
            && let Some(sent) = pipeline.sent.pop_front()
        {
            let (index, was_cached) = (pipeline.results.len(), sent.was_cached);
            let unread = match self.read(sent, index, pipeline.output, &mut pipeline.budget).await {
                Ok(result) => {
                    pipeline.results.push(result);
                    continue;
                }
                Err(unread) => unread,
            };
            // What has been sent is answered only behind a Sync.
            self.send_held(pipeline, Sync::Goes).await;
            let rest = std::mem::take(&mut pipeline.sent);
            let error = match unread {
                Unread::Failed(error) => {
                    // In a failed transaction PostgreSQL refuses them all.
                    drain(None, rest).await;
                    self.failure(&error).await
                }
                Unread::GivenUp(rows, error) => self.abandon(rows, rest, error).await,
            };
            return Err(Halt { index, error, was_cached });
        }
        Ok(())
    }

    /// Waits until the transaction has begun, if that has been sent. Only what shares its Sync has been sent by then.
    async fn land_beginning(&self, pipeline: &mut Pipeline<'_>) -> Result<(), Halt> {
        let Some(beginning) = pipeline.beginning.take() else { return Ok(()) };
        if let Err(error) = answer(beginning).await {
            drain(None, std::mem::take(&mut pipeline.sent)).await;
            let was_cached = self.misses_own_statements(&error);
            let error = if was_cached { self.failure(&error).await } else { self.not_begun(&error).await };
            return Err(Halt { index: 0, error, was_cached });
        }
        // BEGIN's own.
        self.backend().wire.next_tag();
        Ok(())
    }

    /// Reads one statement's result, and checks what is expected of it.
    async fn read(
        &self,
        sent: Sent<'_>,
        index: usize,
        output: Output<'_>,
        budget: &mut Budget,
    ) -> Result<ResultSet, Unread> {
        let wire = &self.backend().wire;
        let Sent { statement, prepared, reading, rows: asked, .. } = sent;
        // Returning drops the stream: unread, it would keep the driver from reading on.
        let mut stream = Box::pin(answer(asked).await.map_err(Unread::Failed)?);
        let before = budget.bytes;
        let columns: Vec<_> =
            prepared.columns().iter().zip(&*reading.formats).map(|each| column(each, reading.format)).collect();
        let (rows, returned) = match output.sink {
            None => {
                let mut rows = Unsent::default();
                while let Some(row) = stream.next().await {
                    if let Err(error) = budget.read(&row.map_err(Unread::Failed)?, &reading, &mut rows) {
                        return Err(Unread::GivenUp(Some(stream), error));
                    }
                }
                let rows = rows.take();
                let returned = rows.count;
                (rows, returned)
            }
            Some(sink) => match self.pass_on(&mut stream, &columns, &reading, sink, budget).await {
                Ok(returned) => (Rows::default(), returned),
                Err(not_passed) => return Err(not_passed.with(stream)),
            },
        };
        if wire.has_taken_rows_out() {
            return Err(Unread::GivenUp(None, budget.too_large()));
        }
        if index > 0 {
            budget.add_result(&prepared).map_err(|error| Unread::GivenUp(None, error))?;
        }
        let notices = budget.notices(wire);
        let result = ResultSet {
            row_count: if columns.is_empty() { stream.rows_affected().unwrap_or(0) } else { returned },
            columns,
            rows,
            command_tag: wire.next_tag().unwrap_or_default(),
            notices,
            bytes: before.saturating_sub(budget.bytes),
        };
        if !leaves_no_trace(statement, &result) {
            self.soiled.store(true, Ordering::Relaxed);
        }
        match statement.check(&result) {
            Ok(()) => Ok(result),
            Err(error) => Err(Unread::GivenUp(None, error)),
        }
    }

    /// Passes rows on as they come, and returns how many they were.
    async fn pass_on(
        &self,
        stream: &mut Pin<Box<RowStream>>,
        columns: &[Column],
        reading: &Reading,
        sink: &Sink,
        budget: &mut Budget,
    ) -> Result<u64, NotPassed> {
        let wire = &self.backend().wire;
        let mut rows = Unsent::default();
        let mut returned = 0;
        put(sink, Part::Columns(columns.to_vec()), stream, wire).await?;
        loop {
            let next = match stream.next().now_or_never() {
                Some(next) => Some(next),
                None => tokio::select! {
                    biased;
                    next = stream.next() => Some(next),
                    () = wire.noticed(), if budget.notices > 0 => None,
                    () = sleep(CHUNK_WAIT), if rows.count > 0 => None,
                },
            };
            let is_last = matches!(next, Some(None));
            let is_late = next.is_none();
            if let Some(Some(row)) = next {
                let row = row.map_err(NotPassed::Failed)?;
                // The limit is on each row.
                budget.bytes = budget.limits.bytes_max;
                budget.read(&row, reading, &mut rows).map_err(NotPassed::GivenUp)?;
            }
            if !is_last && !is_late && rows.bytes < CHUNK_BYTES {
                continue;
            }
            if wire.has_taken_rows_out() {
                return Err(NotPassed::GivenUp(budget.too_large()));
            }
            if rows.count > 0 || is_late {
                let rows = rows.take();
                returned += rows.count;
                put(sink, Part::Rows(rows, budget.notices(wire)), stream, wire).await?;
            }
            if is_last {
                return Ok(returned);
            }
        }
    }

    /// Stops at a statement that has not been sent. If others have run before it, they are the first to be blamed, and
    /// otherwise the transaction is failed: half of what was asked must not commit.
    async fn halt<'a>(
        &'a self,
        mut pipeline: Pipeline<'a>,
        index: usize,
        error: StatementError,
        was_cached: bool,
    ) -> Halt {
        if let Err(halt) = self.land(&mut pipeline, 0).await {
            return halt;
        }
        let error = match error {
            StatementError::Refused(error) if index > 0 => self.abandon(None, VecDeque::new(), error).await,
            error => error,
        };
        Halt { index, error, was_cached }
    }

    /// Stops what runs and reads what is under way: unread rows would block everything behind them, ROLLBACK included.
    /// Leaves the transaction failed, also when all was through before it could be stopped: its caller has not seen what
    /// it did.
    pub(super) async fn abandon(
        &self,
        rows: Option<Pin<Box<RowStream>>>,
        rest: VecDeque<Sent<'_>>,
        why: Error,
    ) -> StatementError {
        let unread = (rows.is_some() || !rest.is_empty()).then(|| drain(rows, rest));
        Box::pin(self.give_up(unread, why)).await
    }

    /// The same, with what has to be read yet.
    pub(super) async fn give_up(&self, unread: Option<impl Future<Output = ()>>, why: Error) -> StatementError {
        let Backend { client, wire, canceller, .. } = self.backend();
        if let Some(unread) = unread {
            let cancelling = async {
                match timeout(CANCEL_WAIT, canceller.cancel()).await {
                    // Unless it was sent, nothing can come of it: all is being read.
                    Ok(Ok(()) | Err(NotCancelled::Unsent(_))) => Ok(()),
                    Ok(Err(NotCancelled::Lost(lost))) => Err(lost),
                    Err(_) => Err(Lost(format!("a cancel request was not dealt with within {CANCEL_WAIT:?}"))),
                }
            };
            if let Err(lost) = try_join!(cancelling, wire.without_rows(unread).map(Ok)) {
                return StatementError::Lost(lost);
            }
        }
        if let Ok(TransactionStatus::Open) = wire.settled().await {
            // Any error fails the transaction. This one says in PostgreSQL's log what it is about.
            let _ = client.batch_execute("\"the result could not be returned\"").await;
        }
        match wire.settled().await {
            Ok(TransactionStatus::Failed) => StatementError::GivenUp(why),
            Ok(status) => StatementError::Lost(Lost(format!("a transaction to be failed is {status:?}"))),
            Err(lost) => StatementError::Lost(lost),
        }
    }
}

/// Puts a part of a result where it is taken from.
async fn put(sink: &Sink, part: Part, stream: &mut Pin<Box<RowStream>>, wire: &Wire) -> Result<(), NotPassed> {
    if sink.put(part).await == Err(Closed) {
        // Somebody is stopping the statement. What it still sends would block everything behind it.
        wire.without_rows(async { while let Some(Ok(_)) = stream.next().await {} }).await;
        return Err(NotPassed::Closed);
    }
    Ok(())
}

/// Whether a statement with this result can have left nothing behind that a transaction's end does not undo. SELECT INTO
/// has the tag of a SELECT, but no columns; set_config() is a SELECT that is a SET.
fn leaves_no_trace(statement: &Statement, result: &ResultSet) -> bool {
    match result.command_tag.split(' ').next() {
        Some("SELECT") => statement.kind() == Kind::Query && !result.columns.is_empty() && !statement.may_set(),
        Some("INSERT" | "UPDATE" | "DELETE" | "MERGE") => !statement.may_set(),
        _ => false,
    }
}

/// The same, as far as it can be told before there is a result, and rather yes than no.
fn may_soil(statement: &Statement, prepared: &Prepared) -> bool {
    match statement.kind() {
        Kind::Change => statement.may_set(),
        Kind::Query => statement.may_set() || prepared.columns().is_empty(),
        Kind::Other => true,
    }
}

/// Whether statements are prepared anew, whatever is in the cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fresh {
    Yes,
    No,
}

/// Why a result was not read to its end.
enum Unread {
    /// PostgreSQL failed the statement, or the connection is lost.
    Failed(DriverError),
    /// It is more than can be returned, or other than expected; with what is still to be read.
    GivenUp(Option<Pin<Box<RowStream>>>, Error),
}

/// Reads all answers, whatever they are.
async fn drain(rows: Option<Pin<Box<RowStream>>>, rest: VecDeque<Sent<'_>>) {
    let read = async |mut rows: Pin<Box<RowStream>>| while let Some(Ok(_)) = rows.next().await {};
    if let Some(rows) = rows {
        read(rows).await;
    }
    for sent in rest {
        if let Ok(rows) = answer(sent.rows).await {
            read(Box::pin(rows)).await;
        }
    }
}

/// Whether a prepared statement failed because of what it was prepared for.
#[derive(PartialEq, Eq)]
enum Staleness {
    /// The table has changed, or the statement is gone.
    Certain,
    /// Names or types did not fit: perhaps only those that were found when it was prepared, by a function that had
    /// changed the `search_path` unseen.
    Possible,
}

impl Staleness {
    fn of(error: &PgError) -> Option<Self> {
        match error.sqlstate.as_str() {
            "26000" => Some(Self::Certain),
            // A type that it was prepared for has been dropped.
            "XX000" if matches!(error.routine.as_deref(), Some("getTypeInputInfo" | "getTypeBinaryInputInfo")) => {
                Some(Self::Certain)
            }
            "0A000" if error.routine.as_deref() == Some("RevalidateCachedQuery") => Some(Self::Certain),
            sqlstate if sqlstate.starts_with("42") => Some(Self::Possible),
            _ => None,
        }
    }
}

/// The formats that PostgreSQL is asked for.
fn formats(prepared: &Prepared, format: ResultFormat) -> Arc<[WireFormat]> {
    let of = match format {
        ResultFormat::Values | ResultFormat::Written(_) => value::format,
        ResultFormat::Packed => value::packed_format,
    };
    prepared.columns().iter().map(|column| of(column.type_())).collect()
}

/// Past this a row cannot be within the limits, whatever it holds: no value takes less than half of its binary form, and
/// text as much as itself.
fn row_bytes_max(limits: ResultLimits) -> usize {
    /// PostgreSQL's own: two bytes, and a length of four for each of up to 1,664 columns.
    const FRAMING: usize = 8 * 1024;
    limits.bytes_max.saturating_mul(2).saturating_add(FRAMING)
}

/// Rows that have been read and are still to be returned.
#[derive(Default)]
struct Unsent {
    values: Vec<Vec<Value>>,
    written: Vec<Bytes>,
    /// The row being written.
    row: BytesMut,
    packed: BytesMut,
    count: u64,
    /// How many bytes they take, and each a few for itself.
    bytes: usize,
}

impl Unsent {
    fn take(&mut self) -> Rows {
        let Self { values, written, packed, count, .. } = std::mem::take(self);
        Rows { values, written, packed: packed.freeze(), count }
    }
}

/// Why rows were not passed on to the end.
enum NotPassed {
    /// PostgreSQL failed the statement, or the connection is lost.
    Failed(DriverError),
    /// They are more than can be returned; some are still to be read.
    GivenUp(Error),
    /// Nobody takes them any more; all have been read.
    Closed,
}

impl NotPassed {
    fn with(self, stream: Pin<Box<RowStream>>) -> Unread {
        match self {
            Self::Failed(error) => Unread::Failed(error),
            Self::GivenUp(error) => Unread::GivenUp(Some(stream), error),
            Self::Closed => Unread::GivenUp(None, Error::CallerLeft),
        }
    }
}

/// What a result may still take.
struct Budget {
    rows: u64,
    bytes: usize,
    notices: usize,
    limits: ResultLimits,
}

impl Budget {
    /// Takes the notices that have come, as far as there is room.
    fn notices(&mut self, wire: &Wire) -> Vec<PgError> {
        let mut notices = wire.take_notices();
        notices.truncate(self.notices);
        self.notices -= notices.len();
        notices
    }

    /// Counts what one more result takes in an answer, without its values.
    fn add_result(&mut self, prepared: &Prepared) -> Result<(), Error> {
        /// A tag and a count; a column's numbers.
        const EACH: usize = 32;
        let names = prepared.columns().iter().map(|column| column.name().len() + column.type_().name().len() + EACH);
        let left = self.bytes.checked_sub(EACH + names.sum::<usize>());
        self.bytes = left.ok_or(Error::Exhausted(Exhausted::ResultBytes(self.limits.bytes_max)))?;
        Ok(())
    }

    /// Reads a row within the budget.
    fn read(&mut self, row: &tokio_postgres::Row, reading: &Reading, rows: &mut Unsent) -> Result<(), Error> {
        /// What a row takes beside its values: of those without columns there is an end too.
        const ROW_BYTES: usize = 4;

        let Reading { formats, delimiters, format } = reading;
        self.rows = self.rows.checked_sub(1).ok_or(Error::Exhausted(Exhausted::ResultRows(self.limits.rows_max)))?;
        rows.count += 1;
        rows.bytes += ROW_BYTES;
        let limits = self.limits;
        let raw = |index: usize| -> Result<Option<&[u8]>, Error> {
            let Raw(bytes) = row.try_get(index).map_err(|error| in_column(index, &error.to_string()))?;
            match bytes {
                Some(bytes) if bytes.len() > limits.value_bytes_max => {
                    Err(Error::Exhausted(Exhausted::ValueBytes(limits.value_bytes_max)))
                }
                bytes => Ok(bytes),
            }
        };
        match format {
            ResultFormat::Packed => {
                for index in 0..row.len() {
                    let bytes = raw(index)?;
                    let length = bytes.map_or(0, <[u8]>::len);
                    self.bytes = self.bytes.checked_sub(4 + length).ok_or_else(|| self.too_large())?;
                    // PostgreSQL has no value of more than 2^30 bytes.
                    rows.packed.put_i32(bytes.map_or(-1, |bytes| i32::try_from(bytes.len()).unwrap_or(i32::MAX)));
                    rows.packed.put_slice(bytes.unwrap_or_default());
                    rows.bytes += 4 + length;
                }
            }
            ResultFormat::Values => {
                let mut values = Vec::with_capacity(row.len());
                for (index, (column, format)) in row.columns().iter().zip(&**formats).enumerate() {
                    let value = value::decode(column.type_(), *format, delimiters, raw(index)?, &mut self.bytes);
                    values.push(value.map_err(|refusal| self.refused(index, refusal))?.into());
                }
                rows.values.push(values);
            }
            ResultFormat::Written(write) => {
                /// Room for many rows, so that few have to make more.
                const ROOM: usize = 64 * 1024;
                if rows.row.capacity() < ROOM / 16 {
                    rows.row.reserve(ROOM);
                }
                for (index, (column, format)) in row.columns().iter().zip(&**formats).enumerate() {
                    let value = value::decode(column.type_(), *format, delimiters, raw(index)?, &mut self.bytes);
                    write(&mut rows.row, value.map_err(|refusal| self.refused(index, refusal))?);
                }
                let row = rows.row.split().freeze();
                rows.bytes += row.len();
                rows.written.push(row);
            }
        }
        Ok(())
    }

    fn refused(&self, column: usize, refusal: Refusal) -> Error {
        match refusal {
            Refusal::TooLarge => self.too_large(),
            Refusal::Unreadable(problem) => in_column(column, &problem),
        }
    }

    fn too_large(&self) -> Error {
        Error::Exhausted(Exhausted::ResultBytes(self.limits.bytes_max))
    }
}

fn in_column(index: usize, problem: &str) -> Error {
    Error::Unreturnable(format!("column {}: {problem}", index + 1))
}

fn column((column, wire_format): (&tokio_postgres::Column, &WireFormat), format: ResultFormat) -> Column {
    Column {
        name: column.name().to_owned(),
        type_oid: column.type_().oid(),
        type_name: column.type_().name().to_owned(),
        type_modifier: column.type_modifier(),
        table_oid: column.table_oid(),
        column_number: column.column_id(),
        wire_format: matches!(format, ResultFormat::Packed).then_some(*wire_format),
    }
}
