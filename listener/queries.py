"""The runtime SQL that is not a function of the schema: one function per statement."""

from __future__ import annotations

import contextlib
import uuid
from typing import Any, LiteralString, NamedTuple

from psycopg import AsyncConnection, sql
from psycopg.rows import DictRow, class_row, dict_row

# Log rows deleted in one transaction: seconds, not minutes.
PURGE_BATCH = 200_000


async def first(connection: AsyncConnection[Any], query: Any, *given: Any) -> Any:
    """The first value of the first row; None where there is no row."""
    row = await (await connection.execute(query, given or None)).fetchone()
    return None if row is None else row[0]


class ServerFacts(NamedTuple):
    """What the first log line says of the server, and what refuses a start."""

    role: str
    is_superuser: bool
    bypasses_rls: bool
    server_version: str
    server_version_num: int
    schema_owner: str | None
    may_use_schema: bool
    schema_installed: bool


async def server_facts(connection: AsyncConnection[Any]) -> ServerFacts:
    """Version, role and whether the schema is there. Looks only where every role may look."""
    async with connection.cursor(row_factory=class_row(ServerFacts)) as cursor:
        await cursor.execute(
            """
            SELECT current_user::text AS role, r.rolsuper AS is_superuser, r.rolbypassrls AS bypasses_rls,
                   current_setting('server_version') AS server_version,
                   current_setting('server_version_num')::int AS server_version_num,
                   pg_get_userbyid(n.nspowner)::text AS schema_owner,
                   coalesce(has_schema_privilege(n.oid, 'USAGE'), false) AS may_use_schema,
                   (SELECT count(*) = 2 FROM pg_class c WHERE c.relnamespace = n.oid
                    AND c.relname IN ('managed_view', 'alembic_version')) AS schema_installed
            FROM pg_roles r LEFT JOIN pg_namespace n ON n.nspname = 'listener'
            WHERE r.rolname = current_user
            """
        )
        row = await cursor.fetchone()
        assert row is not None
        return row


async def only_reads(connection: AsyncConnection[Any]) -> bool:
    """Whether the server is a standby, or its sessions are read-only."""
    row = await (
        await connection.execute("SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean")
    ).fetchone()
    return bool(row and row[0])


async def read_only_reason(connection: AsyncConnection[Any]) -> tuple[bool, str | None]:
    """Whether the server is a standby; else, where its sessions only read, the statement that ends that."""
    row = await (
        await connection.execute(
            """
            SELECT pg_is_in_recovery(), CASE WHEN current_setting('transaction_read_only')::boolean THEN coalesce(
                (SELECT concat_ws(' ', 'ALTER',
                                  CASE WHEN s.setrole <> 0 THEN format('ROLE %%I', pg_get_userbyid(s.setrole)) END,
                                  CASE WHEN s.setrole <> 0 AND s.setdatabase <> 0 THEN 'IN' END,
                                  CASE WHEN s.setdatabase <> 0 THEN format('DATABASE %%I', current_database()) END,
                                  'RESET default_transaction_read_only')
                 FROM pg_db_role_setting s
                 JOIN pg_database d ON s.setdatabase IN (d.oid, 0) AND d.datname = current_database()
                 WHERE s.setrole IN (0, current_user::regrole) AND EXISTS (
                     SELECT FROM unnest(s.setconfig) c WHERE c ~* '^default_transaction_read_only=(on|true|yes|1)$')
                 ORDER BY s.setrole DESC, s.setdatabase DESC LIMIT 1),
                'ALTER SYSTEM RESET default_transaction_read_only; SELECT pg_reload_conf()') END
            """,
            (),
        )
    ).fetchone()
    assert row is not None
    return row[0], row[1]


async def missing_roles(connection: AsyncConnection[Any], roles: list[str]) -> list[str]:
    """Those of these roles that are not there."""
    cursor = await connection.execute(
        "SELECT r FROM unnest(%s::text[]) r WHERE r NOT IN (SELECT o.rolname FROM pg_roles o)", (roles,)
    )
    return [row[0] for row in await cursor.fetchall()]


