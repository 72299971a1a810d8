"""The debouncer's promises, as properties: whatever changes and whenever, with a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from listener.debounce import Debouncer
from listener.views import Change, RefreshKey, Window

KEYS = [RefreshKey(view, f"view{view}", tenant) for view in (1, 2) for tenant in ("a", "b")]
MORE_KEYS = [RefreshKey(view, f"view{view}", tenant) for view in (1, 2, 3, 4) for tenant in ("a", "b", "")]
MANY = 1000  # workers: more than any tenant has keys
# Whole numbers, so that sums are exact. The properties hold for any window with max_wait >= quiet_period.
EDGES: tuple[Literal["leading", "trailing"], ...] = ("leading", "trailing")
WINDOWS = st.builds(
    lambda quiet, more, edge: Window(quiet, quiet + more, edge),
    st.integers(0, 5),
    st.integers(0, 10),
    st.sampled_from(EDGES),
)
ALWAYS = settings(max_examples=300, deadline=None, database=None, print_blob=True)


def change_of(key: RefreshKey, window: Window, now: float, version: int = 1, *, bulk: bool = False) -> Change:
    return Change(key, window, version, first_change=now, last_change=now, correlation_id="c", bulk=bulk)


@dataclass
class Known:
    """What the test knows of a key, by its own book-keeping."""

    window: Window
    version: int = 0
    taken_version: int = 0
    oldest_change: float | None = None
    last_change: float = 0
    started: float | None = None
    ended: float = 0
    retry_at: float = 0
    running: Change | None = None

    def must_start_by(self) -> float:
        """When a prompt taker gets it at the latest."""
        assert self.oldest_change is not None
        latest = [self.oldest_change + self.window.max_wait, self.ended, self.retry_at]
        return max(latest if self.started is None else [*latest, self.started + self.window.quiet_period])


@dataclass
class Simulation:
    """A prompt taker with any number of workers: time jumps from event to event, and what is due is taken at once."""

    windows: dict[RefreshKey, Window]
    now: float = 0
    debouncer: Debouncer = field(default_factory=lambda: Debouncer(MANY))
    known: dict[RefreshKey, Known] = field(default_factory=dict)
    ends: list[tuple[float, RefreshKey, float | None]] = field(default_factory=list)
    lasts: Callable[[], tuple[int, int | None]] = lambda: (0, None)

    def __post_init__(self) -> None:
        self.known = {key: Known(window) for key, window in self.windows.items()}

    def change(self, key: RefreshKey) -> None:
        known = self.known[key]
        known.version += 1
        known.last_change = self.now
        if known.oldest_change is None:
            known.oldest_change = self.now
        change = change_of(key, known.window, self.now, known.version)
        # A failure is recorded in the database, and the drain hands its retry out with the key.
        self.debouncer.changed(replace(change, retry_at=known.retry_at if known.retry_at > self.now else None))
        self.take_all()

    def take_all(self) -> None:
        while (change := self.debouncer.take(self.now)) is not None:
            known = self.known[change.key]
            assert known.running is None, "a key runs once at a time"
            assert known.oldest_change is not None, "nobody changed it"
            assert change.first_change == known.oldest_change
            assert self.now <= known.must_start_by(), "too late"
            assert self.now >= known.retry_at, "a retry has its time"
            if known.started is not None:
                assert self.now >= known.started + known.window.quiet_period, "two starts in one quiet period"
            known.running, known.started = change, self.now
            known.taken_version, known.oldest_change = known.version, None
            duration, retry = self.lasts()
            self.ends.append((self.now + duration, change.key, retry))

    def end(self, key: RefreshKey, retry: float | None) -> None:
        known = self.known[key]
        assert known.running is not None
        known.ended = self.now
        if retry is None:
            known.retry_at = 0
            self.debouncer.finished(key, known.taken_version)
        else:
            known.retry_at = self.now + retry
            known.oldest_change = known.running.first_change
            self.debouncer.again(known.running, known.retry_at)
        known.running = None
        self.take_all()

    def next_event(self) -> float | None:
        due = self.debouncer.next_due()
        return min([at for at, _, _ in self.ends] + ([] if due is None else [due]), default=None)

    def advance(self, until: float) -> None:
        while (event := self.next_event()) is not None and event <= until:
            assert event >= self.now or event == float("-inf"), "what is due was taken"
            self.now = max(self.now, event)
            # Whenever it is: what is forgotten, no quiet period needs.
            self.debouncer.forget_starts(self.now)
            for ended in [e for e in self.ends if e[0] <= self.now]:
                self.ends.remove(ended)
                self.end(ended[1], ended[2])
            self.take_all()
        self.now = until


@ALWAYS
@given(
    st.lists(WINDOWS, min_size=len(KEYS), max_size=len(KEYS)),
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from(KEYS)), max_size=40),
    st.data(),
)
def test_every_change_is_taken_in_its_time_and_none_is_lost(
    windows: list[Window], changes: list[tuple[int, RefreshKey]], data: st.DataObject
) -> None:
    simulation = Simulation(dict(zip(KEYS, windows, strict=True)))
    simulation.lasts = lambda: data.draw(
        st.tuples(st.integers(0, 8), st.none() | st.integers(0, 9)), label="a refresh lasts, and fails for"
    )
    for pause, key in changes:
        simulation.advance(simulation.now + pause)
        simulation.change(key)
    simulation.lasts = lambda: (1, None)
    simulation.advance(simulation.now + 1000)
    assert len(simulation.debouncer) == 0
    assert simulation.debouncer.running == 0
    for known in simulation.known.values():
        assert known.taken_version == known.version, "a change was lost"
        assert known.oldest_change is None


class SlowTaker(RuleBasedStateMachine):
    """A taker that comes when it likes. Which key it gets is what these rules are about."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.debouncer = Debouncer(MANY)
        self.limit = MANY
        self.first: dict[RefreshKey, int] = {}
        self.bulk: dict[RefreshKey, bool] = {}
        self.running: dict[RefreshKey, Change] = {}
        self.version = 0
        self.served: list[tuple[bool, bool, bool]] = []  # normal due, bulk due, bulk was served

    @initialize(workers=st.integers(1, 7))
    def begin(self, workers: int) -> None:
        self.debouncer = Debouncer(workers)
        self.limit = max(1, workers // 2)

    def has_enough(self, key: RefreshKey) -> bool:
        return sum(running.tenant == key.tenant for running in self.running) >= self.limit

    @rule(key=st.sampled_from(MORE_KEYS), bulk=st.booleans(), wait=st.integers(0, 9))
    def change(self, key: RefreshKey, *, bulk: bool, wait: int) -> None:
        self.version += 1
        self.bulk[key] = self.bulk.get(key, True) and bulk
        self.first.setdefault(key, self.now)
        self.debouncer.changed(change_of(key, Window(0, 10, "leading"), self.now, self.version, bulk=bulk))
        self.now += wait

    @rule()
    def take(self) -> None:
        due = {
            bulk: [
                key
                for key in self.first
                if key not in self.running and self.bulk[key] is bulk and not self.has_enough(key)
            ]
            for bulk in (False, True)
        }
        next_due = self.debouncer.next_due()
        assert not any(due.values()) or (next_due is not None and next_due <= self.now), "a worker would sleep"
        change = self.debouncer.take(self.now)
        if change is None:
            assert not due[False]
            assert not due[True]
            assert self.debouncer.next_due() is None, "a worker would not sleep"
            self.served.clear()
            return
        peers = due[change.bulk]
        assert change.key in peers
        assert self.first[change.key] == min(self.first[key] for key in peers), "the earliest deadline goes first"
        self.served.append((bool(due[False]), bool(due[True]), change.bulk))
        self.running[change.key] = change
        del self.first[change.key], self.bulk[change.key]
        assert sum(running.tenant == change.key.tenant for running in self.running) <= self.limit

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        self.debouncer.finished(key, self.running.pop(key).version)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        change = self.running.pop(key)
        self.debouncer.again(change, self.now)
        self.first[key] = min(self.first.get(key, self.now), int(change.first_change))
        self.bulk[key] = self.bulk.get(key, True) and change.bulk

    @invariant()
    def nobody_starves(self) -> None:
        turns = self.served[-4:]
        if len(turns) == 4 and all(normal and bulk for normal, bulk, _ in turns):
            assert sum(was_bulk for _, _, was_bulk in turns) == 1, "bulk has every fourth turn"

    @invariant()
    def it_holds_what_waits_and_what_runs(self) -> None:
        assert len(self.debouncer) == len(self.first)
        assert self.debouncer.running == len(self.running)
        for key in MORE_KEYS:
            assert (key in self.debouncer) is (key in self.first or key in self.running)


SlowTaker.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, database=None, print_blob=True
)
TestASlowTakerGetsTheEarliestDeadlineAndStarvesNobody = SlowTaker.TestCase


