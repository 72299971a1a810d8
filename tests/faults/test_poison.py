"""A definition that fails for one tenant: that key is quarantined, all others go on, and the mend clears the letter."""

from __future__ import annotations

from typing import Any, LiteralString, NamedTuple

import pytest
from psycopg import AsyncConnection

from books import value
from conftest import Database, eventually
from on_call import explained, is_exact, open_letters, pauses_and_resumes
from shop import ANNA, BERT, SALES, application, create_view, define, order, rows

pytestmark = pytest.mark.anyio

BRISK = {"retry_base": "50ms", "retry_cap": "100ms", "retry_quarantined": "200ms", "max_attempts": 2}


class Poison(NamedTuple):
    """A view, what an application writes that it fails for, and the write that mends it."""

    query: LiteralString
    keys: list[str]
    write: LiteralString
    mend: LiteralString
    sqlstate: str
    says: str


POISONS = {
    "a division by zero": Poison(
        "SELECT tenant_id, id, 100 / quantity AS share FROM shop.orders",
        ["id"],
        "INSERT INTO shop.orders (tenant_id, product, quantity) VALUES (%s, 'tea', 0)",
        "UPDATE shop.orders SET quantity = 25 WHERE quantity = 0",
        "22012",
        "division by zero",
    ),
    "two rows of one key": Poison(
        "SELECT tenant_id, product, quantity AS share FROM shop.orders",
        ["product"],
        "INSERT INTO shop.orders (tenant_id, product) SELECT %s::uuid, 'twice' FROM generate_series(1, 2)",
        "UPDATE shop.orders SET product = 'once' WHERE id = (SELECT max(id) FROM shop.orders WHERE product = 'twice')",
        "LSN04",
        'returns two rows with one key: {"tenant_id"',
    ),
    "a text that is no number": Poison(
        "SELECT tenant_id, id, product::int AS share FROM shop.orders WHERE product <> 'tea'",
        ["id"],
        "INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'many')",
        "UPDATE shop.orders SET product = '7' WHERE product = 'many'",
        "22P02",
        "invalid input syntax for type integer",
    ),
    "a number that is too large": Poison(
        "SELECT tenant_id, id, quantity * 1000000 AS share FROM shop.orders",
        ["id"],
        "INSERT INTO shop.orders (tenant_id, product, quantity) VALUES (%s, 'tea', 1000000)",
        "UPDATE shop.orders SET quantity = 1 WHERE quantity = 1000000",
        "22003",
        "integer out of range",
    ),
}


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())
async def test_poison_for_one_tenant_is_quarantined_alone_and_mended_data_clears_it(
    shop: Database, superuser: AsyncConnection[Any], poison: Poison
) -> None:
    await create_view(shop, "shares", poison.query, poison.keys)
    await create_view(shop, "sales", SALES, ["product"])
    async with shop.service(**BRISK) as running:
        await eventually(lambda: is_exact(shop, "shares", "sales"))
        seen = len(running.outcomes)
        async with application(shop, ANNA) as anna, application(shop, BERT) as bert:
            await anna.execute(poison.write, (ANNA,))
            await eventually(lambda: open_letters(superuser))
            assert await open_letters(superuser) == [("shares", ANNA, poison.sqlstate)]
            # Other tenants of the view, other views of the tenant.
            await order(bert, BERT, "tea")
            await running.until_refreshed("shares", BERT, after=seen)
            await running.until_refreshed("sales", ANNA, after=seen)
            # Tried again and again, it is still one letter.
            failed = {"view": "shares", "outcome": "failed"}
            before = value(running, "listener_refreshes_total", **failed)
            await eventually(lambda: value(running, "listener_refreshes_total", **failed) >= before + 2)
            letters = "SELECT view_name, tenant, status, correlation_id <> '' FROM listener.dead_letter"
            assert await rows(superuser, letters) == [("shares", ANNA, "open", True)]
            assert len(await rows(superuser, "SELECT * FROM listener.worker_failed_jobs")) == 1
            said = "; ".join(await explained(shop, "shares", ANNA))
            assert said.startswith("stale; the key has been dirty for")
            assert poison.says in said
            assert "it is quarantined: see `listener dead-letters show" in said
            assert await explained(shop, "shares", BERT) == ["fresh"]
            await pauses_and_resumes(shop, "shares", ANNA)
            await anna.execute(poison.mend)
        await eventually(lambda: is_exact(shop, "shares", "sales"))
        assert await rows(superuser, letters) == [("shares", ANNA, "resolved", True)]


async def test_a_mended_definition_resolves_the_letter(shop: Database, superuser: AsyncConnection[Any]) -> None:
    shares: LiteralString = """
        CREATE OR REPLACE VIEW shop.shares WITH (security_invoker = true) AS
        SELECT tenant_id, id, (100 / {})::bigint AS share FROM shop.orders;
        GRANT SELECT ON shop.shares TO listener_service;
    """
    await define(superuser, shares.replace("{}", "quantity"))
    await create_view(shop, "shares", "SELECT * FROM shop.shares", ["id"])
    async with shop.service(sweep_interval="200ms", **BRISK) as running, application(shop, ANNA) as app:
        await order(app, ANNA, "tea", 0)
        await eventually(lambda: open_letters(superuser))
        seen = len(running.outcomes)
        await define(superuser, shares.replace("{}", "nullif(quantity, 0)"))
        await running.until_refreshed("shares", ANNA, after=seen)
        await eventually(lambda: is_exact(shop, "shares"))
        assert await open_letters(superuser) == []
        assert await rows(superuser, "SELECT tenant_id::text, share FROM shares") == [(ANNA, None)]
