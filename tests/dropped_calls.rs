//! Calls dropped anywhere: nothing is left open. Every combination of gates and drop points on the fake engine, and a
//! seeded run on a real PostgreSQL.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use session_broker::broker::commit::TransactionId;
use session_broker::broker::principal::Principal;
use session_broker::broker::profile::{Limits, Profile};
use session_broker::broker::session::Session;
use session_broker::broker::{BeginSession, Broker, Verdict};
use session_broker::grpc::pb;
use tokio::time::{sleep, timeout};

use crate::fake_engine::{Counts, FakeEngine, Gate, Gates, SLOW};
use crate::leases::{broker, call};
use crate::support::{self, Database};

/// Where a call is dropped: after so many turns of the scheduler, or so much time.
#[derive(Debug, Clone, Copy)]
enum DropPoint {
    Turns(u32),
    After(Duration),
}

const DROP_POINTS: [DropPoint; 9] = [
    DropPoint::Turns(0),
    DropPoint::Turns(1),
    DropPoint::Turns(2),
    DropPoint::Turns(3),
    DropPoint::Turns(5),
    // While the first slow gate is opening, and the second.
    DropPoint::After(Duration::from_millis(50)),
    DropPoint::After(Duration::from_millis(150)),
    // Past the statement timeout, while its cancel is being waited for; and past that.
    DropPoint::After(Duration::from_secs(32)),
    DropPoint::After(Duration::from_secs(40)),
];

/// The calls of a session's life, in order; the last one made is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Step {
    Execute,
    ExecuteAndCommit,
    Commit,
    Rollback,
    Close,
}

async fn make(session: &Arc<Session>, step: Step) {
    match step {
        Step::Execute => drop(session.execute(call(false)).await),
        Step::ExecuteAndCommit => drop(session.execute(call(true)).await),
        Step::Commit => drop(session.commit(None).await),
        Step::Rollback => drop(session.rollback().await),
        Step::Close => drop(session.close().await),
    }
}

