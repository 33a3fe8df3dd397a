//! Callers that die in the middle of something, or come in crowds. Processes of their own, killed by SIGKILL.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use session_broker::grpc::pb;
use tokio::task::JoinSet;
use tonic::Code;

use crate::batches::SLEEPING;
use crate::command_line::Program;
use crate::python::python;
use crate::support::{Broker, Database, Session, seconds, wait_until};
use pb::EndReason;
use pb::retry_advice::Scope;

/// Has psql write what `abandon.py` has locked. Its lease is a second; psql waits for the locks no longer than that and
/// a second more.
const TAKE_THE_LOCKS: &str = "SET lock_timeout = '2s'; UPDATE accounts SET balance = balance + 1";

/// A caller in a process of its own.
struct Caller {
    process: Child,
    token: String,
}

impl Caller {
    /// Runs `abandon.py` up to where it waits to be killed.
    fn start(broker: &Program, place: &str) -> Self {
        let mut script = python("abandon.py", &broker.address);
        let mut process = script.arg(place).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut token = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut token).unwrap();
        Self { process, token: token.trim_end().to_owned() }
    }

    /// Kills it and returns the session it leaves.
    fn kill(mut self, broker: &Program) -> Session {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        Session { client: broker.client(), token: self.token, id: String::new() }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_killed_before_its_commit_leaves_no_locks() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let session = Caller::start(&broker, "before-commit").kill(&broker);
    database.psql(TAKE_THE_LOCKS);
    assert_eq!(database.balances(), "101 101");
    assert_eq!(session.ended().await, EndReason::LeaseExpired);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_killed_in_mid_statement_leaves_nothing_running() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let caller = Caller::start(&broker, "in-a-statement");
    database.wait_for(SLEEPING, "1");
    let session = caller.kill(&broker);
    // The statement stops at once, and the session's locks go with its lease.
    database.psql(TAKE_THE_LOCKS);
    assert_eq!(database.balances(), "101 101");
    assert_eq!(session.ended().await, EndReason::LeaseExpired);
    let busy = "SELECT count(*) FROM pg_stat_activity \
         WHERE datname = current_database() AND usename = 'broker' AND state <> 'idle'";
    database.wait_for(busy, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dry_run_would_have_reaped_is_logged_once_and_lives_on() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "[limits]\nreaper = \"dry-run\"");
    let request = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
    let session = Session::begin(broker.client(), request).await.unwrap();
    let logged = ["session would have been reaped", session.id.as_str(), "lease expired"];
    wait_until(|| broker.logged(&logged) > 0);
    session.execute_and_commit("SELECT 1").await.unwrap();
    assert_eq!((broker.logged(&logged), broker.logged(&["session ended"])), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_killed_while_attached_is_missed_at_once() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "[profiles.default]\ndisconnect_grace = \"200ms\"");
    let session = Caller::start(&broker, "attached").kill(&broker);
    database.psql(TAKE_THE_LOCKS);
    assert_eq!(database.balances(), "101 101");
    assert_eq!(session.ended().await, EndReason::Disconnected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_longer_than_its_lease_is_waited_for() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let request = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
    let session = broker.session_with(request).await;
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let slow = session.execute("SELECT pg_sleep(2)").await.unwrap();
    assert_eq!(slow.state.unwrap().lease_remaining, seconds(1));
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_on_one_session_runs_one_by_one_and_who_finds_no_room_not_at_all() {
    const ROOM: usize = 50;
    const TOO_MANY: usize = 10;
    let database = Database::create();
    database.psql("CREATE TABLE ran (began timestamptz, ended timestamptz); ALTER TABLE ran OWNER TO broker");
    let profile = format!("[profiles.default]\nsession_queue_max = {ROOM}");
    let broker = Broker::start_with(&database, "", &profile).await;
    let session = broker.session().await;
    let lock = database.hold("LOCK TABLE ran");
    let mut calls = JoinSet::new();
    for _ in 0..ROOM + TOO_MANY {
        let session = session.clone();
        let sql = "INSERT INTO ran SELECT began, clock_timestamp() \
             FROM (SELECT clock_timestamp() AS began, pg_sleep(0.005)) AS slept";
        calls.spawn(async move { session.execute(sql).await });
    }
    // As long as one waits for the lock and the others for it, those that come to an end are the refused.
    for _ in 0..TOO_MANY {
        let refused = calls.join_next().await.unwrap().unwrap().unwrap_err();
        assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "SESSION_QUEUE_FULL"));
        assert_eq!((refused.retry_info, refused.advice), (true, Scope::Call));
    }
    drop(lock);
    assert!(calls.join_all().await.iter().all(Result::is_ok));
    session.commit().await.unwrap();
    let ran = "SELECT count(*), count(*) FILTER (WHERE began < last_ended) \
         FROM (SELECT began, lag(ended) OVER (ORDER BY began) AS last_ended FROM ran) AS runs";
    assert_eq!(database.psql(ran), format!("{ROOM}|0"));
}
