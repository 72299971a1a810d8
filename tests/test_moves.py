"""Writes that reach a table through another one: through its root, by MERGE across partitions, through an inheritance tree."""

# ruff: noqa: E501 - the statements are made of the text below, and some are a line each

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection

from captured import emptied
from conftest import Database
from ledgers import arranged, managed, open_ledgers, swept
from shop import differences, one, rows, settle

pytestmark = pytest.mark.anyio

PARTS: LiteralString = """
CREATE TABLE shop.m (tenant_id int NOT NULL, at int NOT NULL, v int) PARTITION BY RANGE (at);
CREATE TABLE shop.m_0 PARTITION OF shop.m FOR VALUES FROM (0) TO (10);
CREATE TABLE shop.m_1 PARTITION OF shop.m FOR VALUES FROM (10) TO (30) PARTITION BY RANGE (at);
CREATE TABLE shop.m_10 PARTITION OF shop.m_1 FOR VALUES FROM (10) TO (20);
CREATE TABLE shop.m_20 (v int, tenant_id int NOT NULL, at int NOT NULL);
ALTER TABLE shop.m_1 ATTACH PARTITION shop.m_20 FOR VALUES FROM (20) TO (30);
INSERT INTO shop.m VALUES (4, 11, 1), (5, 11, 1), (6, 12, 1), (7, 22, 1), (8, 1, 1);
CREATE FUNCTION shop.by_sql() RETURNS void LANGUAGE sql AS $$
    MERGE INTO shop.m USING (VALUES (4)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = 1, v = 5 $$;
CREATE FUNCTION shop.by_plpgsql() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    MERGE INTO shop.m USING (VALUES (4)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = 1, v = 5; END $$;
CREATE FUNCTION shop.plain_update() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    UPDATE shop.m SET at = 1, v = 5 WHERE tenant_id = 4; END $$;
GRANT ALL ON ALL TABLES IN SCHEMA shop TO shop_app;
"""
WHOLE = "SELECT tenant_id, sum(v) AS v, count(*) AS n FROM shop.{} GROUP BY 1"


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_ledgers(database)
    async with database.connect() as superuser:
        await arranged(superuser, PARTS)
    return database


async def logged(superuser: AsyncConnection[Any]) -> set[str]:
    """The tenants in the log; '' stands for all of them."""
    return {t for (t,) in await rows(superuser, "SELECT DISTINCT tenant FROM listener.change_log")}


MERGE: LiteralString = "MERGE INTO shop.m USING (VALUES (4, 1), (5, 11), (99, 11)) s (t, a) ON m.tenant_id = s.t "
MOVES: dict[str, LiteralString] = {
    "one row": "MERGE INTO shop.m USING (VALUES (4)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = 1, v = 5",
    "to another tenant": "MERGE INTO shop.m USING (VALUES (5)) s (t) ON m.tenant_id = s.t "
    "WHEN MATCHED THEN UPDATE SET tenant_id = 44, at = 1",
    "some rows, others stay": MERGE + "WHEN MATCHED THEN UPDATE SET at = s.a, v = 5",
    "with an INSERT that runs": MERGE + "WHEN MATCHED THEN UPDATE SET at = s.a, v = 5 "
    "WHEN NOT MATCHED THEN INSERT VALUES (s.t, s.a, 3)",
    "with a DELETE that runs": MERGE
    + "WHEN MATCHED AND s.t = 5 THEN DELETE WHEN MATCHED THEN UPDATE SET tenant_id = 44, at = s.a",
    "with a DELETE that does not": MERGE
    + "WHEN MATCHED AND s.t < 9 THEN UPDATE SET tenant_id = 44, at = s.a WHEN MATCHED THEN DELETE",
    "with all three": MERGE
    + "WHEN MATCHED AND s.t = 5 THEN DELETE WHEN MATCHED THEN UPDATE SET tenant_id = 45, at = s.a "
    "WHEN NOT MATCHED THEN INSERT VALUES (s.t, s.a, 3)",
    "within a partition": "MERGE INTO shop.m_1 USING (VALUES (4)) s (t) ON m_1.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = 21, v = 5",
    "out of a leaf of another order": "MERGE INTO shop.m USING (VALUES (7)) s (t) ON m.tenant_id = s.t "
    "WHEN MATCHED THEN UPDATE SET at = 11, tenant_id = 46",
    "in a function of text": "SELECT shop.by_sql()",
    "in PL/pgSQL": "SELECT shop.by_plpgsql()",
    "as a prepared statement": "PREPARE p AS MERGE INTO shop.m USING (VALUES (4)) s (t) ON m.tenant_id = s.t "
    "WHEN MATCHED THEN UPDATE SET at = 1, v = 5; EXECUTE p",
    "after an UPDATE that moved in the same transaction": "UPDATE shop.m SET at = 2 WHERE tenant_id = 6; "
    "MERGE INTO shop.m USING (VALUES (4)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = 1, v = 5",
    "again after a savepoint was rolled back": """BEGIN;
        SAVEPOINT x;
        MERGE INTO shop.m USING (VALUES (4)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = 1, v = 5;
        ROLLBACK TO SAVEPOINT x;
        MERGE INTO shop.m USING (VALUES (6)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = 1, v = 6;
        COMMIT""",
}


