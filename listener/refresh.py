"""Refresh one key: lock -> compute -> record, in one transaction on the server, by listener.refresh()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from listener.views import EVERYBODY, RefreshKey

if TYPE_CHECKING:
    from psycopg import AsyncConnection


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a refresh did.

    Rows of the target inserted, updated, deleted; the dirty version that is now reflected. `expanded` wrote "all
    tenants" out as `inserted` keys; `busy` and `paused` did nothing.
    """

    outcome: Literal["refreshed", "expanded", "busy", "paused"]
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    version: int = 0


async def refresh(connection: AsyncConnection[Any], key: RefreshKey, version: int) -> Outcome:
    """Refreshes the key in a transaction of its own. `version` is what an expansion reflects at least.

    Raises psycopg.Error: whatever the definition raises, a timeout, a lost connection. Nothing was written then.
    """
    if key.tenant == EVERYBODY:
        cursor = await connection.execute("SELECT outcome, tenants FROM listener.expand(%s)", (key.view,))
        row = await cursor.fetchone()
        assert row is not None
        return Outcome(row[0], inserted=row[1] or 0, version=version)
    cursor = await connection.execute(
        "SELECT outcome, inserted, updated, deleted, version FROM listener.refresh(%s::text, %s::text)",
        (key.view, key.tenant),
    )
    row = await cursor.fetchone()
    assert row is not None
    return Outcome(row[0], row[1] or 0, row[2] or 0, row[3] or 0, row[4] or 0)
