//! Commits whose answer is lost, between PostgreSQL and the broker or with the broker itself: nobody is told what is
//! not so, and whoever has the commit token hears the truth from any broker.

use std::process::Command;
use std::time::Duration;

use session_broker::grpc::pb;
use tonic::{Code, Status};

use crate::command_line::Program;
use crate::proxy::{AtCommit, Proxy};
use crate::support::{
    Broker, Database, Failure, Server, Session, Standby, first_row, int, millis, seconds, text, until, wait_until,
};
use pb::{EndReason, Outcome, TransactionState, UnknownReason, retry_advice::Scope};

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";

/// How many of the database's backends sleep.
const SLEEPING: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";

/// A session whose connections to the database go through a proxy.
struct Lost {
    database: Database,
    proxy: Proxy,
    /// Kept, or it would stop.
    _broker: Broker,
    session: Session,
}

impl Lost {
    async fn start() -> Self {
        let database = Database::create();
        let proxy = Proxy::start(&database.url(), Duration::ZERO).await;
        let broker = Broker::start_at(&proxy.url, "", "").await;
        let session = broker.session().await;
        Self { database, proxy, _broker: broker, session }
    }
}

/// Commits on behalf of a caller that waits no longer than that.
pub(crate) async fn commit_within(session: &Session, patience: Duration) -> Result<pb::CommitResponse, Status> {
    let mut request = tonic::Request::new(pb::CommitRequest { session_token: session.token.clone() });
    request.set_timeout(patience);
    Ok(session.client.clone().commit(request).await?.into_inner())
}

/// Asks what became of a transaction until it is over.
pub(crate) async fn resolved(broker: &Broker, commit_token: &str) -> pb::ResolveCommitResponse {
    // Each waits two seconds.
    for _ in 0..10 {
        let answer = broker.resolve(commit_token).await.unwrap();
        if answer.outcome() != Outcome::InProgress {
            return answer;
        }
    }
    panic!("a transaction that nobody runs any more stays in progress");
}

/// Asks what became of a transaction, waiting so long while it is in progress.
async fn resolve_within(
    broker: &Broker,
    commit_token: &str,
    wait: Option<prost_types::Duration>,
) -> Result<pb::ResolveCommitResponse, Failure> {
    let request = pb::ResolveCommitRequest { commit_token: commit_token.into(), wait };
    Ok(broker.client().resolve_commit(request).await?.into_inner())
}

