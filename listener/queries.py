"""The runtime SQL that is not a function of the schema: one function per statement."""

from __future__ import annotations

from typing import Any, LiteralString, NamedTuple

from psycopg import AsyncConnection, sql
from psycopg.rows import DictRow, class_row, dict_row

# Log rows deleted in one transaction: seconds, not minutes.
PURGE_BATCH = 200_000


# The path of a session of this role that says nothing of its own; that of our own statements is pinned.
ROLES_PATH = sql.SQL("(SELECT s.reset_val FROM pg_settings s WHERE s.name = 'search_path')")


async def first(connection: AsyncConnection[Any], query: Any, *given: Any) -> Any:
    """The first value of the first row; None where there is no row."""
    row = await (await connection.execute(query, given or None)).fetchone()
    return None if row is None else row[0]


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


async def readiness(connection: AsyncConnection[Any]) -> list[str]:
    """What listener.readiness() has to say; empty when all is well."""
    cursor = await connection.execute("SELECT r FROM listener.readiness() r")
    return [row[0] for row in await cursor.fetchall()]


async def state_findings(connection: AsyncConnection[Any]) -> list[DictRow]:
    """What listener.state_findings() says, as the next five do: check, level, view, object, problem, mend."""
    return await _found(connection, "SELECT * FROM listener.state_findings()")


async def capture_findings(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Whether every source has its triggers."""
    return await _found(connection, "SELECT * FROM listener.capture_findings()")


async def progress_findings(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Whether views are refreshed."""
    return await _found(connection, "SELECT * FROM listener.progress_findings()")


async def result_findings(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Whether views leave rows out, or have more than one right result. Counts rows of each definition."""
    return await _found(connection, "SELECT * FROM listener.result_findings()")


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
