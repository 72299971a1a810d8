"""Capture has the rights of the owner of the schema: it runs no code of a type, and fails no write."""

# ruff: noqa: S608 - the statements are made of the text below

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection

from conftest import Database
from shop import rows

pytestmark = pytest.mark.anyio

TYPES: LiteralString = """
CREATE TABLE shop.ran (how text, as_role name);
CREATE FUNCTION shop.note(how text) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO shop.ran VALUES (how, current_user); RETURN true; END $$;
CREATE FUNCTION shop.constant(how text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS
    $$ BEGIN RETURN shop.note(how); END $$;
GRANT INSERT ON shop.ran TO PUBLIC;
CREATE DOMAIN shop.number AS int;
CREATE DOMAIN shop.order_number AS shop.number;
CREATE TYPE shop.mood AS ENUM ('good', 'bad');
CREATE FUNCTION shop.to_json(shop.mood) RETURNS json LANGUAGE plpgsql IMMUTABLE AS
    $$ BEGIN PERFORM shop.constant('cast to json'); RETURN '{}'; END $$;
CREATE CAST (shop.mood AS json) WITH FUNCTION shop.to_json(shop.mood);
CREATE FUNCTION shop.to_mood(text) RETURNS shop.mood LANGUAGE plpgsql IMMUTABLE AS
    $$ BEGIN PERFORM shop.constant('cast to mood'); RETURN 'good'; END $$;
CREATE CAST (text AS shop.mood) WITH FUNCTION shop.to_mood(text);
CREATE TABLE shop.parents (number shop.order_number, numbers int[], mood shop.mood, tenant_id text);
INSERT INTO shop.parents VALUES (1, '{1,2}', 'good', 't1');
CREATE TABLE shop.lines (number shop.order_number, numbers int[], mood shop.mood, day int) PARTITION BY RANGE (day);
CREATE TABLE shop.lines_1 PARTITION OF shop.lines FOR VALUES FROM (0) TO (10);
CREATE TABLE shop.lines_2 (mood shop.mood, day int, numbers int[], number shop.order_number);
ALTER TABLE shop.lines ATTACH PARTITION shop.lines_2 FOR VALUES FROM (10) TO (20);
CREATE TABLE shop.notes (tenant_id char(5), mood shop.mood, day int) PARTITION BY RANGE (day);
CREATE TABLE shop.notes_1 (day int, mood shop.mood, tenant_id char(5));
ALTER TABLE shop.notes ATTACH PARTITION shop.notes_1 FOR VALUES FROM (0) TO (10);
"""


@pytest.fixture
async def typed(superuser: AsyncConnection[Any]) -> AsyncConnection[Any]:
    """The superuser's connection, with tables whose types have code of their owner."""
    await superuser.execute("SET ROLE shop_owner")
    await superuser.execute(TYPES)
    await superuser.execute("RESET ROLE")
    return superuser


async def ran_as_owner(superuser: AsyncConnection[Any]) -> list[Any]:
    """What ran with the rights of the owner of the schema."""
    return await rows(superuser, "SELECT DISTINCT how FROM shop.ran WHERE as_role = 'listener_owner' ORDER BY 1")


@pytest.mark.parametrize("key", ["number", "numbers", "mood"])
@pytest.mark.parametrize("partition", ["lines_1", "lines_2"])
async def test_a_look_up_by_a_key_of_any_type_runs_no_code_of_it_and_finds_the_tenant(
    typed: AsyncConnection[Any], key: str, partition: str
) -> None:
    await typed.execute(
        "SELECT listener.add_source('shop.lines', through => 'shop.parents', columns => ARRAY[%s::name], "
        "references_columns => ARRAY[%s::name])",
        (key, key),
    )
    await typed.execute("SET ROLE shop_owner")
    await typed.execute("ALTER DOMAIN shop.number ADD CHECK (shop.constant('check ' || VALUE))")
    await typed.execute(
        f"INSERT INTO shop.{partition} (number, numbers, mood, day) VALUES (1, '{{1,2}}', 'good', %s)".encode(),
        (5 if partition == "lines_1" else 15,),
    )
    await typed.execute(f"UPDATE shop.{partition} SET mood = mood".encode())
    await typed.execute(f"DELETE FROM shop.{partition}".encode())
    await typed.execute("RESET ROLE")
    assert await rows(typed, "SELECT tenant FROM listener.change_log") == [("t1",)] * 3
    assert await ran_as_owner(typed) == []


