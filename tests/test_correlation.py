"""The application's own correlation id, from its write to every place where an operator looks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from psycopg import AsyncConnection, sql

from command import listener
from conftest import Database
from shop import ANNA, BERT, application, create_view, one, open_shop, order, rows, settle

pytestmark = pytest.mark.anyio

SHARES = "SELECT tenant_id, id, 100 / quantity AS share FROM shop.orders"
PRICED = "SELECT o.tenant_id, o.id, 100 / p.cents AS share FROM shop.orders o JOIN shop.prices p USING (product)"


@pytest.fixture
async def shop(database: Database) -> Database:
    """A view that cannot be computed for a quantity of 0; two tenants that are fresh."""
    await open_shop(database)
    async with database.connect() as superuser:
        await superuser.execute(
            "SET ROLE shop_owner; CREATE TABLE shop.prices (product text, cents bigint);"
            " GRANT SELECT ON shop.prices TO listener_service; GRANT ALL ON shop.prices TO shop_app; RESET ROLE"
        )
        await create_view(database, "shares", SHARES, ["id"])
        for tenant in (ANNA, BERT):
            await order(superuser, tenant, "tea")
    async with database.connect("listener_service") as service:
        await settle(service)
    return database


async def write(shop: Database, tenant: str, correlation_id: str | None, statement: str) -> None:
    """As the page on integrations says: the id belongs to one transaction."""
    async with application(shop, tenant, autocommit=False) as app:
        if correlation_id is not None:
            await app.execute(sql.SQL("SET LOCAL app.correlation_id = {}").format(sql.Literal(correlation_id)))
        await app.execute(sql.SQL(statement))
        await app.commit()


def sweep(shop: Database) -> None:
    assert listener("sweep", url=shop.url(), LISTENER_MAX_ATTEMPTS="1").returncode == 1


def letters(shop: Database) -> dict[str, dict[str, Any]]:
    listed = listener("dead-letters", "list", "--json", url=shop.url())
    return {letter["tenant_id"]: letter for letter in json.loads(listed.stdout)}


async def test_the_letter_of_a_failed_refresh_shows_what_the_write_was_called(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await write(shop, ANNA, "request 4711", "UPDATE shop.orders SET quantity = 0")
    await write(shop, BERT, None, "UPDATE shop.orders SET quantity = 0")
    sweep(shop)
    found = letters(shop)
    assert {tenant: letter["app_correlation_id"] for tenant, letter in found.items()} == {
        ANNA: "request 4711",
        BERT: None,
    }
    shown = listener("dead-letters", "show", found[ANNA]["id"], url=shop.url()).stdout
    assert "\napp correlation id: request 4711\n" in shown
    assert "\napp correlation id: -\n" in listener("dead-letters", "show", found[BERT]["id"], url=shop.url()).stdout
    jobs = "SELECT tenant_id, app_correlation_id FROM listener.worker_failed_jobs ORDER BY tenant_id"
    assert await rows(superuser, jobs) == [(ANNA, "request 4711"), (BERT, None)]


async def test_explain_shows_it_before_the_drain_after_it_and_no_longer_than_it_is_not_shown(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    line = "the application's correlation id of its newest change is request 4711"
    explain = ("explain", "shares", "--tenant", ANNA)
    await write(shop, ANNA, "request 4711", "UPDATE shop.orders SET quantity = 2")
    for _ in ("logged", "drained"):
        assert f"  - {line}\n" in listener(*explain, url=shop.url()).stdout
        facts = json.loads(listener(*explain, "--json", url=shop.url()).stdout)
        assert (facts["app_correlation_id"], line in facts["reasons"]) == ("request 4711", True)
        await service.execute("SELECT listener.drain()")
    await settle(service)
    facts = json.loads(listener(*explain, "--json", url=shop.url()).stdout)
    assert (facts["app_correlation_id"], facts["reasons"]) == (None, [])


async def test_a_later_write_without_one_does_not_take_it_away(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await write(shop, ANNA, "shown already", "UPDATE shop.orders SET quantity = 3")
    await settle(service)
    await write(shop, ANNA, "request 4711", "UPDATE shop.orders SET quantity = 0")
    sweep(shop)
    await write(shop, ANNA, None, "UPDATE shop.orders SET product = 'pot'")
    sweep(shop)
    assert letters(shop)[ANNA]["app_correlation_id"] == "request 4711"
    # What was shown before is not the reason of a failure after it.
    await write(shop, ANNA, None, "UPDATE shop.orders SET quantity = 4")
    await settle(service)
    await write(shop, ANNA, None, "UPDATE shop.orders SET quantity = 0")
    sweep(shop)
    assert letters(shop)[ANNA]["app_correlation_id"] is None


async def test_a_write_that_concerns_all_tenants_hands_it_on_to_each(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute("INSERT INTO shop.prices VALUES ('tea', 1)")
    await create_view(shop, "priced", PRICED, ["id"])
    await settle(service)
    await write(shop, ANNA, "price list 12", "UPDATE shop.prices SET cents = 0")
    sweep(shop)
    assert {letter["app_correlation_id"] for letter in letters(shop).values()} == {"price list 12"}
    assert await one(superuser, "SELECT count(*) FROM listener.dead_letter WHERE status = 'open'") == 2
