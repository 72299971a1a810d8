"""Waits between attempts."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Doubles from `base` to `cap` seconds. With jitter: replicas that lost one server must not return at once."""

    base: float
    cap: float
    attempts: int = 0

    def next_delay(self) -> float:
        """Seconds to wait before the next attempt."""
        delay: float = min(self.cap, self.base * 2**self.attempts)
        self.attempts = min(self.attempts + 1, 30)
        return delay * random.uniform(0.75, 1.25)

    def reset(self) -> None:
        """The last attempt succeeded."""
        self.attempts = 0
