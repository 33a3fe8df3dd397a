//! Between the protocol's messages and the domain's types.
//!
//! Messages are taken apart field by field, so that a new field fails to compile instead of being ignored. Invariant:
//! what is wrong with a request is said with the name of the field.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use ring::digest;

use super::{pb, row};
use crate::broker::attach::Event;
use crate::broker::bulk;
use crate::broker::commit::{Resolution, TransactionId, UnknownReason};
use crate::broker::connect::{
    ChannelBinding, ConnectOverrides, Keepalives, LoadBalanceHosts, SslMode, TargetSessionAttrs,
};
use crate::broker::engine::{Blocker, IsolationLevel, PoolStatistics};
use crate::broker::error::{EndReason, Error, PgError};
use crate::broker::notification::{Listen, ListenEvent, Notification};
use crate::broker::run::{Answer, IdempotencyKey, Ran, Run};
use crate::broker::session::streaming::{StreamCall, Streamed};
use crate::broker::session::{
    BackendInfo, CallOptions, Committed, Description, ExecuteCall, Executed, Numbered, SessionState, TransactionChoice,
    TransactionState,
};
use crate::broker::statement::{
    BATCH_MAX, Column, Expectation, Parameter, ResultFormat, ResultSet, Rows, Statement, WireFormat,
};
use crate::broker::stream::Part;
use crate::broker::token::SessionToken;
use crate::broker::value::{LIST_DEPTH_MAX, List, Value};
use crate::broker::{BeginSession, Fingerprint, Repeatable, Verdict};
use tokio::time::Instant;

pub(super) fn session_token(text: &str) -> Result<SessionToken, Error> {
    SessionToken::parse(text).map_err(|_| {
        Error::invalid("session_token", "is no session token: pass the one BeginSession returned, unchanged")
    })
}

pub(super) fn begin_session(request: pb::BeginSessionRequest) -> Result<BeginSession, Error> {
    let repeatable = repeatable(&request.request_id, &request);
    let pb::BeginSessionRequest { engine, profile, lease_ttl, options, connect_options, labels, request_id: _ } =
        request;
    let lease_ttl = duration("lease_ttl", lease_ttl)?;
    let labels = labels.into_iter().collect();
    Ok(BeginSession { lease_ttl, labels, repeatable, ..session(engine, profile, options, connect_options)? })
}

/// A request that may be repeated, if its caller has named it.
fn repeatable(id: &str, request: &impl Message) -> Option<Repeatable> {
    (!id.is_empty()).then(|| Repeatable { id: id.to_owned(), fingerprint: fingerprint(request) })
}

