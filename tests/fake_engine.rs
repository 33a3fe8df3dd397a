//! An engine whose every step is a gate that opens, fails, opens late, or never opens. For tests of cancellation and of
//! time under a paused clock; it keeps the port's promises, and counts what became of its connections.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use session_broker::broker::commit::{Cluster, ClusterXid, Resolution};
use session_broker::broker::connect::ConnectOverrides;
use session_broker::broker::engine::{
    Blocker, Canceller, CheckoutError, CommitVerdict, Connection, Engine, EngineInfo, IdempotencyTable, Lost,
    NotCancelled, Notifications, PoolStatistics, StatementError, Stopped, TransactionOptions, TransactionStatus, Work,
};
use session_broker::broker::error::{Error, PgError};
use session_broker::broker::notification::ChannelName;
use session_broker::broker::observer::{Discard, TracePlace};
use session_broker::broker::principal::Principal;
use session_broker::broker::statement::{ResultLimits, ResultSet};
use tokio::sync::Notify;
use tokio::time::sleep;

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    Ok,
    Err,
    Slow,
    Never,
    /// The connection is lost at it. For `execute` and `commit`.
    Lost,
    /// The request is found wrong at it. For `execute`.
    Refused,
}

/// A statement that has this in it is a defect of the engine.
pub(crate) const PANICS: &str = "a panic";

/// How late a slow gate opens.
pub(crate) const SLOW: Duration = Duration::from_millis(100);

impl Gate {
    pub(crate) const ALL: [Self; 4] = [Self::Ok, Self::Err, Self::Slow, Self::Never];

    pub(crate) const EXECUTE: [Self; 6] = [Self::Ok, Self::Err, Self::Slow, Self::Never, Self::Lost, Self::Refused];
    pub(crate) const COMMIT: [Self; 5] = [Self::Ok, Self::Err, Self::Slow, Self::Never, Self::Lost];

    /// Passes the gate: whether the step succeeds.
    async fn pass(self) -> bool {
        match self {
            Self::Ok => true,
            Self::Err | Self::Lost | Self::Refused => false,
            Self::Slow => {
                sleep(SLOW).await;
                true
            }
            Self::Never => std::future::pending().await,
        }
    }
}

/// A gate for each step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gates {
    pub(crate) checkout: Gate,
    pub(crate) execute: Gate,
    pub(crate) cancel: Gate,
    pub(crate) commit: Gate,
    pub(crate) rollback: Gate,
}

impl Gates {
    pub(crate) const OPEN: Self =
        Self { checkout: Gate::Ok, execute: Gate::Ok, cancel: Gate::Ok, commit: Gate::Ok, rollback: Gate::Ok };
}

/// What became of the connections.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) checked_out: u32,
    /// Questions who stands in a backend's way.
    pub(crate) asked: u32,
    pub(crate) released: u32,
    pub(crate) discarded: u32,
    /// Released while not idle: must stay zero.
    pub(crate) released_open: u32,
    /// Statements run outside of a transaction: must stay zero.
    pub(crate) run_outside: u32,
    pub(crate) committing: u32,
    pub(crate) committed: u32,
    pub(crate) statements: u32,
    pub(crate) running: u32,
    pub(crate) running_max: u32,
}

#[derive(Debug)]
pub(crate) struct FakeEngine {
    gates: Gates,
    counts: Arc<Mutex<Counts>>,
    log: Arc<Mutex<Vec<String>>>,
}

impl FakeEngine {
    pub(crate) fn new(gates: Gates) -> Self {
        Self { gates, counts: Arc::default(), log: Arc::default() }
    }

    /// The statements in the order they were run.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn counts(&self) -> Counts {
        *self.counts.lock().unwrap()
    }
}

#[async_trait]
impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn idempotency_table(&self) -> Option<&IdempotencyTable> {
        None
    }

    fn info(&self) -> EngineInfo {
        EngineInfo {
            name: "fake".into(),
            database: String::new(),
            user: String::new(),
            server_version: String::new(),
            pool: PoolStatistics::default(),
        }
    }

    fn check(&self, _: &ConnectOverrides) -> Result<(), Error> {
        Ok(())
    }

    async fn checkout(&self, _: &Principal, _: &Arc<ConnectOverrides>) -> Result<Box<dyn Connection>, CheckoutError> {
        if !self.gates.checkout.pass().await {
            return Err(CheckoutError::Unreachable("the gate is shut".into()));
        }
        self.counts.lock().unwrap().checked_out += 1;
        Ok(Box::new(FakeConnection {
            gates: self.gates,
            counts: self.counts.clone(),
            log: self.log.clone(),
            status: TransactionStatus::Idle,
            cancelled: Arc::new(Notify::new()),
            released: false,
        }))
    }

    async fn resolve(&self, _: &Principal, _: &ClusterXid, _: Option<i32>) -> Result<Resolution, CheckoutError> {
        unreachable!("no transaction has a cluster")
    }

    async fn blockers(&self, _: &str, _: i32) -> Result<Vec<Blocker>, CheckoutError> {
        self.counts.lock().unwrap().asked += 1;
        Ok(Vec::new())
    }

    async fn listen(&self, _: BTreeSet<ChannelName>) -> Result<Box<dyn Notifications>, CheckoutError> {
        unreachable!("no test listens here")
    }

    async fn probe(&self) -> Result<(), CheckoutError> {
        Ok(())
    }
}

