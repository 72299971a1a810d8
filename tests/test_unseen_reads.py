"""What a definition reads although no statement names it: by a function, or by a policy."""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection

from conftest import Database
from ledgers import arranged, managed, open_ledgers, shown, swept
from shop import differences, one, rows, settle

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_ledgers(database)
    return database


TOTAL: LiteralString = "CREATE FUNCTION shop.total() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT sum(v) FROM shop.o'"


async def test_a_table_of_depends_on_is_shared_by_all_tenants_which_a_notice_says(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await arranged(superuser, TOTAL)
    notices: list[str] = []
    async with shop.connect("listener_migrator") as migrator:
        migrator.add_notice_handler(lambda d: notices.append(f"{d.message_primary} {d.message_hint}"))
        await migrator.execute(
            """SELECT listener.create_view('shown', 'SELECT tenant_id, v, shop.total() AS t FROM shop.o', '{}',
                                           depends_on => '{shop.o}')"""
        )
    assert [n for n in notices if "depends_on names shop.o" in n and "listener.add_source" in n]
    await settle(service)
    await superuser.execute("UPDATE shop.o SET v = v + 1 WHERE tenant_id = 't2'")
    await settle(service)
    assert await shown(superuser) == [("t1", 10, 31), ("t2", 21, 31)]
    # Nobody is told otherwise.
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.add_source('shop.o', 'tenant_id')")
    await settle(service)
    await superuser.execute("UPDATE shop.o SET v = v WHERE tenant_id = 't2'")
    assert await rows(service, "SELECT tenant FROM listener.drain()") == [("t2",)]
    assert await swept(service) == []


POLICY: LiteralString = """
CREATE TABLE shop.members (tenant_id text, name text);
INSERT INTO shop.members VALUES ('t1', 'anna'), ('t2', 'bert');
ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
"""
# How a policy comes to read shop.members.
BY_POLICY: dict[str, LiteralString] = {
    "a subquery": """
        CREATE POLICY p ON shop.o USING (EXISTS (SELECT FROM shop.members m WHERE m.tenant_id = o.tenant_id))""",
    "a view": """
        CREATE VIEW shop.seen AS SELECT * FROM shop.members;
        GRANT SELECT ON shop.seen TO listener_service;
        CREATE POLICY p ON shop.o USING (tenant_id IN (SELECT tenant_id FROM shop.seen))""",
    "a function of text": """
        CREATE FUNCTION shop.known(t text) RETURNS boolean LANGUAGE plpgsql STABLE SECURITY DEFINER
            AS 'BEGIN RETURN EXISTS (SELECT FROM shop.members m WHERE m.tenant_id = t); END';
        CREATE POLICY p ON shop.o USING (shop.known(tenant_id))""",
    "a function of a function": """
        CREATE FUNCTION shop.known(t text) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER
            BEGIN ATOMIC SELECT EXISTS (SELECT FROM shop.members m WHERE m.tenant_id = t); END;
        CREATE FUNCTION shop.outer(t text) RETURNS boolean LANGUAGE sql STABLE AS 'SELECT shop.known(t)';
        CREATE POLICY p ON shop.o USING (shop.outer(tenant_id))""",
    "another table's policy": """
        CREATE TABLE shop.teams (tenant_id text);
        INSERT INTO shop.teams VALUES ('t1'), ('t2');
        ALTER TABLE shop.teams ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY p ON shop.teams USING (tenant_id IN (SELECT m.tenant_id FROM shop.members m));
        CREATE POLICY p ON shop.o USING (tenant_id IN (SELECT t.tenant_id FROM shop.teams t))""",
}


@pytest.mark.parametrize("way", BY_POLICY)
async def test_a_table_that_a_policy_reads_is_a_source_that_all_tenants_share(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], way: str
) -> None:
    await arranged(superuser, POLICY + BY_POLICY[way])
    await managed(shop, "SELECT tenant_id, v FROM shop.o", tenants_query="SELECT * FROM unnest('{t1,t2}'::text[])")
    await swept(service)
    assert await shown(superuser) == [("t1", 10), ("t2", 20)]
    await superuser.execute("DELETE FROM shop.members WHERE name = 'bert'")
    await settle(service)
    assert await shown(superuser) == [("t1", 10)]
    assert await swept(service) == []


async def test_a_function_of_a_policy_that_reads_settings_is_not_refused_and_one_that_runs_texts_is(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await arranged(
        superuser,
        """CREATE FUNCTION shop.current() RETURNS text LANGUAGE sql STABLE
               AS $$ SELECT nullif(current_setting('app.current_tenant_id', true), '') $$;
           CREATE FUNCTION shop.runs(t text) RETURNS boolean LANGUAGE plpgsql STABLE
               AS $$ DECLARE found boolean; BEGIN EXECUTE 'SELECT true' INTO found; RETURN found; END $$;
           ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
           CREATE POLICY p ON shop.o USING (tenant_id = shop.current())""",
    )
    tenants = "SELECT * FROM unnest('{t1,t2}'::text[])"
    await managed(shop, "SELECT tenant_id, v FROM shop.o", tenants_query=tenants)
    await arranged(superuser, "CREATE POLICY q ON shop.o AS RESTRICTIVE USING (shop.runs(tenant_id))")
    with pytest.raises(psycopg.Error, match=r"calls shop\.runs"):
        await managed(shop, "SELECT tenant_id, v FROM shop.o", tenants_query=tenants, name="other")
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 1
    assert await differences(superuser, "shown") != []


async def test_a_table_whose_own_policies_keep_tenants_apart_stays_its_tenants_where_a_policy_reads_it(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await arranged(
        superuser,
        """CREATE TABLE shop.lines (tenant_id text, o_id int); INSERT INTO shop.lines VALUES ('t1', 1), ('t2', 2);
           ALTER TABLE shop.lines ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
           ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
           CREATE POLICY p ON shop.o USING (tenant_id = current_setting('app.current_tenant_id', true)::text);
           CREATE POLICY p ON shop.lines USING (EXISTS (SELECT FROM shop.o WHERE o.id = o_id))""",
    )
    await managed(
        shop, "SELECT tenant_id, o_id FROM shop.lines", tenants_query="SELECT * FROM unnest('{t1,t2}'::text[])"
    )
    await swept(service)
    assert await shown(superuser) == [("t1", 1), ("t2", 2)]
    await superuser.execute("UPDATE shop.o SET id = 3 WHERE tenant_id = 't2'")
    assert await rows(service, "SELECT tenant FROM listener.drain()") == [("t2",)]
    await settle(service)
    assert await shown(superuser) == [("t1", 1)]
    # Another policy shows rows of others.
    await arranged(superuser, "CREATE POLICY q ON shop.o USING (v > 100)")
    assert await swept(service) == [("shown", None)]
    await superuser.execute("UPDATE shop.o SET id = 2, v = 101 WHERE tenant_id = 't2'")
    await settle(service)
    assert await shown(superuser) == [("t1", 1), ("t2", 2)]
    assert await rows(superuser, "SELECT tenant_column FROM listener.source WHERE table_name = 'o' ORDER BY 1") == [
        ("tenant_id",),
        (None,),
    ]
