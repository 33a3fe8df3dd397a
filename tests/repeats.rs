//! Calls that are safe to repeat: numbered statements, and sessions begun with a request id.

use session_broker::grpc::pb;
use tonic::Code;

use crate::batches::{batch, kinds, one, place};
use crate::support::{Broker, Database, Failure, Session, first_row, int, seconds, text};
use pb::{Outcome, TransactionState};

const DRAW: &str = "SELECT nextval('counter')";

#[tokio::test(flavor = "multi_thread")]
async fn the_last_number_again_gives_its_answer_and_runs_nothing() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for seq in 1..4_u8 {
        let first = session.run(numbered(&session, seq.into(), DRAW)).await.unwrap();
        assert_eq!(first_row(&first), [int(seq.into())]);
        for _ in 0..2 {
            let again = session.run(numbered(&session, seq.into(), DRAW)).await.unwrap();
            assert_eq!(stateless(again), stateless(first.clone()));
        }
    }
    let insert = "INSERT INTO accounts VALUES (3, 5) RETURNING id";
    let first = session.run(numbered(&session, 4, insert)).await.unwrap();
    assert_eq!(stateless(session.run(numbered(&session, 4, insert)).await.unwrap()), stateless(first));
    session.commit().await.unwrap();
    assert_eq!((drawn(&database).as_str(), database.balances().as_str()), ("3", "100 100 5"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_repeated_wherever_the_session_stands() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let first = stateless(session.run(numbered(&session, 1, DRAW)).await.unwrap());
    session.execute("SELECT 1 / 0").await.unwrap_err();
    assert_eq!(stateless(session.run(numbered(&session, 1, DRAW)).await.unwrap()), first);
    assert_eq!(standing(&session).await, TransactionState::Failed);
    session.rollback().await.unwrap();
    assert_eq!(stateless(session.run(numbered(&session, 1, DRAW)).await.unwrap()), first);
    assert_eq!(standing(&session).await, TransactionState::None);
    assert_eq!(drawn(&database), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failures_number_gives_the_failure_again() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let failing = || numbered(&session, 1, "SELECT 1 / (nextval('counter') - 1)");
    for _ in 0..2 {
        // Run again, it would hear that the transaction has failed.
        let failure = session.run(failing()).await.unwrap_err();
        assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "22012"));
    }
    session.rollback().await.unwrap();
    assert_eq!(session.run(failing()).await.unwrap_err().metadata["sqlstate"], "22012");
    assert_eq!((standing(&session).await, drawn(&database).as_str()), (TransactionState::None, "1"));
    session.run(numbered(&session, 2, DRAW)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_execute_that_committed_gives_rows_and_outcome_again() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let committing = |seq, sql| pb::ExecuteRequest { commit: true, ..numbered(&session, seq, sql) };
    let insert = "INSERT INTO accounts VALUES (3, 5) RETURNING id";
    let first = stateless(session.run(committing(1, insert)).await.unwrap());
    assert_eq!(first.commit.as_ref().unwrap().outcome(), Outcome::Committed);
    assert_eq!(stateless(session.run(committing(1, insert)).await.unwrap()), first);
    for _ in 0..2 {
        let failure = session.run(committing(2, insert)).await.unwrap_err();
        assert_eq!(failure.code, Code::AlreadyExists);
        assert_eq!(failure.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
    }
    assert_eq!(database.balances(), "100 100 5");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_skips_one_is_refused_with_the_one_expected() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (next, skipping) in [(1_u64, [2, 3, u64::MAX]), (2, [3, 4, u64::MAX])] {
        for seq in skipping {
            let failure = session.run(numbered(&session, seq, DRAW)).await.unwrap_err();
            assert_eq!((failure.code, failure.reason.as_str()), (Code::FailedPrecondition, "SEQ_GAP"));
            assert_eq!(failure.metadata["expected"], next.to_string());
        }
        assert_eq!(drawn(&database), (next - 1).to_string());
        session.run(numbered(&session, next, DRAW)).await.unwrap();
    }
    assert_eq!(standing(&session).await, TransactionState::Open);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_numbers_answer_is_gone() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for seq in 1..4 {
        session.run(numbered(&session, seq, DRAW)).await.unwrap();
    }
    for seq in 1..3 {
        answer_gone(&session.run(numbered(&session, seq, DRAW)).await.unwrap_err());
    }
    assert_eq!((standing(&session).await, drawn(&database).as_str()), (TransactionState::Open, "3"));
    session.run(numbered(&session, 4, DRAW)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_used_with_a_different_request_is_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "UPDATE accounts SET balance = balance + $1";
    let request = |amount| pb::ExecuteRequest { seq: 1, ..session.statement(sql, vec![text(amount)]) };
    let first = stateless(session.run(request("1")).await.unwrap());
    for different in
        [numbered(&session, 1, "SELECT 1"), request("2"), pb::ExecuteRequest { commit: true, ..request("1") }]
    {
        refused(&session.run(different).await.unwrap_err(), "seq");
    }
    refused(&session.execute_batch(numbered_batch(1, &["SELECT 1"])).await.unwrap_err(), "seq");
    assert_eq!(stateless(session.run(request("1")).await.unwrap()), first);
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "101 101");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_ran_nothing_does_not_use_up_its_number() {
    let database = database_with_counter();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0\npool_timeout = \"1s\"", "").await;
    let (session, other) = (broker.session().await, broker.session().await);
    for seq in 1..3 {
        let options = Some(pb::TransactionOptions { isolation_level: 9, ..Default::default() });
        for bad in [
            numbered(&session, seq, ""),
            numbered(&session, seq, "COMMIT"),
            numbered(&session, seq, "SELECT nextval('counter') + $1::int8"),
            pb::ExecuteRequest { timeout: seconds(0), ..numbered(&session, seq, DRAW) },
            pb::ExecuteRequest { transaction_options: options, ..numbered(&session, seq, DRAW) },
        ] {
            let failure = session.run(bad).await.unwrap_err();
            assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"));
        }
        let failure = session.execute_batch(numbered_batch(seq, &[])).await.unwrap_err();
        assert_eq!(failure.field.as_deref(), Some("statements"));
        other.execute("SELECT 1").await.unwrap();
        let failure = session.run(numbered(&session, seq, DRAW)).await.unwrap_err();
        assert_eq!(failure.reason, "POOL_EXHAUSTED");
        other.commit().await.unwrap();
        session.run(numbered(&session, seq, DRAW)).await.unwrap();
        session.commit().await.unwrap();
        assert_eq!(drawn(&database), seq.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_above_64_kib_is_not_kept_and_its_statement_runs_once() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let returning =
        |id: u32, bytes: u32| format!("INSERT INTO accounts VALUES ({id}, 5) RETURNING repeat('x', {bytes})");
    let small = returning(3, 60_000);
    let first = stateless(session.run(numbered(&session, 1, &small)).await.unwrap());
    assert_eq!(stateless(session.run(numbered(&session, 1, &small)).await.unwrap()), first);
    let large = returning(4, 70_000);
    session.run(numbered(&session, 2, &large)).await.unwrap();
    for _ in 0..2 {
        answer_gone(&session.run(numbered(&session, 2, &large)).await.unwrap_err());
    }
    assert_eq!(standing(&session).await, TransactionState::Open);
    session.run(numbered(&session, 3, "SELECT 1")).await.unwrap();
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "100 100 5 5");
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_count_with_the_statements() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.run(numbered(&session, 1, DRAW)).await.unwrap();
    let first = session.execute_batch(numbered_batch(2, &[DRAW, DRAW])).await.unwrap();
    let again = session.execute_batch(numbered_batch(2, &[DRAW, DRAW])).await.unwrap();
    assert_eq!(first.results, again.results);
    assert_eq!(kinds(&again.results[1]), [[int(3)]]);
    refused(&session.run(numbered(&session, 2, DRAW)).await.unwrap_err(), "seq");
    refused(&session.execute_batch(numbered_batch(2, &[DRAW])).await.unwrap_err(), "seq");
    answer_gone(&session.run(numbered(&session, 1, DRAW)).await.unwrap_err());
    let gap = session.execute_batch(numbered_batch(4, &[DRAW])).await.unwrap_err();
    assert_eq!((gap.reason.as_str(), gap.metadata["expected"].as_str()), ("SEQ_GAP", "3"));
    for _ in 0..2 {
        let failure = session.execute_batch(numbered_batch(3, &[DRAW, "SELECT 1 / 0"])).await.unwrap_err();
        assert_eq!((place(&failure).0, failure.metadata["sqlstate"].as_str()), (Some("1"), "22012"));
    }
    session.rollback().await.unwrap();
    session.run(numbered(&session, 4, DRAW)).await.unwrap();
    assert_eq!(drawn(&database), "5");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_committed_gives_its_outcome_again() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let update = "UPDATE accounts SET balance = balance + 1";
    let request = pb::ExecuteBatchRequest { commit: true, ..numbered_batch(1, &[update, update]) };
    let first = session.execute_batch(request.clone()).await.unwrap();
    let again = session.execute_batch(request).await.unwrap();
    assert_eq!((&first.results, &first.commit), (&again.results, &again.commit));
    assert_eq!(again.commit.unwrap().outcome(), Outcome::Committed);
    assert_eq!(database.balances(), "102 102");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_of_a_running_call_waits_for_its_answer() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let request = numbered(&session, 1, "SELECT nextval('counter'), pg_sleep(0.3)::text");
    let (one, other) = tokio::join!(session.run(request.clone()), session.run(request));
    assert_eq!(stateless(one.unwrap()), stateless(other.unwrap()));
    assert_eq!(drawn(&database), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_without_a_number_do_not_count() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute(DRAW).await.unwrap();
    session.run(numbered(&session, 1, DRAW)).await.unwrap();
    session.execute(DRAW).await.unwrap();
    session.execute_batch(batch(vec![one(DRAW)])).await.unwrap();
    let again = session.run(numbered(&session, 1, DRAW)).await.unwrap();
    assert_eq!(first_row(&again), [int(2)]);
    let next = session.run(numbered(&session, 2, DRAW)).await.unwrap();
    assert_eq!(first_row(&next), [int(5)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_count_each_for_itself() {
    let database = database_with_counter();
    let broker = Broker::start(&database).await;
    let (first, second) = (broker.session().await, broker.session().await);
    assert_eq!(first_row(&first.run(numbered(&first, 1, DRAW)).await.unwrap()), [int(1)]);
    assert_eq!(first_row(&second.run(numbered(&second, 1, DRAW)).await.unwrap()), [int(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_gives_the_same_session_again() {
    let database = Database::create();
    // There is room for no other.
    let broker = Broker::start_with(&database, "", "[limits]\nsessions_max = 1").await;
    let request = pb::BeginSessionRequest { lease_ttl: seconds(10), ..begin("first") };
    let session = broker.session_with(request.clone()).await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    let again = broker.session_with(request).await;
    assert_eq!((&again.token, &again.id), (&session.token, &session.id));
    again.commit().await.unwrap();
    assert_eq!(database.balances(), "7 7");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_the_same_in_whatever_order_its_maps_travel() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let request = || {
        let labels = (0..16).map(|n| (format!("label {n}"), "value".into())).collect();
        pb::BeginSessionRequest { labels, ..begin("first") }
    };
    let session = broker.session_with(request()).await;
    for _ in 0..5 {
        assert_eq!(broker.session_with(request()).await.id, session.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_begins_with_one_request_id_at_once_give_one_session() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[limits]\nsessions_max = 1").await;
    let (one, other) = tokio::join!(broker.session_with(begin("first")), broker.session_with(begin("first")));
    assert_eq!((one.token, one.id), (other.token, other.id));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_request_ids_and_none_give_other_sessions() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let longest = "x".repeat(128);
    let mut ids = Vec::new();
    for request_id in ["first", "First", "second", &longest, "", ""] {
        ids.push(broker.session_with(begin(request_id)).await.id);
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_used_with_a_different_request_is_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session_with(begin("first")).await;
    let options = pb::SessionOptions { read_only: true, ..Default::default() };
    for different in [
        pb::BeginSessionRequest { lease_ttl: seconds(10), ..begin("first") },
        pb::BeginSessionRequest { options: Some(options), ..begin("first") },
        pb::BeginSessionRequest { labels: [("a".into(), "b".into())].into(), ..begin("first") },
    ] {
        refused(&begin_failure(&broker, different).await, "request_id");
    }
    session.execute("SELECT 1").await.unwrap();
    for request_id in ["nul\0", &"x".repeat(129)] {
        refused(&begin_failure(&broker, begin(request_id)).await, "request_id");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_of_a_session_that_has_ended_says_so() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session_with(begin("first")).await;
    session.close().await.unwrap();
    assert_eq!(begin_failure(&broker, begin("first")).await.end_reason(), "END_REASON_CLOSED");
    broker.session_with(begin("second")).await.execute("SELECT 1").await.unwrap();
}

fn numbered(session: &Session, seq: u64, sql: &str) -> pb::ExecuteRequest {
    pb::ExecuteRequest { seq, ..session.statement(sql, Vec::new()) }
}

fn numbered_batch(seq: u64, statements: &[&str]) -> pb::ExecuteBatchRequest {
    pb::ExecuteBatchRequest { seq, ..batch(statements.iter().map(|sql| one(sql)).collect()) }
}

/// What of an answer is the same when it is given again.
fn stateless(answer: pb::ExecuteResponse) -> pb::ExecuteResponse {
    pb::ExecuteResponse { state: None, ..answer }
}

fn begin(request_id: &str) -> pb::BeginSessionRequest {
    pb::BeginSessionRequest { request_id: request_id.into(), ..Default::default() }
}

async fn begin_failure(broker: &Broker, request: pb::BeginSessionRequest) -> Failure {
    Failure::from(broker.client().begin_session(request).await.unwrap_err())
}

/// A sequence tells how often a statement ran, whatever is rolled back.
fn database_with_counter() -> Database {
    let database = Database::create();
    database.psql("CREATE SEQUENCE counter; ALTER SEQUENCE counter OWNER TO broker");
    database
}

fn drawn(database: &Database) -> String {
    database.psql("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM counter")
}

async fn standing(session: &Session) -> TransactionState {
    session.get().await.unwrap().state.unwrap().transaction_state()
}

fn refused(failure: &Failure, field: &str) {
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
    assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
}

fn answer_gone(failure: &Failure) {
    assert_eq!((failure.code, failure.reason.as_str()), (Code::FailedPrecondition, "SEQ_ANSWER_GONE"), "{failure:?}");
}
