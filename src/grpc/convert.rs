//! Between the protocol's messages and the domain's types.
//!
//! Messages are taken apart field by field, so that a new field fails to compile instead of being ignored. Invariant:
//! what is wrong with a request is said with the name of the field.

use std::time::Duration;

use super::pb;
use crate::broker::connect::{
    ChannelBinding, ConnectOverrides, Keepalives, LoadBalanceHosts, SslMode, TargetSessionAttrs,
};
use crate::broker::engine::{IsolationLevel, PoolStatistics};
use crate::broker::error::{EndReason, Error, PgError};
use crate::broker::session::{
    BackendInfo, Committed, Description, ExecuteCall, Executed, SessionState, TransactionState,
};
use crate::broker::statement::{Column, Parameter, ResultSet, Statement};
use crate::broker::token::SessionToken;
use crate::broker::value::{List, Value};
use crate::broker::{BeginSession, Verdict};
use tokio::time::Instant;

/// How deep lists may nest in a request; PostgreSQL's arrays have at most six dimensions.
const LIST_DEPTH_MAX: usize = 6;

pub(super) fn session_token(text: &str) -> Result<SessionToken, Error> {
    SessionToken::parse(text).map_err(|_| {
        Error::invalid("session_token", "is no session token: pass the one BeginSession returned, unchanged")
    })
}

