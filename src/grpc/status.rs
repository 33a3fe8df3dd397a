//! The one table that turns errors into gRPC codes, reasons and advice, and the details that go with them.
//!
//! Invariant: the details fit the header limits of every gRPC client, whatever PostgreSQL said.

use std::collections::HashMap;
use std::time::Duration;

use prost::Message;
use prost_types::Any;
use tonic::{Code, Status};
use tonic_types::pb as rpc;

use super::convert::{self, Runs};
use super::pb;
use crate::broker::error::{Bound, Error, Exhausted, Failure};
use crate::broker::session::TransactionState;
use pb::retry_advice::Scope;

/// `ErrorInfo.domain` of every error.
const DOMAIN: &str = "sessionbroker.v1";

/// What a caller is told to wait before it repeats a call that found no room.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// The longest message in the status line; the details carry PostgreSQL's in full.
const MESSAGE_BYTES_MAX: usize = 512;

struct Row {
    code: Code,
    reason: &'static str,
    advice: Scope,
}

fn row(code: Code, reason: &'static str, advice: Scope) -> Row {
    Row { code, reason, advice }
}

/// The table.
fn lookup(error: &Error) -> Row {
    match error {
        Error::Invalid { .. } => row(Code::InvalidArgument, "INVALID_REQUEST", Scope::Nothing),
        Error::Unauthenticated(_) => row(Code::Unauthenticated, "UNAUTHENTICATED", Scope::Nothing),
        Error::Forbidden(_) => row(Code::PermissionDenied, "FORBIDDEN", Scope::Nothing),
        Error::SessionUnknown => row(Code::NotFound, "SESSION_UNKNOWN", Scope::Session),
        Error::SessionEnded(_) => row(Code::Aborted, "SESSION_ENDED", Scope::Session),
        Error::Draining => row(Code::Unavailable, "DRAINING", Scope::Call),
        Error::Exhausted(Exhausted::Sessions(_)) => row(Code::ResourceExhausted, "SESSIONS_EXHAUSTED", Scope::Call),
        Error::Exhausted(Exhausted::Calls(_) | Exhausted::Requests(_)) => {
            row(Code::ResourceExhausted, "CALLS_EXHAUSTED", Scope::Call)
        }
        Error::Exhausted(
            Exhausted::PrincipalSessions(_)
            | Exhausted::PrincipalTransactions(_)
            | Exhausted::PrincipalCalls(_)
            | Exhausted::PrincipalListeners(_)
            | Exhausted::PrincipalCallRate(_),
        ) => row(Code::ResourceExhausted, "QUOTA_EXHAUSTED", Scope::Call),
        Error::Exhausted(Exhausted::SessionQueue(_)) => row(Code::ResourceExhausted, "SESSION_QUEUE_FULL", Scope::Call),
        Error::Exhausted(Exhausted::PoolWait(_)) => row(Code::ResourceExhausted, "POOL_EXHAUSTED", Scope::Call),
        Error::Exhausted(Exhausted::PoolQueue(_)) => row(Code::ResourceExhausted, "POOL_QUEUE_FULL", Scope::Call),
        Error::Exhausted(Exhausted::SubPools(_)) => row(Code::ResourceExhausted, "SUB_POOLS_EXHAUSTED", Scope::Call),
        Error::Exhausted(Exhausted::Listeners(_)) => row(Code::ResourceExhausted, "LISTENERS_EXHAUSTED", Scope::Call),
        Error::Exhausted(Exhausted::ResultRows(_) | Exhausted::ResultBytes(_) | Exhausted::ValueBytes(_)) => {
            row(Code::ResourceExhausted, "RESULT_TOO_LARGE", Scope::Nothing)
        }
        Error::Unreachable { .. } => row(Code::Unavailable, "ENGINE_UNREACHABLE", Scope::Call),
        Error::Database(error) => {
            let (code, advice) = by_sqlstate(&error.sqlstate);
            row(code, "DATABASE_ERROR", advice)
        }
        Error::StalePlan(_) => row(Code::Aborted, "STALE_PLAN", Scope::Transaction),
        // The transaction's own limit takes its session along.
        Error::DeadlineExceeded { bound: Bound::TransactionTimeout, .. } => {
            row(Code::DeadlineExceeded, "STATEMENT_TIMEOUT", Scope::Session)
        }
        Error::DeadlineExceeded { .. } => row(Code::DeadlineExceeded, "STATEMENT_TIMEOUT", Scope::Transaction),
        Error::Cancelled => row(Code::Cancelled, "CANCELLED", Scope::Transaction),
        Error::NothingToCancel => row(Code::FailedPrecondition, "NOTHING_TO_CANCEL", Scope::Nothing),
        Error::CancelUndelivered(_) => row(Code::Unavailable, "CANCEL_UNDELIVERED", Scope::Call),
        Error::AlreadyAttached => row(Code::FailedPrecondition, "ALREADY_ATTACHED", Scope::Call),
        Error::PipelineAborted => row(Code::FailedPrecondition, "PIPELINE_ABORTED", Scope::Transaction),
        Error::CallerLeft => row(Code::Cancelled, "CALLER_LEFT", Scope::Transaction),
        Error::SeqGap { .. } => row(Code::FailedPrecondition, "SEQ_GAP", Scope::Nothing),
        Error::SeqAnswerGone(_) => row(Code::FailedPrecondition, "SEQ_ANSWER_GONE", Scope::Nothing),
        Error::ExpectationFailed { .. } => row(Code::FailedPrecondition, "EXPECTATION_FAILED", Scope::Nothing),
        Error::Unreturnable(_) => row(Code::InvalidArgument, "RESULT_UNRETURNABLE", Scope::Nothing),
        Error::CommitRolledBack => row(Code::Aborted, "COMMIT_ROLLED_BACK", Scope::Transaction),
        Error::CommitUnknown => row(Code::Unknown, "COMMIT_UNKNOWN", Scope::ResolveCommit),
        Error::IdentityUnavailable(_) => row(Code::Unavailable, "IDENTITY_UNAVAILABLE", Scope::Call),
        Error::Internal { .. } => row(Code::Internal, "INTERNAL", Scope::Nothing),
    }
}

