"""What a policy, or the role that computes, changes in a result: the next sweep refreshes every tenant."""

# ruff: noqa: S608, E501 - the statements are made of the text below, and some are a line each

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection

from conftest import Database
from ledgers import arranged, managed, open_ledgers, shown, swept
from shop import one, settle

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_ledgers(database)
    return database


TENANTS = "SELECT * FROM unnest('{t1,t2}'::text[])"
RLS: LiteralString = """
ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY p ON shop.o USING (tenant_id = current_setting('app.current_tenant_id', true));
"""
ALL = [("t1", 10), ("t2", 20)]
V = "SELECT tenant_id, v FROM shop.o"

# What is arranged, the query, what changes, the rows before and after.
CHANGES: dict[str, tuple[LiteralString, str, LiteralString, list[Any], list[Any]]] = {
    "a policy more": (
        RLS, V, "CREATE POLICY q ON shop.o AS RESTRICTIVE USING (v < 15)", ALL, [("t1", 10)],
    ),
    "a policy altered": (
        RLS + "CREATE POLICY q ON shop.o AS RESTRICTIVE USING (v < 15)", V,
        "ALTER POLICY q ON shop.o USING (v < 25)", [("t1", 10)], ALL,
    ),
    "a policy's roles": (
        RLS + "CREATE POLICY q ON shop.o AS RESTRICTIVE USING (v < 15)", V,
        "ALTER POLICY q ON shop.o TO shop_app", [("t1", 10)], ALL,
    ),
    "a policy less": (
        RLS + "CREATE POLICY q ON shop.o AS RESTRICTIVE USING (v < 15)", V, "DROP POLICY q ON shop.o", [("t1", 10)], ALL,
    ),
    "the function of a policy": (
        RLS
        + """CREATE FUNCTION shop.small(int) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT $1 < 15';
             CREATE FUNCTION shop.lets(int) RETURNS boolean LANGUAGE plpgsql STABLE AS 'BEGIN RETURN shop.small($1); END';
             CREATE POLICY q ON shop.o AS RESTRICTIVE USING (shop.lets(v))""",
        V, "CREATE OR REPLACE FUNCTION shop.small(int) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT $1 < 25'",
        [("t1", 10)], ALL,
    ),
    "the policy of a table in a policy": (
        RLS
        + """CREATE TABLE shop.members (name text); INSERT INTO shop.members VALUES ('t1'), ('t2');
             ALTER TABLE shop.members ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
             CREATE POLICY p ON shop.members USING (name = 't1');
             CREATE POLICY q ON shop.o AS RESTRICTIVE USING (tenant_id IN (SELECT name FROM shop.members))""",
        V, "ALTER POLICY p ON shop.members USING (name = 't2')", [("t1", 10)], [("t2", 20)],
    ),
    "row-level security switched on": (
        "CREATE POLICY q ON shop.o USING (v < 15)", V,
        "ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY", ALL, [("t1", 10)],
    ),
    "row-level security switched off": (
        RLS + "CREATE POLICY q ON shop.o AS RESTRICTIVE USING (v < 15)", V,
        "ALTER TABLE shop.o DISABLE ROW LEVEL SECURITY", [("t1", 10)], ALL,
    ),
    "row-level security forced, of a nested view's owner": (
        """ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY; CREATE POLICY q ON shop.o USING (v < 15);
           CREATE VIEW shop.nested AS SELECT tenant_id, v FROM shop.o""",
        "SELECT tenant_id, v FROM shop.nested", "ALTER TABLE shop.o FORCE ROW LEVEL SECURITY", ALL, [("t1", 10)],
    ),
    "whose rights decide in a nested view": (
        """ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY; CREATE POLICY q ON shop.o USING (v < 15);
           CREATE VIEW shop.nested AS SELECT tenant_id, v FROM shop.o""",
        "SELECT tenant_id, v FROM shop.nested", "ALTER VIEW shop.nested SET (security_invoker = true)", ALL, [("t1", 10)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
async def test_another_policy_is_noticed_by_the_next_sweep(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], change: str
) -> None:
    arrangement, query, statement, before, after = CHANGES[change]
    await arranged(superuser, arrangement)
    await managed(shop, query, tenants_query=TENANTS)
    assert await swept(service) == []
    assert await shown(superuser) == before
    await arranged(superuser, statement)
    for tenant in ("t1", "t2"):
        assert await one(service, "SELECT outcome FROM listener.check_drift('shown', %s)", tenant) != "drift"
    assert ("shown", None) in await swept(service)
    assert await shown(superuser) == after
    assert await swept(service) == []


ROLE_CHANGES: dict[str, tuple[LiteralString, LiteralString, LiteralString, list[Any], list[Any]]] = {
    "the role that computes bypasses row-level security": (
        "CREATE POLICY q ON shop.o USING (v < 15)",
        "ALTER ROLE listener_service BYPASSRLS; ALTER ROLE listener_compute BYPASSRLS",
        "ALTER ROLE listener_service NOBYPASSRLS; ALTER ROLE listener_compute NOBYPASSRLS", [("t1", 10)], ALL,
    ),
    "the role that computes gets a role that a policy is for": (
        "CREATE POLICY q ON shop.o USING (v < 15); CREATE POLICY r ON shop.o TO shop_app USING (true)",
        "GRANT shop_app TO listener_service", "REVOKE shop_app FROM listener_service", [("t1", 10)], ALL,
    ),
    "the role that computes gets a role that a policy asks for": (
        "CREATE POLICY q ON shop.o USING (v < 15 OR pg_has_role('shop_app', 'USAGE'))",
        "GRANT shop_app TO listener_service", "REVOKE shop_app FROM listener_service", [("t1", 10)], ALL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", ROLE_CHANGES)
async def test_what_the_role_that_computes_may_see_is_noticed_by_the_next_sweep(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], change: str
) -> None:
    arrangement, statement, back, before, after = ROLE_CHANGES[change]
    await arranged(superuser, "ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY; " + arrangement)
    await managed(shop, V, tenants_query=TENANTS)
    assert await swept(service) == []
    assert await shown(superuser) == before
    try:
        await superuser.execute(statement)
        assert await swept(service) == [("shown", None)]
        assert await shown(superuser) == after
    finally:
        await superuser.execute(back)
    assert await swept(service) == [("shown", None)]
    assert await shown(superuser) == before


async def test_a_policy_that_comes_to_read_a_table_makes_it_a_source(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await arranged(superuser, RLS + "CREATE TABLE shop.members (name text); INSERT INTO shop.members VALUES ('t1')")
    await managed(shop, V, tenants_query=TENANTS)
    assert await swept(service) == []
    await arranged(
        superuser, "CREATE POLICY q ON shop.o AS RESTRICTIVE USING (tenant_id IN (SELECT name FROM shop.members))"
    )
    assert await swept(service) == [("shown", None)]
    assert await shown(superuser) == [("t1", 10)]
    await superuser.execute("INSERT INTO shop.members VALUES ('t2')")
    await settle(service)
    assert await shown(superuser) == ALL
