//! Leases: granted, renewed, suspended, expired. On the fake engine under a paused clock, where time matters.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use session_broker::broker::commit::CommitTokens;
use session_broker::broker::error::{Bound, EndReason, Error, Exhausted};
use session_broker::broker::grant::{Grant, Grants, Quotas};
use session_broker::broker::observer::Nobody;
use session_broker::broker::principal::Principal;
use session_broker::broker::profile::{Limits, Profile, Profiles};
use session_broker::broker::session::{CallOptions, ExecuteCall, Session, TransactionState};
use session_broker::broker::statement::{ResultFormat, Statement};
use session_broker::broker::token::SessionToken;
use session_broker::broker::{BeginSession, Broker};
use tokio::time::{Instant, advance, sleep};

use crate::fake_engine::{FakeEngine, Gate, Gates, PANICS};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

pub(crate) fn broker(gates: Gates, profile: Profile, limits: Limits) -> (Broker, Arc<FakeEngine>) {
    let profiles = profile.into();
    let engine = Arc::new(FakeEngine::new(gates));
    let engines = BTreeMap::from([("fake".to_owned(), engine.clone() as Arc<_>)]);
    (
        Broker::new(
            "test".into(),
            engines,
            "fake".into(),
            profiles,
            limits,
            CommitTokens::new(&[0; 32]),
            Arc::new(Nobody),
        ),
        engine,
    )
}

fn open_broker() -> (Broker, Arc<FakeEngine>) {
    broker(Gates::OPEN, Profile::default(), Limits::default())
}

pub(crate) fn begin(broker: &Broker, ttl: Duration) -> Arc<Session> {
    let request = BeginSession { lease_ttl: Some(ttl), ..BeginSession::default() };
    broker.begin_session(&Principal::anonymous(), request).unwrap().session
}

pub(crate) fn call(commit: bool) -> ExecuteCall {
    let statement = Statement::new("SELECT 1".into(), Vec::new()).unwrap();
    ExecuteCall {
        statements: [statement].into(),
        format: ResultFormat::Values,
        numbered: None,
        options: CallOptions { commit, ..CallOptions::default() },
    }
}

#[tokio::test(start_paused = true)]
async fn calls_on_one_session_run_one_at_a_time_in_arrival_order() {
    let gates = Gates { execute: Gate::Slow, ..Gates::OPEN };
    let profile = Profile { session_queue_max: 50, ..Profile::default() };
    let (broker, engine) = broker(gates, profile, Limits::default());
    let session = begin(&broker, 10 * SECOND);
    let mut calls = tokio::task::JoinSet::new();
    let expected: Vec<_> = (0..50).map(|n| format!("SELECT {n}")).collect();
    for sql in &expected {
        let statement = Statement::new(sql.clone(), Vec::new()).unwrap();
        let session = session.clone();
        calls.spawn(async move {
            session.execute(ExecuteCall { statements: [statement].into(), ..call(false) }).await.unwrap()
        });
        // It has arrived when it has run up to its turn.
        settle().await;
    }
    calls.join_all().await;
    assert_eq!((engine.log(), engine.counts().running_max), (expected, 1));
}

/// Lets tasks that are ready run, without moving the clock.
pub(crate) async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_session_ends_when_its_lease_runs_out_and_not_before() {
    let (broker, _) = open_broker();
    let session = begin(&broker, 10 * SECOND);
    advance((10 * SECOND).checked_sub(MILLISECOND).unwrap()).await;
    settle().await;
    assert_eq!(broker.live_sessions(), 1);
    // The wheel turns in steps of a millisecond.
    sleep(3 * MILLISECOND).await;
    assert_eq!(broker.live_sessions(), 0);
    assert_eq!(session.state(), Err(EndReason::LeaseExpired));
}

