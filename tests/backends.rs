//! What PostgreSQL sees: state that must not cross sessions, backends that die, statements that are stopped.

use std::time::Duration;

use session_broker::grpc::pb;
use tonic::Code;

use crate::support::{Broker, Database, Failure, first_row, int, millis, seconds, text};
use pb::TransactionState;

/// Each way to leave state behind on a backend, and a statement that shows it with what it must show to the next.
const TRACES: [(&str, &str, &str); 9] = [
    ("SET work_mem = '77MB'", "SHOW work_mem", "4MB"),
    ("SET search_path = elsewhere", "SHOW search_path", "\"$user\", public"),
    ("SET ROLE leaver", "SELECT current_user::text", "broker"),
    ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "SHOW transaction_read_only", "off"),
    ("CREATE TEMP TABLE trace (n int)", "SELECT coalesce(to_regclass('trace')::text, 'none')", "none"),
    (
        "SELECT pg_advisory_lock(42)::text",
        "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        "0",
    ),
    ("LISTEN trace", "SELECT count(*)::text FROM pg_listening_channels()", "0"),
    ("DECLARE trace CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*)::text FROM pg_cursors WHERE name = 'trace'", "0"),
    ("PREPARE trace AS SELECT 1", "SELECT count(*)::text FROM pg_prepared_statements WHERE from_sql", "0"),
];

