//! ExecuteBatch: many statements in one call, each with its result, all within the limits of one Execute.

use session_broker::grpc::pb;
use tonic::Code;

use crate::support::{Broker, Database, Failure, Session, int, millis, seconds, text};
use pb::value::Kind;
use pb::{Outcome, TransactionState};

/// How many backends are in pg_sleep(); wait until one is to act in the middle of a call.
pub(crate) const SLEEPING: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";

#[tokio::test(flavor = "multi_thread")]
async fn every_result_is_as_executes_and_in_its_place() {
    const STATEMENTS: [&str; 6] = [
        "INSERT INTO accounts VALUES (3, 5), (4, 6.50)",
        "UPDATE accounts SET balance = balance + 1 WHERE id > 2",
        "SELECT id, balance FROM accounts ORDER BY id",
        "SELECT 1 AS one, NULL::text AS nothing WHERE false",
        "DELETE FROM accounts WHERE id = 4 RETURNING id",
        "CREATE TABLE made (id int)",
    ];
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let answer = session.execute_batch(batch(STATEMENTS.map(one).into())).await.unwrap();
    assert_eq!((answer.results.len(), answer.commit), (STATEMENTS.len(), None));
    assert_eq!(answer.state.unwrap().transaction_state(), TransactionState::Open);
    session.rollback().await.unwrap();
    for (sql, batched) in STATEMENTS.iter().zip(&answer.results) {
        let alone = session.execute(sql).await.unwrap();
        assert_eq!((&batched.columns, &batched.rows), (&alone.columns, &alone.rows), "{sql}");
        assert_eq!((batched.row_count, &batched.command_tag), (alone.row_count, &alone.command_tag), "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_types_up_mixes_no_tags_up() {
    let database = Database::create();
    database.psql("CREATE TYPE mood AS ENUM ('sad'); CREATE TABLE moods (mood mood); GRANT ALL ON moods TO broker");
    let broker = Broker::start(&database).await;
    let insert = "INSERT INTO moods VALUES ($1)";
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let alone = session.run(session.statement(insert, vec![text("sad")])).await.unwrap();
    assert_eq!(alone.command_tag, "INSERT 0 1");
    // Another connection, which has not seen the type.
    let other = broker.session().await;
    let statements = vec![one("SELECT 1"), with(insert, vec![text("sad")]), one("DELETE FROM accounts WHERE false")];
    let batched = other.execute_batch(batch(statements)).await.unwrap();
    let tags: Vec<_> = batched.results.iter().map(|result| result.command_tag.as_str()).collect();
    assert_eq!(tags, ["SELECT 1", "INSERT 0 1", "DELETE 0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_to_fail_is_blamed_also_before_one_that_cannot_be_sent() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let insert = sets("INSERT INTO accounts VALUES ($1, 1)", [vec![int(1)], vec![Kind::BoolValue(true)]]);
    let failure = session.execute_batch(batch(vec![insert])).await.unwrap_err();
    assert_eq!((failure.code, place(&failure)), (Code::AlreadyExists, (Some("0"), Some("0"))), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_goes_on_with_the_open_transaction_and_can_commit_it() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 50 WHERE id = 1").await.unwrap();
    let credit = with("UPDATE accounts SET balance = balance + $1 WHERE id = $2", vec![text("12.50"), int(2)]);
    let request = pb::ExecuteBatchRequest { commit: true, ..batch(vec![one("SELECT 1"), credit]) };
    let answer = session.execute_batch(request).await.unwrap();
    let commit = answer.commit.unwrap();
    assert_eq!((commit.outcome(), &commit.state), (Outcome::Committed, &None));
    assert_eq!(answer.state.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "50 112.50");
    assert_eq!(session.commit().await.unwrap().transaction_id, commit.transaction_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_in_a_failed_transaction_runs_nothing() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT 1 / 0").await.unwrap_err();
    let failure = session.execute_batch(batch(vec![one("SELECT 1"), one("SELECT 2")])).await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "25P02"));
    assert_eq!(failure.metadata["statement_index"], "0");
    assert_eq!(failure.transaction_state(), TransactionState::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_finds_what_the_ones_before_it_made() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let statements = vec![
        one("CREATE TABLE made (id int)"),
        with("INSERT INTO made VALUES ($1)", vec![int(1)]),
        one("ALTER TABLE made ADD COLUMN note text"),
        sets("INSERT INTO made VALUES ($1, $2)", [2, 3].map(|id| vec![int(id), text("new")])),
        one("SELECT id, note FROM made ORDER BY id"),
    ];
    let answer = session.execute_batch(pb::ExecuteBatchRequest { commit: true, ..batch(statements) }).await.unwrap();
    let null = Kind::NullValue(0);
    let expected = [[int(1), null], [int(2), text("new")], [int(3), text("new")]];
    assert_eq!(kinds(&answer.results[5]), expected);
    assert_eq!(database.psql("SELECT count(*) FROM made"), "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_runs_once_with_each_set_of_parameters() {
    let database = Database::create();
    database.psql("CREATE TABLE numbers (n int, note text); ALTER TABLE numbers OWNER TO broker");
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let numbers = (0..1000).map(|n| vec![int(n), text("some")]);
    let statements = vec![
        one("SELECT 'before'"),
        sets("INSERT INTO numbers VALUES ($1, $2) RETURNING n", numbers),
        one("SELECT count(*) FROM numbers"),
    ];
    let answer = session.execute_batch(batch(statements)).await.unwrap();
    assert_eq!(answer.results.len(), 1002);
    for (n, result) in (0..).zip(&answer.results[1..1001]) {
        assert_eq!((kinds(result), result.command_tag.as_str()), (vec![vec![int(n)]], "INSERT 0 1"));
    }
    assert_eq!(kinds(&answer.results[1001]), [[int(1000)]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_stops_at_the_first_error_and_says_where() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    make_sequence(&database, "before");
    make_sequence(&database, "after");
    let failure = session.execute_batch(batch(failing())).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::AlreadyExists, "DATABASE_ERROR"));
    assert_eq!(failure.pg_error.as_ref().unwrap().constraint, "accounts_pkey");
    assert_eq!(place(&failure), (Some("2"), Some("1")));
    assert_eq!((failure.transaction_state(), failure.commit), (TransactionState::Failed, None));
    assert_eq!((was_drawn(&database, "before"), was_drawn(&database, "after")), (true, false));
    session.rollback().await.unwrap();
    session.execute("SELECT 1").await.unwrap();
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_batch_fails_where_its_first_error_is() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // The second time, all are prepared.
    for _ in 0..2 {
        for failing in [0, 1, 31, 32, 33, 64, 98, 199] {
            let fine = "UPDATE accounts SET balance = balance + 1 WHERE id = 1";
            let mut statements: Vec<_> = (0..200).map(|_| one(fine)).collect();
            statements[failing] = one("SELECT 1 / (balance - balance) FROM accounts");
            let failure = session.execute_batch(batch(statements)).await.unwrap_err();
            assert_eq!(place(&failure), (Some(failing.to_string().as_str()), None));
            assert_eq!(failure.transaction_state(), TransactionState::Failed);
            session.rollback().await.unwrap();
        }
        let much = (0..200).map(|_| one("SELECT repeat('x', 1000000)")).collect();
        let failure = session.execute_batch(batch(much)).await.unwrap_err();
        assert_eq!(
            (failure.reason.as_str(), failure.transaction_state()),
            ("RESULT_TOO_LARGE", TransactionState::Failed)
        );
        session.rollback().await.unwrap();
    }
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_a_statement_without_sets_names_none() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (sql, code) in [("SELECT 1 / 0", "22012"), ("SELECT nonsense", "42703"), ("SELEKT", "42601")] {
        let failure = session.execute_batch(batch(vec![one("SELECT 1"), one(sql)])).await.unwrap_err();
        assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::InvalidArgument, code));
        assert_eq!(place(&failure), (Some("1"), None));
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
        session.rollback().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_was_to_commit_rolls_back_when_a_statement_fails() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    make_sequence(&database, "before");
    make_sequence(&database, "after");
    session.execute("UPDATE accounts SET balance = 1").await.unwrap();
    let request = pb::ExecuteBatchRequest { commit: true, ..batch(failing()) };
    let failure = session.execute_batch(request).await.unwrap_err();
    assert_eq!((failure.code, place(&failure)), (Code::AlreadyExists, (Some("2"), Some("1"))));
    assert_eq!(failure.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
    assert_eq!(failure.transaction_state(), TransactionState::None);
    assert!(!was_drawn(&database, "after"));
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_batch_is_refused_whole_before_anything_runs() {
    let database = Database::create();
    make_sequence(&database, "ran");
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let draw = one("SELECT nextval('ran')");
    let many = |count| sets("SELECT nextval('ran'), $1::int4", (0..count).map(|n| vec![int(n)]));
    let kindless = pb::Parameter { value: Some(pb::Value::default()), ..Default::default() };
    let mut second_set = many(3);
    second_set.parameter_sets[1].parameters = vec![kindless.clone()];
    let plain = pb::BatchStatement { parameters: vec![kindless], ..one("SELECT $1") };
    for (statements, field) in [
        (vec![], "statements"),
        (vec![draw.clone(); 10_001], "statements"),
        (vec![many(10_001)], "statements"),
        (vec![draw.clone(), many(10_000)], "statements"),
        (vec![draw.clone(), one("COMMIT")], "statements[1].sql"),
        (vec![draw.clone(), one("/* hidden */ SAVEPOINT s")], "statements[1].sql"),
        (vec![draw.clone(), draw.clone(), one("COPY accounts TO STDOUT")], "statements[2].sql"),
        (vec![draw.clone(), one(" -- nothing")], "statements[1].sql"),
        (vec![draw.clone(), plain], "statements[1].parameters[0].value"),
        (vec![draw.clone(), draw.clone(), second_set], "statements[2].parameter_sets[1].parameters[0].value"),
    ] {
        let failure = refused(&session, batch(statements)).await;
        assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
    }
    let both = pb::BatchStatement { parameters: parameters(vec![int(1)]), ..many(2) };
    let failure = refused(&session, batch(vec![draw.clone(), both])).await;
    assert!(failure.field.as_ref().unwrap().starts_with("statements[1].parameter"), "{failure:?}");
    for timeout in [millis(0), Some(prost_types::Duration { seconds: -1, nanos: 0 })] {
        let failure = refused(&session, pb::ExecuteBatchRequest { timeout, ..batch(vec![draw.clone()]) }).await;
        assert_eq!(failure.field.as_deref(), Some("timeout"));
    }
    assert!(!was_drawn(&database, "ran"));
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_do_not_fit_their_statement_are_found_where_they_are() {
    let database = Database::create();
    make_sequence(&database, "after");
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "UPDATE accounts SET balance = 7 WHERE id = $1";
    for commit in [false, true] {
        for (bad, field, set) in [
            (with(sql, vec![int(1), int(2)]), "statements[1].parameters", None),
            (with(sql, vec![Kind::BoolValue(true)]), "statements[1].parameters[0].value", None),
            (sets(sql, [vec![int(1)], vec![]]), "statements[1].parameter_sets[1].parameters", Some("1")),
            (
                sets(sql, [vec![int(1)], vec![int(1 << 40)]]),
                "statements[1].parameter_sets[1].parameters[0].value",
                Some("1"),
            ),
        ] {
            let statements = vec![with(sql, vec![int(2)]), bad, one("SELECT nextval('after')")];
            let request = pb::ExecuteBatchRequest { commit, ..batch(statements) };
            let failure = session.execute_batch(request).await.unwrap_err();
            assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"));
            assert_eq!((failure.field.as_deref(), place(&failure)), (Some(field), (Some("1"), set)), "{failure:?}");
            // A statement had run before it: half of a batch cannot be committed.
            let state = if commit { TransactionState::None } else { TransactionState::Failed };
            assert_eq!(failure.transaction_state(), state);
            session.rollback().await.unwrap();
            assert_eq!((database.balances().as_str(), was_drawn(&database, "after")), ("100 100", false));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn results_without_rows_have_their_size_too() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[profiles.default]\nresult_bytes_max = 4096").await;
    let session = broker.session().await;
    let empty = sets("SELECT * FROM accounts WHERE id = $1", vec![vec![int(0)]; 100]);
    let failure =
        session.execute_batch(pb::ExecuteBatchRequest { commit: true, ..batch(vec![empty]) }).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
    assert_eq!(failure.commit.unwrap().outcome(), Outcome::RolledBack);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limits_on_results_are_for_all_of_them_together() {
    let database = Database::create();
    let broker =
        Broker::start_with(&database, "", "[profiles.default]\nresult_rows_max = 100\nresult_bytes_max = 4096").await;
    let session = broker.session().await;
    let rows = |count: u32| one(&format!("SELECT generate_series(1, {count})"));
    let wide = one("SELECT repeat('x', 3000)");
    for request in [
        batch(vec![rows(60), rows(60)]),
        pb::ExecuteBatchRequest { max_rows: 5, ..batch(vec![rows(3), rows(3)]) },
        batch(vec![wide.clone(), wide]),
    ] {
        let failure = session.execute_batch(request).await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
        assert_eq!(place(&failure), (Some("1"), None));
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
        assert_eq!(session.commit().await.unwrap_err().reason, "COMMIT_ROLLED_BACK");
    }
    // One that never gets into memory is its own run's too, although others are on their way with it.
    let one_large = sets("SELECT repeat('x', $1::int4)", [1, 1, 1, 1, 1, 100_000, 1, 1].map(|n| vec![int(n)]));
    let failure = session.execute_batch(batch(vec![one_large])).await.unwrap_err();
    assert_eq!((failure.reason.as_str(), place(&failure)), ("RESULT_TOO_LARGE", (Some("0"), Some("5"))));
    session.rollback().await.unwrap();
    let exact = session.execute_batch(batch(vec![rows(60), rows(40)])).await.unwrap();
    assert_eq!((exact.results[0].row_count, exact.results[1].row_count), (60, 40));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_batch_could_not_return_is_not_committed() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let statements = vec![one("UPDATE accounts SET balance = 7 RETURNING id"), one("UPDATE accounts SET balance = 8")];
    let request = pb::ExecuteBatchRequest { max_rows: 1, commit: true, ..batch(statements) };
    let failure = session.execute_batch(request).await.unwrap_err();
    assert_eq!((failure.reason.as_str(), place(&failure)), ("RESULT_TOO_LARGE", (Some("0"), None)));
    assert_eq!(failure.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
    assert_eq!(failure.transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_limit_is_for_all_statements_together() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let naps = sets("SELECT pg_sleep($1)", (0..10).map(|_| vec![Kind::DoubleValue(0.4)]));
    let request = pb::ExecuteBatchRequest { timeout: seconds(1), ..batch(vec![naps]) };
    let failure = session.execute_batch(request).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
    assert_eq!((failure.metadata["bound"].as_str(), place(&failure).0), ("timeout", Some("0")));
    assert_eq!(failure.transaction_state(), TransactionState::Failed);
    assert_eq!(session.rollback().await.unwrap().transaction_state(), TransactionState::None);
    session.execute_and_commit("UPDATE accounts SET balance = 7").await.unwrap();
    assert_eq!(database.balances(), "7 7");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_in_mid_batch_has_nothing_committed() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for commit in [true, false] {
        let update = one("UPDATE accounts SET balance = 7");
        let statements = vec![update.clone(), one("SELECT pg_sleep(60)"), update];
        let request = pb::ExecuteBatchRequest { commit, ..batch(statements) };
        let leaving = tokio::spawn({
            let session = session.clone();
            async move { session.execute_batch(request).await }
        });
        database.wait_for(SLEEPING, "1");
        leaving.abort();
        database.wait_for(SLEEPING, "0");
        // Waits for what is left of the batch.
        session.rollback().await.unwrap();
        assert_eq!(database.balances(), "100 100");
        session.execute("SELECT 1").await.unwrap();
        session.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_runs_go_in_one_batch() {
    let database = Database::create();
    database.psql("CREATE TABLE numbers (n int); ALTER TABLE numbers OWNER TO broker");
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "INSERT INTO numbers VALUES ($1)";
    let mut statements: Vec<_> = (0..5000).map(|n| with(sql, vec![int(n)])).collect();
    statements.push(sets(sql, (5000..10_000).map(|n| vec![int(n)])));
    let answer = session.execute_batch(pb::ExecuteBatchRequest { commit: true, ..batch(statements) }).await.unwrap();
    assert_eq!(answer.results.len(), 10_000);
    assert!(answer.results.iter().all(|result| result.command_tag == "INSERT 0 1"));
    assert_eq!(database.psql("SELECT count(DISTINCT n) FROM numbers"), "10000");
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_arrive_in_order_and_a_hundred_at_most() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let loud = |sql: &str| one(&format!("DO $$ BEGIN {sql}; END $$"));
    let statements = vec![loud("RAISE NOTICE 'one'"), one("SELECT 1"), loud("RAISE WARNING 'two'")];
    let answer = session.execute_batch(batch(statements)).await.unwrap();
    let raised: Vec<_> = notices(&answer).map(|notice| (notice.severity.as_str(), notice.message.as_str())).collect();
    assert_eq!(raised, [("NOTICE", "one"), ("WARNING", "two")]);
    let flood = loud("FOR n IN 1..80 LOOP RAISE NOTICE '%', n; END LOOP");
    let flooded = session.execute_batch(batch(vec![flood.clone(), flood])).await.unwrap();
    assert_eq!(notices(&flooded).count(), 100);
    let quiet = session.execute_batch(batch(vec![one("SELECT 1")])).await.unwrap();
    assert_eq!(notices(&quiet).count(), 0);
}

/// A batch of these.
pub(crate) fn batch(statements: Vec<pb::BatchStatement>) -> pb::ExecuteBatchRequest {
    pb::ExecuteBatchRequest { statements, ..Default::default() }
}

/// A statement without parameters.
pub(crate) fn one(sql: &str) -> pb::BatchStatement {
    with(sql, Vec::new())
}

fn with(sql: &str, kinds: Vec<Kind>) -> pb::BatchStatement {
    pb::BatchStatement { sql: sql.into(), parameters: parameters(kinds), parameter_sets: Vec::new() }
}

fn sets(sql: &str, sets: impl IntoIterator<Item = Vec<Kind>>) -> pb::BatchStatement {
    let parameter_sets = sets.into_iter().map(|kinds| pb::ParameterSet { parameters: parameters(kinds) }).collect();
    pb::BatchStatement { sql: sql.into(), parameters: Vec::new(), parameter_sets }
}

pub(crate) fn parameters(kinds: Vec<Kind>) -> Vec<pb::Parameter> {
    let parameter = |kind| pb::Parameter { value: Some(pb::Value { kind: Some(kind) }), r#type: String::new() };
    kinds.into_iter().map(parameter).collect()
}

/// The kinds of a result, row by row.
pub(crate) fn kinds(result: &pb::StatementResult) -> Vec<Vec<Kind>> {
    let row = |row: &pb::Row| -> Vec<Kind> { row.values.iter().map(|value| value.kind.clone().unwrap()).collect() };
    result.rows.iter().map(row).collect()
}

fn notices(answer: &pb::ExecuteBatchResponse) -> impl Iterator<Item = &pb::PgError> {
    answer.results.iter().flat_map(|result| &result.notices)
}

/// Where a failure says it happened: the statement's index, and the set's.
pub(crate) fn place(failure: &Failure) -> (Option<&str>, Option<&str>) {
    let index = |name: &str| failure.metadata.get(name).map(String::as_str);
    (index("statement_index"), index("parameter_set_index"))
}

/// Fails in its third statement, with the second set. The sequences tell what ran, whatever is rolled back.
fn failing() -> Vec<pb::BatchStatement> {
    vec![
        one("SELECT nextval('before')"),
        one("UPDATE accounts SET balance = 7"),
        sets("INSERT INTO accounts VALUES ($1, 1)", [3, 1, 4].map(|id| vec![int(id)])),
        one("SELECT nextval('after')"),
    ]
}

fn make_sequence(database: &Database, name: &str) {
    database.psql(&format!("CREATE SEQUENCE {name}; ALTER SEQUENCE {name} OWNER TO broker"));
}

fn was_drawn(database: &Database, sequence: &str) -> bool {
    database.psql(&format!("SELECT is_called FROM {sequence}")) == "t"
}

/// A bad batch changes nothing: the open transaction stands.
async fn refused(session: &Session, request: pb::ExecuteBatchRequest) -> Failure {
    session.execute("SELECT 1").await.unwrap();
    let failure = session.execute_batch(request).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
    assert_eq!(failure.transaction_state(), TransactionState::Open, "{failure:?}");
    session.execute("SELECT 1").await.unwrap();
    failure
}
