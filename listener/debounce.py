"""Debounce: which key is due when. A pure object: no clock, no I/O, `now` is an argument (seconds, monotonic).

A key is due
  edge = leading    as soon as its last refresh began at least `quiet_period` ago: at once when it was calm
  edge = trailing   when it was quiet for `quiet_period`, or changed `max_wait` ago, whichever comes first
and never before a retry that it waits for, nor within `quiet_period` of the start of its last refresh.

Of the keys that are due, the one whose `max_wait` runs out first goes first, so a tenant that writes all the time
cannot starve the others. Bulk keys (filling, shared tables) come after all others, but have every fourth turn, so
that they cannot be starved either. While a key is being refreshed, changes to it are kept and not handed out.

A tenant has half of the workers at most, and one at least: its keys may be slow and always the most overdue, and would
otherwise have all. What it has too many of is held back, also from a worker that is idle then: whoever comes next would
have to wait for a slow refresh. "All tenants" counts as a tenant.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from heapq import heappop, heappush
from typing import NamedTuple

from listener.views import Change, RefreshKey, Window

BULK_TURN = 4


def due_at(change: Change) -> float:
    """The moment at which the key may be refreshed."""
    window = change.window
    if window.edge == "leading":
        due = change.first_change
    else:
        due = min(change.last_change + window.quiet_period, change.first_change + window.max_wait)
    if change.refresh_started is not None:
        due = max(due, change.refresh_started + window.quiet_period)
    return due if change.retry_at is None else max(due, change.retry_at)


def _deadline(change: Change) -> float:
    return change.first_change + change.window.max_wait


class _Place(NamedTuple):
    """An item of a heap: of the timers until the key is due, then of the ready keys that are bulk, or are not."""

    at: float  # when the key is due; once it is, when its max_wait runs out
    key: RefreshKey
    bulk: bool | None = None  # None: a timer


class Debouncer:
    """The keys that wait for a refresh, and those that are being refreshed by so many workers."""

    def __init__(self, workers: int) -> None:
        self._tenant_limit = max(1, workers // 2)
        self._waiting: dict[RefreshKey, Change] = {}
        self._running: set[RefreshKey] = set()
        self._started: dict[RefreshKey, float] = {}
        self._longest_quiet_period = 0.0
        # Items stay in their heaps when a key changes: the one that counts is its place. A key that runs has none.
        self._places: dict[RefreshKey, _Place] = {}
        self._timers: list[_Place] = []
        self._ready: dict[bool, list[_Place]] = {False: [], True: []}
        self._turn = 0
        self._running_of: Counter[str] = Counter()
        # Ready keys of tenants that had all they may have when it was the key's turn; out of the way of the others.
        self._held_back: dict[tuple[str, bool], list[_Place]] = {}

    def __len__(self) -> int:
        """Keys waiting, whether due or not."""
        return len(self._waiting)

    def __contains__(self, key: object) -> bool:
        return key in self._waiting or key in self._running

    def running_keys(self) -> frozenset[RefreshKey]:
        """Every key that is being refreshed now."""
        return frozenset(self._running)

    def started_since(self, key: RefreshKey, moment: float) -> bool:
        """Whether the key was handed out at `moment` or later, as far as it was not forgotten."""
        return self._started.get(key, float("-inf")) >= moment

    @property
    def running(self) -> int:
        """Keys handed out and not yet finished."""
        return len(self._running)

    def changed(self, change: Change) -> None:
        """Takes a change in; several changes of a key become one, as old as the oldest of them."""
        key = change.key
        known = self._waiting.get(key)
        started = max((s for s in (change.refresh_started, self._started.get(key)) if s is not None), default=None)
        if known is not None:
            change = replace(
                change,
                first_change=min(known.first_change, change.first_change),
                last_change=max(known.last_change, change.last_change),
                version=max(known.version, change.version),
                bulk=known.bulk and change.bulk,
            )
        self._wait(change if change.refresh_started == started else replace(change, refresh_started=started))

    def take(self, now: float) -> Change | None:
        """The next key to refresh, or None when none is due. It is running until finished() or again()."""
        self._move_due(now)
        self._turn += 1
        bulk_first = self._turn % BULK_TURN == 0
        for bulk in (bulk_first, not bulk_first):
            place = self._next_ready(bulk)
            if place is not None:
                heappop(self._ready[bulk])
                key = place.key
                del self._places[key]
                change = self._waiting.pop(key)
                self._running.add(key)
                self._running_of[key.tenant] += 1
                self._started[key] = now
                self._longest_quiet_period = max(self._longest_quiet_period, change.window.quiet_period)
                return change
        return None

    def next_due(self) -> float | None:
        """When take() can next return something; None when nothing waits that is not running."""
        if any(self._next_ready(bulk) is not None for bulk in self._ready):
            return float("-inf")
        return self._next_timer()

    def finished(self, key: RefreshKey, version: int) -> None:
        """The key was refreshed; `version` is reflected. A change that came meanwhile waits for its own turn."""
        self._ran(key)
        change = self._waiting.get(key)
        if change is None or change.version <= version:
            self._waiting.pop(key, None)
            self._places.pop(key, None)
        else:
            self._wait(replace(change, refresh_started=self._started.get(key)))

    def again(self, change: Change, retry_at: float) -> None:
        """The key was not refreshed (busy, failed): it waits again, until `retry_at` at least."""
        self._ran(change.key)
        newer = self._waiting.get(change.key)
        self.changed(replace(change, retry_at=retry_at))
        if newer is not None:
            # What came meanwhile knows better what window the key has, and which batch it belongs to.
            merged = self._waiting[change.key]
            self._wait(
                replace(
                    merged,
                    window=newer.window,
                    correlation_id=newer.correlation_id,
                    app_correlation_id=newer.app_correlation_id,
                )
            )

    def rewindow(self, key: RefreshKey, window: Window) -> None:
        """The key's view has this window now."""
        change = self._waiting.get(key)
        if change is not None and change.window != window:
            self._wait(replace(change, window=window))

    def forget_starts(self, now: float) -> None:
        """Forgets the starts of refreshes that no quiet period reaches back to any more."""
        before = now - self._longest_quiet_period
        self._started = {k: s for k, s in self._started.items() if s > before or k in self._running}

    def _ran(self, key: RefreshKey) -> None:
        if key not in self._running:
            return
        self._running.remove(key)
        self._running_of[key.tenant] -= 1
        if not self._running_of[key.tenant]:
            del self._running_of[key.tenant]
        # The tenant may have one more: the first that was held back, of either kind. Whichever is not taken then is
        # held back again.
        for bulk in self._ready:
            held = self._held_back.get((key.tenant, bulk), [])
            place = self._first(held)
            if place is not None:
                heappush(self._ready[bulk], heappop(held))
            if not held:
                self._held_back.pop((key.tenant, bulk), None)

    def _wait(self, change: Change) -> None:
        key = change.key
        self._waiting[key] = change
        if key in self._running:
            return
        place = self._places.get(key)
        if place is None:
            self._push_timer(change)
        elif place.bulk is None:
            # Due later: that is seen when the time of its place has come.
            if due_at(change) < place.at:
                self._push_timer(change)
        elif (place.at, place.bulk) != (_deadline(change), change.bulk):
            # Only then, or the heap would grow with every change.
            self._push_ready(change)

    def _push_timer(self, change: Change) -> None:
        self._push(self._timers, _Place(due_at(change), change.key))

    def _push_ready(self, change: Change) -> None:
        self._push(self._ready[change.bulk], _Place(_deadline(change), change.key, change.bulk))

    def _push(self, heap: list[_Place], place: _Place) -> None:
        self._places[place.key] = place
        heappush(heap, place)

    def _first(self, heap: list[_Place]) -> _Place | None:
        """The first item that counts; those before it are dropped."""
        while heap:
            if self._places.get(heap[0].key) is heap[0]:
                return heap[0]
            heappop(heap)
        return None

    def _next_ready(self, bulk: bool) -> _Place | None:  # noqa: FBT001 - one of two heaps
        """The first ready key whose tenant may have one more; those before it are held back."""
        ready = self._ready[bulk]
        while (place := self._first(ready)) is not None:
            tenant = place.key.tenant
            if self._running_of[tenant] < self._tenant_limit:
                return place
            heappush(self._held_back.setdefault((tenant, bulk), []), heappop(ready))
        return None

    def _next_timer(self) -> float | None:
        while (place := self._first(self._timers)) is not None:
            change = self._waiting[place.key]
            if due_at(change) <= place.at:
                return place.at
            heappop(self._timers)
            self._push_timer(change)
        return None

    def _move_due(self, now: float) -> None:
        while (due := self._next_timer()) is not None and due <= now:
            self._push_ready(self._waiting[heappop(self._timers).key])
