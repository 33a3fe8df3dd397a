//! COPY: bytes between a caller and PostgreSQL, as they are.
//!
//! Invariant: a COPY that its caller breaks off is failed, and with it the transaction.

use std::collections::VecDeque;
use std::fmt::Write;
use std::pin::pin;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use futures_util::future::FutureExt;
use futures_util::{SinkExt, StreamExt};
use tokio::time::timeout;
use tokio_postgres::Statement as Prepared;

use super::super::begin::{quoted_identifier, quoted_literal};
use super::super::wire::{Bind, Sync};
use super::PooledConnection;
use super::pipeline::{CHUNK_BYTES, CHUNK_WAIT};
use crate::broker::bulk::{CopyFormat, CopyOptions, Source, Supply, Table};
use crate::broker::engine::{Lost, StatementError, Stopped, TransactionOptions, TransactionStatus};
use crate::broker::error::{Error, Exhausted};
use crate::broker::statement::{NOTICES_MAX, ResultLimits, ResultSet};
use crate::broker::stream::{Closed, Part, Sink};

impl PooledConnection {
    /// Copies a caller's data into a table.
    pub(super) async fn copy_in(
        &self,
        begin: Option<&TransactionOptions>,
        table: &Table,
        options: &CopyOptions,
        supply: &Supply,
    ) -> Result<Vec<ResultSet>, Stopped> {
        let sql = format!("COPY {} FROM STDIN ({})", table_sql(table), options_sql(options));
        let copied = async {
            let prepared = self.prepare_copy(begin, &sql).await?;
            self.upload(&prepared, supply).await
        };
        self.copied(copied.await).await
    }

    /// Copies data to a caller.
    pub(super) async fn copy_out(
        &self,
        mut begin: Option<&TransactionOptions>,
        source: &Source,
        options: &CopyOptions,
        sink: &Sink,
        limits: ResultLimits,
    ) -> Result<Vec<ResultSet>, Stopped> {
        let copied = async {
            let source = match source {
                Source::Table(table) => table_sql(table),
                Source::Query(query) => {
                    // On its own it must be a whole statement: so it cannot leave the parentheses that it is put in.
                    self.prepare_copy(begin.take(), query.sql()).await?;
                    format!("(\n{}\n)", query.sql())
                }
            };
            let sql = format!("COPY {source} TO STDOUT ({})", options_sql(options));
            let prepared = self.prepare_copy(begin.take(), &sql).await?;
            self.download(&prepared, sink, limits).await
        };
        self.copied(copied.await).await
    }

    async fn prepare_copy(&self, begin: Option<&TransactionOptions>, sql: &str) -> Result<Prepared, StatementError> {
        self.may_act.store(true, Ordering::Relaxed);
        self.soiled.store(true, Ordering::Relaxed);
        self.request(begin, self.backend().client.prepare(sql)).await
    }

    /// Rows and bytes copied.
    async fn upload(&self, prepared: &Prepared, supply: &Supply) -> Result<(u64, usize), StatementError> {
        let wire = &self.backend().wire;
        let failures = wire.failures();
        let Some(mut supplied) = supply.open() else { return Err(self.break_off().await) };
        wire.expect(Bind { sync: Sync::Waits, ..Bind::default() });
        let sink = match self.backend().client.copy_in::<_, Bytes>(prepared).await {
            Ok(sink) => sink,
            Err(error) => return Err(self.failure(&error).await),
        };
        let mut sink = Box::pin(sink);
        let mut bytes = 0;
        // PostgreSQL says what is wrong with the data as soon as it knows, but the driver only at the end.
        loop {
            let next = tokio::select! {
                biased;
                () = wire.failed_after(failures) => break,
                next = supplied.next() => next,
            };
            match next {
                Ok(Some(data)) => {
                    bytes += data.len();
                    if sink.send(data).await.is_err() {
                        break;
                    }
                }
                Ok(None) => break,
                Err(_) => {
                    // Unfinished, it is told to PostgreSQL to be broken off, which looks like a cancel: what cancel requests
                    // there were can be told by it no more.
                    self.spent.store(true, Ordering::Relaxed);
                    drop(sink);
                    return Err(self.break_off().await);
                }
            }
        }
        match sink.as_mut().finish().await {
            Ok(rows) => Ok((rows, bytes)),
            Err(error) => Err(self.failure(&error).await),
        }
    }