@ALWAYS
@given(WINDOWS, st.integers(1, 20), st.integers(0, 20))
def test_a_key_that_failed_waits_for_its_retry(window: Window, retry: int, change_after: int) -> None:
    debouncer = Debouncer(MANY)
    debouncer.changed(change_of(KEYS[0], window, 0))
    start = debouncer.next_due()
    assert start is not None
    change = debouncer.take(start)
    assert change is not None
    debouncer.again(change, start + retry)
    due = debouncer.next_due()
    assert due == max(start + retry, start + window.quiet_period)
    assert debouncer.take(due - 0.5) is None
    assume(start + change_after < due)
    debouncer.changed(replace(change_of(KEYS[0], window, start + change_after, 2), retry_at=start + retry))
    assert debouncer.take(due - 0.5) is None
    later = debouncer.next_due()
    assert later is not None
    assert later >= due


def test_a_change_while_running_is_kept_and_one_that_the_refresh_saw_is_not() -> None:
    for seen, waits in ((1, True), (2, False)):
        debouncer = Debouncer(MANY)
        window = Window(1, 2, "leading")
        debouncer.changed(change_of(KEYS[0], window, 0, 1))
        assert debouncer.take(0) is not None
        debouncer.changed(change_of(KEYS[0], window, 0.5, 2))
        assert debouncer.take(100) is None
        debouncer.finished(KEYS[0], seen)
        assert (debouncer.take(100) is not None) is waits


