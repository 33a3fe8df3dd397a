//! Attach, the idle limits and the dry run, to the moment. On the fake engine under a paused clock.

use std::sync::Arc;
use std::time::Duration;

use session_broker::broker::Broker;
use session_broker::broker::attach::{Attached, Event};
use session_broker::broker::error::{EndReason, Error};
use session_broker::broker::profile::{Limits, Profile, ReaperMode};
use session_broker::broker::session::{ExecuteCall, Numbered, TransactionState};
use tokio::time::{Instant, advance, sleep};

use crate::fake_engine::{FakeEngine, Gate, Gates};
use crate::leases::{begin, broker, call, settle};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn start(profile: Profile) -> (Broker, Arc<FakeEngine>) {
    broker(Gates::OPEN, profile, Limits::default())
}

/// The next event that is no heartbeat, and how many seconds after `since` it comes.
async fn told(stream: &mut Attached, since: Instant) -> (u64, Option<Event>) {
    loop {
        match stream.next().await {
            Some(Event::Heartbeat(_)) => {}
            event => return (since.elapsed().as_secs(), event),
        }
    }
}

/// In seconds. Timers fire a millisecond or so after their time, when that much less is left.
fn left(remaining: Duration) -> u64 {
    (remaining + 5 * MILLISECOND).as_secs()
}

