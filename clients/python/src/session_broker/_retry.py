"""When a call is made again: what was not run, or cannot run twice, after a pause, so often and for so long.

Invariant: a call whose answer was lost is repeated only by who says that it is safe.
"""

from __future__ import annotations

import random
import time

from session_broker._arguments import Retry
from session_broker.errors import Advice, Error, is_lost

# The first pause before a repeat, doubled each time up to the second; the broker may ask for a longer one.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0


class Attempts:
    """The attempts of one call."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._began = time.monotonic()
        self._failed: float | None = None
        self._made = 0
        self.lost = False

    @property
    def elapsed(self) -> float:
        """Seconds since the first."""
        return time.monotonic() - self._began

    def pause_after(self, error: Error, *, safe: bool, unchanged: bool) -> float | None:
        """How long to wait before the next, if there is to be one.

        `safe` says that it may be repeated when its answer was lost; `unchanged` that the transaction stands as it did
        before the call.
        """
        now = time.monotonic()
        self._made += 1
        self._failed = self._failed or now
        self.lost = self.lost or is_lost(error)
        repeatable = safe if is_lost(error) else error.advice is Advice.CALL and unchanged
        pause = max(error.retry_delay or 0.0, backoff(self._made))
        too_late = now - self._failed + pause > self._retry.time_max
        if not repeatable or self._made >= self._retry.attempts_max or too_late:
            return None
        return pause


def backoff(attempt: int) -> float:
    """The pause after the attempt of that number, counted from 1: at random between half and all of it."""
    return min(FIRST_PAUSE * 2.0 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1)
