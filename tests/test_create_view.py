"""create_view: what is refused says why and leaves nothing; what is registered is kept fresh, whatever it reads."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import (
    ANNA,
    BERT,
    CLEO,
    SALES,
    TENANTS,
    TRACES,
    application,
    create_view,
    define,
    differences,
    one,
    order,
    rows,
    settle,
)

pytestmark = pytest.mark.anyio


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no tenant column": (
        {"query": "SELECT product FROM shop.orders"},
        "LSN03",
        "returns no column tenant_id",
        "It returns product",
    ),
    "no key column": (
        {"key_columns": ["nothing"]},
        "LSN03",
        "returns no column nothing",
        "It returns tenant_id, product",
    ),
    "a key without an order": (
        {"query": "SELECT tenant_id, spot FROM shop.spots", "key_columns": ["spot"]},
        "LSN03",
        r"must have an order: spot \(point\)",
        "cast these to text",
    ),
    "a tenant of a strange type": (
        {"query": "SELECT * FROM shop.days", "key_columns": []},
        "LSN03",
        "tenant_id is of type date",
        "Supported are uuid, text",
    ),
    "a function that may hide a table": (
        {"query": "SELECT tenant_id, product, shop.price_of(product) FROM shop.orders"},
        "LSN03",
        r"calls shop\.price_of\(text\)",
        "depends_on",
    ),
    "a table the service may not read": (
        {"query": "SELECT * FROM shop.secret"},
        "LSN03",
        "listener_service may not read",
        "GRANT SELECT ON shop.secret TO listener_service",
    ),
    "a target that exists": ({"name": "shop.orders"}, "LSN03", "already exists", "Choose another name"),
    "a max_wait below the quiet period": (
        {"quiet_period": "3 s", "max_wait": "1 s"},
        "LSN02",
        "max_wait .* must not be shorter",
        "",
    ),
    "a negative quiet period": ({"quiet_period": "-1 s"}, "LSN02", "must not be negative", ""),
    "an unknown edge": ({"edge": "middle"}, "LSN02", "leading or trailing", ""),
    "a max_age of nothing": ({"max_age": "0"}, "LSN02", "max_age must be longer", ""),
    "an unknown time zone": ({"timezone": "Mars/Olympus"}, "LSN02", "no time zone 'Mars/Olympus'", ""),
    "no time zone": ({"timezone": None}, "LSN02", "time", ""),
    "two statements": ({"query": "SELECT 1; DROP TABLE shop.plain"}, "LSN03", "syntax error", "one SELECT"),
    "a statement behind a bracket": (
        {"query": f"{SALES}); DROP TABLE shop.plain; SELECT (1"},
        "LSN03",
        "multi-query",
        "one SELECT",
    ),
    "a statement behind the end of CREATE VIEW": (
        {"query": f"{SALES}) WITH CHECK OPTION; DROP TABLE shop.plain; SELECT (1"},
        "LSN03",
        "syntax error",
        "one SELECT",
    ),
    "a statement behind the tenants query": (
        {"tenants_query": "SELECT id FROM shop.tenants) AS t (tenant); DROP TABLE shop.plain; SELECT (SELECT 1"},
        "LSN03",
        "refused",
        "one SELECT",
    ),
    "no SELECT": ({"query": "DELETE FROM shop.plain RETURNING *"}, "LSN03", "syntax error", "one SELECT"),
    "an unknown table": ({"query": "SELECT * FROM shop.nowhere"}, "LSN03", "nowhere", "one SELECT"),
    "a materialized view": ({"query": "SELECT * FROM shop.stored"}, "LSN03", "a materialized view", ""),
    "a materialized view behind depends_on": ({"depends_on": "{shop.stored}"}, "LSN03", "a materialized view", ""),
    "tenants that nobody can list": (
        {"tenants_query": None},
        "LSN03",
        "row-level security hides",
        "Give tenants_query",
    ),
    "a tenants query of no table": (
        {"tenants_query": "SELECT id FROM nowhere"},
        "LSN03",
        "tenants query is refused",
        "one column",
    ),
    "a tenants query of two columns": (
        {"tenants_query": "SELECT id, id FROM shop.tenants"},
        "LSN03",
        "one column",
        "one SELECT",
    ),
    "a tenants query that is none": ({"tenants_query": "DROP TABLE x"}, "LSN03", "refused", "one SELECT"),
    "tenants that the service may not list": (
        {"tenants_query": "SELECT tenant_id FROM shop.secret"},
        "LSN03",
        "may not read",
        "GRANT SELECT ON shop.secret",
    ),
    "a name of three parts": ({"name": "a.b.c"}, "LSN02", "name or schema.name", ""),
    "a name that is too long": ({"name": "n" * 64}, "LSN02", "at most 63 bytes", ""),
    "a name that is none": ({"name": "not a name"}, "LSN02", "no valid name", "double quotes"),
    "a schema that does not exist": ({"name": "nowhere.sales"}, "LSN03", "cannot create", "CREATE SCHEMA nowhere"),
    "a schema that the owner may not write": (
        {"name": "pg_catalog.x"},
        "LSN03",
        "cannot create",
        "GRANT USAGE, CREATE",
    ),
    "no name": ({"name": None}, "LSN02", "must be given", ""),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_refused_says_why_and_leaves_nothing(
    shop: Database, superuser: AsyncConnection[Any], case: str
) -> None:
    changed, state, message, hint = REFUSED[case]
    before = await rows(superuser, TRACES)
    with pytest.raises(psycopg.Error, match=message) as raised:
        await create_view(shop, **({"name": "sales", "query": SALES, "key_columns": ["product"]} | changed))
    assert raised.value.sqlstate == state
    assert hint in str(raised.value.diag.message_hint)
    assert await rows(superuser, TRACES) == before
    assert await one(superuser, "SELECT to_regclass('shop.plain')::text") == "shop.plain"


async def test_somebody_who_is_no_member_of_the_owner_is_refused(shop: Database) -> None:
    async with shop.connect("listener_service") as service:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await service.execute("SELECT listener.create_view('x', 'SELECT 1', '{}')")


async def test_whoever_created_a_view_keeps_the_role_it_had(shop: Database) -> None:
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute(
            "SELECT listener.create_view('plain', 'TABLE shop.plain', '{n}'), listener.pause(), listener.resume()"
        )
        assert await one(migrator, "SELECT current_user::text") == "listener_migrator"


@pytest.mark.parametrize("name", ['"Sales of \'26"', '"Zoës ""sales"""', 'shop."größe"', '"a.b"', '"select"'])
async def test_names_may_hold_quotes_dots_and_letters_of_any_language(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], name: str
) -> None:
    query = 'SELECT tenant_id AS "Téñ ant", product AS "pro""duct", count(*) AS "n\'t" FROM shop.orders GROUP BY 1, 2'
    await create_view(shop, name, query, ['pro"duct'], tenant_column="Téñ ant", target_rls=True)
    await superuser.execute("SELECT listener.add_source('shop.orders', 'tenant_id')")
    await order(superuser, ANNA, "a")
    await settle(service)
    found = await one(superuser, "SELECT name FROM listener.managed_view")
    assert await differences(superuser, found) == []
    assert await one(superuser, sql.SQL("SELECT count(*) FROM {}").format(sql.SQL(name))) == 1
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.drop_view(%s)", (found,))
    assert await one(superuser, "SELECT to_regclass(%s)", name) is None


