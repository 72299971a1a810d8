"""A small application for the tests of the SQL: orders and payments of tenants, under FORCEd row-level security.

`shop_owner` owns the tables, `shop_app` writes them for the tenant that it names. The superuser arranges and asserts;
nothing is drained or refreshed by it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, LiteralString

from psycopg import AsyncConnection, sql

if TYPE_CHECKING:  # conftest imports this module
    from conftest import Database

ANNA = "11111111-1111-4111-8111-111111111111"
BERT = "22222222-2222-4222-8222-222222222222"
CLEO = "33333333-3333-4333-8333-333333333333"
TENANTS = (ANNA, BERT, CLEO)

SCHEMA: LiteralString = """
DO $$ BEGIN
    IF to_regrole('shop_owner') IS NULL THEN CREATE ROLE shop_owner NOLOGIN; END IF;
    IF to_regrole('shop_app') IS NULL THEN CREATE ROLE shop_app LOGIN; END IF;
END $$;
GRANT shop_owner TO listener_owner;
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET ROLE shop_owner;
GRANT USAGE ON SCHEMA shop TO shop_app, listener_service, listener_migrator;
CREATE TABLE shop.tenants (id uuid PRIMARY KEY);
CREATE TABLE shop.orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id uuid,
    product text,
    quantity integer NOT NULL DEFAULT 1);
CREATE TABLE shop.payments (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id uuid NOT NULL,
    product text,
    cents bigint NOT NULL);
CREATE INDEX ON shop.orders (tenant_id);
CREATE INDEX ON shop.payments (tenant_id);
ALTER TABLE shop.orders ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE shop.payments ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON shop.orders USING (tenant_id = current_setting('app.current_tenant_id')::uuid);
CREATE POLICY tenant ON shop.payments USING (tenant_id = current_setting('app.current_tenant_id')::uuid);
GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA shop TO shop_app;
GRANT SELECT ON ALL TABLES IN SCHEMA shop TO listener_service;
RESET ROLE;
INSERT INTO shop.tenants VALUES ('11111111-1111-4111-8111-111111111111'), ('22222222-2222-4222-8222-222222222222'),
    ('33333333-3333-4333-8333-333333333333');
"""

SALES = "SELECT tenant_id, product, count(*) AS orders, sum(quantity) AS quantity FROM shop.orders GROUP BY 1, 2"
BALANCE = """
    SELECT tenant_id, product, sum(cents)::bigint AS cents, sum(quantity)::bigint AS quantity
    FROM (SELECT tenant_id, product, 0::bigint AS cents, quantity FROM shop.orders
          UNION ALL SELECT tenant_id, product, cents, 0 FROM shop.payments) AS entries
    GROUP BY 1, 2
"""

# What the odder definitions read.
EXTRAS: LiteralString = """
CREATE TABLE shop.prices (product text PRIMARY KEY, cents bigint);
CREATE TABLE shop.secret (tenant_id uuid, product text);
CREATE TABLE shop.spots (tenant_id uuid, spot point);
CREATE TABLE shop.plain (tenant_id bigint, n int);
CREATE TABLE shop.days (tenant_id date, n int);
CREATE MATERIALIZED VIEW shop.stored AS SELECT NULL::uuid AS tenant_id, 'x'::text AS product;
CREATE FUNCTION shop.price_of(text) RETURNS bigint LANGUAGE sql STABLE
    AS 'SELECT cents FROM shop.prices WHERE product = $1';
CREATE VIEW shop.busy_orders WITH (security_invoker = true) AS SELECT * FROM shop.orders WHERE quantity > 0;
GRANT SELECT ON shop.prices, shop.spots, shop.plain, shop.days, shop.stored, shop.busy_orders TO listener_service;
GRANT ALL ON shop.prices TO shop_app;
"""

# Everything that a create_view could leave behind.
TRACES: LiteralString = """
    SELECT (SELECT count(*) FROM pg_class), (SELECT count(*) FROM pg_proc), (SELECT count(*) FROM pg_trigger),
           (SELECT count(*) FROM pg_policy), (SELECT count(*) FROM pg_type), (SELECT count(*) FROM pg_description),
           (SELECT count(*) FROM listener.managed_view), (SELECT count(*) FROM listener.source),
           (SELECT count(*) FROM listener.view_source), (SELECT count(*) FROM listener.change_log)
