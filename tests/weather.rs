//! Bad weather: servers that restart, are full, refuse, change their role, or speak nonsense.

use std::collections::BTreeMap;
use std::time::Duration;

use session_broker::grpc::pb;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tonic::Code;

use crate::proxy::Proxy;
use crate::support::{Broker, Database, Failure, Server, Standby, until, wait_until};
use pb::TransactionState;

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_under_idle_connections_is_not_seen_by_new_sessions() {
    let mut server = Server::start();
    let broker = Broker::start_at(&server.postgres.url("sample"), "", "").await;
    let sessions = [broker.session().await, broker.session().await, broker.session().await];
    for session in &sessions {
        session.execute("SELECT 1").await.unwrap();
    }
    for session in &sessions {
        session.commit().await.unwrap();
    }
    server.postgres.restart().unwrap();
    for _ in 0..3 {
        broker.session().await.execute("SELECT 1").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_logins_have_codes_of_their_own_and_are_not_repeated_in_vain() {
    let server = Server::start();
    let url = server.postgres.url("sample");
    let refused = async |url: String| {
        let broker = Broker::start_at(&url, "", "").await;
        let session = broker.session().await;
        let failure = session.execute("SELECT 1").await.unwrap_err();
        assert_eq!(failure.transaction_state(), TransactionState::None);
        (failure, session.get().await.unwrap().pool.unwrap().login_failures)
    };
    let (password, attempts) = refused(url.replace(&server.password, "wrong")).await;
    assert_eq!((password.code, password.metadata["sqlstate"].as_str()), (Code::PermissionDenied, "28P01"));
    assert_eq!(attempts, 1);
    let (database, attempts) = refused(url.replace("/sample", "/nowhere")).await;
    assert_eq!((database.code, database.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "3D000"));
    assert_eq!(attempts, 1);
    server.psql("ALTER ROLE broker CONNECTION LIMIT 0");
    let (full, attempts) = refused(url).await;
    assert_eq!((full.code, full.metadata["sqlstate"].as_str()), (Code::ResourceExhausted, "53300"));
    assert!((2..=5).contains(&attempts), "{attempts}");
    assert!(full.retry_info);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_is_waited_for() {
    let server = Server::start();
    server.psql("ALTER ROLE broker CONNECTION LIMIT 0");
    let broker = Broker::start_at(&server.postgres.url("sample"), "pool_timeout = \"10s\"", "").await;
    let session = broker.session().await;
    let waiting = tokio::spawn({
        let session = session.clone();
        async move { session.execute("SELECT 1").await }
    });
    until(async || session.get().await.unwrap().pool.unwrap().login_failures > 0).await;
    server.psql("ALTER ROLE broker CONNECTION LIMIT -1");
    waiting.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_a_server_that_takes_no_writes_any_more_is_retired_at_checkout() {
    let server = Server::start();
    let broker = Broker::start_at(&server.postgres.url("sample"), "target_session_attrs = \"read-write\"", "").await;
    let session = broker.session().await;
    session.execute_and_commit("UPDATE accounts SET balance = 1").await.unwrap();
    let read_only = |on: &str| {
        server.psql(&format!("ALTER SYSTEM SET default_transaction_read_only = {on}"));
        server.psql("SELECT pg_reload_conf()");
        wait_until(|| server.psql("SHOW default_transaction_read_only") == on);
    };
    read_only("on");
    let refused = session.execute("UPDATE accounts SET balance = 2").await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::Unavailable, "ENGINE_UNREACHABLE"));
    read_only("off");
    session.execute_and_commit("UPDATE accounts SET balance = 2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_follow_the_primary_to_another_server() {
    let primary = Server::start();
    let standby = Standby::start(&primary);
    let url = format!(
        "postgresql://broker:{}@127.0.0.1:{},127.0.0.1:{}/sample",
        primary.password, primary.port, standby.port
    );
    let start = async |attrs: &str| Broker::start_at(&url, &format!("target_session_attrs = {attrs:?}"), "").await;
    let place = |port: &str| format!("127.0.0.1:{port}");
    for attrs in ["standby", "prefer-standby", "read-only"] {
        let broker = start(attrs).await;
        let session = broker.session().await;
        let refused = session.execute("UPDATE accounts SET balance = 7").await.unwrap_err();
        assert_eq!(refused.metadata["sqlstate"], "25006", "{attrs}");
        assert_eq!(session.get().await.unwrap().host, place(&standby.port), "{attrs}");
    }
    let broker = start("read-write").await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    assert_eq!(session.get().await.unwrap().host, place(&primary.port));
    session.commit().await.unwrap();
    drop(primary);
    let between = session.execute("UPDATE accounts SET balance = 8").await.unwrap_err();
    assert_eq!((between.code, between.reason.as_str()), (Code::Unavailable, "ENGINE_UNREACHABLE"));
    assert_eq!(standby.psql("SELECT pg_promote()"), "t");
    let session = broker.session().await;
    while let Err(failure) = session.execute("UPDATE accounts SET balance = 9").await {
        // The last failed login is still fresh.
        assert_eq!(failure.reason, "ENGINE_UNREACHABLE", "{failure:?}");
    }
    assert_eq!(session.get().await.unwrap().host, place(&standby.port));
    session.commit().await.unwrap();
    assert_eq!(standby.psql("SELECT DISTINCT balance::int FROM accounts"), "9");
}

/// A server that answers a login with `reply` and then says nothing more.
async fn at_login(reply: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut callers = Vec::new();
        loop {
            let (mut caller, _) = listener.accept().await.unwrap();
            let mut asked = [0; 4096];
            let _ = caller.read(&mut asked).await;
            let _ = caller.write_all(&reply).await;
            callers.push(caller);
        }
    });
    format!("postgresql://u:p@127.0.0.1:{port}/db")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_silent_after_asking_for_the_password_costs_the_connect_timeout() {
    // It asks for SCRAM-SHA-256, and never goes on.
    let sasl = message(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0");
    let broker = Broker::start_at(&at_login(sasl).await, "connect_timeout = \"200ms\"", "").await;
    let failure = broker.session().await.execute("SELECT 1").await.unwrap_err();
    assert_eq!(failure.reason, "ENGINE_UNREACHABLE");
    assert!(failure.message.contains("connect_timeout of 200ms"), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_starts_up_is_asked_again_a_few_times() {
    let starting = message(b'E', b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0");
    let broker = Broker::start_at(&at_login(starting).await, "", "").await;
    let session = broker.session().await;
    let failure = session.execute("SELECT 1").await.unwrap_err();
    assert_eq!(failure.code, Code::Unavailable);
    assert!(failure.message.contains("starting up"), "{failure:?}");
    let attempts = session.get().await.unwrap().pool.unwrap().login_failures;
    assert!((2..=5).contains(&attempts), "{attempts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_of_a_server_that_starts_up_do_not_storm_it() {
    const CALLERS: u64 = 15;
    let starting = message(b'E', b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0");
    let broker = Broker::start_at(&at_login(starting).await, "", "").await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..CALLERS {
        let session = broker.session().await;
        callers.spawn(async move { session.execute("SELECT 1").await.unwrap_err().code });
    }
    assert!(callers.join_all().await.into_iter().all(|code| code == Code::Unavailable));
    // All may try at once before the first has failed; then there are half a dozen pauses, and a few tries after each.
    let attempts = broker.session().await.get().await.unwrap().pool.unwrap().login_failures;
    assert!((2..=3 * CALLERS).contains(&attempts), "{attempts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooled_connection_that_went_silent_is_replaced() {
    let server = Server::start();
    let proxy = Proxy::start(&server.postgres.url("sample"), Duration::ZERO).await;
    let broker = Broker::start_at(&proxy.url, "pool_pre_ping_after = \"0s\"", "").await;
    let session = broker.session().await;
    session.execute_and_commit("SELECT 1").await.unwrap();
    until(async || session.get().await.unwrap().pool.unwrap().idle > 0).await;
    proxy.silence();
    session.execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_between_two_messages_of_a_statement_stops_it_all_the_same() {
    let server = Server::start();
    // PostgreSQL ignores a cancel that comes while it waits for the statement's next message.
    let proxy = Proxy::start(&server.postgres.url("sample"), Duration::from_millis(10)).await;
    let broker = Broker::start_at(&proxy.url, "statement_cache_size = 0", "").await;
    let session = broker.session().await;
    for timeout in (10..70).step_by(4) {
        session.execute("SELECT 1").await.unwrap();
        let request = pb::ExecuteRequest {
            timeout: crate::support::millis(timeout),
            ..session.statement("SELECT pg_sleep(60)", vec![])
        };
        let stopped = session.run(request).await.unwrap_err();
        assert_eq!(
            (stopped.code, stopped.reason.as_str()),
            (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"),
            "{timeout} ms"
        );
        session.rollback().await.unwrap();
    }
}

/// Messages as PostgreSQL frames them.
fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[tag], length.to_be_bytes().as_slice(), body].concat()
}

/// A server that lets everyone in and then says `nonsense`, endlessly or once, to whatever it is asked.
async fn hostile(nonsense: Vec<u8>, endless: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let welcome = [
        message(b'R', &0_u32.to_be_bytes()),
        message(b'S', b"server_version\x0015\0"),
        message(b'K', &[0, 0, 0, 1, 0, 0, 0, 2]),
        message(b'Z', b"I"),
    ]
    .concat();
    tokio::spawn(async move {
        loop {
            let (mut caller, _) = listener.accept().await.unwrap();
            let (welcome, nonsense) = (welcome.clone(), nonsense.clone());
            tokio::spawn(async move {
                let mut asked = [0; 4096];
                if caller.read(&mut asked).await.is_err() || caller.write_all(&welcome).await.is_err() {
                    return;
                }
                while caller.read(&mut asked).await.is_ok_and(|count| count > 0) {
                    while caller.write_all(&nonsense).await.is_ok() && endless {}
                }
            });
        }
    });
    format!("postgresql://u@127.0.0.1:{port}/db")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_nonsense_ends_its_session_only() {
    let error_without_sqlstate = message(b'E', b"SERROR\0Mno code\0\0");
    let short_row = [
        message(b'1', b""),
        message(b't', &[0, 0]),
        message(b'T', b"\0\x01x\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0"),
        message(b'Z', b"T"),
        message(b'2', b""),
        message(b'D', &[0, 9, 0, 0]),
    ]
    .concat();
    let notice = message(b'N', b"SNOTICE\0VNOTICE\0C00000\0Mlong\0\0");
    let starting = message(b'E', b"SFATAL\0VFATAL\0C57P03\0Mstarting up\0\0");
    for (nonsense, endless) in [
        (error_without_sqlstate, false),
        (short_row, false),
        (notice, true),
        (starting, false),
        (b"\xff\xff\xff\xff\xff\xff".to_vec(), false),
    ] {
        let broker = Broker::start_at(&hostile(nonsense.clone(), endless).await, "", "").await;
        let session = broker.session().await;
        let request =
            pb::ExecuteRequest { timeout: crate::support::seconds(1), ..session.statement("SELECT 1", vec![]) };
        let failure: Failure = session.run(request).await.unwrap_err();
        let typed = [Code::Unavailable, Code::Aborted, Code::DeadlineExceeded];
        assert!(typed.contains(&failure.code), "{nonsense:?}: {failure:?}");
        // The broker lives, and so do its other sessions.
        broker.session().await.keep_alive().await.unwrap();
    }
}

/// Callers that do what they can on a database that restarts, for `SOAK_SECONDS` (5 unless set), every
/// `SOAK_RESTART_SECONDS` (2).
#[tokio::test(flavor = "multi_thread")]
async fn the_pool_is_whole_after_a_database_that_restarted_under_many_callers() {
    const CALLERS: usize = 64;
    let seconds = |name: &str, default: u64| {
        Duration::from_secs(std::env::var(name).map_or(default, |text| text.parse().unwrap()))
    };
    let (run, pause) = (seconds("SOAK_SECONDS", 5), seconds("SOAK_RESTART_SECONDS", 2));
    let mut server = Server::start();
    let broker = Broker::start_at(&server.postgres.url("sample"), "", "").await;
    let until = Instant::now() + run;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..CALLERS {
        let client = broker.client();
        callers.spawn(async move {
            let mut heard = BTreeMap::<String, u64>::new();
            while Instant::now() < until {
                let session = crate::support::Session::begin(client.clone(), pb::BeginSessionRequest::default()).await;
                let session = session.unwrap();
                let work = async {
                    session.execute("SELECT * FROM accounts").await?;
                    session.execute("UPDATE accounts SET balance = balance + 1 WHERE id = 1").await?;
                    session.commit().await
                };
                let said = match work.await {
                    Ok(_) => "committed".to_owned(),
                    Err(failure) => format!("{:?} {}", failure.code, failure.reason),
                };
                *heard.entry(said).or_default() += 1;
                session.close().await.unwrap();
            }
            heard
        });
    }
    let mut restarts = 0;
    while Instant::now() + pause < until {
        tokio::time::sleep(pause).await;
        server.postgres.restart().unwrap();
        restarts += 1;
    }
    let mut heard = BTreeMap::<String, u64>::new();
    for (said, times) in callers.join_all().await.into_iter().flatten() {
        *heard.entry(said).or_default() += times;
    }
    // Nobody hears of a defect, and most work is done.
    let expected = ["committed", "Aborted", "Unavailable", "ResourceExhausted", "Unknown"];
    assert!(heard.keys().all(|said| expected.iter().any(|known| said.starts_with(known))), "{heard:?}");
    let session = broker.session().await;
    let mut pool = session.get().await.unwrap().pool.unwrap();
    while pool.in_use > 0 {
        pool = session.get().await.unwrap().pool.unwrap();
    }
    assert_eq!(pool.waiting, 0);
    assert!(pool.open <= pool.size + pool.overflow_max, "{pool:?}");
    let connections = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'broker'";
    wait_until(|| server.psql(connections) == pool.open.to_string());
    let committed = heard.get("committed").copied().unwrap_or_default();
    // A commit whose answer was lost may have happened.
    let unknown = heard.iter().filter(|(said, _)| said.starts_with("Unknown")).map(|(_, times)| times).sum::<u64>();
    let written = server.psql("SELECT (balance - 100)::int8 FROM accounts WHERE id = 1").parse().unwrap();
    assert!((committed..=committed + unknown).contains(&written), "{written} written, {heard:?}");
    let report = format!("{restarts} restarts, {heard:?}, {pool:?}\n");
    let _ = std::io::Write::write_all(&mut std::io::stderr(), report.as_bytes());
    assert!(committed > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_a_server_says_where_it_looked() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let database = Database::create();
    let url = database.url();
    let real = url.split('@').nth(1).unwrap().split('/').next().unwrap();
    let broker = Broker::start_at(&url.replace(real, &nobody.to_string()), "", "").await;
    let failure = broker.session().await.execute("SELECT 1").await.unwrap_err();
    assert_eq!(failure.reason, "ENGINE_UNREACHABLE");
    assert!(failure.message.contains(&nobody.to_string()), "{failure:?}");
}
