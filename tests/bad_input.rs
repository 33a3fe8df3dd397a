//! Bad input: each a named error, with the session and the pool unharmed.

use prost::Message;
use session_broker::grpc::pb;
use tonic::Code;
use tonic::codegen::http::uri::PathAndQuery;

use crate::batches::parameters;
#[cfg(target_os = "linux")]
use crate::command_line::Program;
use crate::support::{
    Broker, Database, Failure, Session, bounded, first_row, int, list, millis, null, seconds, text, typed,
};
use pb::value::Kind;
use pb::{Outcome, TransactionState};

/// A bad request of Execute changes nothing: the transaction, its effects and the session stand.
async fn refused(session: &Session, request: pb::ExecuteRequest, field: &str) -> Failure {
    session.execute("SELECT 1").await.unwrap();
    let failure = session.run(request).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
    assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
    assert_eq!(failure.transaction_state(), TransactionState::Open, "{failure:?}");
    session.execute("SELECT 1").await.unwrap();
    failure
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_opens_nothing_is_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let (rest, secret) = session.token.rsplit_once('.').unwrap();
    let flipped = if secret.starts_with('0') { "1" } else { "0" };
    let wrong_secret = format!("{rest}.{flipped}{}", &secret[1..]);
    let unknown = format!("broker.{}.{}", "0".repeat(32), "0".repeat(32));
    for token in [unknown, wrong_secret] {
        let stranger = Session { token, ..session.clone() };
        for failure in [
            stranger.execute("SELECT 1").await.unwrap_err(),
            stranger.commit().await.unwrap_err(),
            stranger.rollback().await.unwrap_err(),
            stranger.close().await.unwrap_err(),
            stranger.keep_alive().await.unwrap_err(),
            stranger.get().await.unwrap_err(),
        ] {
            assert_eq!((failure.code, failure.reason.as_str()), (Code::NotFound, "SESSION_UNKNOWN"));
        }
    }
    for token in ["", "x", &session.token[1..session.token.len() - 1], &"a.".repeat(5000)] {
        let stranger = Session { token: token.into(), ..session.clone() };
        let failure = stranger.execute("SELECT 1").await.unwrap_err();
        assert_eq!((failure.code, failure.field.as_deref()), (Code::InvalidArgument, Some("session_token")));
    }
    assert_eq!(session.execute("SELECT 1").await.unwrap().state.unwrap().transaction_state(), TransactionState::Open);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_begin_that_cannot_be_granted_names_its_field() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let options = |options| pb::BeginSessionRequest { options: Some(options), ..Default::default() };
    let negative = Some(prost_types::Duration { seconds: -1, nanos: 0 });
    let malformed = Some(prost_types::Duration { seconds: 1, nanos: -5 });
    let labels = |count: usize, key: usize, value: usize| pb::BeginSessionRequest {
        labels: (0..count).map(|n| (format!("{n:0>key$}"), "v".repeat(value))).collect(),
        ..Default::default()
    };
    for (request, field) in [
        (pb::BeginSessionRequest { engine: "nowhere".into(), ..Default::default() }, "engine"),
        (pb::BeginSessionRequest { lease_ttl: seconds(0), ..Default::default() }, "lease_ttl"),
        (pb::BeginSessionRequest { lease_ttl: negative, ..Default::default() }, "lease_ttl"),
        (pb::BeginSessionRequest { lease_ttl: seconds(365 * 24 * 3600), ..Default::default() }, "lease_ttl"),
        (pb::BeginSessionRequest { lease_ttl: malformed, ..Default::default() }, "lease_ttl"),
        (options(pb::SessionOptions { isolation_level: 9, ..Default::default() }), "options.isolation_level"),
        (
            options(pb::SessionOptions { statement_timeout: seconds(0), ..Default::default() }),
            "options.statement_timeout",
        ),
        (
            options(pb::SessionOptions { statement_timeout: seconds(31), ..Default::default() }),
            "options.statement_timeout",
        ),
        (
            options(pb::SessionOptions { transaction_timeout: seconds(61), ..Default::default() }),
            "options.transaction_timeout",
        ),
        (options(pb::SessionOptions { lock_timeout: seconds(i64::MAX), ..Default::default() }), "options.lock_timeout"),
        (labels(17, 5, 1), "labels"),
        (labels(10_000, 5, 1), "labels"),
        (labels(1, 64, 1), "labels"),
        (labels(1, 1, 256), "labels"),
    ] {
        let failure = Failure::from(broker.client().begin_session(request).await.unwrap_err());
        assert_eq!((failure.code, failure.field.as_deref()), (Code::InvalidArgument, Some(field)), "{failure:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_clamped_to_its_bounds_and_told() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    for (asked, granted) in [(None, 30), (seconds(7), 7), (millis(1), 1), (seconds(24 * 3600), 300)] {
        let request = pb::BeginSessionRequest { lease_ttl: asked, ..Default::default() };
        let begun = broker.client().begin_session(request).await.unwrap().into_inner();
        assert_eq!(begun.lease_ttl, seconds(granted));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sql_that_cannot_run_is_refused_before_it_does() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for sql in [
        "",
        " -- nothing\n",
        "/* a /* b */ c */ COMMIT",
        "-- hidden\nROLLBACK",
        ";;BEGIN",
        "SAVEPOINT s",
        "PREPARE TRANSACTION 'x'",
        "COPY accounts FROM STDIN",
        "SELECT 'a\0b'",
    ] {
        refused(&session, session.statement(sql, vec![]), "sql").await;
    }
    let commit = refused(&session, session.statement("commit", vec![]), "sql").await;
    assert!(commit.message.contains("call Commit"), "{commit:?}");
    let long = format!("SELECT '{}'", "x".repeat(5 * 1024 * 1024));
    refused(&session, session.statement(&long, vec![]), "sql").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_statements_in_one_are_refused_by_postgresql_whole() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let failure = session.execute("DELETE FROM accounts; COMMIT").await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "42601"));
    assert_eq!(failure.transaction_state(), TransactionState::Failed);
    session.rollback().await.unwrap();
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_do_not_fit_are_refused_by_their_index() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let two = "SELECT $1::int4, $2::text";
    refused(&session, session.statement(two, vec![int(1)]), "parameters").await;
    refused(&session, session.statement(two, vec![int(1), text("a"), int(3)]), "parameters").await;
    refused(&session, session.statement("SELECT 1", vec![int(1)]), "parameters").await;
    for (kinds, field) in [
        (vec![int(1 << 40), text("a")], "parameters[0].value"),
        (vec![Kind::BoolValue(true), text("a")], "parameters[0].value"),
        (vec![int(1), int(2)], "parameters[1].value"),
        (vec![int(1), text("nul\0")], "parameters[1].value"),
        (vec![int(1), Kind::BytesValue(vec![0xff].into())], "parameters[1].value"),
    ] {
        refused(&session, session.statement(two, kinds), field).await;
    }
    let absent = pb::Parameter::default();
    let kindless = pb::Parameter { value: Some(pb::Value::default()), ..Default::default() };
    let misnamed = typed(int(1), "nosuchtype");
    for (parameter, field) in
        [(absent, "parameters[0].value"), (kindless, "parameters[0].value"), (misnamed, "parameters[0].type")]
    {
        let request = pb::ExecuteRequest { parameters: vec![parameter], ..session.statement("SELECT $1", vec![]) };
        refused(&session, request, field).await;
    }
    let nested = |depth| (0..depth).fold(int(1), |inner, _| list(vec![inner]));
    let bottomless = session.run(session.statement("SELECT $1::int4[]", vec![nested(1000)])).await.unwrap_err();
    assert_eq!(bottomless.code, Code::InvalidArgument);
    for depth in [7, 10] {
        let request = session.statement("SELECT $1::int4[]", vec![nested(depth)]);
        let field = format!("parameters[0].value{}", ".list_value.values[0]".repeat(6));
        let deep = refused(&session, request, &field).await;
        assert!(deep.message.contains("deeper"), "{deep:?}");
    }
    let deepest = session.run(session.statement("SELECT array_ndims($1::int4[]), $1::int4[]", vec![nested(6)])).await;
    assert_eq!(first_row(&deepest.unwrap()), [int(6), nested(6)]);
    let negative = Some(prost_types::Duration { seconds: -1, nanos: 0 });
    for timeout in [seconds(0), negative] {
        let request = pb::ExecuteRequest { timeout, ..session.statement("SELECT 1", vec![]) };
        refused(&session, request, "timeout").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_first_request_begins_no_transaction() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for commit in [false, true] {
        let request = pb::ExecuteRequest { commit, ..session.statement("SELECT $1::int4", vec![]) };
        let failure = session.run(request).await.unwrap_err();
        assert_eq!(failure.field.as_deref(), Some("parameters"));
        assert_eq!(failure.transaction_state(), TransactionState::None);
    }
    session.close().await.unwrap();
    assert_eq!(database.open_transactions(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_postgresql_cannot_read_fails_the_transaction_and_says_why() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let failure = session.run(session.statement("SELECT $1::int4", vec![text("abc")])).await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "22P02"));
    assert_eq!(failure.transaction_state(), TransactionState::Failed);
    session.rollback().await.unwrap();
    session.execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_that_a_type_cannot_hold_without_loss_is_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let bytes = || Kind::BytesValue(vec![0xff].into());
    for (kind, type_name) in [
        (int(32_768), "int2"),
        (int(-32_769), "int2"),
        (int(1 << 31), "int4"),
        (int(-1), "oid"),
        (int(1 << 32), "oid"),
        (int((1 << 24) + 1), "float4"),
        (int((1 << 53) + 1), "float8"),
        (int(1), "bool"),
        (int(1), "text"),
        (int(1), "inet"),
        (int(1), "int4[]"),
        (Kind::DoubleValue(1e39), "float4"),
        (Kind::DoubleValue(1.0), "int4"),
        (Kind::DoubleValue(1.0), "money"),
        (Kind::BoolValue(true), "int4"),
        (Kind::BoolValue(true), "point"),
        (bytes(), "text"),
        (bytes(), "uuid"),
        (text("nul\0"), "text"),
        (text("nul\0"), "inet"),
        (text("nul\0"), "text[]"),
        (list(vec![]), "int4"),
        (list(vec![]), "point"),
        (list(vec![int(1 << 40)]), "int4[]"),
        (list(vec![int(1), Kind::BoolValue(true)]), "int4[]"),
        (list(vec![list(vec![int(1)]), list(vec![Kind::DoubleValue(0.5)])]), "int4[]"),
        (list(vec![text("nul\0")]), "text[]"),
        (list(vec![bytes()]), "inet[]"),
        (list(vec![int(1)]), "int4range[]"),
    ] {
        let sql = format!("SELECT $1::{type_name}, $2::text");
        refused(&session, session.statement(&sql, vec![kind.clone(), null()]), "parameters[0].value").await;
        let swapped = format!("SELECT $1::text, $2::{type_name}");
        refused(&session, session.statement(&swapped, vec![null(), kind]), "parameters[1].value").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_is_no_array_is_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let row = |numbers: &[i64]| list(numbers.iter().copied().map(int).collect());
    for ragged in [
        list(vec![row(&[1, 2]), row(&[3])]),
        list(vec![row(&[1]), row(&[2, 3])]),
        list(vec![row(&[1]), row(&[])]),
        list(vec![list(vec![row(&[1]), row(&[2])]), list(vec![row(&[3])])]),
        // Elements beside rows.
        list(vec![int(1), row(&[2])]),
        list(vec![row(&[1]), int(2)]),
        list(vec![row(&[1]), null()]),
        list(vec![null(), row(&[1])]),
        list(vec![row(&[1]), list(vec![row(&[2])])]),
        // Not a lower bound for each dimension, and one that leaves no room for the last subscript.
        bounded(vec![int(1), int(2)], vec![1, 1]),
        bounded(vec![row(&[1]), row(&[2])], vec![1]),
        bounded(vec![int(1)], vec![i32::MAX]),
        bounded(vec![row(&[1, 2])], vec![1, i32::MAX - 1]),
    ] {
        refused(&session, session.statement("SELECT $1::int4[]", vec![ragged]), "parameters[0].value").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_parameters_as_the_protocol_has_room_for_are_taken_and_no_more() {
    const COUNT_MAX: i64 = 65_535;

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sum = |count: i64| {
        let places: Vec<_> = (1..=count).map(|n| format!("${n}")).collect();
        let sql = format!("SELECT count(*), sum(n) FROM unnest(ARRAY[{}]::int4[]) AS n", places.join(","));
        session.statement(&sql, (1..=count).map(int).collect())
    };
    let all = session.run(sum(COUNT_MAX)).await.unwrap();
    assert_eq!(first_row(&all), [int(COUNT_MAX), int(COUNT_MAX * (COUNT_MAX + 1) / 2)]);
    refused(&session, sum(COUNT_MAX + 1), "parameters").await;
    // Nor in one statement of a batch, of which nothing runs then.
    let update = pb::BatchStatement { sql: "UPDATE accounts SET balance = 7".into(), ..Default::default() };
    let many = parameters(vec![null(); 65_536]);
    let many = pb::BatchStatement { sql: "SELECT 1".into(), parameters: many, ..Default::default() };
    let request = pb::ExecuteBatchRequest { statements: vec![update, many], ..Default::default() };
    let failure = session.execute_batch(request).await.unwrap_err();
    assert_eq!((failure.code, failure.field.as_deref()), (Code::InvalidArgument, Some("statements[1].parameters")));
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "100 100");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_field_far_past_the_limit_is_refused_without_being_held() {
    /// Of fields of 976,562 and 97,656 KiB.
    const GROWTH_KIB_MAX: u64 = 64 * 1024;

    let database = Database::create();
    // A busy machine is slow to make a gigabyte.
    let patient = "[profiles.default]\nstatement_timeout = \"5m\"\ntransaction_timeout = \"10m\"";
    let broker = Program::serve(&database.url(), patient);
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let before = broker.peak_memory();
    // As large as PostgreSQL has them, and then large enough.
    for (format, length) in [(pb::ResultFormat::Values, 1_000_000_000), (pb::ResultFormat::Packed, 100_000_000)] {
        let result_format = format.into();
        let field = &format!("SELECT repeat('x', {length})");
        let request = pb::ExecuteRequest { result_format, ..session.statement(field, vec![]) };
        is_too_large(&session, &session.run(request).await.unwrap_err()).await;
        let request = pb::ExecuteStreamRequest { result_format, ..session.streaming(field, vec![]) };
        is_too_large(&session, &session.stream(request).await.end.unwrap_err()).await;
    }
    let growth = broker.peak_memory() - before;
    assert!(growth < GROWTH_KIB_MAX, "{growth} KiB more");
    assert_eq!(first_row(&session.execute("SELECT 1").await.unwrap()), [int(1)]);
}

/// The call failed for its result's size, and its transaction with it; another can begin.
#[cfg(target_os = "linux")]
async fn is_too_large(session: &Session, failure: &Failure) {
    assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
    assert_eq!(failure.transaction_state(), TransactionState::Failed);
    session.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_request_name_the_field_that_does_not_decode() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    // A byte that no UTF-8 text holds, in field 2, sql, and in the text of a parameter; then a length past the end.
    let bad_parameter = b"\x1a\x05\x0a\x03\x2a\x01\xff".to_vec();
    for (bytes, field) in [
        (b"\x12\x01\xff".to_vec(), Some("sql")),
        (bad_parameter, Some("parameters.value.kind")),
        (b"\x12\x7f".to_vec(), None),
    ] {
        let mut grpc = tonic::client::Grpc::new(broker.channel());
        grpc.ready().await.unwrap();
        let path = PathAndQuery::from_static("/sessionbroker.v1.SessionService/Execute");
        let sent = grpc.unary(tonic::Request::new(bytes), path, RawCodec).await;
        let failure = Failure::from(sent.map(tonic::Response::into_inner).unwrap_err());
        assert_eq!(failure.code, Code::InvalidArgument);
        if field.is_some() {
            assert_eq!(failure.field.as_deref(), field, "{failure:?}");
        }
    }
    assert_eq!(session.execute("SELECT 1").await.unwrap().state.unwrap().transaction_state(), TransactionState::Open);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_past_a_limit_are_refused_and_the_session_goes_on() {
    let database = Database::create();
    let broker =
        Broker::start_with(&database, "", "[profiles.default]\nresult_rows_max = 100\nresult_bytes_max = 4096").await;
    let session = broker.session().await;
    let rows =
        |max_rows| pb::ExecuteRequest { max_rows, ..session.statement("SELECT generate_series(1, 100000000)", vec![]) };
    let wide = session.statement("SELECT repeat('x', 5000)", vec![]);
    for request in [rows(0), rows(5), rows(1_000_000), wide] {
        let failure = session.run(request).await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
        session.rollback().await.unwrap();
    }
    let exact = session.execute("SELECT generate_series(1, 100)").await.unwrap();
    assert_eq!((exact.rows.len(), exact.row_count, exact.command_tag.as_str()), (100, 100, "SELECT 100"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_could_not_see_is_not_committed() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let large = "UPDATE accounts SET balance = 7 RETURNING repeat('x', 5000000)";
    for request in [
        session.statement(large, vec![]),
        pb::ExecuteRequest { max_rows: 1, ..session.statement("UPDATE accounts SET balance = 7 RETURNING id", vec![]) },
    ] {
        let failure = session.run(request.clone()).await.unwrap_err();
        assert_eq!(failure.reason, "RESULT_TOO_LARGE", "{failure:?}");
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
        assert_eq!(session.commit().await.unwrap_err().reason, "COMMIT_ROLLED_BACK");
        let failure = session.run(pb::ExecuteRequest { commit: true, ..request }).await.unwrap_err();
        assert_eq!(failure.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
        assert_eq!(failure.transaction_state(), TransactionState::None);
    }
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_unfolds_is_refused_before_it_fills_the_memory() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // 28 KB on the wire, 262 MB as text.
    let bomb = "SELECT array_agg(10::numeric ^ 131071) FROM generate_series(1, 2000)";
    let failure = session.execute(bomb).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_calls_than_the_queue_holds_are_refused_with_nothing_run() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[profiles.default]\nsession_queue_max = 2").await;
    let session = broker.session().await;
    let lock = database.hold("LOCK TABLE accounts");
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let session = session.clone();
        calls.spawn(async move { session.execute("UPDATE accounts SET balance = balance + 1").await });
    }
    // One runs into the lock, one waits for it; whichever they are, the other three are refused meanwhile.
    for _ in 0..3 {
        let refused = calls.join_next().await.unwrap().unwrap().unwrap_err();
        assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "SESSION_QUEUE_FULL"));
        assert!(refused.retry_info);
    }
    drop(lock);
    while let Some(call) = calls.join_next().await {
        call.unwrap().unwrap();
    }
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "102 102");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_finds_the_queue_full_says_nothing_of_an_earlier_one() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[profiles.default]\nsession_queue_max = 1").await;
    let session = broker.session().await;
    session.execute_and_commit("UPDATE accounts SET balance = 1").await.unwrap();
    let lock = database.hold("LOCK TABLE accounts");
    let running = tokio::spawn({
        let session = session.clone();
        async move { session.execute("UPDATE accounts SET balance = 2").await }
    });
    database.wait_for("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'", "1");
    let refused = session.commit().await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "SESSION_QUEUE_FULL"));
    drop(lock);
    running.await.unwrap().unwrap();
    session.rollback().await.unwrap();
    // Nor does one after a transaction that was rolled back.
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::NothingWritten);
    assert_eq!(database.balances(), "1 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_refuses_within_its_timeout_and_recovers() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0\npool_timeout = \"1s\"", "").await;
    let (holder, waiter) = (broker.session().await, broker.session().await);
    holder.execute("SELECT 1").await.unwrap();
    let refused = waiter.execute("SELECT 1").await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "POOL_EXHAUSTED"));
    assert_eq!(refused.transaction_state(), TransactionState::None);
    assert!(refused.retry_info);
    holder.commit().await.unwrap();
    waiter.run(waiter.statement("SELECT 1", vec![])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_past_the_maximum_are_refused_until_one_ends() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[limits]\nsessions_max = 1").await;
    let only = broker.session().await;
    let refused = Failure::from(broker.client().begin_session(pb::BeginSessionRequest::default()).await.unwrap_err());
    assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "SESSIONS_EXHAUSTED"));
    only.close().await.unwrap();
    broker.session().await;
}

/// Sends bytes as they are.
#[derive(Default)]
struct RawCodec;

impl tonic::codec::Codec for RawCodec {
    type Encode = Vec<u8>;
    type Decode = pb::ExecuteResponse;
    type Encoder = RawEncoder;
    type Decoder = ResponseDecoder;

    fn encoder(&mut self) -> RawEncoder {
        RawEncoder
    }

    fn decoder(&mut self) -> ResponseDecoder {
        ResponseDecoder
    }
}

struct RawEncoder;

impl tonic::codec::Encoder for RawEncoder {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn encode(&mut self, item: Vec<u8>, buf: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(buf, &item);
        Ok(())
    }
}

struct ResponseDecoder;

impl tonic::codec::Decoder for ResponseDecoder {
    type Item = pb::ExecuteResponse;
    type Error = tonic::Status;

    fn decode(&mut self, buf: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<pb::ExecuteResponse>, tonic::Status> {
        pb::ExecuteResponse::decode(buf).map(Some).map_err(|error| tonic::Status::internal(error.to_string()))
    }
}
