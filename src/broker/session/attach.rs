//! Attach: a stream that keeps a session and tells what happens to it.
//!
//! Nothing waits for the stream, and it holds nothing but the session: it looks, says what is new, and sleeps until
//! there can be more to say. Invariant: dropping it is the one sign that its caller has gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{BackendInfo, Failure, Phase, Session, SessionState};
use crate::broker::engine::Blocker;
use crate::broker::error::{EndReason, Error};

/// How often the stream says that the broker is there. Twice within what most clients wait for a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How long a statement runs before somebody is asked what it waits for, and how often from then on: as long as
/// PostgreSQL itself waits before it looks for a deadlock.
const LOOK_FOR_BLOCKERS: Duration = Duration::from_secs(1);

/// A limit is about to be met when this part of it is left.
const LOW_PART: u32 = 5;

/// What happens to a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Nothing: the broker is there.
    Heartbeat(SessionState),
    /// It is about to end, for this reason and in this time, whatever the stream.
    LeaseLow {
        /// The session.
        state: SessionState,
        /// `MaxAge` or `IdleTimeout`.
        end_reason: EndReason,
        /// How long it has.
        remaining: Duration,
    },
    /// Its transaction is about to meet its deadline.
    TransactionLong(SessionState),
    /// Its statement waits for these, which may be nobody any more.
    BlockedBy {
        /// The session.
        state: SessionState,
        /// In the order of their process ids.
        blockers: Vec<Blocker>,
    },
    /// The broker is about to stop.
    Draining(SessionState),
    /// It has ended. Nothing follows.
    Ended(EndReason),
}

/// A session's stream. Dropped, its caller is gone.
#[derive(Debug)]
pub struct Attached {
    session: Arc<Session>,
    changed: Arc<Notify>,
    next_heartbeat: Instant,
    said: Said,
}

/// What has been said, and is not to be said again.
#[derive(Debug, Default)]
struct Said {
    ended: bool,
    draining: bool,
    age_low: bool,
    /// For the idle time that began then.
    idle_low: Option<Instant>,
    /// Of the transaction with that deadline.
    transaction_long: Option<Instant>,
    blocked: Blocked,
}

/// What the statement that runs waits for.
#[derive(Debug, Default)]
struct Blocked {
    /// The statement's beginning.
    since: Option<Instant>,
    by: Vec<Blocker>,
    asked: Option<Instant>,
}

/// What there is to do.
enum Next {
    Say(Event),
    Ask(BackendInfo),
    Wait(Instant),
}

/// A session at one instant.
struct View {
    state: SessionState,
    idle_since: Instant,
    idle_limit: Duration,
    transaction_deadline: Option<Instant>,
    /// The statement that runs: since when, and where.
    running: Option<(Instant, BackendInfo)>,
}

impl Session {
    /// Has a stream keep the session: until it is gone, the lease does not run out. It is told of changes.
    ///
    /// # Errors
    /// [`Error::SessionEnded`], and [`Error::AlreadyAttached`] while another is open.
    pub(super) fn open_stream(&self) -> Result<Arc<Notify>, Failure> {
        let state = self.keep_alive()?;
        let changed = Arc::new(Notify::new());
        let mut locked = self.lock();
        locked.alive()?;
        if locked.lease.is_attached() {
            return Err(Failure { state: Some(state), ..Error::AlreadyAttached.into() });
        }
        locked.lease.attach();
        locked.changed = Some(changed.clone());
        Ok(changed)
    }

    /// Opens a stream that tells its caller what happens.
    ///
    /// # Errors
    /// [`Error::SessionEnded`], and [`Error::AlreadyAttached`] while another stream is open.
    pub fn attach(self: &Arc<Self>) -> Result<Attached, Failure> {
        let changed = self.open_stream()?;
        Ok(Attached { session: self.clone(), changed, next_heartbeat: Instant::now(), said: Said::default() })
    }

    /// Tells the stream that is attached, if one is, to look again.
    pub(in crate::broker) fn tell(&self) {
        self.lock().tell();
    }

    /// The stream is gone, and perhaps its caller.
    pub(super) fn detach(&self) {
        let mut state = self.lock();
        state.changed = None;
        if state.alive().is_ok() {
            state.lease.detach(Instant::now(), self.profile().disconnect_grace);
            drop(state);
            // Its place in the wheel may be far away.
            self.shared.watch(self.id());
        }
    }

