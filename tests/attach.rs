//! Attach: what the stream tells, what it keeps alive, and what its end does. On a real PostgreSQL; exact times are
//! those of `attach_times`.

use std::time::Duration;

use session_broker::grpc::pb;
use session_broker::grpc::pb::session_service_client::SessionServiceClient;
use tonic::transport::Endpoint;
use tonic::{Code, Streaming};

use crate::batches::SLEEPING;
use crate::proxy::Proxy;
use crate::support::{Broker, Database, Session, seconds, until};
use pb::attach_response::Event;
use pb::{AttachResponse, EndReason};

type Events = Streaming<AttachResponse>;

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";

/// Far shorter than the lease, which is thirty seconds unless asked for.
const BRIEF_GRACE: &str = "[profiles.default]\ndisconnect_grace = \"200ms\"";

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_session_outlives_its_lease() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session_with(leased_for_a_second()).await;
    let mut events = session.attach().await.unwrap();
    session.execute(UPDATE).await.unwrap();
    // Heartbeats come at once and every five seconds.
    for _ in 0..2 {
        let AttachResponse { state, event } = next(&mut events).await;
        assert_eq!(event, Some(Event::Heartbeat(pb::Heartbeat {})));
        let state = state.unwrap();
        assert_eq!((state.attached, state.lease_remaining), (true, seconds(1)));
    }
    assert!(is_attached(&session).await);
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_goes_takes_its_session_and_the_locks_along() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", BRIEF_GRACE).await;
    let session = broker.session().await;
    session.execute(UPDATE).await.unwrap();
    drop(attached(&session).await);
    take_the_lock(&database, "2s");
    assert_eq!(session.ended().await, EndReason::Disconnected);
    assert_eq!(database.balances(), "101 100");
    assert_eq!(session.commit().await.unwrap_err().end_reason(), "END_REASON_DISCONNECTED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_within_the_grace_gives_the_session_its_lease_back() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (kept, used) =
        (broker.session_with(leased_for_a_second()).await, broker.session_with(leased_for_a_second()).await);
    for session in [&kept, &used] {
        leave(session).await;
    }
    let states = [Some(kept.keep_alive().await.unwrap()), used.execute_and_commit("SELECT 1").await.unwrap().state];
    for state in states.map(Option::unwrap) {
        assert_eq!((state.attached, state.lease_remaining), (false, seconds(1)));
    }
    for session in [kept, used] {
        assert_eq!(session.ended().await, EndReason::LeaseExpired);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_opened_again_within_the_grace_keeps_the_session() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[profiles.default]\ndisconnect_grace = \"2s\"").await;
    let session = broker.session().await;
    leave(&session).await;
    let mut events = attached(&session).await;
    // The second heartbeat comes after five seconds: past the first stream's grace.
    assert!(next(&mut events).await.state.unwrap().attached);
    drop(events);
    assert_eq!(session.ended().await, EndReason::Disconnected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_one_stream_at_a_time() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let first = attached(&session).await;
    let refused = session.attach().await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::FailedPrecondition, "ALREADY_ATTACHED"));
    // Whoever was refused takes nothing from the stream that is there.
    assert!(is_attached(&session).await);
    drop(first);
    until(async || !is_attached(&session).await).await;
    drop(attached(&session).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_has_ended_or_never_was_has_no_stream() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.close().await.unwrap();
    assert_eq!(session.attach().await.unwrap_err().end_reason(), "END_REASON_CLOSED");
    let unknown = Session { token: format!("broker.{}.{}", "0".repeat(32), "0".repeat(32)), ..session };
    let refused = unknown.attach().await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::NotFound, "SESSION_UNKNOWN"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_of_a_closed_session_says_so_and_ends() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let mut events = attached(&session).await;
    session.close().await.unwrap();
    ends_as(&mut events, EndReason::Closed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_hears_that_its_transaction_takes_long_and_that_it_took_too_long() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let options = pb::SessionOptions { transaction_timeout: seconds(5), ..Default::default() };
    let session = broker.session_with(pb::BeginSessionRequest { options: Some(options), ..Default::default() }).await;
    let mut events = attached(&session).await;
    session.execute(UPDATE).await.unwrap();
    let (state, event) = told(&mut events).await;
    assert_eq!(event, Event::TransactionLong(pb::TransactionLong {}));
    assert!(length(state.unwrap().transaction_remaining.as_ref()) <= Duration::from_secs(1));
    ends_as(&mut events, EndReason::TransactionDeadline).await;
    take_the_lock(&database, "2s");
    assert_eq!(database.balances(), "101 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_hears_of_a_drain_in_time_to_commit() {
    let database = Database::create();
    let engine = format!("[engines.main]\nurl = {:?}", database.url());
    let broker = Broker::start_draining_for("10s", &engine).await;
    let session = broker.session().await;
    let mut events = attached(&session).await;
    session.execute(UPDATE).await.unwrap();
    broker.begin_stop();
    let (state, event) = told(&mut events).await;
    assert_eq!((state.unwrap().draining, event), (true, Event::Draining(pb::Draining {})));
    session.commit().await.unwrap();
    ends_as(&mut events, EndReason::Drained).await;
    broker.stop().await;
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_hears_that_its_session_is_about_to_end_and_by_what() {
    let database = Database::create();
    for (limits, sql, reason) in [
        ("session_age_max = \"5s\"", None, EndReason::MaxAge),
        ("lease_ttl = \"1s\"\nlease_ttl_max = \"1s\"\nsession_idle_timeout = \"5s\"", None, EndReason::IdleTimeout),
        ("idle_in_transaction_timeout = \"5s\"", Some(UPDATE), EndReason::IdleTimeout),
    ] {
        let broker = Broker::start_with(&database, "", &format!("[profiles.default]\n{limits}")).await;
        let session = broker.session().await;
        let mut events = attached(&session).await;
        if let Some(sql) = sql {
            session.execute(sql).await.unwrap();
        }
        let (_, event) = told(&mut events).await;
        let Event::LeaseLow(low) = &event else { panic!("{event:?} before {reason:?}") };
        assert_eq!(low.end_reason(), reason);
        assert!(length(low.remaining.as_ref()) <= Duration::from_secs(1), "{low:?}");
        ends_as(&mut events, reason).await;
    }
    take_the_lock(&database, "2s");
    assert_eq!(database.balances(), "101 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_statement_waits_for_locks_hears_whose_they_are() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (session, other) = (broker.session().await, broker.session().await);
    let held = database.hold("UPDATE accounts SET balance = 1 WHERE id = 1");
    other.execute("UPDATE accounts SET balance = 1 WHERE id = 2").await.unwrap();
    let mut events = attached(&session).await;
    let running = tokio::spawn({
        let session = session.clone();
        // Both rows, one after the other, and then a rest.
        let sql = "WITH updated AS (UPDATE accounts SET balance = 7 RETURNING id) \
             SELECT pg_sleep(60) FROM (SELECT count(*) FROM updated) AS all_of_them";
        async move { session.execute(sql).await }
    });
    // What another user's backend does, PostgreSQL does not show to the broker's.
    let psql = blocker(held_by_psql(&database), "postgres", "psql", "");
    assert_eq!(blockers(&mut events).await, [psql]);
    drop(held);
    let pid = other.get().await.unwrap().backend_pid;
    let other_session = blocker(pid, "broker", "session-broker", "idle in transaction");
    assert_eq!(blockers(&mut events).await, [other_session]);
    other.rollback().await.unwrap();
    assert!(blockers(&mut events).await.is_empty());
    assert_eq!(database.psql(SLEEPING), "1");
    session.cancel().await.unwrap();
    assert_eq!(running.await.unwrap().unwrap_err().reason, "CANCELLED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_connection_is_cut_is_missed() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", BRIEF_GRACE).await;
    let (proxy, far, near) = behind_a_proxy(&broker).await;
    far.execute(UPDATE).await.unwrap();
    let _events = attached(&far).await;
    assert!(proxy.cut(0));
    take_the_lock(&database, "2s");
    assert_eq!(near.ended().await, EndReason::Disconnected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_falls_silent_is_missed_within_the_keepalive() {
    let database = Database::create();
    // Not by its time limit is the statement to be stopped.
    let sections = format!("{BRIEF_GRACE}\nstatement_timeout = \"1m\"");
    let broker = Broker::start_with(&database, "", &sections).await;
    let (proxy, far, near) = behind_a_proxy(&broker).await;
    far.execute(UPDATE).await.unwrap();
    let _events = attached(&far).await;
    let busy = Session::begin(far.client.clone(), pb::BeginSessionRequest::default()).await.unwrap();
    let _running = tokio::spawn(async move { busy.execute("SELECT pg_sleep(60)").await });
    database.wait_for(SLEEPING, "1");
    proxy.silence();
    // Ten seconds to the ping, five for its answer, the grace, and room for a slow machine.
    take_the_lock(&database, "20s");
    assert_eq!(near.ended().await, EndReason::Disconnected);
    // Its other call goes with the same connection.
    database.wait_for(SLEEPING, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_sessions_are_attached_on_one_channel() {
    let database = Database::create();
    // A busy machine is slow to give them a connection each.
    let broker = Broker::start_with(&database, "pool_timeout = \"30s\"", "").await;
    let client = broker.client();
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let client = client.clone();
        callers.spawn(async move {
            let request = pb::BeginSessionRequest { lease_ttl: seconds(3), ..Default::default() };
            let session = Session::begin(client, request).await.unwrap();
            let mut events = attached(&session).await;
            // The second heartbeat comes when the lease alone would have run out long ago.
            assert!(next(&mut events).await.state.unwrap().attached);
            session.execute_and_commit("SELECT 1").await.unwrap();
            session.close().await.unwrap();
            ends_as(&mut events, EndReason::Closed).await;
        });
    }
    callers.join_all().await;
}

fn leased_for_a_second() -> pb::BeginSessionRequest {
    pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() }
}

/// Attaches, and hears of it.
async fn attached(session: &Session) -> Events {
    let mut events = session.attach().await.unwrap();
    let AttachResponse { state, event } = next(&mut events).await;
    assert_eq!((state.unwrap().attached, event), (true, Some(Event::Heartbeat(pb::Heartbeat {}))));
    events
}

async fn is_attached(session: &Session) -> bool {
    session.get().await.unwrap().state.unwrap().attached
}

/// Attaches and leaves; returns when the broker has noticed.
async fn leave(session: &Session) {
    drop(attached(session).await);
    until(async || !is_attached(session).await).await;
}

async fn next(events: &mut Events) -> AttachResponse {
    events.message().await.unwrap().expect("the stream goes on")
}

/// The next event that is no heartbeat, with the state it came with.
async fn told(events: &mut Events) -> (Option<pb::SessionState>, Event) {
    loop {
        let AttachResponse { state, event } = next(events).await;
        match event.expect("every message has an event") {
            Event::Heartbeat(_) => {}
            event => return (state, event),
        }
    }
}

/// The next event tells why the session ended, and nothing follows.
async fn ends_as(events: &mut Events, reason: EndReason) {
    let ended = Event::Ended(pb::Ended { end_reason: reason.into() });
    assert_eq!(told(events).await, (None, ended));
    assert_eq!(events.message().await.unwrap(), None);
}

async fn blockers(events: &mut Events) -> Vec<pb::Blocker> {
    let (_, event) = told(events).await;
    let Event::BlockedBy(blocked) = event else { panic!("not blocked: {event:?}") };
    blocked.blockers
}

fn blocker(backend_pid: i32, user: &str, application_name: &str, state: &str) -> pb::Blocker {
    pb::Blocker { backend_pid, user: user.into(), application_name: application_name.into(), state: state.into() }
}

/// The backend of [`Database::hold`].
fn held_by_psql(database: &Database) -> i32 {
    let holder = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() \
         AND application_name = 'psql' AND state = 'idle in transaction'";
    database.psql(holder).parse().unwrap()
}

/// Has psql write the row that [`UPDATE`] has locked. It waits for the lock, no longer than that.
fn take_the_lock(database: &Database, patience: &str) {
    let sql = format!("SET lock_timeout = '{patience}'; UPDATE accounts SET balance = balance + 1 WHERE id = 1");
    database.psql(&sql);
}

/// A session whose caller reaches the broker through a proxy, and the same for one who does not.
async fn behind_a_proxy(broker: &Broker) -> (Proxy, Session, Session) {
    let proxy = Proxy::start(&format!("postgresql://x@{}/db", broker.address), Duration::ZERO).await;
    let address = proxy.url.split(['@', '/']).nth(3).unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let client = SessionServiceClient::new(endpoint.connect_lazy());
    let far = Session::begin(client, pb::BeginSessionRequest::default()).await.unwrap();
    let near = Session { client: broker.client(), ..far.clone() };
    (proxy, far, near)
}

fn length(duration: Option<&prost_types::Duration>) -> Duration {
    let prost_types::Duration { seconds, nanos } = duration.unwrap();
    Duration::new(u64::try_from(*seconds).unwrap(), u32::try_from(*nanos).unwrap())
}
