"""What is asked of views, their tenants and their keys: one function per statement."""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

from psycopg import AsyncConnection, sql
from psycopg.rows import DictRow, dict_row

from listener.queries import first


async def view_gauges(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Per view: dirty keys, the age in seconds of the oldest, open dead letters, 1 where it is paused, else 0.

    A paused view is stale because somebody wants it so: its keys are not counted as dirty. `staleness` counts all that
    listener.staleness() does, in seconds; `max_staleness` is None where the view has no limit.
    """
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT v.name AS view, v.target_schema, v.target_name,
                   CASE WHEN v.paused_at IS NULL THEN s.dirty_keys ELSE 0 END AS dirty_keys,
                   CASE WHEN v.paused_at IS NULL AND s.dirty_since IS NOT NULL
                        THEN extract(epoch FROM clock_timestamp() - s.dirty_since) ELSE 0 END::float8
                       AS oldest_dirty_age,
                   (SELECT count(*) FROM listener.dead_letter l
                    WHERE l.view_id = v.id AND l.status = 'open') AS dead_letters,
                   (v.paused_at IS NOT NULL)::int AS paused,
                   coalesce(extract(epoch FROM s.staleness), 0)::float8 AS staleness,
                   extract(epoch FROM s.max_staleness)::float8 AS max_staleness
            FROM listener.managed_view v JOIN listener.staleness() s ON s.view_id = v.id
            ORDER BY v.name
            """
        )
        return await cursor.fetchall()


async def freshness(connection: AsyncConnection[Any], tenant: str) -> list[DictRow]:
    """The rows of listener.freshness of one tenant, however it is spelled."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT f.* FROM listener.freshness f JOIN listener.managed_view v ON v.name = f.view_name
            WHERE f.tenant_id = CASE v.tenant_type WHEN 'uuid' THEN %(uuid)s WHEN 'bigint' THEN %(number)s
                                                   WHEN 'integer' THEN %(number)s ELSE %(text)s END::text
            ORDER BY f.view_name
            """,
            spellings(tenant),
        )
        return await cursor.fetchall()


async def is_tenant_of_any_view(connection: AsyncConnection[Any], tenant: str) -> bool:
    """Whether some view has this tenant, however it is spelled."""
    row = await (
        await connection.execute(
            """
            SELECT EXISTS (
                SELECT FROM listener.managed_view v, listener.tenants(v.name) t
                WHERE t = CASE v.tenant_type WHEN 'uuid' THEN %(uuid)s WHEN 'bigint' THEN %(number)s
                                             WHEN 'integer' THEN %(number)s ELSE %(text)s END::text)
            """,
            spellings(tenant),
        )
    ).fetchone()
    return bool(row and row[0])


def spellings(tenant: str) -> dict[str, str | None]:
    """The tenant as each type writes it; None where it is not of the type."""
    spelled: dict[str, str | None] = {"text": tenant, "uuid": None, "number": None}
    with contextlib.suppress(ValueError):
        spelled["uuid"] = str(uuid.UUID(tenant))
    with contextlib.suppress(ValueError):
        spelled["number"] = str(int(tenant))
    return spelled


async def tenant_of_view(connection: AsyncConnection[Any], view: str, tenant: str) -> tuple[str, str, bool]:
    """The view's own name, the tenant as its type writes it, and whether it is one of listener.tenants(view).

    Raises psycopg.Error: LSN01 for an unknown view, LSN02 for a tenant that is missing or malformed.
    """
    cursor = await connection.execute(
        """
        SELECT k.view, k.tenant,
               -- A tenant that was refreshed, or waits for it, is known even where nobody can be listed.
               CASE WHEN EXISTS (SELECT FROM listener.refresh_state r WHERE r.view_id = k.id AND r.tenant = k.tenant)
                      OR EXISTS (SELECT FROM listener.dirty_key d WHERE d.view_id = k.id AND d.tenant = k.tenant)
                    THEN true ELSE k.tenant IN (SELECT t FROM listener.tenants(k.view) t) END
        FROM (SELECT v.id, v.name AS view, listener.canonical_tenant(%(tenant)s::text, v.tenant_type) AS tenant
              FROM listener.find_view(%(view)s) v OFFSET 0) k
        """,
        {"view": view, "tenant": tenant},
    )
    row = await cursor.fetchone()
    assert row is not None
    return row[0], row[1], row[2]


