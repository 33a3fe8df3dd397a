//! Ends the sessions whose lease has run out, from a timer wheel.
//!
//! A session renews by writing its own due instant; the wheel is not touched. When an entry comes due, the session is
//! asked: it has ended, or it names its next possible instant. Invariant: a session whose call runs or waits is never
//! reaped; [`Session::expire`] judges under the session's own lock, so a call and the reaper cannot both win.

use std::sync::Arc;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::time::DelayQueue;

use super::session::Session;
use super::token::SessionId;

/// A new session for the wheel, with its first possible expiry.
pub(super) type Watched = (SessionId, Instant);

/// Turns the wheel until every sender of `new` is gone. `find` looks a session up.
pub(super) async fn run(mut new: mpsc::UnboundedReceiver<Watched>, find: impl Fn(SessionId) -> Option<Arc<Session>>) {
    // A closed session's entry stays until it comes due, one ttl at most; then it is not found, or has ended.
    let mut wheel = DelayQueue::new();
    loop {
        tokio::select! {
            watched = new.recv() => match watched {
                Some((id, due)) => drop(wheel.insert_at(id, due)),
                None => return,
            },
            Some(expired) = wheel.next(), if !wheel.is_empty() => {
                let id = expired.into_inner();
                if let Some(due) = find(id).and_then(|session| session.expire()) {
                    wheel.insert_at(id, due);
                }
            }
        }
    }
}
