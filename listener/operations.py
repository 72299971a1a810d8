"""What an operator does by hand: refresh one key or all, sweep, verify, explain. No printing here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from listener import changes, queries
from listener.refresh import Outcome, refresh
from listener.views import EVERYBODY, RefreshKey

if TYPE_CHECKING:
    from psycopg import AsyncConnection
    from psycopg.rows import DictRow

BUSY_WAIT = 0.1


@dataclass(frozen=True, slots=True)
class Difference:
    """One key whose target does not equal its definition.

    `missing` rows are only in the definition, `extra` ones only in the target. `stale`: a change is known that will
    be refreshed; otherwise the target is wrong.
    """

    view: str
    tenant_id: str
    missing: int
    extra: int
    stale: bool


async def refresh_one(connection: AsyncConnection[Any], view: str, tenant: str, patience: float = 30) -> Outcome:
    """Refreshes a key now; waits up to `patience` seconds for whoever is at it."""
    deadline = anyio.current_time() + patience
    while True:
        outcome = await refresh(connection, RefreshKey(0, view, tenant), 0)
        if outcome.outcome != "busy" or anyio.current_time() > deadline:
            return outcome
        await anyio.sleep(BUSY_WAIT)


async def _drain(connection: AsyncConnection[Any]) -> None:
    """Until a drain of our own looked: one that is under way elsewhere may have looked too early."""
    while True:
        if (await changes.drain(connection, anyio.current_time())).outcome != "busy":
            return
        await anyio.sleep(BUSY_WAIT)


async def sweep_once(connection: AsyncConnection[Any]) -> AsyncIterator[tuple[int, int, Outcome | None]]:
    """Drains, then refreshes every dirty and every aged key; yields done, total and the last outcome."""
    await _drain(connection)
    done = 0
    # Writing "all tenants" out makes keys that only the next round sees.
    while True:
        dirty, aged = await changes.pending(connection, anyio.current_time(), overdue=False)
        todo = sorted(dirty + aged, key=lambda change: change.key.tenant != EVERYBODY)
        if done == 0:
            yield 0, len(todo), None
        expanded = False
        for change in todo:
            outcome = await refresh(connection, change.key, change.version)
            expanded = expanded or outcome.outcome == "expanded"
            done += 1
            yield done, done + len(todo), outcome
        if not expanded:
            return
        await _drain(connection)


async def verify(
    connection: AsyncConnection[Any], names: list[str]
) -> AsyncIterator[tuple[int, int, Difference | None]]:
    """Compares every key of the views with its definition; yields done, total and the difference if there is one."""
    keys = [(name, tenant) for name in names for tenant in await queries.tenants(connection, name)]
    yield 0, len(keys), None
    for done, (view, tenant) in enumerate(keys, start=1):
        found = await queries.compare(connection, view, tenant)
        different = found["missing"] or found["extra"]
        yield (
            done,
            len(keys),
            Difference(view, tenant, found["missing"], found["extra"], found["stale"]) if different else None,
        )


def reasons(facts: DictRow) -> list[str]:
    """Why a key is stale, one line a reason, most telling first; from queries.explain_key."""
    lines = []
    if facts["paused"]:
        lines.append("the view is paused: nothing is refreshed until `listener resume`")
    if facts["undrained"]:
        age = facts["oldest_undrained_age"]
        lines.append(f"{facts['undrained']} logged changes are not drained yet, the oldest {age:.1f} s old")
        if facts["drain_holder"]:
            lines.append(f"backend {facts['drain_holder']} holds the drain's lock")
        elif age > 1:
            lines.append("nobody drains: is `listener run` up, and /health/ready green?")
    if facts["all_tenants_pending"]:
        lines.append("all tenants of the view are marked dirty (filling, or a change of a shared table or definition)")
    dirty = facts["version"] is not None and facts["version"] != facts["refreshed_version"]
    if dirty:
        lines.append(f"the key has been dirty for {facts['dirty_age']:.1f} s")
    lines += _waits_for(facts, dirty=dirty)
    if not lines and facts["version"] is None and facts["refreshed_version"] is None:
        lines.append("no change of this tenant was ever captured, and it was never refreshed")
    return lines


def _waits_for(facts: DictRow, *, dirty: bool) -> list[str]:
    lines = []
    if facts["lock_holder"]:
        lines.append(f"backend {facts['lock_holder']} holds the key's lock, running: {facts['lock_holder_query']}")
    if facts["failures"]:
        lines.append(f"the last {facts['failures']} refreshes failed: {facts['last_error']}")
    if facts["letter_id"]:
        lines.append(f"it is quarantined: see `listener dead-letters show {facts['letter_id']}`")
    if dirty and facts["retry_in"] and facts["retry_in"] > 0:
        lines.append(f"the next attempt is in {facts['retry_in']:.1f} s")
    elif dirty and facts["due_in"] is not None:
        due = facts["due_in"]
        lines.append(f"it is due in {due:.2f} s" if due > 0 else f"it was due {-due:.1f} s ago")
    return lines


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """An outcome for --json."""
    return {
        "outcome": outcome.outcome,
        "inserted": outcome.inserted,
        "updated": outcome.updated,
        "deleted": outcome.deleted,
        "version": outcome.version,
    }