@pytest.mark.parametrize(("edge", "due"), [("leading", 0), ("trailing", 5)])
def test_the_edge_decides_whether_a_calm_key_is_due_at_once(edge: Literal["leading", "trailing"], due: int) -> None:
    debouncer = Debouncer(MANY)
    debouncer.changed(change_of(KEYS[0], Window(5, 20, edge), 0))
    assert debouncer.next_due() == due
    debouncer.changed(change_of(KEYS[0], Window(5, 20, edge), 3, 2))
    assert debouncer.next_due() == (0 if edge == "leading" else 8)


def test_a_start_is_remembered_until_no_quiet_period_reaches_back_to_it() -> None:
    debouncer = Debouncer(MANY)
    window = Window(5, 20, "leading")
    debouncer.changed(change_of(KEYS[0], window, 0))
    assert debouncer.take(0) is not None
    debouncer.finished(KEYS[0], 1)
    debouncer.forget_starts(4)
    assert debouncer.started_since(KEYS[0], 0)
    assert not debouncer.started_since(KEYS[0], 1)
    debouncer.changed(change_of(KEYS[0], window, 4, 2))
    assert debouncer.next_due() == 5
    assert debouncer.take(5) is not None
    debouncer.forget_starts(100)
    assert debouncer.started_since(KEYS[0], 5), "it is still running"
    debouncer.finished(KEYS[0], 2)
    debouncer.forget_starts(100)
    assert not debouncer.started_since(KEYS[0], 0)