struct FakeConnection {
    gates: Gates,
    counts: Arc<Mutex<Counts>>,
    log: Arc<Mutex<Vec<String>>>,
    status: TransactionStatus,
    cancelled: Arc<Notify>,
    released: bool,
}

impl FakeConnection {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap()
    }
}

/// Counts a statement while it runs.
struct Running<'a>(&'a Mutex<Counts>);

impl<'a> Running<'a> {
    fn new(counts: &'a Mutex<Counts>) -> Self {
        let mut now = counts.lock().unwrap();
        now.statements += 1;
        now.running += 1;
        now.running_max = now.running_max.max(now.running);
        drop(now);
        Self(counts)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap().running -= 1;
    }
}

fn refusal(sqlstate: &str) -> Box<PgError> {
    Box::new(PgError { sqlstate: sqlstate.into(), ..PgError::default() })
}

#[async_trait]
impl Connection for FakeConnection {
    fn host(&self) -> Arc<str> {
        "nowhere".into()
    }

    fn backend_pid(&self) -> i32 {
        1
    }

    fn canceller(&self) -> Arc<dyn Canceller> {
        Arc::new(FakeCanceller { gate: self.gates.cancel, cancelled: self.cancelled.clone() })
    }

    fn status(&self) -> TransactionStatus {
        self.status
    }

    fn cluster(&self) -> Option<Cluster> {
        None
    }

    fn xid(&self) -> Option<u64> {
        Some(1)
    }

    async fn execute(
        &mut self,
        begin: Option<&TransactionOptions>,
        work: &Work,
        _: ResultLimits,
        _: Option<TracePlace>,
    ) -> Result<Vec<ResultSet>, Stopped> {
        let Work::Statements(statements, _) = work else { unreachable!("no test sets savepoints here") };
        self.log.lock().unwrap().push(statements[0].sql().to_owned());
        assert!(!statements[0].sql().contains(PANICS), "it was asked to");
        let counts = self.counts.clone();
        let _running = Running::new(&counts);
        if begin.is_some() {
            self.status = TransactionStatus::Open;
        }
        if self.status == TransactionStatus::Idle {
            self.counts().run_outside += 1;
        }
        let failure = tokio::select! {
            passed = self.gates.execute.pass() => if passed { return Ok(vec![ResultSet::default()]) } else { "23505" },
            () = self.cancelled.notified() => "57014",
        };
        let lost = Lost("the gate cut it".into());
        let error = match self.gates.execute {
            Gate::Lost if begin.is_some() => StatementError::LostBeforeBegin(lost),
            Gate::Lost => StatementError::Lost(lost),
            Gate::Refused => StatementError::Refused(Error::invalid("parameters", "are refused")),
            Gate::Ok | Gate::Err | Gate::Slow | Gate::Never => {
                self.status = TransactionStatus::Failed;
                StatementError::Failed(refusal(failure))
            }
        };
        Err(Stopped { index: 0, error })
    }

    async fn commit(&mut self) -> CommitVerdict {
        self.counts().committing += 1;
        let passed = self.gates.commit.pass().await;
        self.counts().committing -= 1;
        if self.gates.commit == Gate::Lost {
            return CommitVerdict::Lost(Lost("the gate cut it".into()));
        }
        let failed = std::mem::replace(&mut self.status, TransactionStatus::Idle) == TransactionStatus::Failed;
        match (passed, failed) {
            (true, false) => {
                self.counts().committed += 1;
                CommitVerdict::Committed
            }
            (true, true) => CommitVerdict::RolledBack,
            (false, _) => CommitVerdict::Failed(refusal("40001")),
        }
    }

    async fn rollback(&mut self) -> Result<(), Lost> {
        if !self.gates.rollback.pass().await {
            return Err(Lost("the gate is shut".into()));
        }
        self.status = TransactionStatus::Idle;
        Ok(())
    }

    async fn lost(&mut self) -> Lost {
        std::future::pending().await
    }

    async fn release(mut self: Box<Self>) -> Option<Discard> {
        let idle = self.status == TransactionStatus::Idle;
        self.released = true;
        let mut counts = self.counts();
        counts.released += 1;
        counts.released_open += u32::from(!idle);
        None
    }
}

impl Drop for FakeConnection {
    fn drop(&mut self) {
        if !self.released {
            self.counts().discarded += 1;
        }
    }
}

struct FakeCanceller {
    gate: Gate,
    cancelled: Arc<Notify>,
}

#[async_trait]
impl Canceller for FakeCanceller {
    fn bytes_received(&self) -> u64 {
        0
    }

    async fn cancel(&self) -> Result<(), NotCancelled> {
        if self.gate.pass().await {
            self.cancelled.notify_one();
            Ok(())
        } else {
            Err(NotCancelled::Unsent("the gate is shut".into()))
        }
    }
}
