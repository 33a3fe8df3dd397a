//! Cancel over a bad network: requests that PostgreSQL refuses to take, or that vanish on the way.

use std::time::Duration;

use session_broker::grpc::pb;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Code;

use crate::batches::SLEEPING;
use crate::proxy::Proxy;
use crate::support::{Broker, Database, Failure, Session, millis, until};
use pb::{EndReason, TransactionState};

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";
const SLEEP: &str = "SELECT pg_sleep(60)";

/// The longest that anything about a cancel takes: two seconds, and room for a slow machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// A session whose connections to the database go through a proxy, with a transaction that has written.
struct Far {
    database: Database,
    proxy: Proxy,
    /// Kept, or it would stop.
    _broker: Broker,
    session: Session,
    /// The process id of its backend.
    backend: i32,
}

impl Far {
    async fn start() -> Self {
        let database = Database::create();
        let proxy = Proxy::start(&database.url(), Duration::ZERO).await;
        let broker = Broker::start_at(&proxy.url, "", "").await;
        let session = broker.session().await;
        session.execute(UPDATE).await.unwrap();
        let backend = session.get().await.unwrap().backend_pid;
        Self { database, proxy, _broker: broker, session, backend }
    }

    /// Has the session sleep meanwhile.
    fn sleep(&self) -> JoinHandle<Result<pb::ExecuteResponse, Failure>> {
        let session = self.session.clone();
        let running = tokio::spawn(async move { session.execute(SLEEP).await });
        self.database.wait_for(SLEEPING, "1");
        running
    }

    /// The session and its connection are given up; PostgreSQL ends the backend when it finds nobody there.
    async fn is_given_up(&self) {
        assert_eq!(self.session.ended().await, EndReason::BackendLost);
        self.until_unused().await;
        let backend = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {}", self.backend);
        self.database.wait_for(&backend, "0");
        assert_eq!(self.database.balances(), "100 100");
    }

    /// Looks until no connection of the pool is in use.
    async fn until_unused(&self) {
        until(async || self.session.get().await.unwrap().pool.unwrap().in_use == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_cannot_be_delivered_says_so_and_can_be_made_again() {
    let far = Far::start().await;
    let running = far.sleep();
    far.proxy.deafen().await;
    let refused = timeout(PATIENCE, far.session.cancel()).await.expect("Cancel answers").unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::Unavailable, "CANCEL_UNDELIVERED"));
    // The statement runs on.
    assert_eq!((refused.transaction_state(), far.database.psql(SLEEPING).as_str()), (TransactionState::Open, "1"));
    far.proxy.hear().await;
    assert!(far.session.cancel().await.unwrap().cancelled);
    let stopped = running.await.unwrap().unwrap_err();
    assert_eq!((stopped.code, stopped.reason.as_str()), (Code::Cancelled, "CANCELLED"));
    far.session.rollback().await.unwrap();
    far.until_unused().await;
    far.session.execute_and_commit("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_nobody_can_stop_ends_at_its_time_limit_with_its_connection() {
    let far = Far::start().await;
    far.proxy.deafen().await;
    let request = pb::ExecuteRequest { timeout: millis(500), ..far.session.statement(SLEEP, vec![]) };
    let failure = timeout(PATIENCE, far.session.run(request)).await.expect("Execute answers").unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
    assert_eq!((failure.metadata["bound"].as_str(), failure.state), ("timeout", None));
    far.is_given_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_is_never_answered_is_given_up_with_its_connection() {
    let far = Far::start().await;
    let running = far.sleep();
    far.proxy.hold_cancels();
    // It may hear that the session has ended, or that nobody knows of its request.
    drop(timeout(PATIENCE, far.session.cancel()).await.expect("Cancel answers"));
    assert_eq!(running.await.unwrap().unwrap_err().end_reason(), "END_REASON_BACKEND_LOST");
    far.is_given_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_a_statement_that_nobody_can_stop_leaves_nothing() {
    for held in [true, false] {
        let far = Far::start().await;
        let running = far.sleep();
        if held {
            far.proxy.hold_cancels();
        } else {
            far.proxy.deafen().await;
        }
        running.abort();
        far.is_given_up().await;
    }
}
