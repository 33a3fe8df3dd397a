//! The right to keep a session: granted for a ttl, renewed by finished calls, capped by a maximum age.
//!
//! Pure arithmetic on instants that the caller passes in. Invariant: renewing never moves the maximum age, and keeping
//! alive never moves the idle limit.

use std::time::Duration;

use tokio::time::Instant;

use super::error::EndReason;

/// A session's lease.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    ttl: Duration,
    /// When it runs out unless renewed.
    due: Instant,
    /// When the maximum age ends the session.
    end: Instant,
    /// Since when it has only been kept, and not used.
    idle_since: Instant,
    keeper: Keeper,
}

/// Who keeps a session between its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeper {
    /// Its caller, with each call.
    Caller,
    /// A stream that is open: the lease does not run out.
    Stream,
    /// The stream is gone, and nobody has called since.
    Nobody,
}

/// What to do about a lease at some instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It has been over since then.
    Expired(EndReason, Instant),
    /// It holds; it cannot run out before this instant.
    HoldsUntil(Instant),
}

impl Lease {
    pub(super) fn grant(now: Instant, ttl: Duration, age_max: Duration) -> Self {
        Self { ttl, due: now + ttl, end: now + age_max, idle_since: now, keeper: Keeper::Caller }
    }

    pub(super) fn ttl(&self) -> Duration {
        self.ttl
    }

    /// A call begins: its caller is there.
    pub(super) fn renew(&mut self, now: Instant) {
        if self.keeper == Keeper::Nobody {
            self.keeper = Keeper::Caller;
        }
        self.due = now + self.ttl;
    }

    /// A call has ended. Should its stream have gone meanwhile, its caller has `grace` from now.
    pub(super) fn used(&mut self, now: Instant, grace: Duration) {
        self.idle_since = now;
        self.due = match self.keeper {
            Keeper::Caller | Keeper::Stream => now + self.ttl,
            Keeper::Nobody => now + grace,
        };
    }

    /// A stream keeps it from now on.
    pub(super) fn attach(&mut self) {
        self.keeper = Keeper::Stream;
    }

    /// The stream is gone: its caller has `grace` to come back.
    pub(super) fn detach(&mut self, now: Instant, grace: Duration) {
        self.keeper = Keeper::Nobody;
        self.due = now + grace;
    }

    pub(super) fn is_attached(&self) -> bool {
        self.keeper == Keeper::Stream
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.keeper == Keeper::Nobody
    }

    pub(super) fn idle_since(&self) -> Instant {
        self.idle_since
    }

    /// Judges the lease of a session between calls, which ends at `idle_end` at the latest if its own clock bounds it.
    pub(super) fn judge(&self, now: Instant, idle_end: Option<Instant>) -> Judgement {
        let by_keeper = match self.keeper {
            Keeper::Caller => Some((self.due, EndReason::LeaseExpired)),
            Keeper::Stream => None,
            Keeper::Nobody => Some((self.due, EndReason::Disconnected)),
        };
        let by_idleness = idle_end.map(|idle_end| (idle_end, EndReason::IdleTimeout));
        let mut first = (self.end, EndReason::MaxAge);
        for other in by_keeper.into_iter().chain(by_idleness) {
            if other.0 < first.0 {
                first = other;
            }
        }
        let (at, reason) = first;
        match self.keeper {
            _ if now >= at => Judgement::Expired(reason, at),
            Keeper::Caller | Keeper::Stream => Judgement::HoldsUntil(at),
            // A call renews it for its ttl, which may be shorter than the grace.
            Keeper::Nobody => Judgement::HoldsUntil(at.min(now + self.ttl)),
        }
    }

    /// When to judge a suspended lease again: the earliest instant at which it can have run out if the call ends now.
    pub(super) fn judge_again(&self, now: Instant) -> Instant {
        /// A session past its maximum age goes as soon as its call is over, give or take this.
        const OVERDUE_STEP: Duration = Duration::from_secs(1);
        let renewed = now + self.ttl;
        if now < self.end { renewed.min(self.end) } else { renewed.min(now + OVERDUE_STEP) }
    }

