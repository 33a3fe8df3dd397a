//! What each principal takes of the broker: its sessions, its open transactions, its calls.
//!
//! Knows no limit of its own: those are the caller's [`Grant`](super::grant::Grant). Invariant: what is taken is given
//! back when its [`Taken`] is dropped, and by nothing else.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::error::{Error, Exhausted};
use super::principal::Principal;

/// How many accounts there are before those that hold nothing are forgotten.
const KEPT_MIN: usize = 10_000;

/// Every principal's account.
#[derive(Debug, Default)]
pub(super) struct Accounts(Mutex<HashMap<Principal, Arc<Account>>>);

/// One principal's.
#[derive(Debug, Default)]
pub(super) struct Account {
    sessions: AtomicUsize,
    transactions: AtomicUsize,
    calls: AtomicUsize,
    listeners: AtomicUsize,
    /// When the calls that have come would be through, were they to come at their rate.
    paid_until: Mutex<Option<Instant>>,
}

/// What there is a count of.
#[derive(Debug, Clone, Copy)]
pub(super) enum Resource {
    Session,
    Transaction,
    Call,
    Listener,
}

/// A part of what its principal may take.
#[derive(Debug)]
pub(super) struct Taken {
    account: Arc<Account>,
    resource: Resource,
}

impl Accounts {
    /// The principal's account.
    pub(super) fn of(&self, principal: &Principal) -> Arc<Account> {
        // A map of independent entries is sound after any panic.
        let mut accounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = accounts.get(principal) {
            return account.clone();
        }
        // Looked through at most once for each doubling.
        if accounts.len() >= KEPT_MIN && accounts.len() == accounts.capacity() {
            accounts.retain(|_, account| Arc::strong_count(account) > 1);
        }
        accounts.entry(principal.clone()).or_default().clone()
    }
}

impl Account {
    /// Takes one more.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when the principal has its maximum.
    pub(super) fn take(self: &Arc<Self>, resource: Resource, max: Option<usize>) -> Result<Taken, Error> {
        let max = max.unwrap_or(usize::MAX);
        let more = |taken: usize| (taken < max).then_some(taken + 1);
        let taken = self.count(resource).try_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.map_err(|_| {
            Error::Exhausted(match resource {
                Resource::Session => Exhausted::PrincipalSessions(max),
                Resource::Transaction => Exhausted::PrincipalTransactions(max),
                Resource::Call => Exhausted::PrincipalCalls(max),
                Resource::Listener => Exhausted::PrincipalListeners(max),
            })
        })?;
        Ok(Taken { account: self.clone(), resource })
    }

    /// Counts a call, unless calls come faster than so many a second. A second's worth may come at once.
    pub(super) fn pay(&self, now: Instant, per_second: NonZeroU32) -> bool {
        let mut paid_until = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
        let until = paid_until.map_or(now, |until| until.max(now)) + Duration::from_secs(1) / per_second.get();
        let has_room = until <= now + Duration::from_secs(1);
        if has_room {
            *paid_until = Some(until);
        }
        has_room
    }

    fn count(&self, resource: Resource) -> &AtomicUsize {
        match resource {
            Resource::Session => &self.sessions,
            Resource::Transaction => &self.transactions,
            Resource::Call => &self.calls,
            Resource::Listener => &self.listeners,
        }
    }
}

impl Taken {
    /// Whose it is.
    pub(super) fn account(&self) -> &Arc<Account> {
        &self.account
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.account.count(self.resource).fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_can_be_taken_again_and_no_more_than_the_maximum() {
        let account = Accounts::default().of(&Principal::new("billing"));
        let taken: Vec<_> = (0..3).filter_map(|_| account.take(Resource::Session, Some(2)).ok()).collect();
        assert_eq!(taken.len(), 2);
        assert!(account.take(Resource::Call, Some(1)).is_ok());
        drop(taken);
        assert!(account.take(Resource::Session, Some(1)).is_ok());
        assert!(account.take(Resource::Session, Some(0)).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_seconds_worth_of_calls_may_come_at_once_and_then_they_come_at_their_rate() {
        let account = Account::default();
        let ten = NonZeroU32::new(10).unwrap();
        let paid = |now: Instant| (0..100).filter(|_| account.pay(now, ten)).count();
        let start = Instant::now();
        assert_eq!(paid(start), 10);
        assert_eq!(paid(start + Duration::from_millis(99)), 0);
        assert_eq!(paid(start + Duration::from_millis(100)), 1);
        assert_eq!(paid(start + Duration::from_millis(600)), 5);
        assert_eq!(paid(start + Duration::from_mins(1)), 10);
    }

    #[test]
    fn accounts_that_hold_nothing_are_forgotten() {
        let accounts = Accounts::default();
        let kept = accounts.of(&Principal::new("kept"));
        for number in 0..200_000 {
            accounts.of(&Principal::new(&format!("passing {number}")));
        }
        assert!(accounts.0.lock().unwrap().len() < 100_000);
        assert!(Arc::ptr_eq(&kept, &accounts.of(&Principal::new("kept"))));
    }
}
