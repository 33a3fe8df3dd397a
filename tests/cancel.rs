//! Cancel: it stops the one statement it is meant for, tells when it has, and touches no other.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use session_broker::grpc::pb;
use tonic::Code;

use crate::batches::SLEEPING;
use crate::support::{Broker, Database, Failure, Session, until};
use pb::{Outcome, TransactionState, retry_advice::Scope};

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_statement_has_stopped_when_cancel_returns() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute(UPDATE).await.unwrap();
    let running = spawn(&session, "SELECT pg_sleep(60)", false);
    database.wait_for(SLEEPING, "1");
    let answer = session.cancel().await.unwrap();
    assert_eq!(database.psql(SLEEPING), "0");
    assert_eq!((answer.cancelled, answer.state.unwrap().transaction_state()), (true, TransactionState::Failed));
    let stopped = running.await.unwrap().unwrap_err();
    assert_eq!((stopped.code, stopped.reason.as_str()), (Code::Cancelled, "CANCELLED"));
    assert_eq!((stopped.advice, stopped.transaction_state()), (Scope::Transaction, TransactionState::Failed));
    session.rollback().await.unwrap();
    until(async || session.get().await.unwrap().pool.unwrap().in_use == 0).await;
    session.execute_and_commit(UPDATE).await.unwrap();
    // It cost no connection: the one request has stopped the one statement.
    assert_eq!(session.get().await.unwrap().pool.unwrap().opened, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_statement_with_a_commit_behind_it_commits_nothing() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = format!("WITH updated AS ({UPDATE} RETURNING id) SELECT pg_sleep(60) FROM updated");
    let running = spawn(&session, &sql, true);
    database.wait_for(SLEEPING, "1");
    assert!(session.cancel().await.unwrap().cancelled);
    let stopped = running.await.unwrap().unwrap_err();
    assert_eq!((stopped.code, stopped.transaction_state()), (Code::Cancelled, TransactionState::None));
    assert_eq!(stopped.commit.unwrap().outcome(), Outcome::RolledBack);
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_for_a_connection_is_cancelled_with_nothing_run() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0\npool_timeout = \"1m\"", "").await;
    let (holder, waiter) = (broker.session().await, broker.session().await);
    holder.execute("SELECT 1").await.unwrap();
    let waiting = spawn(&waiter, UPDATE, true);
    until(async || waiter.get().await.unwrap().pool.unwrap().waiting > 0).await;
    let answer = waiter.cancel().await.unwrap();
    assert_eq!((answer.cancelled, answer.state.unwrap().transaction_state()), (true, TransactionState::None));
    assert_eq!(waiting.await.unwrap().unwrap_err().reason, "CANCELLED");
    holder.commit().await.unwrap();
    waiter.execute_and_commit("SELECT 1").await.unwrap();
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_statement_there_is_nothing_to_cancel() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let nothing = async |state: TransactionState| {
        // An answer comes a moment before its statement counts as over.
        until(async || session.cancel().await.is_err()).await;
        let refused = session.cancel().await.unwrap_err();
        assert_eq!((refused.code, refused.reason.as_str()), (Code::FailedPrecondition, "NOTHING_TO_CANCEL"));
        assert_eq!(refused.transaction_state(), state);
    };
    nothing(TransactionState::None).await;
    session.execute(UPDATE).await.unwrap();
    nothing(TransactionState::Open).await;
    session.commit().await.unwrap();
    nothing(TransactionState::None).await;
    session.close().await.unwrap();
    assert_eq!(session.cancel().await.unwrap_err().end_reason(), "END_REASON_CLOSED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_is_not_cancelled() {
    let database = Database::create();
    database.doze_at_commit(1);
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let running = spawn(&session, UPDATE, true);
    database.wait_for(SLEEPING, "1");
    assert_eq!(session.cancel().await.unwrap_err().reason, "NOTHING_TO_CANCEL");
    assert_eq!(running.await.unwrap().unwrap().commit.unwrap().outcome(), Outcome::Committed);
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_comes_late_stops_no_later_statement_of_anyone() {
    /// As many as can be had in a few seconds; `CANCEL_ROUNDS=10000` for a long run.
    const ROUNDS: u32 = 100;
    let rounds = std::env::var("CANCEL_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    let database = Database::create();
    // One connection, so that the next statement of anyone runs where the last was cancelled.
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let (cancelling, other) = (broker.session().await, broker.session().await);
    let mut cancelled = 0;
    let mut random = StdRng::seed_from_u64(20_261_122);
    for _ in 0..rounds {
        // Some end long before the cancel comes, some long after, and others about then.
        let lasting = [0, 0, 1, 2, 5, 20][random.random_range(0..6)];
        let running = spawn(&cancelling, &format!("SELECT pg_sleep(0.001 * {lasting})"), true);
        let asked = cancelling.cancel().await;
        match running.await.unwrap() {
            Ok(_) => assert!(!asked.is_ok_and(|answer| answer.cancelled)),
            Err(failure) => {
                assert_eq!(failure.reason, "CANCELLED", "{failure:?}");
                assert!(asked.unwrap().cancelled);
                cancelled += 1;
            }
        }
        other.execute_and_commit("SELECT 2").await.unwrap();
    }
    assert!(cancelled > 0 && cancelled < rounds, "{cancelled} of {rounds} statements cancelled");
    let told = format!("{cancelled} of {rounds} statements cancelled\n");
    let _ = std::io::Write::write_all(&mut std::io::stderr(), told.as_bytes());
}

/// Executes meanwhile.
fn spawn(session: &Session, sql: &str, commit: bool) -> tokio::task::JoinHandle<Result<pb::ExecuteResponse, Failure>> {
    let request = pb::ExecuteRequest { commit, ..session.statement(sql, vec![]) };
    let session = session.clone();
    tokio::spawn(async move { session.run(request).await })
}
