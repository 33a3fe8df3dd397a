//! Lines of the log that anybody can cause: told at once, and then seldom.

use std::mem::take;
use std::time::Duration;

use tokio::time::Instant;

/// Tells of what may happen often, seldom enough for a log.
#[derive(Debug, Default)]
pub(crate) struct Seldom {
    untold: u64,
    told: Option<Instant>,
}

impl Seldom {
    const INTERVAL: Duration = Duration::from_secs(10);

    /// Counts one more; when it is time to tell, how many there are to tell of.
    pub(crate) fn count(&mut self, now: Instant) -> Option<u64> {
        self.untold += 1;
        if self.told.is_some_and(|told| now < told + Self::INTERVAL) {
            return None;
        }
        self.told = Some(now);
        Some(take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_others_together() {
        let (mut seldom, start) = (Seldom::default(), Instant::now());
        assert_eq!(seldom.count(start), Some(1));
        assert_eq!((seldom.count(start), seldom.count(start + Duration::from_secs(9))), (None, None));
        assert_eq!(seldom.count(start + Duration::from_secs(10)), Some(3));
    }
}
