//! The pool: how many connections, who gets one, how long each lives, and what is left on it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use session_broker::broker::connect::ConnectOverrides;
use session_broker::broker::engine::{CheckoutError, CommitVerdict, Engine, TransactionOptions, Work};
use session_broker::broker::observer::Discard;
use session_broker::broker::principal::Principal;
use session_broker::broker::statement::{ResultFormat, ResultLimits, Statement};
use session_broker::grpc::pb;
use session_broker::postgres::engine::PostgresEngine;
use tonic::Code;

use crate::support::{Broker, Database, Failure, Session, config, first_row, int, text, until};

/// The broker's connections, as PostgreSQL counts them.
const CONNECTIONS: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
     AND usename = 'broker' AND backend_type = 'client backend'";

async fn pool(session: &Session) -> pb::PoolStatistics {
    session.get().await.unwrap().pool.unwrap()
}

/// Looks until the pool is as it should be.
async fn until_pool(session: &Session, is: impl Fn(&pb::PoolStatistics) -> bool) -> pb::PoolStatistics {
    for _ in 0..5000 {
        let statistics = pool(session).await;
        if is(&statistics) {
            return statistics;
        }
    }
    panic!("the pool stays {:?}", pool(session).await);
}

async fn pid(session: &Session) -> pb::value::Kind {
    first_row(&session.execute_and_commit("SELECT pg_backend_pid()").await.unwrap()).remove(0)
}

