"""What an operator does by hand: refresh one key or all, sweep, verify, explain. No printing here."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

from listener import backends, changes, dead_letters, view_queries
from listener.dead_letters import RetryPolicy
from listener.errors import UNKNOWN_VIEW, from_database, is_lost, one_line
from listener.refresh import Outcome, refresh, refresh_now
from listener.views import EVERYBODY, RefreshKey

if TYPE_CHECKING:
    from psycopg import AsyncConnection
    from psycopg.rows import DictRow

BUSY_WAIT = 0.1
READABLE = 200


@dataclass(frozen=True, slots=True)
class Difference:
    """One key whose target does not equal its definition, or could not be compared with it.

    `missing` rows are only in the definition, `extra` ones only in the target. `stale`: a change is known that will
    be refreshed; `undetermined`: the definition has more than one right result; `moved`: it depends on the time, which
    has gone on since; otherwise the target is wrong. `untenanted`: the missing rows have no tenant, so `tenant_id` is
    None and no target ever has them. `error`: why there was no comparison; where even the tenants could not be listed,
    `tenant_id` is None.
    """

    view: str
    tenant_id: str | None
    missing: int = 0
    extra: int = 0
    stale: bool = False
    undetermined: bool = False
    untenanted: bool = False
    error: str | None = None
    moved: bool = False

    @property
    def verdict(self) -> str:
        """What it is in one word."""
        if self.error is not None:
            return "failed"
        if self.untenanted:
            return "without a tenant"
        if self.stale:
            return "stale"
        return "not determined" if self.undetermined else "moved" if self.moved else "different"


@dataclass(frozen=True, slots=True)
class Failed:
    """A key whose refresh raised."""

    view: str
    tenant_id: str
    error: psycopg.Error


class Tally:
    """What came of many refreshes: how many of each outcome, and the first error of each kind."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.first: dict[str | None, Failed] = {}
        self.seconds = 0.0  # that the server took for them

    def add(self, result: Outcome | Failed) -> None:
        """Counts one."""
        if isinstance(result, Outcome):
            self.outcomes[result.outcome] += 1
            self.seconds += result.duration or 0
            return
        self.outcomes["failed"] += 1
        self.first.setdefault(result.error.sqlstate, result)


async def refresh_one(connection: AsyncConnection[Any], view: str, tenant: str, patience: float = 30) -> Outcome:
    """Refreshes a key now; waits up to `patience` seconds for whoever is at it."""
    deadline = anyio.current_time() + patience
    while True:
        outcome = await refresh_now(connection, RefreshKey(0, view, tenant))
        if outcome.outcome != "busy" or anyio.current_time() > deadline:
            return outcome
        await anyio.sleep(BUSY_WAIT)


async def refresh_all_views(
    connection: AsyncConnection[Any], tenant: str, patience: float = 30
) -> list[dict[str, Any]]:
    """Refreshes all views of a tenant now, in one transaction. A row per view, in the order of what they read.

    Tries again for up to `patience` seconds while another session refreshes one of them: the views that read that one
    must come after it. Raises psycopg.Error, with the view's name in it, where one fails; then nothing was written.
    """
    deadline = anyio.current_time() + patience
    while True:
        rows = await view_queries.refresh_all_for_tenant(connection, tenant)
        if all(row["outcome"] != "busy" for row in rows) or anyio.current_time() > deadline:
            return rows
        await anyio.sleep(BUSY_WAIT)


async def drain_all(connection: AsyncConnection[Any]) -> None:
    """Until a drain of our own looked: one that is under way elsewhere may have looked too early."""
    while True:
        if (await changes.drain(connection, anyio.current_time())).outcome != "busy":
            return
        await anyio.sleep(BUSY_WAIT)


async def refresh_all(
    connection: AsyncConnection[Any], view: str
) -> AsyncIterator[tuple[int, int, Outcome | Failed | None]]:
    """Refreshes every tenant of a view; yields done, total and what came of the last. One that fails stops no other."""
    everyone = await view_queries.tenants(connection, view)
    yield 0, len(everyone), None
    for done, tenant in enumerate(everyone, start=1):
        result: Outcome | Failed
        try:
            result = await refresh_one(connection, view, tenant)
        except psycopg.Error as error:
            if _ends_it_all(connection, error):
                raise
            result = Failed(view, tenant, error)
        yield done, len(everyone), result


