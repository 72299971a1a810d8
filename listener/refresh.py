"""Refresh one key: lock -> compute -> record, in one transaction on the server, by listener.refresh()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, LiteralString

from psycopg.rows import dict_row

from listener.views import Change, RefreshKey

if TYPE_CHECKING:
    from psycopg import AsyncConnection


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a refresh did.

    Rows of the target inserted, updated, deleted; the dirty version that is now reflected; how many seconds the server
    took, None where it did nothing. `expanded` wrote "all
    tenants" out as `inserted` keys; `fresh`, `busy` and `paused` did nothing: another replica had shown the version, is
    at it, or nobody is to be.
    """

    outcome: Literal["refreshed", "expanded", "fresh", "busy", "paused"]
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    version: int = 0
    duration: float | None = None


async def refresh(connection: AsyncConnection[Any], change: Change) -> Outcome:
    """Refreshes the key in a transaction of its own, unless its version is shown already and it is not aged.

    Raises psycopg.Error: whatever the definition raises, a timeout, a lost connection. Nothing was written then.
    """
    key = change.key
    if change.aged:
        return await refresh_now(connection, key)
    return await _outcome(
        connection,
        "SELECT * FROM listener.refresh_dirty(%s, %s::text, %s::text, %s)",
        (key.view_id, key.view, key.tenant, change.version),
    )


async def refresh_now(connection: AsyncConnection[Any], key: RefreshKey) -> Outcome:
    """Refreshes the key whether it is dirty or not. Raises as refresh()."""
    return await _outcome(connection, "SELECT * FROM listener.refresh_key(%s::text, %s::text)", (key.view, key.tenant))


async def _outcome(connection: AsyncConnection[Any], query: LiteralString, given: tuple[object, ...]) -> Outcome:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, given)
        row = await cursor.fetchone()
    assert row is not None
    duration = row.get("duration")
    return Outcome(
        row["outcome"],
        row["inserted"] or 0,
        row["updated"] or 0,
        row["deleted"] or 0,
        row["version"] or 0,
        None if duration is None else duration.total_seconds(),
    )