"""


async def open_shop(database: Database) -> None:
    """Makes the tables, the roles and no view."""
    async with database.connect() as superuser:
        await superuser.execute(SCHEMA)


async def create_view(database: Database, name: str, query: str, key_columns: list[str], **options: Any) -> None:
    """listener.create_view as the migrating role. Tenants come from shop.tenants unless `tenants_query` is given."""
    given = {"name": name, "query": query, "key_columns": key_columns, "tenants_query": "SELECT id FROM shop.tenants"}
    async with database.connect("listener_migrator") as migrator:
        arguments = sql.SQL(", ").join(
            sql.SQL("{} => {}").format(sql.Identifier(key), sql.Literal(value))
            for key, value in (given | options).items()
        )
        await migrator.execute(sql.SQL("SELECT listener.create_view({})").format(arguments))


async def define(superuser: AsyncConnection[Any], statements: LiteralString | sql.Composed) -> None:
    """Runs DDL as the owner of the shop's tables."""
    await superuser.execute("SET ROLE shop_owner")
    await superuser.execute(statements)
    await superuser.execute("RESET ROLE")


@asynccontextmanager
async def application(
    database: Database, tenant: str, *, autocommit: bool = True
) -> AsyncIterator[AsyncConnection[Any]]:
    """A session of the application, at work for one tenant."""
    async with database.connect("shop_app", autocommit=True) as connection:
        await connection.execute("SELECT set_config('app.current_tenant_id', %s, false)", (tenant,))
        await connection.set_autocommit(autocommit)
        yield connection


async def rows(connection: AsyncConnection[Any], query: LiteralString | sql.Composed, *given: Any) -> list[Any]:
    """All rows of a query."""
    return await (await connection.execute(query, given or None)).fetchall()


async def one(connection: AsyncConnection[Any], query: LiteralString | sql.Composed, *given: Any) -> Any:
    """The first value of the first row, None where there is no row."""
    row = await (await connection.execute(query, given or None)).fetchone()
    return None if row is None else row[0]


async def order(connection: AsyncConnection[Any], tenant: str | None, product: str | None, quantity: int = 1) -> None:
    """One more order."""
    await connection.execute(
        "INSERT INTO shop.orders (tenant_id, product, quantity) VALUES (%s, %s, %s)", (tenant, product, quantity)
    )


async def heard(listening: AsyncConnection[Any], superuser: AsyncConnection[Any]) -> list[dict[str, Any]]:
    """What was notified until now, but for probes: notifications arrive in the order of their commits."""
    await superuser.execute("SELECT pg_notify('listener_changes', 'until here')")
    payloads: list[dict[str, Any]] = []
    async with aclosing(listening.notifies(timeout=30)) as notifications:
        async for notification in notifications:
            if notification.payload == "until here":
                return payloads
            payload = json.loads(notification.payload)
            if "probe" not in payload:
                payloads.append(payload)
    raise TimeoutError


async def settle(service: AsyncConnection[Any]) -> int:
    """Drains and refreshes until nothing is dirty, as the service would; the number of refreshes."""
    refreshes = 0
    while True:
        outcome = await one(service, "SELECT outcome FROM listener.drain()")
        keys = await rows(service, "SELECT view_name, tenant FROM listener.pending_keys(false) WHERE outcome = 'dirty'")
        if outcome == "nothing" and not keys:
            return refreshes
        for view, tenant in keys:
            if tenant == "":
                await service.execute("SELECT listener.expand(%s)", (view,))
            else:
                await service.execute("SELECT listener.refresh(%s, %s::text)", (view, tenant))
                refreshes += 1


async def differences(superuser: AsyncConnection[Any], view: str) -> list[Any]:
    """The rows that only the definition, or only the target has; the superuser's definition shows every tenant."""
    found = await rows(
        superuser, "SELECT id, target_schema, target_name FROM listener.managed_view WHERE name = %s", view
    )
    view_id, schema, table = found[0]
    return await rows(
        superuser,
        sql.SQL(
            """
            (SELECT 'missing', m.* FROM (SELECT * FROM {definition} EXCEPT ALL SELECT * FROM {target}) m)
            UNION ALL
            (SELECT 'extra', e.* FROM (SELECT * FROM {target} EXCEPT ALL SELECT * FROM {definition}) e)
            """
        ).format(definition=sql.Identifier("listener", f"definition_{view_id}"), target=sql.Identifier(schema, table)),
    )
