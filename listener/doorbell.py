"""The doorbell's lease: while changes keep coming the service polls, and writers need not notify.

NOTIFY takes a lock of the whole cluster until the commit is flushed, so under load it is what writers would queue for.
Whoever polls therefore holds a lease, a time in the sequence listener.doorbell, and capture notifies only when it
finds none.

    resting ──two drains that found something, close together──▶ polling: lease held, extended while they do
       ▲                                                            │ none came so closely for as long as a lease lasts
       └── every transaction below the mark has ended, ── closing ◀─┘ end the lease; then take a mark
           and a drain that began after that was not busy

Closing is what makes it safe. A writer may see the lease and commit long after it ended, and nobody will have rung for
it. Capture assigns the transaction its id (with the log row) before it looks for the lease, and the mark is an id
assigned after the lease ended; so whoever saw the lease is below the mark. Until all of those have ended, the service
looks by itself, read-only and less often the longer it takes. If it dies meanwhile, its lease runs out, and what was
not rung for waits for a sweep.

The object is pure: no clock, no I/O, `now` is an argument (seconds, monotonic).
"""

from __future__ import annotations

from typing import Literal

LEASE = 0.5  # seconds, as in listener.hold_lease(); extended when half of it is over
BUSY_WITHIN = 0.05  # two drains that found something within so many seconds: changes keep coming
SHORTEST_PAUSE = 0.005
LONGEST_PAUSE = 0.1
# A poll is followed by a pause of so many times what it took, so that polling takes a fifth of a core at the most.
PAUSE_PER_DRAIN = 4.0
CLOSING_PAUSES = (0.02, 0.25)

Deed = Literal["hold", "end"]


class Doorbell:
    """When to hold the lease and when to look without being rung for."""

    def __init__(self, poll_interval: float) -> None:
        self.poll_interval = poll_interval
        self.must_poll = False  # capture never notifies in this installation
        self.mark: str | None = None
        self._found_at = float("-inf")
        self._busy_at = float("-inf")  # when two such drains came close together last
        self._held_at: float | None = None
        self._ended_at = 0.0
        self._pause = SHORTEST_PAUSE

    @property
    def state(self) -> Literal["resting", "polling", "closing"]:
        """See the module's docstring."""
        if self._held_at is not None:
            return "polling"
        return "resting" if self.mark is None else "closing"

    def drained(self, now: float, *, found: bool, took: float) -> Deed | None:
        """A drain ended that was not busy; what to do about the lease, in a statement of its own."""
        self._pause = min(max(SHORTEST_PAUSE, PAUSE_PER_DRAIN * took), LONGEST_PAUSE)
        busy = found and now - self._found_at < max(BUSY_WITHIN, 2 * self._pause)
        if found:
            self._found_at = now
        if busy:
            self._busy_at = now
        if self.must_poll:
            # A lease is of no use where nobody notifies; it may be left from before.
            return None if self._held_at is None else "end"
        if self._held_at is None:
            return "hold" if busy else None
        # Single writes now and then are shown sooner when they ring, and polling for them costs more.
        if busy:
            return "hold" if now - self._held_at > LEASE / 2 else None
        return "end" if now - self._busy_at > LEASE else None

    def held(self, now: float) -> None:
        """The lease is about to be taken or extended: if the answer is lost, it may have been."""
        self._held_at, self.mark = now, None

    def ended(self, mark: str, now: float) -> None:
        """The lease was ended, and the mark taken after that."""
        self._held_at, self.mark, self._ended_at = None, mark, now

    def closed(self) -> None:
        """Every transaction below the mark has ended, and a drain after that has looked."""
        self.mark = None

    def next_look(self, now: float) -> float | None:
        """Seconds until the log is to be looked at without a ring; None: not at all."""
        if self._held_at is not None:
            # What follows each drain anyway is part of the pause.
            return self._pause - SHORTEST_PAUSE
        if self.mark is not None:
            least, most = CLOSING_PAUSES
            return min(max(least, (now - self._ended_at) / 10), most)
        if self.must_poll:
            return self._pause if now - self._found_at < LEASE else self.poll_interval
        return None
