//! The right to keep a session: granted for a ttl, renewed by finished calls, capped by a maximum age.
//!
//! Pure arithmetic on instants that the caller passes in. Invariant: renewing never moves the maximum age.

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
}

/// What to do about a lease at some instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It is over.
    Expired(EndReason),
    /// It holds; it cannot run out before this instant.
    HoldsUntil(Instant),
}

impl Lease {
    pub(super) fn grant(now: Instant, ttl: Duration, age_max: Duration) -> Self {
        Self { ttl, due: now + ttl, end: now + age_max }
    }

    pub(super) fn ttl(&self) -> Duration {
        self.ttl
    }

    pub(super) fn renew(&mut self, now: Instant) {
        self.due = now + self.ttl;
    }

    /// Judges an idle session's lease.
    pub(super) fn judge(&self, now: Instant) -> Judgement {
        if now >= self.end {
            Judgement::Expired(EndReason::MaxAge)
        } else if now >= self.due {
            Judgement::Expired(EndReason::LeaseExpired)
        } else {
            Judgement::HoldsUntil(self.due.min(self.end))
        }
    }

    /// When to judge a suspended lease again: the earliest instant at which it can have run out if the call ends now.
    pub(super) fn judge_again(&self, now: Instant) -> Instant {
        /// A session past its maximum age goes as soon as its call is over, give or take this.
        const OVERDUE_STEP: Duration = Duration::from_secs(1);
        let renewed = now + self.ttl;
        if now < self.end { renewed.min(self.end) } else { renewed.min(now + OVERDUE_STEP) }
    }

    /// How long an idle session has before the lease runs out.
    pub(super) fn remaining(&self, now: Instant) -> Duration {
        self.due.min(self.end).saturating_duration_since(now)
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
        assert_eq!(lease.judge(due - Duration::from_nanos(1)), Judgement::HoldsUntil(due));
        assert_eq!(lease.judge(due), Judgement::Expired(EndReason::LeaseExpired));
    }

    #[test]
    fn renewals_never_move_the_maximum_age() {
        let now = Instant::now();
        let mut lease = Lease::grant(now, 10 * SECOND, 15 * SECOND);
        lease.renew(now + 9 * SECOND);
        assert_eq!(lease.remaining(now + 9 * SECOND), 6 * SECOND);
        lease.renew(now + 14 * SECOND);
        assert_eq!(lease.judge(now + 15 * SECOND), Judgement::Expired(EndReason::MaxAge));
    }
}
