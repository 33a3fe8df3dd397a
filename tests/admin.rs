//! Operators' calls: what they show, what they end, who may make them, and what the audit log has of them.

use std::collections::BTreeMap;

use session_broker::grpc::pb;
use session_broker::grpc::pb::admin_service_client::AdminServiceClient;
use tokio::net::TcpSocket;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use crate::batches::SLEEPING;
use crate::command_line::Program;
use crate::support::{Broker, Database, Failure, Session, seconds, text, until, wait_until};
use pb::attach_response::Event;
use pb::{EndReason, Outcome, TransactionState};

type Admin = AdminServiceClient<Channel>;

/// The callers are operators too.
const ADMIN: &str = "[principals.anonymous]\nprofiles = [\"default\"]\nadmin = true";

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";
const SLEEP: &str = "SELECT pg_sleep(60)";

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_listed_when_it_meets_every_filter_that_is_given() {
    let database = Database::create();
    let url = database.url();
    let broker = Broker::start_engines(&format!(
        r#"
        default_engine = "main"
        [engines.main]
        url = {url:?}
        [engines.other]
        url = {url:?}
        [profiles.report]
        [principals.anonymous]
        profiles = ["default", "report"]
        admin = true
        "#
    ))
    .await;
    let admin = admin(broker.channel());
    let begin = |request| broker.session_with(request);
    let web = begin(pb::BeginSessionRequest { labels: labels(&["app=web", "tier=1"]), ..Default::default() }).await;
    let other = pb::BeginSessionRequest { engine: "other".into(), labels: labels(&["app=web"]), ..Default::default() };
    let other = begin(other).await;
    let open = begin(pb::BeginSessionRequest { profile: "report".into(), ..Default::default() }).await;
    open.execute("SELECT 1").await.unwrap();
    let failed = begin(pb::BeginSessionRequest::default()).await;
    failed.execute("SELECT 1 / 0").await.unwrap_err();
    let busy = begin(pb::BeginSessionRequest { labels: labels(&["app=job"]), ..Default::default() }).await;
    let running = spawn(&busy, SLEEP, false);
    database.wait_for(SLEEPING, "1");
    let closed = begin(pb::BeginSessionRequest::default()).await;
    closed.close().await.unwrap();

    let any = pb::ListSessionsRequest::default;
    let in_state = |state: TransactionState| pb::ListSessionsRequest { transaction_state: state.into(), ..any() };
    let with = |texts: &[&str]| pb::ListSessionsRequest { labels: labels(texts), ..any() };
    for (filter, expected) in [
        (any(), vec![&web, &other, &open, &failed, &busy]),
        (pb::ListSessionsRequest { principal: "anonymous".into(), ..any() }, vec![&web, &other, &open, &failed, &busy]),
        (pb::ListSessionsRequest { principal: "nobody".into(), ..any() }, vec![]),
        (pb::ListSessionsRequest { engine: "other".into(), ..any() }, vec![&other]),
        (pb::ListSessionsRequest { engine: "nowhere".into(), ..any() }, vec![]),
        (pb::ListSessionsRequest { profile: "report".into(), ..any() }, vec![&open]),
        (in_state(TransactionState::None), vec![&web, &other]),
        (in_state(TransactionState::Open), vec![&open, &busy]),
        (in_state(TransactionState::Failed), vec![&failed]),
        (with(&["app=web"]), vec![&web, &other]),
        (with(&["app=web", "tier=1"]), vec![&web]),
        (with(&["app=web", "tier=2"]), vec![]),
        (with(&["app="]), vec![]),
        (pb::ListSessionsRequest { idle_longer_than: seconds(0), ..any() }, vec![&web, &other, &open, &failed]),
        (pb::ListSessionsRequest { idle_longer_than: seconds(3600), ..any() }, vec![]),
        (pb::ListSessionsRequest { transaction_longer_than: seconds(0), ..any() }, vec![&open, &failed, &busy]),
        (pb::ListSessionsRequest { transaction_longer_than: seconds(3600), ..any() }, vec![]),
        (pb::ListSessionsRequest { session_id: web.id.clone(), ..any() }, vec![&web]),
        (pb::ListSessionsRequest { session_id: closed.id.clone(), ..any() }, vec![]),
        (pb::ListSessionsRequest { engine: "other".into(), ..in_state(TransactionState::None) }, vec![&other]),
        (pb::ListSessionsRequest { engine: "other".into(), ..in_state(TransactionState::Open) }, vec![]),
    ] {
        let mut expected: Vec<_> = expected.into_iter().map(|session| session.id.clone()).collect();
        expected.sort();
        assert_eq!(ids(&list(&admin, filter.clone()).await), expected, "{filter:?}");
    }
    for (filter, field) in [
        (pb::ListSessionsRequest { transaction_state: 99, ..any() }, "transaction_state"),
        (pb::ListSessionsRequest { idle_longer_than: seconds(-1), ..any() }, "idle_longer_than"),
        (pb::ListSessionsRequest { transaction_longer_than: seconds(-1), ..any() }, "transaction_longer_than"),
        (pb::ListSessionsRequest { session_id: "it".into(), ..any() }, "session_id"),
        (pb::ListSessionsRequest { page_token: "it".into(), ..any() }, "page_token"),
    ] {
        refused(&admin.clone().list_sessions(filter).await.unwrap_err().into(), field);
    }
    busy.cancel().await.unwrap();
    running.await.unwrap().unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_have_every_session_once_in_the_order_of_the_ids() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let mut begun = Vec::new();
    for _ in 0..5 {
        begun.push(broker.session().await.id);
    }
    begun.sort();
    for page_size in [1, 2, 4, 5, 6, 1_000_000] {
        let mut seen = Vec::new();
        let mut page_token = String::new();
        loop {
            let page = list(&admin, pb::ListSessionsRequest { page_size, page_token, ..Default::default() }).await;
            assert!(!page.sessions.is_empty() && page.sessions.len() <= usize::try_from(page_size).unwrap());
            seen.extend(ids(&page));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(seen, begun, "{page_size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_without_a_size_has_a_hundred_sessions() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    for _ in 0..101 {
        broker.session().await;
    }
    let first = list(&admin, pb::ListSessionsRequest::default()).await;
    let rest = pb::ListSessionsRequest { page_token: first.next_page_token.clone(), ..Default::default() };
    let rest = list(&admin, rest).await;
    assert_eq!((first.sessions.len(), rest.sessions.len(), rest.next_page_token.as_str()), (100, 1, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_says_what_a_session_does_and_nothing_secret() {
    const SECRET: &str = "a parameter's value";
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let request = pb::BeginSessionRequest { labels: labels(&["app=web"]), ..Default::default() };
    let session = broker.session_with(request).await;
    let idle = overview(&admin, &session).await;
    assert_eq!((idle.session_id.as_str(), idle.principal.as_str()), (session.id.as_str(), "anonymous"));
    assert_eq!((idle.engine.as_str(), idle.profile.as_str(), idle.one_shot), ("main", "default", false));
    assert_eq!(idle.labels, labels(&["app=web"]));
    assert_eq!((idle.backend_pid, idle.host.as_str()), (0, ""));
    assert_eq!((idle.transaction_age, idle.statement_age), (None, None));
    assert!(idle.age.is_some() && idle.idle_time.is_some());

    let update = "UPDATE accounts SET balance = balance + length($1) WHERE id = 1";
    let executed = session.run(session.statement(update, vec![text(SECRET)])).await.unwrap();
    let own = executed.state.unwrap();
    assert!(!own.commit_token.is_empty());
    let behind = session.get().await.unwrap();
    let open = overview(&admin, &session).await;
    let state = open.state.clone().unwrap();
    assert_eq!((state.transaction_state(), state.transaction_id), (TransactionState::Open, own.transaction_id));
    assert_eq!((open.backend_pid, &open.host), (behind.backend_pid, &behind.host));
    assert!(open.transaction_age.is_some());
    until(async || overview(&admin, &session).await.statement_age.is_none()).await;

    let running = spawn(&session, SLEEP, false);
    database.wait_for(SLEEPING, "1");
    let busy = overview(&admin, &session).await;
    assert_eq!(busy.idle_time, seconds(0));
    assert!(busy.statement_age.is_some());
    let secret = session.token.rsplit('.').next().unwrap();
    for shown in [idle, open, busy] {
        let shown = format!("{shown:?}");
        for word in [secret, own.commit_token.as_str(), SECRET, "UPDATE", "pg_sleep"] {
            assert!(!shown.contains(word), "{word} is in {shown}");
        }
    }
    session.cancel().await.unwrap();
    running.await.unwrap().unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_stands_in_whose_way_is_told_with_the_session_that_does() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let (holder, waiter) = (broker.session().await, broker.session().await);
    holder.execute(UPDATE).await.unwrap();
    let waiting = spawn(&waiter, UPDATE, true);
    until(async || !overview(&admin, &waiter).await.blocked_by.is_empty()).await;
    let page = list(&admin, pb::ListSessionsRequest::default()).await;
    assert!(page.blockers_complete);
    let of = |session: &Session| page.sessions.iter().find(|shown| shown.session_id == session.id).unwrap().clone();
    assert!(of(&holder).blocked_by.is_empty());
    let waiting_one = of(&waiter);
    let [blocking] = &waiting_one.blocked_by[..] else { panic!("not blocked by one: {page:?}") };
    assert_eq!(blocking.session_id, holder.id);
    let blocker = blocking.blocker.clone().unwrap();
    assert_eq!(blocker.backend_pid, holder.get().await.unwrap().backend_pid);
    assert_eq!((blocker.user.as_str(), blocker.state.as_str()), ("broker", "idle in transaction"));
    holder.rollback().await.unwrap();
    waiting.await.unwrap().unwrap();

    // Somebody else's backend works for no session.
    let _held = database.hold(UPDATE);
    let waiting = spawn(&waiter, UPDATE, true);
    until(async || !overview(&admin, &waiter).await.blocked_by.is_empty()).await;
    let shown = overview(&admin, &waiter).await;
    assert_eq!(shown.blocked_by.len(), 1);
    assert_eq!((shown.blocked_by[0].session_id.as_str(), shown.blocked_by[0].blocker.is_some()), ("", true));
    waiter.cancel().await.unwrap();
    waiting.await.unwrap().unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn more_running_statements_than_can_be_asked_about_are_said_to_be_more() {
    let database = Database::create();
    let engine = "pool_size = 21\nmax_overflow = 0";
    let broker = Broker::start_with(&database, engine, ADMIN).await;
    let admin = admin(broker.channel());
    let mut sessions = Vec::new();
    for _ in 0..21 {
        let session = broker.session().await;
        sessions.push((spawn(&session, SLEEP, false), session));
    }
    database.wait_for(SLEEPING, "21");
    assert!(!list(&admin, pb::ListSessionsRequest::default()).await.blockers_complete);
    for (running, session) in sessions {
        session.cancel().await.unwrap();
        running.await.unwrap().unwrap_err();
    }
    until(async || list(&admin, pb::ListSessionsRequest::default()).await.blockers_complete).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_session_is_over_and_its_caller_hears_why() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let session = broker.session().await;
    let events = session.attach().await.unwrap();
    let ended = terminate(&admin, &session.id).await.unwrap();
    assert_eq!((ended.end_reason(), ended.is_over), (EndReason::Terminated, true));
    let was = ended.session.unwrap();
    assert_eq!((was.session_id.as_str(), was.state.unwrap().attached), (session.id.as_str(), true));
    assert_eq!(heard(events).await, EndReason::Terminated);
    is_terminated(&session).await;
    assert_eq!(database.balances(), "100 100");
    assert!(list(&admin, pb::ListSessionsRequest::default()).await.sessions.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_transaction_is_rolled_back_and_its_connection_back() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let (session, witness) = (broker.session().await, broker.session().await);
    session.execute(UPDATE).await.unwrap();
    let ended = terminate(&admin, &session.id).await.unwrap();
    assert!(ended.is_over);
    let was = ended.session.unwrap();
    assert_eq!(was.state.unwrap().transaction_state(), TransactionState::Open);
    assert_ne!(was.backend_pid, 0);
    assert_eq!((database.open_transactions().as_str(), database.balances().as_str()), ("0", "100 100"));
    is_free(&witness).await;
    is_terminated(&session).await;
    assert_eq!(session.commit().await.unwrap_err().end_reason(), "END_REASON_TERMINATED");
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_under_way_is_stopped_with_its_session() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let (session, witness) = (broker.session().await, broker.session().await);
    session.execute(UPDATE).await.unwrap();
    let running = spawn(&session, SLEEP, true);
    database.wait_for(SLEEPING, "1");
    let next = spawn(&session, "UPDATE accounts SET balance = 8 WHERE id = 2", true);
    let ended = terminate(&admin, &session.id).await.unwrap();
    assert!(ended.is_over);
    assert!(ended.session.unwrap().statement_age.is_some());
    assert_eq!(database.psql(SLEEPING), "0");
    for call in [running, next] {
        assert_eq!(call.await.unwrap().unwrap_err().end_reason(), "END_REASON_TERMINATED");
    }
    is_free(&witness).await;
    is_terminated(&session).await;
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_under_way_is_not_stopped_with_its_session() {
    let database = Database::create();
    database.doze_at_commit(1);
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let session = broker.session().await;
    let running = spawn(&session, UPDATE, true);
    database.wait_for(SLEEPING, "1");
    let ended = terminate(&admin, &session.id).await.unwrap();
    assert_eq!((ended.end_reason(), ended.is_over), (EndReason::Terminated, true));
    assert_eq!(running.await.unwrap().unwrap().commit.unwrap().outcome(), Outcome::Committed);
    is_terminated(&session).await;
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_listed_and_can_be_terminated() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let statement = |sql: &str| pb::RunStatement { sql: sql.into(), ..Default::default() };
    let request = pb::RunRequest { statements: vec![statement(UPDATE), statement(SLEEP)], ..Default::default() };
    let mut transactions = broker.transactions();
    let running = tokio::spawn(async move { transactions.run(request).await });
    database.wait_for(SLEEPING, "1");
    let page = list(&admin, pb::ListSessionsRequest::default()).await;
    let [run] = &page.sessions[..] else { panic!("not one session: {page:?}") };
    assert!(run.one_shot);
    assert!(terminate(&admin, &run.session_id).await.unwrap().is_over);
    let failure = Failure::from(running.await.unwrap().unwrap_err());
    assert_eq!(failure.end_reason(), "END_REASON_TERMINATED");
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn terminating_what_has_ended_says_why_it_did_and_what_never_was_is_unknown() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let admin = admin(broker.channel());
    let (session, closed) = (broker.session().await, broker.session().await);
    session.execute(UPDATE).await.unwrap();
    closed.close().await.unwrap();
    terminate(&admin, &session.id).await.unwrap();
    for (session, reason) in [(&session, EndReason::Terminated), (&closed, EndReason::Closed)] {
        let again = terminate(&admin, &session.id).await.unwrap();
        assert_eq!((again.end_reason(), again.session, again.is_over), (reason, None, false));
    }
    let unknown = terminate(&admin, &"0".repeat(32)).await.unwrap_err();
    assert_eq!((unknown.code, unknown.reason.as_str()), (Code::NotFound, "SESSION_UNKNOWN"));
}

#[tokio::test(flavor = "multi_thread")]
async fn terminating_takes_an_id_and_a_reason() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let mut admin = admin(broker.channel());
    let session = broker.session().await;
    let long = "x".repeat(257);
    for (session_id, reason, field) in [
        (session.token.as_str(), "why", "session_id"),
        ("", "why", "session_id"),
        (session.id.as_str(), "", "reason"),
        (session.id.as_str(), "two\nlines", "reason"),
        (session.id.as_str(), &long, "reason"),
    ] {
        let request = pb::TerminateSessionRequest { session_id: session_id.into(), reason: reason.into() };
        let failure = Failure::from(admin.terminate_session(request).await.unwrap_err());
        refused(&failure, field);
        assert!(!failure.message.contains(&session.token), "{failure:?}");
    }
    session.execute_and_commit("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_are_listed_with_whether_they_answer() {
    let database = Database::create();
    // A port that is taken, and not listened on.
    let taken = TcpSocket::new_v4().unwrap();
    taken.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let absent = taken.local_addr().unwrap();
    let url = database.url();
    let broker = Broker::start_engines(&format!(
        r#"
        default_engine = "main"
        [engines.main]
        url = {url:?}
        [engines.away]
        url = "postgresql://reader:hush@{absent}/elsewhere"
        [profiles.report]
        engines = ["away"]
        [principals.anonymous]
        profiles = ["default", "report"]
        admin = true
        "#
    ))
    .await;
    broker.session().await.execute("SELECT 1").await.unwrap();
    let mut admin = admin(broker.channel());
    let engines = admin.list_engines(pb::ListEnginesRequest {}).await.unwrap().into_inner().engines;
    let [away, main] = &engines[..] else { panic!("not two engines: {engines:?}") };
    assert_eq!((main.name.as_str(), main.is_default, main.reachable), ("main", true, true));
    assert_eq!((main.database.as_str(), main.user.as_str()), (database.name.as_str(), "broker"));
    assert_eq!((main.unreachable_cause.as_str(), &main.profiles[..]), ("", &["default".to_owned()][..]));
    assert!(!main.server_version.is_empty());
    assert_eq!(main.pool.as_ref().unwrap().in_use, 1);
    assert_eq!((away.name.as_str(), away.is_default, away.reachable), ("away", false, false));
    assert_eq!((away.database.as_str(), away.user.as_str()), ("elsewhere", "reader"));
    assert_eq!(away.profiles, ["default", "report"]);
    assert!(!away.unreachable_cause.is_empty());
    assert!(!format!("{engines:?}").contains("hush"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_transactions_finish_refuses_sessions_and_ends_the_program() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), ADMIN);
    let mut admin = admin(broker.channel());
    let session = broker.session().await;
    session.execute(UPDATE).await.unwrap();
    let draining = admin.drain(pb::DrainRequest { grace: seconds(-1) }).await.unwrap_err();
    refused(&draining.into(), "grace");
    for _ in 0..2 {
        let answer = admin.drain(pb::DrainRequest { grace: None }).await.unwrap().into_inner();
        assert_eq!(answer.live_sessions, 1);
        let begun = Session::begin(broker.client(), pb::BeginSessionRequest::default()).await;
        assert_eq!(begun.map(drop).map_err(|status| Failure::from(status).reason), Err("DRAINING".to_owned()));
    }
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(broker.wait().code(), Some(0));
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_without_grace_rolls_back_at_once() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), ADMIN);
    let mut admin = admin(broker.channel());
    let session = broker.session().await;
    session.execute(UPDATE).await.unwrap();
    let events = session.attach().await.unwrap();
    admin.drain(pb::DrainRequest { grace: seconds(0) }).await.unwrap();
    assert_eq!(heard(events).await, EndReason::Drained);
    assert_eq!(broker.wait().code(), Some(0));
    assert_eq!((database.open_transactions().as_str(), database.balances().as_str()), ("0", "100 100"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_admin_right_each_call_is_refused_and_logged_and_does_nothing() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let admin = admin(broker.channel());
    let session = broker.session().await;
    let terminating = pb::TerminateSessionRequest { session_id: session.id.clone(), reason: "why".into() };
    // The right is asked for before a request is looked at.
    let misread = pb::TerminateSessionRequest { session_id: session.token.clone(), reason: String::new() };
    for (call, status) in [
        ("ListSessions", admin.clone().list_sessions(pb::ListSessionsRequest::default()).await.unwrap_err()),
        ("TerminateSession", admin.clone().terminate_session(terminating).await.unwrap_err()),
        ("ListEngines", admin.clone().list_engines(pb::ListEnginesRequest {}).await.unwrap_err()),
        ("Drain", admin.clone().drain(pb::DrainRequest { grace: None }).await.unwrap_err()),
    ] {
        let failure = Failure::from(status);
        assert_eq!((failure.code, failure.reason.as_str()), (Code::PermissionDenied, "FORBIDDEN"), "{call}");
        is_logged_once(&broker, &[&rpc(call), "\"allowed\":false", "\"principal\":\"anonymous\""]);
    }
    let failure = Failure::from(admin.clone().terminate_session(misread).await.unwrap_err());
    assert_eq!(failure.code, Code::PermissionDenied);
    session.execute_and_commit("SELECT 1").await.unwrap();
    broker.session().await;
    assert_eq!(broker.logged(&["\"allowed\":true"]), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_call_leaves_one_line_in_the_audit_log_that_says_whom_it_concerns() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), ADMIN);
    let mut admin = admin(broker.channel());
    let session = broker.session().await;
    let secret = session.token.rsplit('.').next().unwrap();
    let id = format!("\"session.id\":\"{}\"", session.id);
    list(&admin, pb::ListSessionsRequest::default()).await;
    is_logged_once(&broker, &[&rpc("ListSessions"), "\"allowed\":true", "\"count\":1"]);
    admin.list_engines(pb::ListEnginesRequest {}).await.unwrap();
    is_logged_once(&broker, &[&rpc("ListEngines"), "\"allowed\":true", "\"count\":1"]);
    terminate(&admin, &session.id).await.unwrap();
    is_logged_once(&broker, &[&rpc("TerminateSession"), "\"allowed\":true", &id, "\"reason\":\"a test's\""]);
    let terminated = ["\"event\":\"session.terminated\"", &id, "\"operator\":\"anonymous\"", "\"reason\":\"a test's\""];
    is_logged_once(&broker, &terminated);
    // What was to be an id and is none is not shown.
    terminate(&admin, &session.token).await.unwrap_err();
    wait_until(|| broker.logged(&[&rpc("TerminateSession"), "\"allowed\":true"]) == 2);
    admin.drain(pb::DrainRequest { grace: None }).await.unwrap();
    is_logged_once(&broker, &[&rpc("Drain"), "\"allowed\":true", "\"count\":0"]);
    assert_eq!(broker.logged(&[secret]), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_refused_and_reaped_are_in_the_audit_log() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let unknown = pb::BeginSessionRequest { profile: "nonsense".into(), ..Default::default() };
    assert!(Session::begin(broker.client(), unknown).await.is_err());
    let refused = ["\"event\":\"session.refused\"", "\"principal\":\"anonymous\"", "\"reason\":\"INVALID_REQUEST\""];
    is_logged_once(&broker, &refused);
    assert_eq!(broker.logged(&["nonsense"]), 0);
    let brief = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
    let left = Session::begin(broker.client(), brief).await.unwrap();
    is_logged_once(&broker, &["\"event\":\"session.reaped\"", &left.id, "lease expired"]);
    // A caller's own doing is none of the log's business.
    let closed = broker.session().await;
    closed.close().await.unwrap();
    assert_eq!(broker.logged(&["\"target\":\"audit\"", &closed.id]), 0);
}

fn admin(channel: Channel) -> Admin {
    AdminServiceClient::new(channel)
}

/// Labels of texts "KEY=VALUE".
fn labels(texts: &[&str]) -> BTreeMap<String, String> {
    let pairs = texts.iter().map(|text| text.split_once('=').unwrap());
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

async fn list(admin: &Admin, request: pb::ListSessionsRequest) -> pb::ListSessionsResponse {
    admin.clone().list_sessions(request).await.unwrap().into_inner()
}

fn ids(page: &pb::ListSessionsResponse) -> Vec<String> {
    page.sessions.iter().map(|session| session.session_id.clone()).collect()
}

/// What a listing shows of the session.
async fn overview(admin: &Admin, session: &Session) -> pb::SessionOverview {
    let request = pb::ListSessionsRequest { session_id: session.id.clone(), ..Default::default() };
    list(admin, request).await.sessions.pop().expect("the session lives")
}

async fn terminate(admin: &Admin, session_id: &str) -> Result<pb::TerminateSessionResponse, Failure> {
    let request = pb::TerminateSessionRequest { session_id: session_id.into(), reason: "a test's".into() };
    Ok(admin.clone().terminate_session(request).await?.into_inner())
}

/// Why a session ended, from its stream.
async fn heard(mut events: Streaming<pb::AttachResponse>) -> EndReason {
    loop {
        let message = events.message().await.unwrap().expect("the stream ends with its last event");
        if let Some(Event::Ended(ended)) = message.event {
            return ended.end_reason();
        }
    }
}

/// The next call hears why the session ended, and runs nothing.
async fn is_terminated(session: &Session) {
    let refused = session.execute_and_commit("UPDATE accounts SET balance = 9 WHERE id = 2").await.unwrap_err();
    assert_eq!(refused.end_reason(), "END_REASON_TERMINATED");
    assert_eq!(session.get().await.unwrap().end_reason(), EndReason::Terminated);
}

/// The engine's one connection is back in the pool, and is used again.
async fn is_free(witness: &Session) {
    assert_eq!(witness.get().await.unwrap().pool.unwrap().in_use, 0);
    witness.execute_and_commit("SELECT 1").await.unwrap();
    assert_eq!(witness.get().await.unwrap().pool.unwrap().opened, 1);
}

fn refused(failure: &Failure, field: &str) {
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
    assert_eq!(failure.field.as_deref(), Some(field));
}

fn rpc(call: &str) -> String {
    format!("\"rpc\":\"{call}\"")
}

/// Waits for the audit log's line with these words, of which there is one.
fn is_logged_once(broker: &Program, words: &[&str]) {
    let mut line = vec!["\"target\":\"audit\""];
    line.extend(words);
    wait_until(|| broker.logged(&line) > 0);
    assert_eq!(broker.logged(&line), 1, "{line:?}");
}

/// Executes meanwhile.
fn spawn(session: &Session, sql: &str, commit: bool) -> JoinHandle<Result<pb::ExecuteResponse, Failure>> {
    let request = pb::ExecuteRequest { commit, ..session.statement(sql, vec![]) };
    let session = session.clone();
    tokio::spawn(async move { session.run(request).await })
}