async fn pid_in_transaction(session: &Session) -> pb::value::Kind {
    first_row(&session.execute("SELECT pg_backend_pid()").await.unwrap()).remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn overflow_connections_close_when_they_are_not_needed() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 2", "").await;
    let sessions = [broker.session().await, broker.session().await, broker.session().await];
    for session in &sessions {
        session.execute("SELECT 1").await.unwrap();
    }
    let full = pool(&sessions[0]).await;
    assert_eq!((full.size, full.overflow_max, full.open, full.in_use, full.idle), (1, 2, 3, 3, 0));
    for session in &sessions {
        session.commit().await.unwrap();
    }
    let rested = until_pool(&sessions[0], |pool| pool.in_use == 0 && pool.idle <= 1).await;
    assert_eq!((rested.open, rested.idle, rested.opened), (1, 1, 3));
    database.wait_for(CONNECTIONS, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_are_served_in_arrival_order_and_the_queue_is_bounded() {
    let database = Database::create();
    database.psql("CREATE TABLE served (n serial, caller int); ALTER TABLE served OWNER TO broker; GRANT ALL ON served_n_seq TO broker");
    let engine = "pool_size = 1\nmax_overflow = 0\npool_timeout = \"30s\"\npool_waiters_max = 5";
    let broker = Broker::start_with(&database, engine, "").await;
    let holder = broker.session().await;
    holder.execute("SELECT 1").await.unwrap();
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..5 {
        let session = broker.session().await;
        callers.spawn(async move {
            let insert = session.statement("INSERT INTO served (caller) VALUES ($1)", vec![int(caller)]);
            session.run(pb::ExecuteRequest { commit: true, ..insert }).await.unwrap();
        });
        until_pool(&holder, |pool| i64::from(pool.waiting) == caller + 1).await;
    }
    let refused = broker.session().await.execute("SELECT 1").await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "POOL_QUEUE_FULL"));
    assert!(refused.retry_info);
    holder.commit().await.unwrap();
    callers.join_all().await;
    assert_eq!(database.psql("SELECT string_agg(caller::text, ' ' ORDER BY n) FROM served"), "0 1 2 3 4");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_that_leaves_takes_no_connection_along() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0\npool_timeout = \"30s\"", "").await;
    let (holder, waiter) = (broker.session().await, broker.session().await);
    holder.execute("SELECT 1").await.unwrap();
    let waiting = tokio::spawn(async move { waiter.execute("SELECT 1").await });
    until_pool(&holder, |pool| pool.waiting == 1).await;
    waiting.abort();
    until_pool(&holder, |pool| pool.waiting == 0).await;
    holder.commit().await.unwrap();
    broker.session().await.execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_principal_gets_its_share_and_leaves_the_rest_to_others() {
    let database = Database::create();
    let config = config(&[
        ("ENGINES__MAIN__URL", &database.url()),
        ("ENGINES__MAIN__POOL_SIZE", "5"),
        ("ENGINES__MAIN__MAX_OVERFLOW", "0"),
        ("ENGINES__MAIN__POOL_TIMEOUT", "100ms"),
    ]);
    let engine = config.engines["main"].clone();
    let engine = PostgresEngine::new("main".into(), engine.connect, engine.pool, BTreeSet::new(), None);
    let own = Arc::new(ConnectOverrides::default());
    let (greedy, other) = (Principal::new("greedy"), Principal::new("other"));
    // 40 % of five.
    let _two = [engine.checkout(&greedy, &own).await.unwrap(), engine.checkout(&greedy, &own).await.unwrap()];
    let refused = engine.checkout(&greedy, &own).await.err();
    assert_eq!(refused, Some(CheckoutError::Wait(Duration::from_millis(100))));
    let _others = [engine.checkout(&other, &own).await.unwrap(), engine.checkout(&other, &own).await.unwrap()];
    assert!(engine.checkout(&Principal::anonymous(), &own).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_recycled_and_retired_and_kept() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_recycle = \"1s\"", "").await;
    let session = broker.session().await;
    let first = pid(&session).await;
    until(async || pid(&session).await != first).await;

    let retired = Database::create();
    let broker = Broker::start_with(&retired, "pool_idle_timeout = \"100ms\"", "").await;
    pid(&broker.session().await).await;
    retired.wait_for(CONNECTIONS, "0");

    let kept = Database::create();
    let engine = "pool_idle_timeout = \"100ms\"\npool_idle_min = 2";
    let broker = Broker::start_with(&kept, engine, "").await;
    let session = broker.session().await;
    until_pool(&session, |pool| pool.idle == 2).await;
    let pids =
        format!("{} AND pid IS NOT NULL", CONNECTIONS.replace("count(*)", "string_agg(pid::text, ' ' ORDER BY pid)"));
    let before = kept.psql(&pids);
    // Past a dozen idle timeouts and a round of maintenance they are still the same.
    kept.psql("SELECT pg_sleep(1.5)");
    assert_eq!(kept.psql(&pids), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strict_reset_trusts_only_plain_statements_and_never_reuse_trusts_none() {
    let database = Database::create();
    let start = async |mode: &str| {
        let engine = format!("pool_size = 1\nmax_overflow = 0\npool_reset = {mode:?}");
        Broker::start_with(&database, &engine, "").await
    };
    let strict = start("strict").await;
    let session = strict.session().await;
    let first = pid(&session).await;
    assert_eq!(pid(&session).await, first);
    for trace in ["SET work_mem = '1MB'", "CREATE TABLE copied AS SELECT 1 AS n", "SELECT 1 AS n INTO again"] {
        let before = pid(&session).await;
        session.execute_and_commit(trace).await.unwrap();
        assert_ne!(pid(&session).await, before, "{trace}");
    }

    let never = start("never-reuse").await;
    let session = never.session().await;
    let first = pid(&session).await;
    assert_ne!(pid(&session).await, first);
}

const PREPARED: &str = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%cached%' AND NOT from_sql";

#[tokio::test(flavor = "multi_thread")]
async fn statements_stay_prepared_across_sessions_up_to_the_cache_size() {
    let database = Database::create();
    let engine = "pool_size = 1\nmax_overflow = 0\nstatement_cache_size = 2";
    let broker = Broker::start_with(&database, engine, "").await;
    let prepared = async || {
        let session = broker.session().await;
        first_row(&session.execute_and_commit(PREPARED).await.unwrap())
    };
    for (n, kept) in [(1, 1), (1, 1), (2, 1), (3, 1)] {
        broker.session().await.execute_and_commit(&format!("SELECT {n} AS cached")).await.unwrap();
        // The look itself takes one of the two places, and is counted.
        assert_eq!(prepared().await, [int(kept + 1)], "after {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_table_is_prepared_for_anew() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = broker.session().await;
    let count =
        async |session: &Session| session.execute_and_commit("SELECT * FROM accounts").await.unwrap().columns.len();
    assert_eq!(count(&session).await, 2);
    database.psql("ALTER TABLE accounts ADD COLUMN note text");
    assert_eq!(count(&session).await, 3);
    // In mid-transaction it cannot be made good; the transaction is to be tried again.
    session.execute("SELECT 1").await.unwrap();
    database.psql("ALTER TABLE accounts ADD COLUMN more text");
    let stale = session.execute("SELECT * FROM accounts").await.unwrap_err();
    assert_eq!((stale.code, stale.reason.as_str()), (Code::Aborted, "STALE_PLAN"));
    assert_eq!(stale.advice, pb::retry_advice::Scope::Transaction);
    session.rollback().await.unwrap();
    assert_eq!(count(&session).await, 4);
    // What is changed through the broker is known, and prepared for anew in time.
    session.execute_and_commit("ALTER TABLE accounts DROP COLUMN more").await.unwrap();
    session.execute("SELECT 1").await.unwrap();
    assert_eq!(session.execute("SELECT * FROM accounts").await.unwrap().columns.len(), 3);
    session.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_prepared_amid_anothers_temporary_tables_and_path_works_for_the_next() {
    let database = Database::create();
    database.psql(
        "CREATE SCHEMA other AUTHORIZATION broker; CREATE TABLE other.accounts (id text); \
         ALTER TABLE other.accounts OWNER TO broker",
    );
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let sql = "SELECT count(*) FROM accounts WHERE id = $1";
    for before in ["CREATE TEMP TABLE accounts (id text)", "SELECT set_config('search_path', 'other', false)"] {
        let leaver = broker.session().await;
        leaver.execute(before).await.unwrap();
        leaver.run(leaver.statement(sql, vec![text("x")])).await.unwrap();
        leaver.commit().await.unwrap();
        let next = broker.session().await;
        let found = next.run(next.statement(sql, vec![text("1")])).await.unwrap();
        assert_eq!(first_row(&found), [int(1)], "after {before}");
        next.commit().await.unwrap();
    }
}

/// Runs a statement in a transaction of its own. Returns the backend, and whether its connection was kept.
async fn visit(engine: &PostgresEngine, principal: &str, sql: &str) -> (i32, Option<Discard>) {
    let mut connection = engine.checkout(&Principal::new(principal), &Arc::default()).await.unwrap();
    let work = Work::Statements([Statement::new(sql.into(), Vec::new()).unwrap()].into(), ResultFormat::Values);
    let limits = ResultLimits { rows_max: 10, bytes_max: 1000, value_bytes_max: 1000 };
    connection.execute(Some(&TransactionOptions::default()), &work, limits, None).await.unwrap();
    assert!(matches!(connection.commit().await, CommitVerdict::Committed));
    (connection.backend_pid(), connection.release().await)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_function_prepares_unseen_is_for_no_other_principal() {
    let database = Database::create();
    database.psql(
        "CREATE FUNCTION leave() RETURNS void LANGUAGE plpgsql AS \
         $$ BEGIN EXECUTE 'PREPARE left_behind AS SELECT 1'; END $$",
    );
    let config = config(&[
        ("ENGINES__MAIN__URL", &database.url()),
        ("ENGINES__MAIN__POOL_SIZE", "1"),
        ("ENGINES__MAIN__MAX_OVERFLOW", "0"),
    ]);
    let engine = config.engines["main"].clone();
    let engine = PostgresEngine::new("main".into(), engine.connect, engine.pool, BTreeSet::new(), None);
    let (first, kept) = visit(&engine, "billing", "SELECT leave()").await;
    assert_eq!(kept, None);
    // As long as there is only one.
    assert_eq!(visit(&engine, "billing", "SELECT 1").await, (first, None));
    let (second, kept) = visit(&engine, "shipping", "SELECT 1").await;
    assert_eq!((second == first, kept), (false, None));
    assert_eq!(visit(&engine, "billing", "SELECT leave()").await, (second, Some(Discard::Unclean)));
    // What is seen is not left to anybody.
    let database = Database::create();
    let seen = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = seen.session().await;
    session.execute("PREPARE left_behind AS SELECT 1").await.unwrap();
    let before = pid_in_transaction(&session).await;
    session.commit().await.unwrap();
    assert_ne!(pid(&session).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_drops_unseen_what_is_prepared_fails_nobody() {
    let database = Database::create();
    database.psql(
        "CREATE FUNCTION forget() RETURNS int LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DEALLOCATE ALL'; RETURN 1; END $$",
    );
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = broker.session().await;
    for _ in 0..3 {
        let before = pid(&session).await;
        // The transaction's id is known by then, and nothing else is asked with what is prepared.
        session.execute("UPDATE accounts SET balance = balance WHERE id = 1").await.unwrap();
        session.execute("SELECT forget()").await.unwrap();
        session.commit().await.unwrap();
        assert_eq!(pid(&session).await, before);
        assert_ne!(pid(&session).await, before);
        assert_eq!(first_row(&session.execute_and_commit("SELECT forget()").await.unwrap()), [int(1)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reset_runs_no_code_of_callers() {
    let database = Database::create();
    database.psql("CREATE TABLE ran (by text); GRANT ALL ON ran TO PUBLIC; GRANT CREATE ON SCHEMA public TO PUBLIC");
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = broker.session().await;
    for (left, right) in [("int4", "numeric"), ("float8", "numeric"), ("int4", "float8"), ("float8", "int4")] {
        let trap = format!(
            "CREATE FUNCTION trap({left}, {right}) RETURNS float8 LANGUAGE plpgsql AS \
             $$ BEGIN INSERT INTO ran VALUES (current_user); RETURN 0; END $$"
        );
        session.execute(&trap).await.unwrap();
        let operator = format!("CREATE OPERATOR / (FUNCTION = trap, LEFTARG = {left}, RIGHTARG = {right})");
        // Where PostgreSQL has one of its own already, it comes first.
        session.execute(&operator).await.unwrap();
    }
    session.commit().await.unwrap();
    broker.session().await.execute_and_commit("SELECT 1").await.unwrap();
    assert_eq!(database.psql("SELECT count(*) FROM ran"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_fails_keeps_nobody_from_connections_that_are_there() {
    let server = crate::support::Server::start();
    let engine = "pool_size = 3\nmax_overflow = 0\npool_timeout = \"5s\"";
    let broker = Broker::start_at(&server.postgres.url("sample"), engine, "").await;
    let (one, two) = (broker.session().await, broker.session().await);
    one.execute("SELECT 1").await.unwrap();
    server.psql("ALTER ROLE broker PASSWORD 'changed'");
    let refused = two.execute("SELECT 1").await.unwrap_err();
    assert_eq!(refused.metadata["sqlstate"], "28P01");
    one.commit().await.unwrap();
    until_pool(&one, |pool| pool.idle == 1).await;
    two.execute("SELECT 1").await.unwrap();
}

fn connect(options: pb::ConnectOptions) -> pb::BeginSessionRequest {
    pb::BeginSessionRequest { connect_options: Some(options), ..Default::default() }
}

const OVERRIDABLE: &str = "overridable = [\"application_name\", \"search_path\", \"time_zone\", \"database\", \
     \"client_connection_check_interval\", \"idle_in_transaction_session_timeout\", \"server_settings.work_mem\"]";

#[tokio::test(flavor = "multi_thread")]
async fn callers_change_what_is_theirs_to_change() {
    let database = Database::create();
    let broker = Broker::start_with(&database, OVERRIDABLE, "").await;
    let session = broker
        .session_with(connect(pb::ConnectOptions {
            application_name: Some("billing".into()),
            search_path: vec!["a b".into(), "c\"d".into()],
            time_zone: Some("Europe/Vienna".into()),
            client_connection_check_interval: crate::support::millis(800),
            idle_in_transaction_session_timeout: crate::support::seconds(20),
            database: Some("postgres".into()),
            server_settings: [("work_mem".to_owned(), "5MB".to_owned())].into(),
            ..Default::default()
        }))
        .await;
    let shown = "SELECT current_setting('application_name'), current_setting('search_path'), current_setting('TimeZone'), \
         current_setting('client_connection_check_interval'), current_setting('idle_in_transaction_session_timeout'), current_setting('work_mem'), \
         current_database()::text";
    for _ in 0..2 {
        let row = first_row(&session.execute_and_commit(shown).await.unwrap());
        let expected = ["billing", "\"a b\", \"c\"\"d\"", "Europe/Vienna", "800ms", "20s", "5MB", "postgres"];
        assert_eq!(row, expected.map(text));
    }
    assert_eq!(session.get().await.unwrap().database, "postgres");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_a_callers_to_change_is_refused_by_name() {
    let database = Database::create();
    let broker = Broker::start_with(&database, OVERRIDABLE, "").await;
    let settings = |name: &str, value: &str| pb::ConnectOptions {
        server_settings: [(name.to_owned(), value.to_owned())].into(),
        ..Default::default()
    };
    let long = "x".repeat(64);
    for (options, field) in [
        (pb::ConnectOptions { user: Some("postgres".into()), ..Default::default() }, "user"),
        (pb::ConnectOptions { ssl_mode: pb::SslMode::Disable.into(), ..Default::default() }, "ssl_mode"),
        (pb::ConnectOptions { ssl_mode: 99, ..Default::default() }, "ssl_mode"),
        (pb::ConnectOptions { keepalives: Some(pb::Keepalives::default()), ..Default::default() }, "keepalives"),
        (pb::ConnectOptions { application_name: Some(long.clone()), ..Default::default() }, "application_name"),
        (pb::ConnectOptions { time_zone: Some("a\0b".into()), ..Default::default() }, "time_zone"),
        (pb::ConnectOptions { search_path: vec![String::new()], ..Default::default() }, "search_path"),
        (
            pb::ConnectOptions {
                client_connection_check_interval: crate::support::seconds(90_000),
                ..Default::default()
            },
            "client_connection_check_interval",
        ),
        (settings("session_authorization", "postgres"), "server_settings.session_authorization"),
        (settings("search_path", "x"), "server_settings.search_path"),
        (settings("work_mem -c x", "1MB"), "server_settings.work_mem -c x"),
    ] {
        let refused = Failure::from(broker.client().begin_session(connect(options)).await.unwrap_err());
        let field = format!("connect_options.{field}");
        assert_eq!((refused.code, refused.field), (Code::InvalidArgument, Some(field)));
    }
    // Values cannot smuggle in other options, whatever PostgreSQL may take for white space.
    for space in ['\t', '\n', '\x0b', '\x0c', '\r'] {
        let options = settings("work_mem", &format!("4MB{space}-c{space}work_mem=77MB"));
        assert!(broker.client().begin_session(connect(options)).await.is_err());
    }
    for options in [
        pb::ConnectOptions { application_name: Some("x -c work_mem=77MB".into()), ..Default::default() },
        pb::ConnectOptions { search_path: vec!["x\" -c work_mem=77MB".into()], ..Default::default() },
        settings("work_mem", "4MB -c work_mem=77MB"),
    ] {
        let session = broker.session_with(connect(options)).await;
        match session.execute("SELECT current_setting('work_mem')").await {
            Ok(result) => assert_eq!(first_row(&result), [text("4MB")]),
            Err(refused) => assert_eq!(refused.metadata["sqlstate"], "22023"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn combinations_of_options_share_the_engines_total_and_are_bounded() {
    let database = Database::create();
    let engine =
        format!("pool_size = 2\nmax_overflow = 0\nsub_pools_max = 2\npool_idle_timeout = \"100ms\"\n{OVERRIDABLE}");
    let broker = Broker::start_with(&database, &engine, "").await;
    let named = |name: &str| connect(pb::ConnectOptions { application_name: Some(name.into()), ..Default::default() });
    let plain = broker.session().await;
    for round in 0..3 {
        for name in ["one", "two", "three"] {
            let session = broker.session_with(named(name)).await;
            let row =
                first_row(&session.execute_and_commit("SELECT current_setting('application_name')").await.unwrap());
            assert_eq!(row, [text(name)], "round {round}");
            plain.execute_and_commit("SELECT 1").await.unwrap();
            assert!(pool(&plain).await.open <= 2);
        }
    }
    let (one, two) = (broker.session_with(named("one")).await, broker.session_with(named("two")).await);
    one.execute("SELECT 1").await.unwrap();
    two.execute("SELECT 1").await.unwrap();
    one.commit().await.unwrap();
    two.commit().await.unwrap();
    // Unused, they are closed and forgotten; the engine's own stays.
    until_pool(&plain, |pool| pool.sub_pools == 1 && pool.open == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_cancelled_by_a_callers_own_timeout_costs_no_connection() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for _ in 0..3 {
        session.execute("SET LOCAL statement_timeout = 20").await.unwrap();
        let stopped = session.execute("SELECT pg_sleep(10)").await.unwrap_err();
        assert_eq!(stopped.metadata["sqlstate"], "57014");
        session.rollback().await.unwrap();
        until(async || session.get().await.unwrap().pool.unwrap().in_use == 0).await;
    }
    assert_eq!(session.get().await.unwrap().pool.unwrap().opened, 1);
}