/// Differs when the request does, here and in every broker of this version.
fn fingerprint(request: &impl Message) -> Fingerprint {
    let digest = digest::digest(&digest::SHA256, &request.encode_to_vec());
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// What a session and a transaction without one are begun with alike.
fn session(
    engine: String,
    profile: String,
    options: Option<pb::SessionOptions>,
    connect_options: Option<pb::ConnectOptions>,
) -> Result<BeginSession, Error> {
    let pb::SessionOptions {
        isolation_level,
        read_only,
        deferrable,
        statement_timeout,
        lock_timeout,
        transaction_timeout,
        role,
        settings,
    } = options.unwrap_or_default();
    Ok(BeginSession {
        engine,
        profile,
        isolation_level: self::isolation_level("options.isolation_level", isolation_level)?,
        read_only,
        deferrable,
        statement_timeout: duration("options.statement_timeout", statement_timeout)?,
        lock_timeout: duration("options.lock_timeout", lock_timeout)?,
        transaction_timeout: duration("options.transaction_timeout", transaction_timeout)?,
        connect: connect_options.map(self::connect_options).transpose()?.unwrap_or_default(),
        role: (!role.is_empty()).then_some(role),
        settings: settings.into_iter().collect(),
        ..BeginSession::default()
    })
}

fn connect_options(options: pb::ConnectOptions) -> Result<ConnectOverrides, Error> {
    let pb::ConnectOptions {
        database,
        user,
        application_name,
        connect_timeout,
        ssl_mode,
        target_session_attrs,
        load_balance_hosts,
        channel_binding,
        keepalives,
        tcp_user_timeout,
        client_connection_check_interval,
        idle_in_transaction_session_timeout,
        search_path,
        time_zone,
        server_settings,
    } = options;
    let duration = |name: &str, duration| self::duration(&format!("connect_options.{name}"), duration);
    Ok(ConnectOverrides {
        database,
        user,
        application_name,
        connect_timeout: duration("connect_timeout", connect_timeout)?,
        ssl_mode: word("ssl_mode", ssl_mode, |mode| {
            use pb::SslMode as Pb;
            match mode {
                Pb::Unspecified => None,
                Pb::Disable => Some(SslMode::Disable),
                Pb::Require => Some(SslMode::Require),
                Pb::VerifyCa => Some(SslMode::VerifyCa),
                Pb::VerifyFull => Some(SslMode::VerifyFull),
            }
        })?,
        target_session_attrs: word("target_session_attrs", target_session_attrs, |attrs| {
            use pb::TargetSessionAttrs as Pb;
            match attrs {
                Pb::Unspecified => None,
                Pb::Any => Some(TargetSessionAttrs::Any),
                Pb::ReadWrite => Some(TargetSessionAttrs::ReadWrite),
                Pb::ReadOnly => Some(TargetSessionAttrs::ReadOnly),
                Pb::Primary => Some(TargetSessionAttrs::Primary),
                Pb::Standby => Some(TargetSessionAttrs::Standby),
                Pb::PreferStandby => Some(TargetSessionAttrs::PreferStandby),
            }
        })?,
        load_balance_hosts: word("load_balance_hosts", load_balance_hosts, |balance| {
            use pb::LoadBalanceHosts as Pb;
            match balance {
                Pb::Unspecified => None,
                Pb::Disable => Some(LoadBalanceHosts::Disable),
                Pb::Random => Some(LoadBalanceHosts::Random),
            }
        })?,
        channel_binding: word("channel_binding", channel_binding, |binding| {
            use pb::ChannelBinding as Pb;
            match binding {
                Pb::Unspecified => None,
                Pb::Disable => Some(ChannelBinding::Disable),
                Pb::Prefer => Some(ChannelBinding::Prefer),
                Pb::Require => Some(ChannelBinding::Require),
            }
        })?,
        keepalives: keepalives.map(self::keepalives).transpose()?,
        tcp_user_timeout: duration("tcp_user_timeout", tcp_user_timeout)?,
        client_connection_check_interval: duration(
            "client_connection_check_interval",
            client_connection_check_interval,
        )?,
        idle_in_transaction_session_timeout: duration(
            "idle_in_transaction_session_timeout",
            idle_in_transaction_session_timeout,
        )?,
        search_path,
        time_zone,
        server_settings: server_settings.into_iter().collect(),
    })
}

/// An enum's value, absent when it is unspecified.
fn word<P: TryFrom<i32>, T>(name: &str, value: i32, read: impl FnOnce(P) -> Option<T>) -> Result<Option<T>, Error> {
    P::try_from(value)
        .map(read)
        .map_err(|_| Error::invalid(format!("connect_options.{name}"), format!("{value} is none of its values")))
}

fn keepalives(keepalives: pb::Keepalives) -> Result<Option<Keepalives>, Error> {
    let pb::Keepalives { disabled, idle, interval, retries } = keepalives;
    let default = Keepalives::default();
    let keepalives = Keepalives {
        idle: duration("connect_options.keepalives.idle", idle)?.unwrap_or(default.idle),
        interval: duration("connect_options.keepalives.interval", interval)?.unwrap_or(default.interval),
        retries: if retries == 0 { default.retries } else { retries },
    };
    Ok((!disabled).then_some(keepalives))
}

pub(super) fn transaction_choice(options: pb::TransactionOptions) -> Result<TransactionChoice, Error> {
    let pb::TransactionOptions { isolation_level, read_only, deferrable } = options;
    let isolation_level = self::isolation_level("transaction_options.isolation_level", isolation_level)?;
    Ok(TransactionChoice { isolation_level, read_only, deferrable })
}

fn isolation_level(field: &str, level: i32) -> Result<Option<IsolationLevel>, Error> {
    use pb::IsolationLevel as Pb;
    match Pb::try_from(level) {
        Ok(Pb::Unspecified) => Ok(None),
        Ok(Pb::ReadUncommitted) => Ok(Some(IsolationLevel::ReadUncommitted)),
        Ok(Pb::ReadCommitted) => Ok(Some(IsolationLevel::ReadCommitted)),
        Ok(Pb::RepeatableRead) => Ok(Some(IsolationLevel::RepeatableRead)),
        Ok(Pb::Serializable) => Ok(Some(IsolationLevel::Serializable)),
        Err(_) => Err(Error::invalid(field, format!("{level} is no isolation level"))),
    }
}

/// Absent stays absent; negative and malformed ones are refused. What range makes sense is the domain's to say.
pub(super) fn duration(field: &str, duration: Option<prost_types::Duration>) -> Result<Option<Duration>, Error> {
    const NANOS: std::ops::Range<i32> = 0..1_000_000_000;
    duration
        .map(|prost_types::Duration { seconds, nanos }| match (u64::try_from(seconds), u32::try_from(nanos)) {
            (Ok(whole), Ok(fraction)) if NANOS.contains(&nanos) => Ok(Duration::new(whole, fraction)),
            _ => Err(Error::invalid(field, "is negative or malformed: give seconds >= 0 and 0 <= nanos < 1e9")),
        })
        .transpose()
}

pub(super) fn execute_call(request: pb::ExecuteRequest, grpc_deadline: Option<Instant>) -> Result<ExecuteCall, Error> {
    let numbered = numbered(request.seq, || fingerprint(&pb::ExecuteRequest { timeout: None, ..request.clone() }));
    let pb::ExecuteRequest {
        session_token: _,
        sql,
        parameters,
        commit,
        result_format,
        max_rows,
        timeout,
        class,
        seq: _,
        transaction_options,
    } = request;
    Ok(ExecuteCall {
        statements: [Statement::new(sql, self::parameters("", parameters)?)?].into(),
        format: self::result_format(result_format)?,
        numbered,
        options: call_options(commit, transaction_options, class, max_rows.into(), timeout, grpc_deadline)?,
    })
}

pub(super) fn stream_call(
    request: pb::ExecuteStreamRequest,
    grpc_deadline: Option<Instant>,
) -> Result<StreamCall, Error> {
    let pb::ExecuteStreamRequest {
        session_token: _,
        sql,
        parameters,
        commit,
        result_format,
        max_rows,
        timeout,
        class,
        transaction_options,
    } = request;
    Ok(StreamCall {
        statement: Statement::new(sql, self::parameters("", parameters)?)?,
        format: match self::result_format(result_format)? {
            ResultFormat::Values => ResultFormat::Written(row::write),
            format => format,
        },
        options: call_options(commit, transaction_options, class, max_rows, timeout, grpc_deadline)?,
    })
}

fn call_options(
    commit: bool,
    transaction: Option<pb::TransactionOptions>,
    class: String,
    max_rows: u64,
    timeout: Option<prost_types::Duration>,
    grpc_deadline: Option<Instant>,
) -> Result<CallOptions, Error> {
    Ok(CallOptions {
        commit,
        transaction: transaction.map(transaction_choice).transpose()?,
        class: self::class(class),
        rows_max: (max_rows > 0).then_some(max_rows),
        timeout: self::timeout(timeout)?,
        grpc_deadline,
    })
}

fn result_format(format: i32) -> Result<ResultFormat, Error> {
    use pb::ResultFormat as Pb;
    match Pb::try_from(format) {
        Ok(Pb::Unspecified | Pb::Values) => Ok(ResultFormat::Values),
        Ok(Pb::Packed) => Ok(ResultFormat::Packed),
        Err(_) => Err(Error::invalid("result_format", format!("{format} is none of its values"))),
    }
}

fn class(name: String) -> Option<String> {
    (!name.is_empty()).then_some(name)
}

fn numbered(seq: u64, fingerprint: impl FnOnce() -> Fingerprint) -> Option<Numbered> {
    (seq > 0).then(|| Numbered { seq, fingerprint: fingerprint() })
}

fn timeout(timeout: Option<prost_types::Duration>) -> Result<Option<Duration>, Error> {
    match duration("timeout", timeout)? {
        Some(Duration::ZERO) => Err(Error::invalid("timeout", "must be positive: leave it out for the session's")),
        timeout => Ok(timeout),
    }
}

/// Where each run of a batch stands in its request: the statement, and the set of parameters if it has sets.
pub(super) struct Runs(Vec<(usize, Option<usize>)>);

impl Runs {
    /// The statement and the set of parameters of a run.
    pub(super) fn place(&self, run: usize) -> Option<(usize, Option<usize>)> {
        self.0.get(run).copied()
    }
}

/// A statement of a batch, before its runs are counted.
struct Runnable {
    sql: String,
    parameters: Vec<pb::Parameter>,
    parameter_sets: Vec<pb::ParameterSet>,
    expectation: Option<Expectation>,
}

pub(super) fn batch_call(
    request: pb::ExecuteBatchRequest,
    grpc_deadline: Option<Instant>,
) -> Result<(ExecuteCall, Runs), Error> {
    let numbered = numbered(request.seq, || fingerprint(&pb::ExecuteBatchRequest { timeout: None, ..request.clone() }));
    let pb::ExecuteBatchRequest {
        session_token: _,
        statements,
        commit,
        max_rows,
        timeout,
        seq: _,
        transaction_options,
        class,
    } = request;
    let statements = statements.into_iter().map(|statement| {
        let pb::BatchStatement { sql, parameters, parameter_sets } = statement;
        Runnable { sql, parameters, parameter_sets, expectation: None }
    });
    let (statements, runs) = runs(statements)?;
    let call = ExecuteCall {
        statements,
        format: ResultFormat::Values,
        numbered,
        options: call_options(commit, transaction_options, class, max_rows.into(), timeout, grpc_deadline)?,
    };
    Ok((call, runs))
}

pub(super) fn run(request: pb::RunRequest, grpc_deadline: Option<Instant>) -> Result<(Run, Runs), Error> {
    let idempotency = (!request.idempotency_key.is_empty()).then(|| IdempotencyKey {
        key: request.idempotency_key.clone(),
        request: fingerprint(&pb::RunRequest { idempotency_key: String::new(), attempts_max: 0, ..request.clone() }),
    });
    let pb::RunRequest {
        engine,
        options,
        connect_options,
        statements,
        max_rows,
        profile,
        attempts_max,
        idempotency_key: _,
        class,
    } = request;
    let statements = statements.into_iter().enumerate().map(|(index, statement)| {
        let pb::RunStatement { sql, parameters, parameter_sets, expectation } = statement;
        let expectation = expectation.map(|expectation| self::expectation(index, expectation)).transpose()?;
        Ok(Runnable { sql, parameters, parameter_sets, expectation })
    });
    let (statements, runs) = runs(statements.collect::<Result<Vec<_>, Error>>()?.into_iter())?;
    let run = Run {
        begin: session(engine, profile, options, connect_options)?,
        statements,
        class: self::class(class),
        rows_max: (max_rows > 0).then(|| max_rows.into()),
        attempts_max,
        grpc_deadline,
        idempotency,
        encode: |results| {
            let results = results.into_iter().map(statement_result).collect();
            pb::RunResponse { results, ..pb::RunResponse::default() }.encode_to_vec()
        },
    };
    Ok((run, runs))
}

fn expectation(index: usize, expectation: pb::Expectation) -> Result<Expectation, Error> {
    use pb::expectation::RowCount;
    match expectation.row_count {
        Some(RowCount::Exactly(count)) => Ok(Expectation::Exactly(count)),
        Some(RowCount::AtLeast(count)) => Ok(Expectation::AtLeast(count)),
        None => {
            Err(Error::invalid(format!("statements[{index}].expectation"), "says nothing: give exactly or at_least"))
        }
    }
}

pub(super) fn ran(ran: Ran) -> Result<pb::RunResponse, Error> {
    let Ran { answer, verdict, attempts } = ran;
    let commit = Some(self::verdict(verdict, None));
    match answer {
        Answer::Results(results) => {
            let results = results.into_iter().map(statement_result).collect();
            Ok(pb::RunResponse { results, commit, attempts, replayed: false })
        }
        Answer::Stored(bytes) => {
            let stored = pb::RunResponse::decode(bytes.as_slice());
            let pb::RunResponse { results, .. } = stored.map_err(|_| {
                Error::Unreturnable("the idempotency table has something else under this key than an answer".into())
            })?;
            Ok(pb::RunResponse { results, commit, attempts, replayed: true })
        }
    }
}

/// The runs of a batch's statements, in order.
fn runs(runnables: impl ExactSizeIterator<Item = Runnable>) -> Result<(Arc<[Statement]>, Runs), Error> {
    let too_many = || Error::invalid("statements", format!("have more than {BATCH_MAX} runs: send more batches"));
    if runnables.len() == 0 {
        return Err(Error::invalid("statements", "are none: give at least one"));
    }
    if runnables.len() > BATCH_MAX {
        return Err(too_many());
    }
    let (mut statements, mut places) = (Vec::with_capacity(runnables.len()), Vec::with_capacity(runnables.len()));
    for (index, Runnable { sql, parameters, parameter_sets, expectation }) in runnables.enumerate() {
        let field = format!("statements[{index}].");
        let within = |error| within(&field, error);
        if parameter_sets.is_empty() {
            let statement = self::parameters("", parameters).and_then(|parameters| Statement::new(sql, parameters));
            statements.push(statement.map_err(within)?.expecting(expectation));
            places.push((index, None));
            continue;
        }
        if !parameters.is_empty() {
            let problem = "are given beside parameter_sets: give one or the other";
            return Err(Error::invalid(format!("{field}parameters"), problem));
        }
        if statements.len() + parameter_sets.len() > BATCH_MAX {
            return Err(too_many());
        }
        let statement = Statement::new(sql, Vec::new()).map_err(within)?.expecting(expectation);
        for (set, pb::ParameterSet { parameters }) in parameter_sets.into_iter().enumerate() {
            let parameters = self::parameters(&format!("parameter_sets[{set}]."), parameters);
            statements.push(parameters.and_then(|parameters| statement.with(parameters)).map_err(within)?);
            places.push((index, Some(set)));
        }
    }
    if statements.len() > BATCH_MAX {
        return Err(too_many());
    }
    Ok((statements.into(), Runs(places)))
}

/// The same error, its field inside of another.
fn within(field: &str, error: Error) -> Error {
    match error {
        Error::Invalid { field: inner, problem } => Error::Invalid { field: format!("{field}{inner}"), problem },
        error => error,
    }
}

/// Parameters whose field's name begins so.
fn parameters(field: &str, parameters: Vec<pb::Parameter>) -> Result<Vec<Parameter>, Error> {
    let parameters = parameters.into_iter().enumerate();
    parameters.map(|(index, each)| parameter(&format!("{field}parameters[{index}].value"), each)).collect()
}

fn parameter(field: &str, parameter: pb::Parameter) -> Result<Parameter, Error> {
    let pb::Parameter { value, r#type } = parameter;
    let value = value.ok_or_else(|| Error::invalid(field, "is absent: say null_value for NULL"))?;
    Ok(Parameter { value: self::value(field, value, 0)?, type_name: (!r#type.is_empty()).then_some(r#type) })
}

pub(super) fn wait(wait: Option<prost_types::Duration>) -> Result<Duration, Error> {
    /// Past a COMMIT that a trigger or a synchronous standby delays a little.
    const DEFAULT: Duration = Duration::from_secs(2);
    const MAX: Duration = Duration::from_secs(30);
    match duration("wait", wait)?.unwrap_or(DEFAULT) {
        wait if wait <= MAX => Ok(wait),
        _ => Err(Error::invalid("wait", format!("must be up to {}", humantime::format_duration(MAX)))),
    }
}

pub(super) fn resolution(resolution: Resolution, transaction_id: u64) -> pb::ResolveCommitResponse {
    use pb::UnknownReason as Pb;
    let (outcome, reason) = match resolution {
        Resolution::Committed => (pb::Outcome::Committed, Pb::Unspecified),
        Resolution::RolledBack => (pb::Outcome::RolledBack, Pb::Unspecified),
        Resolution::InProgress => (pb::Outcome::InProgress, Pb::Unspecified),
        Resolution::Unknown(reason) => (
            pb::Outcome::Unknown,
            match reason {
                UnknownReason::OtherCluster => Pb::OtherCluster,
                UnknownReason::OtherTimeline => Pb::OtherTimeline,
                UnknownReason::DatabaseDropped => Pb::DatabaseDropped,
                UnknownReason::ServerCrashed => Pb::ServerCrashed,
                UnknownReason::TooOld => Pb::TooOld,
                UnknownReason::InRecovery => Pb::InRecovery,
            },
        ),
    };
    pb::ResolveCommitResponse { outcome: outcome.into(), transaction_id, unknown_reason: reason.into() }
}

fn value(field: &str, value: pb::Value, depth: usize) -> Result<Value, Error> {
    use pb::value::Kind;
    let pb::Value { kind } = value;
    Ok(match kind.ok_or_else(|| Error::invalid(field, "has no kind: say null_value for NULL"))? {
        Kind::NullValue(_) => Value::Null,
        Kind::BoolValue(value) => Value::Bool(value),
        Kind::IntValue(value) => Value::Int(value),
        Kind::DoubleValue(value) => Value::Double(value),
        Kind::StringValue(value) => Value::Text(value),
        Kind::BytesValue(value) => Value::Bytes(value),
        Kind::ListValue(list) => Value::List(self::list(field, list, depth)?),
    })
}

fn list(field: &str, list: pb::ListValue, depth: usize) -> Result<List, Error> {
    let pb::ListValue { values, lower_bounds } = list;
    if depth == LIST_DEPTH_MAX {
        return Err(Error::invalid(field, format!("nests lists deeper than {LIST_DEPTH_MAX}")));
    }
    let values = values.into_iter().enumerate().map(|(index, each)| {
        // The name is made only when it is needed: lists can be long.
        value("", each, depth + 1).map_err(|error| match error {
            Error::Invalid { field: inner, problem } => {
                Error::Invalid { field: format!("{field}.list_value.values[{index}]{inner}"), problem }
            }
            error => error,
        })
    });
    Ok(List { values: values.collect::<Result<_, _>>()?, lower_bounds })
}

pub(super) fn session_state(state: SessionState) -> pb::SessionState {
    let SessionState {
        transaction,
        transaction_id,
        lease_remaining,
        session_remaining,
        transaction_remaining,
        idle_remaining,
        attached,
        renew_after,
        draining,
    } = state;
    let (transaction_id, commit_token) = transaction_id.map(self::transaction_id).unwrap_or_default();
    pb::SessionState {
        transaction_state: match transaction {
            TransactionState::None => pb::TransactionState::None,
            TransactionState::Open => pb::TransactionState::Open,
            TransactionState::Failed => pb::TransactionState::Failed,
        }
        .into(),
        lease_remaining: to_duration(lease_remaining),
        session_remaining: to_duration(session_remaining),
        transaction_remaining: transaction_remaining.and_then(to_duration),
        renew_after: to_duration(renew_after),
        draining,
        transaction_id,
        commit_token,
        idle_remaining: to_duration(idle_remaining),
        attached,
    }
}

/// The id and the commit token, empty where there is none.
fn transaction_id(id: TransactionId) -> (u64, String) {
    let TransactionId { xid, commit_token } = id;
    (xid, commit_token.map(|token| token.to_string()).unwrap_or_default())
}

pub(super) fn to_duration(duration: Duration) -> Option<prost_types::Duration> {
    // Only what exceeds the type's 292 billion years does not convert.
    duration.try_into().ok()
}

pub(super) fn end_reason(reason: EndReason) -> pb::EndReason {
    match reason {
        EndReason::Closed => pb::EndReason::Closed,
        EndReason::LeaseExpired => pb::EndReason::LeaseExpired,
        EndReason::MaxAge => pb::EndReason::MaxAge,
        EndReason::IdleTimeout => pb::EndReason::IdleTimeout,
        EndReason::TransactionDeadline => pb::EndReason::TransactionDeadline,
        EndReason::Disconnected => pb::EndReason::Disconnected,
        EndReason::Terminated => pb::EndReason::Terminated,
        EndReason::Drained => pb::EndReason::Drained,
        EndReason::BackendLost => pb::EndReason::BackendLost,
    }
}

pub(super) fn verdict(verdict: Verdict, state: Option<SessionState>) -> pb::CommitResponse {
    let (outcome, id) = match verdict {
        Verdict::Committed(id) => (pb::Outcome::Committed, Some(id)),
        Verdict::NothingWritten => (pb::Outcome::NothingWritten, None),
        Verdict::RolledBack => (pb::Outcome::RolledBack, None),
        Verdict::Unknown(id) => (pb::Outcome::Unknown, id),
    };
    let (transaction_id, commit_token) = id.map(transaction_id).unwrap_or_default();
    pb::CommitResponse { outcome: outcome.into(), transaction_id, commit_token, state: state.map(session_state) }
}

pub(super) fn committed(committed: Committed) -> pb::CommitResponse {
    let Committed { verdict, state } = committed;
    self::verdict(verdict, state)
}

pub(super) fn executed(executed: Executed) -> pb::ExecuteResponse {
    let Executed { results, verdict, state } = executed;
    // One statement brings one result.
    let result = results.into_iter().next().unwrap_or_default();
    let packed_rows = result.rows.packed.clone();
    let pb::StatementResult { columns, rows, row_count, command_tag, notices } = statement_result(result);
    let commit = verdict.map(|verdict| self::verdict(verdict, None));
    let state = Some(session_state(state));
    pb::ExecuteResponse { columns, rows, packed_rows, row_count, command_tag, notices, commit, state }
}

pub(super) fn streamed(streamed: Streamed) -> pb::ExecuteStreamResponse {
    use pb::execute_stream_response::Part as Pb;
    let part = match streamed {
        Streamed::Part(Part::Columns(columns)) => {
            Pb::Header(pb::ResultHeader { columns: columns.into_iter().map(column).collect() })
        }
        Streamed::Part(Part::Rows(rows, notices)) => {
            let Rows { values, written, packed, count } = rows;
            Pb::Chunk(pb::ResultChunk {
                rows: values.into_iter().map(to_row).chain(written.into_iter().map(pb::Row::written)).collect(),
                packed_rows: packed,
                // A chunk has some hundred kibibytes.
                row_count: u32::try_from(count).unwrap_or(u32::MAX),
                notices: notices.into_iter().map(pg_error).collect(),
            })
        }
        // That is a COPY's.
        Streamed::Part(Part::Data(_)) => Pb::Chunk(pb::ResultChunk::default()),
        Streamed::End(Executed { results, verdict, state }) => {
            let ResultSet { row_count, command_tag, notices, .. } = results.into_iter().next().unwrap_or_default();
            Pb::Trailer(pb::ResultTrailer {
                row_count,
                command_tag,
                notices: notices.into_iter().map(pg_error).collect(),
                commit: verdict.map(|verdict| self::verdict(verdict, None)),
                state: Some(session_state(state)),
            })
        }
    };
    pb::ExecuteStreamResponse { part: Some(part) }
}

fn to_row(values: Vec<Value>) -> pb::Row {
    values.into_iter().map(to_value).collect::<Vec<_>>().into()
}

pub(super) fn batch_executed(executed: Executed) -> pb::ExecuteBatchResponse {
    let Executed { results, verdict, state } = executed;
    pb::ExecuteBatchResponse {
        results: results.into_iter().map(statement_result).collect(),
        commit: verdict.map(|verdict| self::verdict(verdict, None)),
        state: Some(session_state(state)),
    }
}

fn statement_result(result: ResultSet) -> pb::StatementResult {
    let ResultSet { columns, rows, row_count, command_tag, notices, bytes: _ } = result;
    pb::StatementResult {
        columns: columns.into_iter().map(column).collect(),
        rows: rows.values.into_iter().map(to_row).collect(),
        row_count,
        command_tag,
        notices: notices.into_iter().map(pg_error).collect(),
    }
}

fn column(column: Column) -> pb::Column {
    let Column { name, type_oid, type_name, type_modifier, table_oid, column_number, wire_format } = column;
    pb::Column {
        name,
        type_oid,
        type_name,
        type_modifier,
        table_oid: table_oid.unwrap_or(0),
        column_number: column_number.unwrap_or(0).into(),
        wire_format: match wire_format {
            None => pb::WireFormat::Unspecified,
            Some(WireFormat::Text) => pb::WireFormat::Text,
            Some(WireFormat::Binary) => pb::WireFormat::Binary,
        }
        .into(),
    }
}

pub(super) fn to_value(value: Value) -> pb::Value {
    use pb::value::Kind;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(value),
        Value::Int(value) => Kind::IntValue(value),
        Value::Double(value) => Kind::DoubleValue(value),
        Value::Text(value) => Kind::StringValue(value),
        Value::Bytes(value) => Kind::BytesValue(value),
        Value::List(List { values, lower_bounds }) => {
            Kind::ListValue(pb::ListValue { values: values.into_iter().map(to_value).collect(), lower_bounds })
        }
    };
    pb::Value { kind: Some(kind) }
}

pub(super) fn pg_error(error: PgError) -> pb::PgError {
    let PgError {
        severity,
        sqlstate,
        message,
        detail,
        hint,
        position,
        internal_position,
        internal_query,
        where_,
        schema,
        table,
        column,
        datatype,
        constraint,
        file,
        line,
        routine,
    } = error;
    pb::PgError {
        severity,
        sqlstate,
        message,
        detail: detail.unwrap_or_default(),
        hint: hint.unwrap_or_default(),
        position: position.unwrap_or(0),
        internal_position: internal_position.unwrap_or(0),
        internal_query: internal_query.unwrap_or_default(),
        r#where: where_.unwrap_or_default(),
        schema: schema.unwrap_or_default(),
        table: table.unwrap_or_default(),
        column: column.unwrap_or_default(),
        data_type: datatype.unwrap_or_default(),
        constraint: constraint.unwrap_or_default(),
        file: file.unwrap_or_default(),
        line: line.unwrap_or(0),
        routine: routine.unwrap_or_default(),
    }
}

pub(super) fn pool_statistics(statistics: PoolStatistics) -> pb::PoolStatistics {
    let PoolStatistics { size, overflow_max, open, in_use, idle, waiting, sub_pools, opened, login_failures } =
        statistics;
    // None of them is ever beyond four billion.
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    pb::PoolStatistics {
        size: count(size),
        overflow_max: count(overflow_max),
        open: count(open),
        in_use: count(in_use),
        idle: count(idle),
        waiting: count(waiting),
        sub_pools: count(sub_pools),
        opened,
        login_failures,
    }
}

pub(super) fn event(event: Event) -> pb::AttachResponse {
    use pb::attach_response::Event as Pb;
    let (state, event) = match event {
        Event::Heartbeat(state) => (Some(state), Pb::Heartbeat(pb::Heartbeat {})),
        Event::LeaseLow { state, end_reason, remaining } => {
            let end_reason = self::end_reason(end_reason).into();
            (Some(state), Pb::LeaseLow(pb::LeaseLow { end_reason, remaining: to_duration(remaining) }))
        }
        Event::TransactionLong(state) => (Some(state), Pb::TransactionLong(pb::TransactionLong {})),
        Event::BlockedBy { state, blockers } => {
            let blockers = blockers.into_iter().map(blocker).collect();
            (Some(state), Pb::BlockedBy(pb::BlockedBy { blockers }))
        }
        Event::Draining(state) => (Some(state), Pb::Draining(pb::Draining {})),
        Event::Ended(reason) => (None, Pb::Ended(pb::Ended { end_reason: end_reason(reason).into() })),
    };
    pb::AttachResponse { state: state.map(session_state), event: Some(event) }
}

pub(super) fn blocker(blocker: Blocker) -> pb::Blocker {
    let Blocker { pid, user, application_name, state } = blocker;
    pb::Blocker { backend_pid: pid, user, application_name, state }
}

pub(super) fn description(description: Description) -> pb::GetSessionResponse {
    let Description { id, engine, profile, backend, standing, labels } = description;
    let (backend_pid, host) = backend.map_or((0, String::new()), |BackendInfo { pid, host }| (pid, host.to_string()));
    let (state, reason) = match standing {
        Ok(state) => (Some(session_state(state)), pb::EndReason::Unspecified),
        Err(reason) => (None, end_reason(reason)),
    };
    pb::GetSessionResponse {
        session_id: id.to_string(),
        engine: engine.name,
        profile,
        database: engine.database,
        user: engine.user,
        server_version: engine.server_version,
        backend_pid,
        host,
        pool: Some(pool_statistics(engine.pool)),
        state,
        end_reason: reason.into(),
        labels: labels.into_iter().collect(),
    }
}

pub(super) fn listen(request: pb::ListenRequest) -> Listen {
    let pb::ListenRequest { engine, profile, channels } = request;
    Listen { engine, profile, channels }
}

pub(super) fn listen_event(event: ListenEvent) -> pb::ListenResponse {
    use pb::listen_response::Event as Pb;
    let event = match event {
        ListenEvent::Listening => Pb::Listening(pb::Listening {}),
        ListenEvent::Notification(notification) => {
            let Notification { channel, payload, backend_pid } = Arc::unwrap_or_clone(notification);
            Pb::Notification(pb::Notification { channel, payload, backend_pid })
        }
        ListenEvent::Missed => Pb::Missed(pb::Missed {}),
    };
    pb::ListenResponse { event: Some(event) }
}

/// Whose transaction a COPY is to be a part of.
pub(super) enum Whose {
    Session(SessionToken),
    Alone(Box<BeginSession>),
}

pub(super) fn copy_in(
    target: pb::CopyInTarget,
    grpc_deadline: Option<Instant>,
) -> Result<(Whose, Result<bulk::Copy<bulk::Table>, Error>), Error> {
    let pb::CopyInTarget { context, table, columns, options } = target;
    copy(context, || bulk::Table::new(&table, columns), options, grpc_deadline)
}

pub(super) fn copy_out(
    request: pb::CopyOutRequest,
    grpc_deadline: Option<Instant>,
) -> Result<(Whose, Result<bulk::Copy<bulk::Source>, Error>), Error> {
    use pb::copy_out_request::Source;
    let pb::CopyOutRequest { context, source, columns, options } = request;
    let what = || match source {
        None => Err(Error::invalid("source", "is absent: give a table or a query")),
        Some(Source::Query(_)) if !columns.is_empty() => {
            Err(Error::invalid("columns", "are a table's: the query names its own"))
        }
        Some(Source::Query(query)) => bulk::Source::query(&query),
        Some(Source::Table(table)) => Ok(bulk::Source::Table(bulk::Table::new(&table, columns)?)),
    };
    copy(context, what, options, grpc_deadline)
}

/// Whose a COPY is, and the COPY or what is wrong with it.
fn copy<T>(
    context: Option<pb::CopyContext>,
    what: impl FnOnce() -> Result<T, Error>,
    options: Option<pb::CopyOptions>,
    grpc_deadline: Option<Instant>,
) -> Result<(Whose, Result<bulk::Copy<T>, Error>), Error> {
    let pb::CopyContext { session_token, engine, profile, options: session_options, commit, timeout, class } =
        context.unwrap_or_default();
    let whose = if session_token.is_empty() {
        Whose::Alone(Box::new(session(engine, profile, session_options, None)?))
    } else if engine.is_empty() && profile.is_empty() && session_options.is_none() {
        Whose::Session(self::session_token(&session_token)?)
    } else {
        let problem = "goes without engine, profile and options: the session has its own";
        return Err(Error::invalid("context.session_token", problem));
    };
    let copy = || {
        Ok(bulk::Copy {
            what: what()?,
            data: copy_options(options.unwrap_or_default())?,
            options: call_options(commit, None, class, 0, timeout, grpc_deadline)?,
        })
    };
    Ok((whose, copy()))
}

fn copy_options(options: pb::CopyOptions) -> Result<bulk::CopyOptions, Error> {
    use pb::CopyFormat as Pb;
    let pb::CopyOptions { format, header, delimiter, null, quote, escape } = options;
    let format = match Pb::try_from(format) {
        Ok(Pb::Unspecified | Pb::Text) => bulk::CopyFormat::Text,
        Ok(Pb::Csv) => bulk::CopyFormat::Csv,
        Ok(Pb::Binary) => bulk::CopyFormat::Binary,
        Err(_) => return Err(Error::invalid("options.format", format!("{format} is none of its values"))),
    };
    let texts = [("delimiter", &delimiter), ("null", &null), ("quote", &quote), ("escape", &escape)];
    for (name, text) in texts {
        if text.as_ref().is_some_and(|text| text.contains('\0')) {
            return Err(Error::invalid(format!("options.{name}"), "holds a NUL character"));
        }
    }
    Ok(bulk::CopyOptions { format, header, delimiter, null, quote, escape })
}

pub(super) fn copied_in(done: Executed, has_session: bool) -> pb::CopyInResponse {
    let pb::CopyOutTrailer { row_count, byte_count, commit, state, notices } = copied(done, has_session);
    pb::CopyInResponse { row_count, byte_count, commit, state, notices }
}

pub(super) fn copying_out(streamed: Streamed, has_session: bool) -> pb::CopyOutResponse {
    use pb::copy_out_response::Part as Pb;
    let part = match streamed {
        Streamed::Part(Part::Data(data)) => Pb::Data(data),
        // Those are a statement's.
        Streamed::Part(Part::Columns(_) | Part::Rows(..)) => Pb::Data(bytes::Bytes::new()),
        Streamed::End(done) => Pb::Trailer(copied(done, has_session)),
    };
    pb::CopyOutResponse { part: Some(part) }
}

fn copied(done: Executed, has_session: bool) -> pb::CopyOutTrailer {
    let Executed { results, verdict, state } = done;
    let ResultSet { row_count, bytes, notices, .. } = results.into_iter().next().unwrap_or_default();
    pb::CopyOutTrailer {
        row_count,
        byte_count: u64::try_from(bytes).unwrap_or(u64::MAX),
        commit: verdict.map(|verdict| self::verdict(verdict, None)),
        state: has_session.then(|| session_state(state)),
        notices: notices.into_iter().map(pg_error).collect(),
    }
}