async def has_tenants(connection: AsyncConnection[Any], view: str) -> bool:
    """Whether the view is refreshed by tenant. Raises psycopg.Error, LSN01, where there is no such view."""
    row = await (
        await connection.execute("SELECT v.strategy = 'tenant' FROM listener.find_view(%s) v", (view,))
    ).fetchone()
    assert row is not None
    return bool(row[0])


async def view_name(connection: AsyncConnection[Any], view: str) -> str:
    """The view's own name. Raises psycopg.Error, LSN01, where there is no such view."""
    row = await (await connection.execute("SELECT v.name FROM listener.find_view(%s) v", (view,))).fetchone()
    assert row is not None
    return str(row[0])


async def forget(connection: AsyncConnection[Any], tenant: str, view: str | None) -> list[DictRow]:
    """listener.forget: what was deleted in each view, and in the end what belongs to none."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.forget(%s, %s)", (tenant, view))
        return await cursor.fetchall()


async def refresh_all_for_tenant(connection: AsyncConnection[Any], tenant: str) -> list[DictRow]:
    """listener.refresh_all_for_tenant: what was done with each view, and how many seconds it took."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT r.view_name AS view, r.outcome, coalesce(r.inserted, 0) AS inserted,
                   coalesce(r.updated, 0) AS updated, coalesce(r.deleted, 0) AS deleted,
                   coalesce(r.version, 0) AS version,
                   extract(epoch FROM r.duration)::float8 AS seconds
            FROM listener.refresh_all_for_tenant(%s::text) r
            """,
            (tenant,),
        )
        return await cursor.fetchall()


async def is_paused(connection: AsyncConnection[Any], view: str) -> bool:
    """Whether the view is paused. Raises psycopg.Error, LSN01, where there is no such view."""
    row = await (
        await connection.execute("SELECT v.paused_at IS NOT NULL FROM listener.find_view(%s) v", (view,))
    ).fetchone()
    return bool(row and row[0])


async def filling(connection: AsyncConnection[Any]) -> list[DictRow]:
    """The rows of listener.filling: the views that are being filled, and how far they are."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.filling ORDER BY view_name")
        return await cursor.fetchall()


async def has_undrained(connection: AsyncConnection[Any], view: str) -> bool:
    """Whether a mark of the view, or of its keys, is logged that no drain has seen."""
    row = await (
        await connection.execute(
            """
            SELECT EXISTS (SELECT FROM listener.unconsumed() c JOIN listener.managed_view v ON v.id = c.view_id
                           WHERE v.name = %s)
            """,
            (view,),
        )
    ).fetchone()
    return bool(row and row[0])


async def views(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Every managed view with its window and what is known of its keys."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT v.name AS view, quote_ident(v.target_schema) || '.' || quote_ident(v.target_name) AS target,
                   v.quiet_period, v.max_wait, v.edge, v.max_age, v.paused_at IS NOT NULL AS paused,
                   s.staleness, s.max_staleness, coalesce(s.staleness > s.max_staleness, false) AS too_stale,
                   (SELECT string_agg(u.name, ', ' ORDER BY u.name) FROM listener.view_reads r
                    JOIN listener.managed_view u ON u.id = r.upstream_id WHERE r.view_id = v.id) AS reads,
                   count(f.tenant_id) AS keys,
                   count(*) FILTER (WHERE f.status = 'dirty') AS dirty,
                   count(*) FILTER (WHERE f.status = 'failing') AS failing,
                   count(*) FILTER (WHERE f.status = 'quarantined') AS quarantined,
                   min(f.dirty_since) AS dirty_since, max(f.refreshed_at) AS last_refreshed_at
            FROM listener.managed_view v JOIN listener.staleness() s ON s.view_id = v.id
            LEFT JOIN listener.freshness f ON f.view_name = v.name
            GROUP BY v.id, s.staleness, s.max_staleness ORDER BY v.name
            """
        )
        return await cursor.fetchall()


async def tenants(connection: AsyncConnection[Any], view: str) -> list[str]:
    """Every tenant of a view: its tenants query, the keys, the target's own."""
    cursor = await connection.execute("SELECT t FROM listener.tenants(%s) t ORDER BY t", (view,))
    return [row[0] for row in await cursor.fetchall()]


async def compare(connection: AsyncConnection[Any], view: str, tenant: str) -> DictRow:
    """listener.compare for one key."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.compare(%s, %s)", (view, tenant))
        row = await cursor.fetchone()
        assert row is not None
        return row


async def depends_on_time(connection: AsyncConnection[Any], view: str) -> bool:
    """Whether the rows of the definition change with the time alone."""
    cursor = await connection.execute(
        """
        SELECT EXISTS (SELECT FROM listener.find_view(%s) v
                       CROSS JOIN LATERAL listener.time_dependence(to_regclass('listener.definition_' || v.id)) t
                       WHERE t.dependence = 'time')
        """,
        (view,),
    )
    row = await cursor.fetchone()
    return bool(row and row[0])


async def is_undetermined(connection: AsyncConnection[Any], view: str, tenant: str) -> bool:
    """Whether check_drift() found that the key has more than one right result."""
    return bool(await first(connection, "SELECT listener.is_undetermined(%s, %s)", view, tenant))


async def rows_without_tenant(connection: AsyncConnection[Any], view: str) -> int:
    """How many rows of a definition have no tenant; 0 where they cannot be counted, or the view keeps them."""
    return await first(connection, "SELECT listener.rows_without_tenant(%s)", view) or 0


async def explain_key(connection: AsyncConnection[Any], view: str, tenant: str) -> DictRow:
    """listener.explain_key for one key."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.explain_key(%s, %s)", (view, tenant))
        row = await cursor.fetchone()
        assert row is not None
        return row