/// The stable name of an error's kind.
pub(super) fn reason(error: &Error) -> &'static str {
    lookup(error).reason
}

/// PostgreSQL's codes, by its Appendix A: the first that the SQLSTATE begins with.
const SQLSTATES: &[(&str, Code, Scope)] = &[
    ("23505", Code::AlreadyExists, Scope::Nothing),
    ("25P02", Code::FailedPrecondition, Scope::Transaction),
    ("42501", Code::PermissionDenied, Scope::Nothing),
    ("53300", Code::ResourceExhausted, Scope::Call),
    // Another transaction held the lock for too long.
    ("55P03", Code::Aborted, Scope::Transaction),
    ("57014", Code::DeadlineExceeded, Scope::Transaction),
    ("08", Code::Unavailable, Scope::Call),
    ("0A", Code::InvalidArgument, Scope::Nothing),
    ("22", Code::InvalidArgument, Scope::Nothing),
    ("28", Code::PermissionDenied, Scope::Nothing),
    ("40", Code::Aborted, Scope::Transaction),
    ("42", Code::InvalidArgument, Scope::Nothing),
    ("53", Code::ResourceExhausted, Scope::Transaction),
    ("54", Code::InvalidArgument, Scope::Nothing),
    ("57", Code::Unavailable, Scope::Call),
    ("58", Code::Internal, Scope::Nothing),
    ("XX", Code::Internal, Scope::Nothing),
    ("", Code::FailedPrecondition, Scope::Nothing),
];

fn by_sqlstate(sqlstate: &str) -> (Code, Scope) {
    let found = SQLSTATES.iter().find(|(prefix, ..)| sqlstate.starts_with(prefix));
    found.map_or((Code::FailedPrecondition, Scope::Nothing), |(_, code, advice)| (*code, *advice))
}

/// The status of a call that failed without touching a session.
pub(super) fn from_error(error: Error) -> Status {
    from_failure(error.into())
}

/// The status of a failed call.
pub(super) fn from_failure(failure: Failure) -> Status {
    status(failure, HashMap::new())
}

/// The status of a failed call with many runs, one of which may be to blame.
pub(super) fn from_batch_failure(failure: Failure, runs: &Runs) -> Status {
    let (failure, metadata) = blame(failure, runs);
    status(failure, metadata)
}

/// The status of a transaction in one call that failed after so many attempts.
pub(super) fn from_run_failure(failure: Failure, attempts: u32, runs: &Runs) -> Status {
    let (failure, mut metadata) = blame(failure, runs);
    metadata.insert("attempts".into(), attempts.to_string());
    status(failure, metadata)
}

/// Says where the run to blame stands in its request.
fn blame(mut failure: Failure, runs: &Runs) -> (Failure, HashMap<String, String>) {
    let mut metadata = HashMap::new();
    if let Some((statement, set)) = failure.index.and_then(|run| runs.place(run)) {
        metadata.insert("statement_index".into(), statement.to_string());
        metadata.extend(set.map(|set| ("parameter_set_index".into(), set.to_string())));
        if let Error::Invalid { field, .. } = &mut failure.error {
            let set = set.filter(|_| field.starts_with("parameters"));
            let set = set.map(|set| format!("parameter_sets[{set}].")).unwrap_or_default();
            *field = format!("statements[{statement}].{set}{field}");
        }
    }
    (failure, metadata)
}

