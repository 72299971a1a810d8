"""Logical replication: its apply fires no statement trigger, so what a subscription fills has triggers for each row."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection, sql

from conftest import Database, Server, eventually, install, server_of, start_embedded
from listener.embedded import EmbeddedServer
from shop import ANNA, BERT, CLEO, SALES, create_view, define, differences, one, open_shop, order, rows, settle

pytestmark = pytest.mark.anyio

PLAIN: LiteralString = """
CREATE SCHEMA shop;
CREATE TABLE shop.orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id uuid, product text,
                          quantity integer NOT NULL DEFAULT 1);
CREATE TABLE shop.visits (id int PRIMARY KEY, tenant_id uuid, n int);
CREATE PUBLICATION shop FOR TABLE shop.orders, shop.visits;
"""
VISITS: LiteralString = """
CREATE TABLE shop.visits (id int PRIMARY KEY, tenant_id uuid, n int) PARTITION BY RANGE (id);
CREATE TABLE shop.visits_few PARTITION OF shop.visits FOR VALUES FROM (0) TO (10);
CREATE TABLE shop.visits_many (n int, id int NOT NULL, tenant_id uuid);
ALTER TABLE shop.visits ATTACH PARTITION shop.visits_many FOR VALUES FROM (10) TO (20);
GRANT SELECT ON shop.visits TO listener_service;
"""
VISITED = "SELECT tenant_id, sum(n)::bigint AS n FROM shop.visits GROUP BY 1"


@pytest.fixture(scope="module")
def publishing() -> Iterator[EmbeddedServer]:
    with start_embedded(wal_level="logical") as embedded:
        yield embedded


@pytest.fixture(scope="module")
def subscribing() -> Iterator[tuple[Server, str]]:
    with start_embedded(wal_level="logical") as embedded:
        server = server_of(embedded)
        name = server.clone("template0")
        install(server, name)
        yield server, name


@pytest.fixture
async def publisher(publishing: EmbeddedServer) -> AsyncIterator[AsyncConnection[Any]]:
    server = server_of(publishing)
    name = server.clone("template0")
    async with Database(server, name).connect() as connection:
        await connection.execute(PLAIN)
        yield connection
    server.drop(name)


@pytest.fixture
async def shop(subscribing: tuple[Server, str]) -> Database:
    """The subscriber: the tables as they are elsewhere, one of them partitioned, and two views."""
    server, template = subscribing
    database = Database(server, server.clone(template))
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, VISITS)
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "visited", VISITED, [])
    async with database.connect("listener_service") as service:
        await settle(service)
        await service.execute("SELECT listener.repair_capture()")
    return database


@asynccontextmanager
async def subscription(
    publishing: EmbeddedServer, publisher: AsyncConnection[Any], superuser: AsyncConnection[Any]
) -> AsyncIterator[None]:
    """A subscription whose tables are copied; dropped at the end, or neither server would stop in peace."""
    there = f"host={publishing.socket_directory} port=5432 user=postgres dbname={publisher.info.dbname}"
    # Slots are the cluster's. As the tables' owner, PostgreSQL 16 would refuse what row-level security is forced on.
    options = f"slot_name = {superuser.info.dbname}"
    if superuser.info.server_version >= 160000:
        options += ", run_as_owner = true"
    create = sql.SQL("CREATE SUBSCRIPTION shop CONNECTION {} PUBLICATION shop WITH ({})")
    await superuser.execute(create.format(there, sql.SQL(options)))
    try:
        await eventually(lambda: are_ready(superuser))
        yield
    finally:
        # The connection of a test that failed may be gone.
        async with await AsyncConnection.connect(superuser.info.dsn, autocommit=True) as another:
            await another.execute("DROP SUBSCRIPTION shop")


async def are_ready(superuser: AsyncConnection[Any]) -> bool:
    return await rows(superuser, "SELECT DISTINCT srsubstate::text FROM pg_subscription_rel") == [("r",)]


async def are_applied(publisher: AsyncConnection[Any], superuser: AsyncConnection[Any], table: str) -> bool:
    """Whether the subscriber's rows are the publisher's."""
    query = sql.SQL("SELECT to_jsonb(r)::text FROM shop.{} r ORDER BY 1").format(sql.Identifier(table))
    return await rows(publisher, query) == await rows(superuser, query)


async def triggers(superuser: AsyncConnection[Any]) -> list[Any]:
    return await rows(
        superuser,
        """SELECT tgrelid::regclass::text, tgenabled::text FROM pg_trigger
           WHERE tgname LIKE 'listener%row' ORDER BY 1""",
    )


async def logged(superuser: AsyncConnection[Any]) -> list[str]:
    found = await rows(superuser, "DELETE FROM listener.change_log WHERE source_id IS NOT NULL RETURNING tenant")
    return sorted(tenant for (tenant,) in found)


async def test_what_a_subscription_applies_is_captured_for_each_row(
    publishing: EmbeddedServer,
    publisher: AsyncConnection[Any],
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
) -> None:
    assert await triggers(superuser) == []
    async with subscription(publishing, publisher, superuser):
        assert await rows(service, "SELECT source, outcome FROM listener.repair_capture() ORDER BY 1") == [
            ("shop.orders", "repaired"),
            ("shop.visits", "repaired"),
        ]
        assert await triggers(superuser) == [
            ("shop.orders", "R"),
            ("shop.visits_few", "R"),
            ("shop.visits_many", "R"),
        ]
        assert await rows(service, "SELECT * FROM listener.repair_capture()") == []
        await logged(superuser)
        async with publisher.transaction():
            await publisher.execute(
                "INSERT INTO shop.orders (tenant_id, product) SELECT %s, 'many' FROM generate_series(1, 50)", (ANNA,)
            )
            await publisher.execute("UPDATE shop.orders SET quantity = 2")
        await eventually(lambda: are_applied(publisher, superuser, "orders"))
        assert await logged(superuser) == [ANNA]
        await publisher.execute("UPDATE shop.orders SET tenant_id = %s WHERE id = 1", (BERT,))
        await eventually(lambda: are_applied(publisher, superuser, "orders"))
        assert await logged(superuser) == [ANNA, BERT]
        # Outside of apply only the statement triggers fire.
        await superuser.execute(
            "INSERT INTO shop.orders (id, tenant_id) OVERRIDING SYSTEM VALUE VALUES (1000, %s), (1001, %s)",
            (CLEO, CLEO),
        )
        assert await logged(superuser) == [CLEO]
        # A partition whose columns stand in another order.
        await publisher.execute("INSERT INTO shop.visits VALUES (1, %s, 1), (11, %s, 2)", (BERT, CLEO))
        await eventually(lambda: are_applied(publisher, superuser, "visits"))
        assert await logged(superuser) == [BERT, CLEO]
        await publisher.execute("UPDATE shop.visits SET id = 12 WHERE id = 1")  # moves to the other partition
        await eventually(lambda: are_applied(publisher, superuser, "visits"))
        assert set(await logged(superuser)) == {BERT}


CHANGES: list[tuple[str, str]] = [
    ("orders", "INSERT INTO shop.orders (tenant_id, product) VALUES ('{cleo}', 'later')"),
    ("orders", "UPDATE shop.orders SET quantity = 9 WHERE tenant_id = '{anna}'"),
    ("orders", "UPDATE shop.orders SET tenant_id = '{bert}' WHERE tenant_id = '{anna}'"),
    ("orders", "DELETE FROM shop.orders WHERE tenant_id = '{cleo}'"),
    ("visits", "INSERT INTO shop.visits VALUES (2, '{anna}', 1), (13, '{bert}', 1)"),
    ("visits", "DELETE FROM shop.visits WHERE id > 10"),
    ("visits", "TRUNCATE shop.visits"),
    ("orders", "TRUNCATE shop.orders"),
]


async def test_the_running_service_shows_what_a_subscription_brings(
    publishing: EmbeddedServer, publisher: AsyncConnection[Any], shop: Database, superuser: AsyncConnection[Any]
) -> None:
    async def is_shown(table: str) -> bool:
        if not await are_applied(publisher, superuser, table):
            return False
        return await differences(superuser, "sales") + await differences(superuser, "visited") == []

    for tenant in (ANNA, BERT):
        await order(publisher, tenant, "copied")
    await publisher.execute("INSERT INTO shop.visits VALUES (10, %s, 3)", (CLEO,))
    async with subscription(publishing, publisher, superuser), shop.service(sweep_interval=3600.0):
        # The service looks after capture when it starts.
        await eventually(partial(is_shown, "orders"))
        assert await one(superuser, "SELECT sum(orders)::int FROM public.sales WHERE product = 'copied'") == 2
        assert await one(superuser, "SELECT n FROM public.visited") == 3
        for table, statement in CHANGES:
            await publisher.execute(statement.format(anna=ANNA, bert=BERT, cleo=CLEO).encode())
            await eventually(partial(is_shown, table))
        assert await one(superuser, "SELECT count(*) FROM public.sales") == 0


async def test_a_sweep_notices_a_subscription_that_was_made_while_the_service_ran(
    publishing: EmbeddedServer, publisher: AsyncConnection[Any], shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await order(publisher, ANNA, "copied")

    async def is_copied() -> bool:
        return bool(await one(superuser, "SELECT count(*) FROM public.sales WHERE product = 'copied'"))

    async with shop.service(sweep_interval=0.2), subscription(publishing, publisher, superuser):
        await eventually(is_copied)
        await eventually(lambda: triggers(superuser))


async def test_row_triggers_go_with_the_view(
    publishing: EmbeddedServer,
    publisher: AsyncConnection[Any],
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
) -> None:
    async with subscription(publishing, publisher, superuser):
        await service.execute("SELECT listener.repair_capture()")
        await superuser.execute("SELECT listener.drop_view('sales'); SELECT listener.drop_view('visited')")
        assert await triggers(superuser) == []
        await logged(superuser)
        await order(publisher, ANNA, "unheeded")
        await eventually(lambda: are_applied(publisher, superuser, "orders"))
        assert await logged(superuser) == []
