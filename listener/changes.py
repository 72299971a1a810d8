"""Drain: change_log -> dirty keys, by listener.drain(); and the dirty keys that are already known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from psycopg.rows import DictRow, dict_row

from listener.views import Change, RefreshKey, Window

if TYPE_CHECKING:
    from psycopg import AsyncConnection


@dataclass(frozen=True, slots=True)
class Drained:
    """What one drain brought. `busy` is not `nothing`: another session is draining, and may have looked too early."""

    outcome: Literal["drained", "nothing", "busy"]
    changes: int = 0
    correlation_id: str | None = None
    keys: list[Change] = field(default_factory=list)


async def drain(connection: AsyncConnection[Any], now: float, looked_before: float | None = None) -> Drained:
    """Folds what is new into the dirty keys and returns those.

    `now`: the monotonic clock, in seconds. `looked_before`: when the last drain that saw everything began; what it
    could not see was not visible then, so no change of a tenant's own is older than that.
    """
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.drain()")
        rows = await cursor.fetchall()
    first = rows[0]
    if first["outcome"] != "drained":
        return Drained(first["outcome"])
    keys = [_change(row, now, looked_before) for row in rows if row["view_id"] is not None and not row["paused"]]
    return Drained("drained", first["changes"], first["correlation_id"], keys)


async def pending(connection: AsyncConnection[Any], now: float, *, overdue: bool) -> tuple[list[Change], list[Change]]:
    """The dirty keys in the database, all of them or the overdue ones; and the clean keys past their max_age."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.pending_keys(%s)", (overdue,))
        dirty: list[Change] = []
        aged: list[Change] = []
        async for row in cursor:
            (aged if row["outcome"] == "aged" else dirty).append(_change(row, now, None))
        return dirty, aged


def _change(row: DictRow, now: float, looked_before: float | None) -> Change:
    first_change = now - row["first_change_age"]
    last_change = now - row["last_change_age"]
    if looked_before is not None and not row["bulk"]:
        first_change = max(first_change, looked_before)
        last_change = max(last_change, first_change)
    return Change(
        key=RefreshKey(row["view_id"], row["view_name"], row["tenant"]),
        window=Window(row["quiet_period"], row["max_wait"], row["edge"]),
        version=row["version"] or 0,
        first_change=first_change,
        last_change=last_change,
        correlation_id=row["correlation_id"],
        app_correlation_id=row["app_correlation_id"],
        refresh_started=None if row["refresh_started_age"] is None else now - row["refresh_started_age"],
        retry_at=None if row["retry_in"] is None or row["retry_in"] <= 0 else now + row["retry_in"],
        bulk=row["bulk"],
    )