    /// Rows and bytes copied.
    async fn download(
        &self,
        prepared: &Prepared,
        sink: &Sink,
        limits: ResultLimits,
    ) -> Result<(u64, usize), StatementError> {
        let wire = &self.backend().wire;
        wire.forget_tags();
        wire.take_out_rows(limits.bytes_max);
        wire.expect(Bind::default());
        let stream = match self.backend().client.copy_out(prepared).await {
            Ok(stream) => stream,
            Err(error) => return Err(self.failure(&error).await),
        };
        let mut stream = pin!(stream);
        let mut bytes = 0;
        let mut data = BytesMut::new();
        loop {
            let next = match stream.next().now_or_never() {
                Some(next) => Some(next),
                None if data.is_empty() => Some(stream.next().await),
                None => timeout(CHUNK_WAIT, stream.next()).await.ok(),
            };
            match &next {
                Some(Some(Ok(row))) => {
                    bytes += row.len();
                    data.extend_from_slice(row);
                }
                Some(Some(Err(error))) => return Err(self.failure(error).await),
                // It is late, or the last has come.
                None | Some(None) => {}
            }
            let is_last = matches!(next, Some(None));
            if wire.has_taken_rows_out() {
                let why = Error::Exhausted(Exhausted::ResultBytes(limits.bytes_max));
                let unread = async { while let Some(Ok(_)) = stream.next().await {} };
                return Err(self.give_up(Some(unread), why).await);
            }
            if (is_last || next.is_none() || data.len() >= CHUNK_BYTES)
                && !data.is_empty()
                && sink.put(Part::Data(data.split().freeze())).await == Err(Closed)
            {
                // Somebody is stopping it. What it still sends would block everything behind it.
                wire.without_rows(async { while let Some(Ok(_)) = stream.next().await {} }).await;
                return Err(self.break_off().await);
            }
            if is_last {
                break;
            }
        }
        // The data has come to its end, but triggers and foreign keys may still have their say. Where they have none, the
        // driver expects no more, and the wire has seen how it ended.
        if let Some(Err(error)) = stream.next().await
            && error.as_db_error().is_some()
        {
            return Err(self.failure(&error).await);
        }
        let tag = wire.next_tag().unwrap_or_default();
        let rows = tag.rsplit(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0);
        Ok((rows, bytes))
    }

    /// Leaves the transaction failed, however far the COPY has come.
    async fn break_off(&self) -> StatementError {
        self.abandon(None, VecDeque::new(), Error::CallerLeft).await
    }

    /// What has been copied as a result, with the transaction's id known.
    async fn copied(&self, copied: Result<(u64, usize), StatementError>) -> Result<Vec<ResultSet>, Stopped> {
        let stopped = |error| Stopped { index: 0, error };
        let (row_count, bytes) = copied.map_err(stopped)?;
        if self.xid.get().is_none() {
            self.note_xid(self.request(None, self.ask_xid(true)).await.map_err(stopped)?);
        }
        let wire = &self.backend().wire;
        match wire.settled().await {
            Ok(TransactionStatus::Open) => {}
            Ok(status) => {
                return Err(stopped(StatementError::Lost(Lost(format!("a COPY left its transaction {status:?}")))));
            }
            Err(lost) => return Err(stopped(StatementError::Lost(lost))),
        }
        let mut notices = wire.take_notices();
        notices.truncate(NOTICES_MAX);
        Ok(vec![ResultSet {
            row_count,
            bytes,
            notices,
            command_tag: format!("COPY {row_count}"),
            ..ResultSet::default()
        }])
    }
}

fn table_sql(table: &Table) -> String {
    let Table { schema, name, columns } = table;
    let mut sql = String::new();
    if let Some(schema) = schema {
        sql = quoted_identifier(schema) + ".";
    }
    sql += &quoted_identifier(name);
    if !columns.is_empty() {
        let columns: Vec<_> = columns.iter().map(|column| quoted_identifier(column)).collect();
        write!(sql, " ({})", columns.join(", ")).expect("a String takes everything");
    }
    sql
}

fn options_sql(options: &CopyOptions) -> String {
    let CopyOptions { format, header, delimiter, null, quote, escape } = options;
    let format = match format {
        CopyFormat::Text => "text",
        CopyFormat::Csv => "csv",
        CopyFormat::Binary => "binary",
    };
    let mut sql = format!("FORMAT {format}");
    if *header {
        sql += ", HEADER true";
    }
    for (name, value) in [("DELIMITER", delimiter), ("NULL", null), ("QUOTE", quote), ("ESCAPE", escape)] {
        if let Some(value) = value {
            write!(sql, ", {name} {}", quoted_literal(value)).expect("a String takes everything");
        }
    }
    sql
}
