"""What is asked of the server, and of the schema as a whole: one function per statement."""

from __future__ import annotations

from typing import Any, NamedTuple

from psycopg import AsyncConnection
from psycopg.rows import class_row


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
    """A role that computes views, and whether row-level security fails to bind it; one that it fails to bind first.

    None where the function that refreshes is not there.
    """
    row = await (
        await connection.execute(
            """
            SELECT r.rolname::text, r.rolsuper OR r.rolbypassrls
            FROM (SELECT i.compute_role FROM listener.installation i
                  UNION SELECT v.compute_role FROM listener.managed_view v) c
            JOIN pg_roles r ON r.rolname = c.compute_role
            WHERE to_regprocedure('listener.refresh(text, text)') IS NOT NULL
            ORDER BY 2 DESC, 1 LIMIT 1
            """
        )
    ).fetchone()
    return None if row is None else (row[0], row[1])