async def catch_up(connection: AsyncConnection[Any], view: str) -> None:
    """Refreshes what of this view is dirty by now. Raises psycopg.Error where a key fails."""
    await drain_all(connection)
    pending = changes.pending(connection, anyio.current_time(), overdue=False)
    for change in [change async for change in pending if change.key.view == view and not change.aged]:
        await refresh(connection, change)


async def sweep_once(
    connection: AsyncConnection[Any], policy: RetryPolicy | None = None
) -> AsyncIterator[tuple[int, int, Outcome | Failed | None]]:
    """Drains, then refreshes every dirty and every aged key; yields done, total and what came of the last.

    With a policy a failure is recorded as the service records it, and stops no other key; without, it is raised.
    """
    await drain_all(connection)
    done = 0
    failed: set[RefreshKey] = set()
    # Writing "all tenants" out makes keys that only the next round sees.
    while True:
        pending = changes.pending(connection, anyio.current_time(), overdue=False)
        todo = [change async for change in pending if change.key not in failed]
        todo.sort(key=lambda change: change.key.tenant != EVERYBODY)
        total = done + len(todo)
        yield done, total, None
        expanded = False
        for change in todo:
            result: Outcome | Failed
            try:
                result = await refresh(connection, change)
                expanded = expanded or result.outcome == "expanded"
            except psycopg.Error as error:
                if policy is None or _ends_it_all(connection, error):
                    raise
                result = Failed(change.key.view, change.key.tenant, error)
                failed.add(change.key)
                if error.sqlstate != UNKNOWN_VIEW:
                    await dead_letters.record_failure(connection, change, error, policy)
            done += 1
            yield done, total, result
        if not expanded:
            return
        await drain_all(connection)


async def verify(
    connection: AsyncConnection[Any], names: list[str]
) -> AsyncIterator[tuple[int, int, Difference | None]]:
    """Compares every key of the views with its definition; yields done, total and the difference if there is one.

    What cannot be compared is a Difference with an error, and stops no other key. Rows that have no tenant, and so no
    key, are one Difference a view.
    """
    keys: list[tuple[str, str]] = []
    unlisted: list[Difference] = []
    for name in names:
        try:
            if untenanted := await view_queries.rows_without_tenant(connection, name):
                unlisted.append(Difference(name, None, untenanted, untenanted=True))
            keys += [(name, tenant) for tenant in await view_queries.tenants(connection, name)]
        except psycopg.Error as error:
            if _ends_it_all(connection, error):
                raise
            unlisted.append(Difference(name, None, error=str(from_database(error))))
    yield 0, len(keys), None
    for difference in unlisted:
        yield 0, len(keys), difference
    for done, (view, tenant) in enumerate(keys, start=1):
        yield done, len(keys), await _compare(connection, view, tenant)


async def _compare(connection: AsyncConnection[Any], view: str, tenant: str) -> Difference | None:
    try:
        found = await view_queries.compare(connection, view, tenant)
    except psycopg.Error as error:
        if _ends_it_all(connection, error):
            raise
        return Difference(view, tenant, error=str(from_database(error)))
    if not (found["missing"] or found["extra"]):
        return None
    undetermined = moved = False
    if not found["stale"]:
        undetermined = await view_queries.is_undetermined(connection, view, tenant)
        moved = await view_queries.depends_on_time(connection, view)
    return Difference(
        view, tenant, found["missing"], found["extra"], found["stale"], undetermined=undetermined, moved=moved
    )


def _ends_it_all(connection: AsyncConnection[Any], error: psycopg.Error) -> bool:
    """Whether nothing more can be asked of this connection."""
    return connection.broken or connection.closed or is_lost(error)