fn status(failure: Failure, mut metadata: HashMap<String, String>) -> Status {
    let Failure { error, state, verdict, index: _ } = failure;
    let Row { code, reason, advice } = lookup(&error);
    let in_failed = state.as_ref().is_some_and(|state| state.transaction == TransactionState::Failed);
    // Where a transaction has failed or was rolled back, no call alone can be repeated.
    let is_over = in_failed || verdict.is_some();
    let advice = if is_over && advice == Scope::Call { Scope::Transaction } else { advice };
    metadata.extend(self::metadata(&error));
    let info = rpc::ErrorInfo { reason: reason.into(), domain: DOMAIN.into(), metadata };
    let mut details = vec![
        any("google.rpc.ErrorInfo", &info),
        any("sessionbroker.v1.RetryAdvice", &pb::RetryAdvice { scope: advice.into() }),
    ];
    details.extend(error_detail(&error));
    if advice == Scope::Call {
        let retry_delay = RETRY_DELAY.try_into().ok();
        details.push(any("google.rpc.RetryInfo", &rpc::RetryInfo { retry_delay }));
    }
    if let Some(verdict) = verdict {
        details.push(any("sessionbroker.v1.CommitResponse", &convert::verdict(verdict, None)));
    }
    if let Some(state) = state {
        details.push(any("sessionbroker.v1.SessionState", &convert::session_state(state)));
    }
    let message = cut(&error.to_string(), MESSAGE_BYTES_MAX);
    let status = rpc::Status { code: code.into(), message: message.clone(), details };
    Status::with_details(code, message, status.encode_to_vec().into())
}

