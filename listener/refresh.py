"""Refresh one key: lock -> compute -> record, in one transaction on the server, by listener.refresh()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
    cursor = await connection.execute(
        "SELECT outcome, inserted, updated, deleted, version, duration"
        " FROM listener.refresh_dirty(%s, %s::text, %s::text, %s)",
        (key.view_id, key.view, key.tenant, change.version),
    )
    return _outcome(await cursor.fetchone())


async def refresh_now(connection: AsyncConnection[Any], key: RefreshKey) -> Outcome:
    """Refreshes the key whether it is dirty or not. Raises as refresh()."""
    cursor = await connection.execute(
        "SELECT outcome, inserted, updated, deleted, version, duration FROM listener.refresh_key(%s::text, %s::text)",
        (key.view, key.tenant),
    )
    return _outcome(await cursor.fetchone())


def _outcome(row: tuple[Any, ...] | None) -> Outcome:
    assert row is not None
    duration = None if row[5] is None else row[5].total_seconds()
    return Outcome(row[0], row[1] or 0, row[2] or 0, row[3] or 0, row[4] or 0, duration)
