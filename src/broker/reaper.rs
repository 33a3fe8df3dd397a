//! Ends the sessions whose lease has run out, from a timer wheel.
//!
//! A session renews by writing its own due instant; the wheel is not touched. When an entry comes due, the session is
//! asked: it has ended, or it names its next possible instant. What was open is rolled back by its transaction's own task,
//! so that no more of them do so at a time than the pools have connections. Invariant: a session whose call runs or waits
//! is never reaped; [`Session::expire`] judges under the session's own lock, so a call and the reaper cannot both win.

use std::sync::Arc;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::Instant;
use tokio_util::time::{DelayQueue, delay_queue};

use super::session::Session;
use super::token::SessionId;

/// A session's place in the wheel.
pub(super) type Place = delay_queue::Key;

type Wheel = DelayQueue<SessionId>;

/// What the reaper is told.
#[derive(Debug)]
pub(super) enum Order {
    /// A session has begun, or its lease may run out sooner than it could before.
    Watch(SessionId),
    /// The session that had that place has ended.
    Forget(SessionId, Place),
}

/// How many sessions are looked at in one go before other tasks get their turn.
const SLICE: usize = 64;

/// Turns the wheel until it is aborted. `find` looks a session up.
pub(super) async fn run(mut orders: mpsc::UnboundedReceiver<Order>, find: impl Fn(SessionId) -> Option<Arc<Session>>) {
    let mut wheel = Wheel::new();
    loop {
        for _ in 0..SLICE {
            tokio::select! {
                Some(order) = orders.recv() => match order {
                    Order::Watch(id) => if let Some(session) = find(id) {
                        if let Some(place) = session.take_place() {
                            forget(&mut wheel, id, place, &find);
                        }
                        judge(&mut wheel, &session);
                    },
                    Order::Forget(id, place) => forget(&mut wheel, id, place, &find),
                },
                Some(expired) = wheel.next(), if !wheel.is_empty() => if let Some(session) = find(expired.into_inner()) {
                    judge(&mut wheel, &session);
                },
            }
        }
        yield_now().await;
    }
}

/// Reaps a session, or gives it its place.
fn judge(wheel: &mut Wheel, session: &Session) {
    if let Some(due) = session.expire() {
        place(wheel, session, due);
    }
}

/// Takes a session out of the wheel. Its place may have been given to another when its time had come just before.
fn forget(wheel: &mut Wheel, id: SessionId, place: Place, find: &impl Fn(SessionId) -> Option<Arc<Session>>) {
    if let Some(removed) = wheel.try_remove(&place)
        && *removed.get_ref() != id
        && let Some(other) = find(*removed.get_ref())
    {
        self::place(wheel, &other, removed.deadline());
    }
}

/// Gives a session a place, unless it has ended meanwhile.
fn place(wheel: &mut Wheel, session: &Session, due: Instant) {
    let place = wheel.insert_at(session.id(), due);
    if !session.set_place(place) {
        wheel.remove(&place);
    }
}
