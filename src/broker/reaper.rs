//! Ends the sessions whose lease has run out, from a timer wheel.
//!
//! A session renews by writing its own due instant; the wheel is not touched. When an entry comes due, the session is
//! asked: it has ended, or it names its next possible instant. Invariant: a session whose call runs or waits is never
//! reaped; [`Session::expire`] judges under the session's own lock, so a call and the reaper cannot both win.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::time::DelayQueue;

use super::session::Session;
use super::token::SessionId;

/// What the reaper is told.
#[derive(Debug)]
pub(super) enum Order {
    /// A session has begun; its lease cannot run out before this instant.
    Watch(SessionId, Instant),
    /// A session has ended.
    Forget(SessionId),
}

/// Turns the wheel until it is aborted. `find` looks a session up.
pub(super) async fn run(mut orders: mpsc::UnboundedReceiver<Order>, find: impl Fn(SessionId) -> Option<Arc<Session>>) {
    let mut wheel = DelayQueue::new();
    let mut keys = HashMap::new();
    loop {
        tokio::select! {
            Some(order) = orders.recv() => match order {
                Order::Watch(id, due) => drop(keys.insert(id, wheel.insert_at(id, due))),
                Order::Forget(id) => if let Some(key) = keys.remove(&id) {
                    wheel.remove(&key);
                },
            },
            Some(expired) = wheel.next(), if !wheel.is_empty() => {
                let id = expired.into_inner();
                // Ending the session orders it forgotten, when its key is gone already.
                match find(id).and_then(|session| session.expire()) {
                    Some(due) => drop(keys.insert(id, wheel.insert_at(id, due))),
                    None => drop(keys.remove(&id)),
                }
            }
        }
    }
}
