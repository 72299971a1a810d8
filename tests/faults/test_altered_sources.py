"""A source altered by the application's own migrations: its writes go on, and what went comes back by itself."""

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection

from captured import FOLLOWS_RENAMES
from conftest import Database, eventually
from on_call import explained, is_exact, open_letters, pauses_and_resumes
from shop import ANNA, BERT, SALES, application, create_view, one, order
from web_client import is_ready

pytestmark = pytest.mark.anyio

PAID = "SELECT tenant_id, product, sum(cents)::bigint AS cents FROM shop.payments GROUP BY 1, 2"
BRISK = {"retry_base": "50ms", "retry_cap": "100ms", "retry_quarantined": "200ms", "max_attempts": 2}
GONE = "the definition of sales is gone, since something that it reads was dropped with CASCADE: it is made again once"

MADE_AGAIN: LiteralString = """
    CREATE TABLE shop.orders (id bigint GENERATED ALWAYS AS IDENTITY, tenant_id uuid, product text, quantity integer);
    ALTER TABLE shop.orders OWNER TO shop_owner;
    ALTER TABLE shop.orders ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY tenant ON shop.orders USING (tenant_id = current_setting('app.current_tenant_id')::uuid);
    GRANT SELECT, INSERT, UPDATE, DELETE ON shop.orders TO shop_app;
    GRANT SELECT ON shop.orders TO listener_service;
    INSERT INTO shop.orders (tenant_id, product) SELECT id, 'tea' FROM shop.tenants;
"""


@pytest.fixture
async def shop(shop: Database) -> Database:
    """Two views, and a tenant with something in each."""
    await create_view(shop, "sales", SALES, ["product"])
    await create_view(shop, "paid", PAID, ["product"])
    async with application(shop, ANNA) as anna:
        await order(anna, ANNA, "tea")
    return shop


async def pay(connection: AsyncConnection[Any], tenant: str) -> None:
    await connection.execute("INSERT INTO shop.payments (tenant_id, product, cents) VALUES (%s, 'tea', 5)", (tenant,))


@pytest.mark.parametrize(
    ("rename", "insert"),
    [
        (
            "ALTER TABLE shop.orders RENAME COLUMN quantity TO pieces",
            "INSERT INTO shop.orders (tenant_id, product, pieces) VALUES (%s, 'tea', 3)",
        ),
        (
            "ALTER TABLE shop.orders RENAME COLUMN tenant_id TO customer",
            "INSERT INTO shop.orders (customer, product, quantity) VALUES (%s, 'tea', 3)",
        ),
    ],
    ids=["a value", "the tenant"],
)
async def test_a_renamed_column_disturbs_nobody(
    shop: Database, superuser: AsyncConnection[Any], rename: LiteralString, insert: LiteralString
) -> None:
    async with shop.service(sweep_interval="200ms", **BRISK) as running, application(shop, ANNA) as anna:
        await eventually(lambda: is_exact(shop, "sales", "paid"))
        await superuser.execute(rename)
        await anna.execute(insert, (ANNA,))

        async def is_shown() -> bool:
            return bool(await one(superuser, "SELECT quantity FROM public.sales WHERE tenant_id = %s", ANNA) == 4)

        await eventually(is_shown)
        await pauses_and_resumes(shop, "sales", ANNA)
        await eventually(lambda: is_exact(shop, "sales", "paid"))
        assert await is_ready(running)
        assert await open_letters(superuser) == []
        if superuser.info.server_version >= FOLLOWS_RENAMES:
            assert await explained(shop, "sales", ANNA) == ["fresh"]


@pytest.mark.parametrize(
    ("harm", "insert", "why", "mend"),
    [
        (
            "ALTER TABLE shop.orders DROP COLUMN quantity CASCADE",
            "INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'tea')",
            'column "quantity" does not exist',
            "ALTER TABLE shop.orders ADD COLUMN quantity integer DEFAULT 7",
        ),
        (
            "DROP TABLE shop.tenants CASCADE",
            "INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'tea')",
            'relation "shop.tenants" does not exist',
            """CREATE TABLE shop.tenants (id uuid PRIMARY KEY); GRANT SELECT ON shop.tenants TO listener_service;
               ALTER TABLE shop.tenants OWNER TO shop_owner;
               INSERT INTO shop.tenants VALUES ('11111111-1111-4111-8111-111111111111'),
                                               ('22222222-2222-4222-8222-222222222222')""",
        ),
        (
            "DROP TABLE shop.orders CASCADE",
            None,
            'relation "shop.orders" does not exist',
            MADE_AGAIN,
        ),
    ],
    ids=["a column", "the table of tenants", "the table"],
)
async def test_a_definition_that_was_dropped_with_what_it_reads_is_made_again_and_becomes_exact(
    shop: Database,
    superuser: AsyncConnection[Any],
    harm: LiteralString,
    insert: LiteralString | None,
    why: str,
    mend: LiteralString,
) -> None:
    await superuser.execute("SET client_min_messages = error")
    async with shop.service(sweep_interval="200ms", **BRISK) as running, application(shop, ANNA) as anna:
        await eventually(lambda: is_exact(shop, "sales", "paid"))
        await superuser.execute(harm)
        if insert is not None:
            await anna.execute(insert, (ANNA,))
        seen = len(running.outcomes)
        await pay(anna, ANNA)
        await running.until_refreshed("paid", ANNA, after=seen)
        said = await explained(shop, "sales", ANNA)
        assert any(line.startswith(GONE) for line in said)

        async def is_told_why() -> bool:
            told = await running.service.reasons_not_ready()
            return any(line.startswith(GONE) for line in told) and any(line.endswith(why) for line in told)

        await eventually(is_told_why)
        await pauses_and_resumes(shop, "sales", ANNA)
        await superuser.execute(mend)
        await eventually(lambda: is_ready(running))
        await eventually(lambda: is_exact(shop, "sales", "paid"))
        assert await one(superuser, "SELECT count(*) > 0 FROM public.sales WHERE tenant_id = %s", ANNA)
        # Captured as before: the column of the tenant is there, or was followed.
        seen = len(running.outcomes)
        async with application(shop, BERT) as bert:
            await order(bert, BERT, "coffee")
        await running.until_refreshed("sales", BERT, after=seen)
        await eventually(lambda: is_exact(shop, "sales", "paid"))
        assert await open_letters(superuser) == []


async def test_a_source_that_is_gone_is_named_with_the_views_that_read_it(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute("SET client_min_messages = error")
    async with shop.service(sweep_interval="200ms", **BRISK) as running:
        await eventually(lambda: is_exact(shop, "sales", "paid"))
        await superuser.execute("DROP TABLE shop.orders CASCADE")
        line = "the source shop.orders is gone, which sales reads: make it again, or listener.drop_view"
        assert line in await running.service.reasons_not_ready()
        assert line in await explained(shop, "sales", ANNA)
        # As it says, the other way.
        await superuser.execute("SELECT listener.drop_view('sales')")
        await eventually(lambda: is_ready(running))
        await eventually(lambda: is_exact(shop, "paid"))
