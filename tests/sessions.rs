//! Sessions from begin to close on a real PostgreSQL, with psql as the witness.

use session_broker::grpc::pb;
use tonic::Code;

use crate::support::{Broker, Database, first_row, int, seconds, text, until};
use pb::{EndReason, Outcome, TransactionState};

const DEBIT: &str = "UPDATE accounts SET balance = balance - $1 WHERE id = $2";
const CREDIT: &str = "UPDATE accounts SET balance = balance + $1 WHERE id = $2";

#[tokio::test(flavor = "multi_thread")]
async fn a_committed_transfer_is_visible_to_others_and_not_before() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let debit = session.run(session.statement(DEBIT, vec![text("12.50"), int(1)])).await.unwrap();
    assert_eq!((debit.row_count, debit.command_tag.as_str()), (1, "UPDATE 1"));
    assert_eq!(debit.state.unwrap().transaction_state(), TransactionState::Open);
    session.run(session.statement(CREDIT, vec![text("12.50"), int(2)])).await.unwrap();
    assert_eq!(database.balances(), "100 100");
    let committed = session.commit().await.unwrap();
    assert_eq!(committed.outcome(), Outcome::Committed);
    assert_eq!(committed.state.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "87.50 112.50");
    let status = format!("SELECT pg_xact_status('{}'::xid8)", committed.transaction_id);
    assert_eq!(database.psql(&status), "committed");
    assert_eq!(session.close().await.unwrap(), EndReason::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_transfer_never_happened() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.run(session.statement(DEBIT, vec![int(5), int(1)])).await.unwrap();
    session.run(session.statement(CREDIT, vec![int(5), int(2)])).await.unwrap();
    assert_eq!(session.rollback().await.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "100 100");
    assert_eq!(database.open_transactions(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_execute_can_commit() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.run(session.statement(DEBIT, vec![int(5), int(1)])).await.unwrap();
    let last = session.execute_and_commit("UPDATE accounts SET balance = balance + 5 WHERE id = 2").await.unwrap();
    assert_eq!(last.commit.unwrap().outcome(), Outcome::Committed);
    assert_eq!(last.state.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "95 105");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_wrote_nothing_says_so() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT * FROM accounts").await.unwrap();
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::NothingWritten);
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_of_a_failed_transaction_is_aborted_and_rolled_back() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.run(session.statement(DEBIT, vec![int(5), int(1)])).await.unwrap();
    let failed = session.execute("SELECT 1 / 0").await.unwrap_err();
    assert_eq!((failed.code, failed.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "22012"));
    assert_eq!(failed.transaction_state(), TransactionState::Failed);
    let refused = session.execute("SELECT 1").await.unwrap_err();
    assert_eq!((refused.code, refused.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "25P02"));
    for _ in 0..2 {
        let commit = session.commit().await.unwrap_err();
        assert_eq!((commit.code, commit.reason.as_str()), (Code::Aborted, "COMMIT_ROLLED_BACK"));
        assert_eq!(commit.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
        assert_eq!(commit.transaction_state(), TransactionState::None);
    }
    assert_eq!(database.balances(), "100 100");
    session.execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deferred_constraint_that_fails_the_commit_is_an_error_and_rolls_back() {
    let database = Database::create();
    database.psql(
        "CREATE TABLE child (id int REFERENCES accounts DEFERRABLE INITIALLY DEFERRED); ALTER TABLE child OWNER TO broker",
    );
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("INSERT INTO child VALUES (77)").await.unwrap();
    let failed = session.commit().await.unwrap_err();
    assert_eq!(failed.code, Code::FailedPrecondition);
    let error = failed.pg_error.as_ref().unwrap();
    assert_eq!((error.sqlstate.as_str(), error.constraint.as_str()), ("23503", "child_id_fkey"));
    assert_eq!(failed.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
    assert_eq!(failed.transaction_state(), TransactionState::None);
    assert_eq!(database.psql("SELECT count(*) FROM child"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_execute_that_was_to_commit_rolls_back_when_its_statement_fails() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.run(session.statement(DEBIT, vec![int(5), int(1)])).await.unwrap();
    let failed = session.execute_and_commit("INSERT INTO accounts VALUES (1, 1)").await.unwrap_err();
    assert_eq!(failed.code, Code::AlreadyExists);
    assert_eq!(failed.pg_error.as_ref().unwrap().constraint, "accounts_pkey");
    assert_eq!(failed.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
    assert_eq!(failed.transaction_state(), TransactionState::None);
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_and_rollback_and_close_can_be_repeated() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::NothingWritten);
    session.rollback().await.unwrap();
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let first = session.commit().await.unwrap();
    let again = session.commit().await.unwrap();
    assert_eq!((again.outcome(), again.transaction_id), (Outcome::Committed, first.transaction_id));
    session.rollback().await.unwrap();
    assert_eq!(session.commit().await.unwrap().transaction_id, first.transaction_id);
    assert_eq!(session.close().await.unwrap(), EndReason::Closed);
    assert_eq!(session.close().await.unwrap(), EndReason::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commits_verdict_is_forgotten_with_the_next_statement() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let first = session.commit().await.unwrap();
    session.close().await.unwrap();
    let again = session.commit().await.unwrap();
    assert_eq!((again.transaction_id, again.state), (first.transaction_id, None));

    // Whoever commits what could not begin is not told of what was before.
    let unbegun = broker.session().await;
    unbegun.execute_and_commit("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    unbegun.execute("SELECT $1::int4").await.unwrap_err();
    assert_eq!(unbegun.commit().await.unwrap().outcome(), Outcome::NothingWritten);

    let other = broker.session().await;
    other.execute("UPDATE accounts SET balance = 8 WHERE id = 1").await.unwrap();
    other.commit().await.unwrap();
    other.execute("SELECT 1").await.unwrap();
    other.close().await.unwrap();
    assert_eq!(other.commit().await.unwrap_err().end_reason(), "END_REASON_CLOSED");
}

#[tokio::test(flavor = "multi_thread")]
async fn close_rolls_an_open_transaction_back() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    assert_eq!(session.close().await.unwrap(), EndReason::Closed);
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
    assert_eq!(session.execute("SELECT 1").await.unwrap_err().end_reason(), "END_REASON_CLOSED");
    assert_eq!(session.commit().await.unwrap_err().end_reason(), "END_REASON_CLOSED");
    assert_eq!(session.rollback().await.unwrap_err().end_reason(), "END_REASON_CLOSED");
    assert_eq!(session.keep_alive().await.unwrap_err().end_reason(), "END_REASON_CLOSED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_holds_no_connection_between_transactions() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let first = broker.session().await;
    let second = broker.session().await;
    for session in [&first, &second, &first] {
        session.execute_and_commit("UPDATE accounts SET balance = balance + 1").await.unwrap();
    }
    assert_eq!(database.balances(), "103 103");
}

#[tokio::test(flavor = "multi_thread")]
async fn get_session_tells_what_is_behind_it_also_after_its_end() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let labels = [("service".to_owned(), "billing".to_owned())];
    let request = pb::BeginSessionRequest { labels: labels.clone().into(), ..Default::default() };
    let session = broker.session_with(request).await;
    let pid = first_row(&session.execute("SELECT pg_backend_pid()").await.unwrap());
    let open = session.get().await.unwrap();
    assert_eq!(vec![int(open.backend_pid.into())], pid);
    assert_eq!((open.engine.as_str(), open.database.as_str(), open.user.as_str()), ("main", &*database.name, "broker"));
    assert_eq!(open.server_version, database.psql("SHOW server_version"));
    assert_eq!(open.session_id, session.id);
    assert_eq!(open.state.unwrap().transaction_state(), TransactionState::Open);
    session.commit().await.unwrap();
    assert_eq!(session.get().await.unwrap().backend_pid, 0);
    session.close().await.unwrap();
    let ended = session.get().await.unwrap();
    assert_eq!((ended.end_reason(), ended.state), (EndReason::Closed, None));
    assert_eq!(ended.labels, labels.into());
}

#[tokio::test(flavor = "multi_thread")]
async fn session_options_reach_every_transaction() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let options = pb::SessionOptions {
        isolation_level: pb::IsolationLevel::Serializable.into(),
        read_only: true,
        deferrable: true,
        lock_timeout: seconds(3),
        ..Default::default()
    };
    let session = broker.session_with(pb::BeginSessionRequest { options: Some(options), ..Default::default() }).await;
    let shown = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'), \
         current_setting('transaction_deferrable'), current_setting('lock_timeout')";
    for _ in 0..2 {
        let row = first_row(&session.execute_and_commit(shown).await.unwrap());
        assert_eq!(row, [text("serializable"), text("on"), text("on"), text("3s")]);
    }
    let refused = session.execute("DELETE FROM accounts").await.unwrap_err();
    assert_eq!(refused.metadata["sqlstate"], "25006");
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_come_with_the_statement_that_raised_them() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let loud = session.execute("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two'; END $$").await.unwrap();
    let notices: Vec<_> = loud.notices.iter().map(|n| (n.severity.as_str(), n.message.as_str())).collect();
    assert_eq!(notices, [("NOTICE", "one"), ("WARNING", "two")]);
    let long = format!("SELECT 1 AS {}", "x".repeat(70));
    assert!(session.execute(&long).await.unwrap().notices[0].message.contains("truncated"));
    let quiet = session.execute("SELECT 1").await.unwrap();
    assert!(quiet.notices.is_empty());
    let flood = "DO $$ BEGIN FOR n IN 1..200 LOOP RAISE NOTICE '%', repeat('x', 100000); END LOOP; END $$";
    let flooded = session.execute(flood).await.unwrap().notices;
    assert_eq!(flooded.len(), 100);
    assert!(flooded.iter().all(|notice| notice.message.len() == 1024));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_named_for_the_database_administrator() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let pid = session.get().await.unwrap().backend_pid;
    let name = database.psql(&format!("SELECT application_name FROM pg_stat_activity WHERE pid = {pid}"));
    assert_eq!(name, "session-broker");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_broker_lets_transactions_finish_and_rolls_the_rest_back() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (idle, finishing, lingering) = (broker.session().await, broker.session().await, broker.session().await);
    finishing.execute("UPDATE accounts SET balance = 1 WHERE id = 1").await.unwrap();
    lingering.execute("UPDATE accounts SET balance = 1 WHERE id = 2").await.unwrap();
    broker.begin_stop();
    // The drain has begun when an idle session hears of it.
    until(async || idle.keep_alive().await.is_err()).await;
    assert_eq!(idle.execute("SELECT 1").await.unwrap_err().end_reason(), "END_REASON_DRAINED");
    let refused = broker.client().begin_session(pb::BeginSessionRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(finishing.keep_alive().await.unwrap().draining);
    finishing.commit().await.unwrap();
    broker.stop().await;
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("1 100", "0"));
}
