//! Idempotency keys in memory: for engines that have no table for them.
//!
//! A key is held by the one call that runs under it; calls that come with the same key wait, and then find its outcome or
//! run themselves. Invariant: no more outcomes are kept, no longer and no larger, than the limits say.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::principal::Principal;
use super::transaction::Verdict;

/// What differs when a request does.
pub type Fingerprint = [u8; 32];

/// The most outcomes kept, how long, and how large all together: what a retry loop needs, at a price a broker can pay.
const OUTCOMES_MAX: usize = 10_000;
const OUTCOME_TTL: Duration = Duration::from_mins(10);
const OUTCOMES_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A caller and its key.
type Key = (Principal, String);

/// The outcomes of calls with idempotency keys.
#[derive(Debug, Default)]
pub(super) struct Outcomes(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    slots: HashMap<Key, Known>,
    /// Those with an outcome, the oldest first.
    order: VecDeque<(Instant, Key, usize)>,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Known {
    slot: Arc<Slot>,
    /// How often it stands in the order: an outcome that was unknown may be replaced.
    outcomes: u32,
}

impl Known {
    /// Whether it stands for nothing, and nobody holds it or waits for it.
    fn is_unused(&self) -> bool {
        self.outcomes == 0 && Arc::strong_count(&self.slot) == 1
    }
}

/// Locked by the call that runs.
type Slot = tokio::sync::Mutex<Option<Outcome>>;

/// What became of a call that has committed, or may have.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) request: Fingerprint,
    pub(super) answer: Vec<u8>,
    pub(super) verdict: Verdict,
}

/// A key held. Dropped, it lets the next call have it.
#[derive(Debug)]
pub(super) struct Held {
    kept: Arc<Mutex<Kept>>,
    key: Key,
    /// Once it is held.
    slot: Option<OwnedMutexGuard<Option<Outcome>>>,
}

impl Outcomes {
    /// Holds the key, as soon as no other call does.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the key to others.
    pub(super) async fn hold(&self, principal: &Principal, key: &str) -> Held {
        let key = (principal.clone(), key.to_owned());
        let slot = {
            let mut kept = lock(&self.0);
            kept.forget_old(Instant::now());
            kept.slots.entry(key.clone()).or_default().slot.clone()
        };
        let mut held = Held { kept: self.0.clone(), key, slot: None };
        held.slot = Some(slot.lock_owned().await);
        held
    }
}

impl Held {
    /// What became of the last call with this key.
    pub(super) fn outcome(&self) -> Option<&Outcome> {
        self.slot.as_ref().and_then(|slot| slot.as_ref())
    }

    /// Keeps what became of the call, or that it came to nothing.
    pub(super) fn keep(mut self, outcome: Option<Outcome>) {
        let size = outcome.as_ref().map(|outcome| outcome.answer.len());
        if let Some(slot) = &mut self.slot {
            **slot = outcome;
        }
        if let Some(size) = size {
            let mut kept = lock(&self.kept);
            kept.bytes += size;
            kept.slots.entry(self.key.clone()).or_default().outcomes += 1;
            kept.order.push_back((Instant::now(), self.key.clone(), size));
            kept.forget_old(Instant::now());
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut kept = lock(&self.kept);
        self.slot = None;
        if kept.slots.get(&self.key).is_some_and(Known::is_unused) {
            kept.slots.remove(&self.key);
        }
    }
}

impl Kept {
    fn forget_old(&mut self, now: Instant) {
        while let Some((at, ..)) = self.order.front() {
            let expired = now.saturating_duration_since(*at) >= OUTCOME_TTL;
            if !expired && self.order.len() <= OUTCOMES_MAX && self.bytes <= OUTCOMES_BYTES_MAX {
                return;
            }
            if let Some((_, key, size)) = self.order.pop_front() {
                self.bytes -= size;
                if let Entry::Occupied(mut known) = self.slots.entry(key) {
                    known.get_mut().outcomes -= 1;
                    // One that a call holds goes with the call.
                    if known.get().is_unused() {
                        known.remove();
                    }
                }
            }
        }
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    // Nothing panics between two changes that belong together, so a poisoned lock holds sound entries.
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(size: usize) -> Outcome {
        Outcome { request: [0; 32], answer: vec![0; size], verdict: Verdict::NothingWritten }
    }

    async fn hold(outcomes: &Outcomes, key: &str) -> Held {
        outcomes.hold(&Principal::anonymous(), key).await
    }

    #[tokio::test]
    async fn a_key_is_held_by_one_call_and_tells_the_next_what_became_of_it() {
        let outcomes = Outcomes::default();
        let first = hold(&outcomes, "k").await;
        let mut second = Box::pin(hold(&outcomes, "k"));
        assert!(futures_util::poll!(&mut second).is_pending());
        hold(&outcomes, "another").await;
        first.keep(Some(outcome(1)));
        assert_eq!(second.await.outcome().map(|outcome| outcome.answer.len()), Some(1));
    }

    #[tokio::test]
    async fn keys_that_come_to_nothing_leave_nothing() {
        let outcomes = Outcomes::default();
        let first = hold(&outcomes, "k").await;
        let mut second = Box::pin(hold(&outcomes, "k"));
        assert!(futures_util::poll!(&mut second).is_pending());
        first.keep(None);
        // Its turn has come, and it leaves without having seen it.
        drop(second);
        assert_eq!(lock(&outcomes.0).slots.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn outcomes_are_forgotten_by_size_number_and_age() {
        let outcomes = Outcomes::default();
        hold(&outcomes, "large").await.keep(Some(outcome(OUTCOMES_BYTES_MAX)));
        hold(&outcomes, "next").await.keep(Some(outcome(1)));
        assert!(hold(&outcomes, "large").await.outcome().is_none());
        for number in 0..OUTCOMES_MAX {
            hold(&outcomes, &number.to_string()).await.keep(Some(outcome(0)));
        }
        assert!(hold(&outcomes, "next").await.outcome().is_none());
        assert!(hold(&outcomes, "0").await.outcome().is_some());
        tokio::time::advance(OUTCOME_TTL).await;
        assert!(hold(&outcomes, "9999").await.outcome().is_none());
        let kept = lock(&outcomes.0);
        assert_eq!((kept.slots.len(), kept.bytes), (0, 0));
    }
}