async def next_keys(
    connection: AsyncConnection[Any], after_view: int | None, after_tenant: str, keys: int, slowest: float
) -> list[tuple[int, str, str]]:
    """listener.next_keys: view id, view and tenant of the keys to compare next; `slowest` in seconds."""
    cursor = await connection.execute(
        "SELECT view_id, view_name, tenant FROM listener.next_keys(%s, %s, %s, make_interval(secs => %s))",
        (after_view, after_tenant, keys, slowest),
    )
    return await cursor.fetchall()


async def check_drift(connection: AsyncConnection[Any], view: str, tenant: str, within: float) -> DictRow:
    """listener.check_drift for one key, with a timeout of its own, in seconds. Raises psycopg.Error."""
    # Together, since a timeout counts from the beginning of a statement, and behind a pooler each has the session's.
    statements = sql.SQL(
        "SELECT set_config('statement_timeout', {}, true); SELECT * FROM listener.check_drift({}, {})"
    ).format(sql.Literal(f"{within * 1000:.0f}"), sql.Literal(view), sql.Literal(tenant))
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(statements, prepare=False)
        cursor.nextset()
        row = await cursor.fetchone()
        assert row is not None
        return row


async def explain_upstream(connection: AsyncConnection[Any], view: str, tenant: str) -> list[DictRow]:
    """listener.explain_upstream for one key: the keys whose change it has yet to see."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.explain_upstream(%s, %s)", (view, tenant))
        return await cursor.fetchall()


async def view_troubles(connection: AsyncConnection[Any], view: str) -> list[str]:
    """What is wrong with the tables of a view, each with what mends it; `view` is its own name."""
    cursor = await connection.execute(
        "SELECT t.trouble FROM listener.view_troubles() t WHERE t.view = %s ORDER BY t.trouble", (view,)
    )
    return [row[0] for row in await cursor.fetchall()]


async def all_fresh(connection: AsyncConnection[Any]) -> bool:
    """Whether no change is logged and not drained, or drained and not refreshed. For whoever may read the log."""
    row = await (
        await connection.execute(
            """
            SELECT NOT EXISTS (SELECT FROM listener.unconsumed())
               AND NOT EXISTS (SELECT FROM listener.dirty)
            """
        )
    ).fetchone()
    return bool(row and row[0])


async def target_sizes(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Rows of each target, counted, with its dirty keys. For a role that may read whole targets."""
    rows = await view_gauges(connection)
    for row in rows:
        target = sql.Identifier(row["target_schema"], row["target_name"])
        counted = await (await connection.execute(sql.SQL("SELECT count(*) FROM {}").format(target))).fetchone()
        row["rows"] = counted[0] if counted else 0
    return rows


async def unfilled(connection: AsyncConnection[Any], view: str) -> list[str]:
    """The keys that no refresh has filled yet."""
    cursor = await connection.execute("SELECT u FROM listener.unfilled(%s) u", (view,))
    return [row[0] for row in await cursor.fetchall()]