async def explain(connection: AsyncConnection[Any], view: str, tenant: str) -> DictRow:
    """What is known of a key: listener.explain_key(), `troubles` of its view's tables, `waits_for` of who refreshes it.

    `upstream` has the keys of other managed views whose change it has yet to see.
    """
    facts = await view_queries.explain_key(connection, view, tenant)
    holder = facts["lock_holder"]
    waits_for = [] if holder is None else await backends.in_the_way_of(connection, holder)
    return facts | {
        "troubles": await view_queries.view_troubles(connection, facts["view_name"]),
        "waits_for": waits_for,
        "upstream": await view_queries.explain_upstream(connection, facts["view_name"], facts["tenant"]),
    }


def reasons(facts: DictRow) -> list[str]:
    """Why a key is stale, one line a reason, most telling first; from explain(). Its troubles may not make it stale."""
    lines = []
    if facts["paused"]:
        lines.append("the view is paused: nothing is refreshed until `listener resume`")
    if facts["undrained"]:
        age = facts["oldest_undrained_age"]
        one = facts["undrained"] == 1
        what = "1 logged change is" if one else f"{facts['undrained']} logged changes are"
        lines.append(f"{what} not drained yet, {'' if one else 'the oldest '}{age:.1f} s old")
        if facts["drain_holder"]:
            lines.append(f"backend {facts['drain_holder']} holds the drain's lock")
        elif age > 1:
            lines.append("nobody drains: is `listener run` up, and /health/ready green?")
    if facts["all_tenants_pending"]:
        lines.append("all tenants of the view are marked dirty (filling, or a change of a shared table or definition)")
    lines += [_upstream(key) for key in facts["upstream"]]
    dirty = facts["version"] is not None and facts["version"] != facts["refreshed_version"]
    if dirty:
        lines.append(f"the key has been dirty for {facts['dirty_age']:.1f} s")
    if facts["app_correlation_id"] and (dirty or facts["undrained"]):
        lines.append(f"the application's correlation id of its newest change is {facts['app_correlation_id']}")
    lines += _waits_for(facts, dirty=dirty)
    if not lines and facts["version"] is None and facts["refreshed_version"] is None:
        lines.append("no change of this tenant was ever captured, and it was never refreshed")
    return lines


def _upstream(key: DictRow) -> str:
    """One line for a key of another view, whose target this one reads."""
    tenant = key["tenant"]
    whose = "some tenant" if tenant is None else f"tenant {tenant}" if tenant else "all tenants"
    age = key["dirty_age"]
    what = "has a change that is not drained yet" if age is None else f"has been dirty for {age:.1f} s"
    paused = ", and is paused" if key["paused"] else ""
    return f"it reads {key['view_name']}, which {what} for {whose}{paused}"


def _waits_for(facts: DictRow, *, dirty: bool) -> list[str]:
    lines = []
    if facts["lock_holder"]:
        query = one_line(facts["lock_holder_query"] or "")
        lines.append(f"backend {facts['lock_holder']} holds the key's lock, running: {shortened(query)}")
    for pid, state, query in facts["waits_for"]:
        lines.append(
            f"it waits for a lock of backend {pid}, {state or 'whose state is not seen'}: "
            f"{shortened(one_line(query or ''))}"
        )
    if facts["failures"]:
        times = "the last refresh" if facts["failures"] == 1 else f"the last {facts['failures']} refreshes"
        lines.append(f"{times} failed: {shortened(one_line(facts['last_error'] or ''))}")
    if facts["letter_id"]:
        lines.append(f"it is quarantined: see `listener dead-letters show {facts['letter_id']}`")
    if dirty and facts["retry_in"] and facts["retry_in"] > 0:
        lines.append(f"the next attempt is in {facts['retry_in']:.1f} s")
    elif dirty and facts["due_in"] is not None:
        due = facts["due_in"]
        lines.append(f"it is due in {due:.2f} s" if due > 0 else f"it was due {-due:.1f} s ago")
    return lines


def shortened(text: str) -> str:
    """So much of it that a line stays readable."""
    return text if len(text) <= READABLE else f"{text[:READABLE]}…"


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """An outcome for --json."""
    return {
        "outcome": outcome.outcome,
        "inserted": outcome.inserted,
        "updated": outcome.updated,
        "deleted": outcome.deleted,
        "version": outcome.version,
        "seconds": outcome.duration,
    }
