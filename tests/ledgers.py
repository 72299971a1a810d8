"""A small schema for the tests of what a view depends on: `o` has tenants, `s` is shared by all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

from psycopg import AsyncConnection, sql

from shop import create_view, define, open_shop, rows, settle

if TYPE_CHECKING:  # conftest imports shop
    from conftest import Database

SCHEMA: LiteralString = """
CREATE TABLE shop.o (tenant_id text, id int, v int);
INSERT INTO shop.o VALUES ('t1', 1, 10), ('t2', 2, 20);
CREATE TABLE shop.s (k int, w int);
INSERT INTO shop.s VALUES (1, 1), (2, 2);
GRANT ALL ON shop.o, shop.s TO shop_app;
"""


async def open_ledgers(database: Database) -> None:
    """Makes the roles and the two tables."""
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, SCHEMA)


async def arranged(superuser: AsyncConnection[Any], statements: LiteralString) -> None:
    """Runs DDL as the owner of the tables, and lets the service read what there is."""
    await define(superuser, statements)
    await superuser.execute("GRANT SELECT ON ALL TABLES IN SCHEMA shop TO listener_service")


async def managed(database: Database, query: str, **options: Any) -> None:
    """The view `shown`; its tenants are those that its rows have, unless `options` say otherwise."""
    await create_view(
        database, **({"name": "shown", "query": query, "key_columns": [], "tenants_query": None} | options)
    )


async def swept(service: AsyncConnection[Any]) -> list[tuple[str, str | None]]:
    """What a sweep finds, in both of its looks; then all that is dirty is refreshed."""
    found = await rows(service, "SELECT source, outcome FROM listener.repair_capture()")
    found += await rows(service, "SELECT view, trouble FROM listener.changed_definitions()")
    await settle(service)
    return found


async def shown(superuser: AsyncConnection[Any]) -> list[Any]:
    """The rows of the target, in the order of their columns."""
    return await rows(superuser, sql.SQL("SELECT * FROM {} AS t ORDER BY t").format(sql.Identifier("shown")))
