//! Run: whole transactions in one call, their expectations and retries, and keys that make them safe to repeat.

use session_broker::grpc::pb;
use tokio::task::JoinHandle;
use tonic::Code;

use crate::batches::{SLEEPING, kinds, parameters, place};
use crate::support::{Broker, Database, Failure, Session, int, millis, text};
use pb::expectation::RowCount;
use pb::value::Kind;
use pb::{IsolationLevel, Outcome, retry_advice::Scope};

/// How many backends wait for a lock of another.
const WAITING: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";

/// An engine's keys: where it keeps those of its callers.
const KEYS_IN_TABLE: &str = "idempotency_table = \"public.idempotency\"";

/// A gate that transactions of [`through_gate`] pass when nobody holds it.
const GATE: &str = "DO $$ BEGIN PERFORM pg_advisory_xact_lock(7); END $$";

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_runs_and_commits_in_one_call() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let answer = broker.run(request(transfer("12.50"))).await.unwrap();
    let balances: Vec<_> = answer.results.iter().map(kinds).collect();
    assert_eq!(balances, [[[text("87.50")]], [[text("112.50")]]]);
    assert_eq!((answer.attempts, answer.replayed), (1, false));
    assert!(answer.results.iter().all(|result| (result.row_count, &*result.command_tag) == (1, "UPDATE 1")));
    let commit = answer.commit.unwrap();
    assert_eq!((commit.outcome(), &commit.state), (Outcome::Committed, &None));
    assert_eq!(database.balances(), "87.50 112.50");
    let status = format!("SELECT pg_xact_status('{}'::xid8)", commit.transaction_id);
    assert_eq!(database.psql(&status), "committed");
    let resolved = broker.resolve(&commit.commit_token).await.unwrap();
    assert_eq!((resolved.outcome(), resolved.transaction_id), (Outcome::Committed, commit.transaction_id));
    until_unused(&broker.session().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_wrote_nothing_says_so() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let answer = broker.run(request(vec![statement("SELECT count(*) FROM accounts", vec![])])).await.unwrap();
    assert_eq!(kinds(&answer.results[0]), [[int(2)]]);
    let commit = answer.commit.unwrap();
    assert_eq!((commit.outcome(), commit.transaction_id), (Outcome::NothingWritten, 0));
    assert!(commit.commit_token.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn expectations_that_are_met_let_it_commit() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let statements = vec![
        expecting("UPDATE accounts SET balance = balance + 1", vec![], RowCount::Exactly(2)),
        expecting("UPDATE accounts SET balance = balance + 1", vec![], RowCount::AtLeast(1)),
        expecting("DELETE FROM accounts WHERE id = $1", vec![int(77)], RowCount::Exactly(0)),
        expecting("DELETE FROM accounts WHERE id = $1", vec![int(77)], RowCount::AtLeast(0)),
        expecting("SELECT id FROM accounts", vec![], RowCount::Exactly(2)),
        expecting("INSERT INTO accounts VALUES (3, 3) RETURNING id", vec![], RowCount::AtLeast(1)),
    ];
    let answer = broker.run(request(statements)).await.unwrap();
    let counts: Vec<_> = answer.results.iter().map(|result| result.row_count).collect();
    assert_eq!(counts, [2, 2, 0, 0, 2, 1]);
    assert_eq!(database.balances(), "102 102 3");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expectation_that_is_not_met_rolls_everything_back() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let witness = broker.session().await;
    for (sql, expected, counted) in [
        ("UPDATE accounts SET balance = 8 WHERE id = 77", RowCount::Exactly(1), "0"),
        ("UPDATE accounts SET balance = 8 WHERE id = 77", RowCount::AtLeast(1), "0"),
        ("UPDATE accounts SET balance = 8", RowCount::Exactly(1), "2"),
        ("UPDATE accounts SET balance = 8", RowCount::AtLeast(3), "2"),
        ("UPDATE accounts SET balance = 8", RowCount::Exactly(0), "2"),
        ("SELECT id FROM accounts", RowCount::Exactly(1), "2"),
    ] {
        let before = statement("UPDATE accounts SET balance = 7", vec![]);
        let run = pb::RunRequest { attempts_max: 5, ..request(vec![before, expecting(sql, vec![], expected)]) };
        let failure = broker.run(run).await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::FailedPrecondition, "EXPECTATION_FAILED"));
        assert_eq!((place(&failure), failure.metadata["row_count"].as_str()), ((Some("1"), None), counted), "{sql}");
        assert_eq!(failure.metadata["attempts"], "1");
        assert_eq!(database.balances(), "100 100");
        until_unused(&witness).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expectation_is_of_each_run_of_its_statement() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let sets = [1, 77, 2].map(|id| pb::ParameterSet { parameters: parameters(vec![int(id)]) });
    let sql = "UPDATE accounts SET balance = 7 WHERE id = $1";
    let each = pb::RunStatement { parameter_sets: sets.into(), ..expecting(sql, vec![], RowCount::Exactly(1)) };
    let failure = broker.run(request(vec![each])).await.unwrap_err();
    assert_eq!((failure.reason.as_str(), place(&failure)), ("EXPECTATION_FAILED", (Some("0"), Some("1"))));
    assert_eq!(failure.metadata["row_count"], "0");
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_failures_the_earlier_is_told() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let unmet = expecting("UPDATE accounts SET balance = 7 WHERE id = 77", vec![], RowCount::Exactly(1));
    let violating = statement("INSERT INTO accounts VALUES (1, 1)", vec![]);
    let failure = broker.run(request(vec![unmet.clone(), violating.clone()])).await.unwrap_err();
    assert_eq!((failure.reason.as_str(), place(&failure).0), ("EXPECTATION_FAILED", Some("0")));
    let failure = broker.run(request(vec![violating, unmet])).await.unwrap_err();
    assert_eq!((failure.code, place(&failure).0), (Code::AlreadyExists, Some("0")));
    assert_eq!(failure.metadata["attempts"], "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expectation_of_a_statement_that_counts_nothing_is_refused_and_rolled_back() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    for expected in [RowCount::Exactly(0), RowCount::AtLeast(0), RowCount::Exactly(1)] {
        let made = expecting("CREATE TABLE made (id int)", vec![], expected);
        let failure = broker.run(request(vec![made])).await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"));
        assert_eq!(failure.field.as_deref(), Some("statements[0].expectation"));
        assert_eq!(database.psql("SELECT to_regclass('made') IS NULL"), "t");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_statement_rolls_everything_back_and_says_where() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let mut statements = transfer("1000");
    statements.swap(0, 1);
    let failure = broker.run(request(statements)).await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "23514"));
    assert_eq!((place(&failure), failure.metadata["attempts"].as_str()), ((Some("1"), None), "1"));
    assert_eq!(database.balances(), "100 100");
    until_unused(&broker.session().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_fails_is_an_error_and_rolls_back() {
    let database = Database::create();
    database.psql(
        "CREATE TABLE child (id int REFERENCES accounts DEFERRABLE INITIALLY DEFERRED); \
         ALTER TABLE child OWNER TO broker",
    );
    let broker = Broker::start(&database).await;
    let failure = broker.run(request(vec![statement("INSERT INTO child VALUES (77)", vec![])])).await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "23503"));
    assert_eq!((place(&failure).0, failure.metadata["attempts"].as_str()), (None, "1"));
    assert_eq!(database.psql("SELECT count(*) FROM child"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serialization_failure_is_tried_again_as_often_as_asked() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let holder = broker.session().await;
    for (attempts_max, attempts) in [(0, 1), (1, 1), (2, 2), (10, 2)] {
        database.psql("UPDATE accounts SET balance = 100");
        holder.execute("UPDATE accounts SET balance = 50 WHERE id = 1").await.unwrap();
        let credit = statement("UPDATE accounts SET balance = balance + 1 WHERE id = 1", vec![]);
        let run = spawn_run(&broker, isolated(IsolationLevel::RepeatableRead, attempts_max, vec![credit]));
        database.wait_for(WAITING, "1");
        holder.commit().await.unwrap();
        let answer = run.await.unwrap();
        if attempts == 2 {
            assert_eq!(answer.unwrap().attempts, 2);
            assert_eq!(database.balances(), "51 100");
        } else {
            let failure = answer.unwrap_err();
            assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::Aborted, "40001"));
            assert!(matches!(failure.advice, Scope::Call | Scope::Transaction), "{failure:?}");
            assert_eq!((place(&failure).0, failure.metadata["attempts"].as_str()), (Some("0"), "1"));
            assert_eq!(database.balances(), "50 100");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serialization_failure_at_commit_is_told_or_tried_again() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let options = pb::SessionOptions { isolation_level: IsolationLevel::Serializable.into(), ..Default::default() };
    let first = broker.session_with(pb::BeginSessionRequest { options: Some(options), ..Default::default() }).await;
    for attempts_max in [1, 3] {
        first.execute("SELECT sum(balance) FROM accounts").await.unwrap();
        first.execute("UPDATE accounts SET balance = balance + 1 WHERE id = 1").await.unwrap();
        let gate = database.hold(GATE);
        // Each reads what the other writes: the later one to commit fails, and at COMMIT, since the gate reads nothing.
        let skewed = vec![
            statement("SELECT sum(balance) FROM accounts", vec![]),
            statement("UPDATE accounts SET balance = balance + 1 WHERE id = 2", vec![]),
            through_gate(),
        ];
        let run = spawn_run(&broker, isolated(IsolationLevel::Serializable, attempts_max, skewed));
        database.wait_for(WAITING, "1");
        first.commit().await.unwrap();
        drop(gate);
        let answer = run.await.unwrap();
        if attempts_max == 1 {
            let failure = answer.unwrap_err();
            assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::Aborted, "40001"));
            assert_eq!((place(&failure).0, failure.metadata["attempts"].as_str()), (None, "1"));
            assert_eq!(database.balances(), "101 100");
        } else {
            assert_eq!(answer.unwrap().attempts, 2);
            assert_eq!(database.balances(), "102 101");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_runs_in_a_deadlock_one_is_tried_again_and_both_commit() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let gate = database.hold(GATE);
    let sql = "UPDATE accounts SET balance = balance + 1 WHERE id = $1";
    let runs = [(1, 2), (2, 1)].map(|(one, other)| {
        let crossed = vec![statement(sql, vec![int(one)]), through_gate(), statement(sql, vec![int(other)])];
        spawn_run(&broker, pb::RunRequest { attempts_max: 10, ..request(crossed) })
    });
    database.wait_for(WAITING, "2");
    drop(gate);
    let mut attempts = Vec::new();
    for run in runs {
        attempts.push(run.await.unwrap().unwrap().attempts);
    }
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 2]);
    assert_eq!(database.balances(), "102 102");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_gives_its_answer_again_and_runs_once() {
    for (database, broker) in brokers().await {
        let statements = vec![
            statement("INSERT INTO accounts VALUES ($1, 5) RETURNING id, balance", vec![int(3)]),
            statement("UPDATE accounts SET balance = balance + 1 WHERE id < 3", vec![]),
        ];
        let run = keyed("order 66", statements);
        let first = broker.run(run.clone()).await.unwrap();
        assert!(!first.replayed);
        for _ in 0..2 {
            let again = broker.run(run.clone()).await.unwrap();
            assert!(again.replayed);
            assert_eq!((&again.results, id(&again)), (&first.results, id(&first)));
            assert_eq!(again.commit.unwrap().outcome(), Outcome::Committed);
        }
        assert_eq!(database.balances(), "101 101 5");
        // Another key is another run.
        let other = broker.run(pb::RunRequest { idempotency_key: "order 67".into(), ..run }).await.unwrap_err();
        assert_eq!(other.code, Code::AlreadyExists);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_used_with_a_different_request_is_refused() {
    for (database, broker) in brokers().await {
        broker.run(keyed("k", transfer("1"))).await.unwrap();
        let options = pb::SessionOptions { isolation_level: IsolationLevel::Serializable.into(), ..Default::default() };
        let isolated = pb::RunRequest { options: Some(options), ..keyed("k", transfer("1")) };
        let fewer = keyed("k", transfer("1").split_off(1));
        for different in [keyed("k", transfer("2")), fewer, isolated] {
            refused(&broker.run(different).await.unwrap_err(), "idempotency_key");
        }
        assert_eq!(database.balances(), "99 101");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_the_same_in_whatever_order_its_settings_travel() {
    let names: Vec<_> = (0..16).map(|n| format!("app.s{n}")).collect();
    let database = database_with_keys();
    let broker =
        Broker::start_with(&database, KEYS_IN_TABLE, &format!("[profiles.default]\nsettings = {names:?}")).await;
    let run = || {
        let settings = names.iter().map(|name| (name.clone(), "value".into())).collect();
        let options = pb::SessionOptions { settings, ..Default::default() };
        pb::RunRequest { options: Some(options), ..keyed("k", transfer("1")) }
    };
    broker.run(run()).await.unwrap();
    for _ in 0..5 {
        assert!(broker.run(run()).await.unwrap().replayed);
    }
    assert_eq!(database.balances(), "99 101");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_failed_does_not_use_up_its_key() {
    for (database, broker) in brokers().await {
        let unmet = expecting("UPDATE accounts SET balance = 7 WHERE id = 77", vec![], RowCount::Exactly(1));
        let unheard_of = statement("SELECT nonsense", vec![]);
        for failing in [transfer("1000"), vec![unmet], vec![unheard_of], vec![]] {
            broker.run(keyed("k", failing)).await.unwrap_err();
        }
        assert!(!broker.run(keyed("k", transfer("1"))).await.unwrap().replayed);
        assert!(broker.run(keyed("k", transfer("1"))).await.unwrap().replayed);
        assert_eq!(database.balances(), "99 101");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_calls_with_one_key_at_once_exactly_one_runs() {
    for (database, broker) in brokers().await {
        let runs: Vec<_> = (0..8).map(|_| spawn_run(&broker, keyed("k", transfer("1")))).collect();
        let mut answers = Vec::new();
        for run in runs {
            answers.push(run.await.unwrap().unwrap());
        }
        assert_eq!(answers.iter().filter(|answer| !answer.replayed).count(), 1);
        for answer in &answers {
            assert_eq!((id(answer), &answer.results), (id(&answers[0]), &answers[0].results));
        }
        assert_eq!(database.balances(), "99 101");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_meets_a_run_with_the_same_key_is_not_told_that_it_was_rolled_back() {
    let database = database_with_keys();
    let broker = durable(&database).await;
    let gate = database.hold(GATE);
    let run = isolated(IsolationLevel::RepeatableRead, 1, [vec![through_gate()], transfer("1")].concat());
    let run = pb::RunRequest { idempotency_key: "k".into(), ..run };
    let first = spawn_run(&broker, run.clone());
    let waits = |what: &str| format!("SELECT count(*) FROM pg_stat_activity WHERE wait_event = '{what}'");
    database.wait_for(&waits("advisory"), "1");
    let second = spawn_run(&broker, run.clone());
    database.wait_for(&waits("transactionid"), "1");
    drop(gate);
    first.await.unwrap().unwrap();
    // PostgreSQL fails it because the first has committed.
    let met = second.await.unwrap().unwrap_err();
    assert_eq!((met.code, met.metadata["sqlstate"].as_str(), met.commit), (Code::Aborted, "40001", None));
    assert!(broker.run(run).await.unwrap().replayed);
    assert_eq!(database.balances(), "99 101");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_too_large_to_be_given_again_does_not_commit() {
    for (database, broker) in brokers().await {
        // A single value within the limit, and its answer over it.
        let large = statement("SELECT repeat('x', $1) FROM accounts WHERE id = 1", vec![int(7 * 512 * 1024 - 100)]);
        let credit = statement("UPDATE accounts SET balance = 7 WHERE id = 1", vec![]);
        let failure = broker.run(keyed("k", vec![credit, large])).await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
        assert_eq!(failure.commit.unwrap().outcome(), Outcome::RolledBack);
        assert_eq!(database.balances(), "100 100");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_the_table_is_known_to_every_broker() {
    let database = database_with_keys();
    let first = durable(&database).await;
    let answer = first.run(keyed("k", transfer("1"))).await.unwrap();
    first.stop().await;
    let second = durable(&database).await;
    let again = second.run(keyed("k", transfer("1"))).await.unwrap();
    assert!(again.replayed);
    assert_eq!(again.results, answer.results);
    let (again, first) = (again.commit.unwrap(), answer.commit.unwrap());
    assert_eq!((again.outcome(), again.transaction_id), (Outcome::Committed, first.transaction_id));
    refused(&second.run(keyed("k", transfer("2"))).await.unwrap_err(), "idempotency_key");
    let third = durable(&database).await;
    let both = [spawn_run(&second, keyed("j", transfer("1"))), spawn_run(&third, keyed("j", transfer("1")))];
    let mut replayed = Vec::new();
    for run in both {
        replayed.push(run.await.unwrap().unwrap().replayed);
    }
    replayed.sort_unstable();
    assert_eq!(replayed, [false, true]);
    assert_eq!(database.balances(), "98 102");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_the_table_is_answered_again_whatever_values_its_caller_may_have() {
    let database = database_with_keys();
    let limits = "[profiles.default]\nvalue_bytes_max = 1024\nparameters_bytes_max = 1024\nresult_bytes_max = 100000";
    let broker = Broker::start_with(&database, KEYS_IN_TABLE, limits).await;
    let sql = "UPDATE accounts SET balance = 7 WHERE id = 1 RETURNING ARRAY(SELECT generate_series(1, 100)), repeat('x', 900)";
    let large = "SELECT repeat('x', 900) FROM generate_series(1, 20)";
    let request = keyed("large", vec![statement(sql, vec![]), statement(large, vec![])]);
    let answer = broker.run(request.clone()).await.unwrap();
    assert_eq!(broker.run(request).await.unwrap().results, answer.results);
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_and_its_effect_are_in_the_table_together_or_not_at_all() {
    const KEPT: &str = "SELECT coalesce(string_agg(concat(key, ' ', transaction_id), ' '), '') FROM idempotency";

    let database = database_with_keys();
    database.psql(
        "CREATE TABLE child (id int REFERENCES accounts DEFERRABLE INITIALLY DEFERRED); \
         ALTER TABLE child OWNER TO broker",
    );
    let broker = durable(&database).await;
    let unmet = expecting("UPDATE accounts SET balance = 7 WHERE id = 77", vec![], RowCount::Exactly(1));
    let orphan = statement("INSERT INTO child VALUES (77)", vec![]);
    for failing in [transfer("1000"), vec![unmet], vec![orphan]] {
        broker.run(keyed("k", failing)).await.unwrap_err();
        assert_eq!((database.psql(KEPT).as_str(), database.balances().as_str()), ("", "100 100"));
    }
    let answer = broker.run(keyed("k", transfer("1"))).await.unwrap();
    assert_eq!(database.psql(KEPT), format!("k {}", answer.commit.unwrap().transaction_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_caller_left_leaves_nothing_and_its_key_free() {
    for (database, broker) in brokers().await {
        let mut statements = transfer("1");
        statements.push(statement("SELECT pg_sleep(60)", vec![]));
        let run = spawn_run(&broker, keyed("k", statements));
        database.wait_for(SLEEPING, "1");
        run.abort();
        database.wait_for(SLEEPING, "0");
        until_unused(&broker.session().await).await;
        assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
        assert!(!broker.run(keyed("k", transfer("1"))).await.unwrap().replayed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn options_reach_the_transaction() {
    let database = Database::create();
    let role = crate::transactions::role(&database);
    let profile = format!("[profiles.default]\nroles = [{role:?}]\nsettings = [\"app.tenant\"]");
    let broker = Broker::start_with(&database, "", &profile).await;
    let options = pb::SessionOptions {
        isolation_level: IsolationLevel::Serializable.into(),
        read_only: true,
        role: role.clone(),
        settings: [("app.tenant".into(), "acme".into())].into(),
        ..Default::default()
    };
    let shown = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'), \
         current_user::text, current_setting('app.tenant')";
    let run = pb::RunRequest { options: Some(options), ..request(vec![statement(shown, vec![])]) };
    let answer = broker.run(run).await.unwrap();
    assert_eq!(kinds(&answer.results[0]), [[text("serializable"), text("on"), text(&role), text("acme")]]);
    let plain = broker.run(request(vec![statement("SELECT current_user::text", vec![])])).await.unwrap();
    assert_eq!(kinds(&plain.results[0]), [[text("broker")]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_bound_all_statements_together() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let update = statement("UPDATE accounts SET balance = 7 RETURNING id", vec![]);
    let nap = statement("SELECT pg_sleep(0.2)", vec![]);
    let options = Some(pb::SessionOptions { statement_timeout: millis(300), ..Default::default() });
    let slow = pb::RunRequest { options, ..request(vec![update.clone(), nap.clone(), nap.clone(), nap]) };
    let failure = broker.run(slow).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
    let large = pb::RunRequest { max_rows: 3, ..request(vec![update.clone(), update]) };
    let failure = broker.run(large).await.unwrap_err();
    assert_eq!((failure.reason.as_str(), place(&failure).0), ("RESULT_TOO_LARGE", Some("1")));
    assert_eq!(database.balances(), "100 100");
    until_unused(&broker.session().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_run_names_its_field_and_runs_nothing() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let update = statement("UPDATE accounts SET balance = 7", vec![]);
    let good = request(vec![update.clone()]);
    let with_options = |options| pb::RunRequest { options: Some(options), ..good.clone() };
    let (longest, too_long) = ("k".repeat(128), "k".repeat(129));
    let read_only = pb::SessionOptions { read_only: true, ..Default::default() };
    let kindless = pb::Parameter { value: Some(pb::Value::default()), ..Default::default() };
    let untold = pb::RunStatement { parameters: vec![kindless], ..update.clone() };
    for (bad, field) in [
        (pb::RunRequest { engine: "nowhere".into(), ..good.clone() }, "engine"),
        (request(vec![]), "statements"),
        (request(vec![update.clone(); 10_001]), "statements"),
        (request(vec![update.clone(), statement("COMMIT", vec![])]), "statements[1].sql"),
        (request(vec![update.clone(), statement("SAVEPOINT s", vec![])]), "statements[1].sql"),
        (request(vec![update.clone(), untold]), "statements[1].parameters[0].value"),
        (pb::RunRequest { attempts_max: 11, ..good.clone() }, "attempts_max"),
        (keyed(&too_long, vec![update.clone()]), "idempotency_key"),
        (keyed("nul\0", vec![update.clone()]), "idempotency_key"),
        (pb::RunRequest { idempotency_key: "k".into(), ..with_options(read_only) }, "idempotency_key"),
        (with_options(pb::SessionOptions { role: "postgres".into(), ..Default::default() }), "options.role"),
    ] {
        refused(&broker.run(bad).await.unwrap_err(), field);
    }
    assert_eq!(database.balances(), "100 100");
    broker.run(pb::RunRequest { attempts_max: 10, ..keyed(&longest, vec![update]) }).await.unwrap();
    assert_eq!(database.balances(), "7 7");
}

fn request(statements: Vec<pb::RunStatement>) -> pb::RunRequest {
    pb::RunRequest { statements, ..Default::default() }
}

fn keyed(key: &str, statements: Vec<pb::RunStatement>) -> pb::RunRequest {
    pb::RunRequest { idempotency_key: key.into(), ..request(statements) }
}

fn isolated(level: IsolationLevel, attempts_max: u32, statements: Vec<pb::RunStatement>) -> pb::RunRequest {
    let options = pb::SessionOptions { isolation_level: level.into(), ..Default::default() };
    pb::RunRequest { options: Some(options), attempts_max, ..request(statements) }
}

fn statement(sql: &str, kinds: Vec<Kind>) -> pb::RunStatement {
    pb::RunStatement { sql: sql.into(), parameters: parameters(kinds), ..Default::default() }
}

fn expecting(sql: &str, kinds: Vec<Kind>, row_count: RowCount) -> pb::RunStatement {
    pb::RunStatement { expectation: Some(pb::Expectation { row_count: Some(row_count) }), ..statement(sql, kinds) }
}

/// From the first account to the second, each of which must be there.
fn transfer(amount: &str) -> Vec<pb::RunStatement> {
    let debit = "UPDATE accounts SET balance = balance - $1 WHERE id = 1 RETURNING balance";
    let credit = "UPDATE accounts SET balance = balance + $1 WHERE id = 2 RETURNING balance";
    [debit, credit].map(|sql| expecting(sql, vec![text(amount)], RowCount::Exactly(1))).into()
}

/// Waits while somebody holds the gate.
fn through_gate() -> pb::RunStatement {
    statement("SELECT pg_advisory_xact_lock_shared(7)", vec![])
}

fn spawn_run(broker: &Broker, request: pb::RunRequest) -> JoinHandle<Result<pb::RunResponse, Failure>> {
    let mut client = broker.transactions();
    tokio::spawn(async move { Ok(client.run(request).await?.into_inner()) })
}

/// A broker that keeps keys in its memory, and one that keeps them in a table.
async fn brokers() -> [(Database, Broker); 2] {
    let (in_memory, in_table) = (Database::create(), database_with_keys());
    let brokers = (Broker::start(&in_memory).await, durable(&in_table).await);
    [(in_memory, brokers.0), (in_table, brokers.1)]
}

async fn durable(database: &Database) -> Broker {
    Broker::start_with(database, KEYS_IN_TABLE, "").await
}

fn database_with_keys() -> Database {
    let database = Database::create();
    database.psql(
        "CREATE TABLE idempotency (principal text NOT NULL, key text NOT NULL, request bytea NOT NULL, answer bytea, \
         transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id(), created_at timestamptz NOT NULL DEFAULT now(), \
         PRIMARY KEY (principal, key)); \
         ALTER TABLE idempotency OWNER TO broker",
    );
    database
}

/// Looks until no connection is in use.
async fn until_unused(witness: &Session) {
    for _ in 0..5000 {
        if witness.get().await.unwrap().pool.unwrap().in_use == 0 {
            return;
        }
    }
    panic!("a connection stays in use");
}

fn refused(failure: &Failure, field: &str) {
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
    assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
}

/// The id of the transaction that committed.
fn id(answer: &pb::RunResponse) -> u64 {
    answer.commit.as_ref().unwrap().transaction_id
}