@pytest.mark.parametrize("move", MOVES)
async def test_what_a_merge_moves_to_another_partition_refreshes_every_tenant(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], move: str
) -> None:
    await managed(shop, WHOLE.format("m"))
    await swept(service)
    await emptied(superuser, service)
    async with shop.connect("shop_app") as app:
        for statement in MOVES[move].split(";\n") if move.startswith("again") else MOVES[move].split("; "):
            await app.execute(statement)
    assert "" in await logged(superuser)
    assert await differences(superuser, "shown") != []
    await settle(service)
    assert await differences(superuser, "shown") == []


# What the log names then.
EXACT: dict[str, tuple[LiteralString, set[str]]] = {
    "UPDATE of no row": ("UPDATE shop.m SET at = 1 WHERE tenant_id = 99", set()),
    "MERGE of no row": (
        "MERGE INTO shop.m USING (VALUES (99)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = 1",
        set(),
    ),
    "MERGE that moves nothing": (
        "MERGE INTO shop.m USING (VALUES (4)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET v = 9",
        {"4"},
    ),
    "MERGE that inserts": (
        (
            "MERGE INTO shop.m USING (VALUES (99)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET v = 9 "
            "WHEN NOT MATCHED THEN INSERT VALUES (99, 3, 3)"
        ),
        {"99"},
    ),
    "UPDATE that moves": ("UPDATE shop.m SET at = 1 WHERE tenant_id = 4", {"4"}),
    "UPDATE that moves to another tenant": (
        "UPDATE shop.m SET at = 1, tenant_id = 44 WHERE tenant_id = 4",
        {"4", "44"},
    ),
    "UPDATE that moves in PL/pgSQL": ("SELECT shop.plain_update()", {"4"}),
    "DELETE": ("DELETE FROM shop.m WHERE tenant_id = 4", {"4"}),
}


@pytest.mark.parametrize("write", EXACT)
async def test_what_moves_nothing_or_is_a_plain_update_names_its_tenants_alone(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], write: str
) -> None:
    await managed(shop, WHOLE.format("m"))
    await emptied(superuser, service)
    statement, tenants = EXACT[write]
    async with shop.connect("shop_app") as app:
        await app.execute(statement)
    assert await logged(superuser) == tenants
    await settle(service)
    assert await differences(superuser, "shown") == []


THROUGH_THE_ROOT: dict[str, LiteralString] = {
    "INSERT": "INSERT INTO shop.m VALUES (4, 13, 1), (9, 23, 1)",
    "UPDATE": "UPDATE shop.m SET v = v + 1",
    "UPDATE that moves in": "UPDATE shop.m SET at = at + 10 WHERE at < 20",
    "DELETE": "DELETE FROM shop.m WHERE at > 2",
    "TRUNCATE": "TRUNCATE shop.m",
    "MERGE that moves in": "MERGE INTO shop.m USING (VALUES (8)) s (t) ON m.tenant_id = s.t WHEN MATCHED THEN UPDATE SET at = m.at + 10",
    "MERGE that moves out": "MERGE INTO shop.m USING (VALUES (4), (7)) s (t) ON m.tenant_id = s.t "
    "WHEN MATCHED THEN UPDATE SET at = 1, tenant_id = m.tenant_id * 11",
    "MERGE below the root": "MERGE INTO shop.m_1 USING (VALUES (4), (7)) s (t) ON m_1.tenant_id = s.t "
    "WHEN MATCHED THEN UPDATE SET at = 33 - m_1.at, tenant_id = m_1.tenant_id * 11",
    "COPY": "COPY shop.m FROM PROGRAM 'printf \"4\\t14\\t7\\n7\\t24\\t7\\n\"'",
}


@pytest.mark.parametrize("write", THROUGH_THE_ROOT)
@pytest.mark.parametrize("read", ["m_10", "m_20", "m_1"])
async def test_a_view_of_a_partition_sees_what_is_written_through_any_table_above_it(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], read: str, write: str
) -> None:
    await managed(shop, WHOLE.format(read))
    await emptied(superuser, service)
    await superuser.execute(THROUGH_THE_ROOT[write])
    await settle(service)
    assert await differences(superuser, "shown") == []
    assert await swept(service) == []