async def server_time(connection: AsyncConnection[Any]) -> float:
    """The server's clock, in seconds since 1970."""
    row = await (await connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8")).fetchone()
    assert row is not None
    return float(row[0])


async def direct_address(connection: AsyncConnection[Any]) -> str:
    """The URL of the server itself, as it sees itself, whatever stands between."""
    row = await (
        await connection.execute(
            """
            SELECT format('postgresql://%%s@%%s:%%s/%%s%%s', current_user, host(inet_server_addr()), p.port,
                          current_database(), '?host=' || split_part(d.setting, ',', 1))
            FROM (SELECT current_setting('port')) AS p (port)
            -- Not everybody is shown where the socket is; libpq looks in the usual place.
            LEFT JOIN pg_settings d ON d.name = 'unix_socket_directories' AND inet_server_addr() IS NULL
            """,
            (),
        )
    ).fetchone()
    assert row is not None
    return str(row[0])


async def schema_revision(connection: AsyncConnection[Any]) -> str | None:
    """The migration that the schema is at; None where there is none."""
    row = await (await connection.execute("SELECT version_num FROM listener.alembic_version")).fetchone()
    return None if row is None else str(row[0])


async def serves(connection: AsyncConnection[Any], migration: str) -> bool:
    """Whether the schema, though newer, serves a release whose newest migration is this one."""
    row = await (await connection.execute("SELECT listener.serves(%s)", (migration,))).fetchone()
    return bool(row and row[0])


async def database_identity(connection: AsyncConnection[Any]) -> tuple[int, int]:
    """The cluster's system identifier and the database's oid: no two databases have both in common."""
    row = await (
        await connection.execute(
            """
            SELECT c.system_identifier, d.oid FROM pg_control_system() c, pg_database d
            WHERE d.datname = current_database()
            """
        )
    ).fetchone()
    assert row is not None
    return row[0], row[1]


async def computing_role(connection: AsyncConnection[Any]) -> tuple[str, bool] | None:
    """The role that refreshes run as, and whether row-level security fails to bind it. None: nothing refreshes."""
    row = await (
        await connection.execute(
            """
            SELECT r.rolname::text, r.rolsuper OR r.rolbypassrls
            FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner
            WHERE p.oid = to_regprocedure('listener.refresh(text, text)')
            """
        )
    ).fetchone()
    return None if row is None else (row[0], row[1])


async def view_gauges(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Per view: dirty keys, the age in seconds of the oldest, open dead letters, 1 where it is paused, else 0.

    A paused view is stale because somebody wants it so: its keys are not counted as dirty.
    """
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT v.name AS view, v.target_schema, v.target_name,
                   coalesce(d.keys, 0) AS dirty_keys,
                   coalesce(extract(epoch FROM clock_timestamp() - d.since), 0)::float8 AS oldest_dirty_age,
                   (SELECT count(*) FROM listener.dead_letter l
                    WHERE l.view_id = v.id AND l.status = 'open') AS dead_letters,
                   (v.paused_at IS NOT NULL)::int AS paused
            FROM listener.managed_view v
            LEFT JOIN (SELECT k.view_id, count(*) AS keys, min(k.dirty_since) AS since
                       FROM listener.dirty k GROUP BY k.view_id) d ON d.view_id = v.id AND v.paused_at IS NULL
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


async def is_paused(connection: AsyncConnection[Any], view: str) -> bool:
    """Whether the view is paused. Raises psycopg.Error, LSN01, where there is no such view."""
    row = await (
        await connection.execute("SELECT v.paused_at IS NOT NULL FROM listener.find_view(%s) v", (view,))
    ).fetchone()
    return bool(row and row[0])


async def undrained(connection: AsyncConnection[Any]) -> tuple[int, float | None]:
    """How many logged changes no drain has seen, and the age of the oldest in seconds."""
    row = await (
        await connection.execute(
            """
            SELECT count(*), extract(epoch FROM clock_timestamp() - min(c.changed_at))::float8
            FROM listener.unconsumed() c
            """
        )
    ).fetchone()
    assert row is not None
    return row[0], row[1]


async def is_listened_to(connection: AsyncConnection[Any]) -> bool:
    """Whether a service has its listening connection to this database open."""
    row = await (
        await connection.execute(
            """
            SELECT EXISTS (SELECT FROM pg_stat_activity a
                           WHERE a.datname = current_database() AND a.application_name = 'listener listen')
            """
        )
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
                   (SELECT string_agg(u.name, ', ' ORDER BY u.name) FROM listener.view_reads r
                    JOIN listener.managed_view u ON u.id = r.upstream_id WHERE r.view_id = v.id) AS reads,
                   count(f.tenant_id) AS keys,
                   count(*) FILTER (WHERE f.status = 'dirty') AS dirty,
                   count(*) FILTER (WHERE f.status = 'failing') AS failing,
                   count(*) FILTER (WHERE f.status = 'quarantined') AS quarantined,
                   min(f.dirty_since) AS dirty_since, max(f.refreshed_at) AS last_refreshed_at
            FROM listener.managed_view v LEFT JOIN listener.freshness f ON f.view_name = v.name
            GROUP BY v.id ORDER BY v.name
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


async def readiness(connection: AsyncConnection[Any]) -> list[str]:
    """What listener.readiness() has to say; empty when all is well."""
    cursor = await connection.execute("SELECT r FROM listener.readiness() r")
    return [row[0] for row in await cursor.fetchall()]


async def state_findings(connection: AsyncConnection[Any]) -> list[DictRow]:
    """What listener.state_findings() says, as the next four do: check, level, view, object, problem, mend."""
    return await _found(connection, "SELECT * FROM listener.state_findings()")


async def capture_findings(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Whether every source has its triggers."""
    return await _found(connection, "SELECT * FROM listener.capture_findings()")


async def progress_findings(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Whether views are refreshed."""
    return await _found(connection, "SELECT * FROM listener.progress_findings()")


async def server_findings(connection: AsyncConnection[Any], replica_connections: int) -> list[DictRow]:
    """The server's settings; a replica opens so many connections at the most."""
    return await _found(connection, "SELECT * FROM listener.server_findings(%s)", replica_connections)


async def scope_findings(connection: AsyncConnection[Any], left_out: list[str]) -> list[DictRow]:
    """Whether refreshes of all other views read one tenant's rows, by an index.

    Takes temporary tables, which are gone afterwards.
    """
    return await _found(
        connection,
        """
        SELECT f.kind AS "check", f.level, f.view, f.object, f.problem, f.mend FROM listener.scope_findings(%s) f
        """,
        left_out,
    )


async def _found(connection: AsyncConnection[Any], query: LiteralString, *given: object) -> list[DictRow]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, given)
        return await cursor.fetchall()


async def lost_guarantees(connection: AsyncConnection[Any]) -> list[str]:
    """What cannot be promised since the service shares its role with the owner or the application."""
    cursor = await connection.execute("SELECT g FROM listener.lost_guarantees() g")
    return [row[0] for row in await cursor.fetchall()]


async def view_troubles(connection: AsyncConnection[Any], view: str) -> list[str]:
    """What is wrong with the tables of a view, each with what mends it; `view` is its own name."""
    cursor = await connection.execute(
        "SELECT t.trouble FROM listener.view_troubles() t WHERE t.view = %s ORDER BY t.trouble", (view,)
    )
    return [row[0] for row in await cursor.fetchall()]


async def set_a_tenant(connection: AsyncConnection[Any]) -> None:
    """As a refresh does; raises psycopg.Error where that is not allowed."""
    await connection.execute("SELECT set_config('app.current_tenant_id', '', true)")


async def changed_definitions(connection: AsyncConnection[Any]) -> list[tuple[str, str | None]]:
    """The views whose definition changed or is gone, and why that could not be taken over, if so."""
    cursor = await connection.execute("SELECT view, trouble FROM listener.changed_definitions()")
    return await cursor.fetchall()


async def repair_capture(connection: AsyncConnection[Any]) -> list[tuple[str, str, str]]:
    """Source, outcome (repaired, renamed, failed) and detail of each source whose triggers were not as noted."""
    cursor = await connection.execute("SELECT source, outcome, detail FROM listener.repair_capture()")
    return await cursor.fetchall()


async def hold_lease(connection: AsyncConnection[Any]) -> None:
    """Takes or extends the doorbell's lease, for doorbell.LEASE seconds."""
    await connection.execute("SELECT listener.hold_lease()")


async def end_lease(connection: AsyncConnection[Any]) -> None:
    """Ends the doorbell's lease."""
    await connection.execute("SELECT listener.end_lease()")


async def ring_for_all(connection: AsyncConnection[Any]) -> None:
    """Has every replica look at the log, where notifying is allowed."""
    await connection.execute("SELECT listener.ring_for_all()")


async def take_mark(connection: AsyncConnection[Any]) -> str:
    """A transaction id above those of all who saw the lease that has ended."""
    row = await (await connection.execute("SELECT listener.take_mark()::text")).fetchone()
    assert row is not None
    return str(row[0])


async def is_past(connection: AsyncConnection[Any], mark: str) -> bool:
    """Whether every transaction below the mark has ended."""
    row = await (await connection.execute("SELECT listener.is_past(%s::xid8)", (mark,))).fetchone()
    assert row is not None
    return bool(row[0])


async def lease_is_wrong(connection: AsyncConnection[Any]) -> bool:
    """Whether the doorbell's lease reaches further ahead than anybody may take it."""
    row = await (await connection.execute("SELECT listener.lease_is_wrong()")).fetchone()
    return bool(row and row[0])


async def must_poll(connection: AsyncConnection[Any]) -> bool:
    """Whether capture never notifies in this installation."""
    row = await (await connection.execute("SELECT listener.must_poll()")).fetchone()
    return bool(row and row[0])


class DatabaseGauges(NamedTuple):
    """What /metrics says of the database: log rows (an estimate), seconds, a share of 1."""

    change_log_rows: float
    oldest_transaction_age: float
    notification_queue_ratio: float


async def database_gauges(connection: AsyncConnection[Any]) -> DatabaseGauges:
    """Other sessions' transactions are seen by a role that may read all statistics; see `listener roles`."""
    async with connection.cursor(row_factory=class_row(DatabaseGauges)) as cursor:
        await cursor.execute(
            """
            SELECT pg_stat_get_live_tuples('listener.change_log'::regclass)::float8 AS change_log_rows,
                   pg_notification_queue_usage() AS notification_queue_ratio,
                   (SELECT coalesce(extract(epoch FROM clock_timestamp() - min(t.started)), 0)::float8
                    FROM (SELECT a.xact_start FROM pg_stat_activity a
                          WHERE (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL) AND a.pid <> pg_backend_pid()
                          UNION ALL SELECT p.prepared FROM pg_prepared_xacts p) AS t (started))
                       AS oldest_transaction_age
            """
        )
        row = await cursor.fetchone()
        assert row is not None
        return row


async def purge(connection: AsyncConnection[Any], letters_kept: float) -> int:
    """Deletes consumed rows, and closed letters older than `letters_kept` seconds; the number of log rows."""
    total = 0
    while True:
        cursor = await connection.execute(
            "SELECT listener.purge(make_interval(secs => %s), %s)", (letters_kept, PURGE_BATCH)
        )
        row = await cursor.fetchone()
        deleted = int(row[0]) if row else 0
        total += deleted
        if deleted < PURGE_BATCH:
            return total


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