#[tokio::test(start_paused = true)]
async fn an_expired_lease_rolls_back_and_frees_the_connection() {
    let (broker, engine) = open_broker();
    let session = begin(&broker, 10 * SECOND);
    session.execute(call(false)).await.unwrap();
    sleep(10 * SECOND + 5 * MILLISECOND).await;
    assert_eq!(session.execute(call(false)).await.unwrap_err().error, Error::SessionEnded(EndReason::LeaseExpired));
    let counts = engine.counts();
    assert_eq!((counts.released, counts.discarded, counts.released_open, counts.statements), (1, 0, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn finished_calls_and_keep_alive_renew_the_lease() {
    let (broker, _) = open_broker();
    let session = begin(&broker, 10 * SECOND);
    for _ in 0..4 {
        sleep(9 * SECOND).await;
        assert_eq!(session.keep_alive().unwrap().lease_remaining, 10 * SECOND);
        sleep(9 * SECOND).await;
        session.commit(None).await.unwrap();
    }
    // Looking does not renew.
    sleep(9 * SECOND).await;
    assert_eq!(session.state().unwrap().lease_remaining, SECOND);
    sleep(2 * SECOND).await;
    assert_eq!(session.keep_alive(), Err(Error::SessionEnded(EndReason::LeaseExpired)));
}

#[tokio::test(start_paused = true)]
async fn a_running_statement_suspends_the_lease() {
    let gates = Gates { execute: Gate::Never, ..Gates::OPEN };
    let (broker, engine) = broker(gates, Profile::default(), Limits::default());
    let session = begin(&broker, SECOND);
    let before = Instant::now();
    // It runs thirty times its lease, until the statement timeout stops it.
    let failure = session.execute(call(false)).await.unwrap_err();
    assert_eq!(before.elapsed().as_secs(), 30);
    let after = 30 * SECOND;
    assert_eq!(failure.error, Error::DeadlineExceeded { bound: Bound::Profile, after });
    let state = failure.state.unwrap();
    assert_eq!((state.transaction, state.lease_remaining), (TransactionState::Failed, SECOND));
    sleep(2 * SECOND).await;
    assert_eq!(session.state(), Err(EndReason::LeaseExpired));
    assert_eq!(engine.counts().released, 1);
}

#[tokio::test(start_paused = true)]
async fn the_shortest_time_limit_wins_and_is_named() {
    let gates = Gates { execute: Gate::Never, ..Gates::OPEN };
    let profile = Profile { transaction_timeout: 20 * SECOND, ..Profile::default() };
    for (timeout, grpc, bound, seconds) in [
        (Some(5), Some(7), Bound::Request, 5),
        (Some(7), Some(5), Bound::GrpcDeadline, 5),
        (None, None, Bound::TransactionTimeout, 20),
        (Some(u64::MAX), None, Bound::TransactionTimeout, 20),
    ] {
        let (broker, _) = broker(gates, profile.clone(), Limits::default());
        let session = begin(&broker, SECOND);
        let options = CallOptions {
            timeout: timeout.map(Duration::from_secs),
            grpc_deadline: grpc.map(|seconds| Instant::now() + seconds * SECOND),
            ..CallOptions::default()
        };
        let timed = ExecuteCall { options, ..call(false) };
        let failure = session.execute(timed).await.unwrap_err();
        assert_eq!(failure.error, Error::DeadlineExceeded { bound, after: seconds * SECOND });
    }
}

#[tokio::test(start_paused = true)]
async fn an_open_transaction_ends_at_its_deadline_however_it_is_kept_alive() {
    let (broker, engine) = open_broker();
    let session = begin(&broker, 10 * SECOND);
    let state = session.execute(call(false)).await.unwrap().state;
    assert_eq!(state.transaction_remaining, Some(60 * SECOND));
    for _ in 0..11 {
        sleep(5 * SECOND).await;
        session.keep_alive().unwrap();
    }
    assert_eq!(session.state().unwrap().transaction_remaining, Some(5 * SECOND));
    sleep(6 * SECOND).await;
    assert_eq!(session.keep_alive(), Err(Error::SessionEnded(EndReason::TransactionDeadline)));
    assert_eq!(engine.counts().released, 1);
}

#[tokio::test(start_paused = true)]
async fn keeping_alive_for_ever_ends_at_the_maximum_age() {
    let profile = Profile { session_age_max: 60 * SECOND, ..Profile::default() };
    let (broker, _) = broker(Gates::OPEN, profile, Limits::default());
    let session = begin(&broker, 10 * SECOND);
    let began = Instant::now();
    while session.keep_alive().is_ok() {
        sleep(SECOND).await;
    }
    assert_eq!(session.state(), Err(EndReason::MaxAge));
    assert_eq!(began.elapsed().as_secs(), 60);
}

#[tokio::test(start_paused = true)]
async fn calls_that_follow_one_another_without_a_gap_end_at_the_maximum_age() {
    let gates = Gates { execute: Gate::Slow, ..Gates::OPEN };
    let profile = Profile { session_age_max: 30 * SECOND, ..Profile::default() };
    let (broker, engine) = broker(gates, profile, Limits::default());
    let session = begin(&broker, 10 * SECOND);
    let began = Instant::now();
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let session = session.clone();
        callers.spawn(async move {
            loop {
                if let Err(failure) = session.execute(call(true)).await {
                    return failure.error;
                }
            }
        });
    }
    let errors = callers.join_all().await;
    assert!(errors.iter().all(|error| *error == Error::SessionEnded(EndReason::MaxAge)), "{errors:?}");
    assert_eq!(began.elapsed().as_secs(), 30);
    sleep(SECOND).await;
    assert_eq!((session.state(), broker.live_sessions()), (Err(EndReason::MaxAge), 0));
    assert_eq!(engine.counts().released, engine.counts().checked_out);
}

#[tokio::test(start_paused = true)]
async fn a_principal_has_its_own_profiles() {
    let engines = BTreeMap::from([("fake".to_owned(), Arc::new(FakeEngine::new(Gates::OPEN)) as Arc<_>)]);
    let slow = Profile { lease_ttl: 60 * SECOND, ..Profile::default() };
    let slow_only = Grant { profiles: vec!["slow".to_owned()], ..Grant::default() };
    let profiles = Profiles {
        profiles: [(Profiles::DEFAULT.to_owned(), Profile::default()), ("slow".to_owned(), slow)].into(),
        principals: [("billing".to_owned(), slow_only), ("*".to_owned(), Grant::default())].into_iter().collect(),
    };
    let tokens = CommitTokens::new(&[0; 32]);
    let broker =
        Broker::new("test".into(), engines, "fake".into(), profiles, Limits::default(), tokens, Arc::new(Nobody));
    let begin = |principal: &str, profile: &str| {
        let request = BeginSession { profile: profile.to_owned(), ..BeginSession::default() };
        broker.begin_session(&Principal::new(principal), request).map(|granted| granted.lease_ttl)
    };
    let refused = |answer| matches!(answer, Err(Error::Invalid { field, .. }) if field == "profile");
    assert_eq!((begin("billing", ""), begin("shipping", "")), (Ok(60 * SECOND), Ok(30 * SECOND)));
    assert_eq!((begin("billing", "slow"), begin("shipping", "default")), (Ok(60 * SECOND), Ok(30 * SECOND)));
    assert!(refused(begin("billing", "default")) && refused(begin("shipping", "slow")));
}

#[tokio::test(start_paused = true)]
async fn a_panic_ends_its_own_session_alone() {
    let (broker, engine) = open_broker();
    let (dying, living) = (begin(&broker, 10 * SECOND), begin(&broker, 10 * SECOND));
    for session in [&dying, &living] {
        session.execute(call(false)).await.unwrap();
    }
    let statement = Statement::new(format!("SELECT '{PANICS}'"), Vec::new()).unwrap();
    let failure = dying.execute(ExecuteCall { statements: [statement].into(), ..call(true) }).await.unwrap_err();
    let Error::Internal { trace_id } = failure.error else { panic!("{failure:?}") };
    assert!(trace_id.len() == 32 && trace_id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{trace_id}");
    let again = dying.execute(call(true)).await.unwrap_err();
    assert_eq!(again.error, Error::SessionEnded(EndReason::BackendLost));
    living.execute(call(true)).await.unwrap();
    let counts = engine.counts();
    assert_eq!((broker.live_sessions(), counts.committed, counts.released, counts.checked_out), (1, 1, 1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_principals_quotas_are_its_own_and_what_ends_is_free_again() {
    let quotas = Quotas { sessions_max: Some(2), transactions_max: Some(1), ..Quotas::default() };
    let profiles = Profiles {
        principals: Grants::for_everybody(Grant { quotas, ..Grant::default() }),
        ..Profiles::from(Profile::default())
    };
    let engines = BTreeMap::from([("fake".to_owned(), Arc::new(FakeEngine::new(Gates::OPEN)) as Arc<_>)]);
    let tokens = CommitTokens::new(&[0; 32]);
    let broker =
        Broker::new("test".into(), engines, "fake".into(), profiles, Limits::default(), tokens, Arc::new(Nobody));
    let begin = |principal: &str| {
        let granted = broker.begin_session(&Principal::new(principal), BeginSession::default());
        granted.map(|granted| granted.session)
    };
    let sessions_exhausted =
        |answer: &Result<_, Error>| matches!(answer, Err(Error::Exhausted(Exhausted::PrincipalSessions(2))));
    let (first, second) = (begin("billing").unwrap(), begin("billing").unwrap());
    assert!(sessions_exhausted(&begin("billing")));
    let other = begin("shipping").unwrap();
    first.execute(call(false)).await.unwrap();
    let failure = second.execute(call(false)).await.unwrap_err();
    assert_eq!(failure.error, Error::Exhausted(Exhausted::PrincipalTransactions(1)));
    assert_eq!(failure.state.unwrap().transaction, TransactionState::None);
    other.execute(call(true)).await.unwrap();
    // As soon as the answer is there the next may begin, in its session and in others.
    for _ in 0..10 {
        first.commit(None).await.unwrap();
        second.execute(call(true)).await.unwrap();
        first.execute(call(false)).await.unwrap();
    }
    // It goes with its session, however that ends.
    sleep(31 * SECOND).await;
    assert_eq!(first.state(), Err(EndReason::LeaseExpired));
    let again = begin("billing").unwrap();
    again.execute(call(true)).await.unwrap();
    again.close().await.unwrap();
    let (_third, _fourth) = (begin("billing").unwrap(), begin("billing").unwrap());
    assert!(sessions_exhausted(&begin("billing")));
}

#[tokio::test(start_paused = true)]
async fn a_call_in_the_instant_of_expiry_runs_whole_or_not_at_all() {
    for early in [0, 1, 2, 3] {
        let (broker, engine) = open_broker();
        let session = begin(&broker, 10 * SECOND);
        advance((10 * SECOND).checked_sub(early * MILLISECOND).unwrap()).await;
        let answer = session.execute(call(true)).await;
        match answer {
            Ok(_) => assert_eq!((early > 0, engine.counts().committed), (true, 1)),
            Err(failure) => {
                assert_eq!(failure.error, Error::SessionEnded(EndReason::LeaseExpired));
                assert_eq!((early, engine.counts().statements), (0, 0));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn tombstones_are_kept_for_their_time_and_number() {
    let limits = Limits { tombstones_max: 2, tombstone_ttl: 60 * SECOND, ..Limits::default() };
    let (broker, _) = broker(Gates::OPEN, Profile::default(), limits);
    let anonymous = Principal::anonymous();
    let mut tokens: Vec<SessionToken> = Vec::new();
    for _ in 0..3 {
        let granted = broker.begin_session(&anonymous, BeginSession::default()).unwrap();
        granted.session.close().await.unwrap();
        tokens.push(granted.session.token().clone());
    }
    let standing = |token| broker.session(&anonymous, token).map(|session| session.state());
    assert_eq!(standing(&tokens[0]), Err(Error::SessionUnknown));
    assert_eq!(standing(&tokens[1]), Ok(Err(EndReason::Closed)));
    assert_eq!(standing(&tokens[2]), Ok(Err(EndReason::Closed)));
    advance(60 * SECOND).await;
    assert_eq!(standing(&tokens[2]), Err(Error::SessionUnknown));
}

#[tokio::test(start_paused = true)]
async fn a_session_answers_to_its_own_principal_only() {
    let (broker, _) = open_broker();
    let owner = Principal::new("billing");
    let granted = broker.begin_session(&owner, BeginSession::default()).unwrap();
    let stranger = broker.session(&Principal::new("shipping"), granted.session.token());
    assert_eq!(stranger.err(), Some(Error::SessionUnknown));
    assert!(broker.session(&owner, granted.session.token()).is_ok());
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_leases_due_at_once_are_all_reaped() {
    let (broker, engine) = open_broker();
    for n in 0..10_000 {
        let session = begin(&broker, 10 * SECOND);
        if n % 100 == 0 {
            session.execute(call(false)).await.unwrap();
        }
    }
    sleep(11 * SECOND).await;
    assert_eq!(broker.live_sessions(), 0);
    settle().await;
    assert_eq!(engine.counts().released, 100);
}

#[tokio::test(start_paused = true)]
async fn while_ten_thousand_leases_run_out_at_once_a_new_session_is_served() {
    let (broker, engine) = open_broker();
    for _ in 0..10_000 {
        begin(&broker, 10 * SECOND);
    }
    let broker = Arc::new(broker);
    let served = tokio::spawn({
        let broker = broker.clone();
        async move {
            sleep(9 * SECOND).await;
            // The clock stands still while there is anything to do.
            while broker.live_sessions() == 10_000 {
                sleep(MILLISECOND).await;
            }
            begin(&broker, SECOND).execute(call(true)).await.unwrap();
            broker.live_sessions()
        }
    });
    let left = served.await.unwrap();
    assert_eq!(engine.counts().committed, 1);
    assert!(left > 5000, "it was served after {} had been reaped", 10_001 - left);
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_idle_sessions_at_once_and_the_rest_after_its_grace() {
    let gates = Gates { execute: Gate::Never, ..Gates::OPEN };
    let (broker, engine) = broker(gates, Profile::default(), Limits::default());
    let (idle, busy) = (begin(&broker, 60 * SECOND), begin(&broker, 60 * SECOND));
    let running = tokio::spawn({
        let busy = busy.clone();
        async move { busy.execute(call(true)).await }
    });
    settle().await;
    let began = Instant::now();
    broker.drain(5 * SECOND).await;
    assert_eq!(began.elapsed().as_secs(), 5);
    assert_eq!((idle.state(), busy.state()), (Err(EndReason::Drained), Err(EndReason::Drained)));
    assert_eq!(running.await.unwrap().unwrap_err().error, Error::SessionEnded(EndReason::Drained));
    let counts = engine.counts();
    assert_eq!((counts.released + counts.discarded, counts.committed), (1, 0));
    assert!(matches!(broker.begin_session(&Principal::anonymous(), BeginSession::default()), Err(Error::Draining)));
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_end_as_their_time_comes_take_no_other_along_and_keep_no_other_alive() {
    let profile = Profile { lease_ttl_min: MILLISECOND, ..Profile::default() };
    let (broker, _) = broker(Gates::OPEN, profile, Limits::default());
    let broker = Arc::new(broker);
    let lasting = begin(&broker, 60 * SECOND);
    let mut callers = tokio::task::JoinSet::new();
    for seed in 0..4 {
        let broker = broker.clone();
        callers.spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            for _ in 0..5000 {
                let session = begin(&broker, random.random_range(1..5) * MILLISECOND);
                if random.random_ratio(1, 2) {
                    // Now, or about when its lease runs out.
                    let mut moment = random.random_range(0..3) * MILLISECOND;
                    moment += Duration::from_micros(random.random_range(0..1000));
                    sleep(moment).await;
                    session.close().await.unwrap();
                }
            }
        });
    }
    callers.join_all().await;
    while broker.live_sessions() > 1 {
        sleep(MILLISECOND).await;
    }
    lasting.keep_alive().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_and_the_expiry_at_one_instant_exactly_one_wins() {
    let (broker, engine) = open_broker();
    let (mut ran, mut expired) = (0, 0);
    for round in 0..10_000_u64 {
        let session = begin(&broker, SECOND);
        let mut random = StdRng::seed_from_u64(round);
        // Around the instant, which is one of the clock's milliseconds.
        let at = random.random_range(999..1002) * MILLISECOND;
        let call = tokio::spawn({
            let session = session.clone();
            async move {
                sleep(at).await;
                session.execute(call(true)).await
            }
        });
        match call.await.unwrap() {
            Ok(executed) => {
                assert!(executed.state.lease_remaining > Duration::ZERO);
                ran += 1;
            }
            Err(failure) => {
                assert_eq!(failure.error, Error::SessionEnded(EndReason::LeaseExpired));
                expired += 1;
            }
        }
        session.close().await.unwrap();
    }
    assert!(ran > 1000 && expired > 1000, "{ran} ran, {expired} expired");
    assert_eq!(engine.counts().committed, ran);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_expiries_that_race_leave_exactly_one_winner() {
    let profile = Profile { lease_ttl_min: MILLISECOND, ..Profile::default() };
    let (broker, engine) = broker(Gates::OPEN, profile, Limits::default());
    let broker = Arc::new(broker);
    let mut callers = tokio::task::JoinSet::new();
    for seed in 0..4 {
        let broker = broker.clone();
        callers.spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            let mut ran = 0;
            for _ in 0..2500 {
                let session = begin(&broker, 2 * MILLISECOND);
                // About when its lease runs out, by the clocks of two threads.
                let mut moment = random.random_range(0..3) * MILLISECOND;
                moment += Duration::from_micros(random.random_range(0..1000));
                sleep(moment).await;
                match session.execute(call(true)).await {
                    Ok(_) => ran += 1,
                    Err(failure) => assert_eq!(failure.error, Error::SessionEnded(EndReason::LeaseExpired)),
                }
            }
            ran
        });
    }
    let ran = callers.join_all().await.iter().sum();
    let counts = engine.counts();
    assert_eq!((counts.statements, counts.committed), (ran, ran));
    assert!(ran > 0 && ran < 10_000, "{ran} ran");
}