    /// How long a session between calls has before the lease runs out.
    pub(super) fn remaining(&self, now: Instant) -> Duration {
        let due = if self.is_attached() { now + self.ttl } else { self.due };
        due.min(self.end).saturating_duration_since(now)
    }

    /// How long a session has before the lease runs out if its call ends now.
    pub(super) fn remaining_after_call(&self, now: Instant, grace: Duration) -> Duration {
        let span = if self.is_abandoned() { grace } else { self.ttl };
        span.min(self.until_end(now))
    }

    /// How long ago it was granted, of a session whose maximum age is that.
    pub(super) fn age(&self, now: Instant, age_max: Duration) -> Duration {
        (now + age_max).saturating_duration_since(self.end)
    }

    /// How long until the maximum age.
    pub(super) fn until_end(&self, now: Instant) -> Duration {
        self.end.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_lease_runs_out_at_its_ttl_and_not_before() {
        let now = Instant::now();
        let lease = Lease::grant(now, 10 * SECOND, 60 * SECOND);
        let due = now + 10 * SECOND;
        assert_eq!(lease.judge(due - Duration::from_nanos(1), None), Judgement::HoldsUntil(due));
        assert_eq!(lease.judge(due, None), Judgement::Expired(EndReason::LeaseExpired, due));
    }

    #[test]
    fn renewals_never_move_the_maximum_age() {
        let now = Instant::now();
        let mut lease = Lease::grant(now, 10 * SECOND, 15 * SECOND);
        lease.renew(now + 9 * SECOND);
        assert_eq!(lease.remaining(now + 9 * SECOND), 6 * SECOND);
        lease.used(now + 14 * SECOND, SECOND);
        assert_eq!(lease.judge(now + 15 * SECOND, None), Judgement::Expired(EndReason::MaxAge, now + 15 * SECOND));
    }

    #[test]
    fn keeping_alive_does_not_move_the_idle_limit_and_a_call_does() {
        let now = Instant::now();
        let mut lease = Lease::grant(now, 10 * SECOND, 60 * SECOND);
        lease.renew(now + 9 * SECOND);
        assert_eq!(lease.idle_since(), now);
        let idle_end = Some(lease.idle_since() + 12 * SECOND);
        let expired = Judgement::Expired(EndReason::IdleTimeout, now + 12 * SECOND);
        assert_eq!(lease.judge(now + 12 * SECOND, idle_end), expired);
        lease.used(now + 11 * SECOND, SECOND);
        assert_eq!(lease.idle_since(), now + 11 * SECOND);
    }

    #[test]
    fn a_stream_keeps_it_and_its_end_leaves_the_grace() {
        let now = Instant::now();
        let mut lease = Lease::grant(now, 10 * SECOND, 60 * SECOND);
        lease.attach();
        assert_eq!(lease.judge(now + 50 * SECOND, None), Judgement::HoldsUntil(now + 60 * SECOND));
        assert_eq!(lease.remaining(now + 20 * SECOND), 10 * SECOND);
        lease.detach(now + 20 * SECOND, 2 * SECOND);
        assert_eq!(
            lease.judge(now + 22 * SECOND, None),
            Judgement::Expired(EndReason::Disconnected, now + 22 * SECOND)
        );
        // A call that was under way says nothing of its caller.
        lease.used(now + 21 * SECOND, 2 * SECOND);
        assert_eq!(
            lease.judge(now + 23 * SECOND, None),
            Judgement::Expired(EndReason::Disconnected, now + 23 * SECOND)
        );
        // One that begins does.
        lease.renew(now + 22 * SECOND);
        lease.used(now + 22 * SECOND, 2 * SECOND);
        assert_eq!(lease.judge(now + 23 * SECOND, None), Judgement::HoldsUntil(now + 32 * SECOND));
    }

    #[test]
    fn a_grace_longer_than_the_lease_is_looked_at_before_a_renewed_lease_can_run_out() {
        let now = Instant::now();
        let mut lease = Lease::grant(now, SECOND, 60 * SECOND);
        lease.attach();
        lease.detach(now, 5 * SECOND);
        assert_eq!(lease.judge(now, None), Judgement::HoldsUntil(now + SECOND));
        assert_eq!(lease.remaining_after_call(now, 5 * SECOND), 5 * SECOND);
    }
}
