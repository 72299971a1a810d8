"""What the server says of its backends: which of them answer nobody, and which is in the way."""

from __future__ import annotations

from typing import Any

from psycopg import AsyncConnection


async def unanswering(connection: AsyncConnection[Any], pids: list[int], timeout: float) -> dict[int, str]:
    """Those of the backends that have nothing to tell their clients, and why; `timeout`: seconds.

    One whose state this role may not see is not among them.
    """
    cursor = await connection.execute(
        """
        SELECT u.pid, u.why
        FROM (SELECT p.pid,
                     CASE WHEN a.pid IS NULL THEN 'its backend is gone'
                          WHEN a.state LIKE 'idle%%' AND clock_timestamp() - a.state_change
                               >= make_interval(secs => %(timeout)s) THEN 'its backend has nothing to do' END AS why
              FROM unnest(%(pids)s::int[]) AS p (pid) LEFT JOIN pg_stat_activity a ON a.pid = p.pid) AS u
        WHERE u.why IS NOT NULL
        """,
        {"pids": pids, "timeout": timeout},
    )
    return dict(await cursor.fetchall())


async def end(connection: AsyncConnection[Any], pids: list[int]) -> None:
    """Ends those of the backends that this role may end."""
    await connection.execute(
        "SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a"
        " WHERE a.pid = ANY (%s) AND pg_has_role(a.usesysid, 'USAGE')",
        (pids,),
    )


async def drain_holder(connection: AsyncConnection[Any]) -> str | None:
    """Who holds the drain's lock and since when, as a reason for not being ready; the time where it may be seen."""
    row = await (
        await connection.execute("SELECT pid, held FROM listener.lock_holder(listener.lock_key(0, ''))")
    ).fetchone()
    if row is None:
        return None
    pid, held = row
    return (
        f"backend {pid} holds the drain's lock"
        if held is None
        else f"backend {pid} has held the drain's lock for {held:.0f} s"
    )


async def in_the_way_of(connection: AsyncConnection[Any], pid: int) -> list[tuple[int, str | None, str | None]]:
    """The backends that hold locks which this one waits for: pid, state and query as far as the role may see them."""
    cursor = await connection.execute(
        """
        SELECT b.pid, a.state, a.query FROM unnest(pg_blocking_pids(%s)) AS b (pid)
        LEFT JOIN pg_stat_activity a ON a.pid = b.pid ORDER BY b.pid
        """,
        (pid,),
    )
    return await cursor.fetchall()
