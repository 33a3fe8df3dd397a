//! What idle sessions cost, and how late abandoned ones are reaped: the figures for `cargo bench --bench leases`.
//!
//! Sessions are begun in the broker itself, without gRPC and without a database, which they do not touch while idle.
//! Memory is the process's resident set, measured, not computed. `SESSIONS` (100000) says how many.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "it prints its figures, and fails where it cannot")]

mod support;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use session_broker::broker::principal::Principal;
use session_broker::broker::{BeginSession, Broker};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use support::{LEASE_TTL_MAX, broker};

/// When each session ended, by its id.
#[derive(Clone, Default)]
struct Ends(Arc<Mutex<HashMap<String, Instant>>>);

impl<S: Subscriber> Layer<S> for Ends {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Id(Option<String>);
        impl Visit for Id {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                if field.name() == "session.id" {
                    self.0 = Some(format!("{value:?}"));
                }
            }
        }
        let now = Instant::now();
        if event.fields().any(|field| field.name() == "session.end_reason") {
            let mut id = Id(None);
            event.record(&mut id);
            self.0.lock().unwrap().insert(id.0.unwrap(), now);
        }
    }
}

fn main() {
    let sessions = std::env::var("SESSIONS").map_or(100_000, |sessions| sessions.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        println!("{sessions} idle sessions: {} bytes each", memory(sessions).await);
    });
    let ends = Ends::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(ends.clone())).unwrap();
    runtime.block_on(async {
        let spread = lateness(sessions, Duration::from_secs(2), &ends).await;
        println!("due over 2 s: p50 {:?}, p99 {:?}, last {:?} late", spread.p50, spread.p99, spread.last);
        let at_once = lateness(sessions, Duration::ZERO, &ends).await;
        println!("due at once: p50 {:?}, p99 {:?}, last {:?} late", at_once.p50, at_once.p99, at_once.last);
        for (how, lateness) in [("over 2 s", spread), ("at once", at_once)] {
            let Lateness { at_rest, meanwhile, .. } = lateness;
            let last = |calls: &[Duration]| calls[calls.len() - 1];
            println!(
                "calls while they are reaped {how}: p99 {:?}, last {:?}; at rest p99 {:?}, last {:?}",
                p99(&meanwhile),
                last(&meanwhile),
                p99(&at_rest),
                last(&at_rest)
            );
        }
    });
}

/// Bytes of the process in memory.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// What one of so many idle sessions takes.
async fn memory(sessions: usize) -> usize {
    let broker = broker(sessions);
    let before = resident();
    for _ in 0..sessions {
        let request = BeginSession { lease_ttl: Some(LEASE_TTL_MAX), ..BeginSession::default() };
        broker.begin_session(&Principal::anonymous(), request).unwrap();
    }
    // The reaper has its own tables, which it fills in its own time.
    sleep(Duration::from_secs(1) * u32::try_from(sessions.div_ceil(100_000)).unwrap()).await;
    assert_eq!(broker.live_sessions(), sessions);
    (resident() - before) / sessions
}

struct Lateness {
    p50: Duration,
    p99: Duration,
    last: Duration,
    /// How long other calls took before, and while they were reaped.
    at_rest: Vec<Duration>,
    meanwhile: Vec<Duration>,
}

/// How late sessions are reaped whose leases run out over that time, and what that does to other calls.
async fn lateness(sessions: usize, over: Duration, ends: &Ends) -> Lateness {
    let broker = Arc::new(broker(sessions));
    // Long enough to begin them all before the first is due, with as much left to see how calls fare at rest.
    let beginning = Duration::from_secs(3) * u32::try_from(sessions.div_ceil(100_000)).unwrap();
    let start = Instant::now() + 2 * beginning;
    let mut due = HashMap::new();
    for number in 0..u32::try_from(sessions).unwrap() {
        let at = start + over * number / u32::try_from(sessions).unwrap();
        let request = BeginSession { lease_ttl: Some(at - Instant::now()), ..BeginSession::default() };
        let granted = broker.begin_session(&Principal::anonymous(), request).unwrap();
        due.insert(granted.session.id().to_string(), at);
    }
    assert!(Instant::now() < start - beginning, "it took too long to begin them");
    sleep_until(start - beginning).await;
    let at_rest = calls_until(&broker, start).await;
    let meanwhile = calls_until(&broker, start + over + beginning).await;
    let ended = std::mem::take(&mut *ends.0.lock().unwrap());
    let late = due.iter().map(|(id, due)| {
        let ended = *ended.get(id).expect("it was reaped");
        assert!(ended >= *due, "it was reaped before its time");
        ended - *due
    });
    let late = sorted(late.collect());
    Lateness { p50: late[late.len() / 2], p99: p99(&late), last: late[late.len() - 1], at_rest, meanwhile }
}

/// Makes a call each millisecond, whether the ones before are through or not, and returns how long after its time each
/// was: begins a session, looks it up by its token, keeps it alive.
async fn calls_until(broker: &Arc<Broker>, end: Instant) -> Vec<Duration> {
    let mut calls = JoinSet::new();
    let mut time = Instant::now();
    while time < end {
        time += Duration::from_millis(1);
        sleep_until(time).await;
        let (broker, due) = (broker.clone(), time);
        calls.spawn(async move {
            let granted = broker.begin_session(&Principal::anonymous(), BeginSession::default()).unwrap();
            let session = broker.session(&Principal::anonymous(), granted.session.token()).unwrap();
            session.keep_alive().unwrap();
            due.elapsed()
        });
    }
    sorted(calls.join_all().await)
}

fn p99(sorted: &[Duration]) -> Duration {
    sorted[sorted.len() * 99 / 100]
}

fn sorted(mut durations: Vec<Duration>) -> Vec<Duration> {
    durations.sort_unstable();
    durations
}