/// Polls `future` up to the drop point and drops it.
async fn dropped_at(point: DropPoint, future: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        () = future => {}
        () = async {
            match point {
                DropPoint::Turns(turns) => for _ in 0..turns { tokio::task::yield_now().await },
                DropPoint::After(time) => sleep(time).await,
            }
        } => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_dropped_anywhere_leaves_no_open_transaction() {
    let lives: [&[Step]; 6] = [
        &[Step::Execute],
        &[Step::ExecuteAndCommit],
        &[Step::Execute, Step::Execute],
        &[Step::Execute, Step::Commit],
        &[Step::Execute, Step::Rollback],
        &[Step::Execute, Step::Close],
    ];
    let mut runs = 0;
    for checkout in Gate::ALL {
        for execute in Gate::EXECUTE {
            for cancel in Gate::ALL {
                for commit in Gate::COMMIT {
                    for rollback in Gate::ALL {
                        let gates = Gates { checkout, execute, cancel, commit, rollback };
                        for life in lives.iter().filter(|life| reaches(life, gates)) {
                            for point in DROP_POINTS {
                                life_with_a_drop(gates, life, point).await;
                                runs += 1;
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(runs > 10_000, "only {runs} combinations were run");
}

/// Whether the gates that differ matter to this life: a gate that no step meets is tried open only.
fn reaches(life: &[Step], gates: Gates) -> bool {
    let commits = life.iter().any(|step| matches!(step, Step::Commit | Step::ExecuteAndCommit));
    let begins = matches!(gates.checkout, Gate::Ok | Gate::Slow);
    (commits || gates.commit == Gate::Ok)
        && (begins || (gates.execute, gates.cancel, gates.rollback) == (Gate::Ok, Gate::Ok, Gate::Ok))
}

async fn life_with_a_drop(gates: Gates, life: &[Step], point: DropPoint) {
    let (broker, engine) = broker(gates, Profile::default(), Limits::default());
    let granted = broker.begin_session(&Principal::anonymous(), BeginSession::default()).unwrap();
    let (last, before) = life.split_last().unwrap();
    for step in before {
        // A gate that never opens ends in a time limit; what it leaves is the next step's to meet.
        let _ = timeout(Duration::from_secs(50), make(&granted.session, *step)).await;
    }
    dropped_at(point, make(&granted.session, *last)).await;
    nothing_is_left(&broker, &engine, &format!("{gates:?} {life:?} {point:?}")).await;
}

/// Whatever happened, past every time limit the session is gone and its connections accounted for.
async fn nothing_is_left(broker: &Broker, engine: &FakeEngine, case: &str) {
    sleep(Duration::from_mins(10)).await;
    let counts = engine.counts();
    let Counts { checked_out, released, discarded, released_open, run_outside, committing, .. } = counts;
    assert_eq!((released_open, run_outside), (0, 0), "{case}: {counts:?}");
    // A COMMIT in flight is never interrupted: it alone may still hold its connection, and its session.
    assert_eq!(checked_out, released + discarded + committing, "{case}: {counts:?}");
    assert_eq!(broker.live_sessions(), committing as usize, "{case}: {counts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_commit_in_flight_is_not_interrupted_by_its_caller_leaving() {
    let gates = Gates { commit: Gate::Slow, ..Gates::OPEN };
    let (broker, engine) = broker(gates, Profile::default(), Limits::default());
    let granted = broker.begin_session(&Principal::anonymous(), BeginSession::default()).unwrap();
    granted.session.execute(call(false)).await.unwrap();
    assert!(timeout(SLOW / 2, granted.session.commit(None)).await.is_err());
    // The next call waits for it, and hears its verdict.
    let verdict = granted.session.commit(None).await.unwrap().verdict;
    assert_eq!(
        (verdict, engine.counts().committed),
        (Verdict::Committed(TransactionId { xid: 1, commit_token: None }), 1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_statement_whose_caller_left_is_cancelled_and_not_committed() {
    let gates = Gates { execute: Gate::Never, ..Gates::OPEN };
    let (broker, engine) = broker(gates, Profile::default(), Limits::default());
    let granted = broker.begin_session(&Principal::anonymous(), BeginSession::default()).unwrap();
    assert!(timeout(SLOW, granted.session.execute(call(true))).await.is_err());
    sleep(Duration::from_millis(1)).await;
    let counts = engine.counts();
    assert_eq!((counts.released, counts.committed), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_leave_at_random_leave_nothing_open_in_postgresql() {
    const SEED: u64 = 20_261_122;
    const CALLERS: u64 = 16;
    const ROUNDS: u32 = 25;

    let database = Database::create();
    let broker = support::Broker::start_with(&database, "pool_size = 4\nmax_overflow = 0", "").await;
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..CALLERS {
        let mut random = StdRng::seed_from_u64(SEED + caller);
        let client = broker.client();
        callers.spawn(async move {
            for _ in 0..ROUNDS {
                let begun = support::Session::begin(client.clone(), pb::BeginSessionRequest::default()).await;
                let session = begun.unwrap();
                for _ in 0..3 {
                    let patience = Duration::from_micros(random.random_range(0..6000));
                    let (id, ending) = (random.random_range(1..=2), random.random_range(0..3));
                    let life = async {
                        let sql = format!("UPDATE accounts SET balance = balance + 1 WHERE id = {id}");
                        let _ = session.execute(&sql).await;
                        let _ = match ending {
                            0 => session.commit().await.map(drop),
                            1 => session.execute_and_commit("SELECT pg_sleep(0.001)").await.map(drop),
                            _ => session.rollback().await.map(drop),
                        };
                    };
                    let _ = timeout(patience, life).await;
                }
                session.close().await.unwrap();
            }
        });
    }
    callers.join_all().await;
    // Every session was closed, and Close returns when its transaction is over.
    assert_eq!(database.open_transactions(), "0");
    let locks = "SELECT count(*) FROM pg_locks WHERE relation = 'accounts'::regclass AND pid <> pg_backend_pid()";
    assert_eq!(database.psql(locks), "0");
    broker.stop().await;
}