async def test_two_schemas_may_hold_views_of_one_name(shop: Database, service: AsyncConnection[Any]) -> None:
    await create_view(shop, "sales", SALES, ["product"])
    async with shop.connect() as superuser:
        await superuser.execute(
            "CREATE SCHEMA other AUTHORIZATION listener_owner; GRANT USAGE ON SCHEMA other TO listener_service"
        )
    await create_view(shop, "other.sales", SALES, ["product"])
    assert await rows(service, "SELECT name FROM listener.managed_view ORDER BY id") == [("sales",), ("other.sales",)]
    for name in ("sales", "public.sales", "other.sales"):
        assert await one(service, "SELECT outcome FROM listener.refresh(%s, %s::text)", name, ANNA) == "refreshed"


async def test_what_a_function_hides_is_named_and_dirties_every_tenant(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    query = "SELECT tenant_id, product, sum(shop.price_of(product))::bigint AS cents FROM shop.orders GROUP BY 1, 2"
    await create_view(shop, "worth", query, ["product"], depends_on="{shop.prices}")
    await order(superuser, ANNA, "a")
    await order(superuser, BERT, "a")
    await settle(service)
    await superuser.execute("INSERT INTO shop.prices VALUES ('a', 7)")
    assert await settle(service) == len(TENANTS)
    assert await rows(superuser, "SELECT cents FROM worth") == [(7,), (7,)]


async def test_a_table_without_the_tenants_column_dirties_every_tenant_at_low_priority(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(
        shop, "priced", "SELECT tenant_id, id, cents FROM shop.orders LEFT JOIN shop.prices USING (product)", ["id"]
    )
    await order(superuser, ANNA, "a")
    await settle(service)
    await superuser.execute("INSERT INTO shop.prices VALUES ('a', 7)")
    assert await rows(service, "SELECT tenant, bulk FROM listener.drain()") == [("", True)]
    assert await settle(service) == len(TENANTS)
    assert await rows(superuser, "SELECT cents FROM priced") == [(7,)]


async def test_add_source_names_the_column_before_or_after(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(superuser, "ALTER TABLE shop.prices ADD shop_id uuid")
    query = """SELECT tenant_id, id, cents FROM shop.orders o
               LEFT JOIN shop.prices p ON p.product = o.product AND shop_id = tenant_id"""
    await create_view(shop, "priced", query, ["id"])
    await settle(service)
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.add_source('shop.prices', 'shop_id')")
    assert await settle(service) == len(TENANTS), "what was captured by another column may be wrong"
    await superuser.execute("INSERT INTO shop.prices VALUES ('a', 7, %s)", (CLEO,))
    assert await rows(service, "SELECT tenant, bulk FROM listener.drain()") == [(CLEO, False)]
    await create_view(shop, "priced_again", query, ["id"])
    assert await one(superuser, "SELECT tenant_column FROM listener.source WHERE table_name = 'prices'") == "shop_id"


async def test_target_rls_shows_a_reader_its_tenant_alone(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(shop, "sales", SALES, ["product"], target_rls=True)
    await settle(service)
    for tenant in TENANTS:
        await order(superuser, tenant, "a")
    assert await settle(service) == len(TENANTS)
    await superuser.execute("GRANT SELECT ON sales TO shop_app")
    async with application(shop, ANNA) as app:
        assert await rows(app, "SELECT tenant_id::text FROM sales") == [(ANNA,)]
    async with shop.connect("shop_app") as app:
        assert await rows(app, "SELECT tenant_id FROM sales") == []
    assert await differences(superuser, "sales") == []
    await superuser.execute("DELETE FROM shop.orders WHERE tenant_id = %s", (BERT,))
    await settle(service)
    assert await differences(superuser, "sales") == []


async def test_without_row_level_security_the_definitions_own_tenants_are_the_default(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute("INSERT INTO shop.plain VALUES (1, 1), (2, 1), (2, 2)")
    await create_view(shop, "plain", "SELECT * FROM shop.plain", ["n"], tenants_query=None)
    assert await settle(service) == 2
    assert await differences(superuser, "plain") == []
    assert await rows(service, "SELECT listener.tenants('plain') ORDER BY 1") == [("1",), ("2",)]
