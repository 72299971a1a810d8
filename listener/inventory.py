"""What there is to take over: the statements behind `listener inventory`. No printing here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import dict_row

from listener.errors import from_database, is_lost

if TYPE_CHECKING:
    from psycopg import AsyncConnection
    from psycopg.rows import DictRow

LOCKED = "somebody holds a lock on it, to refresh or to alter it"
# Commit times are kept only where the server is told to.
NO_TIME = "PostgreSQL keeps no time of refresh"


async def take_stock(
    connection: AsyncConnection[Any], tenant_columns: Sequence[str], *, compare_within: timedelta | None = None
) -> AsyncIterator[tuple[int, int, DictRow | None]]:
    """Goes through every materialized view and every managed view; yields done, total and what is known of the last.

    `compare_within`: what a comparison of a materialized view with its query may take; None: there is none. A view that
    cannot be looked at has `error`, and stops no other.
    """
    names = [
        row[0]
        for row in await (await connection.execute("SELECT relation::text FROM listener.inventory_names()")).fetchall()
    ]
    wanted = await _tenant_columns(connection, tenant_columns)
    yield 0, len(names), None
    for done, name in enumerate(names, start=1):
        try:
            found = await _one(connection, name, wanted)
            if compare_within is not None and found["kind"] == "materialized view":
                found |= await _difference(connection, name, compare_within)
        except psycopg.Error as error:
            if connection.broken or connection.closed or is_lost(error):
                raise
            found = {"relation": name, "error": _why(error)}
        yield done, len(names), found


def _why(error: psycopg.Error) -> str:
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return LOCKED
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return f"{error.diag.message_primary}: look as a member of its owner, or as an administrator"
    return str(from_database(error))


async def _tenant_columns(connection: AsyncConnection[Any], given: Sequence[str]) -> list[str]:
    """The names that are given; else those of registered views, and tenant_id."""
    if given:
        return list(given)
    cursor = await connection.execute(
        """
        SELECT v.tenant_column::text FROM listener.managed_view v WHERE v.tenant_column IS NOT NULL
        GROUP BY 1 ORDER BY count(*) DESC, 1
        """
    )
    return list(dict.fromkeys([*[row[0] for row in await cursor.fetchall()], "tenant_id"]))


async def _one(connection: AsyncConnection[Any], name: str, tenant_columns: Sequence[str]) -> DictRow:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT %(name)s AS relation, s.*, p.strategy AS proposed, p.why, p.key_columns::text[], p.mends,
                   f.dirty, f.dirty_since, f.refreshed_at
            FROM listener.take_stock(%(name)s::regclass, %(tenant_columns)s::name[]) s
            LEFT JOIN LATERAL listener.proposal(%(name)s::regclass, s.tenant_column, s.separable, s.unique_key) p
                ON s.managed IS NULL
            LEFT JOIN LATERAL (
                SELECT count(*) FILTER (WHERE d.status <> 'fresh') AS dirty, min(d.dirty_since) AS dirty_since,
                       max(d.refreshed_at) AS refreshed_at
                FROM listener.freshness d WHERE d.view_name = s.managed) f ON s.managed IS NOT NULL
            """,
            {"name": name, "tenant_columns": list(tenant_columns)},
        )
        row = await cursor.fetchone()
    assert row is not None
    return row


async def _difference(connection: AsyncConnection[Any], name: str, within: timedelta) -> DictRow:
    """How many rows the query has that the view has not, and the other way round; or why that is not known."""
    try:
        async with connection.transaction():
            await connection.execute(
                "SELECT set_config('statement_timeout', %s, true)", (f"{round(within.total_seconds() * 1000)}ms",)
            )
            cursor = await connection.execute(
                "SELECT missing, extra FROM listener.compare_materialized_view(%s::regclass)", (name,)
            )
            row = await cursor.fetchone()
    except psycopg.errors.QueryCanceled:
        return {"not_compared": f"comparing takes longer than {within.total_seconds():g} s"}
    except psycopg.Error as error:
        if connection.broken or connection.closed or is_lost(error):
            raise
        return {"not_compared": str(from_database(error))}
    assert row is not None
    return {"missing": row[0], "extra": row[1]}