#[tokio::test(flavor = "multi_thread")]
async fn no_state_crosses_sessions() {
    let database = Database::create();
    database.psql(
        "DO $$ BEGIN CREATE ROLE leaver; EXCEPTION WHEN duplicate_object THEN END $$; GRANT leaver TO broker; \
         CREATE SEQUENCE trace_seq; ALTER SEQUENCE trace_seq OWNER TO broker",
    );
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    for (leave, look, clean) in TRACES {
        let leaver = broker.session().await;
        leaver.execute_and_commit(leave).await.unwrap();
        let next = broker.session().await;
        let seen = first_row(&next.execute_and_commit(look).await.unwrap());
        assert_eq!(seen, [text(clean)], "{leave} was seen by the next session");
    }
    let leaver = broker.session().await;
    leaver.execute_and_commit("SELECT nextval('trace_seq')").await.unwrap();
    let next = broker.session().await;
    let seen = next.execute("SELECT currval('trace_seq')").await.unwrap_err();
    assert_eq!(seen.metadata["sqlstate"], "55000", "the sequence's state was seen by the next session");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_connection_is_used_again_and_an_unclean_one_is_not() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = broker.session().await;
    let pid = async || first_row(&session.execute_and_commit("SELECT pg_backend_pid()").await.unwrap());
    let first = pid().await;
    assert_eq!(pid().await, first);
    session.execute_and_commit("PREPARE left_behind AS SELECT 1").await.unwrap();
    assert_ne!(pid().await, first);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_drivers_own_statements_harms_no_later_session() {
    let database = Database::create();
    database.psql("CREATE TYPE mood AS ENUM ('happy'); CREATE TYPE tone AS ENUM ('low')");
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let leaver = broker.session().await;
    leaver.execute("SELECT 'happy'::mood").await.unwrap();
    leaver.execute_and_commit("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$").await.unwrap();
    let next = broker.session().await;
    assert_eq!(first_row(&next.execute("SELECT 'low'::tone").await.unwrap()), [text("low")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seed_of_random_does_not_cross_sessions() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = broker.session().await;
    let seeded = "SELECT setseed(0.5), pg_backend_pid()";
    let pid = first_row(&session.execute_and_commit(seeded).await.unwrap()).remove(1);
    let first = first_row(&session.execute_and_commit("SELECT random(), pg_backend_pid()").await.unwrap());
    assert_eq!(first[1], pid);
    let predicted = first_row(&session.execute("SELECT setseed(0.5)::text || random()::text").await.unwrap());
    let pb::value::Kind::DoubleValue(first) = first[0] else { panic!("no number") };
    assert_ne!(predicted, [text(&first.to_string())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_terminated_between_statements_ends_the_session_as_lost() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    let pid = session.get().await.unwrap().backend_pid;
    database.psql(&format!("SELECT pg_terminate_backend({pid}, 5000)"));
    let lost = session.execute("SELECT 1").await.unwrap_err();
    assert_eq!(lost.end_reason(), "END_REASON_BACKEND_LOST");
    assert_eq!(session.commit().await.unwrap_err().end_reason(), "END_REASON_BACKEND_LOST");
    assert_eq!(database.balances(), "100 100");
    broker.session().await.execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_terminated_in_mid_statement_ends_the_session_as_lost() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    let pid = session.get().await.unwrap().backend_pid;
    let running = tokio::spawn({
        let session = session.clone();
        async move { session.execute("SELECT pg_sleep(60)").await }
    });
    let sleeping = format!("SELECT wait_event FROM pg_stat_activity WHERE pid = {pid}");
    database.wait_for(&sleeping, "PgSleep");
    database.psql(&format!("SELECT pg_terminate_backend({pid})"));
    assert_eq!(running.await.unwrap().unwrap_err().end_reason(), "END_REASON_BACKEND_LOST");
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_that_died_are_not_handed_out() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 2\nmax_overflow = 0", "").await;
    let (one, two) = (broker.session().await, broker.session().await);
    one.execute("SELECT 1").await.unwrap();
    two.execute("SELECT 1").await.unwrap();
    one.commit().await.unwrap();
    two.commit().await.unwrap();
    let idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
         AND application_name = 'session-broker' AND state = 'idle'";
    database.wait_for(idle, "2");
    database.psql(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity \
         WHERE datname = current_database() AND application_name = 'session-broker'",
    );
    for session in [one, two] {
        session.execute("SELECT 1").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_past_its_timeout_is_stopped_and_its_connection_lives_on() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let pid = session.get().await.unwrap().backend_pid;
    let request = pb::ExecuteRequest { timeout: millis(50), ..session.statement("SELECT pg_sleep(60)", vec![]) };
    let stopped = session.run(request).await.unwrap_err();
    assert_eq!((stopped.code, stopped.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
    assert_eq!(
        (stopped.metadata["bound"].as_str(), stopped.transaction_state()),
        ("timeout", TransactionState::Failed)
    );
    session.rollback().await.unwrap();
    session.execute("SELECT 1").await.unwrap();
    assert_eq!(session.get().await.unwrap().backend_pid, pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_never_hits_a_later_statement() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = broker.session().await;
    for round in 0..200 {
        // Sometimes the statement wins, sometimes the cancel.
        let sleep = format!("SELECT pg_sleep({})", 0.002 + f64::from(round % 5) * 0.0005);
        let request = pb::ExecuteRequest { timeout: millis(2), ..session.statement(&sleep, vec![]) };
        let raced = session.run(request).await;
        if let Err(failure) = raced {
            assert_eq!(failure.code, Code::DeadlineExceeded);
            session.rollback().await.unwrap();
        }
        session.execute("SELECT 1").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_in_mid_statement_has_it_stopped() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let pid = session.get().await.unwrap().backend_pid;
    let call = tokio::spawn({
        let session = session.clone();
        async move { session.execute("SELECT pg_sleep(60)").await }
    });
    database.wait_for(&format!("SELECT wait_event FROM pg_stat_activity WHERE pid = {pid}"), "PgSleep");
    call.abort();
    let state = format!("SELECT state FROM pg_stat_activity WHERE pid = {pid}");
    database.wait_for(&state, "idle in transaction (aborted)");
    let refused = session.execute("SELECT 1").await.unwrap_err();
    assert_eq!(refused.metadata["sqlstate"], "25P02");
    session.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_deadline_stops_the_statement_and_its_caller_hears_so() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let mut request = tonic::Request::new(session.statement("SELECT pg_sleep(60)", vec![]));
    request.set_timeout(Duration::from_secs(3));
    let stopped = Failure::from(session.client.clone().execute(request).await.unwrap_err());
    assert_eq!((stopped.code, stopped.metadata["bound"].as_str()), (Code::DeadlineExceeded, "grpc_deadline"));
    assert_eq!(stopped.transaction_state(), TransactionState::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_an_abandoned_transaction_are_gone_within_the_lease_and_a_second() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let request = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
    let abandoned = broker.session_with(request).await;
    abandoned.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    // psql waits for the row's lock no longer than that.
    database.psql("SET lock_timeout = '2s'; UPDATE accounts SET balance = balance + 1 WHERE id = 1");
    assert_eq!(database.balances(), "101 100");
    assert_eq!(abandoned.commit().await.unwrap_err().end_reason(), "END_REASON_LEASE_EXPIRED");
}

#[tokio::test(flavor = "multi_thread")]
async fn serialization_failures_ask_for_the_transaction_to_be_retried() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let options =
        pb::SessionOptions { isolation_level: pb::IsolationLevel::RepeatableRead.into(), ..Default::default() };
    let session = broker.session_with(pb::BeginSessionRequest { options: Some(options), ..Default::default() }).await;
    session.execute("SELECT * FROM accounts").await.unwrap();
    database.psql("UPDATE accounts SET balance = balance + 1");
    let failed: Failure = session.execute("UPDATE accounts SET balance = 0").await.unwrap_err();
    assert_eq!((failed.code, failed.metadata["sqlstate"].as_str()), (Code::Aborted, "40001"));
    assert_eq!(failed.advice, pb::retry_advice::Scope::Transaction);
    session.rollback().await.unwrap();
    let count = first_row(&session.execute("SELECT count(*) FROM accounts").await.unwrap());
    assert_eq!(count, [int(2)]);
}