async def test_a_partition_that_leaves_its_root_and_comes_back_stays_captured(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await managed(shop, WHOLE.format("m_0"))
    await emptied(superuser, service)
    await arranged(superuser, "ALTER TABLE shop.m DETACH PARTITION shop.m_0")
    assert await swept(service) == [("shop.m_0", "repaired")]
    assert await one(superuser, "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'shop.m'::regclass") == 0
    await superuser.execute("INSERT INTO shop.m_0 VALUES (4, 3, 1)")
    await settle(service)
    assert await differences(superuser, "shown") == []
    await arranged(superuser, "ALTER TABLE shop.m ATTACH PARTITION shop.m_0 FOR VALUES FROM (0) TO (10)")
    assert await swept(service) == [("shop.m_0", "repaired")]
    await superuser.execute("INSERT INTO shop.m VALUES (4, 4, 1)")
    await settle(service)
    assert await differences(superuser, "shown") == []


# What happens to the table o after it was registered; then a write that reaches it, or what is below it, by another name.
CHANGES: dict[str, tuple[LiteralString, LiteralString]] = {
    "becomes a partition": (
        """CREATE TABLE shop.root (tenant_id text, id int, v int) PARTITION BY RANGE (id);
           ALTER TABLE shop.root ATTACH PARTITION shop.o FOR VALUES FROM (0) TO (100)""",
        "INSERT INTO shop.root VALUES ('t1', 3, 5)",
    ),
    "gains a child": (
        "CREATE TABLE shop.child (extra text) INHERITS (shop.o); INSERT INTO shop.child VALUES ('t2', 8, 8, 'x')",
        "INSERT INTO shop.child VALUES ('t1', 9, 9, 'x')",
    ),
    "gains a child that has a child": (
        "CREATE TABLE shop.child () INHERITS (shop.o); CREATE TABLE shop.grandchild () INHERITS (shop.child)",
        "INSERT INTO shop.grandchild VALUES ('t1', 9, 9); UPDATE shop.child SET v = v + 1",
    ),
    "gains a child that another table is a parent of": (
        """CREATE TABLE shop.other (v int, id int);
           CREATE TABLE shop.child (tenant_id text) INHERITS (shop.o, shop.other); INSERT INTO shop.child VALUES ('t1', 9, 9)""",
        "UPDATE shop.other SET v = v + 1",
    ),
    "gains a parent": (
        "CREATE TABLE shop.parent (tenant_id text, id int); ALTER TABLE shop.o INHERIT shop.parent",
        "DELETE FROM shop.parent WHERE id = 1",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_table_whose_place_among_tables_changed_is_captured_after_a_sweep(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], change: str
) -> None:
    await managed(shop, "SELECT tenant_id, sum(v) AS v, count(*) AS n FROM shop.o GROUP BY 1")
    await emptied(superuser, service)
    arrangement, write = CHANGES[change]
    await arranged(superuser, arrangement)
    assert await swept(service) == [("shop.o", "repaired")]
    assert await differences(superuser, "shown") == []
    await superuser.execute(write)
    assert await differences(superuser, "shown") != []
    await settle(service)
    assert await differences(superuser, "shown") == []
    assert await swept(service) == []


UNCOVERED: dict[str, tuple[LiteralString, LiteralString, str]] = {
    "a table that became unlogged": (
        "ALTER TABLE shop.o SET UNLOGGED",
        "ALTER TABLE shop.o SET LOGGED",
        "shop.o is unlogged, so that a crash empties it and fires no trigger: ALTER TABLE shop.o SET LOGGED",
    ),
    "a child that is unlogged": (
        "CREATE UNLOGGED TABLE shop.child () INHERITS (shop.o)",
        "ALTER TABLE shop.child SET LOGGED",
        (
            "shop.child, which is read with shop.o, is unlogged, so that a crash empties it and fires no trigger: "
            "ALTER TABLE shop.child SET LOGGED"
        ),
    ),
    "a child that is a foreign table": (
        """CREATE FOREIGN DATA WRAPPER nobody; CREATE SERVER nowhere FOREIGN DATA WRAPPER nobody;
           CREATE FOREIGN TABLE shop.child () INHERITS (shop.o) SERVER nowhere""",
        "ALTER FOREIGN TABLE shop.child NO INHERIT shop.o",
        "shop.child, which is read with shop.o, is a foreign table, and its changes fire no trigger: detach it from shop.o",
    ),
}


@pytest.mark.parametrize("case", UNCOVERED)
async def test_a_table_that_triggers_no_longer_cover_is_named_until_it_is_back(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], case: str
) -> None:
    await managed(shop, "SELECT tenant_id, sum(v) AS v, count(*) AS n FROM shop.o GROUP BY 1")
    await swept(service)
    await emptied(superuser, service)
    arrangement, back, trouble = UNCOVERED[case]
    if "FOREIGN" in arrangement:
        await superuser.execute(arrangement)
    else:
        await arranged(superuser, arrangement)
        assert ("shop.o", "repaired") in await rows(service, "SELECT source, outcome FROM listener.repair_capture()")
        assert await logged(superuser) == {""}
    assert await rows(service, "SELECT view, trouble FROM listener.view_troubles()") == [("shown", trouble)]
    await superuser.execute(back)
    await swept(service)
    assert await rows(service, "SELECT view, trouble FROM listener.view_troubles()") == []
    assert await swept(service) == []