pub(super) fn begin_session(request: pb::BeginSessionRequest) -> Result<BeginSession, Error> {
    let pb::BeginSessionRequest { engine, lease_ttl, options, connect_options, labels } = request;
    let pb::SessionOptions {
        isolation_level,
        read_only,
        deferrable,
        statement_timeout,
        lock_timeout,
        transaction_timeout,
    } = options.unwrap_or_default();
    Ok(BeginSession {
        engine,
        lease_ttl: duration("lease_ttl", lease_ttl)?,
        isolation_level: self::isolation_level(isolation_level)?,
        read_only,
        deferrable,
        statement_timeout: duration("options.statement_timeout", statement_timeout)?,
        lock_timeout: duration("options.lock_timeout", lock_timeout)?,
        transaction_timeout: duration("options.transaction_timeout", transaction_timeout)?,
        connect: connect_options.map(self::connect_options).transpose()?.unwrap_or_default(),
        labels: labels.into_iter().collect(),
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

fn isolation_level(level: i32) -> Result<Option<IsolationLevel>, Error> {
    use pb::IsolationLevel as Pb;
    match Pb::try_from(level) {
        Ok(Pb::Unspecified) => Ok(None),
        Ok(Pb::ReadUncommitted) => Ok(Some(IsolationLevel::ReadUncommitted)),
        Ok(Pb::ReadCommitted) => Ok(Some(IsolationLevel::ReadCommitted)),
        Ok(Pb::RepeatableRead) => Ok(Some(IsolationLevel::RepeatableRead)),
        Ok(Pb::Serializable) => Ok(Some(IsolationLevel::Serializable)),
        Err(_) => Err(Error::invalid("options.isolation_level", format!("{level} is no isolation level"))),
    }
}

/// Absent stays absent; negative and malformed ones are refused. What range makes sense is the domain's to say.
fn duration(field: &str, duration: Option<prost_types::Duration>) -> Result<Option<Duration>, Error> {
    const NANOS: std::ops::Range<i32> = 0..1_000_000_000;
    duration
        .map(|prost_types::Duration { seconds, nanos }| match (u64::try_from(seconds), u32::try_from(nanos)) {
            (Ok(whole), Ok(fraction)) if NANOS.contains(&nanos) => Ok(Duration::new(whole, fraction)),
            _ => Err(Error::invalid(field, "is negative or malformed: give seconds >= 0 and 0 <= nanos < 1e9")),
        })
        .transpose()
}

pub(super) fn execute_call(request: pb::ExecuteRequest, grpc_deadline: Option<Instant>) -> Result<ExecuteCall, Error> {
    let pb::ExecuteRequest { session_token: _, sql, parameters, commit, max_rows, timeout } = request;
    let parameters =
        parameters.into_iter().enumerate().map(|(index, each)| parameter(index, each)).collect::<Result<_, _>>()?;
    let timeout = duration("timeout", timeout)?;
    if timeout == Some(Duration::ZERO) {
        return Err(Error::invalid("timeout", "must be positive: leave it out for the session's"));
    }
    Ok(ExecuteCall {
        statement: Statement::new(sql, parameters)?,
        commit,
        rows_max: (max_rows > 0).then(|| max_rows.into()),
        timeout,
        grpc_deadline,
    })
}

fn parameter(index: usize, parameter: pb::Parameter) -> Result<Parameter, Error> {
    let pb::Parameter { value, r#type } = parameter;
    let field = format!("parameters[{index}].value");
    let value = value.ok_or_else(|| Error::invalid(&field, "is absent: say null_value for NULL"))?;
    Ok(Parameter { value: self::value(&field, value, 0)?, type_name: (!r#type.is_empty()).then_some(r#type) })
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
    let lower_bound = match lower_bounds.as_slice() {
        [] => 1,
        [bound] => *bound,
        _ => return Err(Error::invalid(field, "has lower_bounds for more than one dimension")),
    };
    let values = values.into_iter().enumerate().map(|(index, each)| {
        // The name is made only when it is needed: lists can be long.
        value("", each, depth + 1).map_err(|error| match error {
            Error::Invalid { field: inner, problem } => {
                Error::Invalid { field: format!("{field}.list_value.values[{index}]{inner}"), problem }
            }
            error => error,
        })
    });
    Ok(List { values: values.collect::<Result<_, _>>()?, lower_bound })
}

pub(super) fn session_state(state: SessionState) -> pb::SessionState {
    let SessionState { transaction, lease_remaining, session_remaining, transaction_remaining, renew_after, draining } =
        state;
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
    }
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
        EndReason::TransactionDeadline => pb::EndReason::TransactionDeadline,
        EndReason::Drained => pb::EndReason::Drained,
        EndReason::BackendLost => pb::EndReason::BackendLost,
    }
}

pub(super) fn verdict(verdict: Verdict, state: Option<SessionState>) -> pb::CommitResponse {
    let (outcome, transaction_id) = match verdict {
        Verdict::Committed(id) => (pb::Outcome::Committed, id),
        Verdict::NothingWritten => (pb::Outcome::NothingWritten, 0),
        Verdict::RolledBack => (pb::Outcome::RolledBack, 0),
        Verdict::Unknown(id) => (pb::Outcome::Unknown, id.unwrap_or(0)),
    };
    pb::CommitResponse { outcome: outcome.into(), transaction_id, state: state.map(session_state) }
}

pub(super) fn committed(committed: Committed) -> pb::CommitResponse {
    let Committed { verdict, state } = committed;
    self::verdict(verdict, state)
}

pub(super) fn executed(executed: Executed) -> pb::ExecuteResponse {
    let Executed { result, verdict, state } = executed;
    let ResultSet { columns, rows, row_count, command_tag, notices } = result;
    pb::ExecuteResponse {
        columns: columns.into_iter().map(column).collect(),
        rows: rows.into_iter().map(|values| pb::Row { values: values.into_iter().map(to_value).collect() }).collect(),
        row_count,
        command_tag,
        notices: notices.into_iter().map(pg_error).collect(),
        commit: verdict.map(|verdict| self::verdict(verdict, None)),
        state: Some(session_state(state)),
    }
}

fn column(column: Column) -> pb::Column {
    let Column { name, type_oid, type_name, type_modifier, table_oid, column_number } = column;
    pb::Column {
        name,
        type_oid,
        type_name,
        type_modifier,
        table_oid: table_oid.unwrap_or(0),
        column_number: column_number.unwrap_or(0).into(),
    }
}

fn to_value(value: Value) -> pb::Value {
    use pb::value::Kind;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(value),
        Value::Int(value) => Kind::IntValue(value),
        Value::Double(value) => Kind::DoubleValue(value),
        Value::Text(value) => Kind::StringValue(value),
        Value::Bytes(value) => Kind::BytesValue(value),
        Value::List(List { values, lower_bound }) => Kind::ListValue(pb::ListValue {
            values: values.into_iter().map(to_value).collect(),
            lower_bounds: if lower_bound == 1 { Vec::new() } else { vec![lower_bound] },
        }),
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

fn pool_statistics(statistics: PoolStatistics) -> pb::PoolStatistics {
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

pub(super) fn description(description: Description) -> pb::GetSessionResponse {
    let Description { id, engine, backend, standing, labels } = description;
    let (backend_pid, host) = backend.map_or((0, String::new()), |BackendInfo { pid, host }| (pid, host));
    let (state, reason) = match standing {
        Ok(state) => (Some(session_state(state)), pb::EndReason::Unspecified),
        Err(reason) => (None, end_reason(reason)),
    };
    pb::GetSessionResponse {
        session_id: id.to_string(),
        engine: engine.name,
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