/// A transaction that has written, its id and its commit token.
async fn write(session: &Session) -> (u64, String) {
    let state = session.execute(UPDATE).await.unwrap().state.unwrap();
    assert_eq!(state.transaction_state(), TransactionState::Open);
    (state.transaction_id, state.commit_token)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_has_a_commit_token_from_its_first_write_on() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let none = (0, String::new());
    let read = session.execute("SELECT * FROM accounts").await.unwrap().state.unwrap();
    assert_eq!((read.transaction_id, read.commit_token), none);
    let (id, token) = write(&session).await;
    assert!(!token.is_empty());
    let asked = session.execute("SELECT pg_current_xact_id_if_assigned()::text").await.unwrap();
    assert_eq!(first_row(&asked), [text(&id.to_string())]);
    let state = session.get().await.unwrap().state.unwrap();
    assert_eq!((state.transaction_id, state.commit_token.is_empty()), (id, false));
    let committed = session.commit().await.unwrap();
    assert_eq!((committed.transaction_id, committed.commit_token.is_empty()), (id, false));
    let state = committed.state.unwrap();
    assert_eq!((state.transaction_id, state.commit_token), none);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_was_lost_is_asked_about_and_reported_committed() {
    let lost = Lost::start().await;
    let (id, _) = write(&lost.session).await;
    lost.proxy.at_next_commit(AtCommit::CutAfter);
    // Repeated, it says the same, and after the session has ended still.
    for round in 0..3 {
        let committed = lost.session.commit().await.unwrap();
        assert_eq!((committed.outcome(), committed.transaction_id), (Outcome::Committed, id));
        assert_eq!(lost.database.balances(), "7 100");
        if round == 1 {
            assert_eq!(lost.session.close().await.unwrap(), EndReason::Closed);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_never_arrived_is_asked_about_and_reported_rolled_back() {
    let lost = Lost::start().await;
    write(&lost.session).await;
    lost.proxy.at_next_commit(AtCommit::CutBefore);
    for _ in 0..2 {
        let failed = lost.session.commit().await.unwrap_err();
        assert_eq!((failed.code, failed.reason.as_str()), (Code::Aborted, "COMMIT_ROLLED_BACK"), "{failed:?}");
        assert_eq!(failed.advice, Scope::Transaction);
        assert_eq!(failed.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
        assert_eq!(failed.transaction_state(), TransactionState::None);
    }
    assert_eq!((lost.database.balances().as_str(), lost.database.open_transactions().as_str()), ("100 100", "0"));
    lost.session.rollback().await.unwrap();
    assert_eq!(lost.session.close().await.unwrap(), EndReason::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_commit_of_a_transaction_that_only_read_has_lost_nothing() {
    for cut in [AtCommit::CutBefore, AtCommit::CutAfter] {
        let lost = Lost::start().await;
        lost.session.execute("SELECT * FROM accounts").await.unwrap();
        lost.proxy.at_next_commit(cut);
        for _ in 0..2 {
            let committed = lost.session.commit().await.unwrap();
            assert_eq!((committed.outcome(), committed.transaction_id), (Outcome::NothingWritten, 0), "{cut:?}");
        }
        lost.session.execute_and_commit(UPDATE).await.unwrap();
        assert_eq!(lost.database.balances(), "7 100");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_waits_for_a_lost_commit_is_ended_and_its_locks_are_freed() {
    let lost = Lost::start().await;
    write(&lost.session).await;
    lost.proxy.at_next_commit(AtCommit::Strand);
    let failed = lost.session.commit().await.unwrap_err();
    assert_eq!((failed.code, failed.reason.as_str()), (Code::Aborted, "COMMIT_ROLLED_BACK"), "{failed:?}");
    assert_eq!((lost.database.balances().as_str(), lost.database.open_transactions().as_str()), ("100 100", "0"));
    lost.session.execute_and_commit(UPDATE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_commit_that_may_act_without_an_id_is_unknown() {
    let hold = "DECLARE c CURSOR WITH HOLD FOR SELECT 1";
    for sql in ["SELECT pg_notify('news', 'x')", "NOTIFY news", hold] {
        let lost = Lost::start().await;
        lost.session.execute(sql).await.unwrap();
        lost.proxy.at_next_commit(AtCommit::CutBefore);
        let failed = lost.session.commit().await.unwrap_err();
        assert_eq!((failed.code, failed.reason.as_str()), (Code::Unknown, "COMMIT_UNKNOWN"), "{sql}: {failed:?}");
        assert_eq!(failed.commit.unwrap().commit_token, "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_under_way_when_its_session_ends_is_unknown_until_it_is_through() {
    let database = Database::create();
    database.doze_at_commit(3);
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let (id, _) = write(&session).await;
    let first = tokio::spawn({
        let session = session.clone();
        async move { session.commit().await }
    });
    database.wait_for(SLEEPING, "1");
    // The drain's grace is one second.
    broker.begin_stop();
    session.ended().await;
    let failed = session.commit().await.unwrap_err();
    assert_eq!((failed.code, failed.reason.as_str()), (Code::Unknown, "COMMIT_UNKNOWN"), "{failed:?}");
    assert_eq!(failed.commit.unwrap().transaction_id, id);
    assert_eq!(first.await.unwrap().unwrap().outcome(), Outcome::Committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_commit_was_lost_says_what_became_of_it() {
    let database = Database::create();
    let proxy = Proxy::start(&database.url(), Duration::ZERO).await;
    let broker = Broker::start_at(&proxy.url, "", "").await;
    let statements = vec![pb::RunStatement {
        sql: "UPDATE accounts SET balance = balance + 1 WHERE id = 1".into(),
        ..Default::default()
    }];
    for key in ["", "k"] {
        let run = pb::RunRequest { statements: statements.clone(), idempotency_key: key.into(), ..Default::default() };
        proxy.at_next_commit(AtCommit::CutBefore);
        let failed = broker.run(run.clone()).await.unwrap_err();
        assert_eq!((failed.code, failed.reason.as_str()), (Code::Aborted, "COMMIT_ROLLED_BACK"), "{failed:?}");
        proxy.at_next_commit(AtCommit::CutAfter);
        let ran = broker.run(run).await.unwrap();
        assert_eq!((ran.commit.unwrap().outcome(), ran.replayed), (Outcome::Committed, false));
    }
    assert_eq!(database.balances(), "102 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_whose_run_was_unknown_is_asked_about_and_not_run_again() {
    for (cut, balances) in [(AtCommit::CutAfter, "101 100"), (AtCommit::CutBefore, "101 100")] {
        let database = Database::create();
        let proxy = Proxy::start(&database.url(), Duration::ZERO).await;
        let broker = Broker::start_at(&proxy.url, "", "").await;
        let sql = "UPDATE accounts SET balance = balance + 1 WHERE id = 1".to_owned();
        let statements = vec![pb::RunStatement { sql, ..Default::default() }];
        let run = pb::RunRequest { statements, idempotency_key: "k".into(), ..Default::default() };
        // The one connection there is goes with the commit.
        let session = broker.session().await;
        session.execute_and_commit("SELECT 1").await.unwrap();
        until(async || session.get().await.unwrap().pool.unwrap().in_use == 0).await;
        proxy.refuse();
        proxy.at_next_commit(cut);
        let mut request = tonic::Request::new(run.clone());
        request.set_timeout(Duration::from_secs(2));
        let unknown = Failure::from(broker.transactions().run(request).await.unwrap_err());
        assert_eq!((unknown.code, unknown.reason.as_str()), (Code::Unknown, "COMMIT_UNKNOWN"), "{unknown:?}");
        proxy.admit();
        let mut again = broker.run(run.clone()).await;
        while again.as_ref().is_err_and(|failure| failure.reason == "COMMIT_UNKNOWN") {
            // The last failed login is still fresh.
            again = broker.run(run.clone()).await;
        }
        assert_eq!(again.unwrap().replayed, cut == AtCommit::CutAfter);
        assert_eq!(database.balances(), balances, "{cut:?}");
    }
}

/// A commit that is lost at `cut` when PostgreSQL cannot be asked any more, and what another broker says of it.
async fn unknown_then(cut: AtCommit) -> (Outcome, String) {
    let lost = Lost::start().await;
    let (id, early_token) = write(&lost.session).await;
    lost.proxy.refuse();
    lost.proxy.at_next_commit(cut);
    let failed = Failure::from(commit_within(&lost.session, Duration::from_secs(2)).await.unwrap_err());
    // Nor does one that cannot begin make it known.
    assert_eq!(lost.session.execute("SELECT 1").await.unwrap_err().reason, "ENGINE_UNREACHABLE");
    let again = lost.session.commit().await.unwrap_err();
    assert_eq!(lost.session.close().await.unwrap(), EndReason::Closed);
    let after_the_end = lost.session.commit().await.unwrap_err();
    let commit = failed.commit.clone().unwrap();
    for failed in [failed, again, after_the_end] {
        assert_eq!((failed.code, failed.reason.as_str()), (Code::Unknown, "COMMIT_UNKNOWN"), "{failed:?}");
        assert_eq!(failed.advice, Scope::ResolveCommit);
        let repeated = failed.commit.unwrap();
        assert_eq!((repeated.outcome(), repeated.transaction_id), (Outcome::Unknown, id));
        assert_eq!(repeated.commit_token, commit.commit_token);
    }
    let other = Broker::start(&lost.database).await;
    let late = resolved(&other, &commit.commit_token).await;
    let early = resolved(&other, &early_token).await;
    assert_eq!((late.transaction_id, late.unknown_reason()), (id, UnknownReason::Unspecified));
    assert_eq!(early, late);
    (late.outcome(), lost.database.balances())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_nobody_could_be_asked_about_is_unknown_until_another_broker_can_ask() {
    let (before, after) = tokio::join!(unknown_then(AtCommit::CutBefore), unknown_then(AtCommit::CutAfter));
    assert_eq!(before, (Outcome::RolledBack, "100 100".to_owned()));
    assert_eq!(after, (Outcome::Committed, "7 100".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_execute_whose_commit_lost_its_answer_keeps_its_rows() {
    let lost = Lost::start().await;
    lost.proxy.at_next_commit(AtCommit::CutAfter);
    let executed = lost.session.execute_and_commit(&format!("{UPDATE} RETURNING id, balance")).await.unwrap();
    assert_eq!(first_row(&executed), [int(1), text("7")]);
    assert_eq!(executed.commit.unwrap().outcome(), Outcome::Committed);
    assert_eq!(executed.state.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(lost.database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_execute_whose_commit_never_arrived_is_rolled_back() {
    let lost = Lost::start().await;
    lost.proxy.at_next_commit(AtCommit::CutBefore);
    let failed = lost.session.execute_and_commit(UPDATE).await.unwrap_err();
    assert_eq!((failed.code, failed.reason.as_str()), (Code::Aborted, "COMMIT_ROLLED_BACK"), "{failed:?}");
    assert_eq!(failed.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
    assert_eq!(failed.transaction_state(), TransactionState::None);
    assert_eq!(lost.database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_killed_in_mid_statement_commits_nothing_and_leaves_no_backend() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let session = broker.session().await;
    // The row is updated before the sleep begins.
    let sql = format!("WITH updated AS ({UPDATE} RETURNING id) SELECT pg_sleep(60) FROM updated");
    let request = pb::ExecuteRequest { commit: true, ..session.statement(&sql, vec![]) };
    let call = tokio::spawn(async move { session.client.clone().execute(request).await });
    database.wait_for(SLEEPING, "1");
    broker.signal("KILL");
    broker.wait();
    assert!(call.await.unwrap().is_err());
    let backends = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
         AND application_name = 'session-broker'";
    database.wait_for(backends, "0");
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_was_lost_with_its_broker_is_resolved_by_another() {
    let database = Database::create();
    let proxy = Proxy::start(&database.url(), Duration::ZERO).await;
    let broker = Program::serve(&proxy.url, "");
    let session = broker.session().await;
    let (id, token) = write(&session).await;
    proxy.at_next_commit(AtCommit::Withhold);
    let call = tokio::spawn(async move { commit_within(&session, Duration::from_mins(1)).await });
    database.wait_for("SELECT balance::text FROM accounts WHERE id = 1", "7");
    broker.signal("KILL");
    broker.wait();
    assert!(call.await.unwrap().is_err());
    let answer = resolved(&Broker::start(&database).await, &token).await;
    assert_eq!((answer.outcome(), answer.transaction_id), (Outcome::Committed, id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_was_under_way_when_its_broker_was_killed_is_resolved_as_rolled_back() {
    let database = Database::create();
    database.doze_at_commit(60);
    let broker = Program::serve(&database.url(), "");
    let session = broker.session().await;
    let (_, token) = write(&session).await;
    let call = tokio::spawn(async move { commit_within(&session, Duration::from_mins(1)).await });
    database.wait_for(SLEEPING, "1");
    let other = Broker::start(&database).await;
    assert_eq!(resolve_within(&other, &token, millis(10)).await.unwrap().outcome(), Outcome::InProgress);
    broker.signal("KILL");
    broker.wait();
    assert!(call.await.unwrap().is_err());
    assert_eq!(resolved(&other, &token).await.outcome(), Outcome::RolledBack);
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_whose_result_was_given_up_is_not_committed() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // It would fail at its last row, which the broker does not wait for.
    let sql = "SELECT 1 / (100000 - n) FROM generate_series(1, 100000) AS n";
    let request = pb::ExecuteRequest { max_rows: 1, ..session.statement(sql, vec![]) };
    write(&session).await;
    let given_up = session.run(request.clone()).await.unwrap_err();
    assert_eq!((given_up.code, given_up.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
    assert_eq!(given_up.transaction_state(), TransactionState::Failed);
    let commit = session.commit().await.unwrap_err();
    assert_eq!((commit.code, commit.reason.as_str()), (Code::Aborted, "COMMIT_ROLLED_BACK"));
    assert_eq!(commit.commit.unwrap().outcome(), Outcome::RolledBack);
    write(&session).await;
    let given_up = session.run(pb::ExecuteRequest { commit: true, ..request }).await.unwrap_err();
    assert_eq!((given_up.code, given_up.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
    assert_eq!(given_up.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
    assert_eq!(given_up.transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_about_a_transaction_does_not_disturb_it_and_its_end_is_told_by_every_broker() {
    let database = Database::create();
    let (own, other) = (Broker::start(&database).await, Broker::start(&database).await);
    let session = own.session().await;
    for (ending, expected) in [("commit", Outcome::Committed), ("rollback", Outcome::RolledBack)] {
        let (id, token) = write(&session).await;
        for broker in [&own, &other] {
            let answer = resolve_within(broker, &token, millis(10)).await.unwrap();
            assert_eq!((answer.outcome(), answer.transaction_id), (Outcome::InProgress, id));
        }
        if expected == Outcome::Committed {
            assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
        } else {
            session.rollback().await.unwrap();
        }
        for broker in [&own, &other] {
            let answer = resolve_within(broker, &token, None).await.unwrap();
            assert_eq!((answer.outcome(), answer.transaction_id), (expected, id), "{ending}");
            assert_eq!(answer.unknown_reason(), UnknownReason::Unspecified);
        }
    }
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_waits_for_a_transaction_that_is_about_to_end() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let (_, token) = write(&session).await;
    let (answer, committed) = tokio::join!(resolve_within(&broker, &token, seconds(30)), session.commit());
    assert_eq!(committed.unwrap().outcome(), Outcome::Committed);
    assert_eq!(answer.unwrap().outcome(), Outcome::Committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_token_that_no_broker_made_is_refused() {
    /// The token with one character changed, into another that tokens are made of.
    fn changed(token: &str, at: usize) -> String {
        let mut bytes = token.as_bytes().to_vec();
        bytes[at] = if bytes[at] == b'b' { b'c' } else { b'b' };
        String::from_utf8(bytes).unwrap()
    }

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let (_, token) = write(&session).await;
    let length = token.len();
    let places = [0, 1, length / 4, length / 2, 3 * length / 4, length - 2, length - 1];
    let mut refused: Vec<String> = places.iter().map(|at| changed(&token, *at)).collect();
    refused.extend([&token[1..], &token[..length / 2], &token[..length - 1]].map(str::to_owned));
    refused.extend(["", " ", "x", "é\u{1}", "AAAA", "no commit token"].map(str::to_owned));
    refused.extend([format!("{token} "), format!("{token}{token}"), "b".repeat(10 * 1024)]);
    refused.push(format!("{token}{}", "b".repeat(10 * 1024)));
    refused.push(session.token.clone());
    for token in refused {
        let failure = resolve_within(&broker, &token, None).await.unwrap_err();
        let said = (failure.code, failure.reason.as_str(), failure.field.as_deref());
        assert_eq!(said, (Code::InvalidArgument, "INVALID_REQUEST", Some("commit_token")), "{token}: {failure:?}");
    }
    // Nor does a commit token open a session.
    let stranger = Session { token: token.clone(), ..session.clone() };
    assert_eq!(stranger.commit().await.unwrap_err().field.as_deref(), Some("session_token"));
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(resolved(&broker, &token).await.outcome(), Outcome::Committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_negative_malformed_or_too_long_is_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let (_, token) = write(&session).await;
    let just_over = Some(prost_types::Duration { seconds: 30, nanos: 1 });
    let malformed = Some(prost_types::Duration { seconds: 1, nanos: -5 });
    for wait in [seconds(-1), seconds(31), seconds(i64::MAX), just_over, malformed] {
        let failure = resolve_within(&broker, &token, wait).await.unwrap_err();
        let said = (failure.code, failure.reason.as_str(), failure.field.as_deref());
        assert_eq!(said, (Code::InvalidArgument, "INVALID_REQUEST", Some("wait")), "{wait:?}: {failure:?}");
    }
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(resolve_within(&broker, &token, seconds(30)).await.unwrap().outcome(), Outcome::Committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_another_cluster_is_unknown_and_says_why() {
    let server = Server::start();
    let elsewhere = Broker::start_at(&server.postgres.url("sample"), "", "").await;
    let session = elsewhere.session().await;
    let (id, token) = write(&session).await;
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    let broker = Broker::start(&Database::create()).await;
    let answer = broker.resolve(&token).await.unwrap();
    assert_eq!((answer.outcome(), answer.transaction_id), (Outcome::Unknown, id));
    assert_eq!(answer.unknown_reason(), UnknownReason::OtherCluster);
    assert_eq!(elsewhere.resolve(&token).await.unwrap().outcome(), Outcome::Committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_a_dropped_database_is_unknown_and_says_why() {
    let (dropped, other) = (Database::create(), Database::create());
    let broker = Broker::start(&dropped).await;
    let session = broker.session().await;
    let (_, token) = write(&session).await;
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    broker.stop().await;
    other.psql(&format!("DROP DATABASE {} WITH (FORCE)", dropped.name));
    let answer = Broker::start(&other).await.resolve(&token).await.unwrap();
    assert_eq!((answer.outcome(), answer.unknown_reason()), (Outcome::Unknown, UnknownReason::DatabaseDropped));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_before_a_failover_is_unknown_and_says_why() {
    let primary = Server::start();
    let broker = Broker::start_at(&primary.postgres.url("sample"), "", "").await;
    let session = broker.session().await;
    let (_, token) = write(&session).await;
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    let standby = Standby::start(&primary);
    let url = primary.postgres.url("sample").replace(&primary.port, &standby.port);
    let other = Broker::start_at(&url, "", "").await;
    let asked = async || {
        let answer = other.resolve(&token).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Unknown);
        answer.unknown_reason()
    };
    assert_eq!(asked().await, UnknownReason::InRecovery);
    assert_eq!(standby.psql("SELECT pg_promote()"), "t");
    assert_eq!(asked().await, UnknownReason::OtherTimeline);
}

/// Kills a backend the hard way, upon which PostgreSQL ends all others and recovers from what is on the disk.
fn crash(server: &Server) {
    let pid = server.psql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'background writer'");
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    wait_until(|| {
        server
            .try_psql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'background writer'")
            .is_some_and(|other| other != pid)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_no_id_that_was_given_out_again_is_taken_for_a_commit() {
    let server = Server::start();
    let broker = Broker::start_at(&server.postgres.url("sample"), "", "").await;
    let session = broker.session().await;
    let (_, durable) = write(&session).await;
    session.rollback().await.unwrap();
    server.psql("CHECKPOINT");
    // Nothing of this one reaches the disk.
    let (id, volatile) = write(&session).await;
    crash(&server);
    assert_eq!(resolved(&broker, &volatile).await.outcome(), Outcome::RolledBack);
    let another_with_the_same_id = server.psql("SELECT pg_current_xact_id()");
    assert_eq!(another_with_the_same_id, id.to_string());
    assert_eq!(server.psql(&format!("SELECT pg_xact_status('{id}')")), "committed");
    let answer = resolved(&broker, &volatile).await;
    assert_eq!((answer.outcome(), answer.unknown_reason()), (Outcome::Unknown, UnknownReason::ServerCrashed));
    assert_eq!(resolved(&broker, &durable).await.outcome(), Outcome::RolledBack);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_restart_of_the_server_takes_no_outcome_away() {
    let mut server = Server::start();
    let broker = Broker::start_at(&server.postgres.url("sample"), "", "").await;
    let session = broker.session().await;
    let (_, token) = write(&session).await;
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    let (_, open) = write(&session).await;
    server.postgres.restart().unwrap();
    assert_eq!(resolved(&broker, &token).await.outcome(), Outcome::Committed);
    assert_eq!(resolved(&broker, &open).await.outcome(), Outcome::RolledBack);
}