#[tokio::test(start_paused = true)]
async fn a_session_whose_stream_is_gone_ends_after_the_grace_and_not_before() {
    let (broker, engine) = start(Profile::default());
    let session = begin(&broker, 60 * SECOND);
    session.execute(call(false)).await.unwrap();
    drop(session.attach().unwrap());
    advance((5 * SECOND).checked_sub(MILLISECOND).unwrap()).await;
    settle().await;
    assert_eq!(broker.live_sessions(), 1);
    // Looking does not bring the caller back.
    assert!(!session.state().unwrap().attached);
    sleep(3 * MILLISECOND).await;
    assert_eq!(broker.live_sessions(), 0);
    assert_eq!(session.state(), Err(EndReason::Disconnected));
    settle().await;
    let counts = engine.counts();
    assert_eq!((counts.released, counts.committed), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_begins_within_the_grace_gives_the_session_its_lease_back() {
    for used in [false, true] {
        let (broker, _) = start(Profile::default());
        let session = begin(&broker, 10 * SECOND);
        drop(session.attach().unwrap());
        sleep(4 * SECOND).await;
        if used {
            session.commit(None).await.unwrap();
        } else {
            session.keep_alive().unwrap();
        }
        assert_eq!(session.state().unwrap().lease_remaining, 10 * SECOND);
        sleep(9 * SECOND).await;
        assert_eq!(broker.live_sessions(), 1);
        sleep(2 * SECOND).await;
        assert_eq!(broker.live_sessions(), 0);
        assert_eq!(session.state(), Err(EndReason::LeaseExpired));
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_was_running_when_its_stream_went_brings_nobody_back() {
    // It ends by itself, or past the grace by the statement timeout.
    for execute in [Gate::Slow, Gate::Never] {
        let (broker, _) = broker(Gates { execute, ..Gates::OPEN }, Profile::default(), Limits::default());
        let session = begin(&broker, 60 * SECOND);
        let stream = session.attach().unwrap();
        let running = tokio::spawn({
            let session = session.clone();
            async move { session.execute(call(false)).await }
        });
        settle().await;
        drop(stream);
        assert_eq!(running.await.unwrap().is_ok(), execute == Gate::Slow);
        sleep(5 * SECOND + 5 * MILLISECOND).await;
        assert_eq!(broker.live_sessions(), 0, "{execute:?}");
        assert_eq!(session.state(), Err(EndReason::Disconnected));
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_has_one_stream_at_a_time_and_each_has_its_grace() {
    let (broker, _) = start(Profile::default());
    let session = begin(&broker, 10 * SECOND);
    let first = session.attach().unwrap();
    assert_eq!(session.attach().err().unwrap().error, Error::AlreadyAttached);
    drop(first);
    sleep(4 * SECOND).await;
    let second = session.attach().unwrap();
    sleep(60 * SECOND).await;
    drop(second);
    sleep(4 * SECOND).await;
    assert_eq!(broker.live_sessions(), 1);
    sleep(2 * SECOND).await;
    assert_eq!(session.state(), Err(EndReason::Disconnected));
}

#[tokio::test(start_paused = true)]
async fn an_open_stream_keeps_a_session_and_beats_every_five_seconds() {
    let long = Duration::from_hours(10);
    let (broker, _) = start(Profile { session_age_max: long, session_idle_timeout: long, ..Profile::default() });
    let session = begin(&broker, 10 * SECOND);
    let mut stream = session.attach().unwrap();
    let began = Instant::now();
    for _ in 0..=720 {
        let Some(Event::Heartbeat(state)) = stream.next().await else { panic!("no heartbeat") };
        assert_eq!((state.attached, state.lease_remaining), (true, 10 * SECOND));
    }
    assert_eq!(began.elapsed().as_secs() / 60, 60);
    // Also while its caller is too slow to hear.
    sleep(60 * SECOND).await;
    assert_eq!(session.state().unwrap().lease_remaining, 10 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn keeping_alive_for_ever_ends_at_the_idle_limit() {
    let (broker, _) = start(Profile::default());
    let session = begin(&broker, 10 * SECOND);
    let began = Instant::now();
    while session.keep_alive().is_ok() {
        // Asking for nothing to be stopped is no use either.
        assert_eq!(session.cancel().await.unwrap_err().error, Error::NothingToCancel);
        sleep(SECOND).await;
    }
    assert_eq!((session.state(), began.elapsed().as_secs()), (Err(EndReason::IdleTimeout), 300));
}

#[tokio::test(start_paused = true)]
async fn calls_that_do_nothing_for_ever_end_at_the_maximum_age() {
    let (broker, _) = start(Profile::default());
    let session = begin(&broker, 10 * SECOND);
    let began = Instant::now();
    while session.commit(None).await.is_ok() && session.rollback().await.is_ok() {
        sleep(SECOND).await;
    }
    assert_eq!((session.state(), began.elapsed().as_secs()), (Err(EndReason::MaxAge), 30 * 60));
}

#[tokio::test(start_paused = true)]
async fn a_transaction_that_is_only_kept_alive_ends_at_its_idle_limit_and_is_rolled_back() {
    let (broker, engine) = start(Profile { idle_in_transaction_timeout: 20 * SECOND, ..Profile::default() });
    let session = begin(&broker, 10 * SECOND);
    assert_eq!(session.state().unwrap().idle_remaining, 300 * SECOND);
    assert_eq!(session.execute(call(false)).await.unwrap().state.idle_remaining, 20 * SECOND);
    let began = Instant::now();
    // The limit strikes between two renewals.
    sleep(SECOND / 2).await;
    while session.keep_alive().is_ok() {
        sleep(SECOND).await;
    }
    assert_eq!((session.state(), began.elapsed().as_secs()), (Err(EndReason::IdleTimeout), 20));
    settle().await;
    let counts = engine.counts();
    assert_eq!((counts.released, counts.committed), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_nothing_ran_for_counts_as_use_of_the_transaction_too() {
    let (broker, _) = start(Profile { idle_in_transaction_timeout: 10 * SECOND, ..Profile::default() });
    let session = begin(&broker, 60 * SECOND);
    let first = || ExecuteCall { numbered: Some(Numbered { seq: 1, fingerprint: [0; 32] }), ..call(false) };
    session.execute(first()).await.unwrap();
    sleep(9 * SECOND).await;
    assert_eq!(session.execute(first()).await.unwrap().state.idle_remaining, 10 * SECOND);
    sleep(9 * SECOND).await;
    assert_eq!(left(session.state().unwrap().idle_remaining), 1);
    sleep(2 * SECOND).await;
    assert_eq!(session.state(), Err(EndReason::IdleTimeout));
}

#[tokio::test(start_paused = true)]
async fn a_lease_shorter_than_the_grace_is_not_reaped_late_when_its_caller_came_back_and_went() {
    let (broker, _) = start(Profile::default());
    let session = begin(&broker, SECOND);
    drop(session.attach().unwrap());
    sleep(SECOND / 10).await;
    session.keep_alive().unwrap();
    sleep(SECOND + 5 * MILLISECOND).await;
    assert_eq!((broker.live_sessions(), session.state()), (0, Err(EndReason::LeaseExpired)));
}

#[tokio::test(start_paused = true)]
async fn a_running_statement_suspends_the_idle_limit() {
    let gates = Gates { execute: Gate::Never, ..Gates::OPEN };
    let profile = Profile { idle_in_transaction_timeout: 10 * SECOND, ..Profile::default() };
    let (broker, _) = broker(gates, profile, Limits::default());
    let session = begin(&broker, 60 * SECOND);
    // Thirty seconds, until the statement timeout stops it.
    let state = session.execute(call(false)).await.unwrap_err().state.unwrap();
    assert_eq!((state.transaction, state.idle_remaining), (TransactionState::Failed, 10 * SECOND));
    sleep(9 * SECOND).await;
    assert_eq!(left(session.state().unwrap().idle_remaining), 1);
    sleep(2 * SECOND).await;
    assert_eq!(session.state(), Err(EndReason::IdleTimeout));
}

#[tokio::test(start_paused = true)]
async fn a_caller_is_told_when_a_fifth_is_left_of_the_maximum_age() {
    let (broker, _) = start(Profile { session_age_max: 100 * SECOND, ..Profile::default() });
    let session = begin(&broker, 10 * SECOND);
    let mut stream = session.attach().unwrap();
    let began = Instant::now();
    let (at, event) = told(&mut stream, began).await;
    let Some(Event::LeaseLow { end_reason, remaining, .. }) = event else { panic!("not told") };
    assert_eq!((at, end_reason, left(remaining)), (80, EndReason::MaxAge, 20));
    let (at, event) = told(&mut stream, began).await;
    assert!(matches!((at, event), (100, Some(Event::Ended(EndReason::MaxAge)))));
    assert!(stream.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_caller_is_told_whenever_a_fifth_is_left_of_the_idle_limit() {
    let (broker, _) = start(Profile::default());
    let session = begin(&broker, 10 * SECOND);
    let mut stream = session.attach().unwrap();
    for _ in 0..2 {
        let used = Instant::now();
        session.commit(None).await.unwrap();
        let (at, event) = told(&mut stream, used).await;
        let Some(Event::LeaseLow { end_reason, remaining, .. }) = event else { panic!("not told") };
        assert_eq!((at, end_reason, left(remaining)), (240, EndReason::IdleTimeout, 60));
    }
    // Keeping alive is not enough, and not told of again.
    session.keep_alive().unwrap();
    let low = Instant::now();
    let (at, event) = told(&mut stream, low).await;
    assert!(matches!(event, Some(Event::Ended(EndReason::IdleTimeout))));
    assert!((59..=60).contains(&at), "{at}");
}

#[tokio::test(start_paused = true)]
async fn a_caller_is_told_of_each_transaction_of_whose_time_a_fifth_is_left() {
    let idle = Duration::from_mins(10);
    let profile = Profile { transaction_timeout: 50 * SECOND, idle_in_transaction_timeout: idle, ..Profile::default() };
    let (broker, _) = start(profile);
    let session = begin(&broker, 10 * SECOND);
    let mut stream = session.attach().unwrap();
    let mut began = Instant::now();
    for _ in 0..3 {
        session.rollback().await.unwrap();
        began = Instant::now();
        session.execute(call(false)).await.unwrap();
        let (at, event) = told(&mut stream, began).await;
        let Some(Event::TransactionLong(state)) = event else { panic!("not told") };
        assert_eq!((at, left(state.transaction_remaining.unwrap())), (40, 10));
    }
    let (at, event) = told(&mut stream, began).await;
    assert!(matches!((at, event), (50, Some(Event::Ended(EndReason::TransactionDeadline)))));
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_counts_each_session_once_and_ends_none() {
    let limits = Limits { reaper: ReaperMode::DryRun, ..Limits::default() };
    let (broker, _) = broker(Gates::OPEN, Profile::default(), limits);
    let (leased, abandoned) = (begin(&broker, 10 * SECOND), begin(&broker, 60 * SECOND));
    drop(abandoned.attach().unwrap());
    for (seconds, reaped) in [(4, 0), (2, 1), (5, 2)] {
        sleep(seconds * SECOND).await;
        assert_eq!(broker.would_have_reaped(), reaped);
    }
    leased.execute(call(true)).await.unwrap();
    abandoned.keep_alive().unwrap();
    // Past every limit there is.
    sleep(Duration::from_hours(1)).await;
    assert_eq!((broker.would_have_reaped(), broker.live_sessions()), (2, 2));
    leased.execute(call(true)).await.unwrap();
    abandoned.execute(call(true)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_rolls_back_transactions_past_their_deadline() {
    let limits = Limits { reaper: ReaperMode::DryRun, ..Limits::default() };
    let (broker, engine) = broker(Gates::OPEN, Profile::default(), limits);
    let session = begin(&broker, 10 * SECOND);
    session.execute(call(false)).await.unwrap();
    sleep(61 * SECOND).await;
    assert_eq!(session.state(), Err(EndReason::TransactionDeadline));
    assert_eq!(engine.counts().released, 1);
}
