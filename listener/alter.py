"""A definition changes: begin, fill, compare, swap, or take it back. No printing here.

The steps are those of sql/23_alter.sql, each a transaction of its own. Until the swap the view is as it was; what an
interrupted run left is taken back by the next.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
from psycopg import sql
from psycopg.rows import DictRow, dict_row

from listener import fill as filling
from listener import queries, view_queries
from listener.dead_letters import RetryPolicy
from listener.errors import SetupError, from_database
from listener.fill import Progress
from listener.swap import PATIENCE, Swapped, Tell, swapped

if TYPE_CHECKING:
    from psycopg import AsyncConnection

Connect = Callable[[], AbstractAsyncContextManager["AsyncConnection[Any]"]]
CASTS = {"key_columns": "name[]", "depends_on": "regclass[]", "max_age": "interval"}


@dataclass(frozen=True, slots=True)
class TenantChange:
    """What the new definition changes for one tenant: rows."""

    tenant_id: str
    added: int
    removed: int
    changed: int

    @property
    def is_none(self) -> bool:
        """Whether its rows are the same."""
        return not (self.added or self.removed or self.changed)


@dataclass(frozen=True, slots=True)
class Beside:
    """The view that is to take the place: its id, and its name until then, that of any alteration of the same view."""

    name: str
    view_id: int


@asynccontextmanager
async def begun(connection: AsyncConnection[Any], view: str, arguments: dict[str, Any]) -> AsyncIterator[Beside]:
    """The new view beside the old one, as long as the block runs; taken back where that raises.

    `arguments` are those of listener.begin_alter(). Raises psycopg.Error, LSN03: nothing was done then; and SetupError
    where somebody else began to alter it meanwhile, which takes this one back: the last one goes on.
    """
    given = sql.SQL("").join(
        sql.SQL(", {} => {}{}").format(
            sql.SQL(name), sql.Literal(value), sql.SQL(f"::{CASTS[name]}" if name in CASTS else "")
        )
        for name, value in arguments.items()
    )
    name = await queries.first(
        connection, sql.SQL("SELECT listener.begin_alter({}{})").format(sql.Literal(view), given)
    )
    view_id = await queries.first(connection, "SELECT v.id FROM listener.find_view(%s) v", name)
    beside = Beside(name, view_id)
    try:
        yield beside
    except BaseException as error:
        # Not cut short where the command was: what is beside would cost its refreshes until the next alteration.
        with anyio.CancelScope(shield=True), suppress(psycopg.Error):
            if await _is_there(connection, beside):
                await abort(connection, view)
            elif isinstance(error, (psycopg.Error, SetupError)):
                raise _somebody_else(view) from error
        raise


async def _is_there(connection: AsyncConnection[Any], beside: Beside) -> bool:
    return bool(
        await queries.first(
            connection,
            "SELECT EXISTS (SELECT FROM listener.managed_view v WHERE v.id = %s AND v.replaces IS NOT NULL)",
            beside.view_id,
        )
    )


def _somebody_else(view: str) -> SetupError:
    return SetupError(
        f"somebody else altered {view} meanwhile, or took back what was begun here.",
        hint="Look at it, and run it again.",
    )


async def abort(connection: AsyncConnection[Any], view: str) -> None:
    """Takes the alteration back."""
    await connection.execute("SELECT listener.abort_alter(%s)", (view,))


async def fill(connect: Connect, beside: Beside, policy: RetryPolicy) -> AsyncGenerator[Progress]:
    """Fills the new target, beside the service where that runs; yields progress, and is to be closed.

    `connect` gives an autocommit connection. Raises psycopg.Error of the first key that fails.
    """
    failed: list[psycopg.Error] = []
    steps = filling.fill(connect, beside.name, policy=policy, on_failure=lambda _key, error: failed.append(error))
    async with aclosing(steps):
        async for step in steps:
            if failed:
                raise failed[0]
            yield step


async def column_changes(connection: AsyncConnection[Any], view: str) -> list[DictRow]:
    """The columns that come, go, or change their type: name, change, before, after."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.column_changes(%s)", (view,))
        return await cursor.fetchall()


async def compare(
    connection: AsyncConnection[Any], view: str, beside: Beside
) -> AsyncIterator[tuple[int, int, TenantChange | None]]:
    """What changes, tenant by tenant; keys done, and all, and the last one's change."""
    tenants = sorted(
        {*await view_queries.tenants(connection, view), *await view_queries.tenants(connection, beside.name)}
    )
    yield 0, len(tenants), None
    for done, tenant in enumerate(tenants, start=1):
        cursor = await connection.execute(
            "SELECT added, removed, changed FROM listener.compare_alter(%s, %s)", (view, tenant)
        )
        row = await cursor.fetchone()
        assert row is not None
        yield done, len(tenants), TenantChange(tenant, *row)


async def finish(
    connection: AsyncConnection[Any], view: str, beside: Beside, tell: Tell, patience: float = PATIENCE
) -> Swapped:
    """Puts the new target in the place of the old one; what is left to be done then is told. Raises as swapped()."""

    async def once() -> float:
        # What somebody else began meanwhile is not what was compared and agreed to.
        if not await _is_there(connection, beside):
            raise _somebody_else(view)
        locked = await queries.first(connection, "SELECT extract(epoch FROM listener.finish_alter(%s))::float8", view)
        return float(locked)

    # Else its readers would be planned for an empty table until autovacuum comes by.
    await connection.execute("SELECT listener.analyze_replacement(%s)", (beside.name,))
    done = await swapped(connection, beside.name, once, tell, patience)
    try:
        await connection.execute("SELECT listener.end_alter()")
    except psycopg.Error as error:
        # It is in place. The next view that is altered or dropped takes them away.
        tell(f"triggers that no view needs any more are left: {from_database(error)}")
    return done
