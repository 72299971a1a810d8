"""Fill a view: refresh every key of it that is dirty, with connections of one's own, beside the replicas that run.

All of its state is in the database. So it may be killed and started again at any moment, and several of them, or of the
service's workers, share the keys: one that somebody else is at is left to him, and one that he has shown costs a look.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

from listener import changes, dead_letters, queries, view_queries
from listener.dead_letters import RetryPolicy
from listener.errors import UNKNOWN_VIEW, is_lost
from listener.operations import drain_all
from listener.refresh import refresh
from listener.views import EVERYBODY, Change, RefreshKey

if TYPE_CHECKING:
    from psycopg import AsyncConnection

BUSY_PAUSE = 0.05  # seconds
# So long a running service has to drain what was marked: it must hear of the keys of other views that come with it.
DRAIN_PATIENCE = 2.0
# How often progress is told; longer where keys are slow, since the workers wait for each other at the end of a round.
ROUND = 0.5
LONGEST_ROUND = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is. `rate`: keys a second of this run; `seconds_left`: at that rate, None where it is not known.

    `done` counts the keys that others refreshed meanwhile, too. `paused`: the view is, and nothing more will be done.
    """

    view: str
    total: int
    done: int
    failed: int
    rows_changed: int
    rate: float
    paused: bool = False

    @property
    def remaining(self) -> int:
        """Keys to be refreshed, without those that failed."""
        return self.total - self.done - self.failed

    @property
    def seconds_left(self) -> float | None:
        """At the rate until now."""
        return self.remaining / self.rate if self.rate else None


@dataclass
class _Run:
    """What the workers of one run share."""

    view: str
    # Seconds between two refreshes that begin, by all workers together.
    pause: float
    policy: RetryPolicy
    started: float
    todo: deque[Change] = field(default_factory=deque)
    failed: dict[RefreshKey, psycopg.Error] = field(default_factory=dict)
    done: int = 0
    rows_changed: int = 0
    next_start: float = -math.inf
    slowest: float = 0.0
    paused: bool = False

    def progress(self, left: int) -> Progress:
        took = anyio.current_time() - self.started
        total = self.done + len(self.failed) + left
        rate = self.done / took if took > 0 else 0.0
        return Progress(self.view, total, self.done, len(self.failed), self.rows_changed, rate, self.paused)


async def fill(
    connect: Callable[[], AbstractAsyncContextManager[AsyncConnection[Any]]],
    view: str,
    *,
    workers: int = 2,
    max_rate: float | None = None,
    policy: RetryPolicy,
    on_failure: Callable[[RefreshKey, psycopg.Error], None] = lambda _key, _error: None,
) -> AsyncGenerator[Progress]:
    """Refreshes every dirty key of a view with `workers` connections; yields progress, the last time when it is over.

    `connect` gives an autocommit connection of the service's role. `max_rate`: keys a second, of all workers together.
    A key that fails is recorded as the service records it, told to `on_failure`, and stops no other. To be closed by
    whoever does not read it to its end (contextlib.aclosing). Raises psycopg.Error where the view is not there, and an
    ExceptionGroup of them where nothing more can be asked of a connection.
    """
    async with AsyncExitStack() as opened:
        first = await opened.enter_async_context(connect())
        name = await view_queries.view_name(first, view)
        run = _Run(name, 1 / max_rate if max_rate else 0.0, policy, anyio.current_time())
        connections = [first]
        while True:
            await _see_marks(first, name)
            run.todo = deque(await _dirty(first, name, run.failed))
            if not run.todo:
                # The keys of a paused view are not handed out.
                run.paused = await view_queries.is_paused(first, name)
                yield run.progress(0)
                return
            # No more than there is work for.
            while len(connections) < min(workers, len(run.todo)):
                connections.append(await opened.enter_async_context(connect()))
            done = run.done
            while run.todo and not run.paused:
                yield run.progress(len(run.todo))
                known = set(run.failed)
                await _round(run, connections)
                for key in run.failed.keys() - known:
                    on_failure(key, run.failed[key])
            if run.paused:
                yield run.progress(len(run.todo))
                return
            if run.done == done:
                # All of them are in other hands.
                await anyio.sleep(BUSY_PAUSE)


async def _see_marks(connection: AsyncConnection[Any], view: str) -> None:
    """Until what is logged of the view is drained: by the service, where one runs, since it must hear of all keys."""
    deadline = None
    while await view_queries.has_undrained(connection, view):
        if deadline is None:
            served = await queries.is_listened_to(connection)
            deadline = anyio.current_time() + (DRAIN_PATIENCE if served else 0)
            await queries.ring_for_all(connection)
        if anyio.current_time() >= deadline:
            await drain_all(connection)
            return
        await anyio.sleep(BUSY_PAUSE)


async def _dirty(connection: AsyncConnection[Any], view: str, but_for: dict[RefreshKey, psycopg.Error]) -> list[Change]:
    """The dirty keys of the view, in no order, so that those who fill it seldom meet; "all tenants" alone, if it is."""
    async with aclosing(changes.pending(connection, anyio.current_time(), overdue=False)) as pending:
        found = [c async for c in pending if c.key.view == view and not c.aged and c.key not in but_for]
    everybody = [change for change in found if change.key.tenant == EVERYBODY]
    random.shuffle(found)
    return everybody or found


async def _round(run: _Run, connections: list[AsyncConnection[Any]]) -> None:
    """Some time of all workers. A task group of its own: none may be open where a generator yields."""
    until = anyio.current_time() + min(LONGEST_ROUND, max(ROUND, 8 * run.slowest))
    async with anyio.create_task_group() as working:
        for connection in connections:
            working.start_soon(_work, run, connection, until)


async def _work(run: _Run, connection: AsyncConnection[Any], until: float) -> None:
    while run.todo and not run.paused and anyio.current_time() < until:
        if run.pause:
            begin = max(anyio.current_time(), run.next_start)
            if begin >= until:
                await anyio.sleep_until(until)
                return
            run.next_start = begin + run.pause
            await anyio.sleep_until(begin)
            if not run.todo:
                return
        await _refresh(run, connection, run.todo.popleft())


async def _refresh(run: _Run, connection: AsyncConnection[Any], change: Change) -> None:
    started = anyio.current_time()
    try:
        outcome = await refresh(connection, change)
    except psycopg.Error as error:
        if connection.broken or connection.closed or is_lost(error):
            raise
        run.failed[change.key] = error
        if error.sqlstate != UNKNOWN_VIEW:
            await dead_letters.record_failure(connection, change, error, run.policy)
        return
    run.slowest = max(run.slowest, anyio.current_time() - started)
    if outcome.outcome == "paused":
        run.paused = True
    # "All tenants" of a view by tenant is no key to be filled; of a view without tenants it is the only one.
    elif outcome.outcome == "refreshed" or (outcome.outcome == "fresh" and change.key.tenant != EVERYBODY):
        run.done += 1
        run.rows_changed += outcome.inserted + outcome.updated + outcome.deleted