async def test_a_partition_of_another_order_is_read_without_the_casts_of_its_other_columns(
    typed: AsyncConnection[Any], shop: Database
) -> None:
    await typed.execute("SELECT listener.add_source('shop.notes', 'tenant_id')")
    await typed.execute("SET ROLE shop_owner")
    await typed.execute("INSERT INTO shop.notes_1 VALUES (1, 'good', 'ab'), (2, 'bad', NULL)")
    await typed.execute("RESET ROLE")
    assert await rows(typed, "SELECT tenant FROM listener.change_log ORDER BY 1") == [("",), ("ab",)]
    assert await ran_as_owner(typed) == []


async def test_a_renamed_column_of_such_a_partition_means_all_tenants_and_fails_no_write(
    typed: AsyncConnection[Any], shop: Database
) -> None:
    await typed.execute("SELECT listener.add_source('shop.notes', 'tenant_id')")
    await typed.execute("SET ROLE shop_owner")
    await typed.execute("INSERT INTO shop.notes_1 VALUES (1, 'good', 'ab')")
    await typed.execute("ALTER TABLE shop.notes RENAME tenant_id TO customer")
    await typed.execute("INSERT INTO shop.notes_1 VALUES (1, 'good', 'ab')")
    await typed.execute("RESET ROLE")
    assert await rows(typed, "SELECT tenant FROM listener.change_log") == [("ab",), ("",)]


async def test_doctor_names_a_policy_whose_code_a_look_up_runs(typed: AsyncConnection[Any], shop: Database) -> None:
    findings = "SELECT object, mend FROM listener.function_findings() WHERE object = 'shop.parents'"
    await typed.execute(
        "SELECT listener.add_source('shop.lines', through => 'shop.parents', columns => '{numbers}', "
        "references_columns => '{numbers}')"
    )
    await typed.execute("ALTER TABLE shop.parents ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    await typed.execute(
        "CREATE POLICY plain ON shop.parents USING (tenant_id = current_setting('app.current_tenant_id', true))"
    )
    assert await rows(typed, findings) == []
    await typed.execute("CREATE POLICY code ON shop.parents USING (shop.note(tenant_id))")
    assert await rows(typed, findings) == [("shop.parents", "ALTER ROLE listener_owner BYPASSRLS;")]
    await typed.execute("ALTER ROLE listener_owner BYPASSRLS")
    try:
        assert await rows(typed, findings) == []
        await typed.execute("INSERT INTO shop.lines (numbers, day) VALUES ('{1,2}', 5)")
        assert await ran_as_owner(typed) == []
    finally:
        await typed.execute("ALTER ROLE listener_owner NOBYPASSRLS")


DETACHED: dict[str, LiteralString] = {
    "a column of another type": "ALTER TABLE shop.notes_1 ALTER tenant_id TYPE shop.mood USING 'good'; "
    "INSERT INTO shop.notes_1 (tenant_id) VALUES ('good')",
    "a column fewer": "ALTER TABLE shop.notes_1 DROP mood; INSERT INTO shop.notes_1 (tenant_id) VALUES ('ab')",
    "a column more": "ALTER TABLE shop.notes_1 ADD more int; INSERT INTO shop.notes_1 (tenant_id) VALUES ('ab')",
    "no tenant column": "ALTER TABLE shop.notes_1 DROP tenant_id CASCADE; INSERT INTO shop.notes_1 (day) VALUES (1)",
}


@pytest.mark.parametrize("alteration", DETACHED)
@pytest.mark.parametrize(
    "order", ["tenant_id char(5), mood shop.mood, day int", "day int, mood shop.mood, tenant_id char(5)"]
)
async def test_what_becomes_of_a_detached_partition_before_a_sweep_fails_no_write_and_runs_no_code(
    typed: AsyncConnection[Any], shop: Database, alteration: str, order: str
) -> None:
    await typed.execute("SET ROLE shop_owner")
    await typed.execute(
        """
        CREATE FUNCTION shop.to_text(shop.mood) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
            $$ BEGIN PERFORM shop.constant('cast to text'); RETURN 'ab'; END $$;
        CREATE CAST (shop.mood AS text) WITH FUNCTION shop.to_text(shop.mood);
        DROP TABLE shop.notes_1;
        """
    )
    await typed.execute(f"CREATE TABLE shop.notes_1 ({order})".encode())
    await typed.execute("ALTER TABLE shop.notes ATTACH PARTITION shop.notes_1 FOR VALUES FROM (0) TO (10)")
    await typed.execute("RESET ROLE")
    await typed.execute("SELECT listener.add_source('shop.notes', 'tenant_id')")
    await typed.execute("SET ROLE shop_owner")
    await typed.execute("ALTER TABLE shop.notes DETACH PARTITION shop.notes_1")
    await typed.execute(DETACHED[alteration])
    await typed.execute("RESET ROLE")
    assert await ran_as_owner(typed) == []