fn metadata(error: &Error) -> Vec<(String, String)> {
    let pairs = match error {
        Error::SessionEnded(reason) => vec![("end_reason", convert::end_reason(*reason).as_str_name().into())],
        Error::Database(error) | Error::StalePlan(error) => vec![("sqlstate", error.sqlstate.clone())],
        Error::DeadlineExceeded { bound, .. } => vec![("bound", bound.name().into())],
        Error::Unreachable { engine, .. } => vec![("engine", engine.clone())],
        Error::Internal { trace_id } => vec![("trace_id", trace_id.clone())],
        Error::SeqGap { expected, .. } => vec![("expected", expected.to_string())],
        Error::ExpectationFailed { count, expected } => {
            vec![("row_count", count.to_string()), ("expected", expected.clone())]
        }
        Error::Invalid { .. }
        | Error::Unauthenticated(_)
        | Error::Forbidden(_)
        | Error::SessionUnknown
        | Error::Draining
        | Error::Exhausted(_)
        | Error::Cancelled
        | Error::NothingToCancel
        | Error::CancelUndelivered(_)
        | Error::AlreadyAttached
        | Error::PipelineAborted
        | Error::CallerLeft
        | Error::SeqAnswerGone(_)
        | Error::CommitRolledBack
        | Error::CommitUnknown
        | Error::Unreturnable(_)
        | Error::IdentityUnavailable(_) => Vec::new(),
    };
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The detail that belongs to the kind of error.
fn error_detail(error: &Error) -> Option<Any> {
    match error {
        Error::Invalid { field, problem } => {
            let violation = rpc::bad_request::FieldViolation {
                field: cut(field, MESSAGE_BYTES_MAX),
                description: cut(problem, MESSAGE_BYTES_MAX),
                ..Default::default()
            };
            Some(any("google.rpc.BadRequest", &rpc::BadRequest { field_violations: vec![violation] }))
        }
        Error::Database(error) | Error::StalePlan(error) => {
            Some(any("sessionbroker.v1.PgError", &convert::pg_error((**error).clone())))
        }
        Error::Exhausted(limit) => {
            let subject = match limit {
                Exhausted::Sessions(_) => "limits.sessions_max",
                Exhausted::Calls(_) => "limits.calls_max",
                Exhausted::Requests(_) => "limits.requests",
                Exhausted::PrincipalListeners(_) => "principals.listeners_max",
                Exhausted::PrincipalSessions(_) => "principals.sessions_max",
                Exhausted::PrincipalTransactions(_) => "principals.transactions_max",
                Exhausted::PrincipalCalls(_) => "principals.calls_max",
                Exhausted::PrincipalCallRate(_) => "principals.calls_per_second",
                Exhausted::SessionQueue(_) => "profiles.session_queue_max",
                Exhausted::PoolWait(_) => "engines.pool_size",
                Exhausted::PoolQueue(_) => "engines.pool_waiters_max",
                Exhausted::SubPools(_) => "engines.sub_pools_max",
                Exhausted::Listeners(_) => "engines.listeners",
                Exhausted::ResultRows(_) => "profiles.result_rows_max",
                Exhausted::ResultBytes(_) => "profiles.result_bytes_max",
                Exhausted::ValueBytes(_) => "profiles.value_bytes_max",
            };
            let violation = rpc::quota_failure::Violation {
                subject: subject.into(),
                description: limit.to_string(),
                ..Default::default()
            };
            Some(any("google.rpc.QuotaFailure", &rpc::QuotaFailure { violations: vec![violation] }))
        }
        Error::Unauthenticated(_)
        | Error::Forbidden(_)
        | Error::SessionUnknown
        | Error::SessionEnded(_)
        | Error::Draining
        | Error::Unreachable { .. }
        | Error::DeadlineExceeded { .. }
        | Error::Cancelled
        | Error::NothingToCancel
        | Error::CancelUndelivered(_)
        | Error::AlreadyAttached
        | Error::PipelineAborted
        | Error::CallerLeft
        | Error::SeqGap { .. }
        | Error::SeqAnswerGone(_)
        | Error::ExpectationFailed { .. }
        | Error::CommitRolledBack
        | Error::CommitUnknown
        | Error::Unreturnable(_)
        | Error::IdentityUnavailable(_)
        | Error::Internal { .. } => None,
    }
}

/// The longest beginning of `text` that is whole characters and at most so many bytes.
fn cut(text: &str, bytes_max: usize) -> String {
    text[..text.floor_char_boundary(bytes_max)].to_owned()
}

fn any(name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::error::PgError;

    #[test]
    fn details_fit_a_header_whatever_postgresql_said() {
        let long = || Some("é".repeat(100_000));
        let error = PgError {
            severity: "ERROR".into(),
            sqlstate: "P0001".into(),
            message: "é".repeat(100_000),
            detail: long(),
            hint: long(),
            internal_query: long(),
            where_: long(),
            ..PgError::default()
        }
        .bounded();
        let status = from_error(Error::Database(Box::new(error)));
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.details().len() < 5 * 1024, "{}", status.details().len());
        assert!(status.message().len() <= MESSAGE_BYTES_MAX);
    }

    /// One of each kind. A kind that is added is added here: [`is_listed`] does not compile without it.
    fn every_error() -> Vec<Error> {
        let pg_error = || Box::new(PgError { sqlstate: "23505".into(), ..PgError::default() });
        vec![
            Error::invalid("sql", "is wrong"),
            Error::Unauthenticated(String::new()),
            Error::Forbidden(String::new()),
            Error::SessionUnknown,
            Error::SessionEnded(crate::broker::error::EndReason::Closed),
            Error::Draining,
            Error::Exhausted(Exhausted::Sessions(1)),
            Error::Exhausted(Exhausted::Calls(1)),
            Error::Exhausted(Exhausted::Requests(1)),
            Error::Exhausted(Exhausted::PrincipalListeners(1)),
            Error::Exhausted(Exhausted::PrincipalSessions(1)),
            Error::Exhausted(Exhausted::PrincipalTransactions(1)),
            Error::Exhausted(Exhausted::PrincipalCalls(1)),
            Error::Exhausted(Exhausted::PrincipalCallRate(1)),
            Error::Exhausted(Exhausted::SessionQueue(1)),
            Error::Exhausted(Exhausted::PoolWait(RETRY_DELAY)),
            Error::Exhausted(Exhausted::PoolQueue(1)),
            Error::Exhausted(Exhausted::SubPools(1)),
            Error::Exhausted(Exhausted::Listeners(1)),
            Error::Exhausted(Exhausted::ResultRows(1)),
            Error::Exhausted(Exhausted::ResultBytes(1)),
            Error::Exhausted(Exhausted::ValueBytes(1)),
            Error::Unreachable { engine: String::new(), cause: String::new() },
            Error::Database(pg_error()),
            Error::StalePlan(pg_error()),
            Error::DeadlineExceeded { bound: Bound::Request, after: RETRY_DELAY },
            Error::Cancelled,
            Error::NothingToCancel,
            Error::CancelUndelivered(String::new()),
            Error::AlreadyAttached,
            Error::PipelineAborted,
            Error::CallerLeft,
            Error::SeqGap { given: 3, expected: 2 },
            Error::SeqAnswerGone(1),
            Error::ExpectationFailed { count: 0, expected: String::new() },
            Error::Unreturnable(String::new()),
            Error::CommitRolledBack,
            Error::CommitUnknown,
            Error::IdentityUnavailable(String::new()),
            Error::Internal { trace_id: String::new() },
        ]
    }

    fn is_listed(error: &Error) -> bool {
        match error {
            Error::Invalid { .. }
            | Error::Unauthenticated(_)
            | Error::Forbidden(_)
            | Error::SessionUnknown
            | Error::SessionEnded(_)
            | Error::Draining
            | Error::Exhausted(
                Exhausted::Sessions(_)
                | Exhausted::Calls(_)
                | Exhausted::Requests(_)
                | Exhausted::PrincipalListeners(_)
                | Exhausted::PrincipalSessions(_)
                | Exhausted::PrincipalTransactions(_)
                | Exhausted::PrincipalCalls(_)
                | Exhausted::PrincipalCallRate(_)
                | Exhausted::SessionQueue(_)
                | Exhausted::PoolWait(_)
                | Exhausted::PoolQueue(_)
                | Exhausted::SubPools(_)
                | Exhausted::Listeners(_)
                | Exhausted::ResultRows(_)
                | Exhausted::ResultBytes(_)
                | Exhausted::ValueBytes(_),
            )
            | Error::Unreachable { .. }
            | Error::Database(_)
            | Error::StalePlan(_)
            | Error::DeadlineExceeded { .. }
            | Error::Cancelled
            | Error::NothingToCancel
            | Error::CancelUndelivered(_)
            | Error::AlreadyAttached
            | Error::PipelineAborted
            | Error::CallerLeft
            | Error::SeqGap { .. }
            | Error::SeqAnswerGone(_)
            | Error::ExpectationFailed { .. }
            | Error::Unreturnable(_)
            | Error::CommitRolledBack
            | Error::CommitUnknown
            | Error::IdentityUnavailable(_)
            | Error::Internal { .. } => true,
        }
    }

    const README: &str = include_str!("../../README.md");

    fn code_name(code: Code) -> String {
        let name: String = format!("{code:?}")
            .chars()
            .flat_map(|c| if c.is_uppercase() { vec!['_', c] } else { vec![c.to_ascii_uppercase()] })
            .collect();
        name.trim_start_matches('_').to_owned()
    }

    /// What the README's retry column begins with.
    fn advice_text(advice: Scope) -> &'static str {
        match advice {
            Scope::Nothing => "nothing",
            Scope::Call => "the call",
            Scope::Transaction => "the transaction",
            Scope::Session => "a new session",
            Scope::ResolveCommit => "nothing before `ResolveCommit`",
            Scope::Unspecified => "never",
        }
    }

    /// The cells of each row of the README's table with that header.
    fn table(header: &str) -> Vec<Vec<&'static str>> {
        let rows = README.split_once(header).unwrap().1.lines().skip(2).take_while(|line| line.starts_with('|'));
        rows.map(|row| row.trim_matches('|').split(" | ").map(str::trim).collect()).collect()
    }

    #[test]
    fn the_published_table_of_reasons_is_the_codes_own() {
        let mut published = table("| Code | Reason | When | Retry |");
        for error in every_error() {
            assert!(is_listed(&error));
            let Row { code, reason, advice } = lookup(&error);
            let by_sqlstate = matches!(error, Error::Database(_));
            let code = if by_sqlstate { "by SQLSTATE".into() } else { format!("`{}`", code_name(code)) };
            let advice = if by_sqlstate { "see below" } else { advice_text(advice) };
            let row = published.iter().find(|row| row[1] == format!("`{reason}`")).expect(reason);
            assert_eq!(row[0], code, "{reason}");
            assert!(row[3].starts_with(advice), "{reason}: {advice}");
        }
        published.retain(|row| !every_error().iter().any(|error| row[1] == format!("`{}`", lookup(error).reason)));
        assert_eq!(published, Vec::<Vec<&str>>::new());
    }

    #[test]
    fn the_published_table_of_sqlstates_is_the_codes_own() {
        let expected: Vec<_> = SQLSTATES
            .iter()
            .map(|(prefix, code, advice)| {
                let prefix = if prefix.is_empty() { "all others".into() } else { format!("`{prefix}`") };
                vec![prefix, format!("`{}`", code_name(*code)), advice_text(*advice).to_owned()]
            })
            .collect();
        assert_eq!(table("| SQLSTATE | Code | Retry |"), expected);
    }
}