    fn view(&self, now: Instant) -> Result<View, EndReason> {
        let state = self.lock();
        let snapshot = self.standing(&state, now)?;
        let (transaction_deadline, running) = match &state.phase {
            Phase::Idle | Phase::Ended(_) => (None, None),
            Phase::Open(open) => {
                let running = open.running.as_ref().filter(|running| !running.is_over());
                (Some(open.deadline), running.map(|running| running.since).zip(open.backend.clone()))
            }
        };
        Ok(View {
            state: snapshot,
            idle_since: state.lease.idle_since(),
            idle_limit: self.idle_limit(&state),
            transaction_deadline,
            running,
        })
    }
}

impl Attached {
    /// Waits for the next event; `None` when the last has been told.
    ///
    /// # Cancel safety
    /// Dropping the future loses no event.
    pub async fn next(&mut self) -> Option<Event> {
        while !self.said.ended {
            match self.look(Instant::now()) {
                Next::Say(event) => return Some(event),
                Next::Wait(until) => tokio::select! {
                    () = sleep_until(until) => {}
                    () = self.changed.notified() => {}
                },
                Next::Ask(backend) => {
                    self.said.blocked.asked = Some(Instant::now());
                    let asking = self.session.engine().blockers(&backend.host, backend.pid);
                    // A server that does not say must not hold the heartbeat up.
                    let asked = timeout_at(self.next_heartbeat, asking).await;
                    // Who cannot be asked has nothing to say.
                    if let Ok(Ok(by)) = asked
                        && by != self.said.blocked.by
                        && let Some(state) = self.still_running()
                    {
                        self.said.blocked.by.clone_from(&by);
                        return Some(Event::BlockedBy { state, blockers: by });
                    }
                }
            }
        }
        None
    }

    /// The session, if the statement that was asked about still runs.
    fn still_running(&self) -> Option<SessionState> {
        let View { state, running, .. } = self.session.view(Instant::now()).ok()?;
        (running?.0 == self.said.blocked.since?).then_some(state)
    }

    /// What there is to say now, or when to look again.
    fn look(&mut self, now: Instant) -> Next {
        let View { state, idle_since, idle_limit, transaction_deadline, running } = match self.session.view(now) {
            Ok(view) => view,
            Err(reason) => {
                self.said.ended = true;
                return Next::Say(Event::Ended(reason));
            }
        };
        if self.next_heartbeat <= now {
            self.next_heartbeat = now + HEARTBEAT;
            return Next::Say(Event::Heartbeat(state));
        }
        if state.draining && !self.said.draining {
            self.said.draining = true;
            return Next::Say(Event::Draining(state));
        }
        let mut wake = self.next_heartbeat;
        let remaining = state.session_remaining;
        match until_low(remaining, self.session.profile().session_age_max) {
            Some(left) => wake = wake.min(now + left),
            None if !self.said.age_low => {
                self.said.age_low = true;
                return Next::Say(Event::LeaseLow { state, end_reason: EndReason::MaxAge, remaining });
            }
            None => {}
        }
        let remaining = state.idle_remaining;
        match until_low(remaining, idle_limit) {
            Some(left) => wake = wake.min(now + left),
            None if self.said.idle_low != Some(idle_since) => {
                self.said.idle_low = Some(idle_since);
                return Next::Say(Event::LeaseLow { state, end_reason: EndReason::IdleTimeout, remaining });
            }
            None => {}
        }
        if let Some((deadline, remaining)) = transaction_deadline.zip(state.transaction_remaining) {
            match until_low(remaining, self.session.transaction_timeout()) {
                Some(left) => wake = wake.min(now + left),
                None if self.said.transaction_long != Some(deadline) => {
                    self.said.transaction_long = Some(deadline);
                    return Next::Say(Event::TransactionLong(state));
                }
                None => {}
            }
        }
        let since = running.as_ref().map(|(since, _)| *since);
        if self.said.blocked.since != since {
            self.said.blocked = Blocked { since, ..Blocked::default() };
        }
        if let Some((since, backend)) = running {
            let due = self.said.blocked.asked.unwrap_or(since) + LOOK_FOR_BLOCKERS;
            if due <= now {
                return Next::Ask(backend);
            }
            wake = wake.min(due);
        }
        Next::Wait(wake)
    }
}

/// How long until only the last part of a limit is left; `None` once it is.
fn until_low(remaining: Duration, limit: Duration) -> Option<Duration> {
    remaining.checked_sub(limit / LOW_PART).filter(|left| !left.is_zero())
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.session.detach();
    }
}
