"""What a write leaves in the log, and that the target follows it: for the tests of the ways to write."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, LiteralString

from psycopg import AsyncConnection, sql

from shop import ANNA, BERT, CLEO, differences, one, rows, settle

if TYPE_CHECKING:  # conftest imports shop
    from conftest import Database

NAMES = {ANNA: "anna", BERT: "bert", CLEO: "cleo", "": "all"}
TENANTS = {name: sql.Literal(tenant) for tenant, name in NAMES.items() if tenant}

# A session of the application that says so works for every tenant, as a back office or an import does.
OFFICE: LiteralString = """
    CREATE POLICY office ON shop.orders TO shop_app USING (current_setting('app.office', true) = 'on');
    CREATE POLICY office ON shop.payments TO shop_app USING (current_setting('app.office', true) = 'on');
"""


def statement(text: LiteralString) -> sql.Composed:
    """The text with {anna}, {bert} and {cleo} written out."""
    return sql.SQL(text).format(**TENANTS)


async def logged(superuser: AsyncConnection[Any]) -> set[str]:
    """Whose changes of which table stand in the log since `emptied`: "orders of anna", "orders of all"."""
    found = await rows(
        superuser,
        "SELECT s.table_name, l.tenant FROM listener.change_log l JOIN listener.source s ON s.id = l.source_id",
    )
    return {f"{table} of {NAMES.get(tenant, tenant)}" for table, tenant in found}


async def emptied(superuser: AsyncConnection[Any], service: AsyncConnection[Any]) -> None:
    """Until nothing is dirty; the log is empty then."""
    await settle(service)
    await superuser.execute("DELETE FROM listener.change_log")


# Servers from this version on follow a renamed column; before the next sweep, older ones take it for anybody's.
FOLLOWS_RENAMES = 180000


def after_rename(connection: AsyncConnection[Any], table: str, tenant: str) -> set[str]:
    """What is logged for a tenant of a table whose column was renamed, before the next sweep."""
    return {f"{table} of {tenant if connection.info.server_version >= FOLLOWS_RENAMES else 'all'}"}


@asynccontextmanager
async def reaches(
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    view: str,
    expected: Iterable[str],
    *,
    seen: bool = True,
) -> AsyncIterator[None]:
    """What is written inside makes the view stale (unless `seen` says no), is logged as expected, and gets shown."""
    await emptied(superuser, service)
    assert await differences(superuser, view) == []
    yield
    assert bool(await differences(superuser, view)) is seen
    assert await logged(superuser) == set(expected)
    await settle(service)
    assert await differences(superuser, view) == []


async def at_home(database: Database) -> None:
    """The database of a test is a copy of another: after this it knows, and nothing is left to repair."""
    async with database.connect("listener_service") as service:
        await repaired(service)


async def repaired(service: AsyncConnection[Any]) -> list[tuple[str, str]]:
    """What repair_capture() says now: each source and its outcome."""
    return await rows(service, "SELECT source, outcome FROM listener.repair_capture()")


async def triggers_on(superuser: AsyncConnection[Any], table: str) -> int:
    """How many triggers of ours a table has."""
    found = await one(
        superuser,
        "SELECT count(*) FROM pg_trigger WHERE tgrelid = to_regclass(%s) AND tgname LIKE 'listener%%'",
        table,
    )
    assert isinstance(found, int)
    return found
